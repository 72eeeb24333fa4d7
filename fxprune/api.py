"""`compile`: a model in, a smaller model with its plan and report out."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune import quantization, steps
from fxprune.admit import Admitted, admit
from fxprune.analyse import Analysis, analyse
from fxprune.capture import capture, example
from fxprune.clock import Clock, Progress, no_collection
from fxprune.costs import Costs
from fxprune.emptied import without_empty
from fxprune.errors import BackendError, InputError, RecipeError, SavedModelError, TargetError
from fxprune.groups import Group, find_groups, frozen_dimensions
from fxprune.keep_class import choose_for_class
from fxprune.kept import Kept
from fxprune.masks import Masks
from fxprune.plan import Plan
from fxprune.prove import prove
from fxprune.pruned import Pruned
from fxprune.recipe import Recipe, read_recipe
from fxprune.report import CLOCK_TOLERANCE, Clocked, Pair, Refitted, Report, Step
from fxprune.rewrite import Rewritten, rewrite
from fxprune.writeback import module_like


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
        metric: model -> number, higher is better: for `target={"max_drop": ...}`, and for the `max_drop` of a sparsity.
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
    settings = _settings(recipe, plan, overrides, calibration is not None, metric)
    admitted = admit(model)
    args, keywords = example(example_inputs, kwargs)
    clock = Clock(progress)
    with no_collection(), torch.inference_mode(False):  # inference tensors could not be trained
        chosen = _choose(admitted, args, keywords, settings, dynamic_shapes, clock, plan, calibration, loss)
        if settings.target.max_drop is not None and metric is not None:
            return _within_drop(admitted.model, args, keywords, settings, chosen, clock, metric)
        return _compile(admitted.model, args, keywords, settings, chosen, clock, metric)


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
    settings = _settings(recipe, None, overrides, calibration is not None)
    admitted = admit(model)
    args, keywords = example(example_inputs, kwargs)
    clock = Clock(progress)
    with no_collection(), torch.inference_mode(False):
        return _choose(admitted, args, keywords, settings, dynamic_shapes, clock, None, calibration, loss).plan


#: Trials for a target max_drop.
_BISECTIONS = 6
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


def _settings(
    recipe: Any, plan: Plan | None, overrides: dict[str, Any], data: bool = False, metric: object = None
) -> Recipe:
    """The recipe; names that it gets wrong are refused before any work is done."""
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
    sparsity = sparsify.settings(settings, data)
    int8 = quantization.settings(settings, data)
    target = settings.target
    if criterion.needs and not data and not target.dead and plan is None:
        raise InputError(
            f"criterion '{settings.criterion}' takes calibration data: pass `calibration`, a loader of inputs like the "
            "example's, or choose criterion 'magnitude', which needs none"
        )
    if plan is not None and metric is not None:
        raise RecipeError("a plan says already what stays: a metric can no longer change it")
    if plan is None and target.max_drop is not None and metric is None:
        raise RecipeError("target max_drop takes `metric`, a function from a model to a number")
    if metric is not None and target.max_drop is None and sparsity is None and int8 is None:
        raise RecipeError("`metric` goes with a target max_drop, a sparsity or a quantization, and there is none")
    if settings.keep_class and (target.clocked or target.max_drop is not None):
        raise RecipeError("keep_class goes with the targets macs and params; the others are met without it")
    backend = chosen(settings.backend)
    reason = backend.available() if target.clocked else None
    if reason is not None:
        raise BackendError(f"backend '{backend.name}' cannot be used here: {reason}")
    return settings


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What is known once it is decided what stays; `biases` hold what constants of dead units add."""

    analysis: Analysis
    costs: Costs
    kept: Kept
    plan: Plan
    multiple: int
    biases: dict[str, Tensor]
    groups: list[Group] = field(default_factory=list)
    data: Any = None
    clocked: Clocked | None = None
    chooser: Any = None


def _choose(
    admitted: Admitted,
    args: tuple[Any, ...],
    keywords: dict[str, Any],
    settings: Recipe,
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | bool | None,
    clock: Clock,
    plan: Plan | None = None,
    calibration: Any = None,
    loss: Any = None,
) -> _Chosen:
    from fxprune.backends import chosen as backend_of
    from fxprune.passes.calibration import calibration as batches
    from fxprune.passes.choose import chooser, preferred
    from fxprune.passes.meet import meet

    if plan is not None and dynamic_shapes is None:
        dynamic_shapes = plan.dynamic or False
    with clock.stage("capture"):
        try:
            captured = capture(admitted.model, args, keywords, dynamic_shapes)
        except InputError as error:
            if plan is None:
                raise
            raise SavedModelError(f"the plan does not fit the model and its inputs: {error}") from error
        captured.notes += admitted.notes
    with clock.stage("analyse"):
        analysis = analyse(captured)
        groups = find_groups(analysis)
        costs = Costs(analysis)
    multiple = preferred(settings)
    biases: dict[str, Tensor] = {}
    data = None if calibration is None else batches(calibration, captured, loss, settings.seed)
    clocked, scored = None, None
    turned: list[str] = []
    with clock.stage("choose"):
        if settings.target.dead:
            from fxprune.passes.dead import find_dead

            kept, biases = find_dead(analysis, groups, settings)
        elif plan is not None:
            kept = plan.selection(analysis)
            if plan.basis:
                if data is None:
                    raise InputError(
                        "the plan was made in the basis of principal components: pass the same `calibration`"
                    )
                captured.notes += _basis(analysis, groups, settings, data)
        elif not settings.removes:
            kept = Kept({})
        elif settings.keep_class:
            turned = _basis(analysis, groups, settings, data)
            captured.notes += turned
            kept, notes = choose_for_class(admitted.model, analysis, groups, settings, costs, multiple)
            captured.notes += notes
        else:
            turned = _basis(analysis, groups, settings, data)
            captured.notes += turned
            scored = chooser(analysis, groups, settings, costs, multiple, None, data, admitted.model, clock.say)
            if settings.target.clocked:
                backend = backend_of(settings.backend)
                kept, clocked = meet(scored, admitted.model, args, keywords, backend, clock.say)
            else:
                kept = scored.kept(*settings.target.cost)
        if plan is None and not settings.target.dead:  # constants are folded in the order that is there
            kept, notes = _ordered(analysis, groups, kept, settings, data is not None)
            captured.notes += notes
        chosen = _plan(analysis, groups, kept, costs, settings, plan, biases)
        chosen.masks = Masks(plan.masks if plan is not None else {})
        chosen.basis = bool(turned) or (plan is not None and plan.basis)
    if plan is not None and chosen.kept != plan.kept:
        raise SavedModelError("the plan removes dead units, and this model's are others: make a new plan for it")
    return _Chosen(analysis, costs, kept, chosen, multiple, biases, groups, data, clocked, scored)


def _basis(analysis: Analysis, groups: list[Group], settings: Recipe, data: Any) -> list[str]:
    """Turn attention into principal components, if there are data and the recipe does not forbid it; says so."""
    from fxprune.passes.basis import principal
    from fxprune.select import say

    if settings.basis == "none" or data is None or not settings.removes:
        return []
    said = say(analysis, groups, settings)
    changed = principal(
        analysis, [g for g in groups if not (g.name in said and said[g.name].whole)], data, settings.max_memory
    )
    return [] if changed is None else [changed.line()]


def _ordered(
    analysis: Analysis, groups: list[Group], kept: Kept, settings: Recipe, data: bool
) -> tuple[Kept, list[str]]:
    """Put axes in the order in which the recipe's pattern keeps the most, and say so."""
    from fxprune.passes.patterns import sparsify

    wanted = sparsify.settings(settings, data)
    if wanted is None or not wanted.permute:
        return kept, []
    kept, said = sparsify.reordered(analysis, groups, kept, settings, wanted.pattern)
    if not said:
        return kept, []
    gained = statistics.median(o.found / o.plain - 1 for o in said)
    return kept, [
        f"{len(said)} groups are in the order in which {wanted.pattern.name} keeps the most: {gained:.1%} more of the "
        "weights' magnitude (median)"
    ]


def _plan(
    analysis: Analysis,
    groups: list[Group],
    kept: Kept,
    costs: Costs,
    settings: Recipe,
    plan: Plan | None = None,
    biases: Iterable[str] = (),
) -> Plan:
    from fxprune.select import reasons, say

    why = plan.reasons() if plan is not None else reasons(say(analysis, groups, settings))
    recipe = settings.model_dump(mode="json", exclude_unset=True)
    return Plan.of(analysis, groups, kept, costs, why, biases=list(biases), recipe=recipe)


def _compile(
    model: nn.Module,
    args: tuple[Any, ...],
    keywords: dict[str, Any],
    settings: Recipe,
    chosen: _Chosen,
    clock: Clock,
    metric: Callable[[nn.Module], float] | None = None,
) -> Pruned:
    from fxprune.passes import reconstruct
    from fxprune.passes.patterns import sparsify
    from fxprune.passes.patterns.pattern import NOfM

    analysis, kept, biases = chosen.analysis, chosen.kept, chosen.biases
    with clock.stage("rewrite"):
        rewritten = rewrite(analysis, kept, model, biases)
        written = module_like(model, analysis, kept, rewritten.module, settings.seed) if settings.keep_class else None
    with clock.stage("prove"):
        proof = prove(analysis, kept, rewritten, model, settings.proof, settings.seed, settings.target.dead)
    refitted, tuned = list[Refitted](), None
    method, options = reconstruct.settings(settings, chosen.data is not None)
    if chosen.data is not None and method != "none":
        with clock.stage("reconstruct"):
            known = chosen.chooser.statistics if chosen.chooser is not None else None
            refitted, tuned = reconstruct.reconstruct(
                analysis, kept, rewritten, chosen.data, method, statistics=known, **options
            )
    plan, done, more = chosen.plan, None, list[str]()
    work = _work(args, keywords, settings, chosen, rewritten, metric)
    wanted = sparsify.settings(settings, chosen.data is not None)
    if wanted is not None:
        with clock.stage("sparsify"):
            done = steps.sparsify(work, wanted, plan.masks)
            plan = dataclasses.replace(plan, masks=Masks(done.masks))
            refitted, tuned = done.refitted or refitted, done.tuned or tuned
            emptied = None
            if done.masks and not settings.keep_class and not isinstance(wanted.pattern, NOfM):
                emptied = without_empty(analysis, plan, rewritten, args, keywords, settings, done.masks)
            if emptied is not None:
                kept, rewritten.module = emptied.kept, emptied.module
                more = [f"{emptied.units} units were empty and are removed: the same within {emptied.proof.error:.1e}"]
                plan = _plan(analysis, chosen.groups, kept, chosen.costs, settings, chosen.plan, emptied.biases)
                plan.masks, plan.basis = Masks(emptied.masks), chosen.plan.basis
    int8, file = quantization.settings(settings, chosen.data is not None), None
    shrunk: Step | None = None
    if int8 is not None:
        with clock.stage("quantize"):
            shrunk, file = quantization.quantize(work, int8)
    if settings.keep_class and (refitted or done is not None):
        written = module_like(model, analysis, kept, rewritten.module, settings.seed)
    report = _report(model, analysis, chosen.costs, kept, plan, proof, clock.seconds, chosen.multiple, settings)
    report.refitted, report.tuned, report.clocked = refitted, tuned, chosen.clocked
    if chosen.data is not None:
        report.samples, report.random = chosen.data.samples, chosen.data.random
    report.notes += more
    if done is not None:
        report.steps, report.sparse, report.unfit = [done.step], done.rows, done.unfit
    if shrunk is not None:
        report.steps.append(shrunk)
    if chosen.clocked is not None and not chosen.clocked.met(CLOCK_TOLERANCE):
        report.notes.append("the target on the clock was missed")
    return Pruned(
        module=written.module if written else rewritten.module,
        plan=plan,
        report=report,
        args=args,
        kwargs=keywords,
        dense=model,
        written=written,
        quantized=file,
        _graph=rewritten.module if written else None,
    )


def _work(
    args: tuple[Any, ...],
    keywords: dict[str, Any],
    settings: Recipe,
    chosen: _Chosen,
    rewritten: Rewritten,
    metric: Callable[[nn.Module], float] | None,
) -> steps.Work:
    """What the steps after structured pruning may ask for."""
    return steps.Work(
        chosen.analysis,
        chosen.groups,
        chosen.kept,
        rewritten,
        settings,
        chosen.data,
        chosen.chooser.statistics if chosen.chooser is not None else None,
        None if metric is None else functools.partial(_measured, metric),
        args,
        keywords,
    )


def _within_drop(
    model: nn.Module,
    args: tuple[Any, ...],
    keywords: dict[str, Any],
    settings: Recipe,
    chosen: _Chosen,
    clock: Clock,
    metric: Callable[[nn.Module], float],
) -> Pruned:
    """The smallest share of the multiply-accumulates, by bisection, at which the metric loses no more than allowed.

    Raises:
        TargetError: the least that can be removed already costs more.
    """
    assert settings.target.max_drop is not None
    dense = _measured(metric, model)
    best, worst = None, None
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        share = (low + high) / 2
        clock.say(f"try {share:.2f} of the multiply-accumulates")
        try:
            kept = chosen.chooser.kept("macs", share)
        except TargetError:
            low = share
            continue
        plan = _plan(chosen.analysis, chosen.groups, kept, chosen.costs, settings)
        trial = dataclasses.replace(chosen, kept=kept, plan=plan)
        pruned = _compile(model, args, keywords, settings, trial, clock, metric)
        drop = dense - _measured(metric, pruned.module)
        if drop <= settings.target.max_drop:
            best, high = pruned, share
            pruned.report.notes.append(f"the metric is {dense - drop:.4g}, dense {dense:.4g}")
        else:
            worst, low = drop, share
    if best is None:
        raise TargetError(
            f"the metric drops by {worst if worst is not None else float('nan'):.3g} at {low:.2f} of the "
            f"multiply-accumulates already; {settings.target.max_drop:.3g} is allowed"
        )
    return best


def _measured(metric: Callable[[nn.Module], float], model: nn.Module) -> float:
    """A user's metric of a model.

    Raises:
        InputError: it fails, or what it gives is no finite number.
    """
    try:
        value = metric(model)
    except Exception as error:
        raise InputError(f"the metric fails: {type(error).__name__}: {error}") from error
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = float("nan")
    if not math.isfinite(number):
        raise InputError(f"the metric gives {str(value)[:60]}, of type {type(value).__name__}, not a finite number")
    return number


def _report(
    model: nn.Module,
    analysis: Analysis,
    costs: Costs,
    kept: Kept,
    plan: Plan,
    proof: Any,
    seconds: dict[str, float],
    multiple: int,
    recipe: Recipe,
) -> Report:
    counts = {axis: len(indices) for axis, indices in kept.items()}
    left = costs.without(kept.removed)
    notes = list(analysis.captured.notes)
    if plan.blocks:
        many = f"{len(plan.blocks)} blocks are" if len(plan.blocks) > 1 else "1 block is"
        notes.append(f"{many} removed whole: {', '.join(plan.blocks)}")
    if not plan.groups:
        notes.append(
            "no group can be cut: the model comes back whole; `fxprune explain` says what freezes each dimension"
        )
    elif not kept.smaller and not plan.recipe.get("sparsity"):
        notes.append("nothing was removed: the target is met by the model as it is")
    used = set(analysis.tensors)
    unused = [n for n, _ in model.named_parameters() if n not in used and n not in analysis.captured.aliases]
    if unused:
        notes.append(f"{len(unused)} parameters take no part in the outputs and are left out: {', '.join(unused[:3])}")
    return Report(
        model=type(model).__name__,
        macs=Pair(costs.macs({}), left.macs(counts)),
        params=Pair(costs.params({}), left.params(counts)),
        proof=proof,
        groups=plan.groups,
        whole={f"{w.tensor}.{w.dim}": w.reason for w in frozen_dimensions(analysis)},
        unknown={str(target): len(nodes) for target, nodes in analysis.unknown.items()},
        seconds=seconds,
        round_to=multiple,
        recipe=recipe.model_dump(mode="json"),
        notes=notes,
    )
