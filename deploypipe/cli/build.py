"""`deploypipe build`: the whole way from a trained model to a measured artifact."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from deploypipe.cli import console
from deploypipe.errors import UsageError

Budget = Annotated[str, typer.Option(help="At most this: 50% of the dense model, 3ms, 800us; with --metric 1.2M, 300k.")]


def _named(host: str | None) -> str | None:
    """Refuse an empty name, as an unset shell variable gives: it would be this machine."""
    if host is not None and not host.strip():
        raise UsageError("the host has no name", at="--host", fix="name the device, or leave --host out")
    return host


HostName = Annotated[
    str | None,
    typer.Option("--host", callback=_named, help="Which device: [user@]host[:port] over SSH, or a serial number over adb."),
]
Binary = Annotated[
    Path | None,
    typer.Option("--benchmark-binary", help="Measure with this onnxruntime_perf_test, built for the device: no Python there."),
]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Keep = Annotated[list[str] | None, typer.Option(metavar="GROUP", help="Leave this group whole; may be repeated.")]
Model = Annotated[str, typer.Option(help="demo, torchvision:NAME, timm:NAME, file.py:factory or package.module:factory.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An algorithm's option; may be repeated.")
]
TargetName = Annotated[str, typer.Option(help="What to deploy to: a name from `deploypipe targets`, or a .toml file.")]
TargetNames = Annotated[
    str, typer.Option(help="As elsewhere; several with commas between them: planned for the first, built for all.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the runtime, instead of the target's.")]
TrainPrecision = Annotated[
    str, typer.Option(metavar="fp32|bf16", help="Of training; bf16 is faster where the CPU or GPU has it.")
]
Value = Annotated[
    str,
    typer.Option(
        help="What widths are worth: scores, taylor (first order, blocks may go) or measured.",
        show_default="scores; with auto: taylor",
    ),
]
Sparsity = Annotated[
    str, typer.Option(metavar="2:4|auto", help="2:4 weights (NVIDIA since Ampere): wherever they can be, or where it pays.")
]
ValueRounds = Annotated[int, typer.Option(min=0, help="With --value measured: measure around the solution this often.")]
ValueFinalists = Annotated[int, typer.Option(min=1, help="With --value measured: train this many plans an epoch to choose.")]
Weights = Annotated[Path | None, typer.Option(help="Trained weights: .safetensors, or a state dict of tensors (.pt, .pth).")]


def build(
    context: typer.Context,
    model: Model = "demo",
    weights: Weights = None,
    data: Annotated[str, typer.Option(help="demo, imagefolder:DIR, cifar10:DIR or file.py:factory.")] = "demo",
    target: TargetNames = "cpu",
    algo: Annotated[str, typer.Option(help="A name from `deploypipe algos`, or auto: what did best on the bench.")] = "auto",
    budget: Budget = "50%",
    metric: Annotated[str, typer.Option(help="What the budget counts: latency, macs or params.")] = "latency",
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of fine-tuning; 0 only renews the batch norms.")] = 3,
    out: Annotated[str | None, typer.Option(metavar="<path>", help="Run folder. The same command again resumes there.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    settings: Settings = None,
    distill: Annotated[bool, typer.Option(help="Let the dense model teach the pruned one.")] = True,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate of fine-tuning.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per training step.")] = None,
    train_precision: TrainPrecision = "fp32",
    threads: Threads = None,
    accuracy_floor: Annotated[float | None, typer.Option(min=0, max=1, help="Fail below this accuracy, 0 to 1.")] = None,
    keep: Keep = None,
    table: Annotated[Path | None, typer.Option(help="Use this latency table (from `profile --save`).")] = None,
    value: Value = "",
    value_rounds: ValueRounds = 2,
    sparsity: Sparsity = "",
    value_finalists: ValueFinalists = 1,
    host: HostName = None,
    benchmark_binary: Binary = None,
    as_json: Json = False,
) -> None:
    """Prune, fine-tune, export, verify and measure a model."""
    from deploypipe import pipeline

    request = pipeline.Request(
        model, weights, data, target, algo, budget, metric, epochs, Path(out) if out else out, seed, host=host, lr=lr,
        benchmark_binary=benchmark_binary, value_finalists=value_finalists, train_precision=train_precision, sparsity=sparsity,
        accuracy_floor=accuracy_floor, value_rounds=value_rounds, keep=tuple(keep or ()), command=typed(context), table=table,
        batch_size=batch_size, distill=distill, threads=threads, value=value, options=parse_settings(settings or ()),
    )  # fmt: skip
    with console.progress() as reporter:
        report = pipeline.build(request, reporter)
    show_report(report, request.folder, as_json)


def typed(context: typer.Context) -> str:
    """Return the command as it was typed."""
    return shlex.join(["deploypipe", *(context.obj or ())])


def show_report(report: Any, folder: Path, as_json: bool) -> None:
    """Write what a run found out: the table, the verdict, and where everything lies."""
    from deploypipe.reports import render, runtimes
    from deploypipe.reports.report import MARKDOWN_NAME

    if as_json:
        console.answer_json(report.to_json())
        return
    console.answer(render.title(report) + "\n")
    console.table(render.SUMMARY_COLUMNS, render.summary_rows(report))
    console.answer("")
    if report.runtimes:
        console.table(runtimes.COLUMNS, runtimes.rows(report.runtimes))
        console.answer(runtimes.verdict(report.runtimes) + "\n")
    files = [(what, str(folder / path)) for what, path in report.artifacts.items()]
    console.pairs([*render.verdict(report), *files, ("report", str(folder / MARKDOWN_NAME))])


def parse_settings(settings: Sequence[str]) -> Mapping[str, str]:
    """Return the options that `--set key=value` states, as text: the algorithm knows their types.

    Raises:
        UsageError: There is no `=`, no key, or a key occurs twice.
    """
    options: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"'{setting}' is no KEY=VALUE", at=f"--set {setting}", fix="write for example --set images=64")
        if key.strip() in options:
            raise UsageError(f"option '{key.strip()}' is set twice", at=f"--set {setting}", fix="leave one of them out")
        options[key.strip()] = value.strip()
    return options
