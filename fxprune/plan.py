"""A plan: what was kept, in terms of parameter names and indices, with all that is needed to do the same again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fxprune.analyse import Analysis
from fxprune.axes import Axis, atoms, size_of
from fxprune.errors import SavedModelError
from fxprune.groups import Group, positions
from fxprune.kept import Indices, Kept


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One group of the plan: its name, kind, number of units, and how many stay."""

    name: str
    kind: str
    size: int
    kept: int


@dataclass(slots=True)
class Plan:
    """What is kept of a model.

    Attributes:
        kept: tensor name -> dimension -> kept indices, ascending, for every parameter, buffer and constant that is cut.
        groups: every group that could have been cut.
        biases: names of biases that constants of removed units were folded into, in the emitted module.
        recipe: the recipe that it came from.
        dynamic: input name -> dimension -> size name: what was dynamic when the model was captured.
    """

    kept: dict[str, dict[int, list[int]]]
    groups: list[GroupPlan] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, analysis: Analysis, groups: list[Group], kept: Kept, **extra: Any) -> Plan:
        """Return the plan of a selection."""
        table = {
            name: {i: kept.index(d).tolist() for i, d in enumerate(dims) if kept.cut(d)}
            for name, dims in analysis.tensors.items()
        }
        rows = [GroupPlan(g.name, g.kind, g.size, len(kept[g.axis]) if g.axis in kept else g.size) for g in groups]
        dynamic: dict[str, dict[int, str]] = {}
        for symbol in analysis.captured.symbols:
            for name, dim in symbol.places:
                dynamic.setdefault(name, {})[dim] = symbol.name
        return cls({n: t for n, t in table.items() if t}, rows, dynamic=dynamic, **extra)

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
        kept = Kept(found)
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
            units = np.unique(np.concatenate([p[indices] for p in positions(dims[dim], axis)]))
            found.setdefault(axis, units[units >= 0])

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(asdict(self), indent=1)

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
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SavedModelError(f"this is not a plan: {type(error).__name__}: {error}") from error
