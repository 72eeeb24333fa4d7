"""Dead units: what can be removed without changing any output.

A model that went through sparse training, or under masks, has channels whose weights are zero. Such a channel is not
always silent: a bias, or batch norm's shift through an activation, makes it a constant. It is removed all the same, its
constant folded into the biases of its consumers.

Which values are constant is found by running the dense graph once on inputs of NaN: whatever is a number at the end
does not depend on the inputs. Products with zero weights are taken as zero there, whatever the other factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.analyse import Analysis
from fxprune.axes import Axis, Dim, atoms
from fxprune.groups import Group, positions
from fxprune.kept import Indices, Kept
from fxprune.masked import MASKED
from fxprune.proof_inputs import random_inputs
from fxprune.prove import Reference, dense_weights
from fxprune.recipe import Recipe
from fxprune.rules.core import bind, rule_of
from fxprune.rules.pointwise import pointwise
from fxprune.select import say

aten = torch.ops.aten
NAN = float("nan")

#: Products of an activation with weights: (activation, weight, bias) by argument name.
_WEIGHTED = {
    aten.linear.default: ("input", "weight", "bias"),
    aten.addmm.default: ("mat1", "mat2", "self"),
    **{
        getattr(getattr(aten, f"conv{rank}d"), overload): ("input", "weight", "bias")
        for rank in (1, 2, 3)
        for overload in ("default", "padding")
    },
}
ATTENTION = aten.scaled_dot_product_attention.default
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.mul.Tensor}
#: NaN passes through these by itself: they move elements, or sum and average them.
_HONEST = ("movement", "spatial")
_HONEST_NAMES = {"sum", "mean", "select", "unbind", "index_select", "layer_norm", "softmax"}


def find_dead(analysis: Analysis, groups: list[Group], recipe: Recipe) -> tuple[Kept, dict[str, Tensor]]:
    """Return what is kept when every dead unit goes, and what is to be added to which bias (by tensor name)."""
    constants = _Constants(analysis)
    with torch.no_grad():
        constants.run(random_inputs(analysis.captured, recipe.seed, batch=2))
    kept: dict[Axis, Indices] = {}
    said = say(analysis, groups, recipe)
    for group in groups:
        if group.name not in said:
            alive = ~_dead_units(analysis, constants, group.axis)
            missing = max(group.least - int(alive.sum()), 0)  # an empty layer is not a layer: some dead units stay
            alive[np.flatnonzero(~alive)[:missing]] = True
            kept[group.axis] = np.flatnonzero(alive)
    selection = Kept(kept)
    with torch.no_grad():
        return selection, _folded(analysis, constants, selection)


@dataclass
class _Constants(Reference):
    """Runs the dense graph in float64 and keeps, for every node, its value where known and NaN where it is not."""

    analysis: Analysis
    values: dict[fx.Node, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.analysis, Kept({}), dense_weights(self.analysis.captured), torch.float64)

    def run_node(self, n: fx.Node) -> Any:
        value = self._value(n)
        self.values[n] = value
        return value

    def _value(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return self._unknown(super().run_node(n))
        if n.op != "call_function":
            return super().run_node(n)
        if not any(self._has_unknown(a) for a in n.all_input_nodes):
            return super().run_node(n)
        positional = bind(n.target, n.args, dict(n.kwargs))[0] if hasattr(n.target, "_schema") else {}
        if n.target in _WEIGHTED or n.target in _PRODUCTS:
            return self._product(n, positional)
        if n.target is aten.batch_norm.default:
            return self._batch_norm(n, positional)
        if n.target is ATTENTION:
            return self._attention(n, positional)
        if self._honest(n):
            return super().run_node(n)
        if n.target is aten.embedding.default:
            table = self.values[positional["weight"]]
            row = torch.where((table == table[:1]).all(0), table[0], NAN)
            return row.expand(*self.values[positional["indices"]].shape, -1)
        known = fx.node.map_arg((n.args, dict(n.kwargs)), lambda a: _number(self.values[a]))
        result = self._run_on(n, *known)
        rule = rule_of(n.target)
        if rule is not None and rule.infer is pointwise and isinstance(result, Tensor):
            unknown = torch.zeros(result.shape, dtype=torch.bool)
            for a in n.all_input_nodes:
                unknown = unknown | _unknown_mask(self.values[a])
            return self._marked(result, unknown)
        if isinstance(result, list | tuple):
            return [self._unknown(r) for r in result]
        return self._unknown(result)

    def _run_on(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        if n in self._varying:
            from fxprune.capture import Varying

            args, kwargs = torch.utils._pytree.tree_map(
                self._literal, (args, kwargs), is_leaf=lambda v: isinstance(v, Varying)
            )
        return self.call(n.target, tuple(args), kwargs)

    def _product(self, n: fx.Node, named: dict[str, Any]) -> Tensor:
        """A product with an exact zero is zero, whatever the other factor."""
        names = _WEIGHTED.get(n.target)
        first, second = [named[k] for k in names[:2]] if names else list(named.values())[:2]
        a = self.values[first]
        b = self.values[second] if isinstance(second, fx.Node) else torch.tensor(float(second), dtype=torch.float64)
        arguments = [_number(self.values[v]) if isinstance(v, fx.Node) else v for v in named.values()]
        if any(not (t.is_floating_point() and isinstance(t, Tensor)) for t in (a, b)):
            return self._unknown(self._run_on(n, arguments, {}))  # type: ignore[no-any-return]
        result = self._run_on(n, arguments, {})
        place = [list(named).index(k) for k in names[:2]] if names else [0, 1]
        unknown = torch.zeros(())
        for left, right in ((_flags(a), _nonzero(b)), (_nonzero(a), _flags(b))):
            shadow = list(arguments)
            shadow[place[0]], shadow[place[1]] = left, right
            if names and shadow[list(named).index(names[2])] is not None:
                shadow[list(named).index(names[2])] = torch.zeros_like(arguments[list(named).index(names[2])])
            unknown = unknown + self._run_on(n, shadow, {})
        return torch.where(unknown > 0, NAN, result)

    def _batch_norm(self, n: fx.Node, named: dict[str, Any]) -> Tensor:
        """A channel whose scale is zero gives its shift, whatever comes in."""
        result: Tensor = super().run_node(n)
        weight, bias = named["weight"], named["bias"]
        if weight is not None:
            shape = [1, -1] + [1] * (result.dim() - 2)
            silent = (self.values[weight] == 0).reshape(shape)
            shift = self.values[bias].reshape(shape) if bias is not None else torch.zeros((), dtype=torch.float64)
            result = torch.where(silent, shift, result)
        return result

    def _attention(self, n: fx.Node, named: dict[str, Any]) -> Tensor:
        """Averages of values: where these are zero, so is the result, whatever the scores are."""
        args, kwargs = fx.node.map_arg((n.args, dict(n.kwargs)), lambda a: _number(self.values[a]))
        result: Tensor = self._run_on(n, args, kwargs)
        silent = (self.values[named["value"]] == 0).all(-2, keepdim=True)
        if result.dim() > 2:  # a head of values may serve several heads of queries
            silent = silent.repeat_interleave(result.shape[-3] // silent.shape[-3], -3)
        return torch.where(silent, torch.zeros_like(result), torch.full_like(result, NAN))

    def _honest(self, n: fx.Node) -> bool:
        rule = rule_of(n.target)
        if rule is None:
            return n.target.__class__.__name__ == "builtin_function_or_method"  # operator.getitem
        family = rule.infer.__module__.rpartition(".")[2]
        name = str(rule.target).split(".")[-2]
        floats = all(_is_float(self.values[a]) for a in n.all_input_nodes)
        return floats and (family in _HONEST or name in _HONEST_NAMES)

    def _has_unknown(self, n: fx.Node) -> bool:
        values = self.values[n]
        return any(
            bool(_unknown_mask(v).any())
            for v in (values if isinstance(values, list | tuple) else [values])
            if isinstance(v, Tensor)
        )

    @staticmethod
    def _unknown(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.full_like(value, NAN) if value.is_floating_point() else _Tainted(value)

    @staticmethod
    def _marked(value: Tensor, unknown: Tensor) -> Any:
        if value.is_floating_point():
            return torch.where(unknown, NAN, value)
        return _Tainted(value) if bool(unknown.any()) else value


class _Tainted(torch.Tensor):
    """An integer or boolean tensor that depends on the inputs: it has no NaN to say so."""

    @staticmethod
    def __new__(cls, value: Tensor) -> _Tainted:
        return value.as_subclass(cls)


def _is_float(value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return all(not isinstance(v, Tensor) or v.is_floating_point() for v in values)


def _number(value: Any) -> Any:
    """The value with every unknown replaced by a number, so that operators can run on it."""
    if isinstance(value, _Tainted):
        return value.as_subclass(Tensor)
    return torch.nan_to_num(value, nan=0.5) if isinstance(value, Tensor) and value.is_floating_point() else value


def _unknown_mask(value: Any) -> Tensor:
    if isinstance(value, _Tainted):
        return torch.ones(value.shape, dtype=torch.bool)
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.isnan(value)
    return torch.zeros(value.shape if isinstance(value, Tensor) else (), dtype=torch.bool)


def _flags(value: Tensor) -> Tensor:
    return torch.isnan(value).double()


def _nonzero(value: Tensor) -> Tensor:
    return (torch.isnan(value) | (value != 0)).double()


# ---------------------------------------------------------------------- which units go
def _dead_units(analysis: Analysis, constants: _Constants, axis: Axis) -> Any:
    """True for every unit of the axis that each of its consumers can do without."""
    dead = np.ones(axis.size, dtype=bool)
    for node in analysis.captured.graph.nodes:
        for operand in _operands(node):
            dims = analysis.dims[operand]
            carries = [i for i, d in enumerate(dims) if axis in set(atoms(d))] if isinstance(dims, tuple) else []
            if not carries or not dead.any() or _judged_elsewhere(analysis, constants, node, operand, axis):
                continue
            summed = [i for i in carries if i in _summed(analysis, node, operand, axis)]
            if not summed:
                out = analysis.dims[node]
                passes = any(axis in set(atoms(d)) for ds in (out if isinstance(out, list) else [out]) for d in ds)
                if passes and not _mixes(node, dims, carries):
                    continue
                if passes:
                    return np.zeros(axis.size, dtype=bool)
                summed = carries
            if len(summed) != 1:
                return np.zeros(axis.size, dtype=bool)
            dead &= _removable(analysis, constants, node, operand, axis, summed[0])
    return dead


def _summed(analysis: Analysis, node: fx.Node, operand: fx.Node, axis: Axis) -> set[int]:
    """The dimensions of an operand that a contraction sums over, of those that carry an axis.

    The result may carry the axis all the same: that of the values where queries and keys share theirs, that of a
    residual stream that a layer reads and writes.
    """
    rank = len(analysis.dims[operand])
    if node.target is ATTENTION:
        named, _ = bind(node.target, node.args, dict(node.kwargs))
        return {rank - 1} if operand in (named["query"], named["key"]) else set()
    if node.target in _WEIGHTED:
        named, _ = bind(node.target, node.args, dict(node.kwargs))
        activation, weight, _ = (named[k] for k in _WEIGHTED[node.target])
        inner = 0 if node.target is aten.addmm.default else 1
        if axis not in set(atoms(analysis.dims[weight][inner])):  # a convolution does not sum over its own groups
            return set()
        if operand is not activation:
            return {inner}
        spatial = max(len(analysis.dims[weight]) - 2, 0)
        return {rank - 1 - spatial}
    if node.target in _PRODUCTS and node.target is not aten.mul.Tensor:
        first, _ = node.args[:2]
        return {rank - 1} if operand is first or rank == 1 else {rank - 2}
    return set()


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    if node.op == "call_function":
        yield from node.all_input_nodes


def _judged_elsewhere(analysis: Analysis, constants: _Constants, node: fx.Node, operand: fx.Node, axis: Axis) -> bool:
    """Whether another operand of the product decides: of known weights and an activation, the activation does."""
    if node.target in _WEIGHTED:
        named, _ = bind(node.target, node.args, dict(node.kwargs))
        activation, weight, _ = (named[k] for k in _WEIGHTED[node.target])
        known = not bool(_unknown_mask(constants.values[operand]).any())
        return operand is weight and operand is not activation and known
    return operand.op == "get_attr" and any(
        n.op != "get_attr" and isinstance(ds := analysis.dims[n], tuple) and any(axis in set(atoms(d)) for d in ds)
        for n in node.all_input_nodes
    )


def _mixes(node: fx.Node, dims: Any, carries: list[int]) -> bool:
    """Whether the operator reduces over a dimension that it also passes on, as norms and softmax do."""
    if node.target not in MASKED:
        return False
    named, _ = bind(node.target, node.args, dict(node.kwargs))
    rank = len(dims)
    if "running_mean" in named:
        return any(i != 1 for i in carries) and (named["training"] or named["running_mean"] is None)
    if "normalized_shape" in named:
        return any(i >= rank - len(named["normalized_shape"]) for i in carries)
    if "num_groups" in named:
        return 1 in carries
    over = named.get("dim")
    over = list(range(rank)) if over is None else [over] if isinstance(over, int) else list(over)
    return any(i in {d % rank for d in over} for i in carries)


def _removable(analysis: Analysis, constants: _Constants, node: fx.Node, operand: fx.Node, axis: Axis, dim: int) -> Any:
    """True for the units whose contribution to a contraction is zero, or a constant that a bias can hold."""
    value = constants.values[operand]
    zero = ~np.asarray(((value != 0) | torch.isnan(value)).movedim(dim, 0).flatten(1).any(1))
    fine = zero
    if node.target in _WEIGHTED and _bias_name(analysis, node) is not None:
        named, _ = bind(node.target, node.args, dict(node.kwargs))
        if named[_WEIGHTED[node.target][0]] is operand:
            flat = value.movedim(dim, 0).flatten(1)
            constant = np.asarray((flat == flat[:, :1]).all(1))
            known = not bool(_unknown_mask(constants.values[named[_WEIGHTED[node.target][1]]]).any())
            fine = zero | (constant if known and not _padded(named) else zero)
    elif (
        node.target not in {*_WEIGHTED, *_PRODUCTS, ATTENTION, aten.sum.dim_IntList}
        or (node.target is ATTENTION and dim != value.dim() - 1)  # a key of zeros still takes its part of the attention
    ):
        fine = np.zeros(len(zero), dtype=bool)
    unused = _unused(constants, node, operand, dim)
    per_entry = fine if unused is None else fine | unused
    return _all_entries(analysis.dims[operand][dim], axis, per_entry)


def _unused(constants: _Constants, node: fx.Node, operand: fx.Node, dim: int) -> Any:
    """True where all that an entry of the operand is multiplied with is zero; None where not known."""
    named, _ = bind(node.target, node.args, dict(node.kwargs))
    if node.target is ATTENTION:
        other = named["key"] if named["query"] is operand else named["query"] if named["key"] is operand else None
        if other is None or dim != constants.values[operand].dim() - 1:
            return None
        return np.asarray((constants.values[other] == 0).flatten(0, -2).all(0))
    if node.target not in _WEIGHTED or node.target is aten.addmm.default or named["input"] is not operand:
        return None
    zero = constants.values[named["weight"]] == 0
    if zero.dim() == 1:
        return None
    groups = named.get("groups", 1)  # of a grouped convolution each reads its own part of the channels
    return np.asarray(zero.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2).all(2).flatten())


def _all_entries(dim: Dim, axis: Axis, flags: Any) -> Any:
    """True for the units all of whose entries are flagged."""
    result = np.ones(axis.size, dtype=bool)
    for units in positions(dim, axis):
        bad = units[(units >= 0) & ~flags]
        result[bad] = False
    return result


def _padded(named: dict[str, Any]) -> bool:
    padding = named.get("padding", 0)
    return (isinstance(padding, str) and padding != "valid") or any(
        np.atleast_1d(padding if not isinstance(padding, str) else 0)
    )


def _bias_name(analysis: Analysis, node: fx.Node) -> str | None:
    """The bias that a contraction adds, by name; for a bias-free layer the name that its bias would have."""
    named, _ = bind(node.target, node.args, dict(node.kwargs))
    bias, weight = named[_WEIGHTED[node.target][2]], named[_WEIGHTED[node.target][1]]
    if isinstance(bias, fx.Node):
        alone = bias.op == "get_attr" and len(bias.users) == 1
        return str(bias.target) if alone else None
    name = str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else ""
    if not name.endswith(".weight") or len(weight.users) != 1 or node.target is aten.addmm.default:
        return None
    bias_name = name.removesuffix("weight") + "bias"
    return bias_name if bias_name not in analysis.captured.tensors else None


def _folded(analysis: Analysis, constants: _Constants, kept: Kept) -> dict[str, Tensor]:
    """What removed units contributed to each contraction, as an addition to its bias."""
    biases: dict[str, Tensor] = {}
    for node in analysis.captured.graph.nodes:
        if node.target not in _WEIGHTED:
            continue
        named, _ = bind(node.target, node.args, dict(node.kwargs))
        operand = named[_WEIGHTED[node.target][0]]
        dims = analysis.dims[operand]
        cut = [i for i, d in enumerate(dims) if kept.cut(d)]
        name = _bias_name(analysis, node)
        if not cut or name is None:
            continue
        value = torch.nan_to_num(constants.values[operand], nan=0.0)
        for i in cut:
            gone = torch.from_numpy(~kept.mask(dims[i])).reshape([-1 if j == i else 1 for j in range(value.dim())])  # type: ignore[operator]
            value = value * gone
        arguments = [_number(constants.values[v]) if isinstance(v, fx.Node) else v for v in named.values()]
        arguments[list(named).index(_WEIGHTED[node.target][0])] = value
        bias_place = list(named).index(_WEIGHTED[node.target][2])
        if arguments[bias_place] is not None:
            arguments[bias_place] = torch.zeros_like(arguments[bias_place])
        result = constants._run_on(node, arguments, {})
        channel = 1 if str(node.target).startswith("aten.conv") else -1
        added = result.movedim(channel, 0).flatten(1)[:, 0]
        if bool((added != 0).any()):
            out = analysis.dims[node][channel]
            biases[name] = kept.select(added, (out,))
    return biases
