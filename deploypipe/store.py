"""The run directory: every stage's result is kept under a key, so running the same command again resumes.

    runs/x/plan.json ...     results, whole or absent
    runs/x/plan.key          what the result was made from, and the size and hash of each of its files
    runs/x/.partial/         where a stage works; nothing in it counts as a result
    runs/x/.lock             held while a process works on the directory

A key file is written twice: first as a promise ("these files are about to change"), then, when all files lie in
place, as the record of a finished stage. A crash at any instant leaves either the one or the other.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from deploypipe.errors import UsageError
from deploypipe.folder import claim, explained, release
from deploypipe.progress import Reporter, Silent

T = TypeVar("T")

CHECKPOINT = "checkpoint"
"""Sub-folder of a stage's working folder that outlives an interruption, as long as the stage's key stays the same."""

_SCHEMA = 1
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Kept(Generic[T]):
    """A stage's result. Pass it on in the `key_parts` of every stage that depends on it.

    Attributes:
        stage: Name of the stage.
        value: What `load` read from the run directory.
        key: Hash of what the result was made from and of its files' contents.
        seconds: What computing took, also when the result is reused.
        reused: The result was there already.
    """

    stage: str
    value: T
    key: str
    seconds: float
    reused: bool


@dataclass(frozen=True)
class _Record:
    """Content of a key file; `done` is False while the files are being exchanged."""

    wanted: str
    result: str
    after: Mapping[str, str]  # stage -> key of the result that this one was made from
    files: Mapping[str, Sequence[Any]]  # path below the run directory -> [bytes, sha256]
    seconds: float
    done: bool
    schema: int = _SCHEMA


class Store:
    """A run directory, locked for this process while used as a context manager.

    >>> with Store("runs/x", reporter) as store:                                          # doctest: +SKIP
    ...     plan = store.keep("plan", [1, options], lambda folder: save(folder), KeepPlan.load_from)
    ...     small = store.keep("compact", [1, plan], lambda folder: cut(plan.value, folder), read_weights)

    Raises:
        UsageError: On entering: the directory cannot be made or written, or another process works on it.
    """

    def __init__(self, root: str | Path, reporter: Reporter | None = None) -> None:
        self.root = Path(os.path.expanduser(root)).absolute()  # noqa: PTH111 - Path's own raises where there is no such user
        self._reporter: Reporter = reporter or Silent()
        self._lock: int | None = None
        self._made = False  # was the folder not there before? Then it goes again if nothing comes of it

    def __enter__(self) -> Self:
        with explained(self.root):
            self._made = not self.root.exists()
            self._lock = claim(self.root, self._reporter)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        partial = self.root / _PARTIAL
        if partial.is_dir() and not any(partial.iterdir()):
            partial.rmdir()
        if self._lock is not None:
            release(self._lock, self.root, remove_if_empty=self._made)
            self._lock = None

    def keep(
        self, stage: str, key_parts: Sequence[object], compute: Callable[[Path], object], load: Callable[[Path], T]
    ) -> Kept[T]:
        """Return the stage's stored result, or compute and store it.

        Args:
            stage: Name of the stage; the key lies in `<stage>.key`.
            key_parts: All that the result depends on: the stage's version, its options, and the `Kept` results
                that it was made from. Plain JSON values, paths, dataclasses of these, and `Kept`.
            compute: Writes the result's files into the empty folder that it is given. What lies in the folder's
                `checkpoint` sub-folder is no result, but is still there when an interrupted stage starts again.
            load: Reads the result from the run directory. It is called after `compute` too, so an
                uninterrupted run uses the very values that a resumed one reads.

        Raises:
            UsageError: The disk is full, or the directory may not be written.
        """
        assert self._lock is not None, "use the store as a context manager"
        wanted, after = _identify(stage, key_parts)
        record = _read(self.root, stage)
        if record and record.done and record.wanted == wanted:
            damaged = _damaged(self.root, record)
            if not damaged:
                self._discard(stage)  # of a run that was killed right after it had finished the stage
                self._reporter.reused(stage)
                return Kept(stage, load(self.root), record.result, record.seconds, reused=True)
            self._reporter.note(f"{damaged} was changed or removed since: stage '{stage}' is computed again")
        self._reporter.stage(stage)
        started = time.perf_counter()
        with explained(self.root):
            folder = self._working_folder(stage, wanted)
            try:
                compute(folder)
            except BaseException:
                _empty(folder)
                raise
            new = self._commit(stage, wanted, after, folder, time.perf_counter() - started)
        return Kept(stage, load(self.root), new.result, new.seconds, reused=False)

    def _working_folder(self, stage: str, wanted: str) -> Path:
        """Return an empty folder, but for the checkpoint of an interrupted attempt under the same key."""
        mine = self.root / _PARTIAL / f"{stage}-{wanted[:16]}"
        self._discard(stage, but=mine)
        (mine / CHECKPOINT).mkdir(parents=True, exist_ok=True)
        _empty(mine)
        return mine

    def _discard(self, stage: str, but: Path | None = None) -> None:
        for folder in (self.root / _PARTIAL).glob(f"{stage}-*"):
            if folder != but and folder.is_dir() and folder.name.rpartition("-")[0] == stage:  # else a key, half-written
                shutil.rmtree(folder)

    def _commit(self, stage: str, wanted: str, after: Mapping[str, str], folder: Path, seconds: float) -> _Record:
        """Exchange the stage's old files for those in `folder`; see the module's first lines for the order."""
        paths = sorted(p for p in folder.rglob("*") if p.is_file() and CHECKPOINT not in p.relative_to(folder).parts[:1])
        files = {path.relative_to(folder).as_posix(): [path.stat().st_size, digest(path)] for path in paths}
        for path in paths:
            _sync(path)
        result = _hash([wanted, files])
        old = _read(self.root, stage)
        self._refuse_foreign(stage, files, old)
        promise = _Record(wanted, result, after, {**(old.files if old else {}), **files}, seconds, done=False)
        _write(self.root, stage, promise)
        self._forget_dependents(stage, result)
        for name in promise.files.keys() - files.keys():
            (self.root / name).unlink(missing_ok=True)
        for name in files:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).replace(self.root / name)
            _sync((self.root / name).parent)
        done = _Record(wanted, result, after, files, seconds, done=True)
        _write(self.root, stage, done)
        self._discard(stage)
        return done

    def _refuse_foreign(self, stage: str, files: Mapping[str, object], old: _Record | None) -> None:
        """Refuse to write over a file that is not this stage's own."""
        for other in _stages(self.root):
            record = _read(self.root, other)
            if other != stage and record and (shared := record.files.keys() & files.keys()):
                raise ValueError(f"stage '{stage}' writes {sorted(shared)}, which belong to stage '{other}'")
        for name in files.keys() - (old.files.keys() if old else set()):
            if (self.root / name).exists():
                fix = "choose another --out folder, or move the file away"
                raise UsageError(f"'{name}' is in the run folder but was not written by a run", at=str(self.root), fix=fix)

    def _forget_dependents(self, stage: str, result: str) -> None:
        """Delete what was made from another result of `stage`, so that no mixture of two runs can be read."""
        for other in _stages(self.root):
            record = _read(self.root, other)
            if record and record.after.get(stage, result) != result:
                self._forget_dependents(other, "")
                for name in record.files:
                    (self.root / name).unlink(missing_ok=True)
                _key_file(self.root, other).unlink(missing_ok=True)


def finished(root: str | Path, stage: str) -> bool:
    """Say whether the stage's files are whole and made from the results that lie in `root` now."""
    root = Path(root)
    record = _read(root, stage)
    if record is None or not record.done or _damaged(root, record):
        return False
    sources = {upstream: _read(root, upstream) for upstream in record.after}
    return all(source and source.result == record.after[upstream] for upstream, source in sources.items()) and all(
        finished(root, upstream) for upstream in sources
    )


def digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's content: the key part for an input that the user may edit."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identify(stage: str, key_parts: Sequence[object]) -> tuple[str, dict[str, str]]:
    after: dict[str, str] = {}

    def plain(value: object) -> object:
        match value:
            case Kept():
                after[value.stage] = value.key
                return {"stage": value.stage, "key": value.key}
            case None | bool() | int() | float() | str():
                return value
            case Path():
                return str(value)
            case Mapping():
                return {str(name): plain(part) for name, part in value.items()}
            case list() | tuple():
                return [plain(part) for part in value]
            case _ if is_dataclass(value):
                return {part.name: plain(getattr(value, part.name)) for part in fields(value)}
            case _:
                raise TypeError(f"a {type(value).__name__} has no stable form for the key of stage '{stage}'")

    return _hash([_SCHEMA, stage, plain(list(key_parts))]), after


def _hash(state: object) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _key_file(root: Path, stage: str) -> Path:
    return root / f"{stage}.key"


def _stages(root: Path) -> list[str]:
    return sorted(path.stem for path in root.glob("*.key"))


def _read(root: Path, stage: str) -> _Record | None:
    """Return the stage's record; None if there is none, or if it was not written by this version."""
    try:
        record = _Record(**json.loads(_key_file(root, stage).read_text()))
        paired = all(len(facts) == 2 for facts in record.files.values())
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, AttributeError):
        return None
    sound = paired and isinstance(record.after, dict) and isinstance(record.seconds, int | float)
    return record if sound and record.schema == _SCHEMA else None


def _write(root: Path, stage: str, record: _Record) -> None:
    temporary = root / _PARTIAL / f"{stage}.key"
    with temporary.open("w") as file:
        json.dump(vars(record), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(_key_file(root, stage))
    _sync(root)


def _damaged(root: Path, record: _Record) -> str:
    """Return the first file that is not as the stage left it; empty if all are."""
    for name, (size, content) in record.files.items():
        path = root / name
        if not path.is_file() or path.stat().st_size != size or digest(path) != content:
            return name
    return ""


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            if entry.name != CHECKPOINT:
                shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(path: Path) -> None:
    """Ask the disk to hold the file's content, or the folder's entries, before we go on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
