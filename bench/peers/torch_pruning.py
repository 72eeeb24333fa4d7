"""Torch-Pruning (DepGraph, Fang et al. 2023, https://arxiv.org/abs/2301.12900), run as its own examples run it.

Magnitude importance unless another is asked for, the same ratio in every layer, one step, no fine-tuning. Its examples
for transformers tell it which linear layers hold queries, keys and values and correct the attention modules' sizes
afterwards; so does this.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bench.peers.limit import limited
from bench.shims import shim_torchvision

Heads = Literal["dims", "whole", "none"]
"""What goes from attention: the same share of every head's dimensions, that share of the heads, or nothing."""


Importance = Literal["magnitude", "taylor", "hessian"]


class Pruned(NamedTuple):
    """A pruned copy of a model and the seconds that building the dependency graph and pruning took."""

    model: nn.Module
    seconds: float


def classifiers(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> list[str]:
    """Return the names of the linear layers as wide as the model's output, which must keep its classes."""
    with torch.inference_mode():
        output = model(*example_inputs)
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and isinstance(output, Tensor) and layer.out_features == output.shape[-1]
    ]


class _Attention(NamedTuple):
    """An attention module, the linear layers that give its queries, keys and values, and its number's name."""

    module: Any
    layers: list[nn.Linear]
    number: str


def _attentions(model: nn.Module) -> Iterator[_Attention]:
    """Yield the modules with a fused projection `qkv`, or with `query`, `key` and `value`, and a number of heads."""
    for module in model.modules():
        layers = [getattr(module, name, None) for name in ("qkv", "query", "key", "value")]
        found = [layer for layer in layers if isinstance(layer, nn.Linear)]
        for number in ("num_heads", "num_attention_heads", "heads"):
            if len(found) in (1, 3) and isinstance(getattr(module, number, None), int):
                yield _Attention(module, found, number)
                break


def _correct(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """Write the new sizes into the attention modules, whose forward reads them."""
    for module, layers, number in _attentions(model):
        count = heads[layers[0]]
        setattr(module, number, count)
        width = layers[0].out_features // (3 if len(layers) == 1 else 1)
        sizes = {"head_dim": width // count, "attention_head_size": width // count}
        for name, value in {**sizes, "attn_dim": width, "all_head_size": width}.items():
            if hasattr(module, name):
                setattr(module, name, value)


def _merge_pruner(tp: Any) -> Any:
    """Return what Torch-Pruning's Swin example gives it for patch merging, which puts four pixels side by side."""

    class PatchMerging(tp.BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: Any, idxs: list[int]) -> Any:
            tp.prune_linear_out_channels(layer.reduction, idxs)
            return layer

        def prune_in_channels(self, layer: Any, idxs: list[int]) -> Any:
            repeated = [index + pixel * layer.dim for pixel in range(4) for index in idxs]
            tp.prune_linear_in_channels(layer.reduction, repeated)
            tp.prune_layernorm_out_channels(layer.norm, repeated)
            layer.dim -= len(idxs)  # a later group must find the width it now has
            return layer

        def get_out_channels(self, layer: Any) -> Any:
            return layer.reduction.out_features

        def get_in_channels(self, layer: Any) -> Any:
            return layer.dim

    return PatchMerging()


def _swin(model: nn.Module, tp: Any) -> dict[str, Any]:
    """Return the settings that a timm Swin needs on top of a ViT's; none for other models."""
    merging = {type(module) for module in model.modules() if type(module).__name__ == "PatchMerging"}
    if not merging:
        return {}
    return {
        "customized_pruners": {kind: _merge_pruner(tp) for kind in merging},
        "root_module_types": [nn.Conv2d, nn.Linear, *merging],
    }


def _gradients(model: nn.Module, scores: Any, losses: Iterator[Tensor]) -> None:
    """Leave behind the gradients that an importance reads, as Torch-Pruning's own examples do.

    Its Hessian importance is given the sum over all samples: `accumulate_grad` of 1.6.1 keeps the last sample's alone.
    """
    model.zero_grad()
    hessian = hasattr(scores, "accumulate_grad")
    sums: dict[nn.Parameter, Tensor] = {}
    for loss in losses:
        if hessian:
            model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        if hessian:
            for value in model.parameters():
                if value.grad is not None:
                    square = value.grad.square()
                    sums[value] = sums[value] + square if value in sums else square
    if hessian:
        scores._accu_grad, scores._counter = sums, dict.fromkeys(sums, 1)


def prune(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    ratio: float,
    heads: Heads = "dims",
    ignored: Sequence[str] | None = None,
    round_to: int | None = None,
    limit: float = 600.0,
    importance: Importance = "magnitude",
    losses: Callable[[nn.Module], Iterator[Tensor]] | None = None,
) -> Pruned:
    """Return a copy of `model` without the share `ratio` of its channels, and the seconds this took.

    Copying and the check that the result runs are not in the time.

    Args:
        heads: what goes from attention.
        ignored: names of the modules whose outputs stay whole; by default the classifiers.
        round_to: the number that kept widths are multiples of.
        limit: seconds.
        importance: "magnitude", or with `losses` "taylor" (first order) or "hessian" (its diagonal).
        losses: yields scalars of the model that it is given: one a batch, or for the Hessian one a sample.

    Raises:
        TimeoutError: after `limit` seconds.
        Exception: whatever Torch-Pruning, or the forward of what it leaves, raises; for a Swin with whole heads that is
            a RuntimeError, since its position bias tables keep a column for every head there was.
    """
    shim_torchvision()
    import torch_pruning  # type: ignore[import-untyped, unused-ignore]

    if ignored is None:
        ignored = classifiers(model, example_inputs)
    pruned = copy.deepcopy(model).eval()
    num_heads = {layer: getattr(a.module, a.number) for a in _attentions(pruned) for layer in a.layers}
    # Position bias tables have one column a head: nothing that goes from inside a head may be cut from them.
    tables = [value for name, value in pruned.named_parameters() if name.endswith("relative_position_bias_table")]
    whole = heads == "whole"
    kept = [layer for attention in _attentions(pruned) for layer in attention.layers if heads == "none"]
    with limited(limit, "Torch-Pruning"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says which parameters it found outside layers
        scores = {
            "magnitude": torch_pruning.importance.MagnitudeImportance,
            "taylor": torch_pruning.importance.TaylorImportance,
            "hessian": torch_pruning.importance.HessianImportance,
        }[importance]()
        start = time.perf_counter()
        pruner = torch_pruning.pruner.BasePruner(
            pruned,
            example_inputs,
            importance=scores,
            global_pruning=False,
            pruning_ratio=ratio,
            round_to=round_to,
            ignored_layers=[*(pruned.get_submodule(name) for name in ignored), *tables, *kept],
            num_heads=num_heads,
            prune_num_heads=whole,
            prune_head_dims=heads == "dims",
            head_pruning_ratio=ratio if whole else 0.0,
            # Without this it calls the model a second time, with the tuple itself, after any error of the first call.
            forward_fn=lambda module, inputs: module(*inputs),
            # Its defaults are one dictionary for all pruners of a process, which it fills.
            in_channel_groups={},
            out_channel_groups={},
            **_swin(pruned, torch_pruning),
        )
        if importance != "magnitude":
            assert losses is not None
            _gradients(pruned, scores, losses(pruned))
        pruner.step()
        pruned.zero_grad()
        _correct(pruned, pruner.num_heads)
        seconds = time.perf_counter() - start
    with torch.inference_mode():
        pruned(*example_inputs)
    return Pruned(pruned, seconds)
