"""From masks to a plan, and through rewriting and proof to a smaller model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.admit import admit
from fxprune.axes import Axis
from fxprune.choosing import choose, prepare
from fxprune.clock import Clock, no_collection
from fxprune.errors import TargetError
from fxprune.kept import Indices, Kept
from fxprune.making import make
from fxprune.masks import Masks
from fxprune.plan import Plan
from fxprune.pruned import Pruned
from fxprune.recipe import read_recipe
from fxprune.rewrite import rewrite

if TYPE_CHECKING:
    from fxprune.training.pruner import Pruner


def refuse_open(pruner: Pruner) -> None:
    """Refuse to finish in the middle; nothing has been changed then, so that training can go on.

    Raises:
        TargetError: the schedule is not at its end.
    """
    open_ = [one for one in pruner.prunings if not one.done]
    if open_:
        raise TargetError(
            f"step {pruner.step}: the schedule of '{open_[0].stage.name}' goes on to step {open_[0].schedule.end}, and "
            f"{open_[0].gone:.1%} of {open_[0].target:.1%} is gone; train on, or let it end earlier"
        )


def finished(
    pruner: Pruner,
    calibration: Any,
    metric: Callable[[nn.Module], float] | None,
    fill: float | None,
    overrides: dict[str, Any],
) -> Pruned:
    """Return what `Pruner.finish` does."""
    subject = pruner._subject
    given = {"target": {"params": 1.0}, "reconstruction": "none", "basis": "none"}
    settings = read_recipe(subject.recipe.model_dump(exclude_unset=True) | given, **overrides)
    plan = _plan(pruner, settings.model_dump(mode="json", exclude_unset=True))
    subject.weights.remove()
    dynamic = plan.dynamic or False
    clock = Clock()
    with no_collection(), torch.inference_mode(False):
        ready = prepare(admit(pruner.model), subject.args, subject.kwargs, settings, dynamic, clock, plan, calibration)
        result = make(choose(ready, settings, clock, plan), settings, clock, metric)
    report = result.report
    report.notes += [f"trained with masks: {one.stage.name}, {'+'.join(one.stage.patterns)}" for one in pruner.prunings]
    report.unfit |= pruner.unfit()
    clocked = [one.clocked for one in pruner.prunings if one.clocked is not None]
    if clocked:
        report.clocked = clocked[-1]
    if fill is not None and result.plan.masks:
        _fill(result, fill, subject.recipe.seed)
    return result


def _plan(pruner: Pruner, recipe: dict[str, Any]) -> Plan:
    """What stays, by the names of the model that will be pruned."""
    subject = pruner._subject
    analysis = subject.analysis
    axes: dict[Axis, Indices] = {}
    removed: dict[fx.Node, fx.Node] = {}
    masks: dict[str, Tensor] = {}
    for one in pruner.prunings:
        kept = one.selection()
        removed |= kept.removed
        for axis, indices in kept.items():
            axes[axis] = np.intersect1d(axes[axis], indices) if axis in axes else indices
        for name, mask in one.inside().items():
            masks[name] = masks[name] & mask if name in masks else mask
    kept = Kept(axes, removed)
    plan = Plan.of(analysis, subject.groups, kept, subject.costs, {}, recipe=recipe)
    if masks:
        names = {dense: small for small, dense in rewrite(analysis, kept, subject.reference).names.items()}
        left = {names[n]: kept.select(mask, analysis.tensors[n]) for n, mask in masks.items() if n in names}
        plan.masks = Masks({n: mask for n, mask in left.items() if not bool(mask.all())})
    return plan


def _fill(result: Pruned, size: float, seed: int) -> None:
    """Make what stays dense again: zeros of masks become small numbers, and the plan has no masks any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, mask in result.plan.masks.items():
            parameter = result.module.get_parameter(name)
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * size * parameter.std() * ~mask.to(parameter.device))
    result.plan.masks = Masks()
    result.report.sparse = []
    result.report.notes.append("zeros inside what stays were filled with small numbers: train it on")
