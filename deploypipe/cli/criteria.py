"""`deploypipe criteria`: which scores of channels rank alike, and which can tell channels apart."""

from typing import Annotated

import typer

from deploypipe.cli import console
from deploypipe.cli.build import Json, Keep, Model, Weights


def criteria(
    model: Model = "demo",
    weights: Weights = None,
    data: Annotated[str, typer.Option(help="demo, imagefolder:DIR, cifar10:DIR or file.py:factory.")] = "demo",
    images: Annotated[int, typer.Option(min=2, help="Training images for activations and gradients.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Decides which training images.")] = 0,
    keep: Keep = None,
    as_json: Json = False,
) -> None:
    """Compare all scores on a model, and recommend which to try."""
    from deploypipe import pipeline
    from deploypipe.worth import criteria as analysis

    request = pipeline.Request(model, weights, data, metric="macs", seed=seed, keep=tuple(keep or ()))
    with console.progress() as reporter:
        found = pipeline.criteria(request, reporter, images)
    if as_json:
        console.answer_json(found.to_json())
        return
    console.table(analysis.SPREADS, analysis.spread_rows(found))
    console.answer("")
    console.table(analysis.SIMILARITY, analysis.similarity_rows(found))
    console.answer("")
    console.pairs(analysis.remarks(found))
