"""A few rows stand for all where an operator treats every row alike: linear layers and attention in the proof."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fxprune.analyse import Analysis
from fxprune.capture import Captured
from fxprune.kept import Kept
from fxprune.rules.core import bind

ROWS = 4
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def sampled_operand(analysis: Analysis, kept: Kept, node: fx.Node) -> fx.Node | None:
    """The operand of which a few rows say all about a node, because it treats every row alike, or None.

    It is the input of linear layers and the queries of attention, the dearest operators, unless rows are removed.
    """
    shape, dims = node.meta.get("shape"), analysis.dims[node]
    if node.target not in (torch.ops.aten.linear.default, ATTENTION) or len(shape) < 2:  # type: ignore[arg-type]
        return None
    operands = [node.args[0], *(a for a in [*node.args[1:], *node.kwargs.values()] if isinstance(a, fx.Node))]
    first = operands[0]
    if not isinstance(first, fx.Node) or first.op == "get_attr" or first in operands[1:]:
        return None
    if node.target is ATTENTION:
        named, _ = bind(node.target, node.args, dict(node.kwargs))
        return None if named["is_causal"] or isinstance(named["attn_mask"], fx.Node) else first
    return None if any(kept.cut(d) for d in dims[:-1]) else first


def on_rows(interpreter: fx.Interpreter, node: fx.Node, run: Callable[[fx.Node], Any]) -> Any:
    """Run a node on a few rows of its first operand and let every row have the result of the nearest of them.

    Both graphs do so at the same nodes. What is shown is the same by induction over the nodes: each gives what the
    masked one does on these rows, hence on any, and all others are compared on the values that come of it.
    """
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value = interpreter.env[source]
    few = _few(value, node.target is ATTENTION)
    if few is None:
        return run(node)
    interpreter.env[source], spread = few
    try:
        return spread(run(node))
    finally:
        interpreter.env[source] = value


def _few(value: Tensor, attention: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """A few rows (those of all samples merged, queries apart), and how all rows take the result of the nearest."""
    rows = 1 if attention else math.prod(value.shape[:-2])
    merged = value if attention else value.reshape(*[1] * (value.dim() - 2), rows * value.shape[-2], value.shape[-1])
    count = merged.shape[-2]
    if count <= 2 * ROWS:
        return None
    nearest = (torch.arange(count) * ROWS) // count

    def spread(result: Tensor) -> Tensor:
        return result[..., nearest, :].reshape(*value.shape[:-1], result.shape[-1])

    return merged[..., torch.linspace(0, count - 1, ROWS).long(), :], spread


class FewRows(TorchFunctionMode):
    """Linear layers and attention of a model itself run on the rows that `on_rows` takes in its graph."""

    def __init__(self, captured: Captured) -> None:
        super().__init__()
        self.weights = {id(t) for t in captured.tensors.values()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        attention = func is F.scaled_dot_product_attention
        if (func is F.linear or (attention and not _masking(args, kwargs))) and args and args[0].dim() > 1:
            first: Tensor = args[0]
            others = [*args[1:], *kwargs.values()]
            few = _few(first, attention)
            if few is not None and id(first) not in self.weights and not any(first is o for o in others):
                return few[1](func(few[0], *args[1:], **kwargs))
        return func(*args, **kwargs)


def _masking(args: Any, kwargs: Any) -> bool:
    """Whether attention's rows differ in what they may look at."""
    named = {
        **dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)),
        **kwargs,
    }
    return isinstance(named.get("attn_mask"), Tensor) or bool(named.get("is_causal"))
