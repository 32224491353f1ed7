"""`deploypipe profile` and `deploypipe bench`: measure a latency table; measure one built artifact."""

from pathlib import Path
from typing import Annotated

import typer

from deploypipe.cli import console
from deploypipe.cli.build import Binary, HostName, Json, Model, TargetName, Threads, Weights
from deploypipe.errors import UsageError


def profile(
    context: typer.Context,
    model: Model = "demo",
    weights: Weights = None,
    target: TargetName = "cpu",
    threads: Threads = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what was measured on this target before.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write this model's part of the table into a new folder.")] = None,
    results: Annotated[
        Path | None, typer.Option("--import", help="Take in what the owner of a device measured with a run's bundle.")
    ] = None,
    allow_noise: Annotated[
        bool,
        typer.Option(
            "--allow-noise", help="Accept what other programs disturbed, or a table off by over 10 %; it then says so."
        ),
    ] = False,
    host: HostName = None,
    benchmark_binary: Binary = None,
    as_json: Json = False,
) -> None:
    """Measure a model's layers at many widths, on the target."""
    from deploypipe import pipeline

    if results:
        _refuse_others(context)
        with console.unanswered():
            found = pipeline.import_results(results)
        console.answer_json(found) if as_json else console.pairs((k.replace("_", " "), str(v)) for k, v in found.items())
        return
    with console.progress() as reporter:
        request = pipeline.Request(model, weights, target=target, threads=threads, host=host, benchmark_binary=benchmark_binary)
        summary = pipeline.profile_model(request, reporter, fresh=fresh, save=save, allow_noise=allow_noise or None)
    if as_json:
        console.answer_json(summary)
    else:
        console.pairs((name.replace("_", " "), _shown(value)) for name, value in summary.items())


def _refuse_others(context: typer.Context) -> None:
    """Results say themselves of what they are: an option beside --import would be looked at by nothing."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source and source.name == "COMMANDLINE" and name not in {"results", "as_json"}:
            at = f"--import and --{name.replace('_', '-')}"
            raise UsageError("what was measured is taken in as it is", at=at, fix="leave the other option out")


def _shown(value: object) -> str:
    return "; ".join(map(str, value)) or "nothing" if isinstance(value, list) else str(value)


def bench(
    artifact: Annotated[Path, typer.Argument(help="A built artifact, or an ONNX file.")],
    target: TargetName = "cpu",
    threads: Threads = None,
    layers: Annotated[bool, typer.Option(help="Also measure each kernel; takes about as long again.")] = True,
    host: HostName = None,
    benchmark_binary: Binary = None,
    as_json: Json = False,
) -> None:
    """Measure an artifact's latency, whole and kernel by kernel."""
    from deploypipe import artifact as shown
    from deploypipe import pipeline

    with console.progress() as reporter:
        times = pipeline.bench_artifact(
            artifact, target, threads, reporter, layers=layers, host=host, benchmark_binary=benchmark_binary
        )
    if as_json:
        console.answer_json(times.to_json())
        return
    console.pairs(shown.whole_pairs(times))
    if times.profile is not None:
        console.answer("")
        console.table(shown.COLUMNS, shown.kernel_rows(times.profile))
        console.answer("")
        console.pairs(shown.sum_pairs(times, times.profile))
