"""Trainings that run in processes of their own: one that is slow enough to be killed, one that two devices share."""

import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deploypipe.data.batches import CropFlip
from deploypipe.data.load import Data, load_data
from deploypipe.training.finetune import TrainHook, TrainSettings, finetune

SETTINGS = TrainSettings(epochs=3, lr=0.05, batch_size=32, seed=3)


class Net(nn.Module):
    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.norm(self.conv(x))), 4)
        return self.head(self.dropout(x.flatten(1)))


def make_net(seed: int = 0, **options: float) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**options)


def digits() -> Data:
    whole = load_data("demo")
    part = TensorDataset(*whole.train.take(torch.arange(200)))
    return Data(part, whole.test, whole.classes, "part", CropFlip(1, flip=False), "200 digits")


class _Slow(TrainHook):
    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s

    def on_step_end(self, model: nn.Module, step: int) -> None:
        time.sleep(self.pause_s)


def slow(pause_s: float, checkpoint: Path, out: Path) -> None:
    """Train with a pause after every step; write what came out."""
    torch.set_num_threads(1)
    tuned = finetune(make_net(), digits(), SETTINGS, teacher=make_net(1), checkpoint=checkpoint, hooks=[_Slow(pause_s)])
    torch.save(tuned.state_dict(), out)


def shared_task() -> tuple[nn.Module, Data, TrainSettings]:
    """Return a model without batch norm, whose statistics are per device, and without dropout."""
    rng = torch.Generator().manual_seed(0)
    train = TensorDataset(torch.randn(64, 3, 8, 8, generator=rng), torch.randint(0, 4, (64,), generator=rng))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    return model, Data(train, train, tuple("abcd"), "key", None, ""), TrainSettings(epochs=3, lr=0.1, batch_size=32)


def device(rank: int, port: int, out: Path) -> None:
    """Be one of two devices; the first one writes what came out."""
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    model, data, settings = shared_task()
    tuned = finetune(model, data, settings, teacher=model, fabric=fabric, checkpoint=out.with_suffix(".checkpoint"))
    assert fabric.world_size == 2
    if fabric.is_global_zero:
        torch.save(tuned.state_dict(), out)
