"""Commands that only look: a model, the plug-ins, this machine, finished runs."""

import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from deploypipe.cli import console
from deploypipe.cli.build import Binary, HostName, Json, Model, Weights, show_report
from deploypipe.errors import BackendError


def inspect(model: Model = "demo", weights: Weights = None, as_json: Json = False) -> None:
    """Show layers, coupled channels, what is fixed and why, costs."""
    from deploypipe import pipeline
    from deploypipe.reports.figures import count

    with console.unanswered():
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


def algos(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Explain this one.")] = None, as_json: Json = False
) -> None:
    """List the pruning algorithms, or explain one."""
    from deploypipe.algorithms import AUTO, algorithms, explain

    if name == AUTO:
        show_recipe(as_json)
        return
    if name is not None:
        show_algorithm(explain(name), as_json)
        return
    records = algorithms()
    if as_json:
        console.answer_json(records)
    else:
        columns = ("algorithm", "kind", "needs", "options", "paper")
        console.table(columns, [_algorithm_row(name, record) for name, record in records.items()])
        console.answer(
            f"\n`deploypipe algos NAME` explains one, with an example; `--algo {AUTO}`, the default, is a recipe made of these."
        )


def show_recipe(as_json: bool) -> None:
    """Write what `auto` stands for."""
    from deploypipe.pipeline.recipe import Recipe

    recipe = Recipe()
    if as_json:
        console.answer_json({"name": "auto", **asdict(recipe), "example": recipe.command})
    else:
        console.answer(
            f"The recipe that kept most accuracy at equal milliseconds on our bench; it stands for\n\n    {recipe.command}"
        )


def show_algorithm(record: Mapping[str, Any], as_json: bool) -> None:
    """Write what is known about one algorithm."""
    if as_json:
        console.answer_json(record)
        return
    console.answer(f"{record['about']}\n")
    needs = ", ".join(record.get("needs", ())) or "only the weights"
    facts = [("name", record["name"]), ("kind", record.get("taxonomy", "installed plug-in")), ("needs", needs)]
    console.pairs([*facts, ("does", " ".join(record["does"].split())), ("example", record["example"])])
    if record["options"]:
        console.answer("")
        console.table(("option", "default", "allowed", "meaning"), [_option_row(option) for option in record["options"]])


def _option_row(option: Mapping[str, Any]) -> tuple[str, ...]:
    limits = [word for word, end in (("from {:g}", option["low"]), ("to {:g}", option["high"])) if end is not None]
    ends = [end for end in (option["low"], option["high"]) if end is not None]
    allowed = ", ".join(option["choices"]) or " ".join(word.format(end) for word, end in zip(limits, ends, strict=True))
    return (option["name"].rstrip("_"), str(option["default"]), allowed, option["meaning"])


def targets(as_json: Json = False) -> None:
    """List the targets."""
    from deploypipe.targets import list_targets, load_target

    found = [load_target(path) for path in list_targets().values()]
    if as_json:
        console.answer_json([_target_record(target) for target in found])
        return
    columns = ("target", "what it is", "backend", "reached by", "threads", "state")
    console.table(columns, [_target_row(target) for target in found])
    notes = [(target.name, target.note) for target in found if target.note]
    if notes:
        console.answer("")
        console.pairs(notes)


def doctor(
    target: Annotated[str | None, typer.Option(help="Look at this target's device instead of this machine.")] = None,
    host: HostName = None,
    benchmark_binary: Binary = None,
    as_json: Json = False,
) -> None:
    """Show what is installed here. With --target, step by step, whether its device can be used."""
    if target is not None or host is not None or benchmark_binary is not None:
        _doctor_device(target or "cpu", host, benchmark_binary, as_json)
        return
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


def _doctor_device(target: str, host: str | None, binary: Path | None, as_json: bool) -> None:
    from deploypipe import checkup
    from deploypipe.backends import by_binary
    from deploypipe.targets import load_target

    chosen = by_binary(load_target(target), binary) if binary else load_target(target)
    found = checkup.examine(chosen.reached_at(host) if host else chosen)
    if as_json:
        console.answer_json(found.to_json())
    else:
        console.pairs([("target", found.target), ("device", found.place)])
        console.answer("")
        console.table(checkup.COLUMNS, checkup.rows(found))
        console.answer("")
        console.pairs(checkup.verdict(found))
    if not found.usable:
        raise typer.Exit(BackendError.exit_code)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders of `deploypipe build`.")],
    as_json: Json = False,
) -> None:
    """Lay finished runs side by side. The most accurate comes first."""
    from deploypipe.reports import compare as shown
    from deploypipe.reports.report import Report

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
    """Show how far latency predictions were off in builds so far."""
    from deploypipe.reports import drift

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
    from deploypipe.reports.report import Report

    show_report(Report.load(run), run if run.is_dir() else run.parent, as_json)


def _target_record(target: Any) -> dict[str, Any]:
    facts = {"name": target.name, "title": target.title, "backend": target.build.backend, "reached_by": target.reach.via}
    return facts | {"like": target.like, "run_on_hardware": target.run_on_hardware, "note": target.note, "file": target.path}


def _target_row(target: Any) -> tuple[str, ...]:
    from deploypipe.targets import NOT_RUN

    state = "" if target.run_on_hardware else NOT_RUN
    return (target.name, target.title, target.build.backend, target.reach.via, str(target.measure.threads), state)


def _layer_row(layer: Any) -> tuple[str, ...]:
    from deploypipe.reports.figures import count

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
    needs = ", ".join(record.get("needs", ()))
    return (name, record.get("taxonomy", "installed plug-in"), needs, options, record.get("paper", record.get("plugin", "")))
