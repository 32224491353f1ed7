"""`deploypipe sensitivity`: what every width of a model loses, and what it saves."""

from pathlib import Path
from typing import Annotated

import typer

from deploypipe.cli import console
from deploypipe.cli.build import HostName, Json, Keep, Model, Settings, Threads, Weights, parse_settings


def sensitivity(
    model: Model = "demo",
    weights: Weights = None,
    data: Annotated[str, typer.Option(help="demo, imagefolder:DIR, cifar10:DIR or file.py:factory.")] = "demo",
    target: Annotated[str | None, typer.Option(help="Show what is saved there, instead of MACs: a name or a file.")] = None,
    algo: Annotated[str, typer.Option(help="Decides which channels go first: a name from `deploypipe algos`.")] = "thinet",
    settings: Settings = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which training images are held out.")] = 0,
    threads: Threads = None,
    keep: Keep = None,
    host: HostName = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="Write the table there, too.")] = None,
    as_json: Json = False,
) -> None:
    """Measure the loss of each group at each width. Run again, it goes on where it was."""
    from deploypipe import pipeline
    from deploypipe.worth import curves

    request = pipeline.Request(
        model, weights, data, target or "cpu", algo, metric="latency" if target or host or threads else "macs", seed=seed,
        options=parse_settings(settings or ()), threads=threads, keep=tuple(keep or ()), host=host,
    )  # fmt: skip
    if out is not None:
        curves.require_place(out)
    with console.progress() as reporter:
        found = pipeline.sensitivity(request, reporter)
    if out is not None:
        found.save_csv(out)
    if as_json:
        console.answer_json(found.to_json())
        return
    console.table(curves.COLUMNS, curves.rows(found))
    console.answer("")
    console.pairs(curves.pairs(found))
