"""Commands that only look: a model, the plug-ins, this machine, finished runs."""

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from deploypipe.cli import console
from deploypipe.cli.build import Json, Model, Weights, show_report


def inspect(model: Model = "demo", weights: Weights = None, as_json: Json = False) -> None:
    """Show layers, coupled channels, what is fixed and why, costs."""
    from deploypipe import pipeline
    from deploypipe.figures import count

    facts = pipeline.inspect(model, weights)
    if as_json:
        console.answer_json(facts.to_json())
        return
    console.answer(f"{facts.model}: {count(facts.n_parameters)} parameters, {count(facts.n_macs)} MACs\n")
    console.table(
        ("layer", "kind", "channels", "kernel", "stride", "size", "MACs"), [_layer_row(layer) for layer in facts.layers]
    )
    console.answer("")
    console.table(("group", "channels", "members", "coupled by", "fixed because"), [_group_row(g) for g in facts.groups])
    console.answer("")
    console.pairs([("note", note) for note in facts.notes])
    prunable = [group for group in facts.groups if not group.fixed]
    console.answer(f"{len(prunable)} of {len(facts.groups)} groups can be pruned; --json lists every member")


def algos(as_json: Json = False) -> None:
    """List the pruning algorithms."""
    from deploypipe.algorithms import algorithms

    records = algorithms()
    if as_json:
        console.answer_json(records)
    else:
        console.table(
            ("algorithm", "kind", "options", "paper"), [_algorithm_row(name, record) for name, record in records.items()]
        )


def targets(as_json: Json = False) -> None:
    """List the targets."""
    from deploypipe.targets import NOT_RUN, list_targets, load_target

    found = [load_target(path) for path in list_targets().values()]
    if as_json:
        names = ("name", "title", "like", "note", "run_on_hardware")
        console.answer_json([{n: getattr(t, n) for n in names} | {"backend": t.build.backend, "file": t.path} for t in found])
        return
    columns = ("target", "what it is", "backend", "reached by", "threads", "hardware")
    status = {True: "run", False: NOT_RUN}
    rows = [(t.name, t.title, t.build.backend, t.reach.via, str(t.measure.threads), status[t.run_on_hardware]) for t in found]
    console.table(columns, rows)
    console.answer("")
    console.pairs((t.name, t.note) for t in found if t.note)


def doctor(as_json: Json = False) -> None:
    """Show what is installed and where files are kept."""
    from deploypipe.doctor import diagnose

    facts = diagnose()
    if as_json:
        console.answer_json(facts.to_json())
        return
    python = f"{platform.python_version()} ({sys.executable})"
    console.pairs([("python", python), ("cache", facts.cache), ("data", facts.data)])
    console.answer("")
    console.table(("package", "version", "needed for"), facts.packages)
    console.answer("")
    console.table(("backend", "ready", "why not"), [(b.name, "yes" if b.ready else "no", b.reason) for b in facts.backends])


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders of `deploypipe build`.")],
    as_json: Json = False,
) -> None:
    """Lay finished runs side by side, the most accurate first: what they reached, and their widths."""
    from deploypipe import compare as shown
    from deploypipe.report import Report

    reports = {str(run): Report.load(run) for run in runs}
    if as_json:
        console.answer_json({run: report.to_json() for run, report in reports.items()})
        return
    console.table(shown.COLUMNS, shown.outcome_rows(reports))
    widths = shown.widths(reports)
    console.answer("")
    if widths.rows:
        console.table(widths.columns, widths.rows)
    console.pairs(("note", note) for note in widths.notes)


def ledger(target: Annotated[str | None, typer.Option(help="Only runs on this target.")] = None, as_json: Json = False) -> None:
    """Show how far latency predictions were off in all builds so far."""
    from deploypipe import drift

    found = drift.overview(target)
    if as_json:
        console.answer_json(found.to_json())
    elif not found.entries:
        console.answer("no build has been recorded yet: `deploypipe build` with a latency budget adds a row")
        console.pairs(drift.remarks(found)[1:])
    else:
        console.table(drift.COLUMNS, drift.rows(found))
        console.answer("")
        console.table(drift.NEWEST_COLUMNS, drift.newest_rows(found))
        console.answer("")
        console.pairs(drift.remarks(found))


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of `deploypipe build`.")], as_json: Json = False
) -> None:
    """Show the report of a finished run."""
    from deploypipe.report import Report

    show_report(Report.load(run), run if run.is_dir() else run.parent, as_json)


def _layer_row(layer: Any) -> tuple[str, ...]:
    from deploypipe.figures import count

    def times(sizes: tuple[int, ...]) -> str:
        return "x".join(map(str, sizes))

    groups = f", {layer.groups} groups" if layer.groups > 1 else ""
    sizes = f"{times(layer.in_size)} -> {times(layer.out_size)}" if layer.in_size else ""
    channels = f"{layer.n_in} -> {layer.n_out}{groups}"
    return (layer.name, layer.kind, channels, times(layer.kernel), times(layer.stride), sizes, count(layer.n_macs))


def _group_row(group: Any) -> tuple[str, ...]:
    members = sorted({member.partition("[")[0].rpartition(".")[0] for member in group.members})
    shown = ", ".join(members[:4]) + (f" and {len(members) - 4} more" if len(members) > 4 else "")
    return (group.name, str(group.size), shown, ", ".join(group.coupled_by), group.fixed)


def _algorithm_row(name: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    options = ", ".join(f"{option['name']}={option['default']}" for option in record.get("options", ()))
    return (name, record.get("taxonomy", "installed plug-in"), options, record.get("paper", record.get("plugin", "")))
