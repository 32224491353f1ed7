"""The profile that is shipped as an example is one that this version reads, of the model that its README names."""

import importlib.util
from pathlib import Path

import pytest
import torch

from deploypipe.graph import trace
from deploypipe.latency.table import LatencyTable

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.parent for path in (ROOT / "profiles").glob("*/device.json"))


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_it_loads_and_prices_its_model(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("cifar_resnet", ROOT / "examples" / "cifar_resnet.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    graph = trace(module.resnet20(), torch.zeros(1, 3, 32, 32))
    table = LatencyTable.load(folder)
    context = table.context(graph)
    assert table.predict(graph) == pytest.approx(context.whole_us)
    assert context.error is not None
    assert folder.name in (ROOT / "profiles" / "README.md").read_text()


def test_there_is_one() -> None:
    assert EXAMPLES
