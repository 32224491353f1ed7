"""What others script against: a name that comes or goes is a decision, not an accident."""

import inspect
import subprocess
import sys

import pytest

import deploypipe as dp

NAMES = {
    *("trace", "Graph", "Group", "Member", "KeepPlan", "compact", "profile", "LatencyTable", "allocate", "prune", "build"),
    *("algorithms", "load", "Report", "Target", "load_target", "fold_weights", "DeployPipeError", "__version__"),
}
FIRST_PARAMETERS = {  # as the README and users' scripts call them
    "trace": ["model", "example_inputs"],
    "compact": ["model", "graph", "plan"],
    "profile": ["model", "example_inputs", "target"],
    "allocate": ["graph", "scores", "table", "budget"],
    "prune": ["model", "example_inputs", "algo", "target", "budget", "data", "epochs", "seed", "options"],
    "fold_weights": ["model"],
    "load": ["run"],
}


def test_the_list_is_as_agreed() -> None:
    assert set(dp.__all__) == NAMES
    assert set(dir(dp)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_is_there_and_explained(name: str) -> None:
    value = getattr(dp, name)
    assert value is not None
    if callable(value):
        assert inspect.getdoc(value)


@pytest.mark.parametrize("name", sorted(FIRST_PARAMETERS))
def test_parameters_keep_their_names_and_order(name: str) -> None:
    expected = FIRST_PARAMETERS[name]
    assert list(inspect.signature(getattr(dp, name)).parameters)[: len(expected)] == expected


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = dp.nonsense


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, deploypipe; print([n for n in ('torch', 'numpy', 'onnx', 'scipy', 'typer') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "[]\n"
