"""What a criterion may ask of the model: sums over weights by dimension."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fxprune.analyse import Analysis
from fxprune.errors import InputError, NonFiniteError
from fxprune.groups import Group, positions

Scores = npt.NDArray[np.float64]


class Statistics:
    """Numbers about the dense model, computed when first asked for.

    Args:
        analysis: of the captured model.
        seed: for criteria that draw random numbers.
    """

    def __init__(self, analysis: Analysis, seed: int = 0) -> None:
        self.analysis = analysis
        self.seed = seed
        self._sums: dict[tuple[str, int, float], Scores] = {}

    def weight_sums(self, name: str, dim: int, p: float) -> Scores:
        """Return the sum of |w|^p over all other dimensions of a parameter, one number for each index of `dim`.

        Raises:
            NonFiniteError: the parameter holds NaN or infinity.
            InputError: the parameter has no values (it is on the meta device).
        """
        key = (name, dim, p)
        if key not in self._sums:
            tensor = self.analysis.captured.tensors[name].detach()
            if tensor.is_meta:
                raise InputError(f"'{name}' is on the meta device and has no values to rank; use criterion 'random'")
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor = tensor.float()
            others = [d for d in range(tensor.dim()) if d != dim]
            norm = torch.linalg.vector_norm(tensor, p, dim=others) if others else tensor.abs()
            sums = norm.double().cpu().numpy() ** p
            if not np.isfinite(sums).all():
                raise NonFiniteError(
                    f"'{name}' holds NaN or infinite values (first at index {int(np.argmin(np.isfinite(sums)))} of "
                    f"dimension {dim}); mend the weights, or list the module under `keep`"
                )
            self._sums[key] = sums
        return self._sums[key]

    def weight_power(self, group: Group, p: float) -> Scores:
        """Return sum |w|^p over all weights that each unit of the group cuts, shape (units,).

        Matrices and kernels count; vectors (biases, norms) only where the group cuts nothing else.
        """
        tensors = self.analysis.captured.tensors
        members = [(n, d) for n, d in group.members if isinstance(tensors[n], nn.Parameter)]
        matrices = [(n, d) for n, d in members if tensors[n].dim() > 1]
        total = np.zeros(group.size)
        for name, dim in matrices or members:
            sums = self.weight_sums(name, dim, p)
            for units in positions(self.analysis.tensors[name][dim], group.axis):
                inside = units >= 0
                total += np.bincount(units[inside], weights=sums[inside], minlength=group.size)
        return total

    def weight_count(self, group: Group) -> float:
        """Return how many weights one unit of the group cuts."""
        tensors = self.analysis.captured.tensors
        return sum(tensors[n].numel() / math.prod((group.size,)) for n, _ in group.members if n in tensors)
