"""Facts that stand on top of every result file: machine, versions, command, date."""

import os
import platform
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from deploypipe.doctor import versions


def _named(argument: str) -> str:
    """Leave out the folders of a path: they are nobody else's."""
    return re.sub(r"(^|(?<=:))/(?:[^/]+/)*", "", argument)


def describe(more: Mapping[str, object] | None = None) -> dict[str, object]:
    """Return the facts, with `more` of them at the end."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_named, sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": " ".join(f"{name}=={version}" for name, version in versions().items()),
        **(more or {}),
    }
