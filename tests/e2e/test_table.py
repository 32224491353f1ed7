"""A latency table that is saved, and used by a later build instead of measuring."""

import json
from pathlib import Path

import pytest
from command_line import FACTORY, N_PLANS, Start, arguments

import deploypipe as dp

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
MODEL = f"{FACTORY}:net"


@pytest.fixture(scope="module")
def table(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables") / "mine"
    done = start("profile", "--model", MODEL, "--save", str(folder), "--json").wait()
    assert done.code == 0, done.err
    assert json.loads(done.out)["checked_plans"] == N_PLANS
    return folder


def test_a_saved_table_is_used_instead_of_measuring(table: Path, start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = start(*arguments(out, epochs=0, table=table, algo="l2")).wait()
    assert done.code == 0, done.err
    assert "profile kernels" not in done.err
    assert dp.LatencyTable.load(out / "table").id == dp.LatencyTable.load(table).id


def test_a_table_of_another_version_is_refused_with_the_way_out(table: Path, start: Start, tmp_path: Path) -> None:
    other = tmp_path / "other"
    dp.LatencyTable.load(table).save(other)
    state = json.loads((other / "device.json").read_text())
    state["facts"]["version"] = "0.9"
    (other / "device.json").write_text(json.dumps(state))
    done = start(*arguments(tmp_path / "run", table=other)).wait()
    assert done.code == 4
    assert "version was 0.9" in done.err
    assert "deploypipe profile" in done.err
    assert "Traceback" not in done.err


def test_a_table_of_another_model_is_refused(table: Path, start: Start, tmp_path: Path) -> None:
    done = start("build", "--table", str(table), "--out", str(tmp_path / "run")).wait()
    assert done.code == 4
    assert "has not been profiled" in done.err


def test_a_table_is_not_saved_over_anything(table: Path, start: Start) -> None:
    done = start("profile", "--model", MODEL, "--save", str(table)).wait()
    assert done.code == 2
    assert "not empty" in done.err
