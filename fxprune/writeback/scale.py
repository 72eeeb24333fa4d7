"""Scales of attention: the class divides by the root of the width it finds, the graph by the root of the dense one.

The ratio goes into the weights that make the queries (or, where these cannot take it, the keys): their rows and biases
are multiplied, so that scores come out as before. Which rows those are is found by differentiating the dense graph from
the queries back to the layer. Nothing is taken on trust: outputs are compared afterwards.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxprune.analyse import Analysis
from fxprune.axes import size_of
from fxprune.capture import Varying
from fxprune.kept import Kept
from fxprune.rules.core import aten, bind, rule_of

ATTENTION = aten.scaled_dot_product_attention.default
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.baddbmm.default}
#: Layers that can take a factor: (weight, the weight's dimension that is the output's channels, bias, that dimension).
_LAYERS: dict[Any, tuple[str, int, str, int]] = {
    aten.linear.default: ("weight", 0, "bias", -1),
    aten.conv1d.default: ("weight", 0, "bias", 1),
    aten.conv2d.default: ("weight", 0, "bias", 1),
    aten.layer_norm.default: ("weight", 0, "bias", -1),
    aten.rms_norm.default: ("weight", 0, "", -1),
    aten.addmm.default: ("mat2", 1, "self", -1),
}
_MOVES = {"neg", "to", "_to_copy", "clone", "contiguous", "detach", "dropout", "alias"}
_SUMS = {"add", "sub", "cat", "stack", "concat"}


def restore_scales(small: nn.Module, graph: fx.Graph, analysis: Analysis, kept: Kept) -> dict[str, Tensor]:
    """Multiply weights of the smaller model where its own code scales differently; return tensor names -> factors.

    Args:
        graph: the smaller model as recorded; nodes of the same name do the same as in the captured one.
    """
    now = {n.name: n for n in graph.nodes}
    done: dict[str, Tensor] = {}
    factors: dict[str, Tensor] = {}
    for node in analysis.captured.graph.nodes:
        other = now.get(node.name)
        if node.op != "call_function" or other is None or other.target is not node.target:
            continue
        for operands, factor in _wanted(node, other, analysis, kept):
            for operand in operands:
                sources = _sources(operand, operand, {})
                if sources is not None and all(_scalable(source) for source, _ in sources):
                    for source, reached in sources:
                        _multiply(small, source, _rows(source, reached), factor, analysis, kept, done, factors)
                    break
    return factors


def _wanted(node: fx.Node, other: fx.Node, analysis: Analysis, kept: Kept) -> Iterator[tuple[list[fx.Node], float]]:
    """Operands of which one has to be multiplied, and with what."""
    if node.target is ATTENTION:
        named, _ = _bound(node)
        scales = []
        for n, width in (
            (node, size_of(analysis.dims[named["query"]][-1])),
            (other, kept.size(analysis.dims[named["query"]][-1])),
        ):
            own = _bound(n)[1].get("scale")
            assert isinstance(width, int)
            scales.append(1.0 / math.sqrt(width) if own is None else own)
        if not math.isclose(scales[0], scales[1], rel_tol=1e-9):
            yield [named["query"], named["key"]], scales[0] / scales[1]
    elif _name(node) in ("mul", "div"):
        before, after = [[a for a in n.args if isinstance(a, float)] for n in (node, other)]
        if len(before) == len(after) == 1 and not math.isclose(before[0], after[0], rel_tol=1e-9) and after[0]:
            ratio = before[0] / after[0]
            yield list(node.all_input_nodes[:1]), ratio if _name(node) == "mul" else 1 / ratio


def _bound(node: fx.Node) -> tuple[dict[str, Any], dict[str, Any]]:
    return bind(node.target, node.args, dict(node.kwargs))


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__.rpartition(".")[2] if packet is not None else ""


# ---------------------------------------------------------------------- where a factor can go
Sources = list[tuple[fx.Node, fx.Node]] | None


def _sources(node: fx.Node, reached: fx.Node, known: dict[tuple[fx.Node, fx.Node], Sources]) -> Sources:
    """The layers whose outputs must all be multiplied for the node's value to be; None where none can be.

    With each comes the value that its output has to reach: of a product, the one factor that is chosen. What was found
    once is `known`: sums upon sums have very many ways through them.
    """
    if (node, reached) not in known:
        known[node, reached] = None
        known[node, reached] = _found(node, reached, known)
    return known[node, reached]


def _found(node: fx.Node, reached: fx.Node, known: dict[tuple[fx.Node, fx.Node], Sources]) -> Sources:
    if node.op == "get_attr":  # a vector that is added: a bias on its own
        return [(node, reached)] if len(node.meta["shape"]) == 1 else None
    if node.op != "call_function":
        return None
    if _weights(node) is not None:
        return [(node, reached)]
    operands = node.all_input_nodes
    name, rule = _name(node), rule_of(node.target)
    family = rule.infer.__module__.rpartition(".")[2] if rule is not None else ""
    if name in _SUMS:
        found = [_sources(o, reached, known) for o in operands]
        return None if any(f is None for f in found) else list(dict.fromkeys(s for f in found for s in f or ()))
    if name in ("mul", "matmul", "bmm", "einsum"):
        return next((f for f in (_sources(o, o, known) for o in operands) if f is not None), None)
    if node.target is operator.getitem or name in (*_MOVES, "div") or family in ("movement", "indexing"):
        return _sources(operands[0], reached, known)
    return None


def _weights(source: fx.Node) -> tuple[fx.Node, int, fx.Node | None] | None:
    """(weight, its dimension that is the output's channels, bias) of a layer, or None where it is none."""
    if source.op == "get_attr":
        return source, 0, None
    if source.target in _LAYERS:
        named, (weight, dim, bias, _) = _bound(source)[0], _LAYERS[source.target]
        held = named.get(weight)
        return (held, dim, named.get(bias)) if isinstance(held, fx.Node) else None
    if _name(source) not in ("matmul", "mm"):
        return None
    weight_node, dim = source.args[1], 1
    while isinstance(weight_node, fx.Node) and _name(weight_node) in ("t", "transpose", "mT", "numpy_T", "permute"):
        weight_node, dim = weight_node.args[0], 1 - dim
    held = weight_node if isinstance(weight_node, fx.Node) and weight_node.op == "get_attr" else None
    return (held, dim, None) if held is not None and len(held.meta["shape"]) == 2 else None


def _scalable(source: fx.Node) -> bool:
    held = _weights(source)
    if held is None or held[0].op != "get_attr":
        return False
    bias = held[2]
    return bias is None or all(n.op == "get_attr" for n, _ in _vectors(bias, torch.zeros(bias.meta["shape"])))


def _vectors(bias: fx.Node, rows: Tensor) -> list[tuple[fx.Node, Tensor]]:
    """The tensors that a bias is joined from, each with its part of the rows."""
    if _name(bias) not in ("cat", "concat"):
        return [(bias, rows)]
    parts: list[fx.Node] = list(bias.args[0])  # type: ignore[arg-type]
    ends = np.cumsum([p.meta["shape"][0] for p in parts])
    return [(p, rows[end - p.meta["shape"][0] : end]) for p, end in zip(parts, ends, strict=True)]


def _rows(source: fx.Node, operand: fx.Node) -> Tensor:
    """True for the channels of the source's output that reach the operand."""
    between = _between(source, operand)
    generator = torch.Generator().manual_seed(0)

    def stand_in(node: fx.Node) -> Any:
        shape = [n[0] if isinstance(n, tuple) else n for n in node.meta["shape"]]
        if node.meta["dtype"].is_floating_point:
            return torch.rand(shape, generator=generator) + 0.5
        return torch.zeros(shape, dtype=node.meta["dtype"])

    values: dict[fx.Node, Any] = {source: stand_in(source).requires_grad_()}
    for node in between:
        args, kwargs = fx.node.map_arg(
            (node.args, dict(node.kwargs)), lambda a: values[a] if a in values else stand_in(a)
        )
        args, kwargs = pytree.tree_map(
            lambda v: v.values[0] if isinstance(v, Varying) else v,
            (args, kwargs),
            is_leaf=lambda v: isinstance(v, Varying),
        )
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    result = values[operand]
    weights = torch.rand(result.shape, generator=generator) + 0.5
    (gradient,) = torch.autograd.grad((result * weights).sum(), values[source])
    channel = _LAYERS[source.target][3] if source.target in _LAYERS else -1
    rows: Tensor = (gradient != 0).movedim(channel, 0).reshape(gradient.shape[channel], -1).any(1)
    return rows


def _between(source: fx.Node, operand: fx.Node) -> list[fx.Node]:
    """The nodes that carry the source's value to the operand, in order."""
    needed, queue = {operand}, [operand]
    while queue:
        for n in queue.pop().all_input_nodes:
            if n not in needed and n is not source:
                needed.add(n)
                queue.append(n)
    carried = {source}
    result = []
    for node in source.graph.nodes:
        if node in needed and any(a in carried for a in node.all_input_nodes):
            carried.add(node)
            result.append(node)
    return result


def _multiply(
    small: nn.Module,
    source: fx.Node,
    rows: Tensor,
    factor: float,
    analysis: Analysis,
    kept: Kept,
    done: dict[str, Tensor],
    factors: dict[str, Tensor],
) -> None:
    """Multiply rows of a layer's weight and bias, once however often the layer is used."""
    found = _weights(source)
    assert found is not None
    weight, channel, bias = found
    held = [(weight, rows, channel)]
    if bias is not None:
        held += [(vector, part, 0) for vector, part in _vectors(bias, rows)]
    for node, rows, dim in held:
        name = str(node.target)
        dims = analysis.tensors[name]
        left = rows & ~done.get(name, torch.zeros_like(rows))
        done[name] = left | done.get(name, torch.zeros_like(rows))
        index = torch.from_numpy(kept.index(dims[dim]))
        shape = [-1 if i == dim else 1 for i in range(len(dims))]
        path, _, leaf = name.rpartition(".")
        tensor = getattr(small.get_submodule(path), leaf)
        with torch.no_grad():
            scale = torch.where(left[index], factor, 1.0).reshape(shape).to(device=tensor.device, dtype=tensor.dtype)
            tensor.mul_(scale)
            factors[name] = scale * factors.get(name, 1.0)
