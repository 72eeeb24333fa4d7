"""From what was chosen to the result: rewrite, proof, reconstruction, the steps behind it, and the report on all."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import nn

from fxprune import quantization, steps
from fxprune.choosing import Chosen, Ready, choose, plan_of
from fxprune.clock import Clock
from fxprune.emptied import without_empty
from fxprune.errors import InputError, TargetError
from fxprune.groups import frozen_dimensions
from fxprune.kept import Kept
from fxprune.masks import Masks
from fxprune.plan import Plan
from fxprune.prove import Proof, prove
from fxprune.provenance import provenance
from fxprune.pruned import Pruned
from fxprune.recipe import Recipe
from fxprune.report import CLOCK_TOLERANCE, Pair, PartTime, Refitted, Report, Step
from fxprune.rewrite import Rewritten, rewrite
from fxprune.writeback import module_like

#: model -> number, higher is better.
Metric = Callable[[nn.Module], float]
#: Trials for a target max_drop.
_BISECTIONS = 6


def make(chosen: Chosen, settings: Recipe, clock: Clock, metric: Metric | None = None, counted: bool = False) -> Pruned:
    """Return the pruned model that was chosen, proved and measured by the metric.

    Args:
        counted: masks of the plan are of n:m, which what is empty is not removed from: groups of m would be torn apart.

    Raises:
        ProofError, WriteBackError, TargetError, InputError: see `fxprune.compile`.
    """
    from fxprune.passes import reconstruct
    from fxprune.passes.patterns import sparsify
    from fxprune.passes.patterns.pattern import NOfM

    ready, kept = chosen.ready, chosen.kept
    model, analysis, data = ready.model, ready.analysis, ready.data
    if metric is not None and ready.metric is None:
        ready.metric = measured(metric, model)
    with clock.stage("rewrite"):
        rewritten = rewrite(analysis, kept, model, chosen.biases)
        written = module_like(model, analysis, kept, rewritten.module, settings.seed) if settings.keep_class else None
    with clock.stage("prove"):
        proof = prove(analysis, kept, rewritten, model, settings.proof, settings.seed, settings.target.dead)
    refitted, tuned = list[Refitted](), None
    method, options = reconstruct.settings(settings, data is not None)
    known = ready.chooser.statistics if ready.chooser is not None else None
    if data is not None and method != "none":
        with clock.stage("reconstruct"):
            refitted, tuned = reconstruct.reconstruct(
                analysis, kept, rewritten, data, method, statistics=known, **options
            )
    plan, done, notes = chosen.plan, None, list(chosen.notes)
    work = _work(ready, kept, rewritten, settings, metric)
    wanted = sparsify.settings(settings, data is not None)
    if wanted is not None:
        with clock.stage("sparsify"):
            done = steps.sparsify(work, wanted, plan.masks)
            plan = dataclasses.replace(plan, masks=Masks(done.masks))
            refitted, tuned = done.refitted or refitted, done.tuned or tuned
            counted = isinstance(wanted.pattern, NOfM)
    elif plan.masks:
        with clock.stage("mask"):
            done = steps.masked(work, plan.masks)
    if done is not None:
        with clock.stage("remove what is empty"):
            emptied = None
            if done.masks and not settings.keep_class and not counted:
                emptied = without_empty(analysis, plan, rewritten, ready.args, ready.kwargs, settings, done.masks)
            if emptied is not None:
                kept, rewritten.module = emptied.kept, emptied.module
                notes.append(
                    f"{emptied.units} units were empty and are removed: the same within {emptied.proof.error:.1e}"
                )
                plan = plan_of(ready, kept, settings, chosen.plan, emptied.biases)
                plan.masks = Masks(emptied.masks)
    int8, file = quantization.settings(settings, data is not None), None
    shrunk: Step | None = None
    if int8 is not None:
        with clock.stage("quantize"):
            shrunk, file = quantization.quantize(work, int8)
    if settings.keep_class and (refitted or done is not None):
        written = module_like(model, analysis, kept, rewritten.module, settings.seed)
    module = written.module if written else rewritten.module
    report = _report(chosen, kept, plan, proof, settings, notes)
    report.refitted, report.tuned = refitted, tuned
    with clock.stage("compare"):
        report.error = work.own_error()
        if metric is not None and ready.metric is not None:
            report.metric = Pair(ready.metric, measured(metric, module))
    report.seconds = clock.seconds
    if done is not None:
        report.steps, report.sparse, report.unfit = [done.step], done.rows, done.unfit
    if shrunk is not None:
        report.steps.append(shrunk)
    return Pruned(
        module=module,
        plan=plan,
        report=report,
        args=ready.args,
        kwargs=ready.kwargs,
        dense=model,
        written=written,
        quantized=file,
        _graph=rewritten.module if written else None,
    )


def _work(ready: Ready, kept: Kept, rewritten: Rewritten, settings: Recipe, metric: Metric | None) -> steps.Work:
    """What the steps after structured pruning may ask for."""
    return steps.Work(
        ready.analysis,
        ready.groups,
        kept,
        rewritten,
        settings,
        ready.data,
        ready.chooser.statistics if ready.chooser is not None else None,
        None if metric is None else functools.partial(measured, metric),
        ready.args,
        ready.kwargs,
    )


def within_drop(ready: Ready, settings: Recipe, clock: Clock, metric: Metric) -> Pruned:
    """Return the smallest share of the multiply-accumulates, by bisection, that loses no more than is allowed.

    Raises:
        TargetError: the least that can be removed already costs more.
    """
    assert settings.target.max_drop is not None
    best, worst = None, None
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        share = (low + high) / 2
        clock.say(f"try {share:.2f} of the multiply-accumulates")
        try:
            chosen = choose(ready, settings, clock, share=share)
        except TargetError:
            low = share
            continue
        pruned = make(chosen, settings, clock, metric)
        assert pruned.report.metric is not None
        drop = pruned.report.metric.dense - pruned.report.metric.pruned
        if drop <= settings.target.max_drop:
            best, high = pruned, share
        else:
            worst, low = drop, share
    if best is None:
        raise TargetError(
            f"the metric drops by {worst if worst is not None else float('nan'):.3g} at {low:.2f} of the "
            f"multiply-accumulates already; {settings.target.max_drop:.3g} is allowed"
        )
    return best


def measured(metric: Metric, model: nn.Module) -> float:
    """Return a user's metric of a model, taken without gradients.

    Raises:
        InputError: it fails, or what it gives is no finite number.
    """
    try:
        with torch.no_grad():
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


def _report(chosen: Chosen, kept: Kept, plan: Plan, proof: Proof, settings: Recipe, more: list[str]) -> Report:
    from fxprune.passes.choose import exact, losses
    from fxprune.passes.latency import LatencyCosts

    ready = chosen.ready
    analysis, model, data = ready.analysis, ready.model, ready.data
    counts = {axis: len(indices) for axis, indices in kept.items()}
    left = ready.costs.without(kept.removed)
    notes = [*analysis.captured.notes, *more]
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
    if chosen.clocked is not None and not chosen.clocked.met(CLOCK_TOLERANCE):
        notes.append("the target on the clock was missed")
    scored = ready.chooser
    parts = []
    if chosen.clocked is not None and scored is not None and isinstance(scored.costs, LatencyCosts):
        now = scored.costs.without(kept.removed).by_part(counts)
        parts = [PartTime(n, dense * 1e3, now.get(n, 0.0) * 1e3) for n, dense in scored.costs.by_part({}).items()]
    return Report(
        model=type(model).__name__,
        macs=Pair(ready.costs.macs({}), left.macs(counts)),
        params=Pair(ready.costs.params({}), left.params(counts)),
        memory=Pair(ready.costs.memory({}), left.memory(counts)),
        proof=proof,
        groups=plan.groups,
        whole={f"{w.tensor}.{w.dim}": w.reason for w in frozen_dimensions(analysis)},
        unknown={str(target): len(nodes) for target, nodes in analysis.unknown.items()},
        round_to=ready.multiple,
        recipe=exact(settings, data is not None).model_dump(mode="json"),
        notes=notes,
        clocked=chosen.clocked,
        samples=0 if data is None else data.samples,
        random=data is not None and data.random,
        made=provenance(None if data is None else [(b.inputs, b.labels) for b in data.batches]),
        losses=losses(scored) if scored is not None else {},
        parts=parts,
    )
