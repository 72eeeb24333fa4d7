"""The registry of ways to choose which entries of a weight stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.passes.obs import DAMPING
from fxprune.passes.patterns.pattern import Pattern
from fxprune.registry import Registry


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix that is to get a pattern.

    Attributes:
        matrix: what it would be without, float64 (out, columns); the last `free` columns stay whole (a bias).
        moment: E[x x^T] of its inputs, float64 (columns, columns); None where there are no data.
        pattern: of the other columns.
        free: 0 or 1.
        damping: added to the moment's diagonal, as a share of its mean.
    """

    matrix: Tensor
    moment: Tensor | None
    pattern: Pattern
    free: int = 0
    damping: float = DAMPING

    @property
    def width(self) -> int:
        """How many columns get the pattern."""
        return self.matrix.shape[1] - self.free

    def known(self) -> Tensor:
        """Return the moment, damped, for methods that declare that they need data."""
        assert self.moment is not None
        size = len(self.moment)
        diagonal = torch.diagonal(self.moment)
        system = self.moment + self.damping * diagonal.mean() * torch.eye(size, dtype=self.moment.dtype)
        silent = torch.diagonal(system) == 0
        system[silent, silent] = 1.0
        return system

    def whole(self, mask: Tensor) -> Tensor:
        """Return a mask of the patterned columns with the free ones behind them."""
        return torch.cat([mask, mask.new_ones(len(mask), self.free)], 1) if self.free else mask

    def error(self, matrix: Tensor) -> float:
        """Return what another matrix's results lose, as a share of the energy of this one's."""
        if self.moment is None:
            return float((matrix - self.matrix).square().sum() / self.matrix.square().sum().clamp_min(1e-300))
        lost, energy = matrix - self.matrix, (self.matrix @ self.moment * self.matrix).sum()
        return float((lost @ self.moment * lost).sum() / energy.clamp_min(1e-300))


@dataclass(frozen=True, slots=True)
class Method:
    """A way to choose.

    Attributes:
        choose: weight -> (matrix with the pattern, mask of the patterned columns).
        data: whether it needs the inputs' second moment.
        refit: whether what stays is refitted exactly afterwards where nothing else is asked for.
    """

    choose: Callable[[Weight], tuple[Tensor, Tensor]]
    data: bool
    refit: bool = True


def lost_share(weight: Tensor, mask: Tensor) -> float:
    """Return the share of a weight's squares that a mask takes away.

    >>> lost_share(torch.tensor([1.0, 3.0]), torch.tensor([False, True]))
    0.1
    """
    squares = weight.detach().double().square()
    return float((squares * ~mask.to(weight.device)).sum() / squares.sum().clamp_min(1e-300))


METHODS: Registry[Method] = Registry("sparsity method")


Choose = Callable[[Weight], tuple[Tensor, Tensor]]


def method(name: str, *, data: bool, refit: bool = True) -> Callable[[Choose], Choose]:
    """Register a function from a `Weight` to (matrix, mask) as a method."""

    def decorate(choose: Choose) -> Choose:
        METHODS.add(name, Method(choose, data, refit))
        return choose

    return decorate
