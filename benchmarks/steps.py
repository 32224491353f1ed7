"""What long benchmarks are made of: steps whose results are kept, so that they go on where they stopped; timing in turns."""

import fcntl
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploypipe.pipeline.stages import Device


def once(path: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is in the file, or make it and write it."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(make(), indent=1) + "\n"
        path.with_suffix(".tmp").write_text(text)
        path.with_suffix(".tmp").replace(path)
    return dict(json.loads(path.read_text()))


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Say whether this process may work on a row; another one that runs beside it may be there already."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def timed(device: Device, models: Mapping[str, Path]) -> dict[str, float]:
    """Return the latencies (us) of all models, measured in turns by several processes."""
    with tempfile.TemporaryDirectory() as folder:
        built = {name: Path(folder) / f"{i}{device.backend.suffix}" for i, name in enumerate(models)}
        for name, path in models.items():
            device.build(path, built[name])
        return {name: timing["median_us"] for name, timing in device.bench(built).items()}
