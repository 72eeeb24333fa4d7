"""RigL: sparse from the first step to the last; small weights go, and those come whose gradients are large."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fxprune.errors import RecipeError
from fxprune.passes.training.method import Kept, Method, mean, method, of_choice
from fxprune.passes.training.pruning import Pruning
from fxprune.passes.training.units import Units, WeightUnits


@method("rigl")
class RigL(Method):
    """Drop the smallest |w|, grow the largest |dL/dw| among what is masked, the same number in each layer.

    Evci et al., "Rigging the Lottery" (2020), algorithm 1. The target holds from the schedule's start; at each of its
    updates a share of each layer's kept units changes, which falls to zero along a cosine until its end. What grows
    starts at zero.

    Attributes:
        fraction: of the kept units that changes at first.
        distribution: "uniform", "erk" (Erdos-Renyi-kernel: the density of a layer is proportional to the sum of its
            dimensions over their product) or "magnitude" (what a global order by |w| leaves).
        initial: "magnitude" or "random": what stays at first.
    """

    fraction: float = 0.3
    distribution: str = "erk"
    initial: str = "magnitude"
    through: ClassVar[bool] = True
    zeroes: ClassVar[bool] = True
    patterns: ClassVar[str] = "blocks"
    tensors: ClassVar[tuple[str, ...]] = ("_gradients",)

    def __post_init__(self) -> None:
        of_choice("rigl: distribution", self.distribution, ("uniform", "erk", "magnitude"))
        of_choice("rigl: initial", self.initial, ("magnitude", "random"))
        if not 0 < self.fraction < 1:
            raise RecipeError(f"rigl: fraction is between 0 and 1, not {self.fraction}")
        self._gradients: dict[str, Tensor] = {}

    def before_step(self, pruning: Pruning) -> None:
        """Keep the gradients that the next update will look at."""
        self._gradients = {}
        if pruning.schedule.updates(pruning.step + 1):
            for u in pruning.units:
                self._gradients[u.name] = mean(u, u.reduce(lambda n: pruning.gradient(n).abs())).cpu()

    def scores(self, pruning: Pruning, units: Units) -> Tensor:
        """Return the mean of |w|."""
        return mean(units, units.reduce(lambda n: pruning.value(n).abs()))

    def keep(self, pruning: Pruning, share: float) -> Kept | None:
        """Return what stays after some units have been dropped and as many have grown."""
        schedule = pruning.schedule
        if all(bool(kept.all()) for kept in pruning.kept.values()):
            return self._first(pruning)
        done = (pruning.step - schedule.start) / max(1, schedule.end - schedule.start)
        share = self.fraction / 2 * (1 + math.cos(math.pi * done))
        result = {}
        for u in pruning.units:
            kept = pruning.kept[u.name].clone()
            count = min(int(share * int(kept.sum())), int((~kept).sum()))
            if count:
                size = torch.where(kept, self.scores(pruning, u).cpu(), torch.inf)
                grown = torch.where(kept, -torch.inf, self._gradients[u.name])
                kept[torch.argsort(size, stable=True)[:count]] = False
                kept[torch.argsort(-grown, stable=True)[:count]] = True
            result[u.name] = kept
        return result

    def _first(self, pruning: Pruning) -> Kept:
        """What stays at first: the density of each layer, and its units."""
        if self.distribution == "magnitude" and self.initial == "magnitude":
            return pruning.best(pruning.target, last=True)
        counts = self._counts(pruning)
        result = {}
        for u in pruning.units:
            order = self.scores(pruning, u).cpu() if self.initial == "magnitude" else pruning.random(u.size)
            kept = torch.zeros(u.size, dtype=torch.bool)
            kept[torch.argsort(-order, stable=True)[: counts[u.name]]] = True
            result[u.name] = kept
        return result

    def _counts(self, pruning: Pruning) -> dict[str, int]:
        """How many units of each layer stay."""
        density = 1 - pruning.target
        if self.distribution == "magnitude":
            return {n: int(k.sum()) for n, k in pruning.best(pruning.target, last=True).items()}
        if self.distribution == "uniform":
            return {u.name: round(density * u.size) for u in pruning.units}
        shapes = {u.name: u.shape if isinstance(u, WeightUnits) else (u.size,) for u in pruning.units}
        raw = {n: sum(s) / math.prod(s) for n, s in shapes.items()}
        sizes = {u.name: u.size for u in pruning.units}
        entries = {u.name: u.entries for u in pruning.units}
        total = density * sum(sizes[n] * entries[n] for n in sizes)
        dense: set[str] = set()
        while True:  # a layer whose density would be above 1 is dense, and the others share the rest
            left = total - sum(sizes[n] * entries[n] for n in dense)
            factor = left / max(sum(raw[n] * sizes[n] * entries[n] for n in sizes if n not in dense), 1e-300)
            over = {n for n in sizes if n not in dense and factor * raw[n] > 1}
            if not over:
                break
            dense |= over
        counts = {n: sizes[n] if n in dense else round(factor * raw[n] * sizes[n]) for n in sizes}
        return _exact(counts, sizes, entries, total)


def _exact(counts: dict[str, int], sizes: dict[str, int], entries: dict[str, float], total: float) -> dict[str, int]:
    """Rounding made good in the largest layers."""
    for name in sorted(sizes, key=lambda n: -sizes[n]):
        missing = total - sum(counts[n] * entries[n] for n in counts)
        more = round(missing / entries[name])
        counts[name] = min(max(counts[name] + more, 0), sizes[name])
    return counts
