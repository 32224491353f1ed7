"""What users do wrong: each gets an exit code by class and a message in three parts, never a traceback."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from command_line import FACTORY, arguments
from safetensors.torch import save_file

from deploypipe.cli.main import run

pytestmark = pytest.mark.e2e


def fails(capsys: pytest.CaptureFixture[str], argv: list[str], code: int, *words: str) -> None:
    found = run(argv)
    streams = capsys.readouterr()
    assert found == code, streams.err
    assert "Traceback" not in streams.err
    text = streams.err[streams.err.index("error:") :]
    lines = text.splitlines()
    assert any(line.startswith("   at: ") for line in lines), text
    assert any(line.startswith("  fix: ") for line in lines), text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"model": f"{FACTORY.parent}/factry.py:net"}, 2, ("factory.py",)),
        ({"model": f"{FACTORY}:nett"}, 2, ("nett", "net")),
        ({"model": f"{FACTORY}:raises"}, 3, ("factory.py",)),
        ({"model": f"{FACTORY}:data"}, 3, ()),
        ({"model": "torchvision:resnet81"}, 2, ("resnet18",)),
        ({"model": "resnet18"}, 2, ("torchvision:",)),
        ({"data": "imagefolder:/nowhere/at/all"}, 2, ("/nowhere/at/all",)),
        ({"data": "mnist"}, 2, ()),
        ({"target": "gpu"}, 4, ("cpu",)),
        ({"algo": "thinnet"}, 2, ("did you mean 'thinet'",)),
        ({"budget": "0%"}, 2, ("50%",)),
        ({"budget": "150%"}, 2, ("50%",)),
        ({"budget": "-3ms"}, 2, ("3ms",)),
        ({"budget": "abc"}, 2, ("50%",)),
        ({"budget": "3ms", "metric": "macs"}, 2, ()),
        ({"metric": "energy"}, 2, ("latency",)),
        ({"set": "imagse=3", "algo": "thinet"}, 2, ("images",)),
        ({"set": "images=3"}, 2, ("recipe",)),
        ({"set": "nonsense"}, 2, ("KEY=VALUE",)),
        ({"lr": "-1"}, 2, ()),
        ({"keep": "blok"}, 3, ("block",)),
        ({"metric": "macs", "table": "x"}, 2, ("--table x",)),
        ({"value": "scores", "value_rounds": 9}, 2, ("--value-rounds 9", "--value measured")),
        ({"value_finalists": 4}, 2, ("--value-finalists 4", "--value measured")),
    ],
)
def test_wrong_arguments(
    changes: dict[str, object], code: int, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, arguments(tmp_path / "run", **changes), code, *words)


def test_weights_that_do_not_fit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"stem.0.weight": torch.zeros(48, 3, 3, 3), "other": torch.zeros(1)}, tmp_path / "w.safetensors")
    fails(capsys, arguments(tmp_path / "run", weights=tmp_path / "w.safetensors"), 3, "stem.0.weight", "other")


def test_folder_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "test"):
        (tmp_path / "images" / part).mkdir(parents=True)
    fails(capsys, arguments(tmp_path / "run", data=f"imagefolder:{tmp_path / 'images'}"), 2, "class")


def test_data_of_another_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, arguments(tmp_path / "run", model="demo", metric="macs"), 3, "shape")


def test_budget_out_of_reach_names_the_smallest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, arguments(tmp_path / "run", budget="100", metric="macs", algo="l1"), 6, "smallest")


def test_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("mine")
    fails(capsys, arguments(tmp_path / "run"), 2, str(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.slow
def test_accuracy_floor_fails_after_the_report_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(tmp_path / "run", accuracy_floor=1.0, epochs=0, algo="random", metric="macs", budget="30%")
    fails(capsys, argv, 6, "floor")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["pruned"]["accuracy"] < 1.0


def test_report_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["report", str(tmp_path)], 2)
    fails(capsys, ["bench", str(tmp_path / "none.onnx")], 2, "none.onnx")


def test_what_is_no_model_is_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.md"
    text.write_text("no model")
    fails(capsys, ["bench", str(text)], 2, "no model for target cpu", "ends in .onnx")
    text = text.rename(tmp_path / "notes.onnx")
    fails(capsys, ["bench", str(text)], 5, "exit code 1: onnxruntime.capi", "INVALID_PROTOBUF")


def test_a_device_that_cannot_be_reached_is_found_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(tmp_path / "run", metric="macs", algo="l1", host="127.0.0.1:1")
    fails(capsys, argv, 5, "127.0.0.1")
    assert not [path.name for path in (tmp_path / "run").glob("*.key")], "no stage was begun"


@pytest.mark.parametrize("opset", [17, 99])
def test_an_operator_set_that_cannot_be_exported_is_found_before_training(
    opset: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "box.toml"
    target.write_text(f'name = "box"\nlike = "cpu"\n[build]\nopset = {opset}\n')
    argv = arguments(tmp_path / "run", metric="macs", algo="l1", target=target)
    fails(capsys, argv, 2, f"operator set {opset}", "build.opset", "18 or later")
    assert not [path.name for path in (tmp_path / "run").glob("*.key")], "no stage was begun"


@pytest.mark.parametrize("command", ["bench", "profile", "sensitivity"])
def test_several_targets_where_one_is_looked_at(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "m.onnx"
    model.touch()
    argv = {"bench": [str(model)], "profile": ["--model", f"{FACTORY}:net"], "sensitivity": []}[command]
    if command == "sensitivity":
        argv = ["--model", f"{FACTORY}:net", "--data", f"{FACTORY}:data"]
    fails(capsys, [command, *argv, "--target", "cpu,cpu-openvino"], 2, "several targets", "--target cpu,cpu-openvino")


def test_nothing_is_measured_afresh_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    fails(
        capsys, ["profile", "--model", f"{FACTORY}:net", "--target", "jetson-orin", "--fresh"], 2, "no device at hand", "--host"
    )


def test_a_model_with_its_weights_in_another_file_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, beside = tmp_path / "net.onnx", tmp_path / "net.onnx.data"
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[1, 64] x) => (float[1, 64] y) { y = MatMul(x, w) }'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((64, 64), dtype=np.float32), "w"))
    onnx.save(model, str(path), save_as_external_data=True, location=beside.name)
    assert run(["bench", str(path), "--no-layers"]) == 0, capsys.readouterr().err
    beside.unlink()
    fails(capsys, ["bench", str(path), "--no-layers"], 3, "net.onnx.data")
