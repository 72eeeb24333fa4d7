"""Chain: the widths that lose the least within the budget, where what a layer costs depends on several of them.

The widths of convolutions in a row cost cin * cout each; a residual stream's width is in every block that reads it. The
cost is a sum of terms of few groups each, and groups are taken one after another: what is known of those behind is, for
every combination of the widths that groups still to come share a term with (the frontier) and for every budget, the
least that they lose. A chain of layers has a frontier of one, the residual stages of a ResNet have one of two.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from fxprune.costs import Costs
from fxprune.errors import TargetError
from fxprune.groups import Group
from fxprune.passes.allocate.knapsack import knapsack
from fxprune.passes.allocate.ladder import climb, widths
from fxprune.passes.allocate.problem import Floats, Problem, Scope, relax, repair, tabulate
from fxprune.passes.registries import ALLOCATORS, Budget
from fxprune.passes.statistics import Scores

Indices = npt.NDArray[np.int64]

#: The budget is divided into so many parts; costs are rounded up to whole ones.
BUCKETS = 2000
#: Work of one solution, in additions. Where all options would take more, fewer are tried at first and finer ones later.
WORK = 5e8
#: Bytes of what was chosen where, for reading the solution.
MEMORY = 2**29
#: Fewer options of a group than this say too little.
_LEAST_OPTIONS = 5
#: Orders are tried from so many items.
_STARTS = 12


@dataclass(frozen=True, slots=True)
class Step:
    """An item is taken.

    Attributes:
        item: which.
        before: the frontier it meets, ascending.
        scopes: the tables that become known.
        leaving: items of the frontier and perhaps `item` that no later table holds, ascending.
        after: the frontier it leaves, ascending.
    """

    item: int
    before: Scope
    scopes: tuple[Scope, ...]
    leaving: Scope
    after: Scope


def order(sizes: Sequence[int], scopes: Sequence[Scope], most: float = inf) -> list[Step] | None:
    """Return an order of the items with small frontiers: greedy from several starts, the one with the least work.

    Args:
        most: combinations of options that may be looked at; None is returned where they would be more.

    >>> [(s.before, s.item, s.leaving) for s in order([3, 3, 3], [(0, 1), (1, 2)])]
    [((), 0, ()), ((0,), 1, (0,)), ((1,), 2, (1, 2))]
    """
    near: list[set[int]] = [set() for _ in sizes]
    for scope in scopes:
        for i in scope:
            near[i] |= set(scope) - {i}
    best: list[int] | None = [] if not sizes else None
    for start in sorted(range(len(sizes)), key=lambda i: (len(near[i]), i))[:_STARTS]:
        found = _greedy(sizes, near, start, most)
        if found is not None:
            most, best = found
    if best is None:
        return None
    steps: list[Step] = []
    placed: set[int] = set()
    frontier: set[int] = set()
    for item in best:
        placed.add(item)
        with_it = frontier | {item}
        leaving = {i for i in with_it if near[i] <= placed}
        known = tuple(s for s in scopes if item in s and placed.issuperset(s))
        before, frontier = tuple(sorted(frontier)), with_it - leaving
        steps.append(Step(item, before, known, tuple(sorted(leaving)), tuple(sorted(frontier))))
    return steps


def _greedy(sizes: Sequence[int], near: Sequence[set[int]], start: int, most: float) -> tuple[float, list[int]] | None:
    """The work of an order and the order: next is what leaves the smallest table behind, in the smallest region first.

    A region is what remains connected without the frontier: the rest of a residual block before the next stage.
    """
    left = set(range(len(sizes)))
    open_ = [len(n) for n in near]  # neighbours left
    frontier: set[int] = set()
    taken: list[int] = []
    work = 0.0
    while left:
        offers = {i for f in frontier for i in near[f]} & left
        if not offers:
            offers = {min(left, key=lambda i: (len(near[i]), i)) if taken else start}
        regions = _regions(offers, near, left)
        whole = prod(float(sizes[i]) for i in frontier)
        best: tuple[float, int, int] | None = None
        for item in offers:
            table = whole * (sizes[item] if open_[item] else 1)
            for i in frontier:
                if open_[i] == 1 and item in near[i]:
                    table /= sizes[i]
            if best is None or (table, regions[item], item) < best:
                best = table, regions[item], item
        assert best is not None
        item = best[-1]
        work += whole * sizes[item]
        if work >= most:
            return None
        taken.append(item)
        left.discard(item)
        for i in near[item]:
            open_[i] -= 1
        frontier = {i for i in frontier | {item} if open_[i]}
    return work, taken


def _regions(items: set[int], near: Sequence[set[int]], left: set[int]) -> dict[int, int]:
    """For each item the number of items left that are connected with it by others left."""
    result: dict[int, int] = {}
    for item in items:
        if item in result:
            continue
        region, pending = {item}, [item]
        while pending:
            new = (near[pending.pop()] & left) - region
            region |= new
            pending += new
        result |= dict.fromkeys(region & items, len(region))
    return result


def affordable(problem: Problem, buckets: int, work: float) -> bool:
    """Whether `solve` takes no more than so many additions, and not too much memory."""
    sizes = [len(loss) for loss in problem.losses]
    steps = order(sizes, list(problem.tables), work / buckets)
    return steps is not None and sum(prod(sizes[i] for i in s.after) for s in steps) * buckets * 2 <= MEMORY


def solve(problem: Problem, buckets: int = BUCKETS) -> tuple[list[int], float] | None:
    """Return the choice with the least loss within the budget and a bound that no choice is below, or None.

    Min-sum elimination along a path decomposition of the graph whose edges are items in one table, with the budget in
    `buckets` parts as one more dimension: D'[F', t] = min over what leaves of D[F, t - cost(F, v)] + loss(v). What a
    step costs is rounded up, so that what fits in rounded costs fits. A choice that fits has rounded costs of less than
    one part a step above the budget: the tables go that far, choices are read from there downwards, and the first that
    fits truly is taken. Where it is the very first, it is the best of all; its loss is the bound. Where all costs are
    whole numbers and not many, parts are these, and the result is exact. For chains compare Sun et al., "MDP" (2025),
    which solves the same by mixed-integer programming.

    >>> pair = np.outer([1.0, 2, 3], [1.0, 2, 3])  # two widths whose product may be 4
    >>> solve(Problem([np.array([5.0, 2, 0]), np.array([4.0, 1, 0])], {(0, 1): pair}, 4))
    ([1, 1], 3.0)
    """
    sizes = [len(loss) for loss in problem.losses]
    steps = order(sizes, list(problem.tables)) or []
    spent = [_together(problem, step) for step in steps]
    floors = [float(c.min()) for c in spent]
    fixed = float(problem.tables[()]) if () in problem.tables else 0.0
    room = problem.budget - fixed - sum(floors)
    if room < -1e-9 * max(1.0, abs(problem.budget)):
        return None
    extra = [c - f for c, f in zip(spent, floors, strict=True)]
    unit, most = _unit(extra, max(room, 0.0), buckets)
    parts = [_parts(e, unit, most + 1) for e in extra]
    best = np.zeros(most + 1)
    chosen = []
    for step, weights in zip(steps, parts, strict=True):
        best, options = _take(problem.losses[step.item], step, sizes, weights, best)
        chosen.append(options)
    if not np.isfinite(best[-1]):
        return None
    for total in range(most, -1, -1):
        if not np.isfinite(best[total]):
            break
        choice = _read(steps, sizes, parts, chosen, total)
        if problem.fits(choice):
            return choice, float(best[-1])
    return None


def _together(problem: Problem, step: Step) -> Floats:
    """What the tables of a step cost, (options of the frontier..., options of the item)."""
    axes = [*step.before, step.item]
    total = np.zeros([len(problem.losses[i]) for i in axes])
    for scope in step.scopes:
        table = problem.tables[scope].transpose(np.argsort([axes.index(i) for i in scope]))
        total += table.reshape([len(problem.losses[i]) if i in scope else 1 for i in axes])
    return total


def _unit(extra: Sequence[Floats], room: float, buckets: int) -> tuple[float, int]:
    """The size of a part and how many of them the tables have; where costs are whole parts, no more than fit."""
    if all((e == np.rint(e)).all() and e.max() < 2**53 for e in extra):
        common = int(np.gcd.reduce([int(np.gcd.reduce(e.astype(np.int64), axis=None)) for e in extra] or [0]))
        if common and room / common < buckets:
            return float(common), int(room // common)
    return room / buckets, buckets + len(extra)


def _parts(extra: Floats, unit: float, most: int) -> Indices:
    """Costs in whole parts, rounded up; what is above `most` is `most`."""
    if unit <= 0:
        return np.where(extra > 0, most, 0).astype(np.int64)
    return np.minimum(np.ceil(extra / unit - 1e-9), most).astype(np.int64)


def _take(
    loss: Floats, step: Step, sizes: Sequence[int], weights: Indices, best: Floats
) -> tuple[Floats, npt.NDArray[Any]]:
    """The least losses over (frontier after, budget), and which options of what leaves they come from."""
    most = best.shape[-1] - 1
    leaving = [i for i in step.leaving if i != step.item]
    leaves = step.item in step.leaving
    count = prod(sizes[i] for i in step.leaving)
    shape = [*(sizes[i] for i in step.after if i != step.item), *([] if leaves else [len(loss)]), most + 1]
    after = np.full(shape, np.inf)
    chosen = np.zeros(after.shape, dtype=np.uint16 if count <= 2**16 else np.uint32)
    stay = [n for n, i in enumerate(step.before) if i not in leaving]
    go = [n for n, i in enumerate(step.before) if i in leaving]
    padded = np.full(2 * (most + 1), np.inf)
    windows = sliding_window_view(padded, most + 1)
    for place in itertools.product(*(range(sizes[i]) for i in step.before)):
        padded[most + 1 :] = best[place]
        values = windows[most + 1 - weights[place]]  # (options, budget): what was lost with so much less
        values += loss[:, None]
        number = 0
        for n in go:
            number = number * sizes[step.before[n]] + place[n]
        to = tuple(place[n] for n in stay)
        if leaves:
            options = values.argmin(0)
            values = np.take_along_axis(values, options[None], 0)[0]
            numbers: Any = number * len(loss) + options
        else:
            numbers = number
        better = values < after[to]
        np.copyto(after[to], values, where=better)
        np.copyto(chosen[to], numbers, where=better, casting="unsafe")
    if not leaves:  # the item's dimension stands last; it belongs where its number says
        at = step.after.index(step.item)
        after, chosen = np.moveaxis(after, -2, at), np.moveaxis(chosen, -2, at)
    return after, chosen


def _read(
    steps: Sequence[Step],
    sizes: Sequence[int],
    parts: Sequence[Indices],
    chosen: Sequence[npt.NDArray[Any]],
    total: int,
) -> list[int]:
    """The choice that loses the least with so many parts of the budget."""
    known: dict[int, int] = {}
    for step, weights, options in zip(reversed(steps), reversed(parts), reversed(chosen), strict=True):
        number = int(options[(*(known[i] for i in step.after), total)])
        going = [i for i in step.leaving if i != step.item]
        for i in reversed([*going, *([step.item] if step.item in step.leaving else [])]):
            number, known[i] = divmod(number, sizes[i])
        total -= int(weights[tuple(known[i] for i in (*step.before, step.item))])
    return [known[i] for i in range(len(sizes))]


def refine(problem: Problem, start: Sequence[int], buckets: int = BUCKETS, work: float = WORK) -> list[int]:
    """Return a choice within the budget, exact where all options can be tried at once; `start` where too few can.

    In between evenly spaced options are tried first and then, each time with half the spacing, those around the best.

    Args:
        start: a choice within the budget.
    """
    sizes = [len(loss) for loss in problem.losses]
    most = max(sizes)
    while True:
        options = [_spaced(n, most, i) for n, i in zip(sizes, start, strict=True)]
        few = problem.within(options)
        if affordable(few, buckets, work):
            break
        most = most * 3 // 4
        if most < _LEAST_OPTIONS:
            return list(start)
    best = list(start)
    spacing = [max(1, -(-(n - 1) // (most - 1))) for n in sizes]
    while True:
        found = solve(few, buckets)
        if found is not None:
            choice = [int(o[i]) for o, i in zip(options, found[0], strict=True)]
            if problem.loss(choice) < problem.loss(best):
                best = choice
        if all(len(o) == n for o, n in zip(options, sizes, strict=True)) or max(spacing) == 0:
            return best
        spacing = [s // 2 for s in spacing]
        half = max(most // 2 - 1, 1)
        options = [
            np.unique(np.clip(i + max(s, 1) * np.arange(-half, half + 1), 0, n - 1)) if n > most else np.arange(n)
            for n, s, i in zip(sizes, spacing, best, strict=True)
        ]
        few = problem.within(options)


def _spaced(count: int, most: int, also: int) -> Indices:
    """At most `most` of so many options, evenly spaced, the first, the last and `also` with them."""
    if count <= most:
        return np.arange(count)
    return np.unique([*np.rint(np.linspace(0, count - 1, most - 1)).astype(np.int64), also])


@ALLOCATORS.register("chain")
def chain(
    groups: list[Group],
    scores: Mapping[str, Scores],
    costs: Costs,
    budget: Budget,
    *,
    buckets: int = BUCKETS,
    work: float = WORK,
) -> dict[str, int]:
    """The least total score removed, exactly, also where layers join the widths of several groups.

    Scores have to be losses that add up, as for `knapsack`, which takes such costs as linear around the current widths
    and may end beside the best. The search starts from its widths and a Lagrangian relaxation's, and these are what
    remains, mended by single changes and exchanges, where too many groups meet at once (dense concatenations). Memory,
    which is no sum, is left to `knapsack`.

    Args:
        buckets: parts of the budget.
        work: additions of one solution; where all widths would take more, fewer are tried at first.
    """
    options = {g.name: widths([g], budget) for g in groups}
    allowed = budget.share * costs.of(budget.kind, {})
    lowest = {g.axis: options[g.name][0] for g in groups}
    if costs.of(budget.kind, lowest) > allowed:
        climb(lowest, [], costs, budget)  # says so
        raise TargetError("the target cannot be reached")
    # Sums in another order may differ in the last digits.
    limit = allowed if budget.kind in ("macs", "params") else allowed * (1 - 1e-12)
    problem = tabulate(groups, options, scores, costs, budget.kind, limit)
    start = knapsack(groups, scores, costs, budget)
    if problem is None or not groups:
        return start
    first = [int(np.argmin(np.abs(np.array(options[g.name]) - start[g.name]))) for g in groups]
    if not problem.fits(first):
        first = [0] * len(groups)
    choice = repair(problem, refine(problem, relax(problem, first), buckets, work))
    return {g.name: options[g.name][i] for g, i in zip(groups, choice, strict=True)}
