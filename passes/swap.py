"""Swap search: units that were removed come back for others, as long as the refitted layers lose less.

Removing units one after the other never takes one back. For a given number of units kept, the units that cost the
least are exchanged for those of the removed ones that gain the most, t at a time; what is not better is undone and t
halved. Meng et al., "OSSCAR" (2024), algorithm 2, on all matrices that read a group at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxprune.passes.obs import Problem, damped, inverse

Units = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

#: Exchanges that are tried at most.
ROUNDS = 20


class _Support:
    """One matrix, for any units kept: min over W_K of tr((W - W_K) H (W - W_K)^T)."""

    def __init__(self, problem: Problem, number: int) -> None:
        self.scale, self.number = problem.scale, number
        self.moment = damped(problem.moment)
        weight = problem.weight.double()
        more = len(self.moment) - weight.shape[1]
        self.weight = torch.cat([weight, weight.new_zeros(len(weight), more)], 1)
        self.units = np.concatenate([problem.units, np.full(more, -1)])
        self.cross = self.moment @ self.weight.t()  # (in, out)
        self.whole = float((self.weight.t() * self.cross).sum())

    def solve(self, kept: npt.NDArray[np.bool_]) -> None:
        """Refit the columns of the units kept."""
        inside = (self.units < 0) | kept[self.units]
        self.own = torch.from_numpy(np.flatnonzero(inside))
        self.gone = torch.from_numpy(np.flatnonzero(~inside))
        self.inverse = inverse(self.moment[self.own][:, self.own])
        self.fitted = self.inverse @ self.cross[self.own]  # (kept, out)

    def error(self) -> float:
        """What is lost."""
        return (self.whole - float((self.fitted * self.cross[self.own]).sum())) * self.scale

    def costs(self) -> Floats:
        """What each kept unit would cost more."""
        return self._by_unit(self.own, self.fitted, self.inverse)

    def gains(self) -> Floats:
        """What each removed unit would win back."""
        across = self.moment[self.gone][:, self.own]
        left = self.cross[self.gone] - across @ self.fitted
        spread = self.moment[self.gone][:, self.gone] - across @ self.inverse @ across.t()
        return self._by_unit(self.gone, left, spread)

    def _by_unit(self, columns: Tensor, values: Tensor, matrix: Tensor) -> Floats:
        """tr(v_u^T M_uu^-1 v_u) for each unit u among some columns."""
        result = np.zeros(self.number)
        units = self.units[columns.numpy()]
        order = np.argsort(units, kind="stable")
        order = order[units[order] >= 0]
        found, starts, counts = np.unique(units[order], return_index=True, return_counts=True)
        for width in np.unique(counts):
            chosen = counts == width
            places = torch.from_numpy(order[starts[chosen][:, None] + np.arange(width)])
            blocks = matrix[places[:, :, None], places[:, None, :]]
            blocks = blocks + 1e-12 * torch.diagonal(matrix).abs().mean() * torch.eye(int(width), dtype=blocks.dtype)
            some = values[places]  # (units, width, out)
            result[found[chosen]] = (some * torch.linalg.solve(blocks, some)).sum((1, 2)).numpy() * self.scale
        return result


def swapped(problems: Sequence[Problem], kept: Units, units: int, rounds: int = ROUNDS) -> Units:
    """Return as many units, ascending, that lose less than those given, or these.

    Args:
        problems: the matrices that read the group.
        kept: units to begin with.
        units: of the group.
        rounds: exchanges that are tried at most.

    >>> x = torch.tensor([[2.0, 1.9, 0.0], [1.9, 2.0, 0.0], [0.0, 0.0, 1.0]]).double()  # the first two are nearly one
    >>> swapped([Problem(torch.ones(1, 3).double(), x, np.arange(3))], np.array([0, 1]), 3).tolist()
    [1, 2]
    """
    if not problems or len(kept) in (0, units):
        return np.sort(kept)
    supports = [_Support(p, units) for p in problems]
    best = np.zeros(units, dtype=bool)
    best[kept] = True

    def loss(at: npt.NDArray[np.bool_]) -> float:
        for s in supports:
            s.solve(at)
        return sum(s.error() for s in supports)

    least = loss(best)
    most = min(len(kept), units - len(kept))
    count = max(1, min(most, units // 16))
    for _ in range(rounds):
        costs = np.where(best, np.sum([s.costs() for s in supports], axis=0), np.inf)
        trial = best.copy()
        trial[np.argsort(costs, kind="stable")[:count]] = False
        loss(trial)
        gains = np.where(trial, -np.inf, np.sum([s.gains() for s in supports], axis=0))
        trial[np.argsort(-gains, kind="stable")[:count]] = True
        value = loss(trial)
        if value < least * (1 - 1e-6) and not np.array_equal(trial, best):
            best, least = trial, value
            continue
        if count == 1:
            break
        count //= 2
        loss(best)
    return np.flatnonzero(best)
