"""What goes little by little between two updates: Neural Compressor's progressive pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxprune.passes.training.units import Values


class Fading:
    """The entries of units that an update has taken go in several turns, the smallest first.

    Args:
        turns: before the last one, in which the rest goes.
        every: steps between updates, over which the turns are spread.

    Attributes:
        left: name of a weight -> its entries that are still there of what goes: bool, of its shape.
    """

    def __init__(self, turns: int, every: int) -> None:
        self._turns, self._each = turns, max(1, every // (turns + 1))
        self._going: dict[str, Tensor] = {}
        self._begun = 0
        self.left: dict[str, Tensor] = {}

    def begin(self, step: int, going: Mapping[str, Tensor], values: Values) -> None:
        """Let entries go from a step on: name of a weight -> which, bool, of its shape."""
        self._going, self._begun, self.left = dict(going), step, {}
        self.turn(step, values)

    def turn(self, step: int, values: Values) -> bool:
        """Take the share that a step has come to; return whether `left` is another now."""
        if not self._going:
            return False
        turn, rest = divmod(step - self._begun, self._each)
        if rest:
            return False
        if turn >= self._turns:
            self._going, self.left = {}, {}
            return True
        share = (turn + 1) / (self._turns + 1)
        self.left = {name: _largest(values(name).to(going.device), going, share) for name, going in self._going.items()}
        return True

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {"going": self._going, "begun": self._begun, "left": self.left}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._going, self._begun, self.left = dict(state["going"]), state["begun"], dict(state["left"])


def _largest(value: Tensor, among: Tensor, gone: float) -> Tensor:
    """All but a share of some entries, the smallest: bool, of the shape of the weight."""
    size = value.abs()[among]
    stays = torch.ones_like(size, dtype=torch.bool)
    stays[torch.argsort(size, stable=True)[: int(len(size) * gone)]] = False
    return torch.zeros_like(among).masked_scatter_(among, stays)
