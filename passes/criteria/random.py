"""Random scores: the baseline that every criterion has to beat."""

from __future__ import annotations

import zlib

import numpy as np

from fxprune.groups import Group
from fxprune.passes.registries import criterion
from fxprune.passes.statistics import Scores, Statistics


@criterion("random")
def random(group: Group, statistics: Statistics) -> Scores:
    """Uniform in [0, 1), from the recipe's seed and the group's name, so that a run can be repeated."""
    generator = np.random.default_rng([statistics.seed, zlib.crc32(group.name.encode())])
    return generator.random(group.size)
