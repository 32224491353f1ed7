"""What every algorithm owes the pipeline: the published contracts over every row of the table, and what only our own owe."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from deploypipe.algorithms import ALGORITHMS, INFO, algorithms, make
from deploypipe.algorithms.options import options_of
from deploypipe.errors import UsageError
from deploypipe.testing.algorithms import contracts_of, exported_equal, exported_without_gates_and_equal
from deploypipe.testing.problems import AlgorithmCase, equal_when_masked, problem_of
from deploypipe.testing.toys import NETS
from tests.toys import TOYS

EVERY = pytest.mark.parametrize("name", sorted(ALGORITHMS))
FAST = {
    "admm": {"train_epochs": 2, "rho": 0.3},
    "autocompress": {"rounds": 2, "train_epochs": 2, "evaluations": 4, "images": 16, "norm_images": 16},
    "autoslim": {"train_epochs": 1, "images": 16, "norm_images": 16},
    "dcff": {"train_epochs": 2},
    "dcp": {"train_epochs": 1, "heads": 1, "images": 48, "parts": 2},
    "dkp": {"train_epochs": 1, "heads": 1, "images": 48, "parts": 2},
    "lth": {"rounds": 2, "train_epochs": 1},
    "depgraph": {"train_epochs": 1, "steps": 2},
    "fpgm": {"train_epochs": 1},
    "random-search": {"n": 3, "tolerance": 0.2, "images": 16, "norm_images": 16},
    "scp": {"train_epochs": 1},
    "smcp": {"train_epochs": 1, "every": 1},
    "slimming": {"train_epochs": 1},
    "taylor": {"steps": 2, "interval": 2, "batch": 16},
    "halp": {"steps": 2, "interval": 2, "batch": 16},
    "netadapt": {"reduction": 0.1, "images": 16, "norm_images": 16},
    "thinet": {"images": 48, "locations": 5},
}
CASES = {name: AlgorithmCase(make(name, FAST.get(name, {})), INFO[name].needs) for name in sorted(ALGORITHMS)}
SPARSE = [name for name, case in CASES.items() if not case.cuts]
CUTTING = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.cuts])
SHARE = {("dcff", "se_block"): 0.995}  # all but two thin layers make their channels together with others: they stay whole


EXPORT = f"{exported_without_gates_and_equal.__name__}-residual"  # takes a second each: all in one file take a quarter of that
ROWS = [(name, contract) for name, case in CASES.items() for contract in contracts_of(case) if contract != EXPORT]


@pytest.mark.parametrize(("name", "contract"), ROWS)
def test_algorithm(name: str, contract: str) -> None:
    contracts_of(CASES[name])[contract](CASES[name])


class SideBySide(nn.Module):
    """Models that read the same input, as one."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([model(x) for model in self.models], 1)


@pytest.mark.slow  # twenty models in one export; below, one method on every net
def test_c7_what_every_method_leaves_is_exported_without_gates_and_equal() -> None:
    solved = {name: case.solved("residual") for name, case in CASES.items() if EXPORT in contracts_of(case)}
    assert len(solved) == len(CASES) - len(SPARSE)
    small = [CASES[name].finished(*found).eval() for name, found in solved.items()]
    exported_equal(SideBySide(small).eval(), solved["l2"][0].graph.example)


@EVERY
def test_no_option_is_called_like_what_the_pipeline_looks_for(name: str) -> None:
    options = {field.name for field in dataclasses.fields(make(name))}
    assert not options & {"plan", "train", "repair", "schedule", "hooks", "rivals", "sparse"}


@pytest.mark.parametrize("net", [net for net in NETS if net != "residual"])
def test_c7_exported_on_every_net(net: str) -> None:
    """Plain modules export alike, whatever method chose the widths: one method on the other nets."""
    exported_without_gates_and_equal(CASES["l2"], net)


@EVERY
def test_described_truthfully(name: str) -> None:
    method, info = make(name), INFO[name]
    assert info.name == method.name == name
    assert info.options == options_of(type(method))
    document = sys.modules[type(method).__module__].__doc__ or ""
    assert info.paper.split(",")[0] in document
    assert info.paper.rsplit("arXiv:", 1)[1] in document
    assert algorithms()[name]["year"] == info.year


@EVERY
def test_options_are_given_by_name(name: str) -> None:
    for option in options_of(type(make(name))):
        assert make(name, {option.name: str(option.default)}) == make(name)
    with pytest.raises(UsageError, match="no option 'nonsense'"):
        make(name, {"nonsense": 1})


def test_nearest_names_are_offered() -> None:
    with pytest.raises(UsageError, match="did you mean 'thinet'"):
        make("thinnet")
    with pytest.raises(UsageError, match="did you mean 'images'"):
        make("thinet", {"image": 5})
    assert make("thinet", {"images": "100"}).images == 100


def test_listing_needs_no_torch() -> None:
    code = "import sys; from deploypipe.algorithms import algorithms; algorithms(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert set(INFO) == set(ALGORITHMS)


@CUTTING
@pytest.mark.parametrize("net", ["se_block", "fixed_shortcut"])
def test_squeeze_and_excitation_and_fixed_weights_are_pruned_or_told_why_not(name: str, net: str) -> None:
    model, example = TOYS[net]()
    before = {key: tensor.clone() for key, tensor in model.named_buffers() if key.endswith("weight")}
    problem = CASES[name].learned(problem_of(model, example, SHARE.get((name, net), 0.5)))
    plan = CASES[name].plan(problem)
    assert problem.table.predict(problem.graph, plan) <= problem.budget
    assert all(plan.skipped.values())
    assert dict(problem.model.named_buffers()).keys() == dict(TOYS[net]()[0].named_buffers()).keys()
    assert all(torch.equal(problem.model.get_buffer(key), tensor) for key, tensor in before.items())
    equal_when_masked(problem, plan)
