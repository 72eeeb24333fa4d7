"""Tuning: the vectors of a refitted model (scales and shifts of norms, biases) learn what the dense model puts out.

No labels and no loss of the user's: the squared error to the dense outputs on the calibration data falls by Adam, over
a few passes. A part of the data that took no part in the fit decides which of the passes was the best, the start
included: what was fitted to few data gains nothing from more of the same. Compare the corrections of scales and shifts
after pruning in Frantar and Alistarh, "Optimal Brain Compression" (2022), section 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.analyse import Analysis
from fxprune.errors import InputError
from fxprune.kept import Kept
from fxprune.passes.calibration import Batch, Calibration
from fxprune.passes.gather import gathered, portions, summed
from fxprune.passes.statistics import Statistics
from fxprune.prove import Reference, dense_weights
from fxprune.rewrite import Rewritten

#: The share of the data that decides.
_HELD_OUT = 1 / 8
#: Rows that a step sees, where the batch may be cut.
_ROWS = 32


def split(data: Calibration, statistics: Statistics) -> tuple[Calibration, Calibration]:
    """Return the data to fit and tune on, and those that decide, which neither may have seen.

    Raises:
        InputError: there is only one portion of data, so that nothing is left to decide by.
    """
    batches = list(portions(statistics, data, _ROWS))
    if len(batches) < 2:
        raise InputError(f"tuning holds a part of the calibration data out: pass more than {_ROWS} samples")
    # Evenly from the whole, which a loader may have sorted.
    apart = max(2, round(1 / _HELD_OUT))
    held = [b for i, b in enumerate(batches) if i % apart == 0]
    rest = [b for i, b in enumerate(batches) if i % apart]
    return replace(data, batches=rest), replace(data, batches=held)


def tune(
    analysis: Analysis,
    pruned: Rewritten,
    data: Calibration,
    held: Calibration,
    statistics: Statistics,
    passes: int,
    rate: float,
) -> tuple[float, float]:
    """Tune the vectors of the pruned module, which is in eval mode, in place; return the error before and after.

    Args:
        data, held: see `split`.
        passes: over the data.
        rate: of Adam at the start, relative to the root mean square of each vector; it falls to zero along a cosine.

    Returns:
        Squared errors of the outputs over the dense outputs' variance on the data held out.
    """
    reference = Reference(analysis, Kept({}), dense_weights(analysis.captured), None)
    # Processes take every step together: as many as the one with the least data has.
    each = int(gathered(np.array([float(len(data.batches))])).min())
    batches = [*held.batches, *data.batches[:each]]
    with torch.no_grad():
        dense = [_floats(reference.run(b.inputs)) for b in batches]
    decide = len(held.batches)
    module = pruned.module
    vectors = [p for p in module.parameters() if p.dim() == 1 and p.is_floating_point()]
    wanted = [p.requires_grad for p in module.parameters()]
    module.requires_grad_(False)
    try:
        for p in vectors:
            p.requires_grad_()
        spread = _spread(dense)
        interpreter = fx.Interpreter(module)
        decisive, rest = (batches[:decide], dense[:decide]), (batches[decide:], dense[decide:])
        start = best = _mean(interpreter, *decisive, spread)
        state = [p.detach().clone() for p in vectors]
        full = [rate * _scale(p) for p in vectors]
        groups = [{"params": [p], "lr": top} for p, top in zip(vectors, full, strict=True)]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99)) if groups else None
        steps, done = passes * len(rest[0]), 0
        for number in range(passes if optimizer is not None else 0):
            assert optimizer is not None
            statistics.say(f"tune: pass {number + 1} of {passes}")
            for batch, outputs in zip(*rest, strict=True):
                for group, top in zip(optimizer.param_groups, full, strict=True):
                    group["lr"] = top * 0.5 * (1 + math.cos(math.pi * done / steps))
                done += 1
                optimizer.zero_grad()
                with torch.enable_grad():
                    _error(interpreter, batch, outputs, spread).backward()  # type: ignore[no-untyped-call]
                for p in vectors:
                    p.grad = None if p.grad is None else summed(p.grad)
                optimizer.step()
            error = _mean(interpreter, *decisive, spread)
            if error < best:
                best, state = error, [p.detach().clone() for p in vectors]
        with torch.no_grad():
            for p, value in zip(vectors, state, strict=True):
                p.copy_(value)
                p.grad = None
    finally:
        for p, flag in zip(module.parameters(), wanted, strict=True):
            p.requires_grad_(flag)
    return start, best


def _floats(outputs: Sequence[Any]) -> list[Tensor]:
    return [x for x in outputs if isinstance(x, Tensor) and x.is_floating_point()]


def _scale(vector: Tensor) -> float:
    return max(float(vector.detach().square().mean().sqrt()), 1e-3)


def _spread(dense: Sequence[Sequence[Tensor]]) -> float:
    """The variance of the outputs over the samples, summed over all their numbers."""
    total = 0.0
    for outputs in zip(*dense, strict=True):
        rows = torch.cat([x.double().flatten(1) for x in outputs if x.dim()])
        total += float((rows - rows.mean(0)).square().mean(0).sum()) if rows.shape[0] > 1 else 0.0
    return total or 1.0


def _error(interpreter: fx.Interpreter, batch: Batch, dense: Sequence[Tensor], spread: float) -> Tensor:
    found = _floats(interpreter.run(*batch.inputs, enable_io_processing=False))
    total = torch.zeros(())
    for a, b in zip(found, dense, strict=True):
        total = total + (a.float() - b.float()).square().sum()
    return total / (batch.size * spread)


def _mean(
    interpreter: fx.Interpreter, batches: Sequence[Batch], dense: Sequence[Sequence[Tensor]], spread: float
) -> float:
    with torch.no_grad():
        errors = [float(_error(interpreter, b, d, spread)) * b.size for b, d in zip(batches, dense, strict=True)]
    total = summed(torch.tensor([sum(errors), float(sum(b.size for b in batches))], dtype=torch.float64))
    return float(total[0] / total[1])
