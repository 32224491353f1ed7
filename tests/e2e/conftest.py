"""The real command line in processes of its own, and one uninterrupted run that the tests of this folder share."""

import contextlib
import os
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from command_line import N_PLANS, Finished, Start, arguments

from tests.ready import READY


def _child(argv: list[str], home: Path, log: Path) -> None:
    """Be `deploypipe argv`: started from a server that has the heavy imports done, as many starts are needed."""
    os.environ |= {"HOME": str(home), "DEPLOYPIPE_CACHE": str(home / "cache"), "DEPLOYPIPE_DATA": str(home / "data"), "CI": "1"}
    os.environ["DEPLOYPIPE_ALLOW_NOISE"] = "1"  # tests run beside each other
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    import torch  # noqa: PLC0415 - after the environment is set

    from deploypipe.cli.main import run  # noqa: PLC0415
    from deploypipe.profiler import context  # noqa: PLC0415

    context.N_PLANS = N_PLANS
    torch.set_num_threads(1)
    with open(1, "w", closefd=False) as sys.stdout, open(2, "w", closefd=False) as sys.stderr:
        code = run(argv)
    os._exit(code)


@dataclass
class _Started:
    process: BaseProcess
    log: Path

    def running(self) -> bool:
        return self.process.is_alive()

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, number)

    def wait(self) -> Finished:
        self.process.join(240)
        assert not self.process.is_alive()
        texts = [(self.log / name).read_text() if (self.log / name).exists() else "" for name in ("out", "err")]
        return Finished(self.process.exitcode or 0, *texts)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start `deploypipe` with an empty HOME and a cache of this session."""
    home = tmp_path_factory.mktemp("home")

    def run(*argv: str) -> _Started:
        log = tmp_path_factory.mktemp("log")
        process = READY.Process(target=_child, args=(list(argv), home, log))
        process.start()
        return _Started(process, log)

    return run


@pytest.fixture(scope="session")
def reference(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a build that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    finished = start(*arguments(out)).wait()
    assert finished.code == 0, finished.err
    return out
