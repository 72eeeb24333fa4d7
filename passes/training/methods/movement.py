"""Movement pruning: units whose weights move towards zero go, whatever their size."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fxprune.errors import RecipeError
from fxprune.passes.training.method import Kept, Method, method, of_choice
from fxprune.passes.training.pruning import Pruning
from fxprune.passes.training.units import Units


@method("movement")
class Movement(Method):
    """Scores learn by straight-through gradients, dL/dS = sum of w dL/dw' over the unit; w' = w where S is high.

    Of heads and widths that is the sum over the weights that read them, where alone they are masked meanwhile.

    Sanh et al., "Movement Pruning" (2020), equation 3; blocks, and rows and columns with one score, as in Lagunas et
    al., "Block Pruning For Faster Transformers" (2021). Scores have an Adam of their own.

    Attributes:
        lr: of the scores; it falls linearly to zero where the Pruner knows the run's steps.
        select: "top": as large a share stays as the schedule says. "threshold": what has sigmoid(S) above a threshold
            that rises with the schedule, so that `reg` decides how much goes.
        threshold: at the end, of sigmoid(S).
        reg: strength of the penalty on the mean of sigmoid(S), which rises with the schedule.
        initial: "zero", or "magnitude": scores start at the weights' own sizes, standardised. In runs of some hundred
            steps scores of single entries that start at zero are mostly noise: take "magnitude" there, with an `lr` of
            0.002.
        regrow: what is closed goes on getting gradients of its scores and may come back, as in the paper; else it gets
            none, and comes back only where others fall below it.
    """

    lr: float = 1e-2
    select: str = "top"
    threshold: float = 0.1
    reg: float = 0.0
    initial: str = "zero"
    regrow: bool = True
    through: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        of_choice("movement: select", self.select, ("top", "threshold"))
        of_choice("movement: initial", self.initial, ("zero", "magnitude"))
        if not 0 < self.threshold < 0.5:
            raise RecipeError(f"movement: threshold is between 0 and 0.5, not {self.threshold}")
        self._scores: dict[str, Tensor] = {}
        self._optimizer: Any = None

    @property
    def targetless(self) -> bool:  # type: ignore[override]
        """Whether the penalty decides how much goes."""
        return self.select == "threshold"

    def start(self, pruning: Pruning) -> None:
        """Make the scores."""
        for u in pruning.units:
            if self.initial == "magnitude":
                size = u.reduce(lambda n: pruning.value(n).float().abs())
                first = 0.1 * (size - size.mean()) / size.std().clamp_min(1e-12)
            else:
                first = torch.zeros(u.size)
            self._scores[u.name] = first.cpu().clone().requires_grad_()
        self._optimizer = torch.optim.Adam(self._scores.values(), lr=self.lr)

    def before_step(self, pruning: Pruning) -> None:
        """Move the scores."""
        if pruning.done:
            return
        share = pruning.schedule.share(pruning.step, 1.0)
        for u in pruning.units:
            scores = self._scores[u.name]
            gradient = pruning.at_reads(u).cpu()
            if not self.regrow:
                gradient = gradient.masked_fill(~pruning.kept[u.name].cpu(), 0.0)
            if self.reg:
                open_ = torch.sigmoid(scores.detach())
                gradient = gradient + share * self.reg * open_ * (1 - open_) / u.size
            scores.grad = gradient
        if pruning.steps is not None:
            self._optimizer.param_groups[0]["lr"] = self.lr * max(0.0, 1 - pruning.step / pruning.steps)
        self._optimizer.step()

    def scores(self, pruning: Pruning, units: Units) -> Tensor:
        """Return the scores of units."""
        return self._scores[units.name].detach()

    def keep(self, pruning: Pruning, share: float) -> Kept | None:
        """Return what is above the threshold, where that decides."""
        if self.select == "top":
            return None
        now = self.threshold * pruning.schedule.share(pruning.step, 1.0)
        return {u.name: torch.sigmoid(self._scores[u.name].detach()) > now for u in pruning.units}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {"scores": {n: s.detach() for n, s in self._scores.items()}, "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        with torch.no_grad():
            for name, scores in state["scores"].items():
                self._scores[name].copy_(scores)
        self._optimizer.load_state_dict(state["optimizer"])
