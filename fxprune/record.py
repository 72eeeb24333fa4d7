"""Recording one forward pass, operators whole, as a functional fx.Graph.

The recorder sits at torch's PreDispatch key, where composite operators (`linear`, `layer_norm`,
`scaled_dot_product_attention`)
have not been taken apart yet, and runs them on fake tensors: shapes without data. It costs little more than the
fake forward pass itself, because it keeps no proxies and no symbolic shapes: what depends on the batch size is found by
recording twice at different sizes and comparing (see `fxprune.capture`).

In-place operators are recorded as their functional counterparts, through views as well.
"""

from __future__ import annotations

import contextlib
import operator
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.errors import CaptureError
from fxprune.shortcuts import shortcut

aten = torch.ops.aten
_TORCH_DIR = str(Path(torch.__file__).parent)
_PACKAGE = f"{Path(__file__).parent}{os.sep}"


@dataclass(slots=True)
class _Value:
    """A tensor seen during recording, and the node that computes it."""

    tensor: Tensor
    node: fx.Node
    version: int = 0  # of its storage, when `node` was up to date
    parent: _Value | None = (
        None  # the value this is a view of, and the operator that took the view, without its operand
    )
    view: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None


class Recorder(ProxyTorchDispatchMode):
    """A dispatch mode that appends a node for every operator to `graph`.

    Torch admits only subclasses of its own proxy mode at the PreDispatch key, hence the base class; none of its
    behaviour is used.

    Args:
        constant: called with a real tensor that is neither parameter, buffer nor input; returns the get_attr target.
        module_path: returns the path of the module whose forward is running.
    """

    def __init__(self, graph: fx.Graph, constant: Callable[[Tensor], str], module_path: Callable[[], str]) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)  # type: ignore[no-untyped-call]
        self.graph = graph
        self._mode_key = torch._C._TorchDispatchModeKey.PROXY
        self._constant = constant
        self._module_path = module_path
        self._values: dict[int, _Value] = {}
        self._roots: dict[int, _Value] = {}  # storage -> the first value in it
        self._versions: dict[int, int] = {}
        self._attributes: dict[str, fx.Node] = {}
        self._lazy: dict[int, tuple[Tensor, str]] = {}
        self._first: fx.Node | None = None  # attributes are placed before it

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps every call of __torch_dispatch__ once more

    def __enter__(self) -> Recorder:
        TorchDispatchMode.__enter__(self)  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        TorchDispatchMode.__exit__(self, *exc)  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------------ what is known before the first operator
    def bind(self, tensor: Tensor, node: fx.Node) -> None:
        """Say that `node` computes `tensor` (an input)."""
        self._values[id(tensor)] = _Value(tensor, node)

    def bind_attribute(self, tensor: Tensor, name: str) -> None:
        """Say that `tensor` is the parameter or buffer `name`; its node is made when first used."""
        self._lazy[id(tensor)] = (tensor, name)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node that computes the tensor, as it is now after all in-place writes."""
        value = self._values.get(id(tensor))
        if value is None:
            # a factory function hands out a shallow copy of what it was given, and so does `.data`
            twin = self._roots.get(_storage(tensor))
            if twin is not None and twin.tensor.shape == tensor.shape and twin.tensor.stride() == tensor.stride():
                value = self._values[id(tensor)] = replace(twin, tensor=tensor)
        if value is None:
            lazy = self._lazy.get(id(tensor))
            value = _Value(tensor, self.attribute(lazy[1] if lazy else self._constant(tensor), tensor))
            self._values[id(tensor)] = value
        return self._fresh(value)

    def attribute(self, name: str, tensor: Tensor) -> fx.Node:
        """Return the get_attr node of `name`, one for the whole graph, placed before all operators."""
        node = self._attributes.get(name)
        if node is None:
            with self.graph.inserting_before(self._first) if self._first else contextlib.nullcontext():
                node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
            node.meta["val"] = tensor
            self._attributes[name] = node
        return node

    # ------------------------------------------------------------------ recording
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.inplace_view in func.tags:
            return self._view_in_place(func, args, kwargs)
        out = shortcut(func, args, kwargs)
        if out is None:
            with torch._C._DisablePythonDispatcher():
                out = func(*args, **kwargs)
        tensors = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, list | tuple) else []
        if not any(isinstance(t, Tensor) for t in tensors):
            return out  # a question about metadata, answered by a Python value
        if func._schema.is_mutable:
            self._write(func, args, kwargs, out)
            return out
        node_args, node_kwargs = self._as_nodes(args), self._as_nodes(kwargs)
        node = self._emit(func, node_args, node_kwargs, out)
        if isinstance(out, Tensor):
            self._know(out, node, args)
        else:
            for i, t in enumerate(tensors):
                if isinstance(t, Tensor):
                    self._know(t, self._emit(operator.getitem, (node, i), {}, t), args, _piece(node, tensors, i))
        return out

    def _emit(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> fx.Node:
        name = target.overloadpacket.__name__ if hasattr(target, "overloadpacket") else target.__name__
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        self._first = self._first or node
        node.meta["val"] = out
        node.meta["path"] = self._module_path()
        node.meta["source"] = _source()
        node.meta["grad"] = torch.is_grad_enabled()
        return node

    def _as_nodes(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self.node_of(tree)
        if isinstance(tree, list | tuple):
            return type(tree)(self._as_nodes(x) for x in tree) if type(tree) in (list, tuple) else tree
        if isinstance(tree, dict):
            return {k: self._as_nodes(v) for k, v in tree.items()}
        return tree

    def _know(
        self,
        tensor: Tensor,
        node: fx.Node,
        args: tuple[Any, ...],
        view: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None,
    ) -> None:
        value = _Value(tensor, node, self._versions.get(_storage(tensor), 0))
        base = args[0] if args and isinstance(args[0], Tensor) else None
        if base is not None and base is not tensor and _storage(base) == _storage(tensor):
            value.parent = self._values.get(id(base))
            value.view = view or (node.target, node.args[1:], dict(node.kwargs))
        self._values[id(tensor)] = value
        self._roots.setdefault(_storage(tensor), value)

    # ------------------------------------------------------------------ views and in-place writes
    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Record `x.op_(...)` as `op(x, ...)` and let x, and what x is a view of, be the result from now on."""
        target = args[0]
        functional = _functional(func)
        if functional is None or out is not target:
            raise CaptureError(
                f"{func} writes in place and has no functional counterpart ({_source()}). "
                "Replace it in the model by an operator that returns a new tensor."
            )
        node = self._emit(functional, self._as_nodes(args), self._as_nodes(kwargs), target)
        storage = _storage(target)
        version = self._versions[storage] = self._versions.get(storage, 0) + 1
        value: _Value | None = self._values[id(target)]
        while value is not None:
            value.node = node
            if value.parent is not None:
                value.parent.version = version  # its old content is what the view is scattered into
                node = self._scatter(value.parent, value, node)
            value.version, value = version, value.parent

    def _view_in_place(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record `x.t_()` as `x.t()`: x becomes a view of what it was, and other views of it stay as they are."""
        target, functional = args[0], _functional(func)
        if functional is None or functional.overloadpacket.__name__ not in _TURNS:
            raise CaptureError(
                f"{func} changes a tensor in place in a way that cannot be followed ({_source()}). "
                "Replace it in the model by an operator that returns a new tensor."
            )
        self.node_of(target)
        before = self._values[id(target)]
        with torch._C._DisablePythonDispatcher():
            before.tensor = aten.alias.default(target)
            after = functional(*args, **kwargs)
        node = self._emit(functional, self._as_nodes(args), self._as_nodes(kwargs), after)
        with torch._C._DisablePythonDispatcher():
            out = func(*args, **kwargs)
        view = (functional, node.args[1:], dict(node.kwargs))
        self._values[id(target)] = _Value(target, node, before.version, before, view)
        return out

    def _fresh(self, value: _Value) -> fx.Node:
        """Return the value's node; derive a view anew where its base has been written to since it was taken."""
        version = self._versions.get(_storage(value.tensor), 0)
        if value.version != version:
            if value.parent is None or value.view is None or value.view[0] is operator.getitem:
                raise CaptureError(
                    f"{value.node} shares memory with a tensor that is written in place, in a way that cannot be "
                    f"followed ({_source()}). Clone it in the model before the write."
                )
            target, args, kwargs = value.view
            value.node = self._emit(target, (self._fresh(value.parent), *args), kwargs, value.tensor)
            value.version = version
        return value.node

    def _scatter(self, parent: _Value, value: _Value, written: fx.Node) -> fx.Node:
        """The parent's content after its view `value` has been overwritten by the node `written`."""
        assert value.view is not None
        target, args, kwargs = value.view
        name = target.__name__ if target is operator.getitem else target.overloadpacket.__name__
        like = parent.tensor
        if name in ("slice", "select", "diagonal"):
            scatter = getattr(aten, f"{name}_scatter").default
            return self._emit(scatter, (self._fresh(parent), written, *args), kwargs, like)
        if name in ("transpose", "t", "swapaxes", "swapdims", "mT", "numpy_T"):
            return self._emit(target, (written, *args), kwargs, like)
        if name in ("movedim", "moveaxis"):
            return self._emit(target, (written, args[1], args[0]), kwargs, like)
        if name == "narrow" and isinstance(args[1], int):
            dim, start, length = args
            start %= like.shape[dim]
            scattered = (self._fresh(parent), written, dim, start, start + length)
            return self._emit(aten.slice_scatter.default, scattered, kwargs, like)
        if name == "permute":
            order = [d % like.dim() for d in args[0]]
            return self._emit(aten.permute.default, (written, [order.index(i) for i in range(len(order))]), {}, like)
        if value.tensor.numel() == like.numel() and name in _KEEPS_ORDER:
            return self._emit(aten.reshape.default, (written, list(like.shape)), {}, like)
        raise CaptureError(
            f"a write in place through '{name}' cannot be followed ({_source()}). Clone the tensor in the model first."
        )


def _functional(func: Any) -> Any:
    """The operator that returns what `func` writes: the same name without its underscore, taking the same arguments."""
    packet = getattr(aten, func.overloadpacket.__name__.rstrip("_"), None)
    if func.namespace != "aten" or packet is None:
        return None
    taken = [(str(a.type), a.kwarg_only) for a in func._schema.arguments]
    for name in sorted(packet.overloads(), key=lambda n: n != func._overloadname):
        overload = getattr(packet, name)
        if [(str(a.type), a.kwarg_only) for a in overload._schema.arguments] == taken:
            return None if overload._schema.is_mutable else overload
    return None


def _piece(node: fx.Node, pieces: Sequence[Any], i: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """The i-th result of a split as a view of its own."""
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    place = 1 if name == "unbind" else 2
    dim = node.kwargs.get("dim", node.args[place] if len(node.args) > place else 0)
    if not isinstance(dim, int):
        return None
    if name == "unbind":
        return aten.select.int, (dim, i), {}
    if name not in ("chunk", "split", "split_with_sizes", "tensor_split"):
        return None
    sizes = [int(p.shape[dim]) for p in pieces]
    return aten.slice.Tensor, (dim, sum(sizes[:i]), sum(sizes[: i + 1])), {}


#: Views that a tensor can be made of itself in place.
_TURNS = {"t", "transpose", "swapaxes", "swapdims", "squeeze", "unsqueeze", "detach"}
#: Views whose elements come in the order of their base.
_KEEPS_ORDER = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "alias", "detach", "contiguous", "to"),
    *("lift_fresh", "dropout", "view_as", "_unsafe_view", "expand", "feature_dropout", "alpha_dropout"),
}


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _source() -> str:
    """The user's line that is running: file, line and function of the innermost frame outside torch and this file."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_TORCH_DIR) and not name.startswith(_PACKAGE):
            return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "no source line"
