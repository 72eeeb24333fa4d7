"""What makes scores of different groups comparable, and scores of an order in which units go."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fxprune.errors import RecipeError
from fxprune.passes.statistics import Scores


def normalised(scores: Scores, how: str, criterion: str, **more: float) -> Scores:
    """Return scores divided by their mean, their maximum, or nothing; zeros stay zeros.

    Args:
        how: "mean", "max", "none", or one of `more`.
        criterion: its name, for the error.
        more: further scales by name.

    Raises:
        RecipeError: `how` is none of these.

    >>> normalised(np.array([1.0, 3.0]), "mean", "magnitude").tolist()
    [0.5, 1.5]
    """
    scales = {"mean": float(scores.mean()), "max": float(scores.max()), **more, "none": 1.0}
    if how not in scales:
        *names, last = scales
        raise RecipeError(f"criterion '{criterion}': normalize is {', '.join(names)} or {last}, not {how!r}")
    return scores / scales[how] if scales[how] > 0 else scores


def in_order(order: npt.NDArray[np.int64], costs: Scores) -> Scores:
    """Return scores that rank units by when they go, and add up to about what it costs.

    What the removal of one unit costs depends on those that went before; a score is that cost, or the score of the unit
    before where this is more. Of equals the one that goes first is less by a part in a billion.

    Args:
        order: the units in the order in which they go.
        costs: what each of them costs, in that order.

    >>> in_order(np.array([2, 0, 1]), np.array([1.0, 4.0, 3.0])).round(3).tolist()
    [4.0, 4.0, 1.0]
    """
    scores = np.zeros(len(order))
    before = 0.0
    for unit, cost in zip(order, costs, strict=True):
        before = scores[unit] = max(float(cost), before * (1 + 1e-9))
    return scores
