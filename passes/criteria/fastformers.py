"""FastFormers: units on whose mask the loss depends the least go first."""

from __future__ import annotations

import numpy as np

from fxprune.groups import Group
from fxprune.passes.registries import criterion
from fxprune.passes.scales import normalised
from fxprune.passes.statistics import Scores, Statistics


@criterion("fastformers", needs=["mask_gradients"])
def fastformers(group: Group, statistics: Statistics, *, normalize: str = "norm") -> Scores:
    """How sensitive the loss is to a mask on the unit: the mean over samples of |dL/dm|.

    m is a factor on the unit where it is read: on the results of a head, on the hidden units of an MLP. Without a loss
    L is the output in random directions. Kim and Awadalla, "FastFormers" (2020), after Michel et al., "Are Sixteen
    Heads Really Better than One?" (2019).

    Args:
        normalize: what scores are divided by to be comparable across groups: the root of the sum of the group's squared
            scores ("norm"), its mean, its maximum, or none.
    """
    scores: Scores = np.abs(statistics.mask_gradient(group)).mean(0)
    return normalised(scores, normalize, "fastformers", norm=float(np.linalg.norm(scores)))
