"""What the outputs of a model made from another lose, on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.analyse import Analysis
from fxprune.kept import Kept
from fxprune.passes.calibration import Batch
from fxprune.prove import Reference, dense_weights

#: Flat inputs -> flat outputs.
Run = Callable[[list[Any]], Sequence[Any]]


class Outputs:
    """The dense model's outputs on some batches, which are run once.

    Called with a function from flat inputs to flat outputs it returns the squared error of these, relative to the dense
    outputs' variance over a batch: infinity where something is not finite.
    """

    def __init__(self, analysis: Analysis, batches: Sequence[Batch]) -> None:
        reference = Reference(analysis, Kept({}), dense_weights(analysis.captured), None)
        self.batches = list(batches)
        with torch.no_grad():
            self.dense = [_floats(reference.run(b.inputs)) for b in self.batches]

    def __call__(self, run: Run) -> float:
        """Return the error."""
        wrong = spread = 0.0
        with torch.no_grad():
            for batch, dense in zip(self.batches, self.dense, strict=True):
                for a, b in zip(dense, _floats(run(batch.inputs)), strict=True):
                    a, b = a.double(), b.double()
                    wrong += float((a - b).square().sum())
                    spread += float((a - a.mean(0, keepdim=True)).square().sum())
        return wrong / spread if spread > 0 and wrong == wrong else float("inf")


def _floats(outputs: Sequence[Any]) -> list[Tensor]:
    return [x for x in outputs if isinstance(x, Tensor) and x.is_floating_point()]
