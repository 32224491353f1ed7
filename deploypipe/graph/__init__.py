"""Channel graph: which channels of a model are tied together, found in one forward pass."""

from deploypipe.graph.trace import trace

__all__ = ["trace"]
