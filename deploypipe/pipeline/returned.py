"""Take in what the owner of a device measured with a run's bundle: the report's figures, a row in the ledger, a profile."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploypipe import __version__, saved
from deploypipe.allocation.budget import parse_budget
from deploypipe.backends import load_backend
from deploypipe.backends.base import Profile, Timing
from deploypipe.device import require_arch
from deploypipe.errors import UsageError
from deploypipe.graph import trace
from deploypipe.job import JobResult
from deploypipe.latency.estimate import CALIBRATED
from deploypipe.latency.files import write_file
from deploypipe.latency.table import LatencyTable
from deploypipe.measurement import Latency
from deploypipe.models.load import load_model
from deploypipe.pipeline.absent import BY_OWNER, RETURNED
from deploypipe.pipeline.bundle import ANSWER, BUNDLE, MANIFEST, SCHEMA
from deploypipe.pipeline.record import written
from deploypipe.pipeline.several import runtime_of
from deploypipe.pipeline.sparsify import two_four_layers
from deploypipe.plan import KeepPlan
from deploypipe.profiler.fit import DENSE, Form, learned
from deploypipe.profiler.measure import device_key
from deploypipe.reports import ledger, render
from deploypipe.reports.report import Report
from deploypipe.targets import NOT_RUN, Target, cache_folder, load_target
from deploypipe.types import Graph

_FORMS = {"dense": DENSE, "pruned": "pruned"}  # sides of a bundle -> forms of the model


def import_results(path: str | Path) -> dict[str, Any]:
    """Take in a bundle's results and return what came of it, in plain values.

    The report of the run then shows measured latencies beside the predicted ones, the ledger gets its row, and the run's
    latency table becomes a calibrated profile: what the estimate says of every kernel, times what the same kernel took on the
    device over that, at the widths of the dense and of the pruned model. Later builds for the target use it where no device is
    at hand.

    Args:
        path: The bundle's folder with `results.json` in it, or that file.

    Raises:
        UsageError: There is no bundle or no result, or the result is of other files than the bundle's or the run's.
        TargetError: The device that answered has another processor than the target states.
        ModelError: The run's model cannot be made again.
    """
    folder = _folder(path)
    manifest, answer = _read(folder / MANIFEST, "bundle", _MANIFEST_KEYS), _read(folder / ANSWER, "results", _ANSWER_KEYS)
    if manifest.get("schema") != SCHEMA or answer.get("sha256") != manifest["sha256"]:
        raise UsageError(
            "the results are not those of this bundle's models",
            at=str(folder / ANSWER),
            fix="run the bundle's own command on the device, and copy its results.json back into the same bundle",
        )
    run = Path(manifest["run"]) if (Path(manifest["run"]) / saved.PLAN).is_file() else folder.parent
    _require_same(run, manifest["sha256"])
    target = load_target(manifest["target"])
    if manifest["precision"] != target.build.precision:
        raise UsageError(
            f"the bundle's models are of {manifest['precision']}, and target {target.name} is of {target.build.precision} now",
            at=str(folder / MANIFEST),
            fix="put the target's file back as it was, or build again",
        )
    require_arch(target, str(answer["facts"]["arch"]), "run the bundle's command on such a device")
    whole, profiles = _parsed(target, answer, folder, manifest["sha256"])
    latencies = {side: _latency(timing) for side, timing in whole.items()}
    before = Report.load(run)
    asked = [before.algorithm, before.budget.asked, before.budget.metric]
    built = load_backend(target).verdict(answer["bench"]["built"]["pruned"])
    notes = [_where(answer["facts"], before), *built]
    about = {"target": target.name, "precision": target.build.precision, "asked": asked}
    state = about | {"facts": answer["facts"], "sha256": answer["sha256"]}
    state |= {"passing": answer.get("passing", {}), "notes": notes, "built": list(built)}
    state["latencies"] = {side: asdict(latency) for side, latency in latencies.items()}
    write_file(run / RETURNED, json.dumps(state, indent=1) + "\n")
    report = _reported(before, latencies, state)
    render.write(report, run)
    kept = _calibrated(run, target, answer["facts"], whole, profiles) if (run / "table").is_dir() else None
    row = _ledger_row(report, run, manifest, latencies, answer["facts"])
    note = written(row) if row else ""
    return _summary(manifest, latencies, report, kept, profiles, note)


def _folder(path: str | Path) -> Path:
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises where a name is too long
        fix = "give the folder of a run's bundle, or the results.json in it"
        raise UsageError(f"there is no '{path}'", at=f"--import {path}", fix=fix)
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _require_same(run: Path, sha256: Mapping[str, str]) -> None:
    """Refuse a bundle whose run has been built anew since: the latencies would be those of other models."""
    for side, carried in sha256.items():
        file = run / f"{side}-built.onnx"
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != carried:
            raise UsageError(
                f"the run's {side} model is not the one in this bundle: it was built again since",
                at=str(file),
                fix=f"measure the bundle that lies in '{run / BUNDLE}' now, or build into another folder",
            )


def _parsed(
    target: Target, answer: Mapping[str, Any], folder: Path, sides: Iterable[str]
) -> tuple[dict[str, Timing], dict[str, Profile]]:
    """Let the backend read its own answers."""
    backend = load_backend(target)
    with tempfile.TemporaryDirectory(prefix="deploypipe-") as name:
        found = []
        for part in ("bench", "profile"):
            file = Path(name) / f"{part}.json"
            file.write_text(json.dumps(answer[part]))
            found.append(JobResult(0, "", "", {"answer.json": file}, 0.0))
        try:
            return backend.read_bench(found[0]), backend.read_profile(
                found[1], {side: folder / f"{side}.onnx" for side in sides}
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged("results", f"{type(error).__name__}: {error}", folder / ANSWER) from error


def _latency(timing: Timing) -> Latency:
    return Latency(timing.median_us, timing.p10_us, timing.p90_us, timing.runs, timing.foreign_load)


def _where(facts: Mapping[str, Any], report: Report) -> str:
    device = facts.get("gpu") or facts.get("cpu")
    plan = f"the plan was made before that, by a table that was {report.table}"
    return f"{BY_OWNER} {device} by its owner, {facts['runtime']} {facts['version']}; {plan}"


def _reported(report: Report, latencies: Mapping[str, Latency], state: Mapping[str, Any]) -> Report:
    """Return the run's report with the measured figures."""
    budget, said = report.budget, state["notes"]
    if budget.unit == "us":
        limit = parse_budget(budget.asked, budget.metric, latencies["dense"].median_us)
        budget = replace(budget, limit=limit, reached=latencies["pruned"].median_us)
    answered = runtime_of(state["facts"])
    return replace(
        report,
        runtimes=tuple(
            replace(row, runtime=answered, dense=latencies["dense"], pruned=latencies["pruned"])
            if row.target == report.target
            else row
            for row in report.runtimes
        ),
        dense=replace(report.dense, latency=latencies["dense"]),
        pruned=replace(report.pruned, latency=latencies["pruned"]),
        budget=budget,
        machine={**state["facts"], **state["passing"]},  # the second: how it was set while it measured
        two_four=report.two_four and replace(report.two_four, evidence=tuple(state["built"])),
        notes=(*(note for note in report.notes if not note.startswith((NOT_RUN, BY_OWNER)) and note not in said), *said),
    )


def _calibrated(
    run: Path, target: Target, facts: Mapping[str, Any], whole: Mapping[str, Timing], profiles: Mapping[str, Profile]
) -> Path:
    """Keep the run's table, corrected in context by what was measured, as a profile; return its folder."""
    origin = json.loads((run / saved.MODEL).read_text())
    loaded = load_model(origin["spec"])
    graph: Graph = trace(loaded.model, loaded.example)
    table = LatencyTable.load(run / "table")
    plans = {"dense": None, "pruned": KeepPlan.load(run / saved.PLAN)}
    holding = {"pruned": frozenset(two_four_layers(run) if table.knows_two_four else ())}
    forms = [
        Form(_FORMS[side], graph.kept(plans[side]), whole[side], profiles[side], holding.get(side, frozenset()))
        for side in plans
    ]
    context = learned(graph, table, forms, 0.0)
    constants = {name: table.facts[name] for name in ("timer_us", "node_us", "session_us")}
    about = {"source": CALIBRATED, "target": target.name, "precision": target.build.precision}
    known = {**facts, **constants, **about, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    folder = cache_folder() / "profiles" / f"{device_key(known)}-{CALIBRATED}"
    kernels = {entry.place: entry for entry in table.kernels}
    contexts = {context.structure: context}
    if (folder / "device.json").is_file():
        before = LatencyTable.load(folder)
        kernels = {entry.place: entry for entry in before.kernels} | kernels
        contexts = {known.structure: known for known in before.contexts} | contexts
    LatencyTable(known, table.steps, tuple(kernels.values()), tuple(contexts.values())).save(folder)
    return folder


def _ledger_row(
    report: Report, run: Path, manifest: Mapping[str, Any], latencies: Mapping[str, Latency], facts: Mapping[str, Any]
) -> ledger.Entry | None:
    predicted, dense, pruned = manifest["predicted_us"], latencies["dense"], latencies["pruned"]
    if not predicted:
        return None
    return ledger.Entry(
        datetime.now(UTC).isoformat(timespec="seconds"), report.target, report.threads, str(facts["runtime"]),
        str(facts["version"]), str(facts.get("gpu") or facts.get("cpu")), report.model, report.algorithm, report.budget.asked,
        report.budget.limit, predicted["dense"], predicted["pruned"], dense.median_us, dense.p10_us, dense.p90_us,
        pruned.median_us, pruned.p10_us, pruned.p90_us, pruned.n_runs, pruned.foreign_load, 0, __version__, str(run),
        manifest["table"],
    )  # fmt: skip


def _summary(
    manifest: Mapping[str, Any],
    latencies: Mapping[str, Latency],
    report: Report,
    kept: Path | None,
    profiles: Mapping[str, Profile],
    note: str,
) -> dict[str, Any]:
    found: dict[str, Any] = {"target": report.target, "run": manifest["run"]}
    for side, latency in latencies.items():
        found[f"{side}_measured_us"] = round(latency.median_us, 1)
        if side in manifest["predicted_us"]:
            found[f"{side}_predicted_us"] = round(manifest["predicted_us"][side], 1)
        found[f"{side}_sum_of_layers_over_whole"] = profiles[side].ratio
    found |= {"predictions_were": manifest["latency_source"], "budget_met": report.budget.met}
    found["profile"] = (
        f"{kept} ({CALIBRATED}: exact for both models, estimated in between)" if kept else "none: no latency table"
    )
    return found | ({"note": note} if note else {})


_MANIFEST_KEYS = {"run": str, "target": str, "precision": str, "sha256": dict, "predicted_us": dict, "latency_source": str}
_ANSWER_KEYS = {"facts": dict, "bench": dict, "profile": dict}
_FACTS = ("arch", "runtime", "version")


def _damaged(what: str, why: str, path: Path) -> UsageError:
    return UsageError(f"damaged {what}: {why}", at=str(path), fix="copy the file again from where it was written")


def _read(path: Path, what: str, keys: Mapping[str, type]) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "damaged"
        fix = f"give the folder of a run's bundle, with the {ANSWER} that its measuring script wrote on the device"
        raise UsageError(f"cannot read the {what}: {why}", at=str(path), fix=fix) from error
    if not isinstance(state, dict):
        raise _damaged(what, f"a {type(state).__name__}, not an object", path)
    if "schema" in state and state["schema"] != SCHEMA:
        return state  # of another version, which is said of both files together
    wrong = [key for key, kind in keys.items() if not isinstance(state.get(key), kind)]
    wrong += [f"facts.{key}" for key in _FACTS if isinstance(state.get("facts"), dict) and key not in state["facts"]]
    if wrong:
        raise _damaged(what, f"there is no fitting {', '.join(wrong)}", path)
    return state
