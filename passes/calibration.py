"""Calibration data: batches like the example inputs, with labels where a loss needs them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.capture import Captured
from fxprune.errors import InputError, NonFiniteError
from fxprune.proof_inputs import random_inputs

#: (the model's output, the batch's labels) -> a scalar. Without labels it may take the output alone.
Loss = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch.

    Attributes:
        inputs: the leaves of ((args, kwargs)), in the order of the captured graph's placeholders.
        labels: what came with them, or None.
    """

    inputs: list[Any]
    labels: Any = None

    @property
    def size(self) -> int:
        """The number of samples: the first tensor's first dimension."""
        first = next((x for x in self.inputs if isinstance(x, Tensor) and x.dim()), None)
        return len(first) if first is not None else 1


@dataclass(frozen=True, slots=True)
class Calibration:
    """Batches that fit the captured graph.

    Attributes:
        batches: at least one.
        loss: from the user, or None.
        random: the inputs are random numbers, not data.
    """

    batches: list[Batch]
    loss: Loss | None = None
    random: bool = False

    @property
    def samples(self) -> int:
        """The number of samples in all batches."""
        return sum(batch.size for batch in self.batches)


@dataclass(slots=True)
class _Layout:
    """What a batch has to look like."""

    captured: Captured
    args: int = field(init=False)
    names: list[str] = field(init=False)
    places: list[str] = field(init=False)
    rows: dict[str, tuple[str, int]] = field(init=False)  # input -> the table that it is looked up in, and its rows

    def __post_init__(self) -> None:
        example = pytree.tree_unflatten(list(range(len(self.captured.inputs))), self.captured.in_spec)
        self.args, self.names = len(example[0]), list(example[1])
        self.places = [str(n.target) for n in self.captured.graph.nodes if n.op == "placeholder"]
        self.rows = {}
        for node in self.captured.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
            table, indices = node.args[:2]
            if table.op == "get_attr" and indices.op == "placeholder":
                self.rows[str(indices.target)] = str(table.target), len(self.captured.tensors[str(table.target)])

    def batch(self, item: Any) -> Batch:
        args, kwargs, labels = self._parts(item)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.captured.in_spec:
            raise InputError(
                f"a calibration batch does not have the structure of the example inputs ({self._describe()}): "
                f"it is {_outline(item)}"
            )
        dynamic = {place for symbol in self.captured.symbols for place in symbol.places}
        for name, leaf, example in zip(self.places, leaves, self.captured.inputs, strict=True):
            if isinstance(example, Tensor) != isinstance(leaf, Tensor):
                raise InputError(f"calibration: '{name}' is {type(leaf).__name__}, not {type(example).__name__}")
            if not isinstance(leaf, Tensor):
                continue
            if _kind(leaf) != _kind(example):
                raise InputError(f"calibration: '{name}' is {_dtype(leaf)}, the example {_dtype(example)}")
            fits = leaf.dim() == example.dim() and all(
                a == b or (name, i) in dynamic for i, (a, b) in enumerate(zip(leaf.shape, example.shape, strict=True))
            )
            if not fits:
                may = ", ".join(str(d) for n, d in sorted(dynamic) if n == name)
                raise InputError(
                    f"calibration: '{name}' has the shape {tuple(leaf.shape)}, the example {tuple(example.shape)}; "
                    + (f"only dimension {may} may differ" if may else "no dimension may differ")
                )
            if not leaf.numel():
                raise InputError(f"calibration: '{name}' is empty, of the shape {tuple(leaf.shape)}")
            if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                raise InputError(f"calibration: '{name}' holds NaN or infinite values")
            if name in self.rows and not 0 <= int(leaf.min()) <= int(leaf.max()) < self.rows[name][1]:
                table, rows = self.rows[name]
                raise InputError(
                    f"calibration: '{name}' holds {int(leaf.min())} to {int(leaf.max())}, but '{table}' has {rows} rows"
                )
        for symbol in self.captured.symbols:
            sizes = {f"'{n}'": int(leaves[self.places.index(n)].shape[d]) for n, d in symbol.places}
            if len(set(sizes.values())) > 1:
                said = ", ".join(f"{n}: {size}" for n, size in sizes.items())
                raise InputError(f"calibration: the {symbol.name} sizes of one batch differ: {said}")
        leaves = [
            x.to(e.dtype) if isinstance(x, Tensor) else x for x, e in zip(leaves, self.captured.inputs, strict=True)
        ]
        return Batch(leaves, labels)

    def _parts(self, item: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Positional and keyword inputs and labels of one item of a loader."""
        if isinstance(item, Mapping):
            known = {k: item[k] for k in self.names if k in item}
            rest = {k: v for k, v in item.items() if k not in known}
            called = [n for n in self.places if n in rest]  # as the model's own inputs are
            keys = called if len(called) == self.args else list(rest)[: self.args]
            args = tuple(rest.pop(k) for k in keys)
            labels = next(iter(rest.values())) if len(rest) == 1 else rest or None
            return args, known, labels
        if not isinstance(item, Sequence) or isinstance(item, Tensor):
            return (item,), {}, None
        first = item[0] if item else None
        if isinstance(first, Mapping) or (isinstance(first, list | tuple) and len(item) <= 2):
            args, kwargs, labels = self._parts(first)
            return args, kwargs, item[1] if len(item) > 1 else labels
        more = tuple(item[self.args :])
        return tuple(item[: self.args]), {}, more[0] if len(more) == 1 else more or None

    def _describe(self) -> str:
        return ", ".join(
            f"{n}: {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            for n, x in zip(self.places, self.captured.inputs, strict=True)
        )


def calibration(source: Any, captured: Captured, loss: Loss | None = None, seed: int = 0) -> Calibration:
    """Return checked batches.

    Args:
        source: any iterable of batches (a DataLoader, a list), or a number of random samples. A batch is what the model
            takes (a tensor, a tuple of positional inputs, a dict of keyword inputs), optionally followed by labels:
            (inputs, labels), (input, other input, labels), or further keys of the dict.
        loss: (output, labels) -> scalar.

    Raises:
        InputError: there is no batch, one has another shape than the example inputs, holds values that are not finite,
            or labels are missing that the loss takes.
    """
    random = isinstance(source, int) and not isinstance(source, bool)
    if random and source < 1:
        raise InputError(f"calibration: {source} is no number of samples; take a few hundred")
    if random:
        warnings.warn(
            "calibration on random numbers: what is kept suits these, not the data that the model will see",
            UserWarning,
            stacklevel=3,
        )
        batches = _random(captured, source, seed)
    elif isinstance(source, Tensor | str) or not isinstance(source, Iterable):
        raise InputError(
            f"calibration is an iterable of batches or a number of random samples, not {type(source).__name__}"
        )
    else:
        layout = _Layout(captured)
        batches = [layout.batch(item) for item in source]
    if not batches:
        raise InputError("calibration yields no batch")
    if loss is not None and any(b.labels is None for b in batches) and _arguments(loss) > 1:
        raise InputError("the loss takes labels, but calibration batches have none: yield (inputs, labels)")
    return Calibration(batches, loss, random)


def _random(captured: Captured, samples: int, seed: int) -> list[Batch]:
    size = next((s.values[0] for s in captured.symbols if s.name == "batch"), None)
    first = Batch(captured.inputs).size
    rows = [first] * -(-samples // first) if size is None else [8] * (samples // 8) + [samples % 8] * (samples % 8 > 0)
    return [Batch(random_inputs(captured, seed + i, batch=n)) for i, n in enumerate(rows) if n]


def _arguments(loss: Loss) -> int:
    """How many arguments a loss must be given."""
    try:
        called = loss.forward if isinstance(loss, nn.Module) else loss
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):
        return 2
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def apply_loss(loss: Loss, output: Any, labels: Any) -> Tensor:
    """Call a user's loss.

    Raises:
        InputError: it fails, or what it gives is no scalar that depends on the output.
        NonFiniteError: it is NaN or infinite.
    """
    try:
        value = loss(output) if labels is None else loss(output, labels)
    except Exception as error:
        told = f"{_outline(output)} and labels {_outline(labels)}"
        raise InputError(f"the loss fails on an output {told}: {type(error).__name__}: {error}") from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise InputError(f"the loss gives {_outline(value)}, not a scalar tensor")
    if not value.requires_grad:
        raise InputError("the loss does not depend on the model's output, so that it has no gradient")
    if not bool(torch.isfinite(value.detach())):
        raise NonFiniteError(f"calibration: the loss is {float(value.detach())}")
    return value.reshape(())


def _kind(x: Tensor) -> str:
    """What cannot be turned into another without changing what it means; flags and whole numbers are one."""
    return "complex" if x.is_complex() else "float" if x.is_floating_point() else "whole"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _outline(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_outline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_outline, value)) + ")"
    return type(value).__name__
