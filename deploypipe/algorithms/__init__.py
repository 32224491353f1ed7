"""Pruning algorithms by name; importing this needs no torch."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from deploypipe.algorithms.catalogue import SCORERS
from deploypipe.algorithms.catalogue_learners import LEARNERS
from deploypipe.algorithms.info import Info
from deploypipe.algorithms.options import options_of, parse_options
from deploypipe.plugins import known, resolve

ENTRY_POINTS = "deploypipe.algorithms"

ALGORITHMS: dict[str, str] = {
    "erk": "deploypipe.algorithms.erk:Erk",
    "halp": "deploypipe.algorithms.halp:Halp",
    "l1": "deploypipe.algorithms.l1:L1",
    "l2": "deploypipe.algorithms.l2:L2",
    "lamp": "deploypipe.algorithms.lamp:Lamp",
    "netadapt": "deploypipe.algorithms.netadapt:NetAdapt",
    "random": "deploypipe.algorithms.random:Random",
    "thinet": "deploypipe.algorithms.thinet:ThiNet",
}


INFO: dict[str, Info] = dict(sorted((SCORERS | LEARNERS).items()))


def algorithms() -> dict[str, dict[str, Any]]:
    """Return what is known about every algorithm, our own and installed ones, as plain values by name."""
    own = {name: asdict(info) for name, info in INFO.items()}
    return {name: own.get(name, {"name": name, "plugin": place}) for name, place in known(ALGORITHMS, ENTRY_POINTS).items()}


def make(name: str, options: Mapping[str, object] | None = None) -> Any:
    """Return the algorithm called `name` with these options, given as text or as values.

    Raises:
        UsageError: There is no such algorithm or option, or a value has another type or is out of range.

    >>> make("l1", {"greedy": "yes"})
    L1(greedy=True)
    """
    algorithm = resolve(name, ALGORITHMS, ENTRY_POINTS, what="algo")
    return algorithm(**parse_options(name, options or {}, options_of(algorithm)))
