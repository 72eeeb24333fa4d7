"""Structured optimal brain surgery: units whose removal costs the least once everything that reads them is refitted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fxprune.groups import Group
from fxprune.kept import Indices
from fxprune.passes.obs import Problem, removal
from fxprune.passes.registries import criterion
from fxprune.passes.scales import in_order
from fxprune.passes.statistics import Scores, Statistics
from fxprune.passes.swap import swapped


def _refine(*, swaps: int = 0, **_: object) -> Callable[[Group, Statistics, Indices], Indices] | None:
    """Swap search on the units kept, if asked for."""
    if not swaps:
        return None
    return lambda group, statistics, kept: swapped(problems_of(group, statistics), kept, group.size, swaps)


@criterion("obs", needs=("moments", "mask_gradients"), refine=_refine)
def obs(group: Group, statistics: Statistics, *, rounds: int = 48, swaps: int = 0) -> Scores:
    """How much the model's error grows when the unit goes and everything that reads it is refitted.

    Kurtic et al., "ZipLM" (2023), equation 2, in batches and summed over all consumers: `fxprune.passes.obs`. Units are
    removed one after the other and what is left is refitted, so that the scores of the removed units add up to the
    error. Errors of a consumer's results count by how much the objective depends on each (the diagonal of its
    Gauss-Newton matrix), which makes them comparable between layers. Queries and keys are read by no weights, nor is
    what only a mean or a recurrent layer reads: a unit's score is half the squared gradient of a factor on it, in the
    same measure (Kwon et al., 2022).

    Args:
        rounds: about how many batches the removal takes; more are more exact.
        swaps: exchanges of removed units for kept ones that are tried for the widths allocated (`fxprune.passes.swap`);
            these take one more pass over the data.
    """
    problems = problems_of(group, statistics)
    if not problems:
        return _masked(group, statistics)
    order, errors = removal(problems, group.size, rounds=rounds)
    # Noise in the last digits must not let a unit that went later look cheaper than one that went before.
    scores = in_order(order, np.diff(errors, prepend=0.0))
    scores *= float(errors[-1]) / max(scores.sum(), 1e-300)
    matched = any(read.other is not None for read in statistics.reads(group))
    return scores + _masked(group, statistics) if matched else scores


def problems_of(group: Group, statistics: Statistics) -> list[Problem]:
    """The matrices that read a group, their rows weighted by how much the objective depends on them."""
    problems = []
    for contraction in statistics.consumers(group):
        weight = contraction.matrix(statistics.weight(contraction.weight)).double().cpu()
        weight = weight * (0.5 * statistics.slope(contraction)).sqrt().unsqueeze(2)
        moment, units = statistics.moment(contraction), statistics.units(group, contraction)
        problems += [Problem(weight[i], moment[i], units[i]) for i in range(len(weight)) if (units[i] >= 0).any()]
    return problems


def _masked(group: Group, statistics: Statistics) -> Scores:
    """What a factor on each unit does to the objective."""
    curvature: Scores = 0.5 * np.square(statistics.mask_gradient(group)).mean(0)
    return curvature
