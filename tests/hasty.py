"""Measuring in haste: tests run beside each other, so that no moment is quiet, and none of them judges what was measured."""

from deploypipe.backends import scripted
from deploypipe.pipeline import stages
from deploypipe.profiler import bench, context
from deploypipe.targets import MeasureSpec


def hasten() -> None:
    """Wait for no quiet moment, take fast models less often, doubtful times again only once, and models but once."""
    scripted._ATTEMPTS = 1
    MeasureSpec.__init__.__defaults__ = (*MeasureSpec.__init__.__defaults__[:-1], 100.0)
    bench.Bench.kernels.__defaults__ = (1,)
    context._SITTINGS, context._AGAIN = 1, 0
    stages._SITTINGS = 1
