"""How the tests of this folder call `deploypipe build`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

N_PLANS = 3  # random forms of a profile: each is exported, which takes most of the time of these tests
FACTORY = Path(__file__).parent / "factory.py"


@dataclass
class Finished:
    """What a process left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


class Started(Protocol):
    """A running command."""

    def running(self) -> bool: ...
    def signal(self, number: int) -> None: ...
    def wait(self) -> Finished: ...


Start = Callable[..., Started]


def arguments(out: Path, **changes: object) -> list[str]:
    """Return a build command; `epochs=1` changes an option, `budget=None` leaves it out."""
    options: dict[str, object] = {"model": f"{FACTORY}:net", "data": f"{FACTORY}:data", "budget": "70%", "epochs": 5}
    options |= {"batch_size": 16, "out": out}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in (options | changes).items() if value is not None]
    return ["build", "--no-distill", *(part for pair in pairs for part in pair)]
