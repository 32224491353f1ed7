"""Verification: a stage's outputs against those of the stage before, on real inputs, with a stated tolerance."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploypipe.errors import BackendError
from deploypipe.graph.outputs import copied, output_tensors
from deploypipe.reports.report import Check

Arrays = Mapping[str, NDArray[np.generic]]


def check(
    stage: str, against: str, reference: Sequence[NDArray[np.generic]], found: Sequence[NDArray[np.generic]], tolerance: float
) -> Check:
    """Compare outputs; the first axis of every array counts the inputs.

    The error is the largest absolute difference over all outputs and inputs, each output relative to its own largest finite
    reference value. Different shapes or values that are no numbers give an infinite error; equal infinities do not differ.
    """
    worst = 0.0
    n_inputs = len(reference[0]) if reference else 0
    if [a.shape for a in reference] != [b.shape for b in found]:
        return Check(stage, against, float("inf"), tolerance, n_inputs)
    for a, b in zip(reference, found, strict=True):
        if a.size:
            size = np.abs(a.astype(np.float64))
            scale = max(float(np.where(np.isinf(size), 0.0, size).max()), 1e-12)
            with np.errstate(invalid="ignore"):  # of equal infinities, which do not differ
                apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
            error = float(np.where(a == b, 0.0, apart).max()) / scale
            worst = max(worst, error if np.isfinite(error) else float("inf"))
    return Check(stage, against, worst, tolerance, n_inputs)


def require(result: Check, fix: str) -> Check:
    """Return the check, or stop the run if it failed.

    Raises:
        BackendError: The error exceeds the tolerance.
    """
    if not result.passed:
        raise BackendError(
            f"'{result.stage}' does not compute what '{result.against}' computes: relative error {result.error:.1e}, "
            f"tolerance {result.tolerance:.0e}",
            at=f"verification on {result.n_inputs} inputs",
            fix=fix,
        )
    return result


def outputs_of(model: nn.Module, inputs: Sequence[Sequence[torch.Tensor]]) -> list[NDArray[np.generic]]:
    """Run a torch model on several inputs (each a tuple of arguments); return its flattened outputs, stacked over them."""
    model.eval()
    with torch.inference_mode():
        rows = [[leaf.numpy() for leaf in output_tensors(model(*copied(args)))] for args in inputs]
    return [np.stack(column) for column in zip(*rows, strict=True)]
