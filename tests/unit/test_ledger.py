"""The ledger: rows are appended whole, by several processes at once, and none is ever lost."""

import csv
import errno
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
from sample_report import BARE, ENTRY, REPORT

from deploypipe.errors import UsageError
from deploypipe.pipeline import record
from deploypipe.reports import ledger

OTHER = replace(ENTRY, pruned_us=61.0, foreign_load=0.02)


def test_what_was_appended_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert ledger.read(folder).entries == ()
    assert ledger.append(ENTRY, folder) == ""
    assert ledger.append(OTHER, folder) == ""
    assert ledger.read(folder) == ledger.Ledger(folder / "ledger.csv", (ENTRY, OTHER))


def test_the_file_is_csv_with_its_schema_in_front(tmp_path: Path) -> None:
    ledger.append(replace(ENTRY, run="two\nlines"), tmp_path)
    title, *rows = (tmp_path / "ledger.csv").read_text().splitlines()
    assert title == "# deploypipe ledger, schema 1"
    (row,) = csv.DictReader(rows)
    assert (row["target"], row["threads"], row["pruned_us"], row["foreign_load"], row["run"]) == (
        "cpu",
        "1",
        "59.7",
        "",
        "two lines",
    )


def test_errors_are_those_of_the_prediction() -> None:
    assert ENTRY.ratio_error == pytest.approx((60.0 / 119.0) / (59.7 / 120.4) - 1)
    assert ENTRY.pruned_error == pytest.approx(60.0 / 59.7 - 1)


def test_a_measurement_stands_there_once(tmp_path: Path) -> None:
    ledger.append(ENTRY, tmp_path)
    ledger.append(OTHER, tmp_path)
    ledger.append(replace(ENTRY, date="2027-01-01T00:00:00+00:00", run="/a/copy"), tmp_path)
    assert ledger.read(tmp_path).entries == (ENTRY, OTHER)


def _append_many(folder: str, first: int) -> None:
    for number in range(first, first + 25):
        ledger.append(replace(ENTRY, n_runs=number), Path(folder))


def test_processes_append_at_once_and_no_row_is_lost(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=_append_many, args=(str(tmp_path), 25 * i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    found = ledger.read(tmp_path)
    assert found.notes == ()
    assert sorted(entry.n_runs for entry in found.entries) == list(range(100))


def test_a_file_cut_off_anywhere_keeps_its_rows_and_takes_new_ones(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "ledger.csv"
    ledger.append(ENTRY, whole)
    one = len((whole / "ledger.csv").read_bytes())
    ledger.append(OTHER, whole)
    content = (whole / "ledger.csv").read_bytes()
    for end in {*range(0, one, 9), *range(one - 3, len(content), 5), *range(len(content) - 20, len(content) + 1)}:
        path.write_bytes(content[:end])
        # A row without its line break is whole if nothing else of it is missing.
        kept = (ENTRY,) * (end >= one - 1) + (OTHER,) * (end >= len(content) - 1)
        assert ledger.read(tmp_path).entries == kept, f"cut off at {end}"
        assert ledger.append(replace(ENTRY, n_runs=7), tmp_path) == ""
        assert ledger.read(tmp_path).entries == (*kept, replace(ENTRY, n_runs=7)), f"cut off at {end}"
        if end > len(content) - len(ENTRY.table):  # what is no row stays in the file all the same, and is told
            assert content[:end] in path.read_bytes()


def test_a_line_that_is_no_row_is_told(tmp_path: Path) -> None:
    ledger.append(ENTRY, tmp_path)
    path = tmp_path / "ledger.csv"
    lines = path.read_text().splitlines()
    bad = [lines[2].replace("59.7", "nan"), lines[2].replace("59.7", "many"), '"half', lines[2].replace("59.7", "0")]
    path.write_text("\n".join([*lines, *bad]) + "\n")
    ledger.append(OTHER, tmp_path)
    found = ledger.read(tmp_path)
    assert found.entries == (ENTRY, OTHER)
    assert found.notes == (f"{path}: 4 unreadable line(s) left out: 4, 5, 6, 7",)
    assert all(line in path.read_text() for line in bad), "nothing is ever removed"


@pytest.mark.parametrize("content", ["# deploypipe ledger, schema 99\na,b\n", "something else\n", "\x00"])
def test_a_ledger_of_another_schema_is_left_alone(tmp_path: Path, content: str) -> None:
    old, new = tmp_path / "ledger.csv", tmp_path / "ledger-1-1.csv"
    old.write_text(content)
    assert ledger.append(ENTRY, tmp_path) == f"ledger {old} has another schema and was left alone: {new} is begun"
    assert ledger.append(OTHER, tmp_path) == "", "told once"
    assert old.read_text() == content
    found = ledger.read(tmp_path)
    assert (found.path, found.entries) == (new, (ENTRY, OTHER))
    assert "another schema" in found.notes[0]


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.append(ENTRY, tmp_path)
    before = (tmp_path / "ledger.csv").read_bytes()
    opened = Path.open

    class Full:
        def __init__(self, file: object) -> None:
            self.file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, line: bytes) -> int:
            return int(self.file.write(line[:20]))

    monkeypatch.setattr(Path, "open", lambda self, *how, **more: Full(opened(self, *how, **more)))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        ledger.append(OTHER, tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "ledger.csv").read_bytes() == before


def test_a_ledger_that_cannot_be_read_is_explained(tmp_path: Path) -> None:
    (tmp_path / "ledger.csv").mkdir()
    with pytest.raises(UsageError, match="cannot read the ledger") as caught:
        ledger.read(tmp_path)
    assert caught.value.at == str(tmp_path / "ledger.csv")
    assert "DEPLOYPIPE_DATA" in caught.value.fix


# --- from a run ------------------------------------------------------------------------------------------------------


class Table:
    """Predicts 119 us for the dense model."""

    id = "0123456789abcdef"

    def predict(self, graph: object) -> float:
        return 119.0


def test_a_run_is_recorded_with_its_first_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOYPIPE_DATA", str(tmp_path))
    report = replace(REPORT, machine={"runtime": "onnxruntime", "version": "1.32.0", "cpu": "Some CPU, 2.9 GHz"})
    assert record.recorded(report, Path("/runs/x"), Table(), None) is report
    (entry,) = ledger.read().entries
    first = REPORT.budget.rounds[0]
    asked = {"date": REPORT.created, "version": entry.version, "run": "/runs/x"}
    dense = {"dense_us": 120.2, "dense_p10_us": 118.1, "dense_p90_us": 130.0}
    pruned = {"predicted_pruned_us": 59.4, "pruned_us": 61.0, "pruned_p10_us": 60.1, "pruned_p90_us": 64.0}
    assert entry == replace(ENTRY, limit_us=60.1, **asked, **dense, **pruned)
    assert entry.pruned_us == first.pruned.median_us, "not the plan that was corrected by this very measurement"


def test_a_run_without_a_table_has_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOYPIPE_DATA", str(tmp_path))
    assert record.recorded(BARE, Path("/runs/x"), None, None) is BARE
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEPLOYPIPE_DATA", str(tmp_path / "file"))
    report = record.recorded(REPORT, Path("/runs/x"), Table(), None)
    assert report.notes[:-1] == REPORT.notes
    assert "could not be written" in report.notes[-1]
    assert "DEPLOYPIPE_DATA" in report.notes[-1]
