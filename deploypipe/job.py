"""A program to run on a target: what backends describe and runners carry out."""

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
    """

    argv: tuple[str, ...]
    push: Mapping[str, Path | bytes] = field(default_factory=dict)
    pull: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0


@dataclass(frozen=True)
class JobResult:
    """What a finished job left: its output and the local paths of the fetched files."""

    exit_code: int
    stdout: str
    stderr: str
    pulled: Mapping[str, Path]
    seconds: float
