"""The best weights that have a given mask."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.passes.patterns.registry import Weight

#: Bytes of the systems that are solved at a time.
_BYTES = 1 << 28


def refit(weight: Weight, mask: Tensor) -> Tensor:
    """Return argmin over W with the mask of tr((W - G) H (W - G)^T), exactly, row by row.

    For what stays, K, of a row g:  w_K = g_K + (H_KK)^-1 H_KZ g_Z, with Z what goes.

    Args:
        weight: its matrix is G, its damped moment H.
        mask: of the patterned columns, bool (out, width).
    """
    system, goal = weight.known(), weight.matrix
    result = goal * weight.whole(mask)
    # sum over what goes of H g, for every column: the right side of each row's system
    right = (goal - result) @ system
    counts = weight.whole(mask).sum(1)
    for count in sorted(set(counts.tolist())):
        if not count:
            continue
        rows = torch.nonzero(counts == count)[:, 0]
        for some in torch.split(rows, max(1, _BYTES // (8 * count * count))):
            kept = torch.nonzero(weight.whole(mask)[some])[:, 1].reshape(len(some), count)
            systems = system[kept[:, :, None], kept[:, None, :]]
            factor = torch.linalg.cholesky(systems)
            change = torch.cholesky_solve(right[some].gather(1, kept)[:, :, None], factor)[:, :, 0]
            result[some] = result[some].scatter_add(1, kept, change)
    return result
