"""Pruning algorithms by name; importing this needs no torch."""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from deploypipe.algorithms.catalogue import SCORERS
from deploypipe.algorithms.catalogue_learners import LEARNERS
from deploypipe.algorithms.catalogue_procedures import PROCEDURES
from deploypipe.algorithms.info import Info
from deploypipe.algorithms.options import options_of, parse_options
from deploypipe.plugins import known, resolve

ENTRY_POINTS = "deploypipe.algorithms"
AUTO = "auto"  # no method: what the pipeline makes of it is in `pipeline.recipe`

ALGORITHMS: dict[str, str] = {
    "admm": "deploypipe.algorithms.admm:Admm",
    "autocompress": "deploypipe.algorithms.autocompress:AutoCompress",
    "autoslim": "deploypipe.algorithms.autoslim:AutoSlim",
    "dcff": "deploypipe.algorithms.dcff:Dcff",
    "dcp": "deploypipe.algorithms.dcp:Dcp",
    "depgraph": "deploypipe.algorithms.depgraph:DepGraph",
    "dkp": "deploypipe.algorithms.dkp:Dkp",
    "erk": "deploypipe.algorithms.erk:Erk",
    "fpgm": "deploypipe.algorithms.fpgm:Fpgm",
    "halp": "deploypipe.algorithms.halp:Halp",
    "l1": "deploypipe.algorithms.l1:L1",
    "l2": "deploypipe.algorithms.l2:L2",
    "lamp": "deploypipe.algorithms.lamp:Lamp",
    "lth": "deploypipe.algorithms.lth:Lth",
    "netadapt": "deploypipe.algorithms.netadapt:NetAdapt",
    "random": "deploypipe.algorithms.random:Random",
    "random-search": "deploypipe.algorithms.random_search:RandomSearch",
    "scp": "deploypipe.algorithms.scp:Scp",
    "scratch-b": "deploypipe.algorithms.scratch:ScratchB",
    "scratch-e": "deploypipe.algorithms.scratch:ScratchE",
    "slimming": "deploypipe.algorithms.slimming:Slimming",
    "smcp": "deploypipe.algorithms.smcp:Smcp",
    "taylor": "deploypipe.algorithms.taylor:Taylor",
    "thinet": "deploypipe.algorithms.thinet:ThiNet",
}


INFO: dict[str, Info] = dict(sorted((SCORERS | LEARNERS | PROCEDURES).items()))


def algorithms() -> dict[str, dict[str, Any]]:
    """Return what is known about every algorithm, our own and installed ones, as plain values by name."""
    own = {name: asdict(info) for name, info in INFO.items()}
    return {name: own.get(name, {"name": name, "plugin": place}) for name, place in known(ALGORITHMS, ENTRY_POINTS).items()}


def explain(name: str) -> dict[str, Any]:
    """Return what is known about one algorithm, what its file says of it, and a command to try it with. Imports its file.

    Raises:
        UsageError: There is no such algorithm.
    """
    algorithm = resolve(name, ALGORITHMS, ENTRY_POINTS, what="algo", also=(AUTO,))
    options = options_of(algorithm)
    record = {"name": name, **algorithms()[name], "options": [asdict(option) for option in options]}
    setting = f" --set {options[0].name.rstrip('_')}={options[0].default}" if options else ""
    metric = " --metric macs" if getattr(algorithm, "sparse", False) is True else ""
    about = inspect.getdoc(sys.modules[algorithm.__module__]) or ""
    return record | {
        "does": inspect.getdoc(algorithm) or "",
        "about": about,
        "example": f"deploypipe build --algo {name} --budget 50%{metric}{setting}",
    }


def make(name: str, options: Mapping[str, object] | None = None) -> Any:
    """Return the algorithm called `name` with these options, given as text or as values.

    Raises:
        UsageError: There is no such algorithm or option, or a value has another type or is out of range.

    >>> make("l1", {"greedy": "yes"})
    L1(greedy=True)
    """
    algorithm = resolve(name, ALGORITHMS, ENTRY_POINTS, what="algo", also=(AUTO,))
    return algorithm(**parse_options(name, options or {}, options_of(algorithm)))
