"""Optimal brain surgery on structures: which columns of which matrices can go, and what the rest must become.

For y = W x with second moment H = E[x x^T], removing the columns S and refitting the others exactly changes y by

    tr(W_S ((H^-1)_SS)^-1 W_S^T)                                                                                    (1)

(Hassibi and Stork 1993; for structures Kurtic et al., "ZipLM", 2023, equation 2). A unit is a set of columns in each of
the matrices that read it; the error of removing it is the sum over all of them. Units go in batches, after each of
which the inverses and weights of what is left are exact again (Meng et al., "OSSCAR", 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxprune.errors import NonFiniteError

#: Added to the diagonal of second moments, as a share of its mean.
DAMPING = 1e-3
#: Removals happen in about this many batches; small groups lose one unit at a time.
ROUNDS = 48


@dataclass(slots=True)
class Problem:
    """One matrix that reads a group.

    Attributes:
        weight: (out, in), float64.
        moment: E[x x^T], (in, in), float64; a row and column for a constant 1 may come last.
        units: which unit each column belongs to, -1 for none, (in,).
        scale: errors are multiplied by it: one over the energy of the output makes them relative.
    """

    weight: Tensor
    moment: Tensor
    units: npt.NDArray[np.int64]
    scale: float = 1.0


def damped(moment: Tensor, damping: float = DAMPING) -> Tensor:
    """Return the moment with the mean of its diagonal times `damping` added to it; inputs that are never used get 1."""
    diagonal = torch.diagonal(moment)
    result = moment + damping * diagonal.mean() * torch.eye(len(moment), dtype=moment.dtype)
    silent = diagonal == 0
    if bool(silent.any()):
        result[silent, silent] = 1.0 if not float(diagonal.mean()) else float(diagonal.mean())
    return result


def inverse(moment: Tensor) -> Tensor:
    """Return the inverse of a symmetric positive definite matrix; its diagonal is raised until it is one.

    Raises:
        NonFiniteError: no damping makes it one.
    """
    damping = 1e-8
    while damping < 1e3:
        factor, failed = torch.linalg.cholesky_ex(moment)
        if not int(failed):
            return torch.cholesky_inverse(factor)
        moment = moment + damping * torch.diagonal(moment).mean() * torch.eye(len(moment), dtype=moment.dtype)
        damping *= 10
    raise NonFiniteError("the second moments of activations hold NaN or infinite values, or are not positive")


class _Matrix:
    """A problem while its units go: weights and inverse moment of the columns that are left."""

    def __init__(self, problem: Problem, number: int) -> None:
        self.scale, self.number = problem.scale, number
        self.inverse = inverse(damped(problem.moment))
        self.weight = problem.weight.double()
        if self.weight.shape[1] < len(self.inverse):  # the constant 1 has no weight yet
            more = self.weight.new_zeros(len(self.weight), len(self.inverse) - self.weight.shape[1])
            self.weight = torch.cat([self.weight, more], 1)
        self.units = np.concatenate([problem.units, np.full(len(self.inverse) - len(problem.units), -1)])

    def errors(self) -> npt.NDArray[np.float64]:
        """What removing each unit alone would cost; infinity for units that are gone, zero for those not read here."""
        result = np.zeros(self.number)
        order = np.argsort(self.units, kind="stable")
        order = order[self.units[order] >= 0]
        units, starts, counts = np.unique(self.units[order], return_index=True, return_counts=True)
        for width in np.unique(counts):
            chosen = counts == width
            columns = torch.from_numpy(order[starts[chosen][:, None] + np.arange(width)])  # (units, width)
            weight = self.weight[:, columns].permute(1, 2, 0)  # (units, width, out)
            if width == 1:
                cost = weight[:, 0].square().sum(1) / torch.diagonal(self.inverse)[columns[:, 0]]
            else:
                blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
                cost = (weight * torch.linalg.solve(blocks, weight)).sum((1, 2))
            result[units[chosen]] = cost.numpy() * self.scale
        return result

    def remove(self, gone: npt.NDArray[np.int64]) -> float:
        """Remove units together and refit: the joint error (1)."""
        inside = np.isin(self.units, gone)
        if not inside.any():
            return 0.0
        cut, rest = torch.from_numpy(np.flatnonzero(inside)), torch.from_numpy(np.flatnonzero(~inside))
        block, across = self.inverse[cut][:, cut], self.inverse[cut][:, rest]
        factor, _ = torch.linalg.cholesky_ex(block)
        error = float((self.weight[:, cut].t() * torch.cholesky_solve(self.weight[:, cut].t(), factor)).sum())
        solved = torch.cholesky_solve(across, factor)
        self.weight = self.weight[:, rest] - self.weight[:, cut] @ solved
        self.inverse = self.inverse[rest][:, rest] - across.t() @ solved
        self.units = self.units[~inside]
        return error * self.scale


def removal(
    problems: Sequence[Problem], units: int, least: int = 0, rounds: int = ROUNDS
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Remove units one batch after the other, cheapest first.

    Returns the units in the order in which they went, and the total error after each; `least` of them stay.

    >>> w, x = torch.tensor([[1.0, 2.0, 0.5]]).double(), torch.eye(3).double()
    >>> order, errors = removal([Problem(w, x, np.arange(3))], 3)
    >>> order.tolist(), errors.round(2).tolist()
    ([2, 0, 1], [0.25, 1.25, 5.26])
    """
    matrices = [_Matrix(p, units) for p in problems]
    alive = np.ones(units, dtype=bool)
    order: list[int] = []
    errors: list[float] = []
    total = 0.0
    batch = max(1, (units - least) // rounds)
    while alive.sum() > least:
        cost = np.sum([m.errors() for m in matrices], axis=0)
        candidates = np.flatnonzero(alive)
        count = min(batch, len(candidates) - least)
        gone = candidates[np.argsort(cost[candidates], kind="stable")[:count]]
        joint = sum(m.remove(gone) for m in matrices)
        shares = cost[gone] / cost[gone].sum() if cost[gone].sum() > 0 else np.full(count, 1 / count)
        errors += (total + joint * np.cumsum(shares)).tolist()
        total += joint
        order += gone.tolist()
        alive[gone] = False
    return np.array(order, dtype=np.int64), np.array(errors)


def refit(weight: Tensor, moment: Tensor, cross: Tensor, damping: float = DAMPING) -> Tensor:
    """Return the weights that best map rows x to targets t: argmin |t - W x|^2 + damping |W - W_0|^2.

    Args:
        weight: W_0, (out, in): what weights are drawn to where data say nothing.
        moment: E[x x^T], (in, in).
        cross: E[t x^T], (out, in).
    """
    scale = damping * torch.diagonal(moment).mean().clamp_min(1e-30)
    system = moment + scale * torch.eye(len(moment), dtype=moment.dtype)
    factor, failed = torch.linalg.cholesky_ex(system)
    right = (cross + scale * weight).t()
    solved: Tensor = torch.linalg.lstsq(system, right)[0] if int(failed) else torch.cholesky_solve(right, factor)
    return solved.t()
