"""The keep plan: which channels stay, per group. The narrow waist between what chooses and what builds."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deploypipe.branch import branch_of
from deploypipe.errors import ModelError, nearest
from deploypipe.types import Graph

PLAN_SCHEMA = 1


@dataclass(frozen=True)
class Certificate:
    """What is known about a plan's widths. Costs are in the unit of the cost table (us, MACs or parameters).

    `value` is what the method wanted much of, in its own unit. `bound` and `gap` say what the solver proved about it; they are
    None for widths that a method found by itself, and `n_variables` is then the number of groups that it chose for.
    `two_four` names the layers for which 2:4 weights were chosen, ascending; `value` is then less by what the masks cost.
    `seconds` is the solver's time; it is not written to disk, so that equal requests give equal files, and is None when read.
    """

    value: float
    bound: float | None
    gap: float | None
    predicted_us: float | None
    predicted: float
    budget: float
    unit: str
    n_variables: int
    status: str
    seconds: float | None = None
    two_four: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values: all but the time, and the layers with 2:4 weights only if there are any."""
        state = {name: value for name, value in vars(self).items() if name not in ("seconds", "two_four")}
        return state | ({"two_four": list(self.two_four)} if self.two_four else {})

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "Certificate":
        """Read what `to_json` wrote."""
        return cls(**{**state, "two_four": tuple(state.get("two_four", ()))})


@dataclass(frozen=True)
class KeepPlan:
    """Which channels stay, per group. Groups that are not named stay whole.

    Attributes:
        keep: Group name -> ascending channel indices that stay. Without any, the branch that the group lies in goes as a
            whole; only groups inside a branch that is added to something else can be empty (see `branch`).
        fingerprint: Of the graph that the plan was made for; empty if unknown.
        algorithm: Name of the algorithm that made it.
        options: The algorithm's options.
        skipped: Group name -> why the algorithm left it whole.
        certificate: What the allocator proved; None for plans made by hand.
        two_four: Layers whose weights become 2:4 before fine-tuning, in the order of their names.
    """

    keep: Mapping[str, tuple[int, ...]]
    fingerprint: str = ""
    algorithm: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    certificate: Certificate | None = None
    two_four: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        keep = {name: tuple(int(i) for i in channels) for name, channels in self.keep.items()}
        for name, channels in keep.items():
            if list(channels) != sorted(set(channels)) or any(channel < 0 for channel in channels[:1]):
                raise ModelError(
                    f"channels of group '{name}' must be ascending, distinct and not negative",
                    at=f"keep plan: {str(channels)[:60]}",
                    fix="sort the indices and drop repetitions",
                )
        object.__setattr__(self, "keep", MappingProxyType(keep))

    @classmethod
    def of_widths(cls, kept: Mapping[str, int], two_four: Iterable[str] = ()) -> "KeepPlan":
        """Return a plan that keeps the first `kept[group]` channels: for costs, which follow from widths and layers alone.

        >>> KeepPlan.of_widths({"conv1": 3}).keep["conv1"]
        (0, 1, 2)
        """
        return cls({name: tuple(range(count)) for name, count in kept.items()}, two_four=tuple(sorted(two_four)))

    def check(self, graph: Graph) -> None:
        """Raise ModelError unless the plan fits `graph` (names, layers, ranges, fixed or needed groups, fingerprint)."""
        if self.fingerprint and self.fingerprint != graph.fingerprint:
            raise ModelError(
                f"the plan was made for another graph ({self.fingerprint}, this one is {graph.fingerprint})",
                at="keep plan",
                fix="use the model, factory arguments and input size that the plan was made with, or plan again",
            )
        layers = {layer.name for layer in graph.layers}
        for name in self.two_four:
            if name not in layers:
                raise ModelError(f"2:4 weights in an unknown layer '{name}'", at="keep plan", fix=nearest(name, layers))
        for name, channels in self.keep.items():
            group = graph.group(name)
            if not channels:
                branch_of(graph, name)
            elif channels[-1] >= group.size:
                raise ModelError(
                    f"channel {channels[-1]} is out of range for group '{name}' of size {group.size}",
                    at="keep plan",
                    fix=f"use indices from 0 to {group.size - 1}",
                )
            if group.fixed and len(channels) < group.size:
                raise ModelError(
                    f"group '{name}' cannot be pruned: {group.fixed}", at="keep plan", fix="leave it out of the plan"
                )

    def replace(self, **changes: Any) -> "KeepPlan":
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "schema": PLAN_SCHEMA,
            "fingerprint": self.fingerprint,
            "algorithm": self.algorithm,
            "options": dict(self.options),
            "certificate": self.certificate.to_json() if self.certificate else None,
            "skipped": dict(self.skipped),
            **({"two_four": list(self.two_four)} if self.two_four else {}),
            "keep": {name: list(channels) for name, channels in self.keep.items()},
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any], at: str = "keep plan") -> "KeepPlan":
        """Read what `to_json` wrote.

        Raises:
            ModelError: The schema is unknown or a field is missing or malformed.
        """
        if state.get("schema") != PLAN_SCHEMA:
            raise ModelError(
                f"plan has schema {state.get('schema')!r}, this version reads {PLAN_SCHEMA}", at=at, fix="make the plan again"
            )
        try:
            certificate = Certificate.from_json(state["certificate"]) if state["certificate"] else None
            keep = {name: tuple(channels) for name, channels in state["keep"].items()}
            about = (state["fingerprint"], state["algorithm"], state["options"], state["skipped"], certificate)
            return cls(keep, *about, tuple(state.get("two_four", ())))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ModelError(f"plan is malformed: {error}", at=at, fix="make the plan again") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; a half-written file never appears under `path`."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "KeepPlan":
        """Read a plan that `save` wrote.

        Raises:
            ModelError: The file is missing, is no JSON, or is no plan.
        """
        try:
            state = json.loads(Path(path).read_text())
        except OSError as error:
            raise ModelError(f"cannot read plan: {error.strerror}", at=str(path), fix="check the path") from error
        except ValueError as error:
            raise ModelError(f"plan is not JSON: {error}", at=str(path), fix="make the plan again") from error
        if not isinstance(state, dict):
            raise ModelError("plan is not a JSON object", at=str(path), fix="make the plan again")
        return cls.from_json(state, at=str(path))
