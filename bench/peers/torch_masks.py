"""`torch.nn.utils.prune` as its tutorial uses it: the output channels of smallest norm of every layer are set to zero.

No shape changes: what it costs in accuracy can be compared, and the time is that of the dense model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection

from torch import nn
from torch.nn.utils import prune as masks


def share(speedup: float) -> float:
    """Return the share of every layer's channels without which a model that shrank would have 1/speedup of its MACs.

    Inputs and outputs of a layer shrink alike, so that what is left of it is the square of what is left of its width.

    >>> share(4.0)
    0.5
    """
    return 1 - 1 / math.sqrt(speedup)


def prune(model: nn.Module, amount: float, ignored: Collection[str] = ()) -> nn.Module:
    """Return a copy with the share `amount` of each layer's output channels zeroed by their L2 norm.

    Args:
        amount: of the channels of every convolution and linear layer, from 0 to 1.
        ignored: names of the layers that stay whole.

    >>> from torch import nn
    >>> pruned = prune(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), 0.5, ["1"])
    >>> [int(layer.weight.any(dim=1).sum()) for layer in pruned]
    [4, 2]
    """
    pruned = copy.deepcopy(model).eval()
    for name, layer in pruned.named_modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) and name not in ignored:
            masks.ln_structured(layer, "weight", amount=amount, n=2, dim=0)  # type: ignore[no-untyped-call]
            masks.remove(layer, "weight")  # type: ignore[no-untyped-call]
    return pruned
