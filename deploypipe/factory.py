"""Call the user's own code: `file.py:factory` and `package.module:factory`, with errors that point into their file."""

import ast
import hashlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from traceback import FrameSummary
from types import CodeType, ModuleType
from typing import Any

from deploypipe.errors import DeployPipeError, UsageError, nearest

_STDLIB = Path(sysconfig.get_path("stdlib")).resolve()
_HERE = Path(__file__).resolve().parent
_OWN = 2  # rank of a file
_LISTED = 20  # names of files in one message
_ALIKE = 0.6  # of two names, from 0 to 1: below, one was not meant by the other


def find_factory(spec: str, *, option: str, error: type[DeployPipeError]) -> Callable[[], Any]:
    """Import the factory that `spec` names; calling what is returned calls it without arguments.

    Two steps, because a file is imported only once: random numbers must be seeded between import and call.

    Args:
        spec: `file.py:factory` or `package.module:factory`.
        option: The command line option that the user gave, for messages ("--model").
        error: Raised when the user's code fails.

    Raises:
        UsageError: There is no such file, module or factory, or it is not callable.
        error: Importing or calling it raised; the message names the innermost line of the user's own code.
    """
    source, _, name = spec.rpartition(":")
    at = f"{option} {spec}"
    if not source or not name:
        raise UsageError(f"'{spec}' names no factory", at=at, fix="write file.py:factory or package.module:factory")
    path = source_file(spec, at)
    folder = path.parent if path else Path.cwd()
    with _importable(folder):
        module = _import_file(path, at, error) if path else _import_package(source, at, error)
    factory = _attribute(module, name, at)

    def call() -> Any:
        with _importable(folder):
            return guarded(factory, f"factory '{name}' failed", at, error)

    return call


def source_file(spec: str, at: str = "") -> Path | None:
    """Return the absolute path of the file in `file.py:factory`, or None if `spec` names a package module.

    Raises:
        UsageError: The file does not exist.
    """
    source = spec.rpartition(":")[0]
    if not (source.endswith(".py") or "/" in source or "\\" in source):
        return None
    path = Path(os.path.expanduser(source)).resolve()  # noqa: PTH111 - Path's own raise where there is no such user, or
    if not os.path.isfile(path):  # noqa: PTH113 - a name is too long, or a folder may not be read
        advice = near_path(path, "Python file", lambda entry: entry.suffix == ".py" and entry.is_file())
        raise UsageError(f"there is no file '{source}'", at=at or spec, fix=advice)
    try:
        path.open("rb").close()
    except OSError as failure:
        message = f"the file '{source}' cannot be read: {failure.strerror}"
        raise UsageError(message, at=at or spec, fix=f"allow it: chmod u+r '{path}'") from failure
    return path


def own_sources(spec: str, modules: Iterable[str] = ()) -> list[Path]:
    """Return the user's own Python files that a factory, and the named modules, come from or refer to, ordered by path.

    Neither installed packages nor the standard library: what these do changes with their version, not from run to run.

    Args:
        spec: Of the factory, as in `find_factory`, which has imported it.
        modules: Names of other modules to begin with.
    """
    path = source_file(spec)
    found: dict[Path, None] = {}
    waiting, seen = [_name_of(path) if path else spec.rpartition(":")[0], *modules], set[str]()
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        if name in seen or module is None:
            continue
        seen.add(name)
        source = Path(getattr(module, "__file__", None) or "").resolve()
        if source.suffix == ".py" and _rank(source) == _OWN:
            found[source] = None
            waiting += [_module_of(value) for value in vars(module).values()]
            waiting += _imported(source, getattr(module, "__package__", None) or "")
    return sorted(found)


def _imported(source: Path, package: str) -> list[str]:
    """Return the names of modules that a file may import, anywhere in it: a number says not which module it was taken from."""
    found = []
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            try:
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # beyond the top: an attempt that the file itself gives up
                continue
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    parts = [name.split(".") for name in found]
    return [".".join(part[:n]) for part in parts for n in range(1, len(part) + 1)]


def _module_of(value: Any) -> str:
    return str(value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", ""))


def near_path(path: Path, what: str, fits: Callable[[Path], bool]) -> str:
    """Return advice for a path that does not exist: the names in its folder that may be meant, or the part that is missing.

    Args:
        path: Absolute.
        what: What it should be ("Python file").
        fits: Whether an entry of the folder is one.
    """
    parent = path.parent
    if not os.path.isdir(parent):  # noqa: PTH112 - Path.is_dir raises where a folder may not be read
        missing = next(folder for folder in (parent, *parent.parents) if os.path.isdir(folder.parent))  # noqa: PTH112
        return _why_no_folder(missing)
    try:
        names = [entry.name for entry in parent.iterdir() if fits(entry) and not entry.name.startswith(".")]
    except OSError as failure:
        return f"the folder '{parent}' cannot be looked at: {failure.strerror}"
    is_top = parent == parent.parent  # its entries are the system's: named only if they look like what was typed
    close = get_close_matches(path.name, names, n=_LISTED, cutoff=_ALIKE if is_top else 0)
    return nearest(path.name, close) if close else f"there is no {what} {'of such a name ' if names else ''}in '{parent}'"


def _why_no_folder(path: Path) -> str:
    """Return why `path`, whose parent is a folder, is none that can be entered."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return f"the folder '{path}' does not exist either"
    except OSError as failure:
        return f"the folder '{path.parent}' cannot be looked at: {failure.strerror}"
    return f"'{path}' is a file, not a folder"


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the user's code import its neighbours, as it can when run as a script."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


class _Uncached(SourceFileLoader):
    """Compiles the file as it is: bytecode that was kept counts as current if second and size agree, after an edit too."""

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the file, never that of its cache."""
        return self.source_to_code(self.get_data(self.path), self.path)


def _name_of(path: Path) -> str:
    """Return the module's name of a file. The content is part of it: an edited file is imported anew."""
    return f"_deploypipe_{path.stem}_{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:12]}"


def _import_file(path: Path, at: str, error: type[DeployPipeError]) -> ModuleType:
    name = _name_of(path)
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path, loader=_Uncached(name, str(path)))
    loader = found.loader if found else None
    if found is None or loader is None:
        raise UsageError(f"'{path.name}' is not a Python file", at=at, fix="give a file that ends in .py")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and typing look their module up while it is executed
    try:
        guarded(partial(loader.exec_module, module), f"'{path.name}' cannot be imported", at, error)
    except DeployPipeError:
        del sys.modules[name]
        raise
    return module


def _import_package(source: str, at: str, error: type[DeployPipeError]) -> ModuleType:
    parts = source.split(".")
    if not all(part.isidentifier() for part in parts):
        raise UsageError(
            f"'{source}' is neither a file nor a module", at=at, fix="write file.py:factory or package.module:factory"
        )
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        # Finding a submodule imports its parents, which is the user's code already.
        if guarded(partial(_find, name), f"'{name}' cannot be imported", at, error) is None:
            fix = "install it, run from its folder, or give a file: file.py:factory"
            raise UsageError(f"there is no module '{name}'", at=at, fix=fix)
    return guarded(partial(import_module, source), f"'{source}' cannot be imported", at, error)  # type: ignore[no-any-return]


def _find(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as failure:
        if failure.name and name.startswith(failure.name):  # the parent is a plain module
            return None
        raise


def _attribute(module: ModuleType, name: str, at: str) -> Callable[[], Any]:
    factory = getattr(module, name, None)
    if factory is None:
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        own = [key for key in own if getattr(getattr(module, key), "__module__", None) == module.__name__] or own
        raise UsageError(f"there is no factory '{name}'", at=at, fix=nearest(name, own) if own else "define a function there")
    is_instance = hasattr(factory, "forward") and not isinstance(factory, type)  # an nn.Module can be called, but makes nothing
    if callable(factory) and not is_instance:
        return factory  # type: ignore[no-any-return]
    raise UsageError(f"'{name}' is a {type(factory).__name__}, not a function", at=at, fix=f"write: def make(): return {name}")


def guarded(
    function: Callable[[], Any],
    message: str,
    at: str,
    error: type[DeployPipeError],
    fix: str = "correct that line; the factory must work when called without arguments",
) -> Any:
    """Return what the user's `function` returns; a failure becomes `error`, at the innermost line of the user's code."""
    try:
        return function()
    except DeployPipeError:
        raise
    except (Exception, SystemExit) as failure:
        raise _explained(failure, message, at, error, fix) from failure


def _explained(failure: BaseException, message: str, at: str, error: type[DeployPipeError], fix: str) -> DeployPipeError:
    if isinstance(failure, SyntaxError) and failure.filename:
        place, line = f"{failure.filename}:{failure.lineno}", (failure.text or "").strip()
    else:
        frame = _users_frame(failure)
        place, line = (f"{frame.filename}:{frame.lineno}", frame.line or "") if frame else (at, "")
    text = f"{type(failure).__name__}: {failure}".rstrip(": ")
    where = f"{place}: {line}" if line else place
    return error(f"{message}: {text}", at=where, fix=fix)


def _users_frame(failure: BaseException) -> FrameSummary | None:
    """Return the innermost frame in the user's own files; failing that, in an installed package other than torch."""
    frames = [frame for frame in traceback.extract_tb(failure.__traceback__) if not frame.filename.startswith("<")]
    ranks = [_rank(Path(frame.filename).resolve()) for frame in frames]
    best = max(ranks, default=0)
    return [frame for frame, rank in zip(frames, ranks, strict=True) if rank == best][-1] if best else None


def _rank(path: Path) -> int:
    """Return how likely the reader is to know a file: `_OWN` their own, 1 of a package, 0 of torch, Python or deploypipe."""
    for folder in ("site-packages", "dist-packages"):
        if folder in path.parts:
            package = path.parts[path.parts.index(folder) + 1]
            return int(package not in ("torch", "deploypipe"))
    return 0 if path.is_relative_to(_STDLIB) or path.is_relative_to(_HERE) else _OWN
