"""Tests run on one thread: the machine is small and results should not depend on it."""

import gc
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ssh_server import SSHD, SshServer, device_python

from tests.hasty import hasten

torch.set_num_threads(1)
hasten()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell leaves what runs in the background, and all its children
    signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/* with what the code says now")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what has been imported out of garbage collections: going through all of torch takes a quarter of a second."""
    import torch._dynamo  # noqa: F401, PLC0415 - most of it; the first export would import it

    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's cache and ledger out of the tests."""
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("DEPLOYPIPE_ALLOW_NOISE", "1")  # tests run beside each other
    monkeypatch.setenv("DEPLOYPIPE_DATA", str(tmp_path_factory.getbasetemp() / "data"))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a whole text with the file of that name in tests/golden."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert text == path.read_text(), f"{path.name} differs; if that is meant: pytest --update-golden"

    return compare


@pytest.fixture(scope="session")
def _ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    if SSHD is None:
        pytest.skip("no SSH server is installed here: apt install openssh-server")
    folder = tmp_path_factory.mktemp("ssh")
    programs = device_python(folder / "device", "onnxruntime", "numpy")
    server = SshServer(folder / "server", f"{programs}:/usr/local/bin:/usr/bin:/bin")
    server.prepare()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def ssh_server(_ssh_server: SshServer, monkeypatch: pytest.MonkeyPatch) -> SshServer:
    """A device on the loopback address that has Python, NumPy and ONNX Runtime, and the client set up to reach it."""
    monkeypatch.setenv("DEPLOYPIPE_SSH_CONFIG", str(_ssh_server.config))
    return _ssh_server
