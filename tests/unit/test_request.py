"""What a request names by itself: its run folder."""

from pathlib import Path

import pytest

from deploypipe.errors import UsageError
from deploypipe.pipeline.request import Request


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({}, "demo-cpu-auto-50"),
        ({"model": "torchvision:resnet50", "algo": "l1", "budget": "3ms"}, "torchvision-resnet50-cpu-l1-3ms"),
        ({"model": "a/net.py:make"}, "a-net.py-make-cpu-auto-50"),
        ({"model": "../b/net.py:make"}, "b-net.py-make-cpu-auto-50"),
        ({"model": "/srv/models/nets/b/net.py:make"}, "nets-b-net.py-make-cpu-auto-50"),
        ({"metric": "macs"}, "demo-cpu-auto-macs-50"),
        ({"target": "targets/mine.toml", "host": "pi@board:22"}, "demo-mine-pi-board-22-auto-50"),
        ({"out": "elsewhere"}, None),
    ],
)
def test_what_differs_in_a_request_differs_in_its_folder(asked: dict[str, str], name: str | None) -> None:
    assert Request(**asked).folder == (Path("runs") / name if name else Path("elsewhere"))


@pytest.mark.parametrize("out", ["", "  "])
def test_an_empty_name_is_not_the_current_folder(out: str) -> None:
    with pytest.raises(UsageError, match="the run folder has no name"):
        Request(out=out)
