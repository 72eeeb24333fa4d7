"""Ramps: how much of what is to go has gone, from 0 at the start of a schedule to 1 at its end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fxprune.errors import RecipeError
from fxprune.registry import Registry

#: (progress in [0, 1], first share, last share) -> share.
Ramp = Callable[[float, float, float], float]
RAMPS: Registry[Ramp] = Registry("ramp")


@RAMPS.register("oneshot")
def _oneshot(progress: float, first: float, last: float) -> float:
    """All of it at the start."""
    return last


@RAMPS.register("linear")
def _linear(progress: float, first: float, last: float) -> float:
    """The same at every update."""
    return first + (last - first) * progress


@RAMPS.register("cubic")
def _cubic(progress: float, first: float, last: float) -> float:
    """Much at the start, little at the end. Zhu and Gupta, "To prune, or not to prune" (2017), equation 1."""
    return last + (first - last) * (1 - progress) ** 3


@RAMPS.register("cube")
def _cube(progress: float, first: float, last: float) -> float:
    """Little at the start, much at the end: what Neural Compressor calls `cube`."""
    return first + (last - first) * progress**3


@RAMPS.register("exponential")
def _exponential(progress: float, first: float, last: float) -> float:
    """The same share of what is left at every update: Neural Compressor's default, `exp`."""
    return 1 - (1 - first) * ((1 - last) / (1 - first)) ** progress if last < 1 else _cubic(progress, first, last)


@RAMPS.register("cosine")
def _cosine(progress: float, first: float, last: float) -> float:
    """Along half a cosine: little at both ends."""
    return first + (last - first) * (1 - math.cos(math.pi * progress)) / 2


@RAMPS.register("quarter_cosine")
def _quarter_cosine(progress: float, first: float, last: float) -> float:
    """Along a quarter of a cosine, little at the start: what Neural Compressor calls `cos`."""
    return first + (last - first) * (1 - math.cos(math.pi / 2 * progress))


@dataclass(frozen=True, slots=True)
class Schedule:
    """When how much is pruned, in steps of the optimizer.

    Attributes:
        ramp: a name in `RAMPS`.
        start: the step before which the first update is made.
        end: that before which the last one is made; from then on what stays is fixed.
        every: steps between updates.
        initial: the share that is pruned at the first update; 0 prunes nothing at it.
        dense, sparse: with both above 0, phases of so many steps alternate between `start` and `end`: everything is
            trained, then what the ramp leaves; the last phase is a sparse one. Peste et al., "AC/DC" (2021).
    """

    ramp: str = "cubic"
    start: int = 0
    end: int = 0
    every: int = 1
    initial: float = 0.0
    dense: int = 0
    sparse: int = 0

    def __post_init__(self) -> None:
        RAMPS[self.ramp]
        if self.start < 0 or self.end < self.start:
            raise RecipeError(f"schedule: it goes from step {self.start} to step {self.end}, which is before")
        if self.every < 1:
            raise RecipeError(f"schedule: every is at least 1 step, not {self.every}")
        if not 0 <= self.initial < 1:
            raise RecipeError(f"schedule: initial is a share in [0, 1), not {self.initial:g}")
        if (self.dense > 0) != (self.sparse > 0):
            raise RecipeError("schedule: phases alternate where both `dense` and `sparse` say how long they are")

    @property
    def alternates(self) -> bool:
        """Whether dense and sparse phases alternate."""
        return self.dense > 0

    def updates(self, step: int) -> bool:
        """Whether what stays is chosen anew before a step.

        >>> [s for s in range(12) if Schedule(start=2, end=9, every=3).updates(s)]
        [2, 5, 8, 9]
        >>> [s for s in range(12) if Schedule("oneshot", start=2, end=9).updates(s)]
        [2]
        """
        if self.ramp == "oneshot" and not self.alternates:
            return step == self.start
        if self.alternates:
            return self.start <= step <= self.end and (step == self.end or self.phase(step) != self.phase(step - 1))
        return self.start <= step <= self.end and ((step - self.start) % self.every == 0 or step == self.end)

    def phase(self, step: int) -> Literal["dense", "sparse"]:
        """Return which phase a step is in, where they alternate.

        >>> [Schedule(start=0, end=8, dense=2, sparse=2).phase(s)[0] for s in range(10)]
        ['d', 'd', 's', 's', 'd', 'd', 's', 's', 's', 's']
        """
        if step >= self.end:
            return "sparse"
        return (
            "dense" if step < self.start or (step - self.start) % (self.dense + self.sparse) < self.dense else "sparse"
        )

    def share(self, step: int, target: float) -> float:
        """Return the share that is gone from a step on, when `target` is gone at the end.

        >>> [round(Schedule("linear", end=4).share(s, 0.8), 2) for s in (0, 1, 2, 4, 9)]
        [0.0, 0.2, 0.4, 0.8, 0.8]
        >>> [round(Schedule("cubic", start=1, end=5).share(s, 0.8), 2) for s in (0, 1, 2, 3, 5)]
        [0.0, 0.0, 0.46, 0.7, 0.8]
        """
        if step < self.start:
            return 0.0
        if self.alternates:
            return target if self.phase(step) == "sparse" else 0.0
        if step >= self.end:
            return target
        return RAMPS[self.ramp]((step - self.start) / (self.end - self.start), min(self.initial, target), target)
