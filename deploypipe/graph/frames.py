"""Which module is running: read off Python's frames, so that no hook has to be hung on anybody's model."""

import sys
from collections.abc import Mapping
from types import FrameType

from torch import nn

Paths = Mapping[int, str]  # id of a module -> its path in the model


def paths_of(model: nn.Module) -> Paths:
    """Return the path of every module of `model`; its own is ""."""
    return {id(module): path for path, module in model.named_modules()}


def innermost(paths: Paths) -> str:
    """Return the path of the module whose method is running, "" for the model itself or for none."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = _module_of(frame, paths)
        if path is not None:
            return path
        frame = frame.f_back
    return ""


def failed_in(error: BaseException, paths: Paths) -> str:
    """Return the path of the innermost module on the way to where `error` was raised."""
    found, trail = "", error.__traceback__
    while trail is not None:
        found = _module_of(trail.tb_frame, paths) or found
        trail = trail.tb_next
    return found


def _module_of(frame: FrameType, paths: Paths) -> str | None:
    code = frame.f_code  # `f_locals` copies every local, so it is asked for in methods only, and not in torch's hooks
    if code.co_argcount and code.co_varnames[0] == "self" and not code.co_name.startswith("__torch_"):
        return paths.get(id(frame.f_locals.get("self")))
    return None
