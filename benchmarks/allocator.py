"""Allocators on the same table and the same scores: the value that each keeps within the same predicted cost.

    python benchmarks/allocator.py --models resnet50 mobilenet_v2 efficientnet_b0 densenet121 --budgets 0.3 0.5 0.7

Scores are drawn (log-normal channels, log-normal groups), because what is compared is the choice of widths, not the criterion;
the value of a plan is the sum of the scores that it keeps, as a share of all. Every method takes its widths from the table's
candidates and is judged by the table's own prediction; over the budget counts as failed. Methods:

- `exact`: the product's allocator, with the bound that it proved; it is asked for the gap (of the value given up) that the row
  states, and its certificate's status says whether that was reached in 30 seconds.
- `marginal`: a knapsack that prices the layers that make a group, by its own width, with all other widths frozen (HALP): ten
  budgets that fall exponentially, prices renewed in between, then the limit is corrected until the true cost fits.
- `greedy`: one group narrower in each round, the one that gives up least for the wanted saving (NetAdapt with this value).
- `threshold`: one threshold on all scores, each over the mean of its group.
- `uniform`: one share for all groups.

Tables: `macs`; `latency`, measured on this machine for the models of --latency; `estimate`, the analytic estimate for a Jetson
AGX Orin (`targets/jetson-orin.toml`) over the model's real graph, for those of --estimate: steps of 8 channels and launches,
nothing measured. Fed by many groups as DenseNet's layers are, such a price is not convex in the total: its bound is valid, not
tight.

`random` rows are small nets with uneven stairs as prices, solved by brute force as well: `optimal` is the share of nets in
which a method reached the best value, `value` and `worst` are mean and minimum of value over best value. Seconds hold for a
machine that may have been busy, `cpu_seconds` are of the processor time that the process got.
"""

import argparse
import csv
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from machine import describe
from numpy.typing import NDArray

from deploypipe.algorithms.netadapt import NetAdapt, Network, rounds
from deploypipe.allocation.allocate import allocate_widths
from deploypipe.allocation.scaled import nearest_width, scaled_widths
from deploypipe.cost import CostTable, CostTerm
from deploypipe.count import MacTable
from deploypipe.errors import BudgetError
from deploypipe.graph import trace
from deploypipe.latency.estimate import estimated
from deploypipe.plan import Certificate, KeepPlan
from deploypipe.profiler.measure import profile
from deploypipe.targets import load_target
from deploypipe.types import Graph, Group, Width

RESULTS = Path(__file__).with_name("results") / "allocator.csv"
STEPS, CORRECTIONS = 10, 12  # of the marginal knapsack
GAP, GAPS = 1e-3, {"densenet121": 1e-2}  # of the value given up: the gap of the product; of models with very wide concats
LIMIT_S = 30.0
Kept = dict[str, int]
Floats = NDArray[np.float64]
Row = dict[str, Any]


class Fast:
    """The cost of many widths of one graph: the table's terms, with prices remembered."""

    def __init__(self, graph: Graph, table: CostTable) -> None:
        self.terms, self.names = table.terms(graph), [group.name for group in graph.groups]
        at = {name: i for i, name in enumerate(self.names)}
        self.slots = np.zeros((2 * len(self.terms), len(self.names)), np.int64)
        self.const = np.array([width.const for term in self.terms for width in (term.n_in, term.n_out)])
        for row, width in enumerate(width for term in self.terms for width in (term.n_in, term.n_out)):
            for name, slots in width.parts:
                self.slots[row, at[name]] += slots
        self.prices: dict[tuple[int, int, int], float] = {}

    def __call__(self, kept: Mapping[str, int]) -> float:
        """Return the cost of these widths."""
        ends = (self.const + self.slots @ np.array([kept[name] for name in self.names])).tolist()
        return sum(self.price(i, ends[2 * i], ends[2 * i + 1]) for i in range(len(self.terms)))

    def price(self, i: int, n_in: int, n_out: int) -> float:
        """Return the price of one term."""
        key = (i, n_in, n_out)
        if key not in self.prices:
            self.prices[key] = self.terms[i].price(n_in, n_out)
        return self.prices[key]


@dataclass(frozen=True)
class Terms:
    """A cost table of given terms."""

    costs: tuple[CostTerm, ...]
    widths: Mapping[str, tuple[int, ...]]
    unit: str = "us"

    def terms(self, graph: Graph) -> tuple[CostTerm, ...]:
        """Return the terms that were given."""
        return self.costs

    def candidates(self, graph: Graph) -> Mapping[str, tuple[int, ...]]:
        """Return the widths that were given."""
        return self.widths

    def predict(self, graph: Graph, plan: KeepPlan | None = None) -> float:
        """Return the sum of the terms."""
        kept = graph.kept(plan)
        return sum(term.price(term.n_in.at(kept), term.n_out.at(kept)) for term in self.costs)


@dataclass(frozen=True)
class Task:
    """What every method is asked."""

    graph: Graph
    table: CostTable
    scores: Mapping[str, Floats]  # descending
    budget: float
    cost: Fast
    gap: float = GAP

    @property
    def values(self) -> dict[str, Floats]:
        """Value of keeping the best w channels of each group."""
        return {name: np.concatenate([[0.0], np.cumsum(score)]) for name, score in self.scores.items()}

    def value(self, kept: Mapping[str, int]) -> float:
        """Return the summed scores of what is kept."""
        return sum(float(score[: kept[name]].sum()) for name, score in self.scores.items())


def exact(task: Task) -> tuple[Kept, Certificate]:
    return allocate_widths(task.graph, task.values, task.table, task.budget, gap=task.gap, time_limit_s=LIMIT_S)


def greedy(task: Task) -> tuple[Kept, None]:
    values, legal = task.values, task.table.candidates(task.graph)

    def network(kept: Mapping[str, int]) -> Network:
        return Network(kept, task.cost(kept), sum(float(values[name][kept[name]]) for name in values))

    def narrowed(now: Network, name: str, width: int) -> Network:
        return network({**now.kept, name: width})

    dense = network(task.graph.kept())
    *_, last = itertools.chain([dense], rounds(dense, legal, task.cost, narrowed, task.budget, NetAdapt()))
    return dict(last.kept), None


def marginal(task: Task) -> tuple[Kept, None]:
    dense = now = task.graph.kept()
    found, limit = dense, task.budget
    for step in range(1, STEPS + CORRECTIONS + 1):
        share = min(step / STEPS, 1.0)
        wanted = limit if share == 1 else float(np.exp(share * np.log(task.budget) + (1 - share) * np.log(task.cost(dense))))
        try:
            frozen = _frozen(task, now)
            now, _ = allocate_widths(task.graph, task.values, frozen, wanted)
        except BudgetError:  # at these frozen widths nothing fits: narrow all, and price anew
            now = now | {name: widths[0] for name, widths in frozen.widths.items()}
        true = task.cost(now)
        if true <= task.budget and (found == dense or task.value(now) > task.value(found)):
            found = now
        if share == 1:
            limit *= task.budget / true
    return found, None


def _frozen(task: Task, now: Kept) -> Terms:
    """Return the table in which only the group that a layer makes has a say in its price."""

    def alone(term: CostTerm, name: str) -> CostTerm:
        return CostTerm(
            term.name,
            Width(0),
            Width(0, ((name, 1),)),
            lambda _, n: term.price(term.n_in.at({**now, name: n}), term.n_out.at({**now, name: n})),
        )

    terms = []
    for term in task.cost.terms:
        makes = [name for name in term.n_out.groups if name in task.scores]
        if makes:
            terms.append(alone(term, makes[0]))
        else:
            price = term.price(term.n_in.at(now), term.n_out.at(now))
            terms.append(CostTerm(term.name, Width(0), Width(0), lambda *_, price=price: price))
    return Terms(tuple(terms), task.table.candidates(task.graph), task.table.unit)


def threshold(task: Task) -> tuple[Kept, None]:
    return threshold_widths(task.graph, task.table, task.budget, task.scores), None


def threshold_widths(
    graph: Graph, table: CostTable, budget: float, scores: Mapping[str, Floats], relative: bool = True
) -> Kept:
    """Return the widths that one threshold on all scores leaves, each over the mean of its group if `relative`."""
    legal = table.candidates(graph)
    shares = {name: score / (score.mean() if relative else 1.0) for name, score in scores.items()}
    ranked = np.sort(np.concatenate(list(shares.values())))[::-1]

    def widths(share: float) -> Kept:
        limit = ranked[min(round(share * len(ranked)), len(ranked) - 1)]
        return {name: nearest_width(legal[name], int((score >= limit).sum())) for name, score in shares.items()}

    return scaled_widths(graph, widths, table, budget)[0]


def uniform(task: Task) -> tuple[Kept, None]:
    return uniform_widths(task.graph, task.table, task.budget, task.scores), None


def uniform_widths(graph: Graph, table: CostTable, budget: float, scores: Mapping[str, Floats]) -> Kept:
    """Return the widths of one share for all groups that have scores."""
    legal = table.candidates(graph)

    def widths(share: float) -> Kept:
        return {name: nearest_width(legal[name], share * len(score)) for name, score in scores.items()}

    return scaled_widths(graph, widths, table, budget)[0]


METHODS: dict[str, Callable[[Task], tuple[Kept, Certificate | None]]] = {
    "exact": exact, "marginal": marginal, "greedy": greedy, "threshold": threshold, "uniform": uniform,
}  # fmt: skip


def drawn(graph: Graph, seed: int) -> dict[str, Floats]:
    """Draw scores: groups differ by a factor of about 1.6, channels of a group by about 2.7 either way."""
    rng = np.random.default_rng(seed)
    return {
        group.name: np.sort(np.exp(rng.normal(size=group.size) + 0.5 * rng.normal()))[::-1].astype(np.float64)
        for group in graph.prunable
    }


def compared(task: Task) -> Iterator[tuple[str, float, float, tuple[float, float], Certificate | None]]:
    """Yield method, value share (0 if over the budget), cost over budget, seconds (and of processor time), what was proved."""
    total = task.value(task.graph.kept())
    for name, method in METHODS.items():
        start, cpu = time.perf_counter(), time.process_time()
        kept, proof = method(task)
        seconds, cost = (time.perf_counter() - start, time.process_time() - cpu), task.cost(kept)
        value = task.value(kept) / total if cost <= task.budget * (1 + 1e-9) else 0.0
        yield name, value, cost / task.budget, seconds, proof


def zoo(options: argparse.Namespace) -> Iterator[Row]:
    for name in options.models:
        model = torchvision.models.get_model(name, weights=None).eval()
        example = torch.randn(1, 3, 224, 224)
        graph = trace(model, (example,))
        tables: dict[str, CostTable] = {"macs": MacTable()}
        if name in options.latency:
            target = load_target("cpu").replace(threads=options.threads)
            tables["latency"] = profile(model, example, target, graph=graph, cache_dir=options.cache)
        if name in options.estimate:
            tables["estimate"] = estimated(graph, load_target("jetson-orin"))
        for (metric, table), share, seed in itertools.product(tables.items(), options.budgets, range(options.seeds)):
            cost, scores = Fast(graph, table), drawn(graph, seed)
            task = Task(graph, table, scores, share * table.predict(graph), cost, GAPS.get(name, GAP))
            try:
                found = list(compared(task))
            except BudgetError as error:  # no method has a row for it
                print(f"{name:<16} {metric:<8} {share:.0%}: {error.message}", flush=True)
                continue
            for method, value, used, seconds, proof in found:
                row = {"model": name, "table": metric, "budget": share, "seed": seed, "method": method, "value": value}
                yield {**row, **proved(proof, task), "worst": None, "optimal": None, "used": used,
                       "seconds": seconds[0], "cpu_seconds": seconds[1]}  # fmt: skip


def proved(proof: Certificate | None, task: Task) -> Row:
    """Return what the certificate says: bound on the value share; its distance, by the value and by what is given up."""
    if proof is None or proof.bound is None:
        return dict.fromkeys(("bound", "gap", "gap_of_loss", "asked", "status"))
    total = task.value(task.graph.kept())
    lost = (proof.bound - proof.value) / max(total - proof.value, 1e-12)
    return {"bound": proof.bound / total, "gap": proof.gap, "gap_of_loss": lost, "asked": task.gap, "status": proof.status}


def small_net(rng: np.random.Generator) -> tuple[Graph, Terms]:
    """Draw a chain or a residual net of four groups whose layers cost stairs of uneven height in both widths."""
    names = [f"g{i}" for i in range(4)]
    graph = Graph((), tuple(Group(name, int(rng.integers(6, 25)), ()) for name in names), (), {}, {}, ())
    one = {name: Width(0, ((name, 1),)) for name in names}
    ends = [Width(3), *one.values(), Width(10)]
    pairs = list(itertools.pairwise(ends))
    if rng.random() < 0.5:
        trunk = one[names[0]]
        pairs = [
            (Width(3), trunk),
            *(pair for b in names[1:] for pair in ((trunk, one[b]), (one[b], trunk))),
            (trunk, Width(10)),
        ]
    terms = []
    for i, (a, b) in enumerate(pairs):
        step, rate, fixed = int(rng.choice([1, 2, 4])), float(rng.uniform(0.2, 2)), float(rng.uniform(0, 20))
        price = _stair(step, rate, fixed)
        terms.append(CostTerm(str(i), a, b, price))
    widths = {g.name: tuple(sorted({*range(2, g.size + 1, -(-g.size // 6)), g.size})) for g in graph.groups}
    return graph, Terms(tuple(terms), widths)


def _stair(step: int, rate: float, fixed: float) -> Callable[[int, int], float]:
    return lambda a, b: fixed + rate * (-(-a // step) * step) * (-(-b // step) * step)


def brute_force(task: Task) -> float:
    legal = task.table.candidates(task.graph)
    choices = (dict(zip(legal, widths, strict=True)) for widths in itertools.product(*legal.values()))
    return max(task.value(kept) for kept in choices if task.cost(kept) <= task.budget)


def random_nets(count: int, budgets: list[float]) -> Iterator[Row]:
    for share in budgets:
        ratios: dict[str, list[float]] = {name: [] for name in METHODS}
        for seed in range(count):
            rng = np.random.default_rng(seed)
            graph, table = small_net(rng)
            budget = share * table.predict(graph)
            task = Task(graph, table, drawn(graph, seed), budget, Fast(graph, table))
            if task.cost({name: widths[0] for name, widths in table.widths.items()}) > budget:
                continue
            best = brute_force(task) / task.value(graph.kept())
            for method, value, *_ in compared(task):
                ratios[method].append(value / best)
        for method, found in ratios.items():
            kept, optimal = np.array(found), float(np.mean(np.array(found) > 1 - 1e-9))
            row = {"model": "random", "table": f"{len(found)} nets", "budget": share, "seed": None, "method": method}
            worst = float(kept.min())
            nothing = dict.fromkeys(("bound", "gap", "gap_of_loss", "asked", "status"))
            yield {**row, "value": float(kept.mean()), **nothing, "worst": worst, "optimal": optimal, "used": None,
                   "seconds": None, "cpu_seconds": None}  # fmt: skip


def show(row: Row) -> None:
    bound = f"  bound {row['bound']:.4f}, gap {row['gap']:.3%} ({row['status']})" if row["bound"] else ""
    optimal = f"  optimal {row['optimal']:.0%}  worst {row['worst']:.3f}" if row["optimal"] is not None else ""
    timed = f"  {row['used']:.3f} of the budget  {row['seconds']:.1f} s" if row["used"] else ""
    print(f"{row['model']:<16} {row['table']:<8} {row['budget']:.0%} {row['method']:<10} value {row['value']:.4f}"
          f"{bound}{optimal}{timed}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--seeds", type=int, default=1, help="draws of the scores for each model")
    parser.add_argument("--nets", type=int, default=40, help="small random nets against brute force")
    parser.add_argument("--latency", nargs="*", default=["mobilenet_v2"], help="models whose latency table is measured as well")
    parser.add_argument("--threads", type=int, default=1, help="of those tables")
    parser.add_argument("--estimate", nargs="*", default=["densenet121"], help="models priced by the analytic estimate as well")
    parser.add_argument("--cache", type=Path, help="where kernel measurements are kept (default: the user's cache)")
    parser.add_argument("--dry", action="store_true", help="do not write benchmarks/results/allocator.csv")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for row in itertools.chain(random_nets(options.nets, options.budgets), zoo(options)):
        show(row)
        rows.append(row)
    if not options.dry:
        write(rows)


def write(rows: list[Row]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        for key, value in describe().items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    sys.exit(main())
