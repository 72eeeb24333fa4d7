"""Column after column, the error of what goes is made good by what comes after."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.passes.obs import inverse
from fxprune.passes.patterns.registry import Weight, method

#: Columns whose corrections of later ones are collected before they are applied.
_BLOCK = 128


@method("sparsegpt", data=True)
def sparsegpt(weight: Weight) -> tuple[Tensor, Tensor]:
    """The smallest w^2 / u_jj^2 go, and what lies behind takes over: Frantar and Alistarh, "SparseGPT" (2023).

    U is the upper Cholesky factor of the inverse moment (algorithm 1): its diagonal is what an entry costs once all
    columns before it are settled. A constant 1, last, takes over too, so that the bias follows.
    """
    factor = torch.linalg.cholesky(inverse(weight.known()), upper=True)
    scales = torch.diagonal(factor)
    matrix, width, window = weight.matrix.clone(), weight.width, weight.pattern.window
    mask = torch.ones(len(matrix), width, dtype=torch.bool)
    block = -(-_BLOCK // window) * window
    for start in range(0, width, block):
        end = min(start + block, width)
        errors = matrix.new_zeros(len(matrix), end - start)
        for j in range(start, end):
            if (j - start) % window == 0:
                group = slice(j, min(j + window, width))
                mask[:, group] = weight.pattern.mask((matrix[:, group] / scales[group]).square())
            gone = matrix[:, j] * ~mask[:, j]
            errors[:, j - start] = gone / scales[j]
            matrix[:, j:end] -= errors[:, j - start, None] * factor[j, j:end]
            matrix[:, j] *= mask[:, j]
        matrix[:, end:] -= errors @ factor[start:end, end:]
    return matrix, mask
