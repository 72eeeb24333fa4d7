"""Orders of columns in which an N:M pattern keeps more of a matrix.

Which columns share a group of M is free where the axis may be permuted. Groups are improved two at a time: of all ways
to split the 2 M columns of two groups (35 for M = 4; for larger M all swaps of one column for another) the best is
taken. A round splits every group with one other, and a sweep of rounds meets every pair once; sweeps go on until no
pair gains. Then a few columns change places at random, and what does not lead to something better is taken back.
Pool and Yu, "Channel Permutations for N:M Sparsity" (2021), section 3, who take one pair after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Order = npt.NDArray[np.int64]

#: Values looked at in one step, which bounds memory.
_STEP = 1 << 19
#: Values looked at in all, which bounds time: about ten seconds.
_BUDGET = 6e8
#: How often columns change places at random.
_ESCAPES = 10


@dataclass(frozen=True, slots=True)
class Permutation:
    """An order of columns, and the sums of what the pattern keeps in the given order, in this one, and at best.

    Attributes:
        order: new position -> old position.
        plain, found: kept sums before and after.
        bound: the sum of the same share of the largest values, wherever they are.
    """

    order: Order
    plain: float
    found: float
    bound: float

    @property
    def efficacy(self) -> float:
        """The share of the gap between plain and unstructured that the order closes."""
        gap = self.bound - self.plain
        return (self.found - self.plain) / gap if gap > 0 else 1.0


def permutation(scores: Tensor, n: int, m: int, seed: int = 0, escapes: int = _ESCAPES) -> Permutation:
    """Return an order of the columns in which n of every m consecutive ones hold as much as possible.

    Args:
        scores: what each entry is worth, not negative, (rows, columns); m divides the columns.
        escapes: how often columns change places at random once no pair of groups gains.

    >>> scores = torch.tensor([[4.0, 3, 2, 1, 0, 0, 0, 0]])
    >>> found = permutation(scores, 2, 4)
    >>> found.plain, found.found, found.bound
    (7.0, 10.0, 10.0)
    """
    search = _Search(scores.float().t().contiguous(), n, m, np.random.default_rng(seed))
    plain = search.total()
    search.converge()
    search.escape(escapes)
    kept = scores.numel() * n // m
    bound = float(scores.double().flatten().topk(kept).values.sum())
    order = search.order.reshape(-1)
    found = kept_sum(scores[:, torch.from_numpy(order)], n, m)
    if found <= plain:
        return Permutation(np.arange(len(order)), plain, plain, bound)
    return Permutation(order, plain, found, bound)


def kept_sum(scores: Tensor, n: int, m: int) -> float:
    """Return the sum of the n largest of every m consecutive values of each row."""
    return float(scores.double().reshape(len(scores), -1, m).topk(n, dim=2).values.sum())


class _Search:
    """Groups of columns while they are improved; `order` is (groups, m)."""

    def __init__(self, columns: Tensor, n: int, m: int, rng: np.random.Generator) -> None:
        self.columns, self.n, self.m, self.rng = columns, n, m, rng
        self.order = np.arange(len(columns)).reshape(-1, m)
        self.splits = _splits(m)
        #: Subsets that the splits are made of, each once.
        self.subsets, parts = np.unique(self.splits.reshape(-1, m), axis=0, return_inverse=True)
        self.parts = torch.from_numpy(parts.reshape(-1, 2))
        self.kept = self._kept(self.columns[torch.from_numpy(self.order)])
        #: Pairs of groups that have not changed since they were looked at.
        self.known = np.eye(len(self.order), dtype=bool)
        self.spent = 0.0

    def total(self) -> float:
        return float(self.kept.sum())

    def _kept(self, groups: Tensor) -> Tensor:
        """What each group (groups, m, rows) keeps."""
        return groups.topk(self.n, dim=1).values.double().sum((1, 2))

    def _worth(self, columns: Tensor) -> Tensor:
        """What each subset of the columns (pairs, 2 m, rows) keeps: (pairs, subsets)."""
        if (self.n, self.m) == (2, 4):
            return self._two_of_four(columns)
        picked = columns[:, torch.from_numpy(self.subsets)]
        return picked.topk(self.n, dim=2).values.sum((2, 3), dtype=torch.float64)

    def _two_of_four(self, columns: Tensor) -> Tensor:
        """The two largest of a, b, c, d are a and b, or c and d, or the larger of each."""
        first, second = np.triu_indices(8, 1)
        place = np.zeros((8, 8), dtype=np.int64)
        place[first, second] = np.arange(len(first))
        sums = columns[:, first] + columns[:, second]
        largest = torch.maximum(columns[:, first], columns[:, second])
        left = torch.from_numpy(place[self.subsets[:, 0], self.subsets[:, 1]])
        right = torch.from_numpy(place[self.subsets[:, 2], self.subsets[:, 3]])
        best = torch.maximum(torch.maximum(sums[:, left], sums[:, right]), largest[:, left] + largest[:, right])
        return best.sum(2, dtype=torch.float64)

    # ------------------------------------------------------------------ improving
    def converge(self) -> None:
        """Split pairs anew until none gains, or the budget is spent."""
        while not self.known.all():
            for pairs in _tournament(len(self.order), self.rng):
                new = pairs[~self.known[pairs[:, 0], pairs[:, 1]]]
                if len(new):
                    self._improve(new)
                if self.spent >= _BUDGET:
                    return

    def _improve(self, pairs: Order) -> None:
        """Give each of the disjoint pairs of groups its best split."""
        size = len(self.subsets) * self.columns.shape[1]
        for some in np.array_split(pairs, min(len(pairs), len(pairs) * size // _STEP + 1)):
            both = self.order[some].reshape(len(some), -1)
            self.spent += len(some) * size
            worth = self._worth(self.columns[torch.from_numpy(both)])
            best, which = worth[:, self.parts].sum(2).max(1)
            self.known[some[:, 0], some[:, 1]] = self.known[some[:, 1], some[:, 0]] = True
            gain = (best - self.kept[some].sum(1)).numpy()
            won = np.flatnonzero(gain > 1e-6 * np.abs(best.numpy()))
            if not len(won):
                continue
            split = self.splits[which.numpy()[won]]
            changed = some[won]
            self.order[changed] = both[won][np.arange(len(won))[:, None, None], split]
            self._touch(changed.reshape(-1))

    def _touch(self, groups: Order) -> None:
        self.kept[groups] = self._kept(self.columns[torch.from_numpy(self.order[groups])])
        self.known[groups] = self.known[:, groups] = False
        np.fill_diagonal(self.known, True)

    def escape(self, times: int) -> None:
        """Let a few columns change places at random, and keep what comes of it if it is better."""
        if len(self.order) < 2:
            return
        for _ in range(times):
            if self.spent >= _BUDGET:
                return
            before = self.order.copy(), self.kept.clone(), self.known.copy()
            groups = self.rng.choice(len(self.order), 2, replace=False)
            here, there = self.rng.integers(self.m, size=2)
            self.order[groups[0], here], self.order[groups[1], there] = (
                self.order[groups[1], there],
                self.order[groups[0], here],
            )
            self._touch(groups)
            self.known[groups[0], groups[1]] = self.known[groups[1], groups[0]] = True  # it would be undone at once
            self.converge()
            if float(self.kept.sum()) < float(before[1].sum()):
                self.order, self.kept, self.known = before


def _splits(m: int) -> Order:
    """Ways to split 2 m columns into two groups: (ways, 2, m)."""
    everything = set(range(2 * m))
    if m <= 4:
        first = [(0, *rest) for rest in itertools.combinations(range(1, 2 * m), m - 1)]
    else:
        swaps = itertools.product(range(m), range(m, 2 * m))
        first = [tuple(range(m)), *(tuple(sorted(set(range(m)) - {a} | {b})) for a, b in swaps)]
    return np.array([(one, tuple(sorted(everything - set(one)))) for one in first])


def _tournament(groups: int, rng: np.random.Generator) -> Iterator[Order]:
    """Rounds of disjoint pairs in which every group meets every other one once (the circle method)."""
    names = list(rng.permutation(groups)) + [-1] * (groups % 2)
    fixed, ring = names[0], names[1:]
    for _ in range(len(ring)):
        table = [fixed, *ring]
        half = len(table) // 2
        pairs = np.array([table[:half], table[half:][::-1]]).T
        yield pairs[(pairs >= 0).all(1)]
        ring = ring[1:] + ring[:1]
