"""What a proof runs on: the example's inputs, random ones like them, smaller ones where the graph takes them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fxprune.capture import Captured

Level = Literal["full", "quick"]


def cases(captured: Captured, first: list[Any], level: Level, seed: int) -> list[tuple[list[list[Any]], bool]]:
    """(inputs, whether to randomise the weights) of each comparison; the first inputs that the graph takes are used.

    Random rows on small images show as much as on large ones, where the graph takes them: it does not where a size is
    written into it.
    """
    if level == "quick":
        row = random_inputs(captured, seed, batch=1)
        return [([*_shrunk(row), row, *_valued(first)], False)]
    if not _valued(first):
        first = random_inputs(captured, seed + 1)
    rows = random_inputs(captured, seed, batch=2)
    return [([first], False), ([*_shrunk(rows), rows, first], True)]


def _valued(inputs: list[Any]) -> list[list[Any]]:
    """The inputs, where they have values: they may be all that the model takes, if it counts on a batch or shares."""
    return [] if any(isinstance(x, Tensor) and x.is_meta for x in inputs) else [inputs]


def first_row(captured: Captured, inputs: list[Any]) -> list[list[Any]]:
    """The inputs at a batch of 1, where the batch is dynamic and larger."""
    batched = {place for s in captured.symbols if s.name == "batch" for place in s.places}
    names = [n.target for n in captured.graph.nodes if n.op == "placeholder"]
    rows = [x[:1] if (name, 0) in batched else x for name, x in zip(names, inputs, strict=True)]
    return [rows] if any(a is not b and len(b) > 1 for a, b in zip(rows, inputs, strict=True)) else []


def _shrunk(inputs: list[Any]) -> list[list[Any]]:
    """The inputs with images of 64 pixels, where there are larger ones."""

    def shrunk(value: Any) -> Any:
        images = isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()
        return value[..., :64, :64] if images and min(value.shape[-2:]) > 64 else value

    small = [shrunk(x) for x in inputs]
    return [small] if any(a is not b for a, b in zip(small, inputs, strict=True)) else []


def random_inputs(captured: Captured, seed: int, batch: int | None = None) -> list[Any]:
    """Inputs like the example's: normal floats, integers between its smallest and largest, its own booleans."""
    generator = torch.Generator().manual_seed(seed)
    batched = {place for s in captured.symbols if s.name == "batch" for place in s.places}
    names = [n.target for n in captured.graph.nodes if n.op == "placeholder"]
    result = []
    for name, leaf in zip(names, captured.inputs, strict=True):
        if isinstance(leaf, Tensor):
            shape = list(leaf.shape)
            if batch is not None and (name, 0) in batched:
                shape[0] = batch
            leaf = _random_like(leaf, shape, generator)
        result.append(leaf)
    return result


def _random_like(leaf: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    if leaf.is_floating_point() or leaf.is_complex():
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype=leaf.dtype, device=_real(leaf))
    if leaf.is_meta:
        return torch.ones(shape, dtype=leaf.dtype)
    if leaf.dtype == torch.bool or not leaf.numel() or leaf.min() == leaf.max():
        rows = torch.arange(shape[0]) % leaf.shape[0] if shape else None
        return leaf if rows is None else leaf[rows.to(leaf.device)]
    low, high = int(leaf.min()), int(leaf.max()) + 1
    return torch.randint(low, high, shape, generator=generator, dtype=leaf.dtype).to(leaf.device)


def _real(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device
