"""Zeros that stay zeros while a module is trained."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxprune.admit import admit
from fxprune.errors import InputError


class Mask(nn.Module):
    """A parametrisation: the weight times its mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight, zero where the mask is."""
        assert isinstance(self.mask, Tensor)
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what is stored for a weight that is set."""
        return weight


def lock(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Multiply weights with their masks wherever they are used, whatever an optimiser does to them.

    Each is a parametrisation (`torch.nn.utils.parametrize`), so that state dicts hold `X.parametrizations.weight`
    until `unlock`.

    Args:
        masks: name of a parameter -> its mask, bool, of its shape.

    Raises:
        InputError: the module has no such parameter, or it is of another shape.

    >>> import torch
    >>> layer = nn.Sequential(nn.Linear(4, 1))
    >>> lock(layer, {"0.weight": torch.tensor([[True, False, True, False]])})
    >>> layer(torch.ones(2, 4)).sum().backward()
    >>> torch.optim.SGD(layer.parameters(), 0.1, weight_decay=0.1).step()
    >>> unlock(layer)
    >>> (layer[0].weight == 0).tolist()
    [[False, True, False, True]]
    """
    for name, mask in masks.items():
        path, _, leaf = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
            weight = getattr(owner, leaf)
        except AttributeError:
            raise InputError(f"the module has no parameter '{name}' to lock") from None
        if weight.shape != mask.shape:
            raise InputError(f"'{name}' is of the shape {tuple(weight.shape)}, its mask {tuple(mask.shape)}")
        if not locked(owner, leaf):
            parametrize.register_parametrization(owner, leaf, Mask(mask.to(weight.device)))


def locked(owner: nn.Module, leaf: str) -> bool:
    """Whether a module's parameter is locked."""
    return parametrize.is_parametrized(owner, leaf) and any(
        isinstance(p, Mask)
        for p in owner.parametrizations[leaf]  # type: ignore[index]
    )


def unlocked(module: nn.Module) -> nn.Module:
    """Return the module, or, where weights are locked, a copy in which they are ordinary parameters."""
    if not any(isinstance(m, Mask) for m in module.modules()):
        return module
    return admit(module).model  # a plain copy would share the class that `unlock` takes the weight from


def unlock(module: nn.Module) -> None:
    """Turn locked weights into ordinary parameters again, with their zeros."""
    for owner in list(module.modules()):
        if not parametrize.is_parametrized(owner):
            continue
        for leaf in list(owner.parametrizations):  # type: ignore[arg-type]
            if locked(owner, leaf):
                parametrize.remove_parametrizations(owner, leaf, leave_parametrized=True)
