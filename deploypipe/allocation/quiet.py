"""Keep a library's own messages out of the program's answer."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Let what native code writes to stdout go to stderr: the solver prints there on some instances, whatever it is told."""
    sys.stdout.flush()
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(answer, 1)
        os.close(answer)
