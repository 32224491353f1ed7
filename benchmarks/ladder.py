"""What decides accuracy at equal milliseconds: price, value, allocator, removal. One network, one score, one fine-tuning.

    python benchmarks/ladder.py --data imagefolder:DIR --weights resnet20.safetensors --seeds 0 1 2

CIFAR-10, ResNet-20 with trained weights, a share of the dense model's latency by the latency table. Every rung keeps, within a
group, the channels of the highest gate Taylor score (Molchanov 2019: mean over batches of the squared gate gradient), taken on
the part of the training set that is not held out; the rungs differ in how many channels they keep in each group:

- `uniform`: one share for all groups. `threshold`: one threshold on all scores, each over its group's mean (global ranking);
  `threshold-raw`: on the scores as they are.
- `macs-sum`, `table-sum`: the exact allocator on summed scores, priced by MACs (the largest MACs budget whose latency fits) and
  by the table; `-remove`: branches may go. `table-mean`: scores over their group's mean. `table-share`: the logarithm of the
  kept share, the product's default for scores.
- `macs-curves`, `table-curves`: the exact allocator on measured loss curves; `-remove` with whole branches. `...-search`: the
  curves measured again around the solution, up to three times.
- `torch-pruning`: its global group norm, widths rounded to 8, by bisection to the same predicted latency; its own channels.
- `torch-pruning-by-taylor`: its widths, Taylor's channels. `table-sum-by-norm`: the widths of `table-sum`, its filters of the
  largest norm. `table-sum-remove-by-norm`, `uniform-by-norm` likewise.

Then all plans get the same fine-tuning and are measured in turns with the dense model. Results of every step are kept in
`--work`, so that the command can be stopped and run again. The test set is read once for each trained model.
"""

import argparse
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from allocator import threshold_widths, uniform_widths
from machine import describe
from peers import torch_pruning
from steps import once, timed
from torch import nn

from deploypipe.algorithms.depgraph import group_squares
from deploypipe.allocation.allocate import allocate_widths, first_channels, ranking
from deploypipe.compact import compact
from deploypipe.cost import CostTable
from deploypipe.count import MacTable, macs, params
from deploypipe.data.batches import batches
from deploypipe.data.load import Data, load_data
from deploypipe.errors import BudgetError
from deploypipe.export import export_onnx, simplify_onnx
from deploypipe.graph import trace
from deploypipe.ingredients.curvature import derivatives, gates
from deploypipe.ingredients.removal import removable
from deploypipe.ingredients.statistics import trained_weights
from deploypipe.models.load import Loaded, load_model
from deploypipe.pipeline.stages import Device
from deploypipe.plan import KeepPlan
from deploypipe.profiler.measure import profile
from deploypipe.progress import Silent
from deploypipe.targets import load_target
from deploypipe.training.evaluate import evaluate, recalibrate
from deploypipe.training.finetune import finetune
from deploypipe.training.settings import TrainSettings
from deploypipe.types import Graph
from deploypipe.worth.heldout import HeldOut, memo_name
from deploypipe.worth.sensitivity import Sensitivity

RESULTS = Path(__file__).with_name("results") / "ladder.csv"
MODEL = str(Path(__file__).parents[1] / "examples" / "cifar_resnet.py") + ":resnet20"
SCORE_BATCHES, BATCH, ROUNDS, HALVINGS = 16, 128, 3, 14
Kept = Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Bench:
    """What all rungs of one seed share."""

    loaded: Loaded
    graph: Graph
    table: CostTable
    data: Data
    seed: int
    share: float
    memo: Path

    @cached_property
    def meter(self) -> HeldOut:
        """Measures plans on held-out training images."""
        return HeldOut(self.loaded.model, self.graph, self.data, self.memo, seed=self.seed)

    @cached_property
    def budget(self) -> float:
        """Latency to reach, by the table."""
        return self.share * self.table.predict(self.graph)

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """Gate Taylor scores (C,) of every prunable group."""
        model = self.loaded.model.train().requires_grad_(True)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        total = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in self.graph.prunable}
        units = {group.name: gates(model, self.graph)(group) for group in self.graph.prunable}
        stream = batches(self.meter.fit, BATCH, shuffle_seed=self.seed, drop_last=True)
        for _, (inputs, labels) in zip(range(SCORE_BATCHES), stream, strict=False):
            model.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            for name, gradient in derivatives(model, units)[0].items():
                total[name] += gradient**2 / SCORE_BATCHES
        model.zero_grad()
        model.load_state_dict(state)
        model.eval()
        return {name: sums.numpy() for name, sums in total.items()}

    @cached_property
    def orders(self) -> dict[str, np.ndarray]:
        """Channels of every group, the one to keep longest first."""
        return {name: ranking(score) for name, score in self.scores.items()}

    @cached_property
    def gone(self) -> tuple[str, ...]:
        """Groups whose branch may go."""
        return removable(self.loaded.model, self.graph)

    def us(self, kept: Kept) -> float:
        """Return the predicted latency."""
        return self.table.predict(self.graph, KeepPlan.of_widths(kept))

    def by_latency(self, solve: Callable[[float], Kept | None]) -> Kept:
        """Return the answer for the largest MACs budget whose latency fits."""
        low, high, found = 0.0, MacTable().predict(self.graph), None
        for _ in range(HALVINGS):
            kept = solve((low + high) / 2)
            if kept is not None and self.us(kept) > self.budget:
                high = (low + high) / 2
            else:
                low, found = (low + high) / 2, kept or found
        assert found is not None
        return found

    def priced(self, price: str, solve: Callable[[CostTable, float], Kept]) -> Kept:
        """Solve on the table, or on MACs on the table's own widths."""
        if price == "table":
            return solve(self.table, self.budget)
        legal = self.table.candidates(self.graph)

        class Macs(MacTable):
            def candidates(self, graph: Graph) -> Mapping[str, tuple[int, ...]]:
                return legal

        def attempt(budget: float) -> Kept | None:
            try:
                return solve(Macs(), budget)
            except BudgetError:
                return None

        return self.by_latency(attempt)

    def by_norm(self, plan: KeepPlan) -> KeepPlan:
        """Return the plan of the same widths that keeps the channels whose weights and scales have the largest norm."""
        given = trained_weights(self.loaded.model)
        orders = {group.name: ranking(group_squares(group, given).numpy()) for group in self.graph.prunable}
        return KeepPlan(first_channels(orders, self.graph.kept(plan)), fingerprint=self.graph.fingerprint)

    def plan(self, kept: Kept) -> KeepPlan:
        """Return the plan of these widths, by the scores."""
        return KeepPlan(first_channels(self.orders, kept), fingerprint=self.graph.fingerprint)


def summed(bench: Bench, price: str, transform: str, remove: bool) -> KeepPlan:
    values = {}
    for name, score in bench.scores.items():
        given = score[bench.orders[name]] / (score.mean() if transform != "raw" else 1.0)
        values[name] = np.concatenate([[0.0], np.cumsum(given)])
        if transform == "share":
            with np.errstate(divide="ignore"):
                values[name] = np.log(values[name] / values[name][-1])
    legal = bench.table.candidates(bench.graph)
    choice = {name: ((0,) if remove and name in bench.gone else ()) + widths for name, widths in legal.items()}
    return bench.plan(
        bench.priced(price, lambda table, budget: allocate_widths(bench.graph, values, table, budget, candidates=choice)[0])
    )


def measured(bench: Bench, price: str, rounds: int, remove: bool) -> KeepPlan:
    def solve(table: CostTable, budget: float) -> Kept:
        gone = bench.gone if remove else ()
        search = Sensitivity(bench.graph, table, bench.orders, bench.meter, Silent(), gone)
        return search.search(budget, rounds).best.kept

    return bench.plan(bench.priced(price, solve))


def ranked(bench: Bench, widths: Callable[..., Kept], *given: Any) -> KeepPlan:
    return bench.plan(widths(bench.graph, bench.table, bench.budget, bench.scores, *given))


def peer(bench: Bench) -> KeepPlan:
    return torch_pruning(bench.loaded.model, bench.loaded.example, bench.graph, bench.table, bench.budget)


RUNGS: dict[str, Callable[[Bench], KeepPlan]] = {
    "uniform": lambda b: ranked(b, uniform_widths),
    "macs-sum": lambda b: summed(b, "macs", "raw", False),
    "table-sum": lambda b: summed(b, "table", "raw", False),
    "table-curves-remove-search": lambda b: measured(b, "table", ROUNDS, True),
    "macs-curves-remove": lambda b: measured(b, "macs", 0, True),
    "threshold": lambda b: ranked(b, threshold_widths),
    "table-sum-remove": lambda b: summed(b, "table", "raw", True),
    "torch-pruning": peer,
    "torch-pruning-by-taylor": lambda b: b.plan(b.graph.kept(peer(b))),
    "table-sum-by-norm": lambda b: b.by_norm(summed(b, "table", "raw", False)),
    "table-sum-remove-by-norm": lambda b: b.by_norm(summed(b, "table", "raw", True)),
    "uniform-by-norm": lambda b: b.by_norm(ranked(b, uniform_widths)),
    "table-curves-search": lambda b: measured(b, "table", ROUNDS, False),
    "table-curves-remove": lambda b: measured(b, "table", 0, True),
    "table-share": lambda b: summed(b, "table", "share", False),
    "table-mean": lambda b: summed(b, "table", "mean", False),
    "macs-sum-remove": lambda b: summed(b, "macs", "raw", True),
    "threshold-raw": lambda b: ranked(b, threshold_widths, False),
}


def planned(bench: Bench, name: str, folder: Path) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        plan = RUNGS[name](bench)
        plan.save(folder / "plan.json")
        found = bench.meter.measure(plan)
        kept = bench.graph.kept(plan)
        return {
            "predicted_us": bench.table.predict(bench.graph, plan),
            "macs": macs(bench.graph, plan),
            "params": params(bench.graph, plan),
            "held_out_loss": found.loss,
            "held_out_accuracy": found.top1,
            "widths": " ".join(f"{g.name}={kept[g.name]}" for g in bench.graph.prunable),
        }

    return once(folder / "planned.json", make)


def trained(bench: Bench, folder: Path, settings: TrainSettings) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        small = compact(bench.loaded.model, bench.graph, KeepPlan.load(folder / "plan.json"))
        small = recalibrate(small, bench.data.train, seed=bench.seed, batch_size=BATCH, augment=bench.data.augment)
        before = evaluate(small, bench.data.test).top1
        teacher = bench.loaded.model if settings.distill else None
        tuned = finetune(small, bench.data, settings, teacher=teacher, checkpoint=folder / "state" / "state.safetensors")
        export_onnx(tuned, bench.loaded.example, folder / "exported.onnx")
        simplify_onnx(folder / "exported.onnx", folder / "model.onnx")
        return {"before": before, "accuracy": evaluate(tuned, bench.data.test).top1}

    return once(folder / f"trained-{settings.epochs}.json", make)


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Plan, train and measure; yield one row for each rung and seed that is complete."""
    target = load_target("cpu")
    device = Device(target)
    settings = TrainSettings(epochs=args.epochs, distill=args.distill, precision=args.precision)
    for seed in args.seeds:
        loaded = load_model(MODEL, args.weights)
        loaded.model.eval()
        graph = trace(loaded.model, loaded.example)
        data = load_data(args.data, normalise=loaded.normalise, size=loaded.input_shape, seed=seed, reporter=Silent())
        table = profile(loaded.model, loaded.example, target, graph=graph)
        memo = args.work / "memo" / memo_name(loaded.key, graph.fingerprint, data.key, seed)
        bench = Bench(loaded, graph, table, data, seed, args.share, memo)
        found: dict[str, dict[str, Any]] = {}
        for name in args.rungs:
            folder = args.work / f"seed-{seed}" / name
            found[name] = {"rung": name, "seed": seed, **planned(bench, name, folder)}
            print(json.dumps(found[name]), flush=True)
        for name in args.rungs if args.until != "plan" else ():
            folder = args.work / f"seed-{seed}" / name
            found[name] |= trained(bench, folder, TrainSettings(**{**vars(settings), "seed": seed}))
            print(seed, name, found[name]["before"], found[name]["accuracy"], flush=True)
        if args.until:
            continue
        dense = args.work / "dense.onnx"
        export_onnx(loaded.model, loaded.example, args.work / "dense-exported.onnx")
        simplify_onnx(args.work / "dense-exported.onnx", dense)
        files = {name: args.work / f"seed-{seed}" / name / "model.onnx" for name in args.rungs}
        times = timed(device, {"dense": dense, **files})
        for name in args.rungs:
            us = {"us": times[name], "dense_us": times["dense"]}
            yield {
                **found[name],
                **us,
                "of_dense": times[name] / times["dense"],
                "epochs": settings.epochs,
                "distill": args.distill,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS), choices=list(RUNGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=0.5, help="of the dense model's latency")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--distill", type=float, default=0.0)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of training")
    parser.add_argument("--until", choices=["plan", "train"], help="stop before training, or before measuring")
    parser.add_argument("--work", type=Path, default=Path("runs/ladder"))
    args = parser.parse_args()
    found = list(rows(args))
    if not found:
        return
    with RESULTS.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in describe({"threads": 1}).items())
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in found)


if __name__ == "__main__":
    main()
