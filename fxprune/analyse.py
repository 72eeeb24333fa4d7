"""Walk the captured graph once with the rules: dimensions of every tensor, contractions, what stays whole and why."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxprune import rules
from fxprune.axes import Axes, Axis, Dim, Fixed, Misfit, atoms, size_of
from fxprune.capture import Captured
from fxprune.counted import track
from fxprune.fold import fold_constants
from fxprune.rules.core import Counted, Dims, Site, bind, rule_of


@dataclass(slots=True)
class Analysis:
    """What the axis algebra says about a captured model.

    Attributes:
        dims: node -> the dimensions of its result (a list of them where there are several).
        tensors: parameter, buffer or constant name -> its dimensions.
        births: the same before any unification: the axes that the dimensions started as.
        macs: (node, dimensions) of every contraction: as many multiply-accumulates as the product of the sizes.
        unknown: operators without a rule -> the nodes that use them.
        counted: nodes whose integers count along an axis.
        least: axis -> how many of its indices some operator needs, where that is more than one.
    """

    captured: Captured
    axes: Axes
    dims: dict[fx.Node, Any] = field(default_factory=dict)
    tensors: dict[str, Dims] = field(default_factory=dict)
    births: dict[str, Dims] = field(default_factory=dict)
    macs: list[tuple[fx.Node, Dims]] = field(default_factory=list)
    unknown: dict[Any, list[fx.Node]] = field(default_factory=lambda: defaultdict(list))
    least: dict[Axis, int] = field(default_factory=dict)
    counted: dict[fx.Node, Counted] = field(default_factory=dict)
    _needs: list[tuple[Dim, int, fx.Node]] = field(default_factory=list)

    def resolved(self, node: fx.Node) -> Any:
        """Return the node's dimensions as they are after all unifications."""
        dims = self.dims[node]
        if isinstance(dims, list):
            return [tuple(self.axes.resolve(d) for d in ds) for ds in dims]
        return tuple(self.axes.resolve(d) for d in dims)


def analyse(captured: Captured, frozen: dict[str, str] | None = None) -> Analysis:
    """Apply the rules to every node.

    Args:
        frozen: tensor name -> reason: parameters whose dimensions the user wants whole.
    """
    rules.load()
    fold_constants(captured)
    result = Analysis(captured, Axes())
    for node in captured.graph.nodes:
        result.dims[node] = _visit(result, node, frozen or {})
        track(node, result.counted, result.axes)
    _require(result)
    for node in captured.graph.nodes:
        if node.op in ("call_function", "get_attr"):
            result.dims[node] = result.resolved(node)
    result.tensors = {n: tuple(result.axes.resolve(d) for d in ds) for n, ds in result.tensors.items()}
    result.macs = [(n, tuple(result.axes.resolve(d) for d in ds)) for n, ds in result.macs]
    return result


def _require(result: Analysis) -> None:
    """Note how many indices of an axis operators need; of several axes in one dimension the largest holds them."""
    for dim, count, node in result._needs:
        axes = sorted(atoms(result.axes.resolve(dim)), key=lambda axis: axis.size)
        if axes and count >= axes[-1].size:
            result.axes.freeze(axes[-1], f"{node.target} needs {count} of its indices", node)
        elif axes:
            result.least[axes[-1]] = max(count, result.least.get(axes[-1], 1))


def _visit(result: Analysis, node: fx.Node, frozen: dict[str, str]) -> Any:
    shape = node.meta.get("shape", ())
    if node.op == "placeholder":
        return tuple(Fixed(s, f"dimension {i} of the input '{node.target}'") for i, s in enumerate(shape))
    if node.op == "get_attr":
        name = str(node.target)
        dims = tuple(result.axes.fresh(s, f"{name}.{i}") for i, s in enumerate(shape))
        if name in frozen:
            for d in dims:
                result.axes.freeze(d, frozen[name])
        result.tensors[name] = result.births[name] = dims
        return dims
    if node.op == "output":
        for value in node.all_input_nodes:
            for i, d in enumerate(result.dims[value]):
                result.axes.freeze(d, f"it is dimension {i} of a model output", value)
        return ()
    if node.target is operator.getitem:
        return result.dims[node.args[0]][node.args[1]]  # type: ignore[index]
    return _apply(result, node, shape)


def _apply(result: Analysis, node: fx.Node, shape: Any) -> Any:
    """Apply the operator's rule, or freeze everything that touches an operator without one."""
    site = Site(result.axes, node, shape, counted=result.counted)
    rule = rule_of(node.target)
    if rule is None:
        result.unknown[node.target].append(node)
        return _barrier(result, site, f"{node.target} has no rule")
    positional, keyword = bind(node.target, node.args, dict(node.kwargs))
    args = fx.node.map_arg(list(positional.values()), lambda n: result.dims[n])
    kwargs = fx.node.map_arg(keyword, lambda n: result.dims[n])
    try:
        dims = rule.infer(site, *args, **kwargs)
    except Misfit as misfit:
        return _barrier(result, site, str(misfit))
    if not _agrees(dims, shape):
        return _barrier(result, site, f"the rule of {node.target} does not give the shape {shape}")
    result.macs += [(node, ds) for ds in site.macs]
    result._needs += [(dim, count, node) for dim, count in site.least]
    return dims


def _barrier(result: Analysis, site: Site, why: str) -> Any:
    for operand in site.node.all_input_nodes:
        dims = result.dims[operand]
        for ds in dims if isinstance(dims, list) else [dims]:
            for d in ds:
                site.freeze(d, why)
    return site.outputs(why)


def _agrees(dims: Any, shape: Any) -> bool:
    if isinstance(shape, list):
        return len(dims) == len(shape) and all(_agrees(d, s) for d, s in zip(dims, shape, strict=True))
    return tuple(size_of(d) for d in dims) == tuple(shape)
