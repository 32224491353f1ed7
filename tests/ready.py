"""Processes that start with the heavy imports done: they are forked from a server that has them."""

import multiprocessing

READY = multiprocessing.get_context("forkserver")
READY.set_forkserver_preload(
    ["torch", "torchvision", "onnx", "onnxscript", "torch.onnx._internal.exporter._core", "deploypipe.pipeline"]
)
