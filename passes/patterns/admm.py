"""Mask and weights together, by splitting them: the alternating direction method of multipliers."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.passes.patterns.registry import Weight, method

#: Of Boza's method: rounds, those in which the mask still moves, and the penalty.
_ROUNDS, _MOVING, _PENALTY = 30, 20, 1.0


@method("admm", data=True)
def admm(weight: Weight) -> tuple[Tensor, Tensor]:
    """W solves the layer, Z has the mask, and U pulls them together: Boza, "Fast and Effective Weight Update" (2024).

    Columns are scaled by the size of their inputs first. The mask is that of the largest |W + U|, and grows to its full
    extent with the cube of the round (algorithm 2).
    """
    moment = weight.known()
    norms = torch.diagonal(moment).sqrt()
    system = moment / norms[:, None] / norms[None, :]
    goal, width = weight.matrix * norms, weight.width
    right = goal @ system
    solve = torch.cholesky_inverse(
        torch.linalg.cholesky(system + _PENALTY * torch.eye(len(system), dtype=system.dtype))
    )
    w, u = goal.clone(), torch.zeros_like(goal)
    mask = torch.ones(len(goal), width, dtype=torch.bool)
    for number in range(_ROUNDS):
        if number < _MOVING:
            mask = _partly(weight, (w + u)[:, :width].abs(), 1 - (1 - (number + 1) / _MOVING) ** 3)
        z = (w + u) * weight.whole(mask)
        u = u + w - z
        w = (right + _PENALTY * (z - u)) @ solve
    return (w + u) * weight.whole(mask) / norms, mask


def _partly(weight: Weight, scores: Tensor, share: float) -> Tensor:
    """The pattern's mask, with only the worst share of what it takes away gone."""
    mask = weight.pattern.mask(scores)
    spared = scores.masked_fill(mask, -1).flatten()
    count = round((1 - share) * int((~mask).sum()))
    if count:
        mask.view(-1)[spared.topk(count).indices] = True
    return mask
