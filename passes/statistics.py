"""What a criterion may ask of the model: sums over weights by dimension."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fxprune.analyse import Analysis
from fxprune.axes import atoms
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

        `dim` is one that a group cuts.

        Raises:
            NonFiniteError: the parameter holds NaN or infinity.
            InputError: the parameter has no values (it is on the meta device).
        """
        if (name, 0, p) not in self._sums:
            self._sum(name, p)
        return self._sums[name, dim, p]

    def _sum(self, name: str, p: float) -> None:
        """Fill the sums of all dimensions of one parameter: |w|^p is computed once, kernels are summed first."""
        tensor = self.analysis.captured.tensors[name].detach()
        if tensor.is_meta:
            raise InputError(f"'{name}' is on the meta device and has no values to rank; use criterion 'random'")
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        power = tensor * tensor if p == 2 else tensor.abs() ** p
        if power.dim() > 3 and not any(True for d in self.analysis.tensors[name][2:] for _ in atoms(d)):
            power = power.flatten(2).sum(2)  # the kernel, which nothing cuts
        for dim in range(power.dim()):
            sums = power.sum([d for d in range(power.dim()) if d != dim]) if power.dim() > 1 else power
            values = sums.double().cpu().numpy()
            if not np.isfinite(values).all():
                raise NonFiniteError(
                    f"'{name}' holds NaN or infinite values (first at index {int(np.argmin(np.isfinite(values)))} of "
                    f"dimension {dim}); mend the weights, or list the module under `keep`"
                )
            self._sums[name, dim, p] = values

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
