"""Pruning while a model trains: what is chosen when, and how weights are masked until then.

- `stage`    what a user says about one pruning; `ramp` the schedules
- `find`     from that to `units`, what goes as one: entries, blocks, n:m, channels, heads, layers
- `cut`      which units go for a share of all; `pruning` all of it together while it runs
- `masked`   weights with masks, as parametrisations; `fading` what goes little by little
- `branches` which residual branches add nothing with zeros in their parameters
- `distill`  what is lost against a teacher: in logits, embeddings, hidden states
- `methods/` one file for each idea; `method` the contract they keep
"""

from fxprune.passes.training.method import METHODS, Method, method
from fxprune.passes.training.ramp import RAMPS, Schedule
from fxprune.passes.training.stage import Stage, stages

__all__ = ["METHODS", "RAMPS", "Method", "Schedule", "Stage", "load", "method", "stages"]


def load() -> None:
    """Import every method, so that the registry is full."""
    from fxprune.passes.training.methods import (  # noqa: F401  (imported for what they register)
        counted,
        l0,
        magnitude,
        movement,
        penalties,
        rigl,
        sensitivity,
    )
