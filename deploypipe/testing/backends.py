"""Contracts that a plug-in must keep, for the tests of whoever writes one: ours run them, and so can yours.

    import pytest
    from deploypipe.targets import load_target
    from deploypipe.testing.backends import BACKEND_CONTRACTS, BackendCase

    @pytest.fixture(scope="module")
    def case(tmp_path_factory):
        return BackendCase(load_target("targets/mine.toml"), tmp_path_factory.mktemp("mine"))

    @pytest.mark.parametrize("name", BACKEND_CONTRACTS)
    def test_backend(case, name):
        BACKEND_CONTRACTS[name](case)

A contract that is broken raises AssertionError and says what was expected. Nothing here needs pytest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from deploypipe.backends import load_backend
from deploypipe.backends.base import Backend, Facts, Pricing, Source, Timing
from deploypipe.errors import DeployPipeError
from deploypipe.job import Job, JobResult
from deploypipe.profiler.bench import opened
from deploypipe.profiler.export import exported
from deploypipe.runners import load_runner
from deploypipe.targets import Target

# ---- backends ----------------------------------------------------------------------------------------------------------


class _Small(nn.Module):
    """Two convolutions beside a shortcut; compilers may run the shortcut in between, and all three write the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shortcut = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1)
        self.first, self.heavy = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, 4)."""
        x = torch.relu(self.stem(x))
        x = torch.relu(self.heavy(torch.relu(self.first(x))) + self.shortcut(x))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


@dataclass(frozen=True)
class BackendCase:
    """One backend and a small model for it, exported and built once.

    Attributes:
        target: Names the backend, and where its jobs run. Must be reachable, with the runtime installed.
        folder: An empty folder.
    """

    target: Target
    folder: Path

    @cached_property
    def quick(self) -> Target:
        """The target with few runs."""
        return self.target.replace(runs=12, warmup=2)

    @cached_property
    def backend(self) -> Backend:
        """The backend."""
        return load_backend(self.target)

    @cached_property
    def model(self) -> nn.Module:
        """A small residual network; its weights are always the same."""
        random, model = torch.Generator().manual_seed(0), _Small()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2, generator=random)
        return model.eval()

    @cached_property
    def inputs(self) -> Tensor:
        """(2, 1, 3, 24, 24): two inputs of one image each."""
        return torch.randn(2, 1, 3, 24, 24, generator=torch.Generator().manual_seed(1))

    @cached_property
    def exported(self) -> Path:
        """What the backend compiles from."""
        return exported(self.model, self.inputs[0], self.target, self.folder)

    @cached_property
    def built(self) -> Path:
        """The built file."""
        result = self.run(self.backend.build_job(self.exported, self.target))
        made = result.pulled["artifact" + self.backend.suffix]
        return made.replace(made.with_name("built" + self.backend.suffix))

    @cached_property
    def facts(self) -> Facts:
        """What the backend says of the device."""
        return self.backend.read_description(self.run(self.backend.describe_job(self.target)))

    @cached_property
    def runs(self) -> bool:
        """Whether built files can be run."""
        return self.backend.pricing != "never"

    def run(self, job: Job) -> JobResult:
        """Carry out a job where the target says."""
        return load_runner(self.target).run(job, self.folder / "pulled")

    def outputs(self, file: Path) -> list[np.ndarray]:
        """Run a file on both inputs."""
        job = self.backend.run_job(file, {"input": self.inputs.numpy()}, self.target)
        return list(self.backend.read_run(self.run(job)).values())

    def times(self, files: Mapping[str, Path | bytes]) -> dict[str, Timing]:
        """Time files in turns."""
        return self.backend.read_bench(self.run(self.backend.bench_job(files, self.quick)))


def says_what_it_is(case: BackendCase) -> None:
    """Facts about a backend are there and of their kind; it is available, or says how to install it."""
    backend = case.backend
    assert backend.name == case.target.build.backend, f"it calls itself '{backend.name}'"
    assert backend.suffix.startswith("."), "a suffix begins with a dot"
    assert backend.source in get_args(Source), f"source is one of {get_args(Source)}"
    assert backend.pricing in get_args(Pricing), f"pricing is one of {get_args(Pricing)}"
    assert backend.two_four in {True, False}, "two_four says whether it has kernels for 2:4 weights"
    assert 0 < backend.tolerance <= 1e-2, "a tolerance above 1e-2 proves nothing"
    ready, missing = backend.available()
    assert ready or missing, "a backend that is not available says what is missing"


def describes_jobs(case: BackendCase) -> None:
    """Jobs are plain descriptions: text, file names without folders, a time limit."""
    backend = case.backend
    jobs = [backend.describe_job(case.target), backend.build_job(case.exported, case.target)]
    jobs += [backend.bench_job({"m": case.exported}, case.target)] if case.runs else []
    for job in jobs:
        assert all(isinstance(part, str) for part in job.argv), "argv is text"
        assert not [name for name in (*job.push, *job.pull) if "/" in name], "everything lies in the job's own folder"
        assert job.timeout_s > 0, "a job has a time limit"


def names_runtime_and_version(case: BackendCase) -> None:
    """Without these two facts latency tables of different runtimes would be mixed."""
    for name in ("runtime", "version", "arch", "cpu", "threads"):
        assert case.facts.get(name), f"the description lacks '{name}'"


def refuses_other_precisions(case: BackendCase) -> None:
    """A precision that the backend does not have is refused before any job, never replaced by another."""
    assert _refused(lambda: case.backend.build_job(case.exported, case.target.replace(precision="fp23"))), "fp23 was accepted"


def builds_what_torch_computes(case: BackendCase) -> None:
    """The exported model and the built file compute what the module computes, within the tolerance; or running is refused."""
    if not case.backend.computes:
        assert case.built.stat().st_size > 0, "the built file is empty"
        assert _refused(lambda: case.outputs(case.built)), "a backend that hands out no outputs must refuse to run on inputs"
        return
    wanted = np.stack([case.model(x).detach().numpy() for x in case.inputs])
    for file in [case.exported, *([case.built] if case.runs else [])]:
        outputs = case.outputs(file)
        assert [output.shape for output in outputs] == [wanted.shape], f"{file.name}: one output of shape {wanted.shape}"
        error = float(np.abs(outputs[0] - wanted).max() / np.abs(wanted).max())
        assert error <= case.backend.tolerance, f"{file.name} is off by {error:.1e}, allowed {case.backend.tolerance:.0e}"
    assert case.built.stat().st_size > 0, "the built file is empty"


def believes_no_converter(case: BackendCase) -> None:
    """A damaged model is an error, whatever the converter says; no built file is left."""
    damaged = case.folder / ("damaged" + case.exported.suffix)
    damaged.write_bytes(case.exported.read_bytes()[: case.exported.stat().st_size // 2])
    assert _refused(lambda: case.run(case.backend.build_job(damaged, case.target))), "half a model was built"


def times_whole_models(case: BackendCase) -> None:
    """Times are positive, ordered and counted, of exported models and of built files; or timing is refused."""
    if not case.runs:
        assert _refused(lambda: case.times({"m": case.built})), "a backend that cannot run must refuse to measure"
        return
    for name, timing in case.times({"exported": case.exported, "built": case.built}).items():
        assert 0 < timing.p10_us <= timing.median_us <= timing.p90_us, f"{name}: {timing}"
        assert timing.runs >= case.quick.measure.runs, f"{name}: fewer runs than asked for"
        assert (timing.foreign_load or 0.0) >= 0, f"{name}: foreign load is {timing.foreign_load}"


def times_each_layer_once(case: BackendCase) -> None:
    """Each layer of the model is one kernel of its profile, and the right one; or a profile is refused."""
    models: dict[str, Path | bytes] = {"m": case.exported}
    if not case.backend.times_layers:
        assert _refused(lambda: case.backend.profile_job(models, case.quick)), "a profile was promised"
        return
    profile = case.backend.read_profile(case.run(case.backend.profile_job(models, case.quick)), models)["m"]
    layers = {kernel.weight: kernel for kernel in profile.kernels if kernel.weight}
    wanted = {f"{name}.weight" for name, _ in case.model.named_children()}
    assert set(layers) == wanted, f"kernels of layers are {sorted(layers)}, the model's are {sorted(wanted)}"
    assert len(layers) == sum(bool(kernel.weight) for kernel in profile.kernels), "a layer is named twice"
    assert all(kernel.median_us >= 0 and kernel.runs > 0 for kernel in profile.kernels), "times are counted"
    slowest = max(layers, key=lambda name: layers[name].median_us)
    assert slowest == "heavy.weight", f"'{slowest}' is the slowest layer, though another has nine times its multiply-adds"


def can_be_priced(case: BackendCase) -> None:
    """What a table needs besides times: the cost of measuring, or which widths are worth choosing from."""
    if case.backend.pricing == "kernels":
        with opened(case.backend, load_runner(case.target), case.target) as bench:
            timer_us, node_us, session_us = replace(bench, target=case.quick).cost_of_measuring()
        assert timer_us >= 0, "what profiling adds to a kernel"
        assert 0 < node_us < 100, "what a kernel without work costs"
        assert session_us > 0, "what a run costs besides"
    elif case.backend.pricing == "models":
        assert 1 <= case.backend.channel_multiple(case.facts) <= 64, "a step of widths"


BACKEND_CONTRACTS: Mapping[str, Callable[[BackendCase], None]] = {
    contract.__name__: contract
    for contract in (
        says_what_it_is, describes_jobs, names_runtime_and_version, refuses_other_precisions, builds_what_torch_computes,
        believes_no_converter, times_whole_models, times_each_layer_once, can_be_priced,
    )
}  # fmt: skip


def _refused(act: Callable[[], object]) -> bool:
    """Return whether the user would be told that something cannot be done."""
    try:
        act()
    except DeployPipeError as error:
        return bool(error.message and (error.at or error.fix))
    return False
