"""Evaluate once what depends neither on the inputs nor on the weights.

Position indices, attention slopes and relative-position tables are computed inside many `forward`s from plain numbers.
Folded into constants they have dimensions like any other tensor, and are cut like any other.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.capture import Captured, Varying

#: Larger results than this stay computed (elements).
MAX_ELEMENTS = 1 << 22

#: Tensors of one value: they take any size, so that they need no folding for their own sake.
_FILLED = {
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "zeros_like",
    "ones_like",
}


def fold_constants(captured: Captured) -> int:
    """Replace input-independent sub-graphs by constants; returns how many constants were made."""
    values: dict[fx.Node, Any] = {}
    for node in captured.graph.nodes:
        if node.op == "get_attr" and node.target in captured.constants:
            values[node] = captured.tensors[str(node.target)]
        elif node.op == "call_function" and _foldable(node, values):
            args, kwargs = _filled_in((node.args, node.kwargs), values)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    made = 0
    for node in reversed(list(captured.graph.nodes)):
        value = values.get(node)
        if node.op != "call_function" or not isinstance(value, Tensor) or _name(node) in _FILLED:
            continue
        if any(user not in values for user in node.users):
            name = f"_folded_{node.name}"
            captured.tensors[name] = value
            captured.constants.add(name)
            with captured.graph.inserting_before(next(iter(captured.graph.nodes))):
                constant = captured.graph.create_node("get_attr", name, name=name)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in values)
            made += 1
    captured.graph.eliminate_dead_code()
    return made


def _filled_in(tree: Any, values: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(tree, lambda n: values[n])


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet else ""


def _foldable(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    if any(a not in values for a in node.all_input_nodes) or _varies(node.args) or _varies(node.kwargs):
        return False
    if node.target is operator.getitem:
        return True
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    shape = node.meta.get("shape")
    if isinstance(shape, tuple):
        elements = 1
        for s in shape:
            if not isinstance(s, int):
                return False
            elements *= s
        return elements <= MAX_ELEMENTS
    return shape is not None


def _varies(tree: object) -> bool:
    if isinstance(tree, list | tuple):
        return any(_varies(x) for x in tree)
    if isinstance(tree, dict):
        return any(_varies(x) for x in tree.values())
    return isinstance(tree, Varying)
