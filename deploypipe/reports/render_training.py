"""What a report says about training and zeros: epochs before pruning, sparsity of layers, ways of training side by side."""

from collections.abc import Sequence
from statistics import mean, stdev

from deploypipe.reports.figures import accuracy_text, count, markdown_table
from deploypipe.reports.pattern import SparseLayer
from deploypipe.reports.report import Arm


def trained_text(epochs: int, before: int) -> str:
    """Return how long was trained in all.

    >>> trained_text(3, 0), trained_text(3, 12)
    ('3 epochs of fine-tuning', '12 epochs of training before pruning and 3 epochs of fine-tuning (15 in all)')
    """
    tuning = f"{epochs} epochs of fine-tuning"
    return tuning if not before else f"{before} epochs of training before pruning and {tuning} ({before + epochs} in all)"


def sparsity_section(layers: Sequence[SparseLayer]) -> str:
    """Return zeros by layer, and what they would save in theory; empty without any."""
    if not layers:
        return ""
    rows = [_sparse_row(layer) for layer in layers]
    n_macs, left = sum(layer.n_macs for layer in layers), sum(map(_macs_left, layers))
    weights = {layer.name: layer for layer in layers}.values()  # a shared weight is stored once
    n_weights, n_zeros = sum(layer.n_weights for layer in weights), sum(layer.n_zeros for layer in weights)
    text = (
        f"{count(n_zeros)} of {count(n_weights)} weights are zero ({_share(n_zeros, n_weights)}). The model keeps its full "
        "size and is **no faster in a dense runtime**; compressed, its file is smaller. Theoretical MACs, if every zero were "
        f"skipped: {count(left)} of {count(n_macs)}."
    )
    return f"## Sparsity\n\n{text}\n\n" + markdown_table(("weight", "weights", "zeros", "theoretical MACs"), rows)


def arms_section(arms: Sequence[Arm], n_test: int) -> str:
    """Return the ways of training side by side; no gain is named unless each was tried with two seeds or more."""
    if not arms:
        return ""
    names = list(dict.fromkeys(arm.name for arm in arms))
    tried = {name: [arm for arm in arms if arm.name == name] for name in names}
    rows = [(name, *_arm_row(found, n_test)) for name, found in tried.items()]
    columns = ("way", "seeds", "epochs", "parameters", "accuracy")
    return "## Ways to train this architecture\n\n" + markdown_table(columns, rows) + "\n\n" + gain_text(arms)


def gain_text(arms: Sequence[Arm]) -> str:
    """Return how much the first way gains over the others: only with two seeds or more of each."""
    tried: dict[str, list[float]] = {}
    for arm in arms:
        tried.setdefault(arm.name, []).append(arm.accuracy)
    (first, ours), *others = tried.items()
    if min(map(len, tried.values())) < 2:
        return "One seed says nothing about the difference; set the algorithm's option seeds to 3 or more."
    gains = [f"{100 * (mean(ours) - mean(theirs)):+.2f} points over {name}" for name, theirs in others]
    return f"Gain of {first}: " + ", ".join(gains) + "."


def _arm_row(arms: Sequence[Arm], n_test: int) -> tuple[str, ...]:
    accuracies = [arm.accuracy for arm in arms]
    if len(arms) < 2:
        shown = accuracy_text(accuracies[0], n_test)
    else:
        shown = f"{100 * mean(accuracies):.2f} % ± {100 * stdev(accuracies):.2f} (standard deviation of seeds)"
    return (str(len(arms)), str(arms[0].epochs), count(arms[0].n_parameters), shown)


def _sparse_row(layer: SparseLayer) -> tuple[str, ...]:
    zeros = f"{count(layer.n_zeros)} ({_share(layer.n_zeros, layer.n_weights)})"
    return (f"`{layer.name}`", count(layer.n_weights), zeros, f"{count(_macs_left(layer))} of {count(layer.n_macs)}")


def _macs_left(layer: SparseLayer) -> float:
    return layer.n_macs * (1 - layer.n_zeros / layer.n_weights)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"
