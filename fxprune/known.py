"""Values known while a model is recorded: what depends neither on the inputs nor on parameters can be computed at once.

A branch on such a value, `.tolist()` of a table of sizes, `nonzero` of a constant mask or a loop counter need not stop
the recording, although the tensors that run through it have shapes only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._mode_utils import no_dispatch

#: What a fake tensor raises where its values are asked for.
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
#: Larger results than this are not computed while recording (elements).
MAX_ELEMENTS = 1 << 22


class Known:
    """Real values of nodes, computed when asked for."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._constant: dict[fx.Node, bool] = {}
        self._values: dict[fx.Node, Any] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Say that the get_attr node `name` has this value; parameters are for training and count as unknown."""
        if not isinstance(tensor, FakeTensor | nn.Parameter) and not tensor.is_meta:
            self._tensors[name] = tensor

    def value(self, node: fx.Node) -> Any:
        """Return the value of a node, or None where it depends on inputs, parameters or chance."""
        if not self.constant(node):
            return None
        for n in _before(node, self._values):
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), self._values.__getitem__)
            self._values[n] = self._tensors[str(n.target)] if n.op == "get_attr" else _call(n.target, args, kwargs)
        return self._values[node]

    def result(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operator gives on nodes and plain values, or None where an operand is unknown.

        Tensors among it are real ones.
        """
        nodes = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Node)]
        if not nodes or not all(map(self.constant, nodes)):
            return None
        args, kwargs = fx.node.map_arg((args, kwargs), self.value)
        return _call(func, args, kwargs)

    def constant(self, node: fx.Node) -> bool:
        """Return whether a node depends neither on inputs nor on parameters nor on chance."""
        for n in _before(node, self._constant):
            self._constant[n] = all(self._constant[a] for a in n.all_input_nodes) and self._computable(n)
        return self._constant[node]

    def _computable(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return str(node.target) in self._tensors
        if node.op != "call_function" or node.target is operator.getitem:
            return node.op == "call_function"
        sizes = [t.numel() for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
        tags = getattr(node.target, "tags", ())
        return torch.Tag.nondeterministic_seeded not in tags and sum(sizes) <= MAX_ELEMENTS


def _before(node: fx.Node, done: Mapping[fx.Node, Any]) -> Iterator[fx.Node]:
    """Yield the node and what it is computed from, as far as it is not done yet, operands first."""
    todo = [node]
    while todo:
        n = todo[-1]
        missing = [a for a in n.all_input_nodes if a not in done]
        if n in done or not missing:
            todo.pop()
            if n not in done:
                yield n
        else:
            todo += missing


def _call(target: Any, args: Any, kwargs: Any) -> Any:
    with no_dispatch(), torch._C._DisablePythonDispatcher(), torch.no_grad():
        return target(*args, **kwargs)


def faked(result: Any, mode: FakeTensorMode) -> Any:
    """Return the result with fake tensors in the place of its real ones."""
    return pytree.tree_map_only(Tensor, lambda t: mode.from_tensor(t), result)
