"""Every structured method at equal milliseconds: one network, one latency budget, one number of epochs in all.

    python benchmarks/algorithms.py --data imagefolder:DIR --weights resnet20.safetensors --epochs 15 --seeds 0
    python benchmarks/algorithms.py ... --images 10000 --epochs 6 --distill 0 --seeds 0 1 2    # minutes a method

CIFAR-10, ResNet-20 with trained weights (or `--model mobilenetv2`, trained by this bench first), a share of the dense model's
latency on ONNX Runtime, one thread. Rows:

- a method's name: `deploypipe build --algo NAME` with its default options; those that train before they prune do so for a third
  of the epochs, and fine-tune for the rest. `scratch-b` trains longer, as the protocol says. Two have no room for their
  defaults in so few epochs: `autocompress` takes one round (`rounds=1`, `retrain_epochs=0`), `dcff` keeps the weights.
- `uniform`: equal shares, largest filters; what that leaves of the budget is filled. `random`: one draw for each seed.
- `torch-pruning`, `torch-pruning-taylor`: its global ranking by group norms, and by Taylor terms; widths rounded to 8,
  the ratio that comes nearest to the same budget; its own channels. Trained as the others are.
- `auto`: the recipe, channels by group norms, widths by first-order terms, branches may go. `norms`: its channels alone.
  `taylor-by-taylor`: its widths alone. `...-measured`: `--value measured`; `-finalists`: with three finalists.
- `auto-...`: its plan, trained otherwise: learning rate, weight decay, batch, share and temperature of distillation. And
  `-penalised`: with the method's own training, that draws what will go towards zero, for a third of the epochs first.
- `...-hint`: trained as `build` does, which also learns the dense model's last activations. No other row does.

All plans are made on one latency table, then trained, then measured in turns with the dense model. The budget is a little below
the share, so that most rows end at or below it; a build would measure the plan and make it again where it does not, which this
bench leaves out: some rows take up to a hundredth more. Steps lie in `--work`: the command can be stopped and run again,
and several may run beside each other (`--until train`); measuring comes last, alone. The test set decides nothing.
"""

import argparse
import csv
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from machine import describe
from peers import torch_pruning
from steps import claimed, once, timed
from teacher import Remembered
from torch import nn

from deploypipe import saved
from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem
from deploypipe.compact import compact
from deploypipe.count import macs, params
from deploypipe.data.batches import batches, count, split
from deploypipe.data.load import Data, load_data
from deploypipe.errors import DeployPipeError
from deploypipe.export import export_onnx, simplify_onnx
from deploypipe.graph import trace
from deploypipe.latency.table import LatencyTable
from deploypipe.models.load import Loaded, load_model
from deploypipe.pipeline.hinting import find_hint
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.stages import Device
from deploypipe.pipeline.training import schedule, trained, tuned, tuning_hooks
from deploypipe.pipeline.valuing import choose, held_back, held_out
from deploypipe.plan import KeepPlan
from deploypipe.profiler.measure import profile
from deploypipe.progress import Silent
from deploypipe.targets import load_target
from deploypipe.training.evaluate import evaluate
from deploypipe.training.finetune import finetune
from deploypipe.training.settings import TrainSettings
from deploypipe.types import Graph

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "algorithms.csv"
SPARE = 0.005  # of the budget, left unused by the plans: the table's error
LEARN = 1 / 3  # of all epochs, for methods that train before they prune
TAYLOR_BATCHES, BATCH = 6, 128
ASKED = ("model", "images", "epochs", "distill", "batch_size")  # what differs between tables
DENSE_EPOCHS, DENSE_LR = 20, 0.1  # of a network that the bench trains itself


@dataclass(frozen=True)
class Row:
    """A way to a pruned network.

    Attributes:
        algo: Its method; empty for a peer.
        options: Of the method.
        value: What decides widths, if not the method's scores: fields of the request.
        learns: Options that share the epochs before pruning.
        training: Settings that differ from those of the other rows.
    """

    algo: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    value: Mapping[str, Any] = field(default_factory=dict)
    learns: tuple[str, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)


LEARNER = ("train_epochs",)
MEASURED, FIRST_ORDER = {"value": "measured"}, {"value": "taylor"}
ONCE = {"steps": 1, "interval": 16, "batch": 128, "lr": 0.0}
NORMS = {"train_epochs": 0, "steps": 1}  # channels by the norm of all that they own, batch norms and readers included
HINT: Mapping[str, Any] = {"hint": TrainSettings.hint}
TRAININGS: Mapping[str, Mapping[str, Any]] = {  # of the default recipe's plan; what else was tried
    "lr-0.1": {"lr": 0.1},
    "lr-0.2": {"lr": 0.2},
    "decay-1e-4": {"weight_decay": 1e-4},
    "lr-0.1-decay-1e-4": {"lr": 0.1, "weight_decay": 1e-4},
    "batch-64": {"batch_size": 64},
    "distill-0.9": {"distill": 0.9},
    "distill-none": {"distill": 0.0},
    "softer": {"temperature": 2.0},
    "hint": HINT,
}
ROWS: Mapping[str, Row] = {
    "uniform": Row("erk", {"rule": "uniform"}),
    "random": Row("random"),
    "l1": Row("l1"),
    "l2": Row("l2"),
    "thinet": Row("thinet"),
    "fpgm": Row("fpgm"),
    "taylor": Row("taylor"),
    "halp": Row("halp"),
    "lamp": Row("lamp"),
    "erk": Row("erk"),
    "netadapt": Row("netadapt"),
    "random-search": Row("random-search"),
    "scratch-e": Row("scratch-e", {"compare": False}),
    "scratch-b": Row("scratch-b", {"compare": False}),
    "slimming": Row("slimming", learns=LEARNER),
    "scp": Row("scp", learns=LEARNER),
    "smcp": Row("smcp", learns=LEARNER),
    "depgraph": Row("depgraph", learns=LEARNER),
    "admm": Row("admm", learns=LEARNER),
    "dcp": Row("dcp", learns=LEARNER),
    "dcff": Row("dcff", {"start": "trained"}, learns=LEARNER),
    "autoslim": Row("autoslim", learns=LEARNER),
    "autocompress": Row("autocompress", {"rounds": 1, "retrain_epochs": 0}, learns=LEARNER),
    "torch-pruning": Row(),
    "torch-pruning-taylor": Row(),
    "torch-pruning-hint": Row(training=HINT),
    "auto": Row("depgraph", NORMS, value=FIRST_ORDER),
    "taylor-by-taylor": Row("taylor", ONCE, value=FIRST_ORDER),
    "l2-measured": Row("l2", value=MEASURED),
    "thinet-measured": Row("thinet", value=MEASURED),
    "l2-measured-finalists": Row("l2", value={**MEASURED, "value_finalists": 3}),
    "norms": Row("depgraph", {"train_epochs": 0}),
    "norms-measured": Row("depgraph", NORMS, value=MEASURED),
    "norms-measured-finalists": Row("depgraph", NORMS, value={**MEASURED, "value_finalists": 3}),
    "auto-penalised": Row("depgraph", {"steps": 1}, value=FIRST_ORDER, learns=LEARNER),
    **{f"auto-{name}": Row("depgraph", NORMS, value=FIRST_ORDER, training=told) for name, told in TRAININGS.items()},
}
MODELS = {"resnet20": ("cifar_resnet.py", "resnet20"), "mobilenetv2": ("cifar_mobilenet.py", "mobilenetv2")}


@dataclass(frozen=True, eq=False)
class Bench:
    """What all rows of one seed share."""

    model: str
    loaded: Loaded
    data: Data
    settings: TrainSettings
    share: float
    said: Path

    @cached_property
    def teacher(self) -> nn.Module:
        """The dense model, with what it said about the batches that earlier rows met."""
        return Remembered(self.loaded.model, self.said, self.settings.precision)

    @cached_property
    def graph(self) -> Graph:
        """The channel graph."""
        return trace(self.loaded.model, self.loaded.example)

    @cached_property
    def table(self) -> LatencyTable:
        """What widths cost."""
        return profile(self.loaded.model, self.loaded.example, load_target("cpu"), graph=self.graph)

    def request(self, row: Row) -> Request:
        """Return what a user would ask for."""
        settings, options = self.settings, self.options(row)
        return Request(
            algo=row.algo,
            options=options,
            epochs=settings.epochs,
            seed=settings.seed,
            train_precision=settings.precision,
            **row.value,
        )

    def options(self, row: Row) -> dict[str, Any]:
        """Return a method's options, the epochs before pruning among them."""
        return {**row.options, **{name: round(LEARN * self.settings.epochs / len(row.learns)) for name in row.learns}}

    def problem(self, data: Data) -> Problem:
        """Return what a method is asked."""
        budget = self.share * (1 - SPARE) * self.table.predict(self.graph)
        return Problem(self.loaded.model, self.graph, self.table, budget, data.train, self.settings.seed)

    def peer(self, name: str) -> KeepPlan:
        """Return what Torch-Pruning keeps."""
        problem, taylor = self.problem(self.data), None
        if name.endswith("taylor"):
            stream = batches(self.data.train, BATCH, shuffle_seed=self.settings.seed, drop_last=True)
            taylor = [batch for _, batch in zip(range(TAYLOR_BATCHES), stream, strict=False)]
        return torch_pruning(problem.model, self.loaded.example, self.graph, self.table, problem.budget, taylor)


def planned(bench: Bench, name: str, row: Row, folder: Path) -> dict[str, Any]:
    """Train if the method does, and plan; keep the plan and the model that it is for."""

    def make_plan() -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        start, epochs = time.monotonic(), 0
        request, data = bench.request(row), bench.data
        problem = bench.problem(data)
        if row.algo:
            measures = request.value == "measured"
            if measures:
                data = held_back(request, data)
                problem = replace(problem, data=data.train)
            algorithm = make(row.algo, bench.options(row))
            if hasattr(algorithm, "train"):
                model, epochs = trained(algorithm, problem, data, bench.settings, folder / "training", bench.teacher)
                problem = replace(problem, model=model)
            meter = held_out(request, problem.model, bench.loaded.key, bench.graph, bench.data) if measures else None
            plan = choose(request, problem, meter, folder)
        else:
            plan = bench.peer(name)
        saved.save_weights(problem.model, folder / "basis.safetensors")
        plan.save(folder / "plan.json")
        kept = bench.graph.kept(plan)
        return {
            "epochs_before": epochs, "plan_s": time.monotonic() - start, "predicted_us": bench.table.predict(bench.graph, plan),
            "macs": macs(bench.graph, plan), "params": params(bench.graph, plan),
            "widths": " ".join(f"{g.name}={kept[g.name]}" for g in bench.graph.prunable),
        }  # fmt: skip

    return once(folder / "planned.json", make_plan)


def finished(bench: Bench, row: Row, before: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Compact, repair, fine-tune for the epochs that are left, and judge."""

    def train() -> dict[str, Any]:
        start, plan = time.monotonic(), KeepPlan.load(folder / "plan.json")
        basis = saved.restore(bench.loaded.model, bench.graph, KeepPlan({}), folder / "basis.safetensors")
        problem = replace(bench.problem(bench.data), model=basis)
        small = compact(basis, bench.graph, plan)
        settings, hooks = replace(bench.settings, epochs=max(0, bench.settings.epochs - before["epochs_before"])), ()
        settings = replace(settings, **row.training)
        # Where inner activations are learnt, too, what the teacher said is not enough to remember.
        teacher = bench.loaded.model if settings.hint else bench.teacher
        hint = find_hint(basis, bench.graph, plan) if settings.hint else None
        if row.algo:
            algorithm = make(row.algo, bench.options(row))
            small = algorithm.repair(small, problem, plan) if hasattr(algorithm, "repair") else small
            settings, hooks = schedule(algorithm, settings, problem, plan), tuning_hooks(algorithm, problem, small, plan)
        untrained = tuned(small, bench.data, replace(settings, epochs=0), teacher, folder, Silent())
        after = tuned(small, bench.data, settings, teacher, folder, Silent(), hooks, hint)
        export_onnx(after, bench.loaded.example, folder / "exported.onnx")
        simplify_onnx(folder / "exported.onnx", folder / "model.onnx")
        top1 = {"before": evaluate(untrained, bench.data.test).top1, "accuracy": evaluate(after, bench.data.test).top1}
        return {**top1, "epochs_after": settings.epochs, "train_s": time.monotonic() - start}

    return once(folder / "trained.json", train)


def dense(name: str, weights: Path | None, data_name: str, work: Path) -> Loaded:
    """Return the dense network with trained weights; train it first if there are none."""
    file, function = MODELS[name]
    spec = f"{ROOT / 'examples' / file}:{function}"
    if weights is None:
        weights = work / "dense.safetensors"
        if not weights.is_file():
            loaded = load_model(spec)
            data = load_data(data_name, normalise=loaded.normalise, size=loaded.input_shape, seed=0, reporter=Silent())
            settings = TrainSettings(epochs=DENSE_EPOCHS, lr=DENSE_LR, precision="bf16")
            work.mkdir(parents=True, exist_ok=True)
            model = finetune(loaded.model, data, settings, checkpoint=work / "dense-state.safetensors")
            print("dense", evaluate(model, data.test).top1, flush=True)
            saved.save_weights(model, weights)
    loaded = load_model(spec, weights)
    loaded.model.eval()
    return loaded


def export(model: nn.Module, example: tuple[Any, ...], file: Path) -> Path:
    """Return the simplified ONNX file."""
    if not file.is_file():
        raw = file.with_suffix(".raw.onnx")
        export_onnx(model, example, raw)
        simplify_onnx(raw, file)
    return file


def folder_of(args: argparse.Namespace) -> Path:
    """Return where the rows of one network and schedule are kept."""
    return Path(args.work, args.model, "-".join(str(getattr(args, key)) for key in ASKED[1:]))


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row for each name and seed that is complete."""
    root, loaded = folder_of(args), dense(args.model, args.weights, args.data, args.work / args.model)
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for seed in args.seeds:
        data = load_data(args.data, normalise=loaded.normalise, size=loaded.input_shape, seed=seed, reporter=Silent())
        if args.images:
            part = split(data.train, args.images / count(data.train), seed)[1]
            data = replace(data, train=part, key=f"{data.key}, {args.images} images")
        settings = TrainSettings(
            epochs=args.epochs, distill=args.distill, seed=seed, precision=args.precision, batch_size=args.batch_size, hint=0.0
        )
        bench = Bench(args.model, loaded, data, settings, args.share, args.work / args.model / "teacher")
        for name in args.rows:
            row, folder = ROWS[name], root / f"seed-{seed}" / name
            with claimed(folder) as mine:
                if not mine:
                    continue
                try:
                    before = planned(bench, name, row, folder)
                except DeployPipeError as error:
                    print(seed, name, error, flush=True)
                    continue
                print(seed, name, json.dumps(before), flush=True)
                if args.until != "plan":
                    found[seed, name] = before | finished(bench, row, before, folder)
                    print(seed, name, found[seed, name]["before"], found[seed, name]["accuracy"], flush=True)
    if args.until:
        return
    yield from measured(root, loaded, args, found)


def measured(
    root: Path, loaded: Loaded, args: argparse.Namespace, found: Mapping[tuple[int, str], Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Measure all models in turns with the dense one, a dozen at a time; yield the complete rows."""
    names = list(found)
    for first in range(0, len(names), 12):
        part = names[first : first + 12]
        files = {f"{seed}/{name}": root / f"seed-{seed}" / name / "model.onnx" for seed, name in part}
        times = timed(Device(load_target("cpu")), {"dense": export(loaded.model, loaded.example, root / "dense.onnx"), **files})
        for seed, name in part:
            us, dense_us = times[f"{seed}/{name}"], times["dense"]
            told = {"us": us, "dense_us": dense_us, "of_dense": us / dense_us}
            asked = {key: getattr(args, key) for key in ASKED} | {"row": name, "seed": seed}
            yield {**asked, **found[seed, name], **told}


def written(path: Path, fresh: list[dict[str, Any]]) -> None:
    """Put the rows into the file, in place of those of the same model, name, seed, epochs and distillation."""
    keys = (*ASKED, "row", "seed")
    of: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda row: tuple(str(row[key]) for key in keys)  # noqa: E731
    lines = path.read_text().splitlines() if path.is_file() else []
    old = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    new = {of(row) for row in fresh}
    rounded = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in fresh]
    with path.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in describe({"threads": 1}).items())
        writer = csv.DictWriter(file, list(fresh[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([row for row in old if of(row) not in new] + rounded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="resnet20", choices=list(MODELS))
    parser.add_argument("--weights", type=Path, help="of the dense model; without them it is trained first")
    tried = [name for name, row in ROWS.items() if row.training or name.startswith("auto-")]
    parser.add_argument("--rows", nargs="+", default=[name for name in ROWS if name not in tried], choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--share", type=float, default=0.5, help="of the dense model's latency")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--distill", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=0, help="of the training set that are used; 0 for all")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"], help="of training")
    parser.add_argument("--until", choices=["plan", "train"], help="stop before training, or before measuring")
    parser.add_argument("--work", type=Path, default=Path("runs/algorithms"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = list(rows(args))
    if found:
        written(RESULTS, found)


if __name__ == "__main__":
    main()
