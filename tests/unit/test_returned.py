"""What the owner of a device measured, and imported into the run."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from deploypipe.errors import UsageError
from deploypipe.graph import trace
from deploypipe.latency.estimate import estimated
from deploypipe.latency.table import LatencyTable
from deploypipe.pipeline.absent import BY_OWNER, RETURNED, Absent
from deploypipe.pipeline.artifacts import bench_stage, file_notes
from deploypipe.pipeline.returned import import_results
from deploypipe.store import Kept, Store
from deploypipe.targets import load_target

ASKED = ["l1", "50%", "latency"]
JETSON = "jetson-orin"
EXAMPLE = torch.zeros(1, 3, 16, 16)


def answered(run: Path, us: dict[str, float]) -> None:
    """Leave what an import leaves: the same device, the same files, other latencies."""
    sha256 = {side: hashlib.sha256(side.encode()).hexdigest() for side in us}
    latencies = {side: {"median_us": median} for side, median in us.items()}
    about = {"target": "jetson-orin", "precision": "fp16", "passing": {"clocks": "fast"}, "notes": [f"{BY_OWNER} Orin"]}
    state = {"facts": {"gpu": "Orin"}, "sha256": sha256, "latencies": latencies, "asked": ASKED}
    (run / RETURNED).write_text(json.dumps(about | state))


def benched(run: Path, target: str = "jetson-orin") -> Kept:
    def built(side: str) -> Kept[Path]:
        name = f"{side}.onnx"
        return store.keep(
            f"build-{side}", [1], lambda folder: (folder / name).write_bytes(side.encode()), lambda root: root / name
        )

    with Store(run) as store:
        files = {side: built(side) for side in ("dense", "pruned")}
        return bench_stage(store, Absent(load_target(target), run), files, None)


def test_a_second_measurement_on_the_same_device_replaces_the_first(tmp_path: Path) -> None:
    assert benched(tmp_path).value == {}
    for us in ({"dense": 1000.0, "pruned": 900.0}, {"dense": 600.0, "pruned": 290.0}):
        answered(tmp_path, us)
        assert {side: latency["median_us"] for side, latency in benched(tmp_path).value.items()} == us
        assert benched(tmp_path).reused


def test_the_report_keeps_who_measured_and_how_the_device_was_set(tmp_path: Path) -> None:
    answered(tmp_path, {"dense": 1000.0, "pruned": 900.0})
    benched(tmp_path)
    assert json.loads((tmp_path / "device.json").read_text()) == {"clocks": "fast"}
    assert file_notes(tmp_path) == [f"{BY_OWNER} Orin"]
    benched(tmp_path, "jetson-orin-nano")
    assert file_notes(tmp_path) == []


def test_what_was_measured_on_one_target_says_nothing_of_another(tmp_path: Path) -> None:
    """Both run the same runtime at the same precision, so that the files may be the same, byte by byte."""
    answered(tmp_path, {"dense": 1000.0, "pruned": 900.0})
    assert benched(tmp_path).value
    assert benched(tmp_path, "jetson-orin-nano").value == {}
    assert "gpu" not in Absent(load_target("jetson-orin-nano"), tmp_path).facts


def test_a_run_s_own_table_is_used_where_it_applies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path / "cache"))
    answered(tmp_path, {"dense": 1000.0, "pruned": 900.0})
    graphs = [trace(nn.Sequential(nn.Conv2d(3, n, 3), nn.ReLU(), nn.Conv2d(n, 8, 3)).eval(), EXAMPLE) for n in (32, 48)]
    for device in (JETSON, "jetson-orin-nano"):
        estimated(graphs[0], load_target(device)).save(tmp_path / device)
    mark = {**LatencyTable.load(tmp_path / JETSON).facts, "mark": "own"}
    replace(LatencyTable.load(tmp_path / JETSON), facts=mark).save(tmp_path / "table")

    def marked(graph, sparsity: str = "", target: str = JETSON) -> bool:
        return "mark" in Absent(load_target(target), tmp_path, sparsity, ASKED).known_table(graph, None).facts

    assert marked(graphs[0])
    assert not marked(graphs[1]), "the user has edited the model"
    assert not marked(graphs[0], "auto"), "it does not price 2:4 weights"
    assert not marked(graphs[0], target="jetson-orin-nano")


MANIFEST = {"schema": 1, "run": "nowhere", "target": JETSON, "precision": "fp16", "sha256": {"dense": "a"}, "predicted_us": {}}
WHOLE = MANIFEST | {"latency_source": "estimated"}


@pytest.mark.parametrize(
    ("manifest", "answer", "words"),
    [
        ({"schema": 1}, {}, "damaged bundle: there is no fitting run, target"),
        ([], {}, "damaged bundle: a list"),
        (
            WHOLE,
            {"sha256": {"dense": "a"}},
            "damaged results: there is no fitting facts, bench",
        ),
        (
            WHOLE,
            {"sha256": {"dense": "a"}, "facts": {"arch": "aarch64"}, "bench": {}, "profile": {}},
            "damaged results: there is no fitting facts.runtime, facts.version",
        ),
        (WHOLE, {"facts": "x", "bench": {}, "profile": {}}, "there is no fitting facts"),
    ],
)
def test_a_damaged_import_is_the_file_s_fault(tmp_path: Path, manifest: object, answer: object, words: str) -> None:
    (tmp_path / "bundle.json").write_text(json.dumps(manifest))
    (tmp_path / "results.json").write_text(json.dumps(answer))
    with pytest.raises(UsageError) as caught:
        import_results(tmp_path)
    assert words in caught.value.message


def test_an_import_of_a_folder_that_is_not_there_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        import_results(tmp_path / "nothere")
    assert caught.value.message == f"there is no '{tmp_path / 'nothere'}'"
