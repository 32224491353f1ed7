"""Zeros in weights layer by layer: any, as a value; 2:4, as a value and as text, with what that saves and what came of it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploypipe.reports.figures import UNKNOWN, markdown_table, microseconds


@dataclass(frozen=True)
class SparseLayer:
    """Zeros among the weights of one layer call.

    Attributes:
        name: Of the weight.
        n_weights: All of them.
        n_zeros: Those that are zero.
        n_macs: Multiply-accumulates of the call, zeros included.
    """

    name: str
    n_weights: int
    n_zeros: int
    n_macs: int


@dataclass(frozen=True)
class LayerPattern:
    """What the weight of one layer of the pruned model holds.

    Attributes:
        name: Of the layer.
        pattern: "2:4" or "dense".
        reason: Why it is dense; empty if it is not.
        dense_us: What the layer takes with dense weights, by the latency table; None if that prices no alternative for it.
        saved_us: What 2:4 weights save by the latency table, 0 if nothing that can be told from noise; None as above, and where
            the pattern is not allowed.
    """

    name: str
    pattern: str
    reason: str
    dense_us: float | None
    saved_us: float | None


@dataclass(frozen=True)
class TwoFour:
    """What became of `--sparsity`.

    Attributes:
        asked: "2:4" or "auto".
        layers: All layers of the model.
        source: Of the prices: that of the latency table; empty if it knows none of 2:4 weights.
        evidence: What the builder said about sparse kernels; nothing if there was no builder to ask.
        proof: In which files of the run all those weights were looked at, and hold the pattern by exact zeros.
        accuracy: With those weights, before fine-tuning: share of the test set, 0 to 1; None if that is not known.
    """

    asked: str
    layers: tuple[LayerPattern, ...]
    source: str
    evidence: tuple[str, ...]
    proof: tuple[str, ...] = ()
    accuracy: float | None = None

    @property
    def saved_us(self) -> float | None:
        """What all 2:4 weights save by the table; None if it does not tell."""
        known = [layer.saved_us for layer in self.layers if layer.pattern == "2:4" and layer.saved_us is not None]
        return sum(known) if self.source else None

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "TwoFour":
        """Read what `dataclasses.asdict` gave."""
        layers = tuple(LayerPattern(**layer) for layer in state["layers"])
        return cls(**{**state, "layers": layers, "evidence": tuple(state["evidence"]), "proof": tuple(state.get("proof", ()))})


def sentence(found: TwoFour) -> str:
    """Say in one line what became of it."""
    patterns = Counter(layer.pattern for layer in found.layers)
    parts = [f"2:4 weights in {patterns['2:4']} of {len(found.layers)} layers"]
    if found.saved_us is not None:
        parts.append(f"{microseconds(found.saved_us)} saved by the latency table ({_words(found)})")
    return "; ".join([*parts, *found.evidence])


def section(found: TwoFour | None) -> str:
    """Return the layers as a section of the report; empty if 2:4 was not asked for."""
    if found is None:
        return ""
    rows = [
        (f"`{layer.name}`", layer.pattern, _us(layer.dense_us), _us(layer.saved_us), layer.reason) for layer in found.layers
    ]
    unsure = f" ({_words(found)})" if found.source not in ("", "measured") else ""
    columns = ("layer", "weights", f"dense{unsure}", f"2:4 saves{unsure}", "why dense")
    proof = f" Each of these weights holds the pattern, by exact zeros, in {', '.join(found.proof)}." if found.proof else ""
    return f"## 2:4 weights\n\n{sentence(found)}.{proof}\n\n" + markdown_table(columns, rows)


def _us(value: float | None) -> str:
    return UNKNOWN if value is None else microseconds(value)


def _words(found: TwoFour) -> str:
    return found.source if found.source == "measured" else f"{found.source}, not measured"
