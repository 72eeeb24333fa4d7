"""What follows structured pruning: zeros inside weights, then smaller numbers; each compared with what was before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.analyse import Analysis
from fxprune.copies import copied
from fxprune.errors import BackendError, SavedModelError, TargetError
from fxprune.groups import Group
from fxprune.kept import Kept
from fxprune.measure import measure
from fxprune.modes import evaluating
from fxprune.recipe import Recipe
from fxprune.report import Refitted, Sparse, Step
from fxprune.rewrite import Rewritten

#: Samples that outputs are compared on.
SAMPLES = 128
#: A step pays where it is surely so many times as fast: less is in the noise of the clock.
_PAYS = 1.02


@dataclass
class Work:
    """A pruned module on its way, and all that steps may ask for.

    Attributes:
        data: calibration batches, or None.
        statistics: of the dense model, where known already.
        metric: model -> number, higher is better, or None.
        args, kwargs: the example inputs.
    """

    analysis: Analysis
    groups: Sequence[Group]
    kept: Kept
    rewritten: Rewritten
    recipe: Recipe
    data: Any
    statistics: Any
    metric: Callable[[nn.Module], float] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    _outputs: Any = None

    @property
    def module(self) -> fx.GraphModule:
        """The module, whose weights steps change in place."""
        return self.rewritten.module

    def error(self, run: Callable[[list[Any]], Sequence[Any]]) -> float | None:
        """What the outputs lose against the dense model's, None without data."""
        from fxprune.passes.gather import portions
        from fxprune.passes.outputs import Outputs
        from fxprune.passes.statistics import Statistics
        from fxprune.passes.trial import some_samples

        if self.data is None:
            return None
        if self._outputs is None:
            few = some_samples(self.analysis, self.data, SAMPLES)
            known = Statistics(self.analysis, 0, few, self.recipe.max_memory)
            self._outputs = Outputs(self.analysis, list(portions(known, few)))
        return float(self._outputs(run))

    def speedup(self, before: nn.Module, after: nn.Module) -> tuple[float, float, float]:
        """Return how many times as fast a module is on the recipe's backend, with the 95 % interval.

        Raises:
            BackendError: it is not available here, or cannot build one of the two.
        """
        recipe, dynamic = self.recipe, self.analysis.captured.dynamic
        found = measure(before, after, self.args, self.kwargs, recipe.backend, recipe.threads, dynamic=dynamic)
        return found.speedup, *found.interval

    def measured(self) -> float | None:
        """The metric of the module, None without one."""
        return None if self.metric is None else self.metric(self.module)

    def own_error(self) -> float | None:
        """What the module's outputs lose."""
        interpreter = fx.Interpreter(self.module)
        with evaluating(self.module):
            return self.error(lambda inputs: interpreter.run(*inputs, enable_io_processing=False))


@dataclass
class Patterned:
    """What `sparsify` did.

    Attributes:
        masks: name of a weight -> which entries stay.
        unfit: name of a weight that cannot have the pattern -> why.
    """

    step: Step
    masks: dict[str, Tensor] = field(default_factory=dict)
    rows: list[Sparse] = field(default_factory=list)
    unfit: dict[str, str] = field(default_factory=dict)
    refitted: list[Refitted] | None = None
    tuned: Refitted | None = None


def sparsify(work: Work, wanted: Any, given: Mapping[str, Tensor]) -> Patterned:
    """Give the module's weights the recipe's pattern, in place.

    Args:
        wanted: what the recipe says (`fxprune.passes.patterns.sparsify.Settings`).
        given: masks of a plan, which are not chosen anew.

    Raises:
        TargetError: it costs more than the recipe's `max_drop`.
    """
    from fxprune.passes import reconstruct
    from fxprune.passes.patterns.sparsify import Sparsifier, eligible, mask_weights

    name = f"sparsity {wanted.pattern.name}, {wanted.name}"
    layers, unfit = eligible(work.analysis, work.groups, work.kept, work.recipe, wanted.pattern)
    if not layers:
        return Patterned(Step(name, False, why="no layer can have the pattern"), unfit=unfit)
    _check(work.module, given)
    sparsifier = Sparsifier(wanted, {c.weight for c in layers}, given)
    before = copied(work.module) if wanted.when == "faster" else None
    errors, metrics = [work.own_error()], [work.measured()]
    refitted, tuned = None, None
    if work.data is None:
        mask_weights(work.analysis, work.rewritten, sparsifier)
    else:
        how, options = reconstruct.settings(work.recipe, True)
        refitted, tuned = reconstruct.reconstruct(
            work.analysis,
            work.kept,
            work.rewritten,
            work.data,
            how,
            statistics=work.statistics,
            sparse=sparsifier,
            **options,
        )
    errors.append(work.own_error())
    metrics.append(work.measured())
    step = judged(Step(name, True, _pair(errors), _pair(metrics)), wanted.max_drop)
    if before is not None:
        step = faster(step, lambda: work.speedup(before, work.module))
    if not step.taken:
        _restore(work.module, before)
        return Patterned(step, unfit=unfit)
    return Patterned(step, sparsifier.masks, sparsifier.rows, unfit, refitted, tuned)


def masked(work: Work, given: Mapping[str, Tensor]) -> Patterned:
    """Multiply the module's weights with masks of a plan that no sparsity of the recipe speaks of, in place.

    Raises:
        SavedModelError: they are not of this module.
    """
    from fxprune.passes.patterns.registry import lost_share

    _check(work.module, given)
    rows = []
    with torch.no_grad():
        for name, mask in given.items():
            weight = work.module.get_parameter(name)
            rows.append(Sparse(name, tuple(mask.shape), "masks", float(mask.double().mean()), lost_share(weight, mask)))
            weight.mul_(mask.to(weight.device))
    return Patterned(Step("masks of the plan", True), dict(given), rows)


def _check(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuse masks of a plan that are not of this module.

    Raises:
        SavedModelError: a weight is missing, or of another shape.
    """
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    for name, mask in masks.items():
        if shapes.get(name) != tuple(mask.shape):
            raise SavedModelError(
                f"the plan has a mask of the shape {tuple(mask.shape)} for '{name}', which is "
                f"{shapes.get(name, 'not there')}: the model is not the one that the plan was made for"
            )


def _pair(values: Sequence[float | None]) -> tuple[float, float] | None:
    first, second = values
    return None if first is None or second is None else (first, second)


def judged(step: Step, limit: float | None) -> Step:
    """Return the step, unless it costs more than is allowed: of the metric where there is one, else of the outputs.

    Raises:
        TargetError: it does.
    """
    if limit is None:
        return step
    if step.metric is not None:
        drop, what = step.metric[0] - step.metric[1], "of the metric"
    else:
        assert step.error is not None
        drop, what = step.error[1] - step.error[0], "of the outputs' variance"
    if not drop <= limit:
        raise TargetError(f"{step.name} costs {drop:.3g} {what}; {limit:.3g} is allowed. Reached: {step.line()}")
    return step


def faster(step: Step, timed: Callable[[], tuple[float, float, float]]) -> Step:
    """Return the step with its measured speed-up, not taken where that is not surely above 1."""
    try:
        speedup = timed()
    except BackendError as error:
        return replace(step, why=f"not timed: {error}")
    if speedup[1] > _PAYS:
        return replace(step, speedup=speedup, why="it pays")
    return replace(step, taken=False, speedup=speedup, why="it does not pay on this backend")


def _restore(module: nn.Module, before: nn.Module | None) -> None:
    """Put the weights back that were there."""
    assert before is not None
    state = before.state_dict()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(state[name])
