"""Prune, and compare with the dense model after its weights were masked by hand, without the compiler."""

from __future__ import annotations

import copy
import fnmatch
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import fxprune
from fxprune.analyse import analyse
from fxprune.capture import capture
from fxprune.groups import find_groups
from tests.rules.checks import close

Kept = dict[int, list[int]]
#: Most of the models here have a few thousand multiply-accumulates, of which one unit is a good part.
LEAST = 0.3


@dataclass
class Result:
    """A model and what became of it."""

    model: nn.Module
    pruned: fxprune.Pruned

    @property
    def kinds(self) -> Counter[str]:
        """How many groups of each kind were cut."""
        return Counter(g.kind for g in self.pruned.report.groups if g.kept < g.size)

    def cut(self, *globs: str) -> None:
        """Check that each dimension ("conv.weight.0") that a glob matches is smaller than it was."""
        shapes = dict(self.model.named_parameters(remove_duplicate=False))
        for glob in globs:
            found = [(n, int(d)) for n, _, d in (k.rpartition(".") for k in _matching(shapes, glob))]
            assert found, f"no dimension of a parameter matches {glob}"
            for name, dim in found:
                now, before = self.pruned.module.get_parameter(name).shape[dim], shapes[name].shape[dim]
                assert now < before, f"dimension {dim} of {name} has {now} of {before} entries"

    def whole(self, reason: str, *globs: str) -> None:
        """Check that each dimension that a glob matches is as long as it was, and that the report says this of it."""
        shapes = dict(self.model.named_parameters(remove_duplicate=False))
        for glob in globs:
            for label in _matching(shapes, glob) or [glob]:
                name, _, dim = label.rpartition(".")
                assert self.pruned.module.get_parameter(name).shape[int(dim)] == shapes[name].shape[int(dim)], label
                assert reason in self.pruned.report.whole[label], f"{label}: {self.pruned.report.whole[label]}"

    def width(self, name: str, dim: int = 0) -> int:
        """Return what is left of a dimension of a parameter."""
        return self.pruned.module.get_parameter(name).shape[dim]


def _matching(parameters: dict[str, nn.Parameter], glob: str) -> list[str]:
    labels = [f"{name}.{d}" for name, p in parameters.items() for d in range(p.dim())]
    return fnmatch.filter(labels, glob)


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """Return the model, in eval mode, with vectors that differ from the zeros and ones they start as.

    A shift of zero and a scale of one hide mistakes.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor += 0.2 * torch.rand(tensor.shape) + 0.05
    return model.eval()


def prune(model: nn.Module, example: Any, other: Any = None, *, least: float = LEAST, **recipe: Any) -> Result:
    """Compile at half the MACs with full proof; compare with the model masked by hand on other inputs.

    Args:
        example: a tensor, a tuple of tensors, or a dict of keyword inputs.
        other: the same of another batch size; by default made from `example`.
        least: at least this share of the target's MACs is left: more was not taken away than asked for.
    """
    settings: dict[str, Any] = {"target": {"macs": 0.5}, "round_to": 1, "proof": "full"} | recipe
    pruned = fxprune.compile(filled(model), example, settings)
    report = pruned.report
    assert report.proof.level == "full" and report.proof.error <= report.proof.tolerance == 1e-9
    assert report.unknown == {}, f"operators without a rule: {report.unknown}"
    goal = settings["target"]["macs"]
    assert least * goal / 0.5 < report.macs.ratio <= goal, f"{report.macs.ratio:.3f} of the MACs are left"
    result = Result(model, pruned)
    every_dimension_is_accounted_for(result, example)
    compare(model, pruned, example if other is None else other, more=other is None)
    return result


def every_dimension_is_accounted_for(result: Result, example: Any) -> None:
    """Each dimension is shorter, or the report says why it is whole, or its group was left whole by the recipe."""
    spared: set[str] = set()
    if any(g.kept == g.size for g in result.pruned.report.groups):
        args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
        found = find_groups(analyse(capture(result.model, args if isinstance(args, tuple) else (args,), kwargs)))
        left = {g.name for g in result.pruned.report.groups if g.kept == g.size}
        spared = {f"{name}.{dim}" for g in found if g.name in left for name, dim in g.members}
    for name, parameter in result.pruned.module.named_parameters():
        for dim, (now, before) in enumerate(zip(parameter.shape, result.model.get_parameter(name).shape, strict=True)):
            label = f"{name}.{dim}"
            silent = now == before > 1 and label not in result.pruned.report.whole and label not in spared
            assert not silent, f"dimension {dim} of {name} is whole, and nothing says why"


def compare(model: nn.Module, pruned: fxprune.Pruned, inputs: Any, more: bool = True) -> None:
    """Check that the pruned module computes what the hand-masked model computes, which is not what the dense one does.

    Args:
        more: take three times as many rows.
    """
    if more:
        inputs = pytree.tree_map_only(Tensor, _triple, inputs)
    masked = masked_by_hand(model, pruned.plan.kept)
    dense, expected, actual = (_outputs(m, inputs) for m in (model, masked, pruned.module))
    assert close(expected, actual, 2e-4), "the pruned module does not compute what the masked model computes"
    assert not close(dense, expected, 1e-3), "masking changes nothing: the comparison says nothing"


def _triple(x: Tensor) -> Tensor:
    """Three times as many rows, with other values where any will do."""
    return torch.randn(3 * len(x), *x.shape[1:], dtype=x.dtype) if x.is_floating_point() else x.repeat_interleave(3, 0)


@torch.no_grad()
def _outputs(module: nn.Module, inputs: Any) -> list[Any]:
    if isinstance(inputs, dict):
        result = module(**inputs)
    else:
        result = module(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    # A cache of keys and values is an object to the model, and None to the pruned module.
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


# ---------------------------------------------------------------------- masking by hand
@torch.no_grad()
def masked_by_hand(model: nn.Module, kept: dict[str, Kept]) -> nn.Module:
    """Return a copy of the model with every parameter entry that is not kept set to zero.

    What is removed is then ignored by its consumers, whatever it is; only a norm over it would still see it, and takes
    its statistics from the kept entries alone.
    """
    masked = copy.deepcopy(model)
    masked.register_forward_pre_hook(lambda *_: torch.backends.mha.set_fastpath_enabled(False))  # it calls no module
    masked.register_forward_hook(lambda *_: torch.backends.mha.set_fastpath_enabled(True), always_call=True)
    done = set()
    for name, dims in kept.items():
        try:
            parameter = masked.get_parameter(name)
        except AttributeError:  # a buffer
            continue
        if id(parameter) in done:
            continue
        done.add(id(parameter))
        for dim, indices in dims.items():
            removed = torch.ones(parameter.shape[dim], dtype=torch.bool)
            removed[indices] = False
            parameter.index_fill_(dim, removed.nonzero()[:, 0], 0)
    for path, module in masked.named_modules():
        norm = next((f for kind, f in _NORMS if kind(module)), None)
        if norm is not None and f"{path}.weight" in kept:
            module.forward = functools.partial(norm, module, torch.tensor(kept[f"{path}.weight"][0]))  # type: ignore[method-assign]
    return masked


def _layer_norm(norm: Any, kept: Tensor, x: Tensor) -> Tensor:
    weight, bias = norm.weight[kept], None if norm.bias is None else norm.bias[kept]
    y = nn.functional.layer_norm(x[..., kept], (len(kept),), weight, bias, norm.eps)
    return torch.zeros_like(x).index_copy(-1, kept, y)


def _layer_norm_2d(norm: Any, kept: Tensor, x: Tensor) -> Tensor:
    return _layer_norm(norm, kept, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _rms_norm(norm: Any, kept: Tensor, x: Tensor) -> Tensor:
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = x[..., kept]
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * norm.weight[kept]
    return torch.zeros_like(x).index_copy(-1, kept, y)


def _group_norm(norm: Any, kept: Tensor, x: Tensor) -> Tensor:
    """Each of the original groups by itself, as far as any of it is kept."""
    result = torch.zeros_like(x)
    for own in torch.arange(x.shape[1]).chunk(norm.num_groups):
        own = own[torch.isin(own, kept)]
        if len(own):
            y = nn.functional.group_norm(x[:, own], 1, norm.weight[own], norm.bias[own], norm.eps)
            result = result.index_copy(1, own, y)
    return result


def _is_rms_norm(module: nn.Module) -> bool:
    return "RMSNorm" in type(module).__name__ and sum(1 for _ in module.parameters()) == 1


_NORMS: list[tuple[Callable[[nn.Module], bool], Callable[..., Tensor]]] = [
    (lambda m: type(m).__name__ == "LayerNorm2d", _layer_norm_2d),
    (lambda m: isinstance(m, nn.LayerNorm), _layer_norm),
    (lambda m: isinstance(m, nn.GroupNorm), _group_norm),
    (_is_rms_norm, _rms_norm),
]
