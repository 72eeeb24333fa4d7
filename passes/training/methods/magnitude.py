"""Magnitude, as masks that are final or soft, and a pattern that is there already."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fxprune.errors import RecipeError
from fxprune.passes.training.method import Kept, Method, mean, method
from fxprune.passes.training.pruning import Pruning
from fxprune.passes.training.units import Units


@method("magnitude")
class Magnitude(Method):
    """Units with small weights go: the mean of |w|^p over their entries.

    Han et al., "Learning both Weights and Connections" (2015); with a cubic ramp Zhu and Gupta (2017).

    Attributes:
        p: any positive number.
    """

    p: float = 1.0

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise RecipeError(f"training method 'magnitude': p is positive, not {self.p}")

    def scores(self, pruning: Pruning, units: Units) -> Tensor:
        """Return the scores of units."""
        return mean(units, units.reduce(lambda n: pruning.value(n).float().abs() ** self.p)) ** (1 / self.p)


@method("soft_mask")
class SoftMask(Magnitude):
    """Magnitude with masks that are chosen anew at every update, while what is masked goes on learning.

    Masked weights get the gradient that they would get without the mask, so that they come back where it has made them
    large. Humble et al., "Soft Masking for Cost-Constrained Channel Pruning" (SMCP, 2022), section 3.1.
    """

    through: ClassVar[bool] = True
    trains_masked: ClassVar[bool] = True


@method("pattern_lock")
class PatternLock(Method):
    """What is zero stays zero, and nothing else changes: Zafrir et al., "Prune Once for All" (2021).

    A unit is locked where all of its entries are zero. The pattern says what is looked at; there is no target.
    """

    targetless: ClassVar[bool] = True

    def keep(self, pruning: Pruning, share: float) -> Kept | None:
        """Return the units that are not zero."""
        return {u.name: (u.reduce(lambda n: pruning.value(n).abs()) > 0).cpu() for u in pruning.units}


@method("random")
class Random(Method):
    """Units go at random, once and for all: what any other method is to be better than."""

    comparable: ClassVar[bool] = True
    tensors: ClassVar[tuple[str, ...]] = ("_order",)

    def __post_init__(self) -> None:
        self._order: dict[str, Tensor] = {}

    def start(self, pruning: Pruning) -> None:
        """Draw an order."""
        self._order = {u.name: torch.rand(u.size, generator=pruning.generator) for u in pruning.units}

    def scores(self, pruning: Pruning, units: Units) -> Tensor:
        """Return the scores of units."""
        return self._order[units.name]
