"""What is known about the algorithms that train before they choose."""

from deploypipe.algorithms.info import Info

LEARNERS: dict[str, Info] = {}
