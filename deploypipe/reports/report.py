"""What a run found out, as one frozen value that survives JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from deploypipe.errors import UsageError
from deploypipe.measurement import Latency, Round
from deploypipe.plan import Certificate
from deploypipe.reports.figures import unmeasured
from deploypipe.reports.pattern import SparseLayer, TwoFour
from deploypipe.reports.runtimes import RuntimeOutcome

REPORT_SCHEMA = 3
_AGAIN = "run the same build command again"
_LATER = ("two_four", "profile", "table_additivity")  # fields that older reports do not have
JSON_NAME, MARKDOWN_NAME = "report.json", "report.md"


@dataclass(frozen=True)
class Side:
    """The model before or after pruning.

    Attributes:
        accuracy: Share of the test set that is labelled right, 0 to 1; None if there is no test set.
        n_parameters: Trainable parameters.
        n_macs: Multiply-accumulates of one forward pass.
        artifact_bytes: Size of the file that runs on the target.
        latency: Measured on the target; None if the target could not be reached.
        predicted_us: What the latency table says; None if the run needed no table.
    """

    accuracy: float | None
    n_parameters: int
    n_macs: int
    artifact_bytes: int
    latency: Latency | None
    predicted_us: float | None


@dataclass(frozen=True)
class BudgetOutcome:
    """The budget that was asked for, and what became of it.

    Attributes:
        asked: As the user wrote it: "50%", "3ms".
        metric: "latency", "macs" or "params".
        unit: Of the three numbers: "us", "MACs" or "params".
        limit: The most that was allowed; a share of the latency is one of the dense latency measured beside the pruned one.
        predicted: Of the plan, by the cost table.
        reached: Of the built model: measured latency, or counted.
        rounds: The plans that were measured before training, in order; none if the budget is counted.
        chosen: Which of them was taken.
    """

    asked: str
    metric: str
    unit: str
    limit: float
    predicted: float
    reached: float
    rounds: tuple[Round, ...] = ()
    chosen: int = 0

    @property
    def n_corrections(self) -> int:
        """How often the table was corrected by a measurement and the plan made again."""
        return max(0, len(self.rounds) - 1)

    @property
    def met(self) -> bool:
        """The built model stays within the limit."""
        return self.reached <= self.limit


@dataclass(frozen=True)
class GroupOutcome:
    """One group of coupled channels.

    Attributes:
        name: The first layer that produces the channels.
        size: Channels before.
        kept: Channels after.
        members: The parameter axes that are cut together, as "name[axis] role".
        coupled_by: Operations that tie several layers into the group.
        fixed: Why it cannot be pruned; empty if it can.
        skipped: Why the algorithm left it whole; empty if it judged it.
    """

    name: str
    size: int
    kept: int
    members: tuple[str, ...] = ()
    coupled_by: tuple[str, ...] = ()
    fixed: str = ""
    skipped: str = ""


@dataclass(frozen=True)
class Check:
    """A stage's outputs against those of the stage before, on real inputs.

    Attributes:
        stage: What was checked: "compacted", "onnx", "simplified", "engine".
        against: What it must agree with.
        error: Largest absolute difference, as a share of the largest output.
        tolerance: The most that is allowed.
        n_inputs: On how many inputs.
    """

    stage: str
    against: str
    error: float
    tolerance: float
    n_inputs: int

    @property
    def passed(self) -> bool:
        """The error stays within the tolerance (an error that is not a number does not)."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Arm:
    """One way to train the pruned architecture, of several that are compared.

    Attributes:
        name: Which way.
        seed: Of its training.
        epochs: Of its training.
        n_parameters: Trainable parameters.
        accuracy: Share of the test set that is labelled right, 0 to 1.
    """

    name: str
    seed: int
    epochs: int
    n_parameters: int
    accuracy: float


@dataclass(frozen=True)
class Report:
    """Everything that a run found out.

    Attributes:
        epochs: Of fine-tuning.
        epochs_before: Of training before pruning, where the algorithm does that.
        sparsity: Zeros by layer, for algorithms that leave zeros in weights instead of cutting channels.
        arms: Other ways to train the pruned architecture, and the one taken; empty if nothing was compared.
        compacted_accuracy: After compaction, before fine-tuning; None if there is no test set.
        n_test: Samples in the test set.
        threads: Of the runtime, while measuring.
        table: Where the latency table comes from: "measured", "fitted", "estimated", or "" if the run needed none.
        table_error: Mean relative error of the table on random plans of this model, 0.03 = 3 %; None if not checked.
        table_additivity: The dense model's parts over the whole, by the table; None without a measured table.
        seconds: Stage -> time that computing it took, also if its result was reused.
        artifacts: What -> path below the run folder.
        runtimes: The pruned model on each target, the first of which is `target`; empty unless several were asked for.
        two_four: What became of `--sparsity`; None if it was not given.
        value: What a width was worth, as `--value` names it.
        recipe: That chose algorithm and value; empty if the user did.
        profile: Which stored profile the latency table is, where no device was at hand: of which device, power mode and date.
        notes: What else the user should know, in sentences.
    """

    model: str
    data: str
    target: str
    algorithm: str
    options: Mapping[str, Any]
    seed: int
    epochs: int
    dense: Side
    pruned: Side
    compacted_accuracy: float | None
    n_test: int
    budget: BudgetOutcome
    groups: tuple[GroupOutcome, ...]
    checks: tuple[Check, ...]
    certificate: Certificate | None = None
    threads: int = 1
    table: str = ""
    table_error: float | None = None
    table_additivity: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    artifacts: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    created: str = ""
    runtimes: tuple[RuntimeOutcome, ...] = ()
    notes: tuple[str, ...] = ()
    epochs_before: int = 0
    sparsity: tuple[SparseLayer, ...] = ()
    arms: tuple[Arm, ...] = ()
    two_four: TwoFour | None = None
    value: str = "scores"
    recipe: str = ""
    profile: str = ""

    @property
    def method(self) -> str:
        """The algorithm, what chose widths if not its scores, and the recipe that both are from."""
        chosen = self.algorithm if self.value == "scores" else f"{self.algorithm} with {self.value} widths"
        return f"{self.recipe} ({chosen})" if self.recipe else chosen

    @property
    def speedup(self) -> float | None:
        """Measured latency before over after; None unless both were measured."""
        dense, pruned = self.dense.latency, self.pruned.latency
        return dense.median_us / pruned.median_us if dense and pruned else None

    @property
    def latency_source(self) -> str:
        """What the latencies of the run are: "measured", or where no device was at hand what stands in, and that it does."""
        return "measured" if self.pruned.latency else unmeasured(self.table, self.profile)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, with the schema and the derived figures that scripts ask for first."""
        derived = {
            **{"speedup": self.speedup, "latency_source": self.latency_source},
            "budget_met": self.budget.met,
            "n_corrections": self.budget.n_corrections,
            "checks_passed": all(c.passed for c in self.checks),
        }
        return {"schema": REPORT_SCHEMA, **derived, **json.loads(json.dumps(self, default=_state))}

    @classmethod
    def from_json(cls, state: Mapping[str, Any], at: str = "report") -> "Report":
        """Read what `to_json` wrote.

        Raises:
            UsageError: The schema is unknown, or a field is missing or malformed.
        """
        if (found := state.get("schema")) != REPORT_SCHEMA:
            raise UsageError(f"report has schema {found!r}, this version reads {REPORT_SCHEMA}", at=at, fix=_AGAIN)
        try:
            values = {part.name: state[part.name] for part in fields(cls) if part.name not in _LATER or part.name in state}
            return cls(**values | _nested(values))
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"report is malformed: {error}", at=at, fix=_AGAIN) from error

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, run: str | Path) -> "Report":
        """Read the report of a run folder, or a report file.

        Raises:
            UsageError: There is no such run, it is not finished, or the file is no report.
        """
        path = Path(run) / JSON_NAME if Path(run).is_dir() else Path(run)
        try:
            state = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _no_report(Path(run)) from error
        except OSError as error:
            raise UsageError(f"cannot read the report: {error.strerror}", at=str(path), fix="check the path") from error
        except ValueError as error:
            raise UsageError("the report is not JSON", at=str(path), fix=_AGAIN) from error
        if not isinstance(state, dict):
            raise UsageError("the report is not a JSON object", at=str(path), fix=_AGAIN)
        return cls.from_json(state, at=str(path))


def _no_report(run: Path) -> UsageError:
    if any(run.glob("*.key")):
        return UsageError("the run is not finished", at=str(run), fix="run the same build command again: it resumes")
    message = "no run lies in this folder" if run.exists() else f"there is no run '{run}'"
    return UsageError(message, at=str(run), fix="give the --out folder of a finished `deploypipe build`")


def _state(value: Any) -> dict[str, Any]:
    """Return a value that JSON does not know as one that it does."""
    return {part.name: getattr(value, part.name) for part in fields(value)} if is_dataclass(value) else dict(value)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are no plain JSON values."""
    sides = {name: values[name] for name in ("dense", "pruned")}
    lists = ("members", "coupled_by")
    return {
        **{name: Side(**{**s, "latency": Latency(**s["latency"]) if s["latency"] else None}) for name, s in sides.items()},
        "budget": BudgetOutcome(**{**values["budget"], "rounds": tuple(map(Round.from_json, values["budget"]["rounds"]))}),
        "groups": tuple(GroupOutcome(**state | {name: tuple(state[name]) for name in lists}) for state in values["groups"]),
        "checks": tuple(Check(**state) for state in values["checks"]),
        "certificate": Certificate.from_json(values["certificate"]) if values["certificate"] else None,
        "notes": tuple(values["notes"]),
        "sparsity": tuple(SparseLayer(**state) for state in values["sparsity"]),
        "runtimes": tuple(map(RuntimeOutcome.from_json, values["runtimes"])),
        "arms": tuple(Arm(**state) for state in values["arms"]),
        "two_four": TwoFour.from_json(values["two_four"]) if values.get("two_four") else None,
    }
