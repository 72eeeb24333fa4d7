"""Weights that are used with a mask while a model is trained, as parametrisations of its modules.

An optimizer goes on holding the same parameters, so that what was made before stays right: mixed precision, gradient
accumulation, clipping, DistributedDataParallel, torch.compile. The parameter keeps what it would be without the mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxprune.errors import InputError


class _Through(torch.autograd.Function):
    """The weight times its mask; the weight gets the gradient of the product as it is (straight through)."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Masked(nn.Module):
    """A parametrisation: the weight times its mask.

    Args:
        weight: whose shape, dtype and device count.
        through: what is masked gets the gradient that it would get without the mask; else none.
        soft: while the module trains the weight is multiplied with a gate of real numbers instead.
    """

    def __init__(self, weight: Tensor, through: bool, soft: bool) -> None:
        super().__init__()
        self.through, self.soft = through, soft
        # Of the weight's own type: a product with bools takes four times as long.
        self.register_buffer("mask", torch.ones_like(weight, requires_grad=False), persistent=False)
        if soft:
            self.register_buffer("gate", torch.ones_like(weight, requires_grad=False), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight as it is used."""
        mask: Tensor = self.gate if self.soft and self.training else self.mask  # type: ignore[assignment]
        return _Through.apply(weight, mask) if self.through else weight * mask  # type: ignore[no-untyped-call]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what is stored for a weight that is set."""
        return weight


class Weights:
    """The masked parameters of a model, by the names that they have in its captured graph.

    Args:
        model: whose modules get parametrisations.
        aliases: further names of tied parameters -> the name that counts.
    """

    def __init__(self, model: nn.Module, aliases: Mapping[str, str]) -> None:
        self.model = model
        self._aliases: dict[str, list[str]] = {}
        for alias, name in aliases.items():
            self._aliases.setdefault(name, []).append(alias)
        self._masks: dict[str, list[Masked]] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._orders: dict[str, list[str]] = {}

    def add(self, name: str, *, through: bool = False, soft: bool = False) -> None:
        """Give a parameter a mask that keeps all of it, under each of its names; stronger wishes win.

        Raises:
            InputError: it is no parameter of the model, or parametrised by something else.
        """
        if name in self._masks:
            for mask in self._masks[name]:
                mask.through |= through
                if soft and not mask.soft:
                    mask.soft = True
                    mask.register_buffer("gate", torch.ones_like(self._parameters[name], requires_grad=False), False)
            return
        for path in (name, *self._aliases.get(name, ())):
            owner, leaf = _owner(self.model, path)
            if parametrize.is_parametrized(owner, leaf) or _computed_from(owner, leaf):
                raise InputError(
                    f"'{path}' is parametrised already: remove that (torch.nn.utils.parametrize), "
                    "or leave the layer out with `exclude`; of another Pruner, `abort` or `finish` that one"
                )
            weight = getattr(owner, leaf)
            mask = Masked(weight.detach(), through, soft)
            mask.train(owner.training)
            self._orders.setdefault(path.rpartition(".")[0], list(owner._parameters))
            parametrize.register_parametrization(owner, leaf, mask)
            self._masks.setdefault(name, []).append(mask)
            self._parameters[name] = weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def parameter(self, name: str) -> nn.Parameter:
        """Return the parameter itself, without its mask."""
        if name in self._masks:  # the attribute itself would be computed, which a sharded one cannot always be
            path, _, leaf = name.rpartition(".")
            owner: Any = self.model.get_submodule(path)
            found = owner.parametrizations[leaf].original
        else:
            found = getattr(*_owner(self.model, name))
        assert isinstance(found, nn.Parameter)
        return found

    def value(self, name: str) -> Tensor:
        """Return the parameter's numbers without its mask, whole where it is sharded."""
        return whole(self.parameter(name).detach())

    def gradient(self, name: str) -> Tensor | None:
        """Return its gradient, whole where it is sharded; None where there is none."""
        gradient = self.parameter(name).grad
        return None if gradient is None else whole(gradient)

    def mask(self, name: str) -> Tensor:
        """Return which entries stay: bool."""
        return self._factor(name) != 0

    def zeros(self, name: str) -> tuple[int, int]:
        """Return how many entries are masked, and how many there are."""
        factor = self._factor(name)
        return factor.numel() - int(factor.sum(dtype=torch.float64)), factor.numel()  # counting takes six times as long

    def _factor(self, name: str) -> Tensor:
        """The mask as it is multiplied with."""
        mask = self._masks[name][0].mask
        assert isinstance(mask, Tensor)
        return mask

    def set_mask(self, name: str, mask: Tensor) -> None:
        """Say which entries stay."""
        for one in self._masks[name]:
            assert isinstance(one.mask, Tensor)
            one.mask.copy_(mask)

    def set_gate(self, name: str, gate: Tensor) -> None:
        """Say what the entries are multiplied with while the model trains; of a shape that broadcasts to the weight."""
        for one in self._masks[name]:
            assert isinstance(one.gate, Tensor)
            one.gate.copy_(gate)

    def gate(self, name: str) -> Tensor | None:
        """Return what the entries are multiplied with while the model trains; None where that is the mask."""
        one = self._masks[name][0]
        return one.gate if one.soft else None  # type: ignore[return-value]

    def masks(self) -> dict[str, Tensor]:
        """Return all masks, as they are now."""
        return {name: self.mask(name) for name in self._masks}

    @torch.no_grad()
    def push(self, name: str, value: Tensor) -> None:
        """Add something to a parameter's gradient; one that is frozen gets none."""
        parameter = self.parameter(name)
        if not parameter.requires_grad:
            return
        more = like(value.to(parameter.device, parameter.dtype), parameter)
        parameter.grad = more if parameter.grad is None else parameter.grad.add_(more)

    @torch.no_grad()
    def decay(self, name: str, strength: float) -> None:
        """Add a number times the weight to the gradient of what is masked; a frozen parameter gets none."""
        parameter = self.parameter(name)
        if not parameter.requires_grad:
            return
        masked = torch.addcmul(parameter, parameter, like(self._factor(name), parameter), value=-1)
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.add_(masked, alpha=strength)

    @torch.no_grad()
    def scale(self, name: str, factor: Tensor) -> None:
        """Multiply a parameter, in place."""
        parameter = self.parameter(name)
        parameter.mul_(like(factor.to(parameter.device, parameter.dtype), parameter))

    @torch.no_grad()
    def mask_gradient(self, name: str) -> None:
        """Take away the gradient of what is masked."""
        gradient = self.parameter(name).grad
        gate = self.gate(name)
        if gradient is not None:
            gradient.mul_(like(self._factor(name) if gate is None else gate, gradient))

    @torch.no_grad()
    def bake(self, names: Iterable[str] | None = None) -> None:
        """Write zeros where masks are zero, into the parameters themselves."""
        for name in self._masks if names is None else names:
            parameter = self.parameter(name)
            parameter.mul_(like(self._factor(name), parameter))

    def sharded(self) -> bool:
        """Return whether parameters are spread over processes."""
        return any(hasattr(self.parameter(name), "full_tensor") for name in self._masks)

    def remove(self, *, zeros: bool = True) -> None:
        """Turn all of them into ordinary parameters again, the same objects, with zeros where masks are.

        Raises:
            InputError: they are sharded, and what shards them knows them where they are now.
        """
        if self.sharded():
            raise InputError("the model is sharded: its masks cannot be taken off where it is; `finish` makes a copy")
        if zeros:
            self.bake()
        for name in list(self._masks):
            for path in (name, *self._aliases.get(name, ())):
                owner, leaf = _owner(self.model, path)
                parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)
        for path, order in self._orders.items():  # optimizers and files know parameters by their place
            owner = self.model.get_submodule(path)
            owner._parameters = {leaf: owner._parameters[leaf] for leaf in order if leaf in owner._parameters}
        self._orders.clear()
        self._masks.clear()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is sharded over processes as one."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """Return a whole tensor sharded as another one is; the tensor itself where that one is whole."""
    if not hasattr(sharded, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    plan: Any = sharded
    return distribute_tensor(tensor, plan.device_mesh, plan.placements)


def _computed_from(owner: nn.Module, leaf: str) -> bool:
    """Whether a weight is computed from a parameter, so that zeros in this are none in that: weight_norm and the like.

    >>> _computed_from(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)).parametrizations.weight, "original1")
    True
    """
    names = [getattr(hook, "name", None) for hook in owner._forward_pre_hooks.values()]
    return isinstance(owner, parametrize.ParametrizationList) or any(n and leaf.startswith(f"{n}_") for n in names)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
        getattr(owner, leaf)
    except AttributeError:
        raise InputError(f"the model has no parameter '{name}'") from None
    return owner, leaf
