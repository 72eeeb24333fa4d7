"""Which groups a recipe's patterns mean, and what its `keep`, `groups`, `ratios` say about each group."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from fxprune.analyse import Analysis
from fxprune.axes import Axis, atoms
from fxprune.errors import RecipeError
from fxprune.groups import KINDS, Group, matches
from fxprune.recipe import Range, Recipe
from fxprune.registry import nearest
from fxprune.streams import ROLES, activations, axes_of, roles

TYPE, KIND = "type:", "kind:"
#: How closely a pattern means a group: by its own name or a dimension; by all that makes it; by some of its members.
_EXACT, _MADE, _TOUCHED = range(3)


@dataclass(frozen=True, slots=True)
class Say:
    """What a recipe says about one group.

    Attributes:
        whole: why it stays whole, or None.
        share: the share of units that it keeps, or None.
        bounds: the least and the largest share that it may keep.
        why: which of the recipe's patterns said so.
    """

    whole: str | None = None
    share: float | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    why: str = ""


class Patterns:
    """Finds the groups that patterns mean.

    A pattern is a glob of module or parameter names ("layer1.*": everything below, too), "type:" and a class name
    ("type:LayerNorm", subclasses too), "kind:" and a kind ("kind:heads", "kind:residual"), one dimension
    ("fc.weight.0"), or the name that `fxprune explain` gives a group.
    """

    def __init__(self, analysis: Analysis, groups: Sequence[Group]) -> None:
        self._analysis, self.groups = analysis, groups
        self._names: dict[str, list[str]] = {name: [name] for name in analysis.tensors}
        for alias, name in analysis.captured.aliases.items():
            if name in self._names:
                self._names[name].append(alias)

    @cached_property
    def roles(self) -> dict[str, str]:
        """The groups that are part of the residual stream or the inner width of an MLP, by name."""
        return roles(self._analysis, self.groups)

    def is_kind(self, group: Group, kind: str) -> bool:
        """Whether a group is of a kind, or plays that role."""
        return self.roles.get(group.name) == kind if kind in ROLES else group.kind == kind

    def meant(self, pattern: str, key: str) -> dict[str, int]:
        """Return the groups that a pattern means, by name, and how closely: 0 is closest.

        Raises:
            RecipeError: the model has nothing that the pattern could mean.
        """
        if pattern.startswith(KIND):
            kind, known = pattern.removeprefix(KIND), [*KINDS, *ROLES]
            if kind not in known:
                hint = nearest(kind, known) or "."
                raise RecipeError(f"recipe: {key}: there is no kind '{kind}'{hint} Known: {', '.join(known)}")
            return {g.name: _MADE for g in self.groups if self.is_kind(g, kind)}
        if any(g.name == pattern for g in self.groups):
            return {pattern: _EXACT}
        tensors = self._of_type(pattern, key) if pattern.startswith(TYPE) else self._named(pattern)
        if tensors:
            return {
                g.name: _MADE if self._makers(g) <= tensors else _TOUCHED
                for g in self.groups
                if any(t in tensors for t, _ in g.members)
            }
        stem, _, dim = pattern.rpartition(".")
        if dim.isdigit():
            ends = {
                (t, int(dim))
                for t, names in self._names.items()
                if len(self._analysis.tensors[t]) > int(dim) and any(fnmatch.fnmatchcase(n, stem) for n in names)
            }
            if ends:
                return {g.name: _EXACT for g in self.groups if ends & set(g.members)}
        raise RecipeError(f"recipe: {key}: '{pattern}' matches no module and no parameter of the model")

    def tensors(self, pattern: str, key: str) -> set[str]:
        """Return the tensors of the layers that a pattern names; a group, a kind or a dimension names none."""
        if pattern.startswith(KIND):
            return set()
        return self._of_type(pattern, key) if pattern.startswith(TYPE) else self._named(pattern)

    def kept_because(self, group: str, pattern: str) -> str:
        """Say why a pattern of `keep` leaves a group whole: the tensor of it that the pattern names, where it does."""
        members = next(g.members for g in self.groups if g.name == group)
        named = (n for t, _ in members for n in self._names[t] if matches(n, [pattern]))
        name = next(named, None)
        return f"it cuts '{name}', which the recipe keeps" if name else f"the recipe keeps '{pattern}'"

    def _named(self, glob: str) -> set[str]:
        return {t for t, names in self._names.items() if any(matches(n, [glob]) for n in names)}

    def _of_type(self, pattern: str, key: str) -> set[str]:
        """The tensors of all modules of a class, and of what is below them."""
        wanted, types = pattern.removeprefix(TYPE), self._analysis.captured.types
        paths = {p for p, names in types.items() if any(fnmatch.fnmatchcase(n, wanted) for n in names)}
        if not paths:
            hint = nearest(wanted, sorted({n for names in types.values() for n in names}))
            raise RecipeError(f"recipe: {key}: the model has no module of the class '{wanted}'{hint}")
        return {t for t, names in self._names.items() if any(o in paths for n in names for o in _owners(n))}

    def _makers(self, group: Group) -> set[str]:
        """The tensors that make a group: every skip connection's layers the residual stream; else all that it cuts."""
        return self._made.get(group.axis) or {t for t, _ in group.members}

    @cached_property
    def _made(self) -> dict[Axis, set[str]]:
        """The weights of products and tables that have an axis and take nothing that does."""
        analysis = self._analysis
        found: dict[Axis, set[str]] = {}
        products, computed = {n for n, _ in analysis.macs}, activations(analysis)
        for node in analysis.captured.graph.nodes:
            if node not in products and node.target is not torch.ops.aten.embedding.default:
                continue
            inputs = {a for n in node.all_input_nodes if n in computed for a in axes_of(analysis, n)}
            new = axes_of(analysis, node) - inputs
            for name in _weights([n for n in node.all_input_nodes if n not in computed]):
                for axis in new & {a for dim in analysis.tensors[name] for a in atoms(dim)}:
                    found.setdefault(axis, set()).add(name)
        return found


def _weights(nodes: list[fx.Node]) -> set[str]:
    """The tensors that nodes are computed from: a weight may be turned, or scaled to a norm, before it is used."""
    left, found = list(nodes), set[str]()
    while left:
        node = left.pop()
        left += node.all_input_nodes
        if node.op == "get_attr":
            found.add(str(node.target))
    return found


def _owners(name: str) -> Iterator[str]:
    """The modules that a parameter is in, the model itself ("") first."""
    parts = name.split(".")
    return (".".join(parts[:n]) for n in range(len(parts)))


def say(analysis: Analysis, groups: Sequence[Group], recipe: Recipe) -> dict[str, Say]:
    """Return what the recipe says about each group, by name.

    `keep` means every group that cuts anything of what its pattern names; `ratios` only those that are made there and
    nowhere else, so that one block's ratio is not that of the residual stream. What is kept stays whole whatever
    `ratios` say; of several ratios the group's own name, or one of its dimensions, counts before layers and kinds.

    Raises:
        RecipeError: a pattern matches nothing, or two that are equally close contradict each other.
    """
    patterns = Patterns(analysis, groups)
    found: dict[str, Say] = {}
    for pattern in recipe.keep:
        for name in patterns.meant(pattern, "keep"):
            found.setdefault(name, Say(whole=patterns.kept_because(name, pattern)))
    for group in groups:
        why = _not_chosen(patterns, group, recipe)
        if why:
            found.setdefault(group.name, Say(whole=why))
    closest: dict[str, tuple[int, str]] = {}
    for pattern, value in recipe.ratios.items():
        meant = {name: rank for name, rank in patterns.meant(pattern, "ratios").items() if rank < _TOUCHED}
        free = [name for name in meant if (said := found.get(name)) is None or said.whole is None]
        if not free:
            reasons = {str(found[name].whole) for name in meant}
            why = "; ".join(sorted(reasons)) if reasons else "none is made there alone (`fxprune explain` lists all)"
            raise RecipeError(f"recipe: ratios: '{pattern}' means no group that may be cut: {why}")
        for name in free:
            rank, other = closest.get(name, (_TOUCHED, ""))
            if meant[name] == rank and recipe.ratios[other] != value:
                raise RecipeError(
                    f"recipe: ratios: '{other}' and '{pattern}' both mean the group {name} and say different things; "
                    "name the group itself to decide"
                )
            if meant[name] < rank:
                closest[name] = meant[name], pattern
    for name, (_, pattern) in closest.items():
        found[name] = _wish(pattern, recipe.ratios[pattern])
    return found


def _wish(pattern: str, value: float | Range) -> Say:
    if isinstance(value, Range):
        return Say(bounds=(value.min, value.max), why=f"ratios: '{pattern}' allows {value.min:g} to {value.max:g}")
    return Say(share=value, bounds=(value, value), why=f"ratios: '{pattern}' keeps {value:g}")


def _not_chosen(patterns: Patterns, group: Group, recipe: Recipe) -> str | None:
    """Why `groups` leaves a group whole."""
    if recipe.groups is None:
        return None
    excluded = [k.removeprefix("not ") for k in recipe.groups if k.startswith("not ")]
    included = [k for k in recipe.groups if not k.startswith("not ")]
    for kind in excluded:
        if patterns.is_kind(group, kind):
            return f"the recipe cuts no {kind}"
    if included and not any(patterns.is_kind(group, k) for k in included):
        role = patterns.roles.get(group.name) if set(included) & set(ROLES) else None
        also = f" ({role})" if role else ""
        return f"the recipe cuts {', '.join(included)} only, and this is of kind {group.kind}{also}"
    return None


def limits(group: Group, said: Say, step: int) -> tuple[int, int]:
    """Return the fewest and the most units that a group with bounds may keep, multiples of its step where it can.

    >>> limits(Group("g", Axis(64), "hidden", (), 1), Say(share=0.3, bounds=(0.3, 0.3)), 8)
    (16, 16)
    >>> limits(Group("g", Axis(64), "hidden", (), 1), Say(bounds=(0.3, 0.7)), 8)
    (24, 40)
    """
    size, lowest = group.size, max(group.least, 1)
    if said.share is not None:
        count = size if said.share == 1 else step * max(1, round(said.share * size / step))
        count = min(max(count, lowest), size)
        return count, count
    low, high = max(math.ceil(said.bounds[0] * size - 1e-9), lowest), math.floor(said.bounds[1] * size + 1e-9)
    high = max(low, high)
    rounded = (step * math.ceil(low / step), high if high == size else step * (high // step))
    return rounded if rounded[0] <= rounded[1] else (low, high)


def reasons(said: Mapping[str, Say]) -> dict[str, str]:
    """Return for each group that the recipe blocks or forces what of the recipe does."""
    return {name: s.whole or s.why for name, s in said.items() if s.whole or s.why}
