"""Compaction is exact on torchvision: classifiers, segmentation models, detection backbones.

A few families run by default; `make test-zoo` (pytest -m zoo) runs every model that torchvision lists.
"""

import random

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import detection, list_models, segmentation

from deploypipe.compact import compact, difference, mask, run
from deploypipe.graph import trace
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph

QUICK = [
    "resnet18",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "regnet_y_400mf",
    "efficientnet_b0",
    "alexnet",
]
CLASSIFIERS = [name for name in list_models(module=torchvision.models) if name not in QUICK]
SEGMENTATION, DETECTION = list_models(module=segmentation), list_models(module=detection)


def alive(model: nn.Module) -> nn.Module:
    """Give norms and zero-initialised heads values, so that every channel matters to the output."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
        elif isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model.eval()


def forty_percent(graph: Graph) -> KeepPlan:
    rng, keep = random.Random(0), {}
    for group in graph.prunable:
        keep[group.name] = tuple(sorted(rng.sample(range(group.size), max(1, round(0.6 * group.size)))))
    return KeepPlan(keep, graph.fingerprint)


def is_exact(model: nn.Module, size: int) -> None:
    example = (torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)),)
    graph = trace(alive(model), example)
    assert graph.prunable
    plan = forty_percent(graph)
    small = compact(model, graph, plan, check=False)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    result = run(small, example)
    if not any(group.normalised for group in graph.prunable):
        assert difference(run(mask(model, graph, plan), example), result) <= 1e-5
    assert [t.shape for t in result] == [t.shape for t in run(model, example)]


def classifier(name: str) -> nn.Module:
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **extra)


@pytest.mark.parametrize("name", QUICK)
def test_families(name: str) -> None:
    is_exact(classifier(name), 64)


@pytest.mark.zoo
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name: str) -> None:
    is_exact(classifier(name), 299 if name == "inception_v3" else 224)


@pytest.mark.zoo
@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation(name: str) -> None:
    is_exact(torchvision.models.get_model(name, weights=None, weights_backbone=None), 160)


@pytest.mark.zoo
@pytest.mark.parametrize("name", DETECTION)
def test_detection_backbones(name: str) -> None:
    is_exact(torchvision.models.get_model(name, weights=None, weights_backbone=None).backbone, 320)
