"""Weights put back to what they were at some step, after each update of the masks: lottery tickets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxprune.errors import RecipeError
from fxprune.passes.training.masked import like, whole

if TYPE_CHECKING:
    from fxprune.passes.training.pruning import Pruning


class Rewinding:
    """What stages with `rewind` go back to: Frankle et al., "Stabilizing the Lottery Ticket Hypothesis" (2019).

    Attributes:
        snapshot: the parameters at that step, by name, whole where they are sharded; None before it.

    Raises:
        RecipeError: stages go back to different steps, while the model has one set of weights.
    """

    def __init__(self, model: nn.Module, prunings: Iterable[Pruning]) -> None:
        wanted = [one.stage.rewind for one in prunings if one.stage.rewind != "none"]
        steps = sorted({0 if step == "start" else int(step) for step in wanted})
        if len(steps) > 1:
            raise RecipeError(f"rewind: stages go back to steps {', '.join(map(str, steps))}; one step for all of them")
        self._model, self._step = model, steps[0] if steps else None
        self.snapshot: dict[str, Tensor] | None = None

    def keep(self, step: int) -> None:
        """Take the snapshot, if this is its step."""
        if self.snapshot is None and step == self._step:
            self.snapshot = {n: whole(p.detach()).clone() for n, p in self._model.named_parameters()}

    @torch.no_grad()
    def back(self, updated: Iterable[Pruning], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Put weights back where an update of one that rewinds has taken something, and let optimizers forget."""
        if self.snapshot is None or not any(one.stage.rewind != "none" and one.gone > 0 for one in updated):
            return
        for name, parameter in self._model.named_parameters():
            parameter.copy_(like(self.snapshot[name].to(parameter.device, parameter.dtype), parameter))
        for optimizer in optimizers:
            optimizer.state.clear()
