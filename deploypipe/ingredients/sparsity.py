"""Zeros inside the weights of a model of full size: where they are, and what a runtime that skips them would save."""

from collections.abc import Callable

from torch import nn

from deploypipe.count import layer_macs, macs
from deploypipe.reports.pattern import SparseLayer
from deploypipe.types import Graph


def sparse_layers(model: nn.Module, graph: Graph) -> tuple[SparseLayer, ...]:
    """Return for every layer call its weights, how many of them are zero, and its dense multiply-accumulates.

    Args:
        model: Of the architecture that was traced.
        graph: Its channel graph.
    """
    named, dense = dict(model.named_parameters()), graph.kept()
    return tuple(
        SparseLayer(layer.weight, named[layer.weight].numel(), int((named[layer.weight] == 0).sum()), layer_macs(layer, dense))
        for layer in graph.layers
        if layer.weight in named
    )


def nonzero_params(model: nn.Module, graph: Graph) -> float:
    """Return the number of trainable parameters that are not zero; of vectors, such as biases, all count."""
    return float(sum(int((p != 0).sum()) if p.dim() >= 2 else p.numel() for p in model.parameters()))


def nonzero_macs(model: nn.Module, graph: Graph) -> float:
    """Return the multiply-accumulates of one forward pass of the traced example, those with a zero weight left out.

    A weight is used equally often as every other of its layer, so that a layer's share of zeros is its share of saved work.
    Layers whose weights are no parameters are counted whole.
    """
    return macs(graph) - sum(layer.n_macs * layer.n_zeros / layer.n_weights for layer in sparse_layers(model, graph))


NONZERO: dict[str, Callable[[nn.Module, Graph], float]] = {"MACs": nonzero_macs, "params": nonzero_params}
"""Unit of the cost table -> what a budget counts for methods that leave zeros in a model of full size."""
