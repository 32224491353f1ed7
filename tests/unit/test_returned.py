"""What the owner of a device measured, and imported into the run."""

import hashlib
import json
from pathlib import Path

from deploypipe.pipeline.absent import RETURNED, Absent
from deploypipe.pipeline.artifacts import bench_stage
from deploypipe.store import Kept, Store
from deploypipe.targets import load_target


def answered(run: Path, us: dict[str, float]) -> None:
    """Leave what an import leaves: the same device, the same files, other latencies."""
    sha256 = {side: hashlib.sha256(side.encode()).hexdigest() for side in us}
    latencies = {side: {"median_us": median} for side, median in us.items()}
    (run / RETURNED).write_text(json.dumps({"facts": {"gpu": "Orin"}, "sha256": sha256, "latencies": latencies}))


def benched(run: Path) -> Kept:
    def built(side: str) -> Kept[Path]:
        name = f"{side}.onnx"
        return store.keep(
            f"build-{side}", [1], lambda folder: (folder / name).write_bytes(side.encode()), lambda root: root / name
        )

    with Store(run) as store:
        files = {side: built(side) for side in ("dense", "pruned")}
        return bench_stage(store, Absent(load_target("jetson-orin"), run), files, None)


def test_a_second_measurement_on_the_same_device_replaces_the_first(tmp_path: Path) -> None:
    assert benched(tmp_path).value == {}
    for us in ({"dense": 1000.0, "pruned": 900.0}, {"dense": 600.0, "pruned": 290.0}):
        answered(tmp_path, us)
        assert {side: latency["median_us"] for side, latency in benched(tmp_path).value.items()} == us
        assert benched(tmp_path).reused
