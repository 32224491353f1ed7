"""A training that is shared by devices: what each of them runs, and the model and data that all of them make anew."""

import os
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import TensorDataset

from deploypipe.data.load import Data
from deploypipe.training.finetune import TrainSettings, finetune

SETTINGS = TrainSettings(epochs=3, lr=0.1, batch_size=32)


def model() -> nn.Module:
    """Without batch norm, whose statistics are per device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


def data() -> Data:
    rng = torch.Generator().manual_seed(0)
    train = TensorDataset(torch.randn(64, 3, 8, 8, generator=rng), torch.randint(0, 4, (64,), generator=rng))
    return Data(train, train, tuple("abcd"), "key", None, "")


def device(rank: int, port: int, out: Path) -> None:
    """Be one of two devices; the first one writes what came out."""
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    tuned = finetune(model(), data(), SETTINGS, teacher=model(), fabric=fabric, checkpoint=out.with_suffix(".checkpoint"))
    assert fabric.world_size == 2
    if fabric.is_global_zero:
        torch.save(tuned.state_dict(), out)
