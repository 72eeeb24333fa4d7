"""From masks to a plan, and through rewriting and proof to a smaller model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxprune.admit import admit
from fxprune.axes import Axis
from fxprune.choosing import choose, prepare
from fxprune.clock import Clock, no_collection
from fxprune.copies import copied
from fxprune.errors import TargetError
from fxprune.kept import Indices, Kept
from fxprune.making import make
from fxprune.masks import Masks
from fxprune.modes import evaluating
from fxprune.passes.training.masked import whole
from fxprune.plan import Plan
from fxprune.pruned import Pruned
from fxprune.recipe import read_recipe
from fxprune.rewrite import rewrite

if TYPE_CHECKING:
    from fxprune.training.pruner import Pruner

#: Outputs that differ by less are the same but for rounding.
_SAME = 1e-3


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
    """Return what `Pruner.finish` does. Where it fails the model has its masks as before."""
    from fxprune.passes.training.units import CountedUnits

    subject = pruner._subject
    given = {"target": {"params": 1.0}, "reconstruction": "none", "basis": "none"}
    settings = read_recipe(subject.recipe.model_dump(exclude_unset=True) | given, **overrides)
    plan = _plan(pruner, settings.model_dump(mode="json", exclude_unset=True))
    names = list(subject.weights)
    model = _gathered(pruner) if subject.weights.sharded() else pruner.model
    args, kwargs = _inputs_like(subject.reference, model, (subject.args, subject.kwargs))
    masked = _outputs(model, args, kwargs)
    if model is pruner.model:
        subject.weights.remove()
    dynamic = plan.dynamic or False
    clock = Clock()
    try:
        with no_collection(), torch.inference_mode(False):
            ready = prepare(admit(model), args, kwargs, settings, dynamic, clock, plan, calibration)
            counted = any(isinstance(u, CountedUnits) for one in pruner.prunings for u in one.units)
            result = make(choose(ready, settings, clock, plan), settings, clock, metric, counted)
    except BaseException:
        if list(subject.weights) != names:
            pruner.mask_again()
        raise
    report = result.report
    report.notes += [f"trained with masks: {one.stage.name}, {'+'.join(one.stage.patterns)}" for one in pruner.prunings]
    report.unfit |= pruner.unfit()
    report.notes.append(_difference(masked, _outputs(result.module, args, kwargs)))
    clocked = [one.clocked for one in pruner.prunings if one.clocked is not None]
    if clocked:
        report.clocked = clocked[-1]
    if fill is not None and result.plan.masks:
        filled(result, fill, subject.recipe.seed)
    return result


def _outputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    with evaluating(module), torch.no_grad():
        leaves = pytree.tree_leaves(module(*args, **kwargs))
    return [x.detach().double() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def _difference(masked: list[Tensor], pruned: list[Tensor]) -> str:
    """How far the result is from the model that was trained, in a sentence."""
    far = [float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)) for a, b in zip(masked, pruned, strict=False)]
    largest = max((d for d in far if math.isfinite(d)), default=0.0)
    text = f"outputs on the example inputs differ from the masked model's by {largest:.1e} of the largest"
    if largest > _SAME:
        text += ": norms counted what was masked as zeros, and no longer do; train it on"
    return text


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
        names: dict[str, str] = {}
        for small, dense in rewrite(analysis, kept, subject.reference).names.items():
            names.setdefault(dense, small)  # of tied parameters the first name counts
        left = {names[n]: kept.select(mask, analysis.tensors[n]) for n, mask in masks.items() if n in names}
        plan.masks = Masks({n: mask for n, mask in left.items() if not bool(mask.all())})
    return plan


def _gathered(pruner: Pruner) -> nn.Module:
    """A whole copy of a model that is sharded over processes, with its zeros; each process gets it."""
    weights = pruner._subject.weights
    copy = copied(pruner._subject.reference)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            value = weights.value(name)
            parameter.data = (value * weights.mask(name) if name in weights else value).to(value.dtype, copy=True)
        for name, buffer in copy.named_buffers():
            buffer.copy_(whole(pruner.model.get_buffer(name)))
    return copy.train(pruner.model.training)


def _inputs_like(before: nn.Module, now: nn.Module, inputs: Any) -> Any:
    """Example inputs on the device and in the floating type that the model has been moved to since."""
    first, last = (next(m.parameters(), torch.empty(0)) for m in (before, now))

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        dtype = last.dtype if leaf.dtype == first.dtype else leaf.dtype
        return leaf.to(last.device if leaf.device == first.device else leaf.device, dtype)

    return inputs if (first.device, first.dtype) == (last.device, last.dtype) else pytree.tree_map(moved, inputs)


def filled(result: Pruned, size: float, seed: int) -> None:
    """Make what stays dense again: zeros of masks become small numbers, and the plan has no masks any more.

    Args:
        size: standard deviation of the numbers, in those of the weight.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, mask in result.plan.masks.items():
            parameter = result.module.get_parameter(name)
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * size * parameter.std() * ~mask.to(parameter.device))
    result.plan.masks = Masks()
    result.report.sparse = []
    result.report.notes.append("zeros inside what stays were filled with small numbers: train it on")
