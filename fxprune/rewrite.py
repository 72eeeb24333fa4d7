"""From an analysis and what is kept to a smaller module: sliced tensors, recomputed arguments, torch.nn layers."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from fxprune.analyse import Analysis
from fxprune.axes import Axis, Concat, Dim, Fixed, Product, Size
from fxprune.blocks import live
from fxprune.capture import Varying
from fxprune.input_names import positional_names
from fxprune.kept import Kept
from fxprune.layers import DROPOUTS, LAYERS, RECURRENT, dropout, recurrent, refresh
from fxprune.rules.core import bind, rule_of
from fxprune.rules.normalisation import kept_norms
from fxprune.rules.recurrent import GATES

aten = torch.ops.aten
Factor = Callable[[Callable[[str], Tensor]], Tensor]


@dataclass(slots=True)
class Rewritten:
    """The emitted module, and which of its nodes computes what the dense graph's node computed.

    Attributes:
        names: name of a tensor in the emitted module -> its name in the captured one.
        biases: what was added to which of its biases, before rounding to the model's precision.
        factors: what its tensors were multiplied with, by captured name: a function of the dense weights by name.
    """

    module: fx.GraphModule
    nodes: dict[fx.Node, fx.Node]
    names: dict[str, str]
    biases: dict[str, Tensor]
    factors: dict[str, Factor]


def rewrite(analysis: Analysis, kept: Kept, model: nn.Module, biases: dict[str, Tensor] | None = None) -> Rewritten:
    """Emit the module in which only what is kept is left.

    Args:
        model: the original, for what the graph does not hold: its mode, the names of `forward`'s parameters.
        biases: tensor name -> what to add to a bias (constants of removed units folded into their consumers); a layer
            `X` without one gets a new `X.bias`.
    """
    return _Rewriter(analysis, kept, model, biases or {}).run()


@dataclass(slots=True)
class _Rewriter:
    analysis: Analysis
    kept: Kept
    model: nn.Module
    biases: dict[str, Tensor]
    graph: fx.Graph = field(default_factory=fx.Graph)
    root: nn.Module = field(default_factory=nn.Module)
    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    transient: set[str] = field(default_factory=set)
    _symbols: dict[str, fx.Node] = field(default_factory=dict)
    _sizes: dict[Any, fx.Node] = field(default_factory=dict)
    _sliced: dict[str, Tensor] = field(default_factory=dict)
    _layers: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    _children: dict[str, nn.Module] = field(default_factory=dict)
    _factors: dict[str, Factor] = field(default_factory=dict)
    _states: set[fx.Node] = field(default_factory=set)
    _last_input: fx.Node | None = None
    _modules: dict[str, nn.Module] = field(default_factory=dict)

    # ------------------------------------------------------------------ what rules may ask (rules.core.Literals)
    def size(self, dim: Dim) -> Any:
        terms = self._terms(dim)
        if set(terms) <= {()}:
            return terms.get((), 0)
        key = tuple(sorted(terms.items()))
        if key not in self._sizes:
            self._sizes[key] = self._sum(terms)
        return self._sizes[key]

    def cut(self, dim: Dim) -> bool:
        return self.kept.cut(dim)

    def dims(self, node: fx.Node) -> Any:
        return self.analysis.dims[node]

    def pieces(self, dim: Dim, sizes: Sequence[Size]) -> list[Dim]:
        return self.analysis.axes.cut(dim, sizes)

    def split(self, dim: Dim, major: Size) -> tuple[Dim, Dim]:
        return self.analysis.axes.split(dim, major)

    def _terms(self, dim: Dim) -> dict[tuple[str, ...], int]:
        """The pruned size as a sum of products of dynamic sizes."""
        if isinstance(dim, Axis):
            size = self.kept.size(dim)
            assert isinstance(size, int)
            return {(): size}
        if isinstance(dim, Fixed):
            return self.analysis.captured.affine(dim.size)
        result: dict[tuple[str, ...], int] = {(): 1} if isinstance(dim, Product) else {}
        for part in dim.factors if isinstance(dim, Product) else dim.parts:
            terms = self._terms(part)
            if isinstance(dim, Concat):
                for term, factor in terms.items():
                    result[term] = result.get(term, 0) + factor
                continue
            grown: dict[tuple[str, ...], int] = {}
            for a, x in result.items():
                for b, y in terms.items():
                    term = tuple(sorted(a + b))
                    grown[term] = grown.get(term, 0) + x * y
            result = grown
        return result

    def _sum(self, terms: dict[tuple[str, ...], int]) -> fx.Node:
        total: Any = None
        for term, factor in sorted(terms.items(), reverse=True):
            value: Any = factor
            for symbol in term:
                node = self._symbol(symbol)
                value = node if value == 1 else self._call(operator.mul, (node, value))
            total = value if total is None else self._call(operator.add, (total, value))
        assert isinstance(total, fx.Node)
        return total

    def _call(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        return self.graph.call_function(target, args)

    def _symbol(self, name: str) -> fx.Node:
        if name not in self._symbols:
            symbol = next(s for s in self.analysis.captured.symbols if s.name == name)
            place, dim = symbol.places[0]
            source = next(n for n in self.graph.nodes if n.op == "placeholder" and n.target == place)
            assert self._last_input is not None
            with self.graph.inserting_after(self._last_input):
                self._symbols[name] = self.graph.call_function(aten.sym_size.int, (source, dim))
        return self._symbols[name]

    # ------------------------------------------------------------------ the walk
    def run(self) -> Rewritten:
        captured = self.analysis.captured
        self._modules = dict(self.model.named_modules(remove_duplicate=False))
        alive = live(self.analysis, self.kept.removed) if self.kept.removed else set(captured.graph.nodes)
        for node in captured.graph.nodes:
            if node.op == "placeholder":
                self._last_input = self.nodes[node] = self.graph.placeholder(node.target)
            elif node.target is aten._weight_norm.default and node in alive:
                self._scale_norm(node)
        for node in captured.graph.nodes:
            if node not in alive:
                continue
            if node in self.kept.removed:
                self.nodes[node] = self._mapped(self.kept.removed[node])
            elif node.op == "call_function":
                self.nodes[node] = self._rewritten(node)
                self.nodes[node].meta = {k: node.meta[k] for k in ("path", "source", "dtype") if k in node.meta}
            elif node.op == "output":
                self.nodes[node] = self.graph.output(self._mapped(node.args[0]))
        return Rewritten(self._module(), self.nodes, self.names, self.biases, self._factors)

    def _mapped(self, tree: Any) -> Any:
        """The arguments in terms of the new graph."""
        if isinstance(tree, fx.Node):
            if tree.graph is self.graph:  # a size that a rule asked for
                return tree
            return self.nodes[tree] if tree in self.nodes else self._attribute(tree)
        if isinstance(tree, Varying):
            return self.size(Fixed(tree.values))
        if isinstance(tree, list | tuple):
            return [self._mapped(x) for x in tree] if isinstance(tree, list) else tuple(self._mapped(x) for x in tree)
        if isinstance(tree, dict):
            return {k: self._mapped(v) for k, v in tree.items()}
        return tree

    def _rewritten(self, node: fx.Node) -> fx.Node:
        if node.target in DROPOUTS:
            return self._dropout(node)
        if node.target in RECURRENT:
            layer = self._recurrent(node)
            if layer is not None:
                return layer
        if node.target is operator.getitem and node.args[0] in self._states:
            return self._state(node)
        target, args, kwargs = node.target, node.args, dict(node.kwargs)
        rule = rule_of(target)
        named: dict[str, Any] = {}
        if target in LAYERS or (rule and rule.literals):
            positional, keyword = bind(target, args, kwargs)
            named = positional | keyword
            if rule and rule.literals:
                changed = rule.literals(self, node, named)
                if "" in changed:
                    target, named, keyword = changed.pop(""), changed, {}
                    args, kwargs = tuple(changed.values()), {}
                elif changed:
                    named |= changed
                    args = tuple(named[n] for n in positional)
                    kwargs |= {n: v for n, v in changed.items() if n in keyword}
        layer = self._layer(node, named) if target in LAYERS else None
        if layer is not None:
            return layer
        return self.graph.create_node("call_function", target, self._mapped(tuple(args)), self._mapped(kwargs))

    def _scale_norm(self, node: fx.Node) -> None:
        """Lower the norms that a weight is scaled to by what its slices lose, so that what is kept stays as it was."""
        named, _ = bind(node.target, node.args, dict(node.kwargs))
        v, g = named["v"], named["g"]
        if v.op != "get_attr" or g.op != "get_attr":
            return
        dims, dim = self.analysis.dims[v], named["dim"] % len(self.analysis.dims[v])
        if any(self.kept.cut(d) for i, d in enumerate(dims) if i != dim):
            self._factors[str(g.target)] = lambda weights: kept_norms(weights, str(v.target), dims, dim, self.kept)

    # ------------------------------------------------------------------ tensors
    def _tensor(self, name: str) -> Tensor:
        """The kept part of a tensor: a parameter stays one, nothing is shared with the model."""
        if name not in self._sliced:
            dense = self.analysis.captured.tensors[name]
            with torch.no_grad():
                small = self.kept.select(dense.detach(), self.analysis.tensors[name])
                small = small.clone() if small.data_ptr() == dense.data_ptr() or small.is_inference() else small
                if name in self._factors:
                    small = small * self._factors[name](self.analysis.captured.tensors.__getitem__).to(small)
                if name in self.biases:
                    small = small + self.biases[name].to(small)
            if isinstance(dense, nn.Parameter):
                small = nn.Parameter(small, requires_grad=dense.requires_grad)
            self._sliced[name] = small
        return self._sliced[name]

    def _attribute(self, node: fx.Node) -> fx.Node:
        name = str(node.target)
        tensor = self._tensor(name)
        owner = self._owner(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)
        if name in self.analysis.captured.transient or name in self.analysis.captured.constants:
            self.transient.add(name)
        self.names[name] = name
        anchor = self._last_input
        first = next(iter(self.graph.nodes), None)
        with self.graph.inserting_after(anchor) if anchor else self.graph.inserting_before(first):
            self.nodes[node] = self.graph.create_node("get_attr", name)
        return self.nodes[node]

    def _owner(self, path: str) -> nn.Module:
        """The emitted module at a path, made where it is not there yet."""
        module = self.root
        for part in path.split(".") if path else ():
            child = module._modules.get(part)
            if child is None:
                child = nn.Module()
                module.add_module(part, child)
            module = child
        return module

    def _install(self, path: str, layer: nn.Module) -> None:
        """Put a layer at a path; what already hangs there moves below it."""
        parent, _, leaf = path.rpartition(".")
        owner = self._owner(parent)
        before = owner._modules.get(leaf)
        if before is not None:
            for name, child in before._modules.items():
                layer.add_module(name, child)
            for name, parameter in before._parameters.items():
                layer.register_parameter(name, parameter)
            for name, buffer in before._buffers.items():
                layer.register_buffer(name, buffer)
        owner.add_module(leaf, layer)

    # ------------------------------------------------------------------ layers
    def _layer(self, node: fx.Node, named: dict[str, Any]) -> fx.Node | None:
        """Emit the operator as a torch.nn layer, or return None where its weights are not those of one layer."""
        kind = LAYERS[node.target]
        sources = {own: named[arg] for arg, own in kind.tensors.items() if named.get(arg) is not None}
        path = self._layer_path(node, sources)
        if path is None:
            return None
        others = {k: v for k, v in named.items() if k not in kind.tensors and k not in kind.inputs}
        if any(isinstance(v, fx.Node | Varying) for v in others.values()):
            return None
        signature = (node.target, repr(others), *(str(s.target) for s in sources.values()))
        if self._layers.setdefault(path, signature) != signature:
            return None  # one layer used in two ways: the second stays a call on its parameters
        if path not in self._children:
            self._children[path] = self._build(node, path, kind, sources, others)
        inputs = tuple(self._mapped(named[i]) for i in kind.inputs)
        return self.graph.create_node("call_module", path, inputs)

    def _layer_path(self, node: fx.Node, sources: dict[str, Any]) -> str | None:
        """The layer whose `weight`, `bias`, ... exactly these tensors are; the running module's own path first."""
        captured = self.analysis.captured
        if not sources or any(not isinstance(s, fx.Node) or s.op != "get_attr" for s in sources.values()):
            return None
        source = next(iter(sources.values()))
        candidates: list[str] = [node.meta.get("path", ""), str(source.target).rpartition(".")[0]]
        for path in dict.fromkeys(candidates):
            wanted = {own: f"{path}.{own}" for own in sources}
            if path and all(
                captured.aliases.get(w, w) == str(sources[own].target)
                and (w in captured.aliases or w in captured.tensors)
                for own, w in wanted.items()
            ):
                return path
        return None

    def _build(self, node: fx.Node, path: str, kind: Any, sources: dict[str, Any], others: dict[str, Any]) -> nn.Module:
        tensors = {own: self._tensor(str(s.target)) for own, s in sources.items()}
        shapes = self.analysis.dims[node]
        if len(shapes) > 1:
            others = others | {"rank": len(shapes), "channels": self.kept.size(shapes[1])}
        original = self._modules.get(path)
        if "momentum" in others:
            others["momentum"] = getattr(original, "momentum", others["momentum"])
        if "bias" not in tensors and f"{path}.bias" in self.biases:
            weight = tensors["weight"]
            tensors["bias"] = nn.Parameter(self.biases[f"{path}.bias"].to(weight), requires_grad=weight.requires_grad)
        layer: nn.Module = kind.build(tensors, others)
        for own in set(layer._parameters) - set(tensors):  # a norm with a weight and no bias, or the other way round
            layer.register_parameter(own, None)
        for own, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter) or own not in layer._buffers:
                layer._buffers.pop(own, None)
                layer.register_parameter(own, tensor) if isinstance(tensor, nn.Parameter) else self._buffer(
                    layer, own, tensor
                )
            else:
                layer.register_buffer(own, tensor)
            if own in sources:
                self.names[f"{path}.{own}"] = str(sources[own].target)
        for own, buffer in layer._buffers.items():
            if buffer is not None and buffer.is_meta and own not in tensors:  # num_batches_tracked
                value = getattr(original, own, None)
                layer.register_buffer(
                    own, value.clone() if isinstance(value, Tensor) else torch.zeros_like(buffer, device="cpu")
                )
        self._install(path, layer)
        return layer

    def _recurrent(self, node: fx.Node) -> fx.Node | None:
        """Emit a recurrent operator as its torch.nn layer, or None where its weights are not those of one layer."""
        named, _ = bind(node.target, node.args, dict(node.kwargs))
        params = [p for p in named["params"] if isinstance(p, fx.Node) and p.op == "get_attr"]
        path = node.meta.get("path", "")
        original = self._modules.get(path)
        if not isinstance(original, nn.RNNBase) or len(params) != len(named["params"]):
            return None
        aliases = self.analysis.captured.aliases
        names = [f"{path}.{own}" for own in original._flat_weights_names]
        if [aliases.get(n, n) for n in names] != [str(p.target) for p in params]:
            return None
        if path not in self._children:
            tensors = [self._tensor(str(p.target)) for p in params]
            hidden = tensors[1].shape[0] // GATES[node.target]
            projection = int(tensors[1].shape[1]) if original.proj_size else 0
            sizes = (int(tensors[0].shape[1]), hidden, projection)
            layer = recurrent(node.target, sizes, named, original.dropout)
            for name, parameter, tensor in zip(names, params, tensors, strict=True):
                layer._parameters[name.rpartition(".")[2]] = tensor  # type: ignore[assignment]
                self.names[name] = str(parameter.target)
            refresh(layer)
            self._install(path, layer)
            self._children[path] = layer
        self._states.add(node)
        given = [s for s in pytree.tree_leaves(named["hx"]) if not self._default_state(s, node)]
        states = self._mapped(named["hx"]) if given else ()
        states = (tuple(states) if isinstance(states, list) else states,) if given else ()
        return self.graph.call_module(path, (self._mapped(named["input"]), *states))

    def _default_state(self, state: fx.Node, node: fx.Node) -> bool:
        """Whether the layer makes this state itself, zeros in the type of its input; its node is taken away."""
        if (
            state.target is not aten.zeros.default
            or set(state.users) != {node}
            or state.meta["path"] != node.meta["path"]
        ):
            return False
        if state in self.nodes:
            self.graph.erase_node(self.nodes.pop(state))
        return True

    def _state(self, node: fx.Node) -> fx.Node:
        """One result of a recurrent layer: it returns (output, state), the state of an LSTM being two tensors."""
        source, number = node.args
        whole = self.nodes[source]  # type: ignore[index]
        if source.target is not aten.lstm.input or number == 0:  # type: ignore[union-attr]
            return self._call(operator.getitem, (whole, number))
        return self._call(operator.getitem, (self._call(operator.getitem, (whole, 1)), number - 1))  # type: ignore[operator]

    @staticmethod
    def _buffer(layer: nn.Module, name: str, tensor: Tensor) -> None:
        """A frozen layer keeps its weights in buffers."""
        layer._parameters.pop(name, None)
        layer.register_buffer(name, tensor)

    def _dropout(self, node: fx.Node) -> fx.Node:
        """Dropout becomes a layer, so that it follows train() and eval()."""
        probability = node.args[1]
        operand = self._mapped(node.args[0])
        assert isinstance(operand, fx.Node)
        if probability == 0:
            return operand
        path = node.meta.get("path") or "dropout"
        occupied = self._owner(path.rpartition(".")[0])._modules.get(path.rpartition(".")[2])
        own = self._modules.get(path)
        if occupied is not None or own is None or any(True for _ in own.children()) or own._parameters:
            number = 0
            while f"dropout{number or ''}" in self._owner(path)._modules:
                number += 1
            path = f"{path}.dropout{number or ''}"
        self._install(path, dropout(node.target, len(self.analysis.dims[node]))(probability))
        return self.graph.create_node("call_module", path, (operand,))

    # ------------------------------------------------------------------ the module
    def _module(self) -> fx.GraphModule:
        captured = self.analysis.captured
        for symbol in self._symbols.values():
            if not symbol.users:
                self.graph.erase_node(symbol)
        self.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(self._argument_names(), captured.in_spec, captured.out_spec)))
        module = fx.GraphModule(self.root, self.graph, class_name=type(self.model).__name__)
        for name in self.transient:
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._non_persistent_buffers_set.add(leaf)
        self._tie(module)
        modes = {path: m.training for path, m in self._modules.items()}
        for path, child in module.named_modules():
            while path not in modes:
                path = path.rpartition(".")[0]
            child.training = modes[path]
        return module

    def _tie(self, module: fx.GraphModule) -> None:
        """Give tied parameters all their names, also those that the graph does not use."""
        for alias, name in self.analysis.captured.aliases.items():
            for wanted in (alias, name):
                tensor = self._sliced.get(name)
                path, _, leaf = wanted.rpartition(".")
                owner: nn.Module = module
                for part in path.split(".") if path and tensor is not None else ():
                    if part not in owner._modules:
                        owner.add_module(part, nn.Module())
                    owner = owner.get_submodule(part)
                if isinstance(tensor, nn.Parameter) and leaf not in owner._parameters:
                    owner.register_parameter(leaf, tensor)

    def _argument_names(self) -> list[str]:
        args, kwargs = self.analysis.captured.in_spec.children()
        names = positional_names(inspect.signature(self.model.forward), args.num_children)
        return [*names, *(kwargs.context or [])]
