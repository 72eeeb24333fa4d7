"""Torch-Pruning (DepGraph, Fang et al. 2023, https://arxiv.org/abs/2301.12900), run as its own examples run it.

Magnitude importance, the same ratio in every layer, one step, no fine-tuning. Its examples for timm models tell it
which linear layers hold queries, keys and values and correct the attention modules' sizes afterwards; so does this.
"""

from __future__ import annotations

import copy
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bench.shims import shim_torchvision

Heads = Literal["dims", "whole"]
"""What goes from attention: the same share of every head's dimensions, or that share of the heads."""


class Pruned(NamedTuple):
    """A pruned copy of a model and the seconds that building the dependency graph and pruning took."""

    model: nn.Module
    seconds: float


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the code under it after `seconds`; has no effect outside the main thread or on Windows."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    message = f"Torch-Pruning was stopped after {seconds:g} s"
    expired = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal expired
        expired = True
        raise TimeoutError(message)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception as error:
        # Torch-Pruning catches everything in places and goes on to fail in another way.
        if expired and not isinstance(error, TimeoutError):
            raise TimeoutError(message) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if expired:
        raise TimeoutError(message)


def classifiers(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> list[str]:
    """Return the names of the linear layers as wide as the model's output, which must keep its classes."""
    with torch.inference_mode():
        output = model(*example_inputs)
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and isinstance(output, Tensor) and layer.out_features == output.shape[-1]
    ]


def _attentions(model: nn.Module) -> Iterator[Any]:
    """Yield the modules with a fused projection `qkv` and a `num_heads`, as timm writes attention."""
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and isinstance(getattr(module, "num_heads", None), int):
            yield module


def _correct(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """Write the new sizes into the attention modules, whose forward reads them."""
    for attention in _attentions(model):
        attention.num_heads = heads[attention.qkv]
        width = attention.qkv.out_features // 3
        for name, value in (("head_dim", width // attention.num_heads), ("attn_dim", width)):
            if hasattr(attention, name):
                setattr(attention, name, value)


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


def prune(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    ratio: float,
    heads: Heads = "dims",
    ignored: Sequence[str] | None = None,
    round_to: int | None = None,
    limit: float = 600.0,
) -> Pruned:
    """Return a copy of `model` without the share `ratio` of its channels, and the seconds this took.

    `ignored` names the modules whose outputs stay whole (default: the classifiers); `round_to` is the number that kept
    widths are multiples of. Copying and the check that the result runs are not in the time. Raises TimeoutError after
    `limit` seconds, and whatever Torch-Pruning, or the forward of what it leaves, raises: for a Swin with whole heads
    that is a RuntimeError, since its position bias tables keep a column for every head there was.
    """
    shim_torchvision()
    import torch_pruning  # type: ignore[import-untyped, unused-ignore]

    if ignored is None:
        ignored = classifiers(model, example_inputs)
    pruned = copy.deepcopy(model).eval()
    num_heads: dict[nn.Module, int] = {attention.qkv: attention.num_heads for attention in _attentions(pruned)}
    # Position bias tables have one column a head: nothing that goes from inside a head may be cut from them.
    tables = [value for name, value in pruned.named_parameters() if name.endswith("relative_position_bias_table")]
    whole = heads == "whole"
    with _limit(limit), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says which parameters it found outside layers
        start = time.perf_counter()
        pruner = torch_pruning.pruner.BasePruner(
            pruned,
            example_inputs,
            importance=torch_pruning.importance.MagnitudeImportance(),
            global_pruning=False,
            pruning_ratio=ratio,
            round_to=round_to,
            ignored_layers=[*(pruned.get_submodule(name) for name in ignored), *tables],
            num_heads=num_heads,
            prune_num_heads=whole,
            prune_head_dims=not whole,
            head_pruning_ratio=ratio if whole else 0.0,
            # Without this it calls the model a second time, with the tuple itself, after any error of the first call.
            forward_fn=lambda module, inputs: module(*inputs),
            # Its defaults are one dictionary for all pruners of a process, which it fills.
            in_channel_groups={},
            out_channel_groups={},
            **_swin(pruned, torch_pruning),
        )
        pruner.step()
        _correct(pruned, pruner.num_heads)
        seconds = time.perf_counter() - start
    with torch.inference_mode():
        pruned(*example_inputs)
    return Pruned(pruned, seconds)
