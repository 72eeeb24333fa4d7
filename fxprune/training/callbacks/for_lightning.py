"""A `Pruner` in `lightning.Trainer`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from fxprune.errors import InputError, TargetError
from fxprune.training.pruner import Pruner

# Two packages hold the same classes, and a Trainer takes callbacks of its own: that of the one that is in use.
_PACKAGE = "pytorch_lightning" if "pytorch_lightning" in sys.modules else "lightning.pytorch"
try:
    _Callback: Any = importlib.import_module(_PACKAGE).Callback
except ModuleNotFoundError:
    _Callback = importlib.import_module("pytorch_lightning").Callback


class LightningCallback(_Callback):  # type: ignore[misc]
    """Lets a Pruner follow a Lightning Trainer: its optimizer, its checkpoints.

    Make the Pruner of the module inside the LightningModule, pass `callbacks=[LightningCallback(pruner)]` to the
    Trainer, call `fit`, then `pruner.finish()`. With `distillation`, let `training_step` return
    `pruner.distill(loss)`. A pass whose gradients are accumulated is no step.

    Args:
        pruner: of a module that the LightningModule trains.
    """

    def __init__(self, pruner: Pruner) -> None:
        super().__init__()
        self.pruner = pruner
        self._state: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizer that holds the model's parameters.

        Raises:
            TargetError: the schedule is longer than the training.
            InputError: none of the optimizers holds them, or several do.
        """
        steps, end = trainer.estimated_stepping_batches, max(one.schedule.end for one in self.pruner.prunings)
        if end > steps:
            raise TargetError(
                f"the Trainer makes {steps:.0f} steps, and the schedule ends before step {end}: train longer, or let "
                "it end earlier"
            )
        if self._state is not None:
            self.pruner.load_state_dict(self._state)
            self._state = None
        mine = {id(p) for p in self.pruner.model.parameters()}
        held = [o for o in trainer.optimizers if mine & {id(p) for g in o.param_groups for p in g["params"]}]
        if len(held) != 1:
            raise InputError(
                f"{len(held)} optimizers hold parameters of the model that is pruned; it takes exactly one"
            )
        self.pruner.attach(held[0])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Follow the optimizer no longer; the last update is made if the schedule ends here."""
        self.pruner.on_train_end()
        self.pruner.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the Pruner's state, for a checkpoint."""
        return self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until training starts, when the model's own weights are there."""
        self._state = state_dict
