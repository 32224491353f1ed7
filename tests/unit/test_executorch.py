"""ExecuTorch: jobs and what is read from them, without the runtime; and one real build where it is installed."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe import checkup
from deploypipe.backends import stopwatch
from deploypipe.backends.base import KernelTime
from deploypipe.backends.executorch import ExecuTorch
from deploypipe.errors import BackendError, TargetError
from deploypipe.export import export_program
from deploypipe.job import PYTHON, Job, JobResult
from deploypipe.runners.local import Local
from deploypipe.targets import Reach, load_target

BACKEND, TARGET = ExecuTorch(), load_target("executorch")


class Pool:
    """Stands in for the runtime's bindings: a pool of threads, and modules that it loads."""

    def __init__(self, most=8):
        self.most, self.threads, self.loaded = most, 4, []

    def _threadpool_get_thread_count(self):
        return self.threads

    def _unsafe_reset_threadpool(self, threads):
        self.threads = min(threads, self.most)

    def _load_for_executorch(self, path, enable_etdump):
        self.loaded.append((path, enable_etdump))
        return "module"


@pytest.fixture
def script(monkeypatch):
    """The measuring script as a target imports it, with stand-ins for the runtime's own modules."""
    modules = {name: ModuleType(name) for name in ("executorch", "executorch.extension", "executorch.extension.pybindings")}
    modules["executorch.extension.pybindings"]._C = Pool()
    for name, module in ({"stopwatch": stopwatch} | modules).items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("et_measure", Path(stopwatch.__file__).with_name(BACKEND.script))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "et_measure", module)  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def request_of(job):
    return json.loads(job.push["request.json"])


def answered(tmp_path, **state):
    (tmp_path / "answer.json").write_text(json.dumps(state))
    return JobResult(0, "", "", {"answer.json": tmp_path / "answer.json"}, 0.1)


# ---- jobs


def test_a_job_is_the_script_with_its_request_and_nothing_of_this_package(tmp_path):
    model = tmp_path / "m.pt2"
    model.write_bytes(b"program")
    job = BACKEND.build_job(model, TARGET.replace(threads=2))
    assert job.argv == (PYTHON, "et_measure.py", "request.json")
    assert {"et_measure.py", "stopwatch.py", "request.json"} < set(job.push)
    assert job.pull == ("answer.json", "artifact.pte")
    request = request_of(job)
    assert job.push[request["model"]] == model
    assert (request["task"], request["threads"], request["artifact"]) == ("build", 2, "artifact.pte")
    assert request["tolerance"] == BACKEND.tolerance == 1e-4, "the script checks what it built by the same tolerance"
    assert b"deploypipe" not in job.push["et_measure.py"].replace(b"nothing of deploypipe", b"")


def test_programs_are_pushed_under_names_of_their_own(tmp_path):
    paths = {name: tmp_path / f"{name}.pt2" for name in ("dense", "pruned")}
    job = BACKEND.profile_job(paths, TARGET)
    files = request_of(job)["models"]
    assert list(files) == ["dense", "pruned"]
    assert {files[name]: path for name, path in paths.items()}.items() <= job.push.items()
    assert all(file.endswith(".pt2") for file in files.values())


def test_what_the_backend_says_of_itself():
    assert (BACKEND.source, BACKEND.pricing, BACKEND.suffix, BACKEND.two_four) == ("program", "models", ".pte", False)
    with pytest.raises(TargetError, match="backend executorch has no precision 'fp16'"):
        BACKEND.build_job(Path("m.pt2"), TARGET.replace(precision="fp16"))
    with pytest.raises(TargetError, match="no bundle"):
        BACKEND.owner_job({}, TARGET)


def test_kernels_are_read_in_order_and_feeds_are_not_known(tmp_path):
    rows = [["Convolution #1", "Convolution", "0.weight", 5.5, 5.0, 6.0, 36], ["between kernels", "overhead", "", 1, 1, 1, 36]]
    found = BACKEND.read_profile(answered(tmp_path, models={"m": rows}, foreign_load=0.01), {"m": b""})["m"]
    assert found.kernels[0] == KernelTime("Convolution #1", "Convolution", "0.weight", (), 5.5, 5.0, 6.0, 36)
    assert found.sum_us == 6.5
    assert found.foreign_load == 0.01
    with pytest.raises(BackendError, match="answered nonsense"):
        BACKEND.read_profile(JobResult(0, "", "", {}, 0.1), {})


# ---- the script


def test_a_module_runs_on_as_many_threads_as_were_asked_for_or_not_at_all(script):
    pool = script._C
    assert script.opened("m.pte", {"threads": 2}, events=True) == "module"
    assert (pool.threads, pool.loaded) == (2, [("m.pte", True)])
    with pytest.raises(SystemExit, match="asked for 16 threads, ExecuTorch gave 8"):
        script.opened("m.pte", {"threads": 16})


def node(name, target="aten.relu.default", op="call_function", args=()):
    return SimpleNamespace(name=name, op=op, target=target, args=args, all_input_nodes=list(args))


def test_operations_are_walked_in_the_order_of_execution_into_delegates(script):
    inner = SimpleNamespace(graph=SimpleNamespace(nodes=[node("x", op="placeholder"), node("conv"), node("relu")]))
    part = SimpleNamespace(original_module=inner)
    call = node("call", target="torch.ops.executorch_call_delegate", args=(SimpleNamespace(target="lowered_0"),))
    nodes = [node("before"), call, node("item", target="<built-in function getitem>"), node("after")]
    outer = SimpleNamespace(graph=SimpleNamespace(nodes=nodes), graph_module=SimpleNamespace(lowered_0=part))
    found = [(operation.name, owner is inner, delegated) for operation, owner, delegated in script.operations(outer)]
    assert found == [("before", False, False), ("conv", True, True), ("relu", True, True), ("after", False, False)]


def test_a_weight_is_found_behind_transpositions_and_none_where_it_is_computed(script):
    signature = SimpleNamespace(inputs_to_parameters={"p_w": "fc.weight"}, inputs_to_buffers={"b_m": "bn.mean"})
    program = SimpleNamespace(graph_signature=signature)
    parameter, other = node("p_w", op="placeholder"), node("x", op="placeholder")
    assert script.weight(node("t", args=(node("t2", args=(parameter,)),)), program) == "fc.weight"
    assert script.weight(node("b_m", op="placeholder"), program) == "bn.mean"
    assert script.weight(node("product", args=(parameter, other)), program) == ""


def event(name, us, *, delegated=True):
    return SimpleNamespace(name=name, is_delegated_op=delegated, perf_data=SimpleNamespace(raw=[value / 1000 for value in us]))


@pytest.fixture
def recorded(monkeypatch):
    """Return a module whose event file holds given events."""

    def module(*events):
        devtools = ModuleType("executorch.devtools")
        blocks = [SimpleNamespace(name="Default", events=[]), SimpleNamespace(name="Execute", events=list(events))]
        devtools.Inspector = lambda etdump_path: SimpleNamespace(event_blocks=blocks)
        monkeypatch.setitem(sys.modules, "executorch.devtools", devtools)
        return SimpleNamespace(write_etdump_result_to_file=lambda path: None)

    return module


FRAME = event("Method::execute", [100.0, 40.0, 44.0], delegated=False)
CONV, RELU = event("Convolution (NHWC, F32) IGEMM #1", [99, 10, 10]), event("Clamp (NC) #1", [99, 2, 2])
LINEAR = event("native_call_addmm.out", [99.0, 20.25, 20.75], delegated=False)


def test_kernels_get_their_weights_by_order_and_the_rest_is_overhead(script, recorded):
    rows = script.kernels(recorded(FRAME, CONV, RELU, LINEAR), [1, 2], ["0.weight", "2.weight"])
    assert [(row[0], row[2]) for row in rows] == [
        ("Convolution (NHWC, F32) IGEMM #1", "0.weight"), ("Clamp (NC) #1", ""), ("native_call_addmm.out", "2.weight"),
        ("between kernels", ""),
    ]  # fmt: skip
    conv, relu, linear, rest = (row[3] for row in rows)
    assert (conv, relu, linear) == (10.5, 2.5, 20.5), "XNNPACK cuts microseconds off: their middle; others are exact"
    assert rest == pytest.approx(42 - conv - relu - linear)
    assert rows[0][1] == "Convolution (NHWC, F32) IGEMM"
    assert {row[6] for row in rows} == {2}, "runs that warm up do not count"


def test_more_or_fewer_kernels_than_layers_cannot_be_told_apart(script, recorded):
    with pytest.raises(SystemExit, match="more kernels of layers than the 1 layers"):
        script.kernels(recorded(FRAME, CONV, LINEAR), [1, 2], ["0.weight"])
    with pytest.raises(SystemExit, match="no kernels for 1 of 3 layers"):
        script.kernels(recorded(FRAME, CONV, LINEAR), [1, 2], ["0.weight", "2.weight", "4.weight"])
    rows = script.kernels(recorded(FRAME, CONV), [1, 2], [])
    assert rows[0][2] == "", "a file that was built before: no names, no complaint"


def test_what_is_left_to_portable_kernels_is_named(script):
    assert script.delegated(script.Lowered(b"", [], 4, [])) == "XNNPACK computes 4 of 4 operations (100%)"
    some = script.Lowered(b"", [], 3, ["aten.topk.default", "aten.topk.default"])
    assert script.delegated(some) == "XNNPACK computes 3 of 5 operations (60%); portable kernels compute aten.topk.default"


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ([torch.ones(2), torch.ones(2)], "has 2 outputs, the program 1"),
        ([torch.tensor([1.0, 1.01])], r"relative error 1\.0e-02"),
        ([torch.tensor([1.0, np.nan])], "relative error nan"),
    ],
)
def test_a_converter_s_success_is_not_believed(script, monkeypatch, tmp_path, outputs, said):
    monkeypatch.setattr(script, "lowered", lambda path: script.Lowered(b"pte", ["w"], 1, []))
    monkeypatch.setattr(script, "opened", lambda path, request: SimpleNamespace(forward=lambda inputs: outputs))
    monkeypatch.setattr(script, "feed", lambda module: [])
    monkeypatch.setattr(script, "program", lambda path: lambda: torch.ones(2))
    request = {"model": "m.pt2", "artifact": str(tmp_path / "a.pte"), "tolerance": 1e-4, "threads": 1}
    with pytest.raises(SystemExit, match=said):
        script.build(request)
    outputs[:] = [torch.ones(2)]
    assert script.build(request) == {"bytes": 3, "notes": ["XNNPACK computes 1 of 1 operations (100%)"]}


# ---- for real


@pytest.mark.slow
@pytest.mark.skipif(not BACKEND.available()[0], reason="an optional runtime: pip install executorch")
def test_a_small_model_is_built_and_its_delegation_told(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    path = export_program(model, (torch.zeros(1, 3, 8, 8),), tmp_path / "m.pt2")
    result = Local(Reach()).run(BACKEND.build_job(path, TARGET), tmp_path / "built")
    (note,) = BACKEND.read_build(result)
    assert note == "XNNPACK computes 2 of 2 operations (100%)"
    assert result.pulled["artifact.pte"].stat().st_size > 8 * 27 * 4


def test_the_doctor_times_a_program(tmp_path, monkeypatch):
    """What it is given is what it compiles, not ONNX."""
    given = []
    monkeypatch.setattr(ExecuTorch, "bench_job", lambda self, models, target: given.append(*models.values()) or Job(("true",)))
    monkeypatch.setattr(ExecuTorch, "read_bench", lambda self, result: {"smallest": SimpleNamespace(median_us=1.0)})
    seen = []
    runner = SimpleNamespace(run=lambda job, into: seen.append(torch.export.load(given[0])))
    assert "four operations" in checkup._Examination(TARGET, BACKEND, runner)._measure()
    assert len([node for node in seen[0].graph.nodes if node.op == "call_function"]) == 4
