"""Meeting a target on the clock: build, measure, correct, until the whole model is as fast as was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxprune.backends.base import Backend, Runner
from fxprune.backends.timing import Comparison, compare
from fxprune.errors import TargetError
from fxprune.groups import Group
from fxprune.input_names import Dynamic
from fxprune.kept import Kept
from fxprune.passes.choose import Chooser, step
from fxprune.passes.latency import LatencyCosts, tables
from fxprune.report import CLOCK_TOLERANCE, Attempt, Clocked
from fxprune.rewrite import rewrite

#: The whole model is built so many times at most.
BUILDS = 3
#: Aimed at a little more than was asked for, so that noise does not end below it.
_AHEAD = 1.01


@dataclass(slots=True)
class _Loop:
    chooser: Chooser
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    backend: Backend
    threads: int
    dynamic: Dynamic
    dense: Runner

    def build(self, kept: Kept) -> Runner:
        module = rewrite(self.chooser.analysis, kept, self.model).module.eval()
        return self.backend.build(module, self.args, self.kwargs, threads=self.threads, dynamic=self.dynamic)

    def measure(self, kept: Kept, predicted: float) -> Attempt:
        runner = self.build(kept)
        ratio = self._compare(runner).ratio("pruned")
        return Attempt(predicted, ratio.median, (ratio.low, ratio.high))

    def _compare(self, runner: Runner) -> Comparison:
        return compare(
            {
                "dense": self.dense.bind(*self.args, **self.kwargs),
                "pruned": runner.bind(*self.args, **self.kwargs),
            },
            reference="dense",
            repeats=31,
            min_time=0.02,
        )


def meet(
    chooser: Chooser,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    backend: Backend,
    progress: Callable[[str], None] = lambda stage: None,
) -> tuple[Kept, Clocked]:
    """Choose what stays so that the measured speed-up is what the recipe asks for, in at most three builds.

    Raises:
        TargetError: even with every group at its floor the model is not fast enough; the text has the fastest measured.
        BackendError: the backend is missing or cannot build the model.
    """
    recipe, analysis = chooser.recipe, chooser.analysis
    threads = recipe.threads or torch.get_num_threads()
    dynamic = analysis.captured.dynamic
    progress("build the dense model")
    dense = backend.build(model, args, kwargs, threads=threads, dynamic=dynamic)
    loop = _Loop(chooser, model, args, kwargs, backend, threads, dynamic, dense)
    goal = recipe.target.speedup
    if goal is None:
        assert recipe.target.latency_ms is not None
        whole = loop._compare(dense).latencies["dense"]
        goal = whole.median * 1e3 / recipe.target.latency_ms
        if goal <= 1:
            return Kept({}), Clocked(goal, backend.key, threads)
    costs = timed(chooser, model, args, kwargs, backend, progress, dense)
    result = Clocked(goal, backend.key, threads, residual=costs.residual)
    return _attempt(loop, costs, result, progress), result


def timed(
    chooser: Chooser,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    backend: Backend,
    progress: Callable[[str], None] = lambda stage: None,
    dense: Runner | None = None,
) -> LatencyCosts:
    """Return the chooser's costs with the times of the model's parts, measured the first time.

    Args:
        dense: the model built, where it is.
    """
    if isinstance(chooser.costs, LatencyCosts):
        return chooser.costs
    threads = chooser.recipe.threads or torch.get_num_threads()
    if dense is None:
        dense = backend.build(model, args, kwargs, threads=threads, dynamic=chooser.analysis.captured.dynamic)
    progress("measure its parts")
    costs = chooser.costs = tables(
        chooser.analysis,
        model,
        chooser.eligible,
        backend,
        lambda group: step(group, chooser.multiple),
        threads=threads,
        whole=lambda clock: clock.ratios({"dense": dense.bind(*args, **kwargs)})["dense"],
        progress=lambda done, count: progress(f"measure its parts: {done} of {count}"),
    )
    return costs


def _attempt(loop: _Loop, costs: LatencyCosts, result: Clocked, progress: Callable[[str], None]) -> Kept:
    aim = result.requested * _AHEAD
    share = 1 / aim
    selections: list[Kept] = []
    tried: list[tuple[float, float]] = []
    for number in range(BUILDS):
        try:
            kept = loop.chooser.kept("latency", share)
        except TargetError as error:
            if selections:
                break
            kept = _floor(loop, share)
            fastest = loop.measure(kept, _predicted(costs, kept))
            if fastest.measured < result.requested:
                raise TargetError(
                    f"a speed-up of {result.requested:.2f} cannot be reached: with every group at its floor the model "
                    f"is {fastest.measured:.2f} x as fast as the dense one on {result.backend} (measured). {error}"
                ) from None
            share = _predicted_share(costs, kept) * 1.02
        progress(f"build and measure ({number + 1})")
        predicted = _predicted(costs, kept)
        result.attempts.append(loop.measure(kept, predicted))
        selections.append(kept)
        measured = result.attempts[-1].measured
        if abs(measured / aim - 1) <= CLOCK_TOLERANCE - (_AHEAD - 1):
            break
        tried.append((share, measured))
        share = min(max(_next(tried, aim), share * 0.5), share * 1.6, 1.0)
    misses = [abs(a.measured / aim - 1) for a in result.attempts]
    result.taken = misses.index(min(misses))
    return selections[result.taken]


def _next(tried: list[tuple[float, float]], aim: float) -> float:
    """The share at which the model should be as fast as aimed at, from (share, measured speed-up) so far.

    What the tables call a share is so much on the clock: between the nearest attempt that was too slow and the nearest
    one that was too fast, along the line (of logarithms) that joins them. Where all were on one side: along the line
    through the last two where that goes the right way, else proportionally.

    >>> round(_next([(0.5, 1.6)], 2.0), 3), round(_next([(0.5, 1.6), (0.4, 1.8)], 2.0), 3)
    (0.4, 0.328)
    >>> round(_next([(0.6, 2.7), (0.96, 1.04)], 1.6), 3)
    0.776
    """
    share, measured = tried[-1]
    slow = max((t for t in tried if t[1] < aim), key=lambda t: t[1], default=None)
    fast = min((t for t in tried if t[1] >= aim), key=lambda t: t[1], default=None)
    power = -1.0
    if slow and fast and fast[0] < slow[0]:
        power = math.log(slow[1] / fast[1]) / math.log(slow[0] / fast[0])
        share, measured = fast
    elif len(tried) > 1 and tried[-2][0] != share:
        before, slower = tried[-2]
        slope = math.log(measured / slower) / math.log(share / before)
        power = slope if -2.0 < slope < -0.5 else power
    return float(share * (aim / measured) ** (1 / power))


def _counts(kept: Kept) -> dict[Any, int]:
    return {axis: len(indices) for axis, indices in kept.items()}


def _predicted_share(costs: LatencyCosts, kept: Kept) -> float:
    return float(costs.without(kept.removed).of("latency", _counts(kept)) / costs.latency({}))


def _predicted(costs: LatencyCosts, kept: Kept) -> float:
    return 1 / _predicted_share(costs, kept)


def _floor(loop: _Loop, share: float) -> Kept:
    from fxprune.passes.allocate.ladder import widths

    budget = loop.chooser.budget("latency", 1.0)

    def least(group: Group) -> int:
        return widths([group], budget)[0]

    removed = loop.chooser.removed("latency", share)
    return loop.chooser.best({g.name: least(g) for g in loop.chooser.left(removed)}, removed)
