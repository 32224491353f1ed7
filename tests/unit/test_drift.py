"""What the ledger's rows say together: errors by target, and when they are worth a warning."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sample_report import ENTRY

from deploypipe.cli.main import run
from deploypipe.errors import UsageError
from deploypipe.reports import drift, ledger
from deploypipe.reports.ledger import Entry


def entries(*errors: float, **changes: object) -> Iterator[Entry]:
    """Runs whose ratio, and pruned latency, were predicted wrongly by these shares."""
    base = replace(ENTRY, predicted_dense_us=100.0, dense_us=100.0, pruned_us=50.0, **changes)
    for day, error in enumerate(errors, start=1):
        yield replace(base, date=f"2026-11-{day:02d}T08:00:00+00:00", predicted_pruned_us=50.0 * (1 + error), n_runs=day)


def test_errors_are_summed_up_over_all_and_the_last_five() -> None:
    (found,) = drift.standings(entries(0.20, -0.01, 0.02, -0.03, 0.01, -0.02))
    assert (found.n_runs, found.first[:10], found.last[:10]) == (6, "2026-11-01", "2026-11-06")
    for errors in (found.ratio, found.pruned):
        assert (errors.median, errors.worst) == (pytest.approx(0.02), pytest.approx(0.2))
    for errors in (found.recent_ratio, found.recent_pruned):
        assert (errors.median, errors.worst) == (pytest.approx(0.02), pytest.approx(0.03))


def test_the_ratio_does_not_see_a_machine_that_is_slower_altogether() -> None:
    slower = replace(next(entries(0.0)), dense_us=120.0, pruned_us=60.0)
    (found,) = drift.standings([slower])
    assert found.ratio.worst == pytest.approx(0)
    assert found.pruned.worst == pytest.approx(1 - 50 / 60)


@pytest.mark.parametrize(("n_corrections", "told"), [(0, False), (2, True)])
def test_a_corrected_run_says_that_its_last_measurement_is_another(n_corrections: int, told: bool) -> None:
    found = tuple(entries(0.01, n_corrections=n_corrections))
    remarks = dict(drift.remarks(drift.Overview("ledger.csv", drift.standings(found), found, ())))
    assert ("deploypipe report RUN" in remarks.get("corrected", "")) == told


@pytest.mark.parametrize("change", [{"target": "b"}, {"threads": 2}, {"runtime_version": "2"}, {"processor": "other"}])
def test_what_a_table_does_not_share_is_not_mixed(change: dict[str, object]) -> None:
    assert len(drift.standings([*entries(0.1), *entries(0.1, **change)])) == 2


@pytest.mark.parametrize(
    ("errors", "warned"),
    [
        ((0.09, 0.09), False),  # too few to say
        ((0.06, -0.06, 0.06), True),
        ((0.04, -0.04, 0.04), False),
        ((0.01, -0.01, 0.01, 0.01, 0.01, 0.01, 0.3), False),  # one run met a busy machine
        ((0.01, 0.01, 0.03, 0.03, -0.03, -0.03, 0.03), True),  # three times worse than before
        ((0.02, 0.02, 0.03, 0.03, 0.03, 0.03, 0.03), False),  # 1.5 times
        ((0.001, 0.001, 0.01, 0.01, 0.01, 0.01, 0.01), False),  # ten times worse and still good
    ],
)
def test_drift_is_warned_of(errors: tuple[float, ...], warned: bool) -> None:
    (found,) = drift.standings(entries(*errors))
    assert bool(found.warning) == warned
    assert not warned or "deploypipe profile --model MODEL --target cpu --threads 1 --fresh" in found.warning


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEPLOYPIPE_DATA", str(tmp_path))
    worse = entries(0.01, -0.01, 0.02, 0.06, -0.07, 0.05, 0.08, processor="Some CPU", foreign_load=0.02, run="runs/x")
    for entry in (*worse, *entries(0.01, target="board", runtime="other", threads=4, run="runs/y")):
        ledger.append(entry, tmp_path)
    return tmp_path / "ledger.csv"


def test_the_command_shows_it(filled: Path, capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]) -> None:
    assert run(["ledger"]) == 0
    golden("cli_ledger.txt", capsys.readouterr().out.replace(str(filled.parent), "DATA"))
    assert run(["ledger", "--target", "board"]) == 0
    out = capsys.readouterr().out
    assert "board" in out
    assert "runs/x" not in out
    assert run(["ledger", "--target", "cpu", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert (state["schema"], state["path"], len(state["entries"])) == (1, str(filled), 7)
    assert state["standings"][0]["warning"]
    assert state["entries"][0]["ratio_error"] == pytest.approx(0.01)


def test_a_target_without_runs_is_told_from_a_misspelt_one(filled: Path) -> None:
    with pytest.raises(UsageError, match="no run on target 'boar'") as caught:
        drift.overview("boar")
    assert "did you mean 'board'?" in caught.value.fix


def test_an_empty_ledger_says_how_to_fill_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEPLOYPIPE_DATA", str(tmp_path))
    assert run(["ledger"]) == 0
    assert capsys.readouterr().out.startswith("no build has been recorded yet")
    assert run(["ledger", "--target", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["standings"] == []
    assert list(tmp_path.iterdir()) == [], "looking makes nothing"
