"""n:m masks that are trained: chosen anew at every step, or drawn from a distribution that learns."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxprune.errors import RecipeError
from fxprune.passes.training.method import Kept, Method, mean, method
from fxprune.passes.training.pruning import Pruning
from fxprune.passes.training.units import CountedUnits, Units


@method("straight_through")
class StraightThrough(Method):
    """The n largest of every m weights are used, all of them get the gradient, and masked ones decay besides.

    Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch" (SR-STE, 2021), equation 9:
    gradient += decay * (1 - mask) * w. With decay 0 it is the plain straight-through estimator.

    Attributes:
        decay: 2e-4 in the paper.
    """

    decay: float = 2e-4
    through: ClassVar[bool] = True
    trains_masked: ClassVar[bool] = True
    patterns: ClassVar[str] = "n:m"

    def before_step(self, pruning: Pruning) -> None:
        """Let masked weights decay."""
        if self.decay and not pruning.done:
            for u in pruning.units:
                pruning.subject.weights.decay(u.name, self.decay)

    def scores(self, pruning: Pruning, units: Units) -> Tensor:
        """Return |w|."""
        return mean(units, units.reduce(lambda n: pruning.value(n).abs()))


@method("mask_learning")
class MaskLearning(Method):
    """Every group of m has a distribution over its masks that learns by Gumbel-softmax; the weights stand still.

    Fang et al., "MaskLLM" (2024), equations 4 to 8. The mask of a group is the sum of its candidates weighted by
    softmax((scale * logits + Gumbel noise) / temperature); the temperature falls and the scale rises over the schedule.
    Logits start at `prior` times how well a candidate fits the mask by magnitude.

    Attributes:
        lr: of the logits.
        temperature: at the start and at the end.
        scale: of the logits, at the start and at the end.
        prior: strength of the mask by magnitude at the start.
        keep_large: strength of the penalty -(mask w)^2, which keeps what stays large.
        freeze: the weights stand still until the masks are final.
    """

    lr: float = 1e-2
    temperature: tuple[float, float] = (4.0, 0.05)
    scale: tuple[float, float] = (100.0, 500.0)
    prior: float = 3.0
    keep_large: float = 1e-5
    freeze: bool = True
    through: ClassVar[bool] = True
    soft: ClassVar[bool] = True
    patterns: ClassVar[str] = "n:m"

    def __post_init__(self) -> None:
        if len(self.temperature) != 2 or min(self.temperature) <= 0 or len(self.scale) != 2 or min(self.scale) <= 0:
            raise RecipeError("mask_learning: temperature and scale are two positive numbers each, start and end")
        self._logits: dict[str, Tensor] = {}
        self._candidates: dict[str, Tensor] = {}
        self._noise: dict[str, Tensor] = {}
        self._optimizer: Any = None

    def start(self, pruning: Pruning) -> None:
        """Make the logits."""
        for u in pruning.units:
            assert isinstance(u, CountedUnits)
            n, m = u.pattern.n, u.pattern.m
            rows = [[float(i in some) for i in range(m)] for some in itertools.combinations(range(m), n)]
            candidates = torch.tensor(rows)
            size = u.reduce(lambda name: pruning.value(name).float().abs()).cpu()
            best = u.best(size, pruning.target).float().reshape(-1, m)
            fit = best @ candidates.t() - n / 2
            logits = 0.01 * torch.randn(len(best), len(rows), generator=pruning.generator)
            logits = logits + self.prior * fit / n / self.scale[0]
            self._candidates[u.name], self._logits[u.name] = candidates, logits.requires_grad_()
        self._optimizer = torch.optim.Adam(self._logits.values(), lr=self.lr)

    def _mask(self, name: str, pruning: Pruning) -> Tensor:
        done = pruning.schedule.share(pruning.step, 1.0) if pruning.schedule.end else 1.0
        temperature = self.temperature[0] + (self.temperature[1] - self.temperature[0]) * done
        scale = self.scale[0] + (self.scale[1] - self.scale[0]) * done
        noise = -torch.log(-torch.log(self._noise[name]))
        choice = torch.softmax((scale * self._logits[name] + noise) / temperature, 1)
        return (choice @ self._candidates[name]).reshape(-1)

    def before_forward(self, pruning: Pruning) -> None:
        """Draw masks, and set them."""
        if pruning.done:
            return
        for name, logits in self._logits.items():
            self._noise[name] = pruning.random(*logits.shape)
        with torch.no_grad():
            pruning.set_gates({u.name: self._mask(u.name, pruning) for u in pruning.units})

    def before_step(self, pruning: Pruning) -> None:
        """Move the logits."""
        if pruning.done or not self._noise:
            return
        for u in pruning.units:
            self._logits[u.name].grad = None
            mask = self._mask(u.name, pruning)
            gradient = u.reduce(pruning.product).cpu()
            if self.keep_large:
                size = u.reduce(lambda n: pruning.value(n).float() ** 2).cpu()
                gradient = gradient - 2 * self.keep_large * mask.detach() * size
            mask.backward(gradient)  # type: ignore[no-untyped-call]
        self._optimizer.step()
        if self.freeze:
            for u in pruning.units:
                pruning.subject.weights.parameter(u.name).grad = None

    def keep(self, pruning: Pruning, share: float) -> Kept | None:
        """Return the likeliest candidates."""
        result = {}
        for u in pruning.units:
            best = self._logits[u.name].detach().argmax(1)
            result[u.name] = self._candidates[u.name][best].reshape(-1).bool()
        return result

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {
            "logits": {n: x.detach() for n, x in self._logits.items()},
            "noise": self._noise,
            "optimizer": self._optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        with torch.no_grad():
            for name, logits in state["logits"].items():
                self._logits[name].copy_(logits)
        self._noise = dict(state["noise"])
        self._optimizer.load_state_dict(state["optimizer"])
