"""Residual branches by their parameters: which ones scale what a branch gives, and whether zeros end it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx

from fxprune.analyse import Analysis
from fxprune.blocks import Block, live
from fxprune.passes.consumers import contractions
from fxprune.rules.core import bind

aten = torch.ops.aten


def _overloads(**named: str) -> frozenset[object]:
    return frozenset(getattr(getattr(aten, name), o) for name, several in named.items() for o in several.split())


#: Operators that give their operand's numbers, at other places or with others left out.
_MOVED = _overloads(
    view="default",
    reshape="default",
    permute="default",
    transpose="int",
    flatten="using_ints",
    unflatten="int",
    squeeze="default dim",
    unsqueeze="default",
    contiguous="default",
    clone="default",
    alias="default",
    roll="default",
    slice="Tensor",
    select="int",
    expand="default",
    dropout="default",
)
#: Operators whose result is zero where their first operand is.
_ZERO_AT_ZERO = _MOVED | _overloads(
    relu="default",
    relu6="default",
    leaky_relu="default",
    gelu="default",
    silu="default",
    hardswish="default",
    mish="default",
    tanh="default",
    elu="default",
    mean="default dim",
    sum="default dim_IntList",
    adaptive_avg_pool2d="default",
    avg_pool2d="default",
    max_pool2d="default",
    neg="default",
    _to_copy="default",
)
#: Operators whose result is zero where any operand is, and where all are; divisions, which by a number only are.
_ANY_ZERO = _overloads(mul="Tensor Scalar", matmul="default", bmm="default", mm="default")
_SUMS, _JOINED = _overloads(add="Tensor", sub="Tensor"), _overloads(cat="default", stack="default")
_DIVISIONS = _overloads(div="Tensor Scalar")
_NORMS = _overloads(
    batch_norm="default", layer_norm="default", group_norm="default", instance_norm="default", rms_norm="default"
)


class Branches:
    """The branches of a model, as `find_blocks` finds them."""

    def __init__(self, analysis: Analysis) -> None:
        self._products = {c.node: c for c in contractions(analysis)}
        used = (operand for node in live(analysis, {}) for operand in node.all_input_nodes)
        self._uses = Counter(str(n.target) for n in used if n.op == "get_attr")

    def outputs(self, block: Block) -> frozenset[str]:
        """Return the parameters whose product with a factor is the branch's with it; all where that is not seen."""
        node = _origin(_end(block))
        names: Sequence[str] = ()
        if node in self._products:
            names = self._own(node)
        elif node.target in _NORMS:
            names = _parameters(node)
        elif node.target is aten.mul.Tensor:
            names = _parameters(node)[:1]
        found = frozenset(names)
        alone = all(name in block.parameters and self._uses[name] == 1 for name in found)
        return found if found and alone else block.parameters

    def vanishes(self, block: Block) -> bool:
        """Return whether the branch is seen to give zeros where all of its parameters are zero."""
        return self._zero(_end(block), block, {})

    def _own(self, node: fx.Node) -> list[str]:
        """Names of the weight and the bias of a contraction."""
        c = self._products[node]
        return [c.weight] if c.bias is None else [c.weight, c.bias]

    def _zero(self, node: fx.Node, block: Block, known: dict[fx.Node, bool]) -> bool:
        if node not in known:
            operands = node.all_input_nodes
            zero = False
            if node.op == "get_attr":
                zero = str(node.target) in block.parameters
            elif node in self._products:
                zero = block.parameters.issuperset(self._own(node))
                zero |= self._products[node].bias is None and self._zero(self._products[node].operand, block, known)
            elif node.target in _NORMS:
                names = _parameters(node)
                zero = bool(names) and block.parameters.issuperset(names)
            elif node.target in _ZERO_AT_ZERO or (node.target in _DIVISIONS and len(operands) == 1):
                zero = node.args[0] is operands[0] and self._zero(operands[0], block, known)
            elif node.target in _ANY_ZERO:
                zero = any(self._zero(n, block, known) for n in operands)
            elif node.target in _SUMS:
                terms = all(isinstance(term, fx.Node) for term in node.args[:2])  # and no number
                zero = terms and all(self._zero(n, block, known) for n in operands)
            elif node.target in _JOINED:
                zero = all(self._zero(n, block, known) for n in operands)
            elif node.target is aten.scaled_dot_product_attention.default:
                zero = self._zero(operands[2], block, known)
            known[node] = zero
        return known[node]


def _end(block: Block) -> fx.Node:
    """What a branch adds to the stream."""
    return next(n for n in block.total.all_input_nodes if n is not block.stream)


def _origin(node: fx.Node) -> fx.Node:
    """Where a node's numbers come from, before they are moved about."""
    while node.target in _MOVED:
        node = node.all_input_nodes[0]
    return node


def _parameters(node: fx.Node) -> list[str]:
    """Names of a norm's weight and bias, or of the tensors among a product's factors."""
    named, _ = bind(node.target, node.args, dict(node.kwargs))
    given = [named.get("weight"), named.get("bias")] if node.target in _NORMS else node.args
    origins = [_origin(n) for n in given if isinstance(n, fx.Node)]
    return [str(n.target) for n in origins if n.op == "get_attr"]
