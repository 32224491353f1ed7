"""What the user should try next, in one sentence."""

from deploypipe.reports.figures import BY_CHANCE, standard_error
from deploypipe.reports.report import Report, Side

_TELLING = 0.01  # of accuracy: what is lost below this is small


def next_step(report: Report) -> str:
    """Say in one sentence what the user should try next."""
    if not all(check.passed for check in report.checks):
        return "do not ship this model: a numeric check failed, see report.md"
    if report.pruned.latency is None and report.table:
        return "measure it: carry the run's bundle to the device, and import what comes back (README.md in the bundle)"
    if not report.budget.met:
        return (
            f"the budget was missed; ask for a little less than --budget {report.budget.asked}, or profile on an idle machine"
        )
    if (lost := points_lost(report.dense, report.pruned)) is None:
        return "give --data with a test set to learn the accuracy"
    if any(note.startswith(BY_CHANCE) for note in report.notes):
        return "give trained --weights, and --data of the model's classes: what was lost cannot be seen"
    if lost > max(_TELLING, 2 * standard_error(report.pruned.accuracy, report.n_test)):
        return _against_loss(report, lost)
    if _is_whole(report):
        return f"the whole model is within --budget {report.budget.asked}, and nothing was pruned: try a smaller one"
    loss = "nothing was lost"
    if lost > _TELLING:
        loss = f"{100 * lost:.1f} points were lost, no more than {report.n_test} test samples can tell from chance"
    elif lost > 0:
        loss = "the loss is small"
    return f"{loss}: try a smaller --budget, or `deploypipe compare` with another --algo"


def _against_loss(report: Report, lost: float) -> str:
    before, after = report.compacted_accuracy, report.pruned.accuracy
    spoilt = (before or 0.0) - (after or 0.0) > max(_TELLING, 2 * standard_error(after, report.n_test))
    if report.epochs and before and after is not None and spoilt:
        return f"fine-tuning made it worse ({100 * before:.1f} % before, {100 * after:.1f} % after): lower --lr to a tenth"
    longer = f"--epochs {max(10, 3 * report.epochs)}"
    return f"{100 * lost:.1f} points were lost: fine-tune longer ({longer}) or allow a larger --budget"


def _is_whole(report: Report) -> bool:
    """Whether no channel went, and nobody asked for zeros."""
    return bool(report.groups) and not report.sparsity and all(group.kept == group.size for group in report.groups)


def points_lost(dense: Side, pruned: Side) -> float | None:
    """Return the accuracy that pruning cost, 0.01 = one point; None unless both were measured."""
    return None if dense.accuracy is None or pruned.accuracy is None else dense.accuracy - pruned.accuracy
