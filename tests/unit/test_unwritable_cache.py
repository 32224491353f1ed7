"""A cache of profiles that cannot be written: the user is told which folder, and how to name another."""

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from deploypipe.errors import UsageError
from deploypipe.folder import explained
from deploypipe.latency.widths import Steps
from deploypipe.pipeline.commands import profile_model
from deploypipe.pipeline.request import Request
from deploypipe.profiler import measure

ADVICE = "set DEPLOYPIPE_CACHE to a folder that can be written"


def profiled(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Profile without measuring: what would be measured first is known."""
    monkeypatch.setattr(measure.Bench, "cost_of_measuring", lambda _: (1.0, 0.1, 1.0))
    monkeypatch.setattr(measure, "learn_steps", lambda _: {"conv": Steps(8)})
    measure.profile(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), torch.zeros(1, 3, 8, 8), cache_dir=cache)


def test_a_file_in_the_place_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file, not a folder") as caught:
        profiled(monkeypatch, tmp_path / "file" / "profiles")
    assert (caught.value.at, caught.value.fix) == (str(tmp_path / "file" / "profiles"), ADVICE)


def test_a_place_that_takes_no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no folder can be made there") as caught:
        profiled(monkeypatch, Path("/proc/nope"))
    assert (caught.value.at, caught.value.fix) == ("/proc/nope", ADVICE)


def test_a_cache_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, _: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(measure.latency_file, "write_file", refused)
    with pytest.raises(UsageError, match="the folder cannot be written: Permission denied") as caught:
        profiled(monkeypatch, tmp_path)
    assert caught.value.at.startswith(str(tmp_path))
    assert caught.value.fix == f"{ADVICE}, or change the folder's permissions"


def test_the_inner_of_two_folders_is_the_one_that_is_named(tmp_path: Path) -> None:
    """A build profiles while its own run folder is watched."""
    inner = tmp_path / "cache"
    with pytest.raises(UsageError, match="the disk is full") as caught, explained(tmp_path), explained(inner, ADVICE):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.at == str(inner)
    assert f"or {ADVICE}" in caught.value.fix


def test_a_folder_to_save_in_is_made_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    long = tmp_path / ("x" * 300)
    for place, said in (
        (tmp_path / "file" / "x", "is a file"),
        (tmp_path / "link", "link' is a link to nothing"),
        (long, "too long"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            profile_model(Request(model="no such model"), save=place)
        assert "--save" in caught.value.fix
