"""Write "one width per group, priced layer by layer" as a mixed-integer linear program, and solve it.

Every candidate width of a group is a binary. A *selector* is a set of variables of which exactly one is 1: the width that was
chosen. The price of a layer whose two ends depend on two selectors is a matrix; one continuous variable for each of its
entries, tied to the selectors by its row and column sums, is then exactly the product of the two (the local polytope of
pairwise models). A width made of several groups (concat, split) is folded from left to right: the pairs of (total so far,
next group) sum up to the selector of the new total, which is linear and exact, and layers that read the same beginning of a
concat share it. Where there are too many totals for that (DenseNet), the total enters as a number: for each choice of the
other end the price is replaced by its lower convex envelope over the reachable totals. That is exact for prices that are
affine or convex in the total (MACs, parameters) and otherwise never too high, so that the bound stays valid; `Program.exact`
says which of both it was.

A layer that may have 2:4 weights adds a binary "it has", which costs the loss of its mask, and one continuous variable for each
pair of widths at which that saves something: they sum up to the binary, and each is at most the variable of its pair, so that
exactly the saving of the chosen pair is taken off the cost.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from math import gcd

import numpy as np

from deploypipe.allocation.hull import lower_hull, touches
from deploypipe.allocation.linear import STATUS, Floats, Ints, Linear, Selector, Solution
from deploypipe.cost import CostTerm, Price
from deploypipe.types import Width

Key = tuple[tuple[str, int], ...]  # groups with their slots per channel: what a total is made of
End = tuple[Key, int, int]  # a width: (key, factor, const) stands for const + factor * total(key)

MAX_PAIRS = 4096  # entries of a price matrix with a total on one side, above which the envelope is used
COST_SCALE = 1e3  # the budget row is scaled to this, which puts the solver's tolerance of 1e-6 at 1e-9 of the budget
LOSS_SCALE = 1e2


class Program(Linear):
    """Variables, rows and prices of one allocation.

    Args:
        candidates: Group -> at least two widths to choose from, ascending. Groups that are not named stay whole.
        sizes: Size of every group.
        terms: What the model costs.
        masks: Layer (name of a term) -> loss of giving it 2:4 weights, for those that may have them.
    """

    def __init__(
        self,
        candidates: Mapping[str, Sequence[int]],
        sizes: Mapping[str, int],
        terms: Sequence[CostTerm],
        masks: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.exact = True
        self.constant = 0.0
        self._costs: list[tuple[Ints, Floats]] = []
        self._sizes = sizes
        self._order = {name: i for i, name in enumerate(sizes)}
        self._selectors: dict[Key, Selector] = {}
        self._pairings: dict[tuple[Key, Key], Ints] = {}
        self.groups: dict[str, Selector] = {}
        for name, widths in candidates.items():
            columns = self._variables(len(widths), integer=True)
            self._row(columns, np.ones(len(widths)), 1, 1)
            self.groups[name] = self._selectors[(name, 1),] = Selector(np.asarray(widths, np.int64), columns)
        self._price(terms)
        self.masks: dict[str, tuple[np.int64, float]] = {}
        for term in terms:
            if masks and term.name in masks and term.two_four:
                self._offer(term, term.two_four, masks[term.name])

    def imply(self, name: str, other: str) -> None:
        """Add the row "where `name` has its least width, so has `other`"."""
        columns = np.array([self.groups[name].columns[0], self.groups[other].columns[0]])
        self._row(columns, np.array([1.0, -1.0]), -np.inf, 0.0)

    def solve(
        self, losses: Mapping[str, Floats] | None, budget: float, gap: float, time_limit_s: float, beat: float = np.inf
    ) -> Solution:
        """Minimise the summed loss within the budget; without losses, minimise the cost.

        Args:
            losses: Group -> loss of each of its candidate widths.
            budget: Upper limit of the cost.
            gap: Relative gap of the objective at which the solver may stop.
            time_limit_s: Seconds after which it returns the best it has.
            beat: The most that may be lost; "infeasible" then says that nothing within the budget loses so little.
        """
        if not self._n:
            return Solution({}, self.constant, "optimal") if losses is None else Solution(None, 0.0, "infeasible")
        cost = np.zeros(self._n)
        for columns, prices in self._costs:
            np.add.at(cost, columns, prices)
        objective = cost if losses is None else np.zeros(self._n)
        for name, loss in (losses or {}).items():
            objective[self.groups[name].columns] = loss
        if losses is not None:
            for column, lost in self.masks.values():
                objective[column] = lost
        factor = LOSS_SCALE / max(float(np.abs(objective).max(initial=0.0)), 1e-300)
        scale = COST_SCALE / max(abs(budget), float(np.abs(cost).max(initial=0.0)) * 1e-3, 1e-300)
        rows = [] if losses is None else [(cost * scale, (budget - self.constant) * scale), (objective * factor, beat * factor)]
        result = self._minimise(objective * factor, rows, gap, time_limit_s)
        status = STATUS[result.status]
        if status == "unsolved":
            return Solution(None, -np.inf, status)
        bound = getattr(result, "mip_dual_bound", None)
        bound = -np.inf if bound is None else bound / factor + (self.constant if losses is None else 0.0)
        if result.x is None:
            return Solution(None, bound, status)
        masked = frozenset(name for name, (column, _) in self.masks.items() if result.x[column] > 0.5)
        return Solution(self._read(result.x), bound, status, masked)

    def _read(self, x: Floats) -> dict[str, int]:
        return {name: int(s.totals[int(np.argmax(x[s.columns]))]) for name, s in self.groups.items()}

    # --- widths

    def end(self, width: Width) -> End:
        """Return (key, factor, const) such that the width is `const + factor * total(key)`; the key may be empty."""
        const = width.const + sum(slots * self._sizes[name] for name, slots in width.parts if name not in self.groups)
        parts = [(name, slots) for name, slots in width.parts if name in self.groups]
        parts.sort(key=lambda part: self._order[part[0]])  # a concat's beginning is a beginning of the next concat
        factor = reduce(gcd, (slots for _, slots in parts), 0)
        return tuple((name, slots // factor) for name, slots in parts), factor, const

    def totals(self, key: Key) -> Ints:
        """Return every total that the groups of `key` can reach, ascending."""
        totals = np.zeros(1, np.int64)
        for name, slots in key:
            totals = np.unique(totals[:, None] + slots * self.groups[name].totals[None, :])
        return totals

    def _selector(self, key: Key) -> Selector:
        if key not in self._selectors:
            *head, (name, slots) = key
            own = self.groups[name]
            if not head:
                self._selectors[key] = Selector(own.totals * slots, own.columns)
            else:
                self._selectors[key] = self._sum(self._selector(tuple(head)), Selector(own.totals * slots, own.columns))
        return self._selectors[key]

    def _sum(self, left: Selector, right: Selector) -> Selector:
        pairs = self._pairs(left.columns, right.columns)
        totals, index = np.unique(left.totals[:, None] + right.totals[None, :], return_inverse=True)
        index = index.reshape(pairs.shape)
        columns = self._variables(len(totals))
        for k, column in enumerate(columns):
            self._equal(column, pairs[index == k])
        return Selector(totals, columns)

    # --- 2:4 weights

    def _offer(self, term: CostTerm, two_four: Price, loss: float) -> None:
        """Let the layer have 2:4 weights, if that saves anything; not behind a concat of too many widths to tell apart."""
        ends = self.end(term.n_in), self.end(term.n_out)
        keys = list(dict.fromkeys(key for key, _, _ in ends if key))
        totals = [self.totals(key) for key in keys]
        if any(len(key) > 1 for key in keys) and np.prod(list(map(len, totals))) > MAX_PAIRS:
            return
        savings = np.zeros(list(map(len, totals)))
        for at in np.ndindex(savings.shape):
            chosen = {key: int(totals[axis][at[axis]]) for axis, key in enumerate(keys)}
            n_in, n_out = (const + factor * chosen.get(key, 0) for key, factor, const in ends)
            savings[at] = term.price(n_in, n_out) - two_four(n_in, n_out)
        used = np.argwhere(savings > 0)
        if not len(used):
            return
        (mask,) = self._variables(1, integer=True)
        shares = self._variables(len(used))
        self.masks[term.name] = (mask, loss)
        self._costs.append((shares, -np.atleast_1d(savings[tuple(used.T)])))
        self._equal(mask, shares)
        if keys:
            for share, pair in zip(shares, self._chosen(keys)[tuple(used.T)], strict=True):
                self._row(np.array([share, pair]), np.array([1.0, -1.0]), -np.inf, 0)

    def _chosen(self, keys: Sequence[Key]) -> Ints:
        """Return the variables that say which width, or which pair of two widths, is chosen; an axis for each key."""
        if len(keys) == 1:
            return self._selector(keys[0]).columns
        left, right = sorted(keys)
        pairs = self._paired(left, right)
        return pairs if keys[0] == left else pairs.T

    # --- prices

    def _price(self, terms: Sequence[CostTerm]) -> None:
        single: dict[Key, Floats] = {}
        double: dict[tuple[Key, Key], Floats] = {}
        for term in terms:
            a, b = self.end(term.n_in), self.end(term.n_out)
            if a[0] and b[0] and a[0] != b[0]:
                keys, matrix = self._matrix(term.price, a, b)
                double[keys] = double[keys] + matrix if keys in double else matrix
            elif key := a[0] or b[0]:
                vector = self._vector(term.price, key, a, b)
                single[key] = single[key] + vector if key in single else vector
            else:
                self.constant += term.price(a[2], b[2])
        for key, prices in single.items():
            self._price_single(key, prices)
        for (left, right), prices in double.items():
            self._price_double(left, right, prices)

    def _vector(self, price: Price, key: Key, a: End, b: End) -> Floats:
        totals = self.totals(key).tolist()
        return np.array([price(a[2] + a[1] * t, b[2] + b[1] * t) for t in totals], dtype=np.float64)

    def _matrix(self, price: Price, a: End, b: End) -> tuple[tuple[Key, Key], Floats]:
        ins = (a[2] + a[1] * self.totals(a[0])).tolist()
        outs = (b[2] + b[1] * self.totals(b[0])).tolist()
        matrix = np.array([[price(i, o) for o in outs] for i in ins], dtype=np.float64)
        return ((a[0], b[0]), matrix) if a[0] <= b[0] else ((b[0], a[0]), matrix.T)

    def _price_single(self, key: Key, prices: Floats) -> None:
        hulls = [lower_hull(self.totals(key), prices)]
        if len(key) == 1 or not (touches(self.totals(key), hulls, prices[:, None]) or len(prices) > MAX_PAIRS // 4):
            self._costs.append((self._selector(key).columns, prices))
        else:
            self._envelope(key, None, hulls, prices[:, None])

    def _price_double(self, left: Key, right: Key, prices: Floats) -> None:
        sides = [(left, right, prices), (right, left, prices.T)]
        several = [side for side in sides if len(side[0]) > 1]
        hulls = [[lower_hull(self.totals(key), column) for column in matrix.T] for key, _, matrix in several]
        for (key, other, matrix), hull in zip(several, hulls, strict=True):
            if touches(self.totals(key), hull, matrix):
                return self._envelope(key, self._selector(other), hull, matrix)
        if several and prices.size > MAX_PAIRS:
            widest = max(range(len(several)), key=lambda i: len(several[i][2]))
            key, other, matrix = several[widest]
            return self._envelope(key, self._selector(other), hulls[widest], matrix)
        return self._costs.append((self._paired(left, right).ravel(), prices.ravel()))

    def _paired(self, left: Key, right: Key) -> Ints:
        """Return the variables of the pairs of two widths, one axis for each."""
        if (left, right) not in self._pairings:
            self._pairings[left, right] = self._pairs(self._selector(left).columns, self._selector(right).columns)
        return self._pairings[left, right]

    def _envelope(self, key: Key, other: Selector | None, hulls: list[Ints], prices: Floats) -> None:
        """Price `key` as a number: one share of it for each choice of the other end, and the envelope over each share.

        Where all envelopes are lines the shares are those of each group by itself: one of the sum could give to one choice what
        is one group's least and another's most, and the bound would be lower.
        """
        totals = self.totals(key)
        self.exact = self.exact and touches(totals, hulls, prices)
        if other is not None and all(len(hull) == 2 for hull in hulls):
            slopes = (prices[-1] - prices[0]) / (totals[-1] - totals[0])
            self._costs.append((other.columns, prices[0] - slopes * totals[0]))
            self._costs.extend((self._shares((part,), other, len(hulls)), slopes) for part in key)
            return
        for j, share in enumerate(self._shares(key, other, len(hulls))):
            chosen = np.empty(0, np.int64) if other is None else other.columns[j : j + 1]
            self._pieces(share, chosen, totals[hulls[j]], prices[hulls[j], j])

    def _shares(self, key: Key, other: Selector | None, n: int) -> Ints:
        """Return n variables that sum up to the total of `key`: all of it at the choice of the other end, if there is one."""
        totals = [slots * self.groups[name].totals.astype(float) for name, slots in key]
        least, most = (float(sum(widths[end] for widths in totals)) for end in (0, -1))
        shares = self._variables(n, upper=most)
        columns = np.concatenate([*(self.groups[name].columns for name, _ in key), shares])
        self._row(columns, np.concatenate([*(-widths for widths in totals), np.ones(n)]), 0, 0)
        if other is not None:
            for chosen, share in zip(other.columns, shares, strict=True):
                self._row(np.array([chosen, share]), np.array([-least, 1.0]), 0, np.inf)
                self._row(np.array([chosen, share]), np.array([-most, 1.0]), -np.inf, 0)
        return shares

    def _pieces(self, share: np.int64, chosen: Ints, x: Ints, y: Floats) -> None:
        """Price one share by the affine pieces between the points (x, y); `chosen` is empty when it is always chosen."""
        slopes = np.diff(y) / np.diff(x)
        heights = y[:-1] - slopes * x[:-1]
        if len(slopes) == 1:
            self._costs.append((np.append(chosen, share), np.array([*heights[: len(chosen)], *slopes])))
            self.constant += 0.0 if len(chosen) else float(heights[0])
            return
        cost = self._variables(1, -np.inf, np.inf)
        self._costs.append((cost, np.ones(1)))
        for slope, height in zip(slopes, heights, strict=True):
            columns = np.concatenate([cost, [share], chosen])
            free = 0.0 if len(chosen) else height
            self._row(columns, np.array([1.0, -slope, *([-height] * len(chosen))]), free, np.inf)
