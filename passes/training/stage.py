"""What one pruning of a training run is told: method, pattern, target, schedule, layers. Unknown keys are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fxprune.errors import RecipeError
from fxprune.passes.training.ramp import RAMPS, Schedule
from fxprune.registry import nearest

#: Kinds of cost that a target can be a share of.
COSTS = ("macs", "params", "memory")
#: What other tools call a key or a value -> what it is called here.
ELSEWHERE = {
    "target_sparsity": "target: {sparsity: ...}",
    "pruning_type": "method",
    "criterion": "method",
    "op_names": "include",
    "excluded_op_names": "exclude",
    "pruning_op_types": "include: ['type:Linear', ...]",
    "pruning_scope": "scope",
    "start_step": "schedule: {start: ...}",
    "end_step": "schedule: {end: ...}",
    "pruning_frequency": "schedule: {every: ...}",
    "sparsity_decay_type": "schedule: {ramp: ...}",
    "min_sparsity_ratio_per_op": "min_sparsity",
    "max_sparsity_ratio_per_op": "max_sparsity",
    "init_sparsity": "schedule: {initial: ...}",
    "final_sparsity": "target: {sparsity: ...}",
    "start_epoch": "schedule: {start: ..., unit: epoch}",
    "end_epoch": "schedule: {end: ..., unit: epoch}",
    "update_frequency": "schedule: {every: ...}",
    "params": "include",
    "mask_type": "pattern",
}


class Goal(BaseModel):
    """What a pruning reaches: exactly one of the keys.

    Attributes:
        sparsity: share of the entries (of a pattern in weights) or of the units (channels, heads, layers) that go.
        macs, params, memory: share of the model's cost that stays; channels, heads and widths only.
        speedup: how many times faster than the dense model on the backend, measured at the last update; the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: float | None = Field(default=None, gt=0, lt=1)
    macs: float | None = Field(default=None, gt=0, lt=1)
    params: float | None = Field(default=None, gt=0, lt=1)
    memory: float | None = Field(default=None, gt=0, lt=1)
    speedup: float | None = Field(default=None, gt=1)

    @model_validator(mode="after")
    def _one(self) -> Goal:
        given = [k for k in type(self).model_fields if getattr(self, k) is not None]
        if len(given) != 1:
            known = ", ".join(type(self).model_fields)
            raise ValueError(f"a target is exactly one of {known}, not {' and '.join(given) or 'none'}")
        return self

    @property
    def cost(self) -> tuple[str, float] | None:
        """The kind of cost and the share of it that stays; None where it is a sparsity."""
        for kind in COSTS:
            if getattr(self, kind) is not None:
                return kind, getattr(self, kind)
        return ("latency", 1 / self.speedup) if self.speedup is not None else None


class When(BaseModel):
    """A schedule, in steps or epochs.

    Attributes:
        ramp: linear, cubic, cube, exponential, cosine, quarter_cosine or oneshot: see `fxprune.passes.training.ramp`.
        start, end: the first and the last update; without an end, half of the run.
        every: between updates; without it there are 40.
        initial: the share at the first update.
        dense, sparse: how long the phases are that alternate (AC/DC), 0 for none.
        unit: of all these.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ramp: str = "cubic"
    start: float = Field(default=0, ge=0)
    end: float | None = Field(default=None, ge=0)
    every: float | None = Field(default=None, gt=0)
    initial: float = Field(default=0.0, ge=0, lt=1)
    dense: float = Field(default=0, ge=0)
    sparse: float = Field(default=0, ge=0)
    unit: Literal["step", "epoch"] = "step"

    def schedule(self, steps: int | None, steps_per_epoch: int | None) -> Schedule:
        """Return the schedule in steps.

        Args:
            steps: of the whole run, where known.
            steps_per_epoch: where known.

        Raises:
            RecipeError: it cannot be said in steps, or the run is over before it is.
        """
        if self.unit == "epoch" and steps_per_epoch is None:
            raise RecipeError("schedule: the unit is epochs: pass `steps_per_epoch` to the Pruner")
        size = steps_per_epoch if self.unit == "epoch" and steps_per_epoch is not None else 1
        start = round(self.start * size)
        if self.ramp == "oneshot" and self.end is None:
            end = start
        elif self.end is None:
            if steps is None:
                raise RecipeError("schedule: without an `end`, pass `steps`, those of the whole run, to the Pruner")
            end = max(start, steps // 2)
        else:
            end = round(self.end * size)
        every = max(1, (end - start) // 40) if self.every is None else max(1, round(self.every * size))
        last = start if self.ramp == "oneshot" and not self.dense else end
        if steps is not None and last > steps:  # one behind the last step is made by `finish`
            raise RecipeError(f"schedule: its last update is before step {last}, and the run has {steps} steps")
        return Schedule(self.ramp, start, end, every, self.initial, round(self.dense * size), round(self.sparse * size))


class Stage(BaseModel):
    """One pruning; several may run beside each other on different layers.

    Attributes:
        method: a name in `fxprune.passes.training.METHODS`, or {"name": ..., option: value}.
        pattern: what goes as one: "element", "2:4" or any n:m, "32x32" or any rows x columns ("1xchannel" and
            "channelx1": a row, a column), "channel" (every width), "filter" (widths that convolutions make), "head",
            "head_dim", "ffn" (the inner width of an MLP), "hidden" (the width of the residual stream), "layer"
            (branches of residual networks); or several of them; or one of the recipes of block movement: "hybrid",
            "hybrid-filled", "struct".
        target: a sparsity, or see `Goal`. n:m says it already.
        scope: "global": the units of all layers compete; "local": each layer loses the same share.
        schedule: see `When`.
        include, exclude: globs of module or parameter names, or "type:" and a class.
        min_sparsity, max_sparsity: of each layer.
        progressive: updates over which what an update removes goes entry by entry, the smallest first; 0 for at once.
        allocation: how a target that is a cost is spread; by default as `scope` says.
        round_to: widths are multiples of it under a target that is a cost; None takes what the backend runs fast.
        rewind: "none", or after each update that takes something all weights go back to those of a step ("start" is
            0), the same for all stages that do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str | dict[str, Any] = "magnitude"
    pattern: str | tuple[str, ...] = "element"
    target: Goal | None = None
    scope: Literal["global", "local"] = "global"
    schedule: When = When()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_sparsity: float = Field(default=0.0, ge=0, lt=1)
    max_sparsity: float = Field(default=0.98, gt=0, le=1)
    progressive: int = Field(default=0, ge=0)
    allocation: str | dict[str, Any] | None = None
    round_to: int | None = Field(default=None, ge=1)
    rewind: int | Literal["none", "start"] = "none"

    @field_validator("target", mode="before")
    @classmethod
    def _sparsity(cls, value: Any) -> Any:
        return {"sparsity": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _together(self) -> Stage:
        RAMPS[self.schedule.ramp]
        if self.min_sparsity > self.max_sparsity:
            raise ValueError("min_sparsity is above max_sparsity")
        return self

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns, always several."""
        return (self.pattern,) if isinstance(self.pattern, str) else self.pattern

    @property
    def name(self) -> str:
        """The name of the method."""
        return self.method if isinstance(self.method, str) else str(self.method.get("name"))

    @property
    def options(self) -> dict[str, Any]:
        """The options of the method."""
        return {} if isinstance(self.method, str) else {k: v for k, v in self.method.items() if k != "name"}


def stages(given: Any) -> list[Stage]:
    """Return the prunings that a user describes: one mapping, or several.

    Raises:
        RecipeError: a key is unknown, or a value out of range; the text says which.

    >>> [s.patterns for s in stages({"pattern": "4x1", "target": 0.8})]
    [('4x1',)]
    >>> stages({"target_sparsity": 0.8})
    Traceback (most recent call last):
        ...
    fxprune.errors.RecipeError: pruning: there is no key 'target_sparsity'; here it is called target: {sparsity: ...}
    """
    several = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    result = []
    for one in several:
        if isinstance(one, Stage):
            result.append(one)
            continue
        if not isinstance(one, Mapping):
            raise RecipeError(f"pruning: a mapping of keys to values, or a list of them, not {type(one).__name__}")
        try:
            result.append(Stage.model_validate(dict(one)))
        except pydantic.ValidationError as error:
            raise RecipeError("pruning: " + "; ".join(_sentence(e) for e in error.errors())) from None
    if not result:
        raise RecipeError("pruning: there is nothing to do; say for example {'method': 'magnitude', 'target': 0.8}")
    return result


def _sentence(error: Any) -> str:
    where = [str(p) for p in error["loc"]]
    key = ".".join(where)
    if error["type"] == "extra_forbidden":
        inner: dict[str, type[BaseModel]] = {"target": Goal, "schedule": When}
        known = list(inner.get(where[0], Stage).model_fields)
        if where[-1] in ELSEWHERE:
            return f"there is no key '{key}'; here it is called {ELSEWHERE[where[-1]]}"
        return f"there is no key '{key}'" + (nearest(where[-1], known) or f". Known: {', '.join(known)}")
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (given: {error['input']!r})"
