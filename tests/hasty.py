"""Measuring in haste: tests run beside each other, so that no moment is quiet, and none of them judges what was measured."""

from deploypipe.backends import scripted
from deploypipe.profiler import bench


def hasten() -> None:
    """Wait for no quiet moment, take fast models less often, and doubtful times again only once."""
    scripted._ATTEMPTS = 1
    scripted._LEAST_US = 100.0
    bench.Bench.kernels.__defaults__ = (1,)
