"""Choosing what to remove.

- `criteria/`  one file each: (group, statistics) -> one score for each unit; high scores stay
- `allocate/`  one file each: (groups, scores, costs, target) -> how many units each group keeps
- `statistics` what criteria may ask of the model; `gather` collects it from `calibration` batches
- `plots`      pictures of sensitivity curves
- `consumers`  products with weights as matrices; `obs` the mathematics of removing columns; `reconstruct` refits layers

`CRITERIA` and `ALLOCATORS` are the registries; `load` fills them.
"""

from fxprune.passes.registries import ALLOCATORS, CRITERIA, Allocator, Criterion, criterion

__all__ = ["ALLOCATORS", "CRITERIA", "Allocator", "Criterion", "criterion", "load"]


def load() -> None:
    """Import every criterion and allocator, so that the registries are full."""
    from fxprune.passes.allocate import (  # noqa: F401  (imported for what they register)
        amc,
        chain,
        evolution,
        isomorphic,
        knapsack,
        netadapt,
        ranking,
        sensitivity,
        spdy,
        uniform,
        width,
    )
    from fxprune.passes.criteria import (  # noqa: F401
        activation,
        apoz,
        bn_scale,
        fastformers,
        fisher,
        flap,
        fpgm,
        lamp,
        magnitude,
        obd,
        obs,
        random,
        regression,
        snip,
        taylor,
        wanda,
    )
