"""torch's exporter, made quiet and quick, and what it means when it fails."""

import contextlib
import functools
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_NOISE = (
    "Traceback",
    "File ",
    "^",
    "~",
    "The above exception",
    "⬇",
    "(Refer to",
    "[torch.onnx]",
    "While executing",
    "Original ",
)


@contextlib.contextmanager
def quiet(said: io.StringIO | None = None) -> Iterator[None]:
    """Keep the exporter's progress lines, warnings and log records off the user's screen."""
    said = said or io.StringIO()
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def functions_read_once() -> Iterator[None]:
    """Keep the exporter's list of ONNX functions: it makes it from their sources for every model, half of a small export."""
    apis: Any = None
    with contextlib.suppress(ImportError):  # none of this is torch's public interface
        apis = getattr(importlib.import_module("torch.onnx._internal.exporter._registration"), "onnxscript_apis", None)
    read = getattr(apis, "get_torchlib_ops", None)
    if read is None:
        yield
        return
    apis.get_torchlib_ops = functools.partial(_listed, read)
    try:
        yield
    finally:
        apis.get_torchlib_ops = read


@functools.cache
def _listed(read: Callable[[], list[Any]]) -> list[Any]:
    return read()


def root_cause(error: BaseException) -> BaseException:
    """Follow the chain of causes to the exception that started it: the exporter wraps it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def telling_lines(text: str, count: int = 3, width: int = 300) -> str:
    """Return what a message says, without the traceback in it, on one line."""
    lines = [line.strip() for line in text.splitlines()]
    telling = [line for line in lines if line and not line.startswith(_NOISE)]
    return "; ".join(telling[:1] if len(telling) <= 1 else telling[:count])[:width]
