"""A `Pruner` in `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from fxprune.errors import InputError, TargetError
from fxprune.training.pruner import Pruner

#: In a checkpoint's folder.
FILE = "fxprune_pruner.pt"


class TransformersCallback(TrainerCallback):  # type: ignore[misc]
    """Lets a Pruner follow `transformers.Trainer`: its optimizer, its checkpoints.

    Make the Pruner of the model, pass `callbacks=[TransformersCallback(pruner)]` to the Trainer, call `train`, then
    `pruner.finish()`. A pass that the Trainer accumulates is no step, and neither is a step that a loss scaler skips.
    Checkpoints hold the Pruner's state, and `resume_from_checkpoint` finds it there.

    Args:
        pruner: of the Trainer's model. With `distillation` the loss in the model's output is blended by itself; with a
            `compute_loss_func` of your own, see `distilled`.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the optimizer.

        Raises:
            TargetError: the schedule is longer than the training.
            InputError: the Trainer trains another model, would put old weights back, or goes on from a checkpoint that
                was made without this callback.
        """
        if args.load_best_model_at_end:
            raise InputError(
                "load_best_model_at_end would put back weights from before the last update of the masks; leave it out"
            )
        ends = [one.schedule.end for one in self.pruner.prunings]
        if max(ends) > state.max_steps:
            raise TargetError(
                f"the Trainer makes {state.max_steps} steps, and the schedule ends before step {max(ends)}: train "
                "longer, or let it end earlier"
            )
        if state.global_step > self.pruner.step:
            self._resume(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)
        self.pruner.attach(kwargs["optimizer"])

    def _resume(self, file: Path) -> None:
        if not file.exists():
            raise InputError(f"there is no {file}: the checkpoint was made without TransformersCallback; start anew")
        self.pruner.load_state_dict(torch.load(file, weights_only=True))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the Pruner's state beside the model's."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.pruner.state_dict(), folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the optimizer no longer; the last update is made if the schedule ends here."""
        self.pruner.on_train_end()
        self.pruner.detach()


def distilled(pruner: Pruner, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a `compute_loss_func` for the Trainer that blends the loss of another one with the teacher's.

    Args:
        pruner: with `distillation`.
        function: (outputs, labels, num_items_in_batch=...) -> loss, as the Trainer calls it: the sum over the labels of
            this pass divided by `num_items_in_batch`, where that is given.
    """

    def blended(outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        loss = function(outputs, labels, num_items_in_batch=num_items_in_batch)
        if not pruner.model.training:
            return loss
        share = None
        if num_items_in_batch is not None and labels is not None:
            share = (labels != -100).sum() / num_items_in_batch
        return pruner.distiller.distill(loss, share=share)

    return blended
