"""What happens to an ONNX file before it becomes an engine: its floating-point type, and a look at its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxprune.errors import BackendError

if TYPE_CHECKING:
    import onnx_ir as ir

#: Attributes that hold an element type.
_TYPES = ("to", "dtype", "output_dtype")
#: Operator -> its inputs that are float32 whatever the type of the others.
_FLOAT_ONLY = {"Resize": (1, 2), "Upsample": (1,), "NonMaxSuppression": (0, 1, 3, 4)}
#: Bytes of weights that go into the ONNX file itself, somewhat below the 2 GB that one message may have.
LARGE = 1_800_000_000
#: Of so many neighbours along the input axis, a 2:4 weight has at most two that are not zero.
_GROUP = 4


@dataclass(frozen=True, slots=True)
class TwoOfFour:
    """The weights of convolutions and matrix products, by name: those that 2:4 fits on, and those that hold it."""

    possible: tuple[str, ...]
    held: tuple[str, ...]

    @property
    def share(self) -> float:
        """The share of the possible weights that hold the pattern; 0 where none is possible."""
        return len(self.held) / len(self.possible) if self.possible else 0.0


def load(path: Path) -> ir.Model:
    """Read an ONNX file.

    Raises BackendError where it is missing or damaged.
    """
    import onnx_ir as ir

    try:
        return ir.load(path)
    except Exception as error:  # protobuf, onnx_ir and the operating system each have their own
        raise BackendError(f"'{path}' cannot be read as an ONNX file: {error}. Export it again") from error


def beside(path: Path) -> Path:
    """Return the file that holds the large weights of an ONNX file."""
    return path.with_name(f"{path.name}.data")


def save(model: ir.Model, path: Path) -> None:
    """Write a model; weights above LARGE bytes go `beside` it, else a file that an earlier model left there goes.

    Raises BackendError where the file cannot be written.
    """
    import onnx_ir as ir

    weights = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    large = sum(weight.nbytes for weight in weights if weight is not None) > LARGE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, path, external_data=beside(path).name if large else None)
        if not large:
            beside(path).unlink(missing_ok=True)
    except OSError as error:
        raise BackendError(f"'{path}' cannot be written: {error.strerror}. Choose another place") from error


def two_of_four(model: ir.Model) -> TwoOfFour:
    """Look for weights of which every 4 neighbours along the input axis hold at least 2 zeros.

    Looked at are the constant weights of Conv (input channels) and of MatMul and Gemm (the axis that is summed over),
    behind a DequantizeLinear too, whose input axis divides by 4 and which are not zero altogether.
    """
    possible: dict[str, bool] = {}
    for node in model.graph.all_nodes():
        found = _weight(node)
        if found is not None and found[1].shape[found[2]] % _GROUP == 0 and found[1].any():
            name, weight, axis = found
            groups = np.moveaxis(weight, axis, -1).reshape(-1, _GROUP)
            possible[name] = bool((np.count_nonzero(groups, axis=1) <= _GROUP // 2).all())
    return TwoOfFour(tuple(possible), tuple(name for name, holds in possible.items() if holds))


def _weight(node: ir.Node) -> tuple[str, np.ndarray[Any, Any], int] | None:
    """Name, values and input axis of a node's constant weight."""
    axes = {"Conv": 1, "MatMul": -2, "Gemm": 1 if _integer(node, "transB") else 0}
    if node.op_type not in axes or len(node.inputs) < 2:
        return None
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        value = producer.inputs[0]
    if value is None or value.const_value is None or len(value.const_value.shape) < 2:
        return None
    return str(value.name), value.const_value.numpy(), axes[node.op_type]


def _integer(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


def fold_small(model: ir.Model) -> None:
    """Turn quantised biases and single numbers into float32 constants, in place; weights stay quantised.

    Quantisers store a bias as INT32 in front of a DequantizeLinear, which TensorRT takes for smaller integers alone,
    and it takes no quantised number of no dimensions.
    """
    import onnx_ir as ir

    for node in list(model.graph):
        constants = [value.const_value if value is not None else None for value in node.inputs]
        if node.op_type != "DequantizeLinear" or any(c is None or len(c.shape) > 1 for c in constants):
            continue
        # One scale and zero point for all, or one for each number.
        quantised, scale, *zero = (c.numpy() for c in constants if c is not None)
        shifted = quantised.astype(np.int64) - (zero[0].astype(np.int64) if zero else 0)
        numbers = np.asarray(shifted * scale, dtype=np.float32)
        (old,) = node.outputs
        new = ir.Value(name=f"{old.name}_folded", const_value=ir.Tensor(numbers, name=f"{old.name}_folded"))
        new.dtype, new.shape = ir.DataType.FLOAT, ir.Shape(numbers.shape)
        model.graph.register_initializer(new)
        ir.convenience.replace_all_uses_with(old, new)
        model.graph.remove(node, safe=True)


def cast(model: ir.Model, dtype: str) -> None:
    """Turn float32 inside `model` into `dtype`, in place; its inputs and outputs keep their types, through casts.

    Finite numbers beyond the range of `dtype`, such as masks have, become its largest ones. What operators take in
    float32 alone (the scales of Resize) stays so.

    Args:
        dtype: "float16" or "bfloat16"; with "float32" nothing happens.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import InlinePass

    to = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}.get(dtype)
    if to is None:
        return
    InlinePass()(model)
    outputs = [value.dtype == ir.DataType.FLOAT for value in model.graph.outputs]
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.dtype == ir.DataType.FLOAT and not _float_only(value):
                assert value.const_value is not None
                value.const_value, value.dtype = _converted(value.const_value, to), to
    nodes = list(model.graph.all_nodes())  # a list, because casts are added meanwhile
    for node in nodes:
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT:
                output.dtype = to
        for attribute in list(node.attributes.values()):
            _cast_attribute(node, attribute, to)
    for node in nodes:
        for index in _FLOAT_ONLY.get(node.op_type, ()):
            given = node.inputs[index] if index < len(node.inputs) else None
            if given is not None and given.dtype == to:
                node.replace_input_with(index, _cast_value(given, ir.DataType.FLOAT, before=node))
    _cast_inputs(model.graph, to)
    _cast_outputs(model.graph, to, outputs)


def _float_only(value: ir.Value) -> bool:
    """Whether no operator takes this value but in float32."""
    uses = value.uses()
    return bool(uses) and all(use.idx in _FLOAT_ONLY.get(use.node.op_type, ()) for use in uses)


def _converted(tensor: ir.TensorProtocol, to: ir.DataType) -> ir.Tensor:
    """The same numbers in another type: finite ones stay finite, infinities and NaN stay what they are."""
    import onnx_ir as ir

    numbers = tensor.numpy()
    largest = torch.finfo(getattr(torch, to.name.lower())).max
    bounded = np.where(np.isfinite(numbers), np.clip(numbers, -largest, largest), numbers)
    return ir.Tensor(bounded.astype(to.numpy()), name=tensor.name)


def _cast_attribute(node: ir.Node, attribute: ir.Attr, to: ir.DataType) -> None:
    """Turn a float32 constant, or the wish for float32, into the other type."""
    import onnx_ir as ir

    name, value = attribute.name, attribute.value
    if attribute.type == ir.AttributeType.TENSOR and value.dtype == ir.DataType.FLOAT:
        node.attributes[name] = ir.AttrTensor(name, _converted(value, to))
    elif name in _TYPES and attribute.type == ir.AttributeType.INT and value == ir.DataType.FLOAT:
        node.attributes[name] = ir.AttrInt64(name, int(to))
    elif node.op_type == "Constant" and name in ("value_float", "value_floats"):
        del node.attributes[name]
        constant = ir.Tensor(np.asarray(value, dtype=np.float32))
        node.attributes["value"] = ir.AttrTensor("value", _converted(constant, to))


def _cast_value(value: ir.Value, to: ir.DataType, before: ir.Node) -> ir.Value:
    """Return `value` in another type, by a Cast in front of a node."""
    import onnx_ir as ir

    node = ir.node("Cast", [value], {"to": int(to)})
    (result,) = node.outputs
    result.name, result.dtype, result.shape = f"{value.name}_as_{to.name.lower()}", to, value.shape
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return result


def _cast_inputs(graph: ir.Graph, to: ir.DataType) -> None:
    """Take float32 inputs as they come and cast them once."""
    import onnx_ir as ir

    for value in graph.inputs:
        uses = [use for use in value.uses() if use.idx not in _FLOAT_ONLY.get(use.node.op_type, ())]
        if value.dtype == ir.DataType.FLOAT and uses:
            inside = _cast_value(value, to, before=graph[0])
            for use in uses:
                use.node.replace_input_with(use.idx, inside)


def _cast_outputs(graph: ir.Graph, to: ir.DataType, were_float: Sequence[bool]) -> None:
    """Give out in float32, under the same names, what was float32."""
    import onnx_ir as ir

    for index, value in enumerate(list(graph.outputs)):
        if not were_float[index] or value.dtype != to:
            continue
        node = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
        (result,) = node.outputs
        result.name, value.name = value.name, f"{value.name}_as_{to.name.lower()}"
        result.dtype, result.shape = ir.DataType.FLOAT, value.shape
        graph.append(node)
        graph.outputs[index] = result
