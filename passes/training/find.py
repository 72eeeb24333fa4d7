"""From what a stage says to units of the captured model, and why the other layers are not pruned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from fxprune.analyse import Analysis
from fxprune.axes import Axis, atoms
from fxprune.blocks import find_blocks
from fxprune.errors import RecipeError
from fxprune.groups import Group
from fxprune.kept import Kept
from fxprune.masked import MASKED
from fxprune.passes.consumers import Contraction, contractions, only_readers
from fxprune.passes.patterns.pattern import Blocks, NOfM, Pattern, pattern
from fxprune.passes.patterns.sparsify import eligible
from fxprune.passes.training.branches import Branches
from fxprune.passes.training.stage import Stage
from fxprune.passes.training.units import AxisUnits, CountedUnits, LayerUnits, Units, WeightUnits
from fxprune.recipe import read_recipe
from fxprune.registry import nearest
from fxprune.rules.core import bind
from fxprune.select import Patterns

aten = torch.ops.aten
#: Patterns that go by axes -> the groups that they mean: kinds and roles, "not" before those that they leave out.
AXES = {
    "channel": ("channels", "hidden", "ffn", "not residual"),
    "filter": ("channels",),
    "head": ("heads",),
    "head_dim": ("head_dims",),
    "ffn": ("ffn",),
    "hidden": ("residual",),
}
LAYER, ELEMENT = "layer", "element"
#: Before a pattern in weights: only those of attention.
ATTENTION = "attention:"
#: The three ways of block movement pruning (nn_pruning): blocks of attention's weights or whole heads, and the inner
#: widths of MLPs, of which a row of the first layer and a column of the second have one score ("1d_alt").
RECIPES = {
    "hybrid": (f"{ATTENTION}32x32", "ffn"),
    "hybrid-filled": (f"{ATTENTION}32x32", "ffn"),
    "struct": ("head", "ffn"),
}
_LINES = {"1xchannel": (1, 0), "channelx1": (0, 1)}


@dataclass(slots=True)
class Found:
    """Units, by what of the pattern they are; and why other weights and groups are left alone."""

    units: list[Units] = field(default_factory=list)
    unfit: dict[str, str] = field(default_factory=dict)


def known_patterns() -> list[str]:
    """Return what a pattern can be called; n:m and rows x columns of any size beside."""
    return [ELEMENT, "2:4", "32x32", *_LINES, *AXES, LAYER, *RECIPES]


def find(analysis: Analysis, groups: Sequence[Group], stage: Stage) -> Found:
    """Return the units of a stage.

    Raises:
        RecipeError: a pattern or a glob is of nothing in this model.
    """
    found = Found()
    names = [p for given in stage.patterns for p in RECIPES.get(given, (given,))]
    allowed = _allowed(analysis, groups, stage)
    for name in names:
        before = len(found.units)
        attention = name.startswith(ATTENTION)
        if name in AXES:
            _axes(analysis, groups, name, allowed, found)
        elif name == LAYER:
            _layers(analysis, allowed, found)
        else:
            _weights(analysis, groups, name.removeprefix(ATTENTION), attention, allowed, found)
        if len(found.units) == before:
            why = "; ".join(sorted({f"{n}: {r}" for n, r in found.unfit.items()})[:5])
            raise RecipeError(f"pattern '{name}' fits nothing in this model" + (f": {why}" if why else ""))
    return found


def _allowed(analysis: Analysis, groups: Sequence[Group], stage: Stage) -> dict[str, str]:
    """Why weights may not be touched, by name; those that may are not in it.

    Raises:
        RecipeError: a glob is of nothing.
    """
    patterns = Patterns(analysis, groups)
    weights = [n for n, t in analysis.captured.tensors.items() if isinstance(t, nn.Parameter)]

    def named(glob: str, key: str) -> set[str]:
        found = patterns.tensors(glob, key)
        if not found:
            hint = nearest(glob, sorted({n for w in weights for n in (w, w.rpartition(".")[0])}))
            raise RecipeError(f"pruning: {key}: the model has no layer or parameter '{glob}'{hint}")
        return found

    why = {n: f"'{glob}' is excluded" for glob in stage.exclude for n in named(glob, "exclude")}
    if stage.include:
        meant = {n for glob in stage.include for n in named(glob, "include")}
        why |= {n: "it is not included" for n in weights if n not in meant}
    return why


def _axes(analysis: Analysis, groups: Sequence[Group], name: str, allowed: dict[str, str], found: Found) -> None:
    patterns = Patterns(analysis, groups)
    no = [k.removeprefix("not ") for k in AXES[name] if k.startswith("not ")]
    yes = [k for k in AXES[name] if not k.startswith("not ")]
    inexact = normalised_axes(analysis)
    products = contractions(analysis)
    for group in groups:
        if not any(patterns.is_kind(group, k) for k in yes) or any(patterns.is_kind(group, k) for k in no):
            continue
        blocked = [allowed[n] for n, _ in group.members if n in allowed]
        if blocked:
            found.unfit[group.name] = blocked[0]
        elif group.axis in inexact and name != "hidden":
            found.unfit[group.name] = (
                f"{inexact[group.axis]} normalises over it, so that zeros are not the same as less"
            )
        elif group.size <= group.least:
            found.unfit[group.name] = f"all of its {group.size} units are needed"
        else:
            found.units.append(AxisUnits(analysis, group, only_readers(analysis, group, products), name))


def _layers(analysis: Analysis, allowed: dict[str, str], found: Found) -> None:
    branches = Branches(analysis)
    blocks = []
    for block in find_blocks(analysis):
        blocked = [allowed[n] for n in block.parameters if n in allowed]
        if blocked:
            found.unfit[block.name] = blocked[0]
        elif not branches.vanishes(block):
            found.unfit[block.name] = "with zeros in all of its parameters it may still add something to the stream"
        else:
            blocks.append(block)
    if blocks:
        shapes = {n: tuple(t.shape) for n, t in analysis.captured.tensors.items()}
        found.units.append(LayerUnits(blocks, [branches.outputs(b) for b in blocks], shapes, LAYER))


def _weights(
    analysis: Analysis, groups: Sequence[Group], name: str, attention: bool, allowed: dict[str, str], found: Found
) -> None:
    shape = _shape(name)
    kind = f"{ATTENTION}{name}" if attention else name
    by_weight = {c.weight: c for c in contractions(analysis)}
    if name == ELEMENT:
        layers = dict(by_weight)
    else:
        fit, unfit = _fitting(analysis, groups, name, shape)
        found.unfit |= {n: why for n, why in unfit.items() if n not in allowed}
        layers = {c.weight: c for c in fit}
    for computed in (n for n in analysis.captured.tensors if "parametrizations." in n and n not in layers):
        found.unfit[computed] = allowed.get(computed, "the weight of a layer is computed from it (it is parametrised)")
    heads = _head_weights(groups) if attention else None
    for weight, c in layers.items():
        tensor = analysis.captured.tensors[weight]
        if weight in allowed or not isinstance(tensor, nn.Parameter):
            found.unfit[weight] = allowed.get(weight, "it is no parameter")
        elif heads is not None and weight not in heads:
            continue
        elif isinstance(shape, NOfM):
            found.units.append(CountedUnits(weight, tensor.shape, c, shape, kind))
        else:
            rows, columns = _LINES.get(name, (0, 0)) if shape is None else (shape.rows, shape.columns)
            found.units.append(WeightUnits(weight, tensor.shape, c, rows, columns, kind))


def _shape(name: str) -> NOfM | Blocks | None:
    """The pattern in a weight; None for whole rows or columns.

    Raises:
        RecipeError: there is no such pattern.
    """
    if name in _LINES:
        return None
    if name == ELEMENT:
        return Blocks(name, 0.5, 1, 1)
    if not re.fullmatch(r"\d+[:x]\d+", name):
        known = known_patterns()
        raise RecipeError(f"there is no pattern '{name}'{nearest(name, known) or '.'} Known: {', '.join(known)}")
    found = pattern(name)
    assert isinstance(found, NOfM | Blocks)
    return found


def _fitting(
    analysis: Analysis, groups: Sequence[Group], name: str, shape: Pattern | None
) -> tuple[list[Contraction], dict[str, str]]:
    """The layers that can have a pattern, and why others cannot."""
    recipe = read_recipe({"sparsity": "1x1" if shape is None else name})
    fit, unfit = eligible(analysis, groups, Kept({}), recipe, shape or Blocks(name, 0.5, 1, 1))
    transposed = [c for c in fit if c.kind == "transposed"]
    unfit |= {c.weight: "a transposed convolution" for c in transposed}
    return [c for c in fit if c not in transposed], unfit


def _head_weights(groups: Sequence[Group]) -> set[str]:
    return {name for g in groups if g.kind == "heads" for name, _ in g.members}


def normalised_axes(analysis: Analysis) -> dict[Axis, str]:
    """Return axes over which something is reduced in a way that zeros take part in, and what does it.

    A mean over 8 of 16 channels is another number than the mean over 16 of which 8 are zero. What is removed takes no
    part in it, what is only masked does.
    """
    result: dict[Axis, str] = {}
    for node in analysis.captured.graph.nodes:
        if node.op != "call_function" or node.target not in MASKED or node.target is aten.batch_norm.default:
            continue
        operand = node.all_input_nodes[0] if node.all_input_nodes else None
        if operand is None or isinstance(analysis.dims[operand], list):
            continue
        for dim in _reduced(node, len(analysis.dims[operand])):
            for axis in atoms(analysis.dims[operand][dim]):
                result.setdefault(axis, node.name)
    return result


def _reduced(node: fx.Node, rank: int) -> list[int]:
    """The dimensions of the first operand that an operator reduces; all where it does not say."""
    named, _ = bind(node.target, node.args, dict(node.kwargs))
    if "normalized_shape" in named:
        return list(range(rank - len(named["normalized_shape"]), rank))
    if node.target is aten.group_norm.default:
        return list(range(1, rank))
    dims = named.get("dim", named.get("dims"))
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(rank))
    return [d % rank for d in (dims if isinstance(dims, list | tuple) else [dims]) if isinstance(d, int)]
