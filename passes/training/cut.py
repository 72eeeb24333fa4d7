"""Which units go: the lowest scores, to exactly the share that is asked for, within bounds for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.errors import TargetError


@dataclass(frozen=True, slots=True)
class Bounds:
    """The least and the largest share of a layer's units that may go."""

    least: float = 0.0
    most: float = 1.0


def reachable(
    sizes: Mapping[str, int], weights: Mapping[str, float], bounds: Bounds, floors: Mapping[str, int] | None = None
) -> tuple[float, float]:
    """Return the least and the largest share of all entries that can go.

    Args:
        sizes: units of each layer.
        weights: entries of a unit of each layer.
        floors: units that must stay.
    """
    total = sum(sizes[n] * weights[n] for n in sizes)
    few = sum(_ceil(bounds.least * sizes[n]) * weights[n] for n in sizes)
    many = sum(_most(sizes[n], bounds, (floors or {}).get(n, 0)) * weights[n] for n in sizes)
    return few / total, many / total


def keep(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    share: float,
    scope: str,
    bounds: Bounds,
    floors: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Return which units stay: bool, of the shape of the scores.

    As many entries go as come closest to the share. Equal scores go in the order in which they stand.

    Args:
        scores: (units,) of each layer; high ones stay.
        weights: entries of a unit of each layer.
        scope: "global" (one order over all layers) or "local" (the same share of every layer).
        floors: units that must stay.

    Raises:
        TargetError: the bounds do not allow the share.

    >>> scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([5.0, 6.0, 7.0, 8.0])}
    >>> kept = keep(scores, {"a": 1, "b": 1}, 0.5, "global", Bounds(most=0.75))
    >>> kept["a"].tolist(), kept["b"].tolist()
    ([False, False, False, True], [False, True, True, True])
    """
    if scope == "local":
        return {
            n: _local(s, min(max(share, bounds.least), bounds.most), (floors or {}).get(n, 0))
            for n, s in scores.items()
        }
    sizes = {n: len(s) for n, s in scores.items()}
    low, high = reachable(sizes, weights, bounds, floors)
    if share > high + 1e-9:
        raise TargetError(
            f"a sparsity of {share:.4g} cannot be reached: with at most {bounds.most:.4g} of a layer it is {high:.3g}"
        )
    names = list(scores)
    key = torch.cat([_bounded(scores[n], bounds, (floors or {}).get(n, 0)) for n in names])
    goal = max(share, low) * sum(sizes[n] * weights[n] for n in names)
    fixed = int(torch.isposinf(key).sum())
    if len(set(weights.values())) == 1:
        flags = _lowest(key, min(round(goal / weights[names[0]]), len(key) - fixed))
    else:
        flags = _cheapest(key, torch.cat([key.new_full((sizes[n],), float(weights[n])) for n in names]), goal, fixed)
    return dict(zip(names, torch.split(~flags, [sizes[n] for n in names]), strict=True))


def _bounded(scores: Tensor, bounds: Bounds, floor: int) -> Tensor:
    """Scores in which what must go is lowest and what must stay highest."""
    key = scores.double()
    few, most = _ceil(bounds.least * len(key)), _most(len(key), bounds, floor)
    if few or most < len(key):
        going, staying = _lowest(scores, few), ~_lowest(scores, most)
        key = key.masked_fill(going, -torch.inf).masked_fill(staying, torch.inf)
    return key


def _lowest(key: Tensor, count: int) -> Tensor:
    """The lowest so many, as a mask; of equal ones the first. One value is looked for, nothing is sorted."""
    if count <= 0:
        return torch.zeros(len(key), dtype=torch.bool, device=key.device)
    limit = torch.kthvalue(key, count).values
    below = key < limit
    same = key == limit
    return below | (same & (torch.cumsum(same, 0) <= count - int(below.sum())))


def _cheapest(key: Tensor, cost: Tensor, goal: float, fixed: int) -> Tensor:
    """The lowest whose costs come closest to a sum, as a mask."""
    first = torch.argsort(key, stable=True)
    gone = torch.cumsum(cost[first], 0)
    count = int(torch.searchsorted(gone, goal + 1e-6 * max(goal, 1.0)))
    if count < len(gone) and goal - (float(gone[count - 1]) if count else 0.0) > float(gone[count]) - goal:
        count += 1  # the unit that crosses the goal comes closer to it
    flags = torch.zeros(len(key), dtype=torch.bool, device=key.device)
    flags[first[: min(count, len(key) - fixed)]] = True
    return flags


def _local(scores: Tensor, share: float, floor: int) -> Tensor:
    return ~_lowest(scores, min(round(share * len(scores)), len(scores) - floor))


def _most(size: int, bounds: Bounds, floor: int) -> int:
    return max(0, min(_floor(bounds.most * size), size - floor))


def _ceil(value: float) -> int:
    return int(-(-(value - 1e-9) // 1))


def _floor(value: float) -> int:
    return int((value + 1e-9) // 1)
