"""No device at hand: a stored profile or an estimate instead of measuring, ONNX files instead of engines, no latencies.

Everything else of a run is the same: channels are chosen, trained and exported, and each file is checked on this machine. What
the owner of a device has measured with the run's bundle (see `bundle`) counts as soon as it has been imported.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from deploypipe.backends import load_backend
from deploypipe.backends.base import Arrays, Facts
from deploypipe.cost import CostTable
from deploypipe.device import at_home, installed
from deploypipe.errors import TargetError, UsageError
from deploypipe.latency.estimate import CALIBRATED, ESTIMATED, estimated, launches_us
from deploypipe.latency.table import LatencyTable
from deploypipe.pipeline.request import BY_CHOICE
from deploypipe.pipeline.stages import REFERENCE, Device
from deploypipe.plan import KeepPlan
from deploypipe.reports.figures import UNVERIFIED, microseconds
from deploypipe.runners import load_runner
from deploypipe.targets import Target, cache_folder, load_target
from deploypipe.types import Graph

BY_OWNER = "latencies: measured on"
RETURNED = "returned.json"  # in the run folder: what came back from the owner of a device


def device_of(target: Target, run: Path | None = None, sparsity: str = "", asked: Sequence[str] = ()) -> Device:
    """Return the device of `target`, or a stand-in if there is none at hand and the target file allows an estimate.

    At hand is this machine if the runtime is installed, also for a target elsewhere if this machine is such a device and no
    host is named (see `at_home`), and any device that a host is named for; whether that host answers is no question here: a
    device that was named and cannot be reached is an error, not a reason to estimate.

    Args:
        target: With the host that was asked for.
        run: The run folder, in which measurements by the owner may lie.
        sparsity: As in a request: with any, an estimate prices 2:4 weights too; with "auto" a stored profile must do so.
        asked: Of a request: if the run was built for the same before its owner measured it, its own table is kept.
    """
    found = at_home(target)
    at_hand = installed(load_backend(found), found)[0] if load_runner(found).here else bool(found.reach.host)
    if not at_hand and found.rates.known:
        return Absent(found, run, sparsity, asked)
    device = Device(found)
    if found is not target:
        what = f"this machine has the processor ({target.device.arch}) and the runtime ({target.build.backend})"
        device.notes = (f"no host was named, and {what} of target {target.name}: it was taken for the device",)
    return device


class Absent(Device):
    """Stands in for a device that is not at hand."""

    present: ClassVar[bool] = False

    def __init__(self, target: Target, run: Path | None = None, sparsity: str = "", asked: Sequence[str] = ()) -> None:
        super().__init__(target)
        self.sparsity = sparsity
        self._returned = read_returned(run, target)
        self.measured = False  # by the owner; see bench
        self._own = run / "table" if run and self._returned and self._returned.get("asked") == list(asked) else None

    @property
    def suffix(self) -> str:
        """Of what stands in for the built file: the exported model, with the precision written into it."""
        return ".onnx"

    @cached_property
    def facts(self) -> Facts:
        """What is known: those of the owner's device once it has been measured."""
        return self.planned_with | (self._returned["facts"] if self._returned else {})

    @property
    def planned_with(self) -> Facts:
        """What was known before anything came back: a plan that has been measured stays the plan."""
        precision = self.target.build.precision
        return {"runtime": self.backend.name, "version": "", "device": "none at hand", "precision": precision}

    def build(self, model: Path, artifact: Path) -> tuple[str, ...]:
        """Write the model as the runtime will be given it."""
        artifact.write_bytes(self.backend.stated(model, self.target))
        return ()

    def run(self, model: Path, inputs: Arrays) -> list[NDArray[np.generic]]:
        """Return the outputs of an exported model, computed on this machine."""
        return Device(load_target(REFERENCE)).run(model, inputs)

    def tolerance(self, stage: str) -> float:
        """Return the backend's for what stands in for the built file; exported ones are run in full precision."""
        return self.backend.tolerance if stage == "built" else load_backend(load_target(REFERENCE)).tolerance

    def bench(self, models: Mapping[str, Path], expected_us: float | None = None) -> dict[str, Any]:
        """Return what the owner measured of these very files; nothing of any other."""
        if not self._returned:
            return {}
        hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in models.items()}
        if any(self._returned["sha256"].get(name) != found for name, found in hashes.items()):
            return {}
        found: dict[str, Any] = self._returned["latencies"]
        self.measured = True
        return found

    def state(self) -> Facts:
        """Return how the owner's device was set while it measured; nothing without one."""
        return dict(self._returned["passing"]) if self._returned and self.measured else {}

    def remarks(self) -> tuple[str, ...]:
        """Return who measured."""
        return tuple(self._returned["notes"]) if self._returned and self.measured else ()

    def known_table(self, graph: Graph, given: str | Path | None) -> LatencyTable | None:
        """Return the table in the folder `given`, or a stored profile of such a device, or an estimate.

        Of a run that its owner has measured, the table that it was planned with: the profile that came of it would change the
        plan, and throw away what was measured. It is for other runs, and for this one when it asks for something else.

        Raises:
            TargetError: The given one cannot be used, or the target states no rates of its precision.
        """
        return (
            super().known_table(graph, given)
            or self._own_table(graph)
            or stored_table(self.target, graph, two_four=self.sparsity == BY_CHOICE)
            or estimated(graph, self.target, sparse=bool(self.sparsity))
        )

    def _own_table(self, graph: Graph) -> LatencyTable | None:
        if not self._own or not self._own.is_dir():
            return None
        table = LatencyTable.load(self._own)
        with contextlib.suppress(TargetError):  # of another model, when the user has edited its file
            table.predict(graph)
            return table if table.knows_two_four or not self.sparsity else None
        return None

    def within_reach(self, limit: float, cost: CostTable, graph: Graph, *, share: bool) -> float:
        """Return the budget to plan for: what was asked for, mostly. What a table cannot reach, the allocator refuses.

        An estimate is a lower bound but for its launches, whose price is the least certain figure in it. So a budget that even
        the work of the narrowest widths exceeds, without any launch, is out of reach on any such device, and refused as by any
        table. One that is exceeded only by launches may or may not be: the same share is then taken of what widths can change,
        and the report warns.
        """
        if not isinstance(cost, LatencyTable) or cost.source != ESTIMATED:
            return limit
        least, dense = cost.predict(graph, _cheapest(cost, graph)), cost.predict(graph)
        launches = launches_us(cost, graph)
        work = dense * (least - launches) / (dense - launches) if share else least - launches
        if not work <= limit < least:
            return limit
        taken = least + limit / dense * (dense - least)
        self.notes = (
            f"{UNVERIFIED}: {microseconds(limit)} is out of reach by the estimate, though only by what it takes for launches "
            f"({microseconds(launches)} of {microseconds(dense)}), its least certain figure: the narrowest widths take "
            f"{microseconds(least)}. The plan was made for {microseconds(taken)}, the budget's share of what widths can "
            "change; measure a device before you rely on it",
        )
        return taken


def _cheapest(cost: LatencyTable, graph: Graph) -> KeepPlan:
    """Return the narrowest widths, with 2:4 weights wherever they are offered."""
    narrow = {name: widths[0] for name, widths in cost.candidates(graph).items()}
    return KeepPlan.of_widths(narrow, [term.name for term in cost.terms(graph) if term.two_four])


def stored_table(target: Target, graph: Graph, *, two_four: bool = False) -> LatencyTable | None:
    """Return the profile of the model that was kept for this kind of device; a measured one before one that was calibrated.

    With `two_four`, only one that prices such weights.
    """
    found = []
    for path in sorted((cache_folder() / "profiles").glob("*/device.json")):
        try:
            table = LatencyTable.load(path.parent)
            facts = table.facts
            if facts.get("target") in {target.name, target.like} and facts.get("precision") == target.build.precision:
                table.predict(graph)
                found += [part for part in (table.only(graph),) if part.knows_two_four or not two_four]
        except TargetError:  # of an older version, or of other models
            continue
    return max(found, key=lambda table: (table.source == "measured", str(table.facts.get("date"))), default=None)


def stored(table: LatencyTable) -> str:
    """Say which stored profile a table is that the run did not measure: of which device, power mode and date; "" if none."""
    facts = table.facts
    if table.source == ESTIMATED:
        return ""
    device = next((str(facts[name]) for name in ("model", "gpu", "cpu") if facts.get(name)), "an unknown device")
    mode = str(facts.get("power_mode") or "unknown").removeprefix("NV Power Mode: ")
    date = str(facts.get("date") or "date unknown")[:16].replace("T", " ")
    return f"a {CALIBRATED if table.source == CALIBRATED else 'stored'} profile of {device} (power mode {mode}, {date})"


def read_returned(run: Path | None, target: Target) -> dict[str, Any] | None:
    """Return what an import left in the run folder; None if that was measured for another target, or at another precision.

    Raises:
        UsageError: The file is damaged.
    """
    path = run / RETURNED if run else None
    if path is None or not path.is_file():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        fix = "import the owner's results again (profile --import), or delete the file"
        raise UsageError("what was imported from the device's owner is damaged", at=str(path), fix=fix) from error
    about = {"target": target.name, "precision": target.build.precision}
    return state if about.items() <= state.items() else None
