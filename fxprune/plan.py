"""A plan: what was kept, in terms of parameter names and indices, with all that is needed to do the same again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from fxprune.analyse import Analysis
from fxprune.axes import Axis, atoms, size_of
from fxprune.blocks import find_blocks
from fxprune.costs import Costs
from fxprune.errors import SavedModelError
from fxprune.groups import Group, positions
from fxprune.kept import Indices, Kept
from fxprune.masks import Masks, decode, encode
from fxprune.streams import roles


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One group of the plan.

    Attributes:
        size, kept: how many units there are, and how many stay.
        role: "residual", "ffn" or "": see `fxprune.streams`.
        why: what of the recipe leaves it whole or says how much of it stays; "" where the allocation decides.
        params, macs: what cutting this group alone saves.
        heads: the numbers of those that stay, of a group of heads.
    """

    name: str
    kind: str
    size: int
    kept: int
    role: str = ""
    why: str = ""
    params: int = 0
    macs: int = 0
    heads: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Plan:
    """What is kept of a model.

    Attributes:
        kept: tensor name -> dimension -> kept indices, in the order in which they are kept (ascending but for n:m
            patterns), for every parameter, buffer and constant that is cut or put in another order.
        groups: every group that could have been cut.
        biases: names of biases that constants of removed units were folded into, in the emitted module.
        recipe: the recipe that it came from.
        blocks: names of the blocks that are removed whole (`fxprune.blocks`).
        basis: the indices are those of principal components of attention (`fxprune.passes.basis`), which take data.
        costs: "params" and "macs" of the dense model and of what is kept.
        dynamic: input name -> dimension -> size name: what was dynamic when the model was captured.
        masks: name of a weight in the pruned module -> which of its entries stay, bool, of its shape; others are zero.
    """

    kept: dict[str, dict[int, list[int]]]
    groups: list[GroupPlan] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)
    costs: dict[str, tuple[int, int]] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)
    basis: bool = False
    masks: Masks = field(default_factory=Masks)

    @classmethod
    def of(
        cls, analysis: Analysis, groups: list[Group], kept: Kept, costs: Costs, why: Mapping[str, str], **extra: Any
    ) -> Plan:
        """Return the plan of a selection; `why` says what of the recipe blocks or forces a group, by name."""
        table = {
            name: {i: kept.index(d).tolist() for i, d in enumerate(dims) if kept.cut(d)}
            for name, dims in analysis.tensors.items()
        }
        blocks = [b for b in find_blocks(analysis) if b.total in kept.removed] if kept.removed else []
        gone = frozenset[str]().union(*(b.parameters for b in blocks))
        counts = {g.axis: len(kept[g.axis]) if g.axis in kept else g.size for g in groups}
        dropped = {g.axis: 0 for g in groups if _inside(g, gone)}
        part = roles(analysis, groups)
        rows = [
            GroupPlan(
                g.name,
                g.kind,
                g.size,
                {**counts, **dropped}[g.axis],
                part.get(g.name, ""),
                "in a removed block" if g.axis in dropped else why.get(g.name, ""),
                params=-costs.change("params", {g.axis: {**counts, **dropped}[g.axis]}, {}),
                macs=-costs.change("macs", {g.axis: {**counts, **dropped}[g.axis]}, {}),
                heads=_heads(g, kept) if g.axis not in dropped else [],
            )
            for g in groups
        ]
        left = costs.without(kept.removed)
        total = {cost: (costs.of(cost, {}), left.of(cost, counts)) for cost in ("params", "macs")}
        return cls(
            {n: t for n, t in table.items() if t},
            rows,
            dynamic=analysis.captured.dynamic,
            costs=total,
            blocks=[b.name for b in blocks],
            **extra,
        )

    def reasons(self) -> dict[str, str]:
        """Return what the recipe said about groups, by name."""
        return {g.name: g.why for g in self.groups if g.why}

    def selection(self, analysis: Analysis) -> Kept:
        """Return the plan as kept indices of the axes of another capture of the same architecture.

        Raises:
            SavedModelError: a tensor is missing, or the indices do not fit the way its dimensions are coupled.
        """
        found: dict[Axis, Indices] = {}
        for name, table in self.kept.items():
            if name not in analysis.tensors:
                raise SavedModelError(f"the plan cuts '{name}', which this model does not have or does not use")
            for dim, indices in table.items():
                self._read(analysis, name, dim, np.asarray(indices, dtype=np.int64), found)
        blocks = {b.name: b for b in find_blocks(analysis)} if self.blocks else {}
        for name in self.blocks:
            if name not in blocks:
                raise SavedModelError(f"the plan removes the block '{name}', which this model does not have")
        kept = Kept(found, {blocks[name].total: blocks[name].stream for name in self.blocks})
        for name, table in self.kept.items():
            for dim, indices in table.items():
                if kept.index(analysis.tensors[name][dim]).tolist() != list(indices):
                    raise SavedModelError(
                        f"the plan keeps indices of dimension {dim} of '{name}' that this model's couplings do not "
                        "allow: the model is not the one that the plan was made for"
                    )
        return kept

    def _read(self, analysis: Analysis, name: str, dim: int, indices: Indices, found: dict[Axis, Indices]) -> None:
        dims = analysis.tensors[name]
        if dim >= len(dims):
            raise SavedModelError(f"the plan cuts dimension {dim} of '{name}', which has {len(dims)}")
        if len(indices) and indices.max() >= size_of(dims[dim]):
            raise SavedModelError(
                f"the plan keeps index {indices.max()} of dimension {dim} of '{name}', which has fewer"
            )
        for axis in set(atoms(dims[dim])):
            units = np.concatenate([p[indices] for p in positions(dims[dim], axis)])
            _, first = np.unique(units, return_index=True)
            units = units[np.sort(first)]  # in the order in which they are kept
            found.setdefault(axis, units[units >= 0])

    def to_json(self) -> str:
        """Return the plan as JSON."""
        plain = asdict(replace(self, masks=Masks()))
        return json.dumps(plain | {"masks": {n: encode(m) for n, m in self.masks.items()}}, indent=1)

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> Plan:
        """Return the plan from JSON; raises SavedModelError where it is not one."""
        try:
            data = json.loads(text) if isinstance(text, str) else text
            return cls(
                kept={n: {int(d): list(ix) for d, ix in t.items()} for n, t in data["kept"].items()},
                groups=[GroupPlan(**g) for g in data["groups"]],
                biases=list(data["biases"]),
                recipe=dict(data["recipe"]),
                dynamic={n: {int(d): str(s) for d, s in t.items()} for n, t in data["dynamic"].items()},
                basis=bool(data.get("basis", False)),
                blocks=list(data.get("blocks", [])),
                costs={kind: (int(a), int(b)) for kind, (a, b) in data.get("costs", {}).items()},
                masks=Masks({n: decode(m) for n, m in data.get("masks", {}).items()}),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SavedModelError(f"this is not a plan: {type(error).__name__}: {error}") from error


def _heads(group: Group, kept: Kept) -> list[int]:
    """The heads that stay, ascending."""
    if group.kind != "heads":
        return []
    return sorted(kept[group.axis].tolist()) if group.axis in kept else list(range(group.size))


def _inside(group: Group, gone: frozenset[str]) -> bool:
    """Whether all that a group cuts is among some tensors."""
    return bool(gone) and all(name in gone for name, _ in group.members)
