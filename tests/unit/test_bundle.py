"""What the owner of a device is told to type."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploypipe.pipeline.bundle import _found_again, _readme
from deploypipe.targets import load_target


@pytest.mark.parametrize("run", ["/runs/net", "/my runs/it's $HOME"])
def test_paths_are_quoted_for_the_shell(run: str) -> None:
    device = SimpleNamespace(target=load_target("jetson"))
    text = _readme(device, {"run": run, "predicted_us": {}}, "python3 x.py", "trtexec --onnx=a.onnx")
    copied, imported = (shlex.split(re.search(rf"`({start}.*?)`", text)[1]) for start in ("scp -r", "deploypipe profile"))
    assert copied == ["scp", "-r", str(Path(run, "bundle")), "USER@DEVICE:"]
    assert imported == ["deploypipe", "profile", "--import", str(Path(run, "bundle"))]


def test_a_copy_of_a_target_s_file_is_found_again_by_its_path(tmp_path: Path) -> None:
    """It may keep the name, and state another precision."""
    known = load_target("jetson-orin")
    assert _found_again(known) == "jetson-orin"
    copy = tmp_path / "jetson-orin.toml"
    copy.write_text(Path(known.path).read_text().replace("fp16", "fp32"))
    assert _found_again(load_target(copy)) == str(copy.resolve())


def test_what_was_typed_by_hand_cannot_be_imported_and_that_is_said() -> None:
    device = SimpleNamespace(target=load_target("jetson"))
    manifest = {
        "run": "/r",
        "predicted_us": {"dense": 812.0},
        "latency_source": "from a stored profile of X, not measured in this run",
    }
    text = _readme(device, manifest, "python3 x.py", "trtexec --onnx=a.onnx")
    by_hand = text.partition("## By hand")[2].partition("\n## ")[0]
    assert "cannot be imported; only the script writes `results.json`" in by_hand
    assert "its latencies are **from a stored profile of X, not measured in this run**: dense 812 us." in text
    assert "## By hand" not in _readme(device, manifest, "python3 x.py", "")
