"""The report: lossless JSON, and texts that say what the figures say."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from sample_report import BARE, REPORT

from deploypipe.errors import UsageError
from deploypipe.measurement import Latency
from deploypipe.reports import compare, figures, render
from deploypipe.reports.advice import next_step
from deploypipe.reports.report import Check, Report


@pytest.mark.parametrize("report", [REPORT, BARE])
def test_json_and_back_is_the_identity(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "report.json")
    loaded = Report.load(tmp_path)
    assert loaded == report
    assert Report.load(tmp_path / "report.json") == report
    for part in fields(Report):
        assert type(getattr(loaded, part.name)) is type(getattr(report, part.name))


def test_json_holds_the_derived_figures() -> None:
    state = json.loads(json.dumps(REPORT.to_json()))
    assert state["speedup"] == pytest.approx(120.4 / 59.7)
    assert (state["budget_met"], state["checks_passed"], state["schema"]) == (True, True, 3)


def test_a_report_from_before_there_were_2_4_and_additivity_is_read() -> None:
    state = BARE.to_json()
    del state["two_four"], state["profile"], state["table_additivity"]
    assert Report.from_json(state) == BARE
    state = REPORT.to_json()
    del state["certificate"]["two_four"]
    assert Report.from_json(state).certificate == replace(REPORT.certificate, two_four=())


LATER = {"two_four", "profile", "table_additivity"}


@pytest.mark.parametrize("missing", [part.name for part in fields(Report) if part.name not in LATER])
def test_a_missing_field_is_named(missing: str) -> None:
    state = REPORT.to_json()
    del state[missing]
    with pytest.raises(UsageError, match=missing):
        Report.from_json(state)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("[]", "not a JSON object"), ('{"schema": 99}', "schema 99"), ('{"schema": 3}', "malformed: 'model'")],
)
def test_a_broken_report_is_explained(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        Report.load(tmp_path)
    assert caught.value.at == str(tmp_path / "report.json")
    assert caught.value.fix


def test_a_folder_without_a_report_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run"):
        Report.load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no run lies in this folder"):
        Report.load(tmp_path)
    (tmp_path / "plan.key").write_text("{}")
    with pytest.raises(UsageError, match="not finished") as caught:
        Report.load(tmp_path)
    assert "resumes" in caught.value.fix


@pytest.mark.parametrize(("name", "report"), [("report", REPORT), ("report_bare", BARE)])
def test_texts_are_as_agreed(name: str, report: Report, golden: Callable[[str, str], None]) -> None:
    golden(f"{name}.md", render.markdown(report))
    golden(f"{name}.json", json.dumps(report.to_json(), indent=1) + "\n")
    rows = [*render.summary_rows(report), *render.verdict(report)]
    golden(f"{name}.txt", "\n".join(" | ".join(row) for row in rows) + "\n")


def test_write_leaves_both_files(tmp_path: Path) -> None:
    render.write(REPORT, tmp_path)
    assert Report.load(tmp_path) == REPORT
    assert (tmp_path / "report.md").read_text() == render.markdown(REPORT)


def test_every_group_check_and_note_is_on_the_page() -> None:
    page = render.markdown(REPORT)
    for group in REPORT.groups:
        assert f"| `{group.name}` | {group.size} -> {group.kept} |" in page
        assert group.fixed in page
        assert group.skipped in page
    for text in (*REPORT.notes, "2.1e-07", "gap 0.08 %", "ridge", "deploypipe build", "2.14.1", "a \\| b", "93.61 %"):
        assert text in page


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "the loss is small"),
        ({"pruned": REPORT.dense}, "nothing was lost"),
        ({"pruned": REPORT.dense, "notes": (f"{figures.BY_CHANCE}: 10 %",)}, "what was lost cannot be seen"),
        (
            {"pruned": replace(REPORT.pruned, accuracy=0.90), "compacted_accuracy": 0.8},
            "7.8 points were lost: fine-tune longer (--epochs 10)",
        ),
        (
            {"pruned": replace(REPORT.pruned, accuracy=0.26), "compacted_accuracy": 0.76},
            "fine-tuning made it worse (76.0 % before",
        ),
        ({"pruned": replace(REPORT.pruned, accuracy=0.95), "n_test": 80}, "no more than 80 test samples can tell from chance"),
        (
            {"groups": tuple(replace(g, kept=g.size) for g in REPORT.groups), "sparsity": ()},
            "nothing was pruned: try a smaller one",
        ),
        ({"budget": replace(REPORT.budget, reached=61.0)}, "the budget was missed"),
        ({"checks": (Check("onnx", "compacted", 1.0, 1e-4, 8),)}, "do not ship"),
        ({"checks": (Check("onnx", "compacted", float("nan"), 1e-4, 8),)}, "do not ship"),
        ({"pruned": replace(REPORT.pruned, accuracy=None)}, "give --data"),
    ],
)
def test_the_next_step_fits_the_result(change: dict[str, object], expected: str) -> None:
    assert expected in next_step(replace(REPORT, **change))


def test_a_missed_budget_and_a_failed_check_are_said_loudly() -> None:
    report = replace(REPORT, budget=replace(REPORT.budget, reached=61.0), checks=(Check("onnx", "compacted", 0.5, 1e-4, 8),))
    assert dict(render.verdict(report))["budget"].startswith("MISSED: 61.0 us measured")
    assert dict(render.verdict(report))["checks"].startswith("FAILED: onnx differs from compacted")
    assert "**FAILED**" in render.markdown(report)
    assert report.to_json()["budget_met"] is False
    assert report.to_json()["checks_passed"] is False


def test_slower_is_not_called_faster() -> None:
    slow = replace(REPORT, pruned=replace(REPORT.pruned, latency=Latency(240.8, 1, 2, 3)))
    assert ("latency, 1 thread", "120 us", "241 us", "2.00x slower") in render.summary_rows(slow)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (41_290, "41.3 k"), (999_600, "1000 k"), (1_820_000_000, "1.82 G")],
)
def test_count(number: float, text: str) -> None:
    assert figures.count(number) == text


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0.5, "0.5 us"),
        (99.94, "99.9 us"),
        (812.3, "812 us"),
        (3041, "3.04 ms"),
        (31_400, "31.4 ms"),
        (812_000, "812 ms"),
        (1.2e6, "1.20 s"),
    ],
)
def test_microseconds(us: float, text: str) -> None:
    assert figures.microseconds(us) == text


@pytest.mark.parametrize(("n_bytes", "text"), [(12, "12 B"), (181_234, "181 kB"), (46_800_000, "46.8 MB")])
def test_size(n_bytes: int, text: str) -> None:
    assert figures.size(n_bytes) == text


def test_a_stored_profile_is_named_and_not_called_measured_here() -> None:
    profile = "a stored profile of Orin (power mode MAXN, 2026-11-24 08:00)"
    absent = {side: replace(getattr(REPORT, side), latency=None) for side in ("dense", "pruned")}
    report = replace(REPORT, **absent, profile=profile)
    words = f"from {profile}, not measured in this run"
    assert report.latency_source == report.to_json()["latency_source"] == words
    page = render.markdown(report)
    assert f"The latency table is **{words}**." in page
    assert f"met: 59.7 us {words} (60.0 us predicted)" in page
    assert "| 119 us (from a stored profile, not measured in this run) |" in page
    predicted = compare.outcome_rows({"x": report})[0][compare.COLUMNS.index("predicted")]
    assert "measured, not measured" not in page + predicted
    assert predicted == "60.0 us (measured, stored profile)"
    assert replace(REPORT, profile=profile).latency_source == "measured", "once its owner has measured it"
    assert replace(report, profile="", table="estimated").latency_source == "estimated, not measured"


def test_widths_without_a_proof_are_called_so() -> None:
    assert REPORT.certificate is not None
    found = replace(REPORT, certificate=replace(REPORT.certificate, bound=None, gap=None, status="greedy", n_variables=7))
    text = render.markdown(found)
    assert "no solver proved a bound" in text
    assert "greedy, value 12.5, 60.0 us predicted of 60.2 us, 7 groups" in text
    assert Report.from_json(found.to_json()) == found


def test_what_was_not_verified_stands_with_the_verdict() -> None:
    note = "UNVERIFIED: converted, not run"
    report = replace(REPORT, notes=("something else", note))
    assert ("warning", note) in render.verdict(report)
    assert [word for word, _ in render.verdict(report)].count("warning") == 1
