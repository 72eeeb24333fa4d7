"""Mask and weights together, with a penalty that grows until the mask stands still."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.passes.patterns.registry import Weight, method

#: Rounds at most; every few of them the penalty is looked at.
_ROUNDS, _EVERY = 300, 3
#: The penalty at the start, on a moment whose diagonal is one.
_START = 0.1
#: Share of the mask that changed -> what the penalty is multiplied with: fast while it moves, then slower.
_FACTORS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


@method("alps", data=True)
def alps(weight: Weight) -> tuple[Tensor, Tensor]:
    """W solves the layer, D has the mask, V pulls them together: Meng et al., "ALPS" (2024), equation 4.

    D is the pattern's best part of W + V / rho; rho grows the more the mask still changes, until it no longer does
    (their equation 5). The moment's eigenvectors make every penalty as cheap as the first. The rounds are in single
    precision, which is twice as fast and finds the same masks.
    """
    moment = weight.known()
    norms = torch.diagonal(moment).sqrt()
    values, vectors = torch.linalg.eigh(moment / norms[:, None] / norms[None, :])
    values, vectors = values.float(), vectors.float()
    goal, width = (weight.matrix * norms).float(), weight.width
    right = (goal @ vectors * values) @ vectors.T
    rho, d, v = _START, goal.clone(), torch.zeros_like(goal)
    mask = weight.pattern.mask(goal[:, :width].abs())
    before, still = mask, 0
    for number in range(_ROUNDS):
        w = ((right - v + rho * d) @ vectors / (values + rho)) @ vectors.T
        mask = weight.pattern.mask((w + v / rho)[:, :width].abs())
        d = (w + v / rho) * weight.whole(mask)
        v = v + rho * (w - d)
        if (number + 1) % _EVERY:
            continue
        changed = float((mask != before).float().mean()) / max(weight.pattern.density, 1e-9)
        before = mask
        factor = next((f for limit, f in _FACTORS if changed > limit), None)
        if factor is None:
            still += 1
            if still > 1:
                break
            factor = _FACTORS[-1][1]
        rho *= factor
    return d.double() / norms, mask
