"""Tests run on one thread: the machine is small and results should not depend on it."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's cache out of the tests."""
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
