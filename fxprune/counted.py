"""Integers that count along an axis: which expert a token goes to, how many tokens each expert gets.

`topk` over an axis gives numbers that mean its indices. As long as they are only moved, sorted and used to pick from
that axis (or from a dimension that is unified with it), the axis can be cut: what is left is numbered anew, in the same
order. Any other use of the numbers makes the axis stay whole.
"""

from __future__ import annotations

import operator

from torch import fx

from fxprune.axes import Axes
from fxprune.rules.core import Counted

#: Operators, by name, that hand on the numbers of their first operand.
_MOVES = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "t", "expand"),
    *("contiguous", "clone", "detach", "alias", "lift_fresh", "slice", "select", "repeat", "repeat_interleave"),
    *("index", "index_select", "gather", "to", "_to_copy", "split", "chunk", "unbind", "split_with_sizes"),
}
#: Of a histogram and of offsets the order counts.
_KEEPS = {"to", "_to_copy", "detach", "clone", "alias", "contiguous"}
#: Operators whose rules know what to do with indices that come as another operand than the first.
_PICKS = {
    *("index", "index_put", "index_add", "index_copy", "index_select", "embedding", "gather", "scatter", "scatter_add"),
}
#: Operators whose rules know what to do with indices as the first operand, and say themselves what they give.
_COUNTS = {"histc", "one_hot"}


def track(node: fx.Node, counted: dict[fx.Node, Counted], axes: Axes) -> None:
    """Note what the result of a node counts, given its operands; freeze an axis whose numbers are used otherwise."""
    own = counted.get(node)  # said by the node's own rule
    for operand in node.all_input_nodes:
        what = counted.get(operand)
        if what is None or node.op == "output":
            if what is not None:
                axes.freeze(what.dim, "its indices are a model output", node)
            continue
        passed = _passed(node, operand, what)
        if passed is False:
            axes.freeze(what.dim, f"{node.target} uses its indices as numbers", node)
        elif isinstance(passed, Counted) and own is None:
            counted[node] = passed


def _passed(node: fx.Node, operand: fx.Node, what: Counted) -> Counted | bool:
    """What the node's result counts, True where it counts nothing and the use is fine, False where it is not."""
    if node.target is operator.getitem:
        if _name(operand) == "sort":
            return what if node.args[1] == 0 else True
        return what
    name, first = _name(node), bool(node.args) and node.args[0] is operand
    if what.kind == "index":
        if first and (name in _MOVES or name == "sort"):
            return what
        return name in (_COUNTS if first else _PICKS)
    if first and name in _KEEPS:
        return what
    if what.kind == "histogram":
        return Counted(what.dim, "offsets") if name == "cumsum" and first else False
    return name in ("_grouped_mm", "grouped_mm_fallback") and not first


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__.rpartition(".")[2] if packet is not None else ""
