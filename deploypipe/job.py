"""A program to run on a target: what backends describe and runners carry out."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PYTHON = "{python}"  # in argv: the interpreter of the machine that runs the job


@dataclass(frozen=True)
class Job:
    """One program to run in an empty folder on the target.

    Attributes:
        argv: Program and arguments, never a shell line. `{python}` stands for the machine's interpreter.
        push: File name in the folder -> a local file, or the content itself.
        pull: File names to fetch when the program has ended.
        env: Added to the environment.
        timeout_s: The program is ended after this time.

    A file name is plain, without a folder; an environment variable has a name that a shell can export. Else: ValueError.
    """

    argv: tuple[str, ...]
    push: Mapping[str, Path | bytes] = field(default_factory=dict)
    pull: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in (*self.push, *self.pull):
            if name in {"", ".", ".."} or "/" in name or "\0" in name:
                raise ValueError(f"'{name}' is no plain file name")
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"'{name}' is no name of an environment variable")


@dataclass(frozen=True)
class JobResult:
    """What a finished job left: its output and the local paths of the fetched files."""

    exit_code: int
    stdout: str
    stderr: str
    pulled: Mapping[str, Path]
    seconds: float
