"""`--algo auto`: what kept the most accuracy at equal milliseconds; docs/decisions/0017 says why."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from deploypipe.algorithms import AUTO
from deploypipe.errors import UsageError
from deploypipe.pipeline.request import Request


@dataclass(frozen=True)
class Recipe:
    """The fields of a request that `auto` stands for.

    Attributes:
        algo: Says which channels of a group go first.
        options: Of that method.
        value: What says how many.
    """

    algo: str = "depgraph"
    options: Mapping[str, Any] = field(default_factory=lambda: {"train_epochs": 0, "steps": 1})
    value: str = "taylor"

    @property
    def command(self) -> str:
        """The same in words of the command line."""
        settings = [f"--set {name}={value}" for name, value in self.options.items()]
        return " ".join([f"deploypipe build --algo {self.algo}", *settings, f"--value {self.value}"])


def resolved(request: Request) -> Request:
    """Return the request with the recipe's fields in place of "auto"; any other stays as it is.

    What the user says of widths counts more than the recipe.

    Raises:
        UsageError: The recipe was given options: it is not one method.
    """
    if request.algo != AUTO:
        return request
    if request.options:
        option = next(iter(request.options))
        raise UsageError(
            f"'auto' is a recipe and has no option '{option}'",
            at=f"--set {option}",
            fix="name a method with --algo; `deploypipe algos` lists them",
        )
    recipe = asdict(Recipe())
    if request.value:
        del recipe["value"]  # the user knows better
    return replace(request, **recipe, recipe=AUTO, out=request.folder)
