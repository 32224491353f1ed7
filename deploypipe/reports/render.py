"""A report as text for people: rows for the terminal, a Markdown page."""

from collections.abc import Sequence
from pathlib import Path

from deploypipe.measurement import Latency
from deploypipe.reports import pattern, runtimes
from deploypipe.reports.advice import next_step, points_lost
from deploypipe.reports.figures import (
    UNKNOWN,
    UNVERIFIED,
    accuracy_text,
    amount,
    count,
    faster_text,
    markdown_table,
    microseconds,
    size,
    unmeasured,
)
from deploypipe.reports.render_training import arms_section, sparsity_section, trained_text
from deploypipe.reports.report import JSON_NAME, MARKDOWN_NAME, BudgetOutcome, GroupOutcome, Report, Side

Row = tuple[str, ...]
SUMMARY_COLUMNS = ("", "dense", "pruned", "change")


def write(report: Report, folder: Path) -> None:
    """Write `report.json` and `report.md` into the folder."""
    report.save(folder / JSON_NAME)
    (folder / MARKDOWN_NAME).write_text(markdown(report), encoding="utf-8")


def title(report: Report) -> str:
    """Return the run in one line."""
    budget = f"budget {report.budget.asked} ({report.budget.metric})"
    return f"{report.model} on {report.target}: {report.method}, {budget}, {report.epochs} epochs, seed {report.seed}"


def summary_rows(report: Report) -> tuple[Row, ...]:
    """Return the table that answers "how good, how fast, how big": the columns are SUMMARY_COLUMNS."""
    dense, pruned = report.dense, report.pruned
    return (
        (
            "accuracy",
            accuracy_text(dense.accuracy, report.n_test),
            accuracy_text(pruned.accuracy, report.n_test),
            _points(dense, pruned),
        ),
        (
            f"latency, {_threads(report)}",
            latency_text(dense.latency, dense.predicted_us, _mark(report)),
            latency_text(pruned.latency, pruned.predicted_us, _mark(report)),
            change_text(report),
        ),
        ("parameters", count(dense.n_parameters), count(pruned.n_parameters), _change(dense.n_parameters, pruned.n_parameters)),
        ("MACs", count(dense.n_macs), count(pruned.n_macs), _change(dense.n_macs, pruned.n_macs)),
        ("file", size(dense.artifact_bytes), size(pruned.artifact_bytes), _change(dense.artifact_bytes, pruned.artifact_bytes)),
    )


def verdict(report: Report) -> tuple[Row, ...]:
    """Return (word, sentence) pairs: was the budget met, is the model proven equal, what to do next."""
    return (
        ("budget", _budget_sentence(report)),
        ("checks", _checks_sentence(report)),
        *((("2:4", pattern.sentence(report.two_four)),) if report.two_four else ()),
        *(("warning", note) for note in report.notes if note.startswith(UNVERIFIED)),
        ("next", next_step(report)),
    )


def markdown(report: Report) -> str:
    """Return the whole report as a Markdown page that ends with a line break."""
    sections = (
        _head(report),
        markdown_table(SUMMARY_COLUMNS, summary_rows(report)),
        "\n".join(f"- **{word}**: {sentence}" for word, sentence in verdict(report)),
        _accuracy_section(report),
        _latency_section(report),
        sparsity_section(report.sparsity),
        pattern.section(report.two_four),
        runtimes.section(report.runtimes),
        arms_section(report.arms, report.n_test),
        _checks_section(report),
        _groups_section(report.groups),
        _notes_section(report),
        _origin_section(report),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def latency_text(latency: Latency | None, predicted_us: float | None = None, source: str = "") -> str:
    """Return the median of a measured latency, else what was predicted with the words that say it is no measurement."""
    if latency:
        return microseconds(latency.median_us)
    return UNKNOWN if predicted_us is None else f"{microseconds(predicted_us)} ({source})"


def change_text(report: Report) -> str:
    """Return by how much the pruned model is faster: as measured, else as predicted, called so."""
    before, after = report.dense.predicted_us, report.pruned.predicted_us
    if report.speedup is not None or report.latency_source == "measured" or not before or not after:
        return faster_text(report.speedup)
    return f"{faster_text(before / after)} ({_mark(report)})"


def _mark(report: Report) -> str:
    """Return what stands beside a latency; which stored profile it is from is said once, elsewhere."""
    return unmeasured("", "a stored profile") if report.profile and not report.pruned.latency else report.latency_source


def _head(report: Report) -> str:
    return (
        f"# {report.model} on {report.target}\n\n"
        f"Pruned with `{report.method}`, budget {report.budget.asked} ({report.budget.metric}), data `{report.data}`, "
        f"{trained_text(report.epochs, report.epochs_before)}, seed {report.seed}."
    )


def _accuracy_section(report: Report) -> str:
    if report.dense.accuracy is None:
        return ""
    masked = report.two_four.accuracy if report.two_four else None
    steps = (
        *(("dense", report.dense.accuracy), ("compacted", report.compacted_accuracy)),
        *((("with 2:4 weights", masked),) if masked is not None else ()),
        ("fine-tuned", report.pruned.accuracy),
    )
    rows = [(step, accuracy_text(value, report.n_test)) for step, value in steps]
    return f"## Accuracy\n\nOn {report.n_test} test samples, read once; ± is one standard error.\n\n" + markdown_table(
        ("step", "accuracy"), rows
    )


def _latency_section(report: Report) -> str:
    rows = [_latency_row(name, side, _mark(report)) for name, side in (("dense", report.dense), ("pruned", report.pruned))]
    columns = ("model", "predicted", "median", "p10", "p90", "runs", "foreign load", "prediction error")
    known = report.table in ("measured", "fitted") and not report.profile
    table = report.table if known else unmeasured(report.table, report.profile)
    origin = f"The latency table is **{table}**." if report.table else "No latency table was needed."
    if report.table_error is not None:
        origin += f" Its mean error on random plans of this model is {100 * report.table_error:.1f} %."
    if report.table_additivity is not None:
        origin += f" The parts of the dense model add up to {report.table_additivity:.3f} of the whole."
    parts = (
        f"## Latency, {_threads(report)}",
        origin,
        markdown_table(columns, rows),
        _rounds(report.budget),
        _certificate(report),
    )
    return "\n\n".join(part for part in parts if part)


def _rounds(budget: BudgetOutcome) -> str:
    """Say what was measured before training, plan by plan, and what became of it."""
    if not budget.rounds:
        return ""
    times = [(r.factor, r.predicted_us, r.pruned.median_us, r.upper_us, r.limit_us, r.fits) for r in budget.rounds]
    rows = [
        (f"{i + 1}" + ", taken" * (i == budget.chosen), f"{factor:.3f}", *map(microseconds, us), "yes" if fits else "no")
        for i, (factor, *us, fits) in enumerate(times)
    ]
    columns = ("plan", "table times", "predicted", "measured", "at most", "allowed", "fits")
    text = (
        "Each plan was built and measured before training; if it missed the budget, or left much of it unused, the table was "
        'corrected by that and the plan made again. "At most" is what it will hardly exceed when it is measured again, by how '
        "much several processes differed that measured it."
    )
    return f"{text}\n\n" + markdown_table(columns, rows)


def _latency_row(name: str, side: Side, source: str) -> Row:
    predicted = microseconds(side.predicted_us) if side.predicted_us is not None else "none"
    if side.latency is None:
        words = f"{predicted} ({source})" if side.predicted_us is not None else predicted
        return (name, words, UNKNOWN, "", "", "", "", "")
    times = tuple(microseconds(us) for us in (side.latency.median_us, side.latency.p10_us, side.latency.p90_us))
    error = "" if side.predicted_us is None else f"{100 * (side.predicted_us / side.latency.median_us - 1):+.1f} %"
    load = "unknown" if side.latency.foreign_load is None else f"{100 * side.latency.foreign_load:.0f} %"
    return (name, predicted, *times, str(side.latency.n_runs), load, error)


def _certificate(report: Report) -> str:
    proof = report.certificate
    if proof is None:
        return "The algorithm chose the widths itself; no solver proved a bound."
    unsure = f" ({_mark(report)})" if proof.unit == "us" and not report.pruned.latency else ""
    cost = f"{amount(proof.predicted, proof.unit)} predicted of {amount(proof.budget, proof.unit)}{unsure}"
    if proof.bound is None or proof.gap is None:
        found = f"{proof.status}, value {proof.value:.6g}, {cost}, {proof.n_variables} groups"
        return f"The algorithm chose the widths itself ({found}); no solver proved a bound."
    return (
        f"Allocator: {proof.status}, value {proof.value:.6g}, proven bound {proof.bound:.6g}, gap {100 * proof.gap:.2f} %, "
        f"{cost}, {proof.n_variables} variables."
        + (f" 2:4 weights: {', '.join(f'`{name}`' for name in proof.two_four)}." if proof.two_four else "")
    )


def _checks_section(report: Report) -> str:
    rows = [
        (c.stage, c.against, f"{c.error:.1e}", f"{c.tolerance:.0e}", str(c.n_inputs), "passed" if c.passed else "**FAILED**")
        for c in report.checks
    ]
    columns = ("stage", "must equal", "relative error", "tolerance", "inputs", "")
    return "## Numeric checks\n\n" + (markdown_table(columns, rows) if rows else "None was made.")


def _groups_section(groups: Sequence[GroupOutcome]) -> str:
    rows = [
        (f"`{g.name}`", f"{g.size} -> {g.kept}", str(len(g.members)), ", ".join(g.coupled_by), g.fixed or g.skipped)
        for g in groups
    ]
    return "## Channels kept\n\n" + markdown_table(("group", "channels", "members", "coupled by", "why whole"), rows)


def _notes_section(report: Report) -> str:
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in report.notes) if report.notes else ""


def _origin_section(report: Report) -> str:
    facts = [
        *((name, _words(value)) for name, value in report.machine.items()),
        *((f"version of {name}", version) for name, version in report.versions.items()),
    ]
    options = [(f"option {name}", _words(value)) for name, value in report.options.items()]
    stages = [(f"time of {stage}", f"{seconds:.1f} s") for stage, seconds in report.seconds.items()]
    files = [(what, f"`{path}`") for what, path in report.artifacts.items()]
    made = [
        (name, text)
        for name, text in (("command", f"`{report.command}`" * bool(report.command)), ("made", report.created))
        if text
    ]
    rows = [*made, *files, *options, *stages, *facts]
    return "## Where this comes from\n\n" + markdown_table(("what", "value"), rows) if rows else ""


def _budget_sentence(report: Report) -> str:
    budget = report.budget
    how = report.latency_source if budget.unit == "us" else "counted"
    limit, reached, predicted = (amount(value, budget.unit) for value in (budget.limit, budget.reached, budget.predicted))
    outcome = "met" if budget.met else "MISSED"
    return f"{outcome}: {reached} {how} ({predicted} predicted), at most {limit} allowed ({budget.asked})"


def _checks_sentence(report: Report) -> str:
    if not report.checks:
        return "none was made"
    failed = [check for check in report.checks if not check.passed]
    if failed:
        differ = (f"{c.stage} differs from {c.against} by {c.error:.1e} (at most {c.tolerance:.0e})" for c in failed)
        return f"FAILED: {', '.join(differ)}"
    worst = max(report.checks, key=lambda check: check.error / check.tolerance)
    return f"all {len(report.checks)} passed; closest to its limit: {worst.stage}, {worst.error:.1e} of {worst.tolerance:.0e}"


def _threads(report: Report) -> str:
    return f"{report.threads} thread{'s' * (report.threads != 1)}"


def _points(dense: Side, pruned: Side) -> str:
    lost = points_lost(dense, pruned)
    return "" if lost is None else f"{0.0 - 100 * lost:+.2f} points"


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.0f} %" if before else ""


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
