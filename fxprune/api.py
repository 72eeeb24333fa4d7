"""`compile`: a model in, a smaller model with its plan and report out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune import quantization
from fxprune.admit import admit
from fxprune.capture import example
from fxprune.choosing import choose, prepare
from fxprune.clock import Clock, Progress, no_collection
from fxprune.errors import BackendError, InputError, RecipeError
from fxprune.making import make, within_drop
from fxprune.plan import Plan
from fxprune.pruned import Pruned
from fxprune.recipe import Recipe, read_recipe


def compile(
    model: nn.Module,
    example_inputs: Any,
    recipe: Mapping[str, Any] | str | os.PathLike[str] | Recipe | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | bool | None = None,
    progress: Progress | None = None,
    plan: Plan | None = None,
    calibration: Any = None,
    loss: Callable[..., Tensor] | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    **overrides: Any,
) -> Pruned:
    """Prune a model: capture, analyse, choose, rewrite, prove; with calibration data reconstruct.

    Args:
        model: any module; it is left exactly as it was. An fx.GraphModule, or the result of an earlier `compile`, too,
            and an exported program. Wrappers come off, parametrisations are folded: `report.notes` says so.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        recipe: a dict, a YAML file or a `Recipe`: see `fxprune.recipe.Recipe` for the keys.
        kwargs: keyword inputs beside positional ones.
        dynamic_shapes: {input name: {dimension: size name}}; by default the batch is dynamic where the model allows it.
        progress: called with the name of each stage as it begins.
        plan: what `dry_run` returned, or the plan of an earlier result: the same is kept, nothing is chosen anew. Its
            recipe holds; `backend`, `proof`, `seed` and `keep_class` can be given anew.
        calibration: batches of what the model takes, labels behind the inputs where a loss needs them: a DataLoader, a
            list, or a number of random samples. A few hundred samples are plenty. With them what is removed is what
            costs the least once the rest is refitted, and the rest is refitted; without, the smallest weights go.
        loss: (output, labels) -> scalar, for criteria that use gradients; without one they use the model's own output.
        metric: model -> number, higher is better: reported, and what a target `max_drop` and the `max_drop` of a
            sparsity or a quantization are about.
        overrides: keys of the recipe, `target={"macs": 0.5}`.

    Raises:
        RecipeError, InputError, CaptureError, TargetError, NonFiniteError, ProofError, BackendError: see
            `fxprune.errors`.
        SavedModelError: the plan does not fit the model.

    >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> pruned = compile(net, torch.randn(2, 8), {"target": {"macs": 0.5}})
    >>> pruned.module
    Sequential(
      (0): Linear(in_features=8, out_features=32, bias=True)
      (2): Linear(in_features=32, out_features=4, bias=True)
    )
    >>> {name: list(dims) for name, dims in pruned.plan.kept.items()}
    {'0.weight': [0], '0.bias': [0], '2.weight': [1]}
    """
    settings = checked(recipe, plan, overrides, calibration is not None, metric)
    admitted = admit(model)
    args, keywords = example(example_inputs, kwargs)
    clock = Clock(progress)
    with no_collection(), torch.inference_mode(False):  # inference tensors could not be trained
        ready = prepare(admitted, args, keywords, settings, dynamic_shapes, clock, plan, calibration, loss)
        if plan is None and settings.target.max_drop is not None and metric is not None:
            return within_drop(ready, settings, clock, metric)
        return make(choose(ready, settings, clock, plan), settings, clock, metric)


def dry_run(
    model: nn.Module,
    example_inputs: Any,
    recipe: Mapping[str, Any] | str | os.PathLike[str] | Recipe | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | bool | None = None,
    progress: Progress | None = None,
    calibration: Any = None,
    loss: Callable[..., Tensor] | None = None,
    **overrides: Any,
) -> Plan:
    """Return what `compile` would keep and what that costs, without cutting anything.

    Each group says how many units stay and what of the recipe blocks or forces it. Hand the plan to
    `compile(model, example_inputs, plan=plan)` to do it.

    >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> plan = dry_run(net, torch.randn(2, 8), {"target": {"macs": 0.5}})
    >>> [(g.name, g.size, g.kept, g.params) for g in plan.groups], plan.costs["params"]
    ([('0.weight.0', 64, 32, 416)], (836, 420))
    >>> compile(net, torch.randn(2, 8), plan=plan).module.get_parameter("0.weight").shape
    torch.Size([32, 8])
    """
    settings = checked(recipe, None, overrides, calibration is not None)
    admitted = admit(model)
    args, keywords = example(example_inputs, kwargs)
    clock = Clock(progress)
    with no_collection(), torch.inference_mode(False):
        ready = prepare(admitted, args, keywords, settings, dynamic_shapes, clock, None, calibration, loss)
        return choose(ready, settings, clock).plan


#: Keys of a recipe that a plan leaves open.
_AFTER_CHOOSING = {"backend", "keep_class", "max_memory", "proof", "reconstruction", "seed", "threads"}


def settings_of(plan: Plan, overrides: Mapping[str, Any]) -> Recipe:
    """Return a plan's recipe with what a plan leaves open overridden.

    Raises:
        RecipeError: an override is about what stays, which the plan has said.
    """
    late = sorted(key for key, value in overrides.items() if value is not None and key not in _AFTER_CHOOSING)
    if late:
        raise RecipeError(f"a plan says already what stays: {', '.join(late)} can no longer change it")
    return read_recipe({"target": {"params": 1.0}, **plan.recipe}, **overrides)


def checked(
    recipe: Any, plan: Plan | None, overrides: dict[str, Any], data: bool = False, metric: object = None
) -> Recipe:
    """Return the recipe; names that it gets wrong are refused before any work is done."""
    from fxprune.backends import chosen
    from fxprune.passes import reconstruct
    from fxprune.passes.choose import functions
    from fxprune.passes.patterns import sparsify

    if plan is not None and recipe is not None:
        raise RecipeError("give a recipe or a plan, not both: a plan has its recipe with it")
    if plan is not None:
        settings = settings_of(plan, overrides)
    else:
        settings = read_recipe(recipe if not isinstance(recipe, os.PathLike) else Path(recipe), **overrides)
    criterion, _ = functions(settings, data)
    reconstruct.settings(settings, data)
    sparsify.settings(settings, data)
    quantization.settings(settings, data)
    target = settings.target
    if criterion.needs and not data and not target.dead and plan is None:
        raise InputError(
            f"criterion '{settings.criterion}' takes calibration data: pass `calibration`, a loader of inputs like the "
            "example's, or choose criterion 'magnitude', which needs none"
        )
    if plan is None and target.max_drop is not None and metric is None:
        raise RecipeError("target max_drop takes `metric`, a function from a model to a number")
    if settings.keep_class and (target.clocked or target.max_drop is not None):
        raise RecipeError("keep_class goes with the targets macs and params; the others are met without it")
    backend = chosen(settings.backend)
    reason = backend.available() if target.clocked else None
    if reason is not None:
        raise BackendError(f"backend '{backend.name}' cannot be used here: {reason}")
    return settings
