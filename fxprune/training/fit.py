"""The steps of one stage of a recipe, and going on in the middle of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import InputError, NonFiniteError
from fxprune.training.batches import Feed
from fxprune.training.distill import Distiller
from fxprune.training.log import Row
from fxprune.training.pruner import Pruner


@dataclass(frozen=True, slots=True)
class Taken:
    """A step that was made.

    Attributes:
        loss: of its batch.
        rate: of the optimizer.
        row: of the Pruner's last update when the step was made, if there is one.
        updated: whether the masks changed behind it.
    """

    loss: float
    rate: float
    row: Row | None
    updated: bool


@dataclass
class Fit:
    """A stage that trains.

    Attributes:
        module: in training mode.
        steps: of the optimizer, in the whole stage.
        loss: (the module's output, a batch's labels) -> a scalar.
        clip: the largest norm of all gradients together.
        pruner: None where nothing is pruned.
        distiller: None where there is no teacher.
        first: number of the stage's first step in the whole run.
        hint: what an error about the loss ends in.
        done: steps made.
    """

    module: nn.Module
    steps: int
    feed: Feed
    loss: Callable[[Any, Any], Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    clip: float | None
    pruner: Pruner | None
    distiller: Distiller | None
    first: int = 0
    hint: str = ""
    done: int = 0
    _seen: int = 0
    _skip: int = 0
    _begun: Tensor = field(default_factory=torch.get_rng_state)
    _random: Tensor | None = None

    def epoch(self, number: int) -> Iterator[Taken]:
        """Train on the batches of an epoch that have not been seen, as long as there are steps left.

        Raises:
            InputError: there are no batches, or fewer than the run had seen before it was stopped.
            NonFiniteError: the loss or a gradient is NaN or infinite.
        """
        device = next(self.module.parameters()).device
        self._begun, self._seen = torch.get_rng_state(), 0
        for item in self.feed.epoch(number):
            self._seen += 1
            if self._seen <= self._skip:  # they were trained on before the run was stopped
                continue
            self._continue()
            row = self._row()
            rate = float(self.optimizer.param_groups[0]["lr"])
            loss = self._step(item, device)
            self.done += 1
            self.scheduler.step()
            if self.pruner is not None:
                self.pruner.on_step_end()
                self.pruner.on_step_begin()
            yield Taken(loss, rate, row, self._row() is not row)
            if self.done == self.steps:
                return
        if not self._seen:
            raise InputError(f"batches: epoch {number} has none; a DataLoader or a list can be used again")
        if self._seen < self._skip:
            raise InputError("resume: the epoch has fewer batches than the run had seen of it")
        self._continue()  # it was stopped behind the epoch's last batch
        self._begun, self._seen, self._skip = torch.get_rng_state(), 0, 0

    def _row(self) -> Row | None:
        """What the Pruner wrote down last."""
        return self.pruner.rows[-1] if self.pruner is not None and self.pruner.rows else None

    def _continue(self) -> None:
        """Random numbers go on where the run was stopped, once the batches before have been passed over."""
        if self._random is not None:
            torch.set_rng_state(self._random)
            self._random = None

    def _step(self, item: Any, device: torch.device) -> float:
        """Take one step of the optimizer; return the loss."""
        given = self.feed.given(item, device)
        loss = self.loss(self.module(*given.args, **given.kwargs), given.labels)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise InputError(f"the loss gives {type(loss).__name__}, not a scalar tensor")
        if self.distiller is not None:
            loss = self.distiller.distill(loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if not torch.isfinite(loss.detach()):
            raise NonFiniteError(f"step {self.first + self.done}: the loss is NaN or infinite{self.hint}")
        if self.clip is not None:
            nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], self.clip)
        value = float(loss.detach())
        if self.pruner is not None:
            self.pruner.on_before_optimizer_step(value)
        self.optimizer.step()
        return value

    # ------------------------------------------------------------------ checkpoints
    def state(self) -> dict[str, Any]:
        """Return all that is needed to go on; `load` takes it, with torch's random state of the same moment."""
        parts: dict[str, Any] = {
            "model": self.module,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "pruner": self.pruner,
            "distiller": self.distiller,
        }
        states = {name: None if part is None else part.state_dict() for name, part in parts.items()}
        return {"done": self.done, "seen": self._seen, "begun": self._begun} | states

    def load(self, state: dict[str, Any], random: Tensor) -> None:
        """Go on from a state.

        Args:
            random: torch's random state when it was made. Batches that were seen are drawn again before, from where the
                epoch began.
        """
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])
        if self.distiller is not None:
            self.distiller.load_state_dict(state["distiller"])
        self.done, self._skip, self._begun = state["done"], state["seen"], state["begun"]
        self._random = random if self._skip else None
        torch.set_rng_state(self._begun)
