"""Build, time, profile or run models with ExecuTorch and XNNPACK: runs alone, with only Python, NumPy, torch and ExecuTorch.

    python3 et_measure.py request.json      # writes answer.json beside it

It is pushed to the target with `stopwatch.py` beside it, so it imports nothing of deploypipe. Models are exported programs
(what `torch.export.save` wrote) or built `.pte` files.
"""

from __future__ import annotations

import statistics
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import stopwatch
import torch
from executorch.extension.pybindings import _C  # what `portable_lib` is made of, without the whole compiler

# Operation of the lowered graph -> which operand is the weight.
WEIGHTED = {"aten.convolution.default": 1, "aten.linear.default": 1, "aten.addmm.default": 2, "aten.mm.default": 1}
DELEGATE = "executorch_call_delegate"
# How events of layers begin, in XNNPACK and outside.
LAYER_EVENTS = ("Convolution", "Deconvolution", "Fully Connected", "Batch Matrix Multiply", "native_call_convolution",
                "native_call_linear", "native_call_addmm", "native_call_mm")  # fmt: skip
WHOLE = "Method::execute"


@dataclass(frozen=True)
class Lowered:
    """A program as XNNPACK takes it.

    Attributes:
        content: Of the `.pte` file.
        layers: The weight of each layer, in the order in which they run.
        n_delegated: Operations that XNNPACK computes.
        left: Operations that it leaves to portable kernels.
    """

    content: bytes
    layers: list[str]
    n_delegated: int
    left: list[str]


def lowered(path: str) -> Lowered:
    """Lower an exported program."""
    exported: Any = torch.export.load(path)  # first: a damaged file is found before seconds go into imports
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # noqa: PLC0415 - takes seconds, and a built
        XnnpackPartitioner,  # file does not need it
    )
    from executorch.exir import to_edge_transform_and_lower  # noqa: PLC0415 - likewise

    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    program = edge.exported_program()
    layers, inside, left = [], 0, []
    for node, owner, delegated in operations(program):
        name = str(getattr(node.target, "__name__", node.target))
        layers += [weight(node.args[WEIGHTED[name]], owner)] if name in WEIGHTED else []
        inside += delegated
        left += [] if delegated else [name]
    return Lowered(edge.to_executorch().buffer, layers, inside, left)


def operations(program: Any) -> Iterator[tuple[Any, Any, bool]]:
    """Yield (node, the program that holds it, whether it is delegated) in the order of execution."""
    for node in program.graph.nodes:
        if node.op != "call_function" or "getitem" in str(node.target):
            continue
        if DELEGATE in str(node.target):
            part = getattr(program.graph_module, node.args[0].target).original_module
            yield from ((inner, part, True) for inner, _, _ in operations(part))
        else:
            yield node, program, False


def weight(operand: Any, program: Any) -> str:
    """Return the name of the parameter or buffer behind an operand, transpositions and the like aside; "" if it is computed."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= getattr(signature, "inputs_to_lifted_tensor_constants", {})
    while operand.name not in names and operand.op == "call_function" and len(operand.all_input_nodes) == 1:
        operand = operand.all_input_nodes[0]
    return str(names.get(operand.name, ""))


def built(path: str) -> tuple[str, list[str]]:
    """Return a `.pte` file and the weights of its layers in order; none are known of one that was built before."""
    if not zipfile.is_zipfile(path):
        return path, []
    found = lowered(path)
    Path(path + ".pte").write_bytes(found.content)
    return path + ".pte", found.layers


def opened(path: str, request: dict[str, Any], *, events: bool = False) -> Any:
    """Load a `.pte` with the threads that the request states, and make sure that it got them."""
    if _C._threadpool_get_thread_count() != request["threads"]:
        _C._unsafe_reset_threadpool(request["threads"])
    got = _C._threadpool_get_thread_count()
    if got != request["threads"]:
        raise SystemExit(f"asked for {request['threads']} threads, ExecuTorch gave {got}")
    return _C._load_for_executorch(path, enable_etdump=events)


def feed(module: Any) -> list[Any]:
    """Make one input for each argument."""
    meta = module.method_meta("forward")
    sizes = [list(meta.input_tensor_meta(i).sizes()) for i in range(meta.num_inputs())]
    return [torch.from_numpy(stopwatch.sample_input(size, "f4")) for size in sizes]


def bench(request: dict[str, Any]) -> Any:
    """Time whole models in turns."""
    files = {name: built(path)[0] for name, path in request["models"].items()}
    cores = stopwatch.Cores(request["threads"])
    modules = {name: opened(file, request) for name, file in files.items()}
    return stopwatch.bench({name: partial(module.forward, feed(module)) for name, module in modules.items()}, cores, request)


def profile(request: dict[str, Any]) -> dict[str, Any]:
    """Time the kernels of several models in turns."""
    found = {name: built(path) for name, path in request["models"].items()}
    cores = stopwatch.Cores(request["threads"])
    wanted, per_block = stopwatch.turns_of(request)
    modules = {name: opened(file, request, events=True) for name, (file, _) in found.items()}
    calls = {name: partial(module.forward, feed(module)) for name, module in modules.items()}
    for once in calls.values():
        for _ in range(request["warmup"]):
            once()

    def turn() -> None:
        for once in calls.values():
            for _ in range(stopwatch.REWARM + per_block):
                once()

    chosen, load = stopwatch.quiet_turns(turn, cores, request, wanted)
    starts = [request["warmup"] + i * (stopwatch.REWARM + per_block) + stopwatch.REWARM for i in chosen]
    counted = [start + j for start in starts for j in range(per_block)]
    rows = {name: kernels(module, counted, found[name][1]) for name, module in modules.items()}
    return {"models": rows, "foreign_load": load}


def kernels(module: Any, counted: list[int], layers: list[str]) -> list[list[Any]]:
    """Read the events: [name, operation, weight, median, p10, p90, runs] in the order of execution, and what is left over."""
    from executorch.devtools import Inspector  # noqa: PLC0415 - takes seconds, and only a profile needs it

    module.write_etdump_result_to_file("events.etdp")
    block = next(block for block in Inspector(etdump_path="events.etdp").event_blocks if block.name == "Execute")
    rows, left = [], list(layers)
    whole = 0.0
    for event in block.events:
        us = [1000 * event.perf_data.raw[i] for i in counted]
        if event.name == WHOLE:
            whole = statistics.median(us)
        if not event.is_delegated_op and not event.name.startswith("native_call_"):
            continue  # the frame around others
        # XNNPACK cuts durations down to whole microseconds: the middle of that microsecond is the fair value.
        values = [round(value) + 0.5 for value in us] if event.is_delegated_op else us
        median = statistics.median_grouped(values, 1) if event.is_delegated_op else statistics.median(values)
        is_layer = event.name.startswith(LAYER_EVENTS)
        if is_layer and layers and not left:
            raise SystemExit(f"ExecuTorch ran more kernels of layers than the {len(layers)} layers of the program")
        name = left.pop(0) if is_layer and left else ""
        p10, p90 = np.percentile(values, [10, 90])
        rows.append([event.name, event.name.split(" #")[0], name, median, float(p10), float(p90), len(values)])
    if left:
        raise SystemExit(f"ExecuTorch ran no kernels for {len(left)} of {len(layers)} layers: cannot tell which is which")
    rest = max(0.0, whole - sum(row[3] for row in rows))
    return [*rows, ["between kernels", "overhead", "", rest, rest, rest, len(counted)]]


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Lower, then load and run the result beside the program: a converter's success proves nothing."""
    found = lowered(request["model"])
    Path(request["artifact"]).write_bytes(found.content)
    made = opened(request["artifact"], request)
    inputs = feed(made)
    wanted, got = tensors(program(request["model"])(*inputs)), made.forward(inputs)
    if len(wanted) != len(got):
        raise SystemExit(f"the built file has {len(got)} outputs, the program {len(wanted)}")
    for expected, value in zip(wanted, got):
        error = float((expected - value).abs().max() / expected.abs().max().clamp(min=1e-12))
        if not error <= request["tolerance"]:
            raise SystemExit(f"the built file does not compute what the program computes: relative error {error:.1e}")
    return {"bytes": len(found.content), "notes": [delegated(found)]}


def delegated(found: Lowered) -> str:
    """Say how much of the program XNNPACK computes."""
    n = found.n_delegated + len(found.left)
    rest = f"; portable kernels compute {', '.join(sorted(set(found.left)))}" if found.left else ""
    return f"XNNPACK computes {found.n_delegated} of {n} operations ({found.n_delegated / n:.0%}){rest}"


def run(request: dict[str, Any]) -> Any:
    """Run a model on several inputs: a program by torch, a built file by ExecuTorch."""
    if zipfile.is_zipfile(request["model"]):
        exported = program(request["model"])
        call: Callable[[list[Any]], list[Any]] = lambda given: tensors(exported(*given))  # noqa: E731
    else:
        call = opened(request["model"], request).forward
    with np.load(request["inputs"]) as arrays:
        first = {name: torch.from_numpy(arrays[name][0]) for name in stopwatch.in_order(arrays.files)}
    n = len(call(list(first.values())))
    names = ["output"] if n == 1 else [f"output_{i}" for i in range(n)]  # as they are called in the exported model

    def compute(inputs: dict[str, Any]) -> list[Any]:
        return [value.numpy() for value in call([torch.from_numpy(inputs[name]) for name in first])]

    return stopwatch.run_all(names, compute, request)


def program(path: str) -> Any:
    """Return what an exported program computes, as torch computes it."""
    loaded: Any = torch.export.load(path)
    return loaded.module()


def tensors(value: Any) -> list[Any]:
    """Return the tensors in what a model returned, in order."""
    leaves: list[Any] = torch.utils._pytree.tree_leaves(value)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """Say which runtime this is, on which device."""
    return {"runtime": "executorch", "version": version("executorch"), "torch": torch.__version__, **stopwatch.device(request)}


if __name__ == "__main__":
    stopwatch.answer({"bench": bench, "profile": profile, "build": build, "run": run, "describe": describe})
