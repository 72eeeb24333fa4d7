"""What the compiler sees in a model, as data: groups, couplings, what stays whole and why, and operators."""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from fxprune.admit import admit
from fxprune.analyse import Analysis, analyse
from fxprune.axes import Axis, Dim, Fixed, Product, atoms
from fxprune.capture import capture
from fxprune.costs import Costs
from fxprune.errors import InputError
from fxprune.groups import Group, find_groups, frozen_dimensions, why_coupled
from fxprune.passes.choose import preferred
from fxprune.passes.choose import step as width_step
from fxprune.recipe import Recipe
from fxprune.registry import nearest
from fxprune.rules.core import RULES
from fxprune.select import Say, limits, say
from fxprune.streams import roles


@dataclass(frozen=True, slots=True)
class Step:
    """A node of the captured graph: its name, operator, module path and source line (each "" where there is none)."""

    name: str
    operator: str
    path: str
    source: str


@dataclass(frozen=True, slots=True)
class Member:
    """A dimension that a group cuts.

    Attributes:
        role: parameter, buffer or constant.
        dim: number of the dimension.
        made_of: the whole dimension in terms of groups; a product is row-major, the parts of a sum follow one another.
    """

    tensor: str
    dim: int
    size: int
    role: str
    made_of: str


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """A group.

    Attributes:
        role: "residual", "ffn" or "": see `fxprune.streams`.
        units: how many units there are.
        width: how many consecutive entries of a parameter's dimension one unit is.
        params, macs: what removing one unit from the dense model saves.
        members: every dimension that it cuts, parameters first.
        why: what blocks or forces it: the recipe that was given, or an operator that needs some of its units.
    """

    name: str
    kind: str
    role: str
    units: int
    width: int
    params: int
    macs: int
    members: tuple[Member, ...]
    why: str = ""

    @property
    def tensors(self) -> int:
        """The number of tensors that are cut."""
        return len({m.tensor for m in self.members})


@dataclass(frozen=True, slots=True)
class FrozenInfo:
    """A parameter dimension that stays whole, the reason, and the node that caused it."""

    tensor: str
    dim: int
    size: int
    reason: str
    cause: Step | None


@dataclass(frozen=True, slots=True)
class OperatorInfo:
    """An operator of the graph: how often it occurs, whether it has a rule, and where it occurs first."""

    name: str
    count: int
    rule: bool
    first: Step


@dataclass(frozen=True, slots=True)
class Explanation:
    """A model as the compiler sees it; params and MACs are the dense model's, MACs on the example inputs."""

    model: str
    params: int
    macs: int
    groups: tuple[GroupInfo, ...]
    frozen: tuple[FrozenInfo, ...]
    operators: tuple[OperatorInfo, ...]
    notes: tuple[str, ...]

    @property
    def unknown(self) -> tuple[OperatorInfo, ...]:
        """The operators without a rule."""
        return tuple(o for o in self.operators if not o.rule)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Coupling:
    """Why two parameter dimensions are coupled, or that they are not.

    Attributes:
        groups: the names of the groups that cut both; empty where there are none.
        steps: parameter dimensions and nodes from the first to the second; empty where `groups` is.
        of_first, of_second: the groups that cut each; empty where it stays whole.
        whole: for each dimension that stays whole the reason.
    """

    first: str
    second: str
    groups: tuple[str, ...]
    steps: tuple[str, ...]
    of_first: tuple[str, ...]
    of_second: tuple[str, ...]
    whole: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)


class Explainer:
    """Answers questions about one model, which is captured and analysed once.

    >>> import torch
    >>> from fxprune.recipe import read_recipe
    >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> explainer = Explainer(net, (torch.randn(2, 8),))
    >>> [(g.kind, g.units, g.params) for g in explainer.explain().groups]
    [('hidden', 64, 13)]
    >>> explainer.coupled("0.weight.0", "2.weight.1").steps[-1]
    '2.weight, dimension 1'
    >>> recipe = read_recipe(target={"macs": 0.5}, keep="2", round_to=8)
    >>> Explainer(net, (torch.randn(2, 8),), recipe=recipe).explain().groups[0].why
    "whole: it cuts '2.weight', which the recipe keeps"
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self._model = type(model).__name__
        admitted = admit(model)
        self._analysis: Analysis = analyse(capture(admitted.model, args, kwargs or {}))
        self._analysis.captured.notes += admitted.notes
        self._groups = find_groups(self._analysis)
        self._costs = Costs(self._analysis)
        self._roles = roles(self._analysis, self._groups)
        self._recipe = recipe
        self._said = say(self._analysis, self._groups, recipe) if recipe is not None else {}

    def explain(self) -> Explanation:
        """Return groups, frozen dimensions and operators."""
        return Explanation(
            model=self._model,
            params=self._costs.params({}),
            macs=self._costs.macs({}),
            groups=tuple(map(self._group, self._groups)),
            frozen=tuple(
                FrozenInfo(w.tensor, w.dim, w.size, shorten(w.reason), step(w.node) if w.node is not None else None)
                for w in frozen_dimensions(self._analysis)
            ),
            operators=self._operators(),
            notes=tuple(map(shorten, self._analysis.captured.notes)),
        )

    def carriers(self, name: str) -> tuple[Step, ...]:
        """Return the nodes whose results have a dimension made of the group.

        Raises:
            InputError: there is no such group.
        """
        group = next((g for g in self._groups if g.name == name), None)
        if group is None:
            raise InputError(self._no_group(name))
        graph = self._analysis.captured.graph
        return tuple(step(n) for n in graph.nodes if n.op == "call_function" and self._carries(n, group))

    def _carries(self, node: fx.Node, group: Group) -> bool:
        dims = self._analysis.dims[node]
        results = dims if isinstance(dims, list) else [dims]
        return any(axis is group.axis for ds in results for d in ds for axis in atoms(d))

    def coupled(self, first: str, second: str) -> Coupling:
        """Return why two parameter dimensions, "conv1.weight.0" and "conv2.weight.1", are coupled.

        Raises:
            InputError: there is no such parameter dimension.
        """
        ends = [self._dimension(label) for label in (first, second)]
        labels = [f"{name}.{dim}" for name, dim in ends]
        of = [tuple(g.name for g in self._groups if end in g.members) for end in ends]
        common = tuple(name for name in of[0] if name in of[1])
        steps = why_coupled(self._analysis, self._groups, *labels) if common else []
        return Coupling(
            first=labels[0],
            second=labels[1],
            groups=common,
            steps=tuple(_without_nowhere(shorten(s)) for s in steps),
            of_first=of[0],
            of_second=of[1],
            whole={
                f"{w.tensor}.{w.dim}": shorten(w.reason)
                for w in frozen_dimensions(self._analysis)
                if (w.tensor, w.dim) in ends
            },
        )

    def _dimension(self, label: str) -> tuple[str, int]:
        """The (tensor, number) that a label names; tied tensors are known by the first of their names."""
        tensors, aliases = self._analysis.captured.tensors, self._analysis.captured.aliases
        name, _, dim = label.rpartition(".")
        name = aliases.get(name, name)
        if name in self._analysis.tensors and dim.isdigit() and int(dim) < tensors[name].dim():
            return name, int(dim)
        whole = next((n for n in (aliases.get(label, label), name) if n in self._analysis.tensors), None)
        if whole is not None:
            dims = [f"{whole}.{i} (size {size})" for i, size in enumerate(tensors[whole].shape)]
            raise InputError(f"'{label}' names no dimension of '{whole}'; it has {', '.join(dims) or 'none'}")
        hint = nearest(name, list(self._analysis.tensors)) or "; `fxprune explain MODEL --json` lists the names."
        raise InputError(f"the model uses no parameter '{name}'{hint} A dimension is written conv1.weight.0")

    def _no_group(self, name: str) -> str:
        owners = [g.name for g in self._groups if name in (f"{t}.{d}" for t, d in g.members)]
        hint = f"; the groups that cut this dimension: {', '.join(owners)}" if owners else ""
        hint = hint or nearest(name, [g.name for g in self._groups])
        return f"there is no group '{name}'{hint or '; `fxprune explain MODEL` lists them'}"

    def _group(self, group: Group) -> GroupInfo:
        fewer = {group.axis: group.size - 1}
        return GroupInfo(
            name=group.name,
            kind=group.kind,
            role=self._roles.get(group.name, ""),
            units=group.size,
            width=group.inner,
            params=self._costs.params({}) - self._costs.params(fewer),
            macs=self._costs.per_unit("macs", group.axis),
            members=tuple(self._member(name, dim) for name, dim in group.members),
            why=self._why(group),
        )

    def _why(self, group: Group) -> str:
        """What blocks or forces a group: the recipe's patterns, its floor, its steps, an operator."""
        needed = [f"an operator needs {group.least} units"] if group.least > 1 else []
        if self._recipe is None:
            return "; ".join(needed)
        said = self._said.get(group.name, Say())
        if said.whole is not None:
            return f"whole: {said.whole}"
        by = 1 if self._recipe.target.dead else width_step(group, preferred(self._recipe))
        steps = [f"round_to: steps of {by}"] if by > 1 else []
        if said.why:
            few, most = limits(group, said, by)
            count = f"{few} units" if few == most else f"{few} to {most} units"
            return "; ".join([f"{said.why}: {count}", *steps, *needed])
        least = math.ceil(self._recipe.floor * group.size)
        floor = [f"floor: {least} units or more"] if least > group.least else []
        return "; ".join([*floor, *steps, *needed])

    def _member(self, name: str, dim: int) -> Member:
        captured = self._analysis.captured
        tensor = captured.tensors[name]
        role = "constant" if name in captured.constants else _role(tensor)
        return Member(name, dim, tensor.shape[dim], role, self._formula(self._analysis.tensors[name][dim]))

    def _formula(self, dim: Dim, within: bool = False) -> str:
        """A dimension as products and sums of groups and sizes."""
        if isinstance(dim, Axis):
            return next((g.name for g in self._groups if g.axis is dim), dim.birth)
        if isinstance(dim, Fixed):
            return str(dim.size)
        parts, sign = (dim.factors, " * ") if isinstance(dim, Product) else (dim.parts, " + ")
        text = sign.join(self._formula(part, within=True) for part in parts)
        return f"({text})" if within else text

    def _operators(self) -> tuple[OperatorInfo, ...]:
        counts: Counter[Any] = Counter()
        first: dict[Any, fx.Node] = {}
        for node in self._analysis.captured.graph.nodes:
            if node.op == "call_function" and node.target is not operator.getitem:
                counts[node.target] += 1
                first.setdefault(node.target, node)
        found = [OperatorInfo(str(t), n, t in RULES, step(first[t])) for t, n in counts.items()]
        return tuple(sorted(found, key=lambda o: (o.rule, -o.count, o.name)))


def _role(tensor: Tensor) -> str:
    return "parameter" if isinstance(tensor, nn.Parameter) else "buffer"


def step(node: fx.Node) -> Step:
    """Return a node as data."""
    target = node.target.__name__ if node.target is operator.getitem else str(node.target)
    source = shorten(node.meta.get("source") or "")
    return Step(node.name, target, node.meta.get("path") or "", "" if source == NO_SOURCE else source)


#: What capture writes where no line of the user's was running.
NO_SOURCE = "no source line"


def _without_nowhere(text: str) -> str:
    return text.removesuffix(f" ({NO_SOURCE})")


def shorten(text: str) -> str:
    """Return the text with paths relative to site-packages or to the working directory.

    >>> shorten("conv2d (/opt/env/lib/python3.11/site-packages/timm/models/resnet.py:777 in forward)")
    'conv2d (timm/models/resnet.py:777 in forward)'
    >>> shorten(f"conv2d ({Path.cwd()}/net.py:3 in forward)")
    'conv2d (net.py:3 in forward)'
    """
    return re.sub(r"/[^():]*/site-packages/", "", text).replace(f"{Path.cwd()}/", "")
