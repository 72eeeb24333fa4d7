"""An emitted module's graph as JSON: nodes with their arguments, layers with their constructor arguments.

`torch.export.save` was not used: its files cannot be trained or put into eval mode when loaded, hold pickles, and
flatten the torch.nn layers. What is written here is the fx graph itself, readable, without code to execute.
"""

from __future__ import annotations

import json
import math
import operator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from fxprune.errors import SavedModelError
from fxprune.layers import constructor_arguments, refresh

FORMAT = 1
_FUNCTIONS = {f"operator.{f.__name__}": f for f in (operator.getitem, operator.mul, operator.add)}


# ---------------------------------------------------------------------- values
def encode(value: Any) -> Any:
    """Return an argument of a node as JSON; what JSON cannot say becomes {"kind": value}."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, slice):
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise SavedModelError(f"an argument of type {type(value).__name__} cannot be written: {value!r}")


def decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    """Return the argument that `encode` wrote."""
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(decode(v, nodes) for v in content)
    if kind == "slice":
        return slice(*(decode(v, nodes) for v in content))
    if kind == "torch":
        return getattr(torch, content)
    readers: dict[str, Any] = {"float": float, "device": torch.device, "complex": lambda c: complex(*c)}
    return readers[kind](content)


# ---------------------------------------------------------------------- targets and layers
def _target(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    name = f"operator.{getattr(node.target, '__name__', '')}"
    if name not in _FUNCTIONS:
        raise SavedModelError(f"the function {node.target} of node {node.name} cannot be written")
    return name


def _function(name: str) -> Any:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, packet, overload = name.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except AttributeError:
        raise SavedModelError(f"this torch has no operator {name}; import the library that defines it first") from None


def _layers(module: fx.GraphModule) -> dict[str, Any]:
    used = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    table = {}
    for path in sorted(used):
        layer = module.get_submodule(path)
        if getattr(nn, type(layer).__name__, None) is not type(layer):
            raise SavedModelError(f"'{path}' is a {type(layer).__name__}, not a layer of torch.nn")
        settings = {name: encode(value) for name, value in constructor_arguments(layer).items()}
        absent = [name for name, parameter in layer._parameters.items() if parameter is None]
        table[path] = {
            "layer": type(layer).__name__,
            "settings": settings,
            "absent": absent,
            "training": layer.training,
        }
    return table


# ---------------------------------------------------------------------- whole modules
def write(module: fx.GraphModule) -> dict[str, Any]:
    """Return a module emitted by `rewrite` as JSON values (without its weights)."""
    info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    return {
        "format": FORMAT,
        "class": type(module).__name__,
        "training": module.training,
        "arguments": info.orig_args,
        "inputs": json.loads(pytree.treespec_dumps(info.in_spec)),
        "outputs": json.loads(pytree.treespec_dumps(info.out_spec)),
        "layers": _layers(module),
        "nodes": [
            [n.name, n.op, _target(n), encode(tuple(n.args)), {k: encode(v) for k, v in n.kwargs.items()}]
            for n in module.graph.nodes
        ],
        "transient": sorted(
            f"{path}.{n}" if path else n
            for path, m in module.named_modules()
            for n in m._non_persistent_buffers_set
            if n in m._buffers
        ),
    }


def read(data: dict[str, Any], tensors: dict[str, torch.Tensor], trainable: dict[str, bool]) -> fx.GraphModule:
    """Return the module.

    Args:
        tensors: every parameter and buffer by name; tied ones are the same object.
        trainable: names of parameters -> requires_grad; all others are buffers.
    """
    if data["format"] != FORMAT:
        raise SavedModelError(f"the graph was written in format {data['format']}; this fxprune reads {FORMAT}")
    root = nn.Module()
    for path, spec in sorted(data["layers"].items()):
        layer_class = getattr(nn, spec["layer"])
        settings = {k: decode(v, {}) for k, v in spec["settings"].items()}
        layer = layer_class(**settings, **({} if "Dropout" in spec["layer"] else {"device": "meta"}))
        layer.training = spec["training"]
        for name in spec["absent"]:
            layer.register_parameter(name, None)
        _owner(root, path.rpartition(".")[0]).add_module(path.rpartition(".")[2], layer)
    made: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        owner = _owner(root, name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if name in trainable:
            owner._buffers.pop(leaf, None)
            parameter = made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=trainable[name]))
            owner.register_parameter(leaf, parameter)  # in the place of the layer's own: their order stays
        else:
            owner._parameters.pop(leaf, None)
            owner.register_buffer(leaf, tensor, persistent=name not in data["transient"])
    missing = [n for n, t in [*root.named_parameters(), *root.named_buffers()] if t.is_meta]
    if missing:
        raise SavedModelError(f"weights.safetensors lacks {', '.join(missing[:5])}")
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for name, op, target, args, kwargs in data["nodes"]:
        function = _function(target) if op == "call_function" else target
        nodes[name] = graph.create_node(
            op, function, decode(args, nodes), {k: decode(v, nodes) for k, v in kwargs.items()}, name=name
        )
    info = _PyTreeInfo(data["arguments"], _spec(data["inputs"]), _spec(data["outputs"]))
    graph.set_codegen(_PyTreeCodeGen(info))
    for child in root.modules():
        refresh(child)
    module = fx.GraphModule(root, graph, class_name=data["class"])
    for name, tensor in [*root.named_parameters(remove_duplicate=False)]:  # names that the graph does not use
        owner = _owner(module, name.rpartition(".")[0])
        if name.rpartition(".")[2] not in owner._parameters:
            owner.register_parameter(name.rpartition(".")[2], tensor)
    for name in data["transient"]:
        _owner(module, name.rpartition(".")[0])._non_persistent_buffers_set.add(name.rpartition(".")[2])
    set_modes(module, data)
    return module


def set_modes(module: fx.GraphModule, data: dict[str, Any]) -> None:
    """Put each layer into the mode that it was written in."""
    for path, child in module.named_modules():
        layer = data["layers"].get(path) if path else None
        child.training = layer["training"] if layer else data["training"]


def _owner(root: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root


def _spec(data: Any) -> pytree.TreeSpec:
    """A pytree specification; a container class that is not importable here becomes a plain dict or tuple."""
    try:
        return pytree.treespec_loads(json.dumps(data))
    except NotImplementedError:
        return pytree.treespec_loads(json.dumps([data[0], _plain(data[1])]))


def _plain(spec: Any) -> Any:
    known = {
        None,
        "builtins.tuple",
        "builtins.list",
        "builtins.dict",
        "collections.OrderedDict",
        "collections.namedtuple",
    }
    children = [_plain(c) for c in spec["children_spec"]]
    if spec["type"] in known:
        return {**spec, "children_spec": children}
    context = json.loads(spec["context"]) if isinstance(spec["context"], str) else spec["context"]
    keys = context if isinstance(context, list) and all(isinstance(k, str) for k in context) else None
    if keys is not None and len(keys) == len(children):
        return {**spec, "type": "builtins.dict", "context": json.dumps(keys), "children_spec": children}
    return {**spec, "type": "builtins.tuple", "context": "null", "children_spec": children}


__all__ = ["decode", "encode", "read", "write"]
