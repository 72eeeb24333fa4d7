"""What several prunings say of the same weights, put together: masks, gates, and how much is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, fx

from fxprune.axes import Axis
from fxprune.passes.latency import LatencyCosts

if TYPE_CHECKING:
    from fxprune.passes.training.pruning import Pruning, Subject


class Masking:
    """The masks of a model's weights.

    Args:
        subject: what is pruned, with the weights that are masked.
        prunings: all that run beside each other.
    """

    def __init__(self, subject: Subject, prunings: list[Pruning]) -> None:
        self._subject, self._prunings = subject, prunings

    def put_on(self, one: Pruning) -> None:
        """Give the weights of a pruning their parametrisations."""
        through, soft = one.method.through, one.method.soft
        for u in one.units:
            # Where units are read is enough: what is behind a closed one reaches nothing, and goes at the end. And only
            # so a unit that is masked has a gradient there, which is that of a weight times what the unit would give.
            for name in u.gated() if soft or through else u.weights:
                self._subject.weights.add(name, through=through, soft=soft)

    def set_masks(self) -> None:
        """Mask each weight with all that is said of it."""
        weights = self._subject.weights
        masks: dict[str, Tensor] = {}
        zeroed = dict.fromkeys(n for one in self._prunings if one.method.zeroes for u in one.units for n in u.gated())
        weights.bake(zeroed)  # what comes back starts at zero, whatever an optimizer's momentum has made of it
        for one in self._prunings:
            for name, mask in one.masks().items():
                masks[name] = masks[name] & mask if name in masks else mask
        for name in weights:
            if name in masks:
                weights.set_mask(name, masks[name])
        weights.bake(zeroed)

    def set_gates(self) -> None:
        """Multiply weights with gates with all of theirs, and with the masks of others."""
        soft = [one for one in self._prunings if one.method.soft]
        if not soft:
            return
        weights = self._subject.weights
        for name in dict.fromkeys(n for one in soft for u in one.units for n in u.gated()):
            gate: Tensor | None = None
            for one in self._prunings:
                if not any(name in u.weights for u in one.units):
                    continue
                own = one.gates.get(name) if one.method.soft and not one.done else one.masks().get(name)
                if own is not None:
                    gate = own if gate is None else gate * own
            if gate is not None:
                weights.set_gate(name, gate)

    def mask_gradients(self) -> None:
        """Take away gradients of what is masked, where methods looked at them and no optimizer is to see them."""
        weights = self._subject.weights
        free = {n for one in self._prunings if one.method.trains_masked for u in one.units for n in u.weights}
        through = [one for one in self._prunings if one.method.through]
        for name in dict.fromkeys(n for one in through for u in one.units for n in u.weights):
            if name in weights and name not in free:
                weights.mask_gradient(name)

    def sparsity(self) -> float:
        """Return the share of the masked weights' entries that is zero now."""
        found = [self._subject.weights.zeros(name) for name in self._subject.weights]
        return sum(zeros for zeros, _ in found) / max(sum(size for _, size in found), 1)

    def macs(self) -> float:
        """Return the share of the multiply-accumulates that stays, as far as axes and branches go."""
        counts, removed = self._left()
        costs = self._subject.costs
        return costs.without(removed).macs(counts) / max(costs.macs({}), 1)

    def predicted(self) -> float | None:
        """Return how many times as fast as the dense model this is by the times of its parts, if these are known."""
        counts, removed = self._left()
        for one in self._prunings:
            costs = one.costs
            if isinstance(costs, LatencyCosts):
                return costs.latency({}) / costs.without(removed).latency(counts)
        return None

    def _left(self) -> tuple[dict[Axis, int], dict[fx.Node, fx.Node]]:
        """How many units of each axis stay, and the branches that are left out."""
        counts: dict[Axis, int] = {}
        removed: dict[fx.Node, fx.Node] = {}
        for one in self._prunings:
            kept = one.selection()
            counts |= {axis: len(indices) for axis, indices in kept.items()}
            removed |= kept.removed
        return counts, removed
