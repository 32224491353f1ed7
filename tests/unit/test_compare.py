"""Runs side by side: one row each, and their widths group by group."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from sample_report import BARE, REPORT

from deploypipe.cli import console
from deploypipe.reports import compare
from deploypipe.reports.report import GroupOutcome, Report

STEM, GATE, HEAD = REPORT.groups


def with_groups(*groups: GroupOutcome, accuracy: float = 0.9, model: str = "demo") -> Report:
    return replace(REPORT, groups=groups, model=model, pruned=replace(REPORT.pruned, accuracy=accuracy))


def test_the_most_accurate_run_comes_first() -> None:
    rows = compare.outcome_rows({"a": with_groups(accuracy=0.9), "b": REPORT, "c": BARE})
    assert [row[0] for row in rows] == ["b", "a", "c"]
    assert all(len(row) == len(compare.COLUMNS) for row in rows)
    first, last = (dict(zip(compare.COLUMNS, row, strict=True)) for row in (rows[0], rows[-1]))
    assert (first["predicted"], first["latency"], first["file"]) == ("60.0 us", "59.7 us", "62.0 kB")
    assert (last["predicted"], last["latency"], last["accuracy"]) == ("none", "not measured", "not measured")


def test_runs_on_other_targets_and_other_data_are_told_apart() -> None:
    here, there = with_groups(STEM), replace(with_groups(STEM), target="jetson-orin", threads=4, data="other images")
    rows = compare.outcome_rows({"a": here, "b": there})
    column = compare.COLUMNS.index("target")
    assert [row[column] for row in rows] == [REPORT.target, "jetson-orin, 4 threads"]
    (note,) = [note for note in compare.widths({"a": here, "b": there}).notes if "different data" in note]
    assert "other images" in note


def test_widths_are_those_of_groups_that_some_run_pruned() -> None:
    found = compare.widths(
        {
            "a": with_groups(STEM, GATE, HEAD),
            "b": with_groups(replace(STEM, kept=16), replace(GATE, kept=4), HEAD, accuracy=0.95),
        }
    )
    assert found.columns == ("group", "b", "a")
    assert found.rows == (("stem.conv", "16", "16 -> 8"), ("a.gate", "8 -> 4", "8"))
    assert found.notes == ()


@pytest.mark.parametrize(
    ("other", "rows", "notes"),
    [
        (
            with_groups(replace(STEM, size=64), HEAD, model="net.py:make", accuracy=0.1),
            (("stem.conv", "16 -> 8", "64 -> 8"),),
            (
                "the runs are of different models (demo, net.py:make): groups are matched by name alone",
                "1 group left out that not every run has",
            ),
        ),
        (
            with_groups(replace(STEM, name="conv1"), model="net.py:make", accuracy=0.1),
            (),
            (
                "the runs are of different models (demo, net.py:make): groups are matched by name alone",
                "4 groups left out that not every run has",
                "no run pruned a group that all runs have",
            ),
        ),
    ],
)
def test_of_different_models_only_shared_groups_are_shown(
    other: Report, rows: Sequence[Sequence[str]], notes: Sequence[str]
) -> None:
    found = compare.widths({"a": REPORT, "b": other})
    assert (found.rows, found.notes) == (rows, notes)


def test_texts_are_as_agreed(golden: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]) -> None:
    reports = {"runs/a": REPORT, "runs/b": BARE, "runs/c": with_groups(replace(STEM, kept=4), GATE, HEAD)}
    console.table(compare.COLUMNS, compare.outcome_rows(reports))
    widths = compare.widths(reports)
    console.table(widths.columns, widths.rows)
    golden("cli_compare.txt", capsys.readouterr().out)
