"""Structured optimal brain surgery: units whose removal costs the least once everything that reads them is refitted."""

from __future__ import annotations

import numpy as np

from fxprune.groups import Group
from fxprune.passes.obs import Problem, removal
from fxprune.passes.registries import criterion
from fxprune.passes.statistics import Scores, Statistics


@criterion("obs", needs=("moments", "mask_gradients"))
def obs(group: Group, statistics: Statistics, *, rounds: int = 48) -> Scores:
    """How much the model's error grows when the unit goes and everything that reads it is refitted.

    Kurtic et al., "ZipLM" (2023), equation 2, in batches and summed over all consumers: `fxprune.passes.obs`. Units are
    removed one after the other and what is left is refitted, so that the scores of the removed units add up to the
    error. Errors of a consumer's results count by how much the objective depends on each (the diagonal of its
    Gauss-Newton matrix), which makes them comparable between layers. Queries and keys are read by no weights: a unit's
    score is the squared gradient of a factor on it, in the same measure (Kwon et al., 2022). Where no data reach a
    group, a unit's score is its part of the squared weights.

    Args:
        rounds: about how many batches the removal takes; more are more exact.
    """
    problems = problems_of(group, statistics)
    if not problems:
        return _matched(group, statistics)
    order, errors = removal(problems, group.size, rounds=rounds)
    scores = np.zeros(group.size)
    scores[order] = np.diff(errors, prepend=0.0)
    extra = _matched(group, statistics) if statistics.matched(group) else 0.0
    # Noise in the last digits must not let a unit that went later look cheaper than one that went before.
    ranked: Scores = np.zeros(group.size)
    ranked[order] = np.maximum.accumulate(np.maximum(scores[order], 0.0))
    result: Scores = ranked * (float(errors[-1]) / max(ranked.sum(), 1e-300)) + extra
    return result


def problems_of(group: Group, statistics: Statistics) -> list[Problem]:
    """The matrices that read a group, their rows weighted by how much the objective depends on them."""
    problems = []
    for contraction in statistics.consumers(group):
        weight = contraction.matrix(statistics.weight(contraction.weight)).double()
        weight = weight * (0.5 * statistics.slope(contraction)).sqrt().unsqueeze(2)
        moment, units = statistics.moment(contraction), statistics.units(group, contraction)
        problems += [Problem(weight[i], moment[i], units[i]) for i in range(len(weight)) if (units[i] >= 0).any()]
    return problems


def _matched(group: Group, statistics: Statistics) -> Scores:
    """What a factor on each unit of queries and keys does to the objective; without any, its part of the weights."""
    if statistics.matched(group):
        curvature: Scores = 0.5 * np.square(statistics.mask_gradient(group)).mean(0)
        return curvature
    power: Scores = statistics.weight_power(group, 2)
    return power / max(float(power.sum()), 1e-300)
