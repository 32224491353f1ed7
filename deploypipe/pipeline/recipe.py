"""`--algo auto`: what kept the most accuracy at equal milliseconds; docs/decisions/0017 says why."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from deploypipe.errors import UsageError
from deploypipe.pipeline.request import AUTO, Request


@dataclass(frozen=True)
class Recipe:
    """The fields of a request that `auto` stands for.

    Attributes:
        algo: Says which channels of a group go first.
        options: Of that method.
        value: What says how many.
        value_rounds: See `Request`.
        value_steps: See `Request`.
        value_finalists: See `Request`.
    """

    algo: str = "depgraph"
    options: Mapping[str, Any] = field(default_factory=lambda: {"train_epochs": 0, "steps": 1})
    value: str = "measured"
    value_rounds: int = 2
    value_steps: int = 0
    value_finalists: int = 1


def resolved(request: Request) -> Request:
    """Return the request with the recipe's fields in place of "auto"; any other stays as it is.

    Rounds, steps and finalists that the user asks for count.

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
    recipe = {name: value for name, value in asdict(Recipe()).items() if name in _DECIDES or not _is_set(request, name)}
    return replace(request, **recipe, out=request.folder)


_DECIDES = ("algo", "options", "value")


def _is_set(request: Request, name: str) -> bool:
    """Say whether the user asked for something else than the default."""
    return bool(getattr(request, name) != Request.__dataclass_fields__[name].default)
