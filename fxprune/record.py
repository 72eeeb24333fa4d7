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
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.below import Below, Casts, transformed, wrapped
from fxprune.errors import CaptureError
from fxprune.known import NEEDS_VALUES, Known, faked
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
        self.known = Known()

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
        self.known.add(name, tensor)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node that computes the tensor, as it is now after all in-place writes."""
        value = self._values.get(id(tensor))
        if value is None:
            # a factory function hands out a shallow copy of what it was given, and so does `.data`
            twin = self._roots.get(_storage(tensor))
            if twin is not None and twin.tensor.shape == tensor.shape and twin.tensor.stride() == tensor.stride():
                value = replace(twin, tensor=tensor, node=self._fresh(twin))
                if self.known.constant(twin.node):  # else a write to `.data` would be hidden from the backward pass
                    value.parent, value.view = twin, (aten.alias.default, (), {})
                value.version = self._versions.get(_storage(tensor), 0)
                self._values[id(tensor)] = value
        if value is None:
            lazy = self._lazy.get(id(tensor))
            name = lazy[1] if lazy else self._constant(tensor)
            if lazy is None:
                self.known.add(name, tensor)
            value = self._values[id(tensor)] = _Value(tensor, self.attribute(name, tensor))
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
        if transformed() and any(map(wrapped, pytree.tree_leaves((args, kwargs)))):
            with torch._C._DisablePythonDispatcher(), Below(self._recorded):
                return func(*args, **kwargs)
        if torch._C._is_any_autocast_enabled() and not func._schema.is_mutable:
            return self._cast(func, args, kwargs)
        try:
            return self._recorded(func, args, kwargs)
        except NEEDS_VALUES:  # it may be made of operators that need values of constants only
            if func is aten.index.Tensor:
                return self._recorded(func, (args[0], self._numbers(args[1])), kwargs)
            with torch._C._DisablePythonDispatcher(), Below(self._recorded):
                out = func(*args, **kwargs)
            return self._recorded(func, args, kwargs, out) if func in _CHECKING else out

    def _recorded(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *done: Any) -> Any:
        """Run an operator on fake tensors and append its node; `done` is its result where it has been run."""
        if torch.Tag.inplace_view in func.tags:
            return self._view_in_place(func, args, kwargs)
        out = done[0] if done else self._run(func, args, kwargs)
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

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator's result on fake tensors; where that takes values, from those that are known."""
        out = shortcut(func, args, kwargs)
        if out is not None:
            return out
        try:
            with torch._C._DisablePythonDispatcher():
                return func(*args, **kwargs)
        except NEEDS_VALUES:
            fake = next((t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, FakeTensor)), None)
            if func._schema.is_mutable:
                raise
            result = self.known.result(func, self._as_nodes(args), self._as_nodes(kwargs))
            if result is None:
                raise
            return result if fake is None else faked(result, fake.fake_mode)

    def _numbers(self, indices: Sequence[Any]) -> list[Any]:
        """Indices with the places that a known mask leaves instead of the mask."""
        result: list[Any] = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                places = self._recorded(aten.nonzero.default, (index,), {})
                result += [self._recorded(aten.select.int, (places, 1, i), {}) for i in range(index.dim())]
            else:
                result.append(index)
        return result

    def _cast(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record what autocast does to the operands as casts, and the operator on what they give."""
        torch.clear_autocast_cache()
        with torch._C._DisablePythonDispatcher(), Casts() as log:
            out = func(*args, **kwargs)
        if not log.casts or func.overloadpacket in (aten.to, aten._to_copy, aten.type_as):
            return self._recorded(func, args, kwargs, out)
        with torch._C._DisableAutocast():
            given = pytree.tree_leaves((args, kwargs))
            for casts in (log.casts, self._all_low(given)):  # the second for what casts inside, as einsum does
                low = {i: self._recorded(aten.to.dtype, (t, casts[i]), {}) for t in given if (i := id(t)) in casts}
                swapped = pytree.tree_map(lambda v, low=low: low.get(id(v), v), (args, kwargs))
                with torch._C._DisablePythonDispatcher():
                    again = func(*swapped[0], **swapped[1])
                if _dtypes(again) == _dtypes(out):
                    return self._recorded(func, *swapped, again)
        raise CaptureError(
            f"autocast changes types inside {func} in a way that cannot be followed ({_source()}). "
            "Take this operator out of the autocast region, or cast the model as a whole."
        )

    @staticmethod
    def _all_low(values: Sequence[Any]) -> dict[int, torch.dtype]:
        """Every single-precision tensor, to be cast to autocast's type."""
        tensors = [t for t in values if isinstance(t, Tensor) and t.dtype == torch.float32]
        return {id(t): torch.get_autocast_dtype(t.device.type) for t in tensors}

    def written(self) -> dict[int, int]:
        """Return how often each memory that is known has been written to so far."""
        return {storage: self._versions.get(storage, 0) for storage in self._roots}

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
        outs = [kwargs[a.name] for a in func._schema.arguments if a.is_out]
        if outs:
            return self._write_out(func, args, kwargs, outs)
        target = args[0]
        functional = _functional(func)
        if func is aten.fill_diagonal_.default and target.dim() == 2 and not args[2:]:
            return self._update(target, self._diagonal(target, args[1]))
        if functional is None or out is not target:
            raise CaptureError(
                f"{func} writes in place and has no functional counterpart ({_source()}). "
                "Replace it in the model by an operator that returns a new tensor."
            )
        return self._update(target, self._emit(functional, self._as_nodes(args), self._as_nodes(kwargs), target))

    def _write_out(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outs: list[Tensor]) -> None:
        """Record `op(x, out=y)` as `op(x)` and let y be the result from now on."""
        names = {a.name for a in func._schema.arguments if a.is_out}
        functional = _without_out(func)
        if functional is None:
            raise CaptureError(f"{func} has no counterpart that returns a new tensor ({_source()}).")
        rest = {k: v for k, v in kwargs.items() if k not in names}
        with torch._C._DisablePythonDispatcher():
            results = functional(*args, **rest)
        node = self._emit(functional, self._as_nodes(args), self._as_nodes(rest), results)
        many = not isinstance(results, Tensor)
        for i, (target, result) in enumerate(zip(outs, results if many else [results], strict=True)):
            new = self._emit(operator.getitem, (node, i), {}, result) if many else node
            if result.dtype != target.dtype:
                new = self._emit(aten.to.dtype, (new, target.dtype), {}, target)
            self.node_of(target)
            self._update(target, new)

    def _diagonal(self, target: Tensor, value: Any) -> fx.Node:
        """The node of a matrix whose diagonal is `value`."""
        with torch._C._DisablePythonDispatcher():
            diagonal = aten.diagonal.default(target)
        whole = self.node_of(target)
        part = self._emit(aten.diagonal.default, (whole,), {}, diagonal)
        filled = self._emit(aten.fill.Scalar, (part, value), {}, diagonal)
        return self._emit(aten.diagonal_scatter.default, (whole, filled), {}, target)

    def _update(self, target: Tensor, node: fx.Node) -> None:
        """Let `target`, and what it is a view of, be what `node` computes from now on."""
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
        if func is aten.resize_.default and list(args[1]) == list(target.shape):
            return target
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
        if before.node.meta.get("val") is target:  # its shape is read off when all is recorded
            before.node.meta["val"] = before.tensor
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
        if name in _COMPLEX:
            back, of_parts = _COMPLEX[name]
            other = self._emit(of_parts, (self._fresh(parent),), {}, value.tensor) if of_parts else None
            parts = (written,) if other is None else (written, other) if name == "real" else (other, written)
            return self._emit(back, parts, {}, like)
        if value.tensor.numel() == like.numel() and name in _KEEPS_ORDER:
            return self._emit(aten.reshape.default, (written, list(like.shape)), {}, like)
        raise CaptureError(
            f"a write in place through '{name}' cannot be followed ({_source()}). Clone the tensor in the model first."
        )


def _functional(func: Any) -> Any:
    """The operator that returns what `func` writes: the same name without its underscore, taking the same arguments."""
    if func is aten.normal_.default:
        return aten.normal_functional.default
    packet = getattr(aten, func.overloadpacket.__name__.rstrip("_"), None)
    if func.namespace != "aten" or packet is None:
        return None
    taken = [(str(a.type), a.kwarg_only) for a in func._schema.arguments]
    for name in sorted(packet.overloads(), key=lambda n: n != func._overloadname):
        overload = getattr(packet, name)
        if [(str(a.type), a.kwarg_only) for a in overload._schema.arguments] == taken:
            return None if overload._schema.is_mutable else overload
    return None


def _without_out(func: Any) -> Any:
    """The operator that returns what `func` writes to its `out` arguments."""
    taken = [(a.name, str(a.type)) for a in func._schema.arguments if not a.is_out]
    for name in func.overloadpacket.overloads():
        overload = getattr(func.overloadpacket, name)
        same = [(a.name, str(a.type)) for a in overload._schema.arguments]
        if not overload._schema.is_mutable and same[: len(taken)] == taken:
            return overload
    return None


def _dtypes(result: Any) -> list[torch.dtype]:
    return [t.dtype for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def _piece(node: fx.Node, pieces: Sequence[Any], i: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """The i-th result of a split as a view of its own."""
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    place = 1 if name == "unbind" else 2
    dim = node.kwargs.get("dim", node.args[place] if len(node.args) > place else 0)
    if name in ("hsplit", "vsplit", "dsplit"):
        dim = {"h": min(1, pieces[i].dim() - 1), "v": 0, "d": 2}[name[0]]
    elif not isinstance(dim, int) or name not in ("unbind", "chunk", "split", "split_with_sizes", "tensor_split"):
        return None
    if name == "unbind":
        return aten.select.int, (dim, i), {}
    sizes = [int(p.shape[dim]) for p in pieces]
    return aten.slice.Tensor, (dim, sum(sizes[:i]), sum(sizes[: i + 1])), {}


#: Operators that need values only to check them: they are recorded whole all the same.
_CHECKING = {aten.istft.default}
#: Views that a tensor can be made of itself in place.
_TURNS = {"t", "transpose", "swapaxes", "swapdims", "squeeze", "unsqueeze", "detach"}
#: Views whose elements come in the order of their base.
_KEEPS_ORDER = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "alias", "detach", "contiguous", "to"),
    *("lift_fresh", "dropout", "view_as", "_unsafe_view", "expand", "feature_dropout", "alpha_dropout", "ravel"),
    *("feature_alpha_dropout", "atleast_1d", "atleast_2d", "atleast_3d", "reshape_as", "expand_as", "positive"),
}
#: Views of complex numbers -> how they are put back, and the operator that gives the part that was not written.
_COMPLEX = {
    "view_as_real": (aten.view_as_complex.default, None),
    "view_as_complex": (aten.view_as_real.default, None),
    "real": (aten.complex.default, aten.imag.default),
    "imag": (aten.complex.default, aten.real.default),
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
