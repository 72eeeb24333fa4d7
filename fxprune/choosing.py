"""From a model and a recipe to what stays: capture, analysis and scores once, then a selection for each target."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fxprune.admit import Admitted
from fxprune.analyse import Analysis, analyse
from fxprune.capture import capture
from fxprune.clock import Clock
from fxprune.costs import Costs
from fxprune.errors import InputError, SavedModelError
from fxprune.groups import Group, find_groups
from fxprune.keep_class import choose_for_class
from fxprune.kept import Kept
from fxprune.masks import Masks
from fxprune.plan import Plan
from fxprune.recipe import Recipe
from fxprune.report import Clocked


@dataclass(slots=True)
class Ready:
    """A model of which it can be chosen what stays.

    Attributes:
        model: after what had to come off.
        args, kwargs: the example inputs.
        multiple: what widths are rounded to.
        data: calibration batches, or None.
        turned: notes on what was turned into principal components.
        chooser: the groups scored, None where nothing is scored.
        metric: the dense model's, once it is known.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    analysis: Analysis
    groups: list[Group]
    costs: Costs
    multiple: int
    data: Any = None
    turned: list[str] = field(default_factory=list)
    chooser: Any = None
    metric: float | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is known once it is decided what stays; `biases` hold what constants of dead units add."""

    ready: Ready
    kept: Kept
    plan: Plan
    biases: dict[str, Tensor] = field(default_factory=dict)
    clocked: Clocked | None = None
    notes: list[str] = field(default_factory=list)


def prepare(
    admitted: Admitted,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: Recipe,
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | bool | None,
    clock: Clock,
    plan: Plan | None = None,
    calibration: Any = None,
    loss: Any = None,
) -> Ready:
    """Capture and analyse a model, read the data, and score its groups as the recipe says; not if a plan is given."""
    from fxprune.passes.calibration import calibration as batches
    from fxprune.passes.choose import chooser, preferred

    if plan is not None and dynamic_shapes is None:
        dynamic_shapes = plan.dynamic or False
    with clock.stage("capture"):
        try:
            captured = capture(admitted.model, args, kwargs, dynamic_shapes)
        except InputError as error:
            if plan is None:
                raise
            raise SavedModelError(f"the plan does not fit the model and its inputs: {error}") from error
        captured.notes += admitted.notes
    with clock.stage("analyse"):
        analysis = analyse(captured)
        groups = find_groups(analysis)
        costs = Costs(analysis)
    data = None if calibration is None else batches(calibration, captured, loss, settings.seed)
    ready = Ready(admitted.model, args, kwargs, analysis, groups, costs, preferred(settings), data)
    with clock.stage("choose"):
        if plan is not None and plan.basis:
            if data is None:
                raise InputError("the plan was made in the basis of principal components: pass the same `calibration`")
            ready.turned = _basis(ready, settings)
        if plan is not None or settings.target.dead or not settings.removes:
            return ready
        ready.turned = _basis(ready, settings)
        if not settings.keep_class:
            ready.chooser = chooser(
                analysis, groups, settings, costs, ready.multiple, None, data, admitted.model, clock.say
            )
    return ready


def choose(
    ready: Ready, settings: Recipe, clock: Clock, plan: Plan | None = None, share: float | None = None
) -> Chosen:
    """Decide what stays, by the recipe's target or as a plan says.

    Args:
        settings: those that the model was prepared with, but for the target.
        share: of the multiply-accumulates, in the place of the target.

    Raises:
        TargetError, BackendError, WriteBackError: see `fxprune.compile`.
        SavedModelError: the plan does not fit the model.
    """
    from fxprune.backends import chosen as backend_of
    from fxprune.passes.meet import meet

    analysis, groups = ready.analysis, ready.groups
    biases: dict[str, Tensor] = {}
    notes: list[str] = []
    clocked = None
    with clock.stage("choose"):
        if settings.target.dead:
            from fxprune.passes.dead import find_dead

            kept, biases = find_dead(analysis, groups, settings)
        elif plan is not None:
            kept = plan.selection(analysis)
        elif not settings.removes:
            kept = Kept({})
        elif settings.keep_class:
            kept, notes = choose_for_class(ready.model, analysis, groups, settings, ready.costs, ready.multiple)
        else:
            ready.chooser.recipe = settings
            if share is not None:
                kept = ready.chooser.kept("macs", share)
            elif settings.target.clocked:
                backend = backend_of(settings.backend)
                kept, clocked = meet(ready.chooser, ready.model, ready.args, ready.kwargs, backend, clock.say)
            else:
                kept = ready.chooser.kept(*settings.target.cost)
        if plan is None and not settings.target.dead:  # constants are folded in the order that is there
            kept, ordered = _ordered(ready, kept, settings)
            notes = [*notes, *ordered]
        made = plan_of(ready, kept, settings, plan, biases)
        made.masks = Masks(plan.masks if plan is not None else {})
    if plan is not None and made.kept != plan.kept:
        raise SavedModelError("the plan removes dead units, and this model's are others: make a new plan for it")
    return Chosen(ready, kept, made, biases, clocked, [*ready.turned, *notes])


def _basis(ready: Ready, settings: Recipe) -> list[str]:
    """Turn attention into principal components, if there are data and the recipe does not forbid it; says so."""
    from fxprune.passes.basis import principal
    from fxprune.select import say

    if settings.basis == "none" or ready.data is None:
        return []
    said = say(ready.analysis, ready.groups, settings)
    free = [g for g in ready.groups if not (g.name in said and said[g.name].whole)]
    changed = principal(ready.analysis, free, ready.data, settings.max_memory)
    return [] if changed is None else [changed.line()]


def _ordered(ready: Ready, kept: Kept, settings: Recipe) -> tuple[Kept, list[str]]:
    """Put axes in the order in which the recipe's pattern keeps the most, and say so."""
    from fxprune.passes.patterns import sparsify

    wanted = sparsify.settings(settings, ready.data is not None)
    if wanted is None or not wanted.permute:
        return kept, []
    kept, said = sparsify.reordered(ready.analysis, ready.groups, kept, settings, wanted.pattern)
    if not said:
        return kept, []
    gained = statistics.median(o.found / o.plain - 1 for o in said)
    return kept, [
        f"{len(said)} groups are in the order in which {wanted.pattern.name} keeps the most: {gained:.1%} more of the "
        "weights' magnitude (median)"
    ]


def plan_of(ready: Ready, kept: Kept, settings: Recipe, plan: Plan | None = None, biases: Iterable[str] = ()) -> Plan:
    """Return the plan of a selection; of one that was made by a plan with that one's reasons."""
    from fxprune.select import reasons, say

    why = plan.reasons() if plan is not None else reasons(say(ready.analysis, ready.groups, settings))
    return Plan.of(
        ready.analysis,
        ready.groups,
        kept,
        ready.costs,
        why,
        biases=list(biases),
        recipe=settings.model_dump(mode="json", exclude_unset=True),
        basis=bool(ready.turned) or (plan is not None and plan.basis),
    )
