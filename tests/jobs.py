"""What the tests of devices share: a job that is a line of shell, and patience."""

import time
from collections.abc import Callable
from typing import Any

from deploypipe.job import Job


def shell(code: str, **options: Any) -> Job:
    return Job(("sh", "-c", code), **options)


def soon(condition: Callable[[], Any], seconds: float = 30.0) -> bool:
    """Say whether the condition comes true within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False
