"""Train the embedded demo model: `python -m deploypipe.train_demo [FILE]`."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from deploypipe.data.load import load_data
from deploypipe.models.demo import WEIGHTS, demo_net
from deploypipe.training.finetune import Accuracy, TrainSettings, evaluate, finetune

SETTINGS = TrainSettings(epochs=12, lr=0.1, batch_size=64, label_smoothing=0.1, warmup=0.1)


def train_demo(path: Path = WEIGHTS) -> Accuracy:
    """Train the demo model from scratch, write its weights to `path` and return its test accuracy."""
    torch.manual_seed(0)
    data = load_data("demo")
    model = finetune(demo_net(), data, SETTINGS)
    save_file(model.state_dict(), path)
    return evaluate(model, data.test)


if __name__ == "__main__":
    torch.set_num_threads(2)  # sums are ordered by thread: with another number the last bits differ
    destination = Path(sys.argv[1]) if len(sys.argv) > 1 else WEIGHTS
    accuracy = train_demo(destination)
    sys.stdout.write(f"{destination}: {accuracy.top1:.2%} of {accuracy.n} test digits\n")
