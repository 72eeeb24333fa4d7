"""Make an ONNX model compute in float16 or bfloat16, with inputs and outputs as they are.

Every float32 value becomes one of the smaller type. Where the definition of an operator has float32 alone (the scales
of Resize, the ends of Range), casts lead in and out. The module itself is not cast before the export: its code, and the
literals of a pruned graph, say float32 in many places.

`import onnx` inside this module is the library: imports are absolute.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fxprune.errors import BackendError

if TYPE_CHECKING:
    import onnx_ir as ir

#: Attributes that name the type of a result.
_TYPES = ("to", "dtype")


def compute_in(model: ir.Model, dtype: str) -> None:
    """Change the model in place.

    Args:
        dtype: "float16" or "bfloat16".

    Raises:
        BackendError: the model branches or loops, or has an operator that onnx does not define.
    """
    if sum(1 for _ in model.graphs()) > 1:
        raise BackendError(
            f"dtype={dtype!r} does not reach into the branches and loops (If, Loop, Scan) of this model's graph; "
            "build it with dtype='float32'"
        )
    _Cast(model, dtype).run()


class _Cast:
    """One pass over the nodes in order; `small` holds the values that were float32 and no longer are."""

    def __init__(self, model: ir.Model, dtype: str) -> None:
        import onnx_ir as ir

        self.graph, self.dtype = model.graph, dtype
        self.kind, self.float = ir.DataType[dtype.upper()], ir.DataType.FLOAT
        self.versions = model.opset_imports
        self.small: set[ir.Value] = set()
        self._numbers = itertools.count()

    def run(self) -> None:
        nodes = list(self.graph)
        for value in self.graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype == self.float:
                value.const_value = self._smaller(value.const_value)
                self._mark(value)
        for value in self.graph.inputs:
            if value.dtype == self.float:
                self._narrowed(value, functools.partial(self.graph.insert_before, nodes[0]))
        for node in nodes:
            self._change(node)
        for i, value in enumerate(self.graph.outputs):
            if value in self.small:
                self.graph.outputs[i] = self._widened(value)

    def _mark(self, value: ir.Value) -> None:
        value.dtype = self.kind
        self.small.add(value)

    def _narrowed(self, value: ir.Value, place: Callable[[ir.Node], None]) -> None:
        """Let every reader of a float32 value read it in the smaller type; `place` puts the cast into the graph."""
        cast = self._node(value, self.kind)
        place(cast)
        for user, i in value.uses():
            if user is not cast:
                user.replace_input_with(i, cast.outputs[0])
        self._mark(cast.outputs[0])

    def _node(self, value: ir.Value, kind: ir.DataType) -> ir.Node:
        import onnx_ir as ir

        node = ir.node("Cast", [value], {"to": int(kind)})
        # Numbered: one value may be cast for several nodes.
        node.outputs[0].name = f"{value.name}_{kind.name.lower()}_{next(self._numbers)}"
        node.outputs[0].dtype, node.outputs[0].shape = kind, value.shape
        return node

    def _widened(self, value: ir.Value) -> ir.Value:
        """An output of the graph under its own name, in float32."""
        cast = self._node(value, self.float)
        cast.outputs[0].name, value.name = value.name, f"{value.name}_{self.dtype}"
        self.graph.append(cast)
        return cast.outputs[0]

    def _change(self, node: ir.Node) -> None:
        schema, taken = self._schema(node)
        bound: dict[str, bool] = {}  # type variables that inputs decide -> whether they were float32
        for i, value in enumerate(node.inputs):
            if value is None:
                continue
            kind = _formal(schema.inputs, i)
            bound[kind] = bound.get(kind, False) or value in self.small
            if value in self.small and not taken(kind):
                cast = self._node(value, self.float)
                self.graph.insert_before(node, cast)
                node.replace_input_with(i, cast.outputs[0])
        for i, value in enumerate(node.outputs):
            kind = _formal(schema.outputs, i)
            was_float = bound[kind] if kind in bound else self._made_float(node, value)
            if not was_float:
                continue
            if taken(kind) and (kind in bound or self._says_small(node)):
                self._mark(value)
            elif value.uses():
                self._narrowed(value, functools.partial(self.graph.insert_after, node))

    def _schema(self, node: ir.Node) -> tuple[Any, Any]:
        """The definition of a node's operator, and a function: whether a type of it may be the smaller one."""
        import onnx

        version = self.versions.get(node.domain, 1)
        try:
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        except onnx.defs.SchemaError as error:
            raise BackendError(
                f"dtype={self.dtype!r}: the operator {node.domain}::{node.op_type} is not in onnx's set {version}"
            ) from error
        name = f"tensor({self.dtype})"
        allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
        return schema, lambda kind: name in allowed.get(kind, {kind})

    def _made_float(self, node: ir.Node, value: ir.Value) -> bool:
        """Whether a result whose type no input decides is float32."""
        told = next((node.attributes[name].as_int() for name in _TYPES if name in node.attributes), None)
        if told is not None:
            return bool(told == self.float)
        if "value" in node.attributes:
            return bool(node.attributes["value"].as_tensor().dtype == self.float)
        if node.op_type == "Constant":
            return "value_float" in node.attributes or "value_floats" in node.attributes
        return bool(node.op_type == "ConstantOfShape" or value.dtype == self.float)

    def _says_small(self, node: ir.Node) -> bool:
        """Write the smaller type where a node says that its result is float32; whether it says it anywhere."""
        import onnx_ir as ir

        for name in _TYPES:
            if name in node.attributes:
                node.attributes[name] = ir.AttrInt64(name, int(self.kind))
                return True
        if "value" in node.attributes:
            made: ir.TensorProtocol = node.attributes["value"].as_tensor()
        elif node.op_type == "ConstantOfShape":
            made = ir.tensor(torch.zeros(1))
        elif "value_float" in node.attributes:
            made = ir.tensor(torch.tensor(node.attributes.pop("value_float").as_float()))
        elif "value_floats" in node.attributes:
            made = ir.tensor(torch.tensor(list(node.attributes.pop("value_floats").as_floats())))
        else:
            return False
        node.attributes["value"] = ir.AttrTensor("value", self._smaller(made))
        return True

    def _smaller(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """A float32 tensor in the smaller type.

        What is too large for it becomes its largest number, not infinity: masks are often the most negative float32,
        and two of them may be added. A single number too small for it, the epsilon of a division, does not become zero.
        """
        import onnx_ir as ir

        kind = getattr(torch, self.dtype)
        info = torch.finfo(kind)
        values = torch.from_numpy(tensor.numpy().copy())
        small = torch.where(values.isinf(), values, values.clamp(info.min, info.max)).to(kind)
        if small.numel() == 1 and not small.any() and values.any():
            small = torch.full_like(small, info.tiny) * values.sign().to(kind)
        return ir.tensor(small, name=tensor.name)


def _formal(formals: Sequence[Any], i: int) -> str:
    """The type of the i-th input or output; a variadic one stands for all that follow."""
    return str(formals[min(i, len(formals) - 1)].type_str)
