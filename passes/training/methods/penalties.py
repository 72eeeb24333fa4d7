"""Penalties on units, added to gradients: what is small becomes smaller, until it goes without being missed."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fxprune.errors import RecipeError
from fxprune.passes.criteria.bn_scale import scales
from fxprune.passes.statistics import Statistics
from fxprune.passes.training.method import Kept, Method, mean, method, of_choice
from fxprune.passes.training.pruning import Pruning
from fxprune.passes.training.units import AxisUnits, Units


class _Penalty(Method):
    """A penalty, and magnitude decides. Without a ramp that says otherwise nothing goes before the last update."""

    patterns: ClassVar[str] = "any"

    def penalise(self, pruning: Pruning) -> None:
        """Add the penalty's gradient."""
        raise NotImplementedError

    def before_step(self, pruning: Pruning) -> None:
        """Add the penalty's gradient, as long as anything is still to go."""
        if not pruning.done:
            self.penalise(pruning)

    def _norms(self, pruning: Pruning, units: Units) -> Tensor:
        """The L2 norm of each unit."""
        return units.reduce(lambda n: pruning.value(n).float() ** 2).sqrt()

    def scores(self, pruning: Pruning, units: Units) -> Tensor:
        """Return the root mean square of the weights of each unit."""
        return mean(units, units.reduce(lambda n: pruning.value(n).float() ** 2)).sqrt()

    def keep(self, pruning: Pruning, share: float) -> Kept | None:
        """Return everything, until the end of the schedule."""
        return None if pruning.step >= pruning.schedule.end else everything(pruning)

    def _decay(self, pruning: Pruning, units: Units, strength: Tensor) -> None:
        """Add strength * w to the gradients, with one strength for each unit."""
        for name, values in units.spread(strength).items():
            pruning.subject.weights.push(name, values.to(torch.float32) * pruning.value(name))


@method("group_lasso")
class GroupLasso(_Penalty):
    """The group lasso: reg * sqrt(entries) * ||unit||, whose gradient pulls every unit with the same force to zero.

    Wen et al., "Learning Structured Sparsity" (2016), equation 2; the factor is Yuan and Lin's (2006). Rows, columns,
    blocks or channels, as the pattern says; for single entries it is the L1 norm.

    Attributes:
        reg: the strength.
        scaled: with the factor sqrt(entries).
    """

    reg: float = 1e-4
    scaled: bool = True

    def penalise(self, pruning: Pruning) -> None:
        """Add the gradient of the penalty: reg * w / ||unit||."""
        for u in pruning.units:
            factor = u.entries**0.5 if self.scaled else 1.0
            self._decay(pruning, u, self.reg * factor / self._norms(pruning, u).clamp_min(1e-12))


@method("slimming")
class Slimming(_Penalty):
    """Network slimming: an L1 penalty on the scales of norms, and channels with small ones go.

    Liu et al. (2017), equation 1, by its subgradient.

    Attributes:
        reg: the strength, 1e-5 to 1e-4 in the paper.
    """

    reg: float = 1e-4
    patterns: ClassVar[str] = "axes"

    def start(self, pruning: Pruning) -> None:
        """Find the scales.

        Raises:
            RecipeError: a group has none.
        """
        subject = pruning.subject
        known = Statistics(subject.analysis, 0)
        self._scales: dict[str, list[str]] = {}
        for u in list(pruning.units):
            found = [n for n, _ in scales(u.group, known)] if isinstance(u, AxisUnits) else []
            if found:
                self._scales[u.name] = found
            else:
                pruning.drop(u, "no norm scales it, which network slimming needs")
        if not self._scales:
            pattern = " + ".join(pruning.stage.patterns)
            raise RecipeError(f"training method 'slimming': no norm scales any unit of '{pattern}'")

    def penalise(self, pruning: Pruning) -> None:
        """Add reg * sign(gamma)."""
        for name in dict.fromkeys(n for names in self._scales.values() for n in names):
            pruning.subject.weights.push(name, self.reg * pruning.value(name).sign())

    def scores(self, pruning: Pruning, units: Units) -> Tensor:
        """Return the mean of |gamma| of each unit."""
        assert isinstance(units, AxisUnits)
        names = self._scales[units.name]
        count = units.total(lambda n: torch.ones_like(pruning.value(n)), names)
        return units.total(lambda n: pruning.value(n).abs(), names) / count.clamp_min(1)


@method("growing_reg")
class GrowingReg(_Penalty):
    """Growing regularisation: the L2 penalty of the units that are to go rises until they are gone.

    Wang et al., "Neural Pruning via Growing Regularization" (2021). GReg-1 (`select="start"`) chooses the units by
    magnitude before; GReg-2 (`select="end"`) lets the penalty of all units rise alike and chooses at the end, when
    curvature has told them apart.

    Attributes:
        delta: by how much the penalty rises.
        every: steps between rises.
        ceiling: that it rises to.
        select: "start" or "end".
    """

    delta: float = 1e-4
    every: int = 10
    ceiling: float = 1.0
    select: str = "start"
    tensors: ClassVar[tuple[str, ...]] = ("_penalty", "_chosen")

    def __post_init__(self) -> None:
        of_choice("growing_reg: select", self.select, ("start", "end"))
        self._penalty = 0.0
        self._chosen: Kept = {}

    def start(self, pruning: Pruning) -> None:
        """Choose what is to go."""
        if self.select == "start":
            self._chosen = pruning.best(pruning.target, last=True)

    def penalise(self, pruning: Pruning) -> None:
        """Add penalty * w."""
        if pruning.step % self.every == 0:
            self._penalty = min(self._penalty + self.delta, self.ceiling)
        for u in pruning.units:
            going = ~self._chosen[u.name] if self._chosen else torch.ones(u.size, dtype=torch.bool)
            self._decay(pruning, u, self._penalty * going.float())

    def keep(self, pruning: Pruning, share: float) -> Kept | None:
        """Return everything, until the end of the schedule."""
        found = super().keep(pruning, share)
        return self._chosen or None if found is None else found


@method("group_sl")
class GroupSL(_Penalty):
    """Sparse learning of groups: the less important a unit is, the more its weights decay.

    Fang et al., "DepGraph" (2023), equation 4: gradient += reg * gamma_k * w, gamma_k = 2^(alpha (Imax - I_k) /
    (Imax - Imin)), I_k the L2 norm of the unit over all coupled weights.

    Attributes:
        reg: the strength.
        alpha: of the exponent.
    """

    reg: float = 5e-4
    alpha: float = 4.0

    def penalise(self, pruning: Pruning) -> None:
        """Add reg * gamma_k * w."""
        for u in pruning.units:
            norms = self._norms(pruning, u)
            low, high = norms.min(), norms.max()
            gamma = 2 ** (self.alpha * (high - norms) / (high - low).clamp_min(1e-12))
            self._decay(pruning, u, self.reg * gamma)


def everything(pruning: Pruning) -> Kept:
    """Return that all units stay."""
    return {u.name: torch.ones(u.size, dtype=torch.bool) for u in pruning.units}
