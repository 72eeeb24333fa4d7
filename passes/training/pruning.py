"""One pruning while it runs: units, method, schedule and target together; says at each step which units stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.analyse import Analysis
from fxprune.axes import Axis
from fxprune.backends import chosen as backend_of
from fxprune.costs import Costs
from fxprune.errors import InputError, NonFiniteError, RecipeError, TargetError
from fxprune.groups import Group
from fxprune.kept import Indices, Kept
from fxprune.passes.choose import Chooser, chooser, preferred
from fxprune.passes.meet import meet, timed
from fxprune.passes.training import cut
from fxprune.passes.training.fading import Fading
from fxprune.passes.training.find import Found, find
from fxprune.passes.training.masked import Weights
from fxprune.passes.training.method import Method, made
from fxprune.passes.training.ramp import Schedule
from fxprune.passes.training.stage import Stage
from fxprune.passes.training.units import AxisUnits, CountedUnits, LayerUnits, Units
from fxprune.recipe import Recipe, read_recipe
from fxprune.report import Clocked


@dataclass(slots=True)
class Subject:
    """What is pruned.

    Attributes:
        analysis, groups, costs: of the captured model.
        reference: the model that was captured, a copy from before anything was trained or masked.
        weights: the masked parameters of the one that is trained.
        args, kwargs: the example inputs.
        recipe: backend, threads, seed, rounding.
    """

    analysis: Analysis
    groups: list[Group]
    costs: Costs
    reference: nn.Module
    weights: Weights
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    recipe: Recipe
    say: Callable[[str], None] = lambda text: None


@dataclass(eq=False)
class Pruning:
    """One stage of a run.

    Attributes:
        kept: name of units -> which stay now.
        gone: the share of the target's way that the last update went to.
        gates: name of a weight -> what it is multiplied with in training, of methods with gates.
        done: whether the last update was made.
        clocked: how a target on the clock was met.
    """

    stage: Stage
    schedule: Schedule
    subject: Subject
    found: Found
    method: Method
    generator: torch.Generator
    steps: int | None = None
    step: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)
    gone: float = 0.0
    done: bool = False
    clocked: Clocked | None = None
    _chooser: Chooser | None = None
    _fading: Fading | None = None
    _products: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, stage: Stage, subject: Subject, schedule: Schedule, seed: int, steps: int | None = None) -> Pruning:
        """Find the units, make the method, check that the target can be reached.

        Raises:
            RecipeError: parts of the stage contradict each other, or name what there is not.
            TargetError: the target cannot be reached.
        """
        method = made(stage.name, stage.options)
        found = find(subject.analysis, subject.groups, stage)
        generator = torch.Generator().manual_seed(seed)
        result = cls(stage, schedule, subject, found, method, generator, steps)
        result._check()
        if stage.progressive:
            result._fading = Fading(stage.progressive, schedule.every)
        result.kept = {u.name: torch.ones(u.size, dtype=torch.bool) for u in found.units}
        return result

    # ------------------------------------------------------------------ what methods ask for
    @property
    def units(self) -> list[Units]:
        """All units."""
        return self.found.units

    def value(self, name: str) -> Tensor:
        """Return a weight as it is without its mask."""
        return self.subject.weights.value(name)

    def gradient(self, name: str) -> Tensor:
        """Return a weight's gradient; zeros where it has none."""
        gradient = self.subject.weights.gradient(name)
        return torch.zeros_like(self.value(name)) if gradient is None else gradient

    def product(self, name: str) -> Tensor:
        """Return weight times gradient: what the loss would change by, to first order, without the entry."""
        if name not in self._products:
            gradient = self.subject.weights.gradient(name)
            value = self.value(name)
            self._products[name] = torch.zeros_like(value) if gradient is None else value * gradient
        return self._products[name]

    def at_reads(self, units: Units) -> Tensor:
        """Return dL/dm of factors m on units where they are read: the sum of w dL/dw over what reads them."""
        return units.at_reads(self.product)

    def drop(self, units: Units, why: str) -> None:
        """Leave units alone, and say why."""
        self.found.units.remove(units)
        self.found.unfit[units.name] = why
        self.kept.pop(units.name, None)

    def set_gates(self, values: Mapping[str, Tensor]) -> None:
        """Say what units are multiplied with while the model trains, by the name of the units."""
        product: dict[str, Tensor] = {}
        for u in self.units:
            for name, gate in u.expand(values[u.name]).items():
                product[name] = product[name] * gate if name in product else gate
        self.gates = product

    @property
    def costs(self) -> Costs:
        """What the target is a share of."""
        return self.chooser.costs if self._chooser is not None else self.subject.costs

    def time_parts(self) -> None:
        """Measure what the model's parts take at several widths, so that costs know latency.

        Raises:
            BackendError: the backend is missing or cannot build the model.
        """
        chooser, subject = self.chooser, self.subject
        backend = backend_of(chooser.recipe.backend)
        timed(chooser, subject.reference, subject.args, subject.kwargs, backend, subject.say)

    def fresh(self) -> None:
        """Forget what was computed of the last step's gradients."""
        self._products.clear()

    def random(self, *shape: int) -> Tensor:
        """Return uniform numbers in (0, 1), the same on every process."""
        return torch.rand(*shape, generator=self.generator).clamp(1e-6, 1 - 1e-6)

    # ------------------------------------------------------------------ targets
    @property
    def target(self) -> float:
        """The share of the units, or of the cost, that is gone at the end."""
        goal = self.stage.target
        counted = next((u for u in self.units if isinstance(u, CountedUnits)), None)
        if counted is not None:
            return 1 - counted.pattern.density
        if goal is None:
            return 1.0
        return float(goal.sparsity) if goal.sparsity is not None else 1 - goal.cost[1]  # type: ignore[index]

    def _check(self) -> None:
        stage, goal = self.stage, self.stage.target
        axes = [u for u in self.units if isinstance(u, AxisUnits)]
        layers = [u for u in self.units if isinstance(u, LayerUnits)]
        counted = [u for u in self.units if isinstance(u, CountedUnits)]
        self._fits()
        if goal is None and not counted and not self.method.targetless:
            raise RecipeError("pruning: say what to reach, target: {sparsity: 0.8} for example")
        if counted and goal is not None and (goal.sparsity is None or abs(goal.sparsity - self.target) > 1e-9):
            raise RecipeError(
                f"pruning: {counted[0].kind} is a sparsity of {self.target:g}; a target says nothing more"
            )
        if counted and len(counted) != len(self.units):
            raise RecipeError("pruning: n:m does not mix with other patterns in one stage; make it a stage of its own")
        if goal is not None and goal.cost is not None:
            if len(axes) + len(layers) != len(self.units) or (axes and layers):
                raise RecipeError(
                    f"pruning: a target {goal.cost[0]} is one of widths, heads or layers; pattern "
                    f"{'+'.join(stage.patterns)} takes target: {{sparsity: ...}}"
                )
            if layers and goal.speedup is not None:
                raise RecipeError("pruning: the pattern 'layer' takes targets sparsity, macs, params and memory")
            self._probe(goal.cost[1])
        elif not counted and goal is not None:
            self._reach()

    def _fits(self) -> None:
        wanted = self.method.patterns
        for u in self.units:
            axis = isinstance(u, AxisUnits | LayerUnits)
            fits = {
                "any": True,
                "blocks": not axis and not isinstance(u, CountedUnits),
                "axes": axis,
                "n:m": isinstance(u, CountedUnits),
            }[wanted]
            if not fits:
                raise RecipeError(f"training method '{self.stage.name}' is for {wanted}, not for pattern '{u.kind}'")

    def _reach(self) -> None:
        """Refuse a sparsity that bounds do not allow."""
        for kind, units in self._kinds().items():
            sizes, counts = {u.name: u.size for u in units}, {u.name: u.counts for u in units}
            bounds = self._bounds
            if self.stage.scope == "local":
                high = min(bounds.most, min((u.size - _least(u)) / u.size for u in units))
            else:
                high = cut.reachable(sizes, counts, bounds, {u.name: _least(u) for u in units})[1]
            if self.target > high + 1e-9:
                highest = math.floor(high * 1e4) / 1e4
                raise TargetError(
                    f"a sparsity of {self.target:.4g} of '{kind}' cannot be reached: with at most {bounds.most:.4g} of "
                    f"each layer and one unit left where one is needed it is {highest:g}; raise max_sparsity"
                )

    def _probe(self, share: float) -> None:
        """Refuse a cost that even the smallest widths do not come down to (of a time on the clock: the end says)."""
        assert self.stage.target is not None
        cost = self.stage.target.cost
        assert cost is not None
        if isinstance(self.units[0], LayerUnits):
            rest = self.subject.costs.without({b.total: b.stream for b in self.units[0].blocks}).of(cost[0], {})
            least = rest / self.subject.costs.of(cost[0], {})
            if least > share:
                raise TargetError(f"{cost[0]} {share:.3g} cannot be reached: without all branches it is {least:.3g}")
        elif cost[0] != "latency":
            self.chooser.kept(*cost)

    @property
    def chooser(self) -> Chooser:
        """What spreads a target that is a cost over groups."""
        if self._chooser is None:
            stage, subject = self.stage, self.subject
            allocation = stage.allocation or ("global" if stage.scope == "global" else "uniform")
            assert stage.target is not None
            target = {k: v for k, v in stage.target.model_dump().items() if v is not None}
            given = subject.recipe.model_dump(exclude_unset=True) | {"target": target, "allocation": allocation}
            given |= {"criterion": "magnitude", "floor": 1 - stage.max_sparsity}
            if stage.round_to is not None:
                given["round_to"] = stage.round_to
            recipe = read_recipe(given)
            names = {u.name for u in self.units}
            whole = {g.name: "it is not of this pattern" for g in subject.groups if g.name not in names}
            self._chooser = chooser(subject.analysis, subject.groups, recipe, subject.costs, preferred(recipe), whole)
        return self._chooser

    def _kinds(self) -> dict[str, list[Units]]:
        """Units by what of the pattern they are: only those compete."""
        kinds: dict[str, list[Units]] = {}
        for u in self.units:
            kinds.setdefault(u.kind, []).append(u)
        return kinds

    @property
    def _bounds(self) -> cut.Bounds:
        return cut.Bounds(self.stage.min_sparsity, self.stage.max_sparsity)

    # ------------------------------------------------------------------ updates
    def scores(self) -> dict[str, Tensor]:
        """Return the scores of all units, of axes divided by their mean where the method's do not compare.

        Raises:
            NonFiniteError: one is NaN or infinite.
        """
        result = {}
        for u in self.units:
            scores = self.method.scores(self, u).detach().float().cpu()
            # What is not finite makes the sum so, which is many times as fast to see.
            if not torch.isfinite(scores.sum()) and not torch.isfinite(scores).all():
                raise NonFiniteError(
                    f"step {self.step}: a score of '{u.name}' is NaN or infinite (first of unit "
                    f"{int((~torch.isfinite(scores)).nonzero()[0])}): a weight or a gradient is"
                )
            if isinstance(u, AxisUnits) and not self.method.comparable:
                scores = scores / scores.abs().mean().clamp_min(1e-300)
            result[u.name] = scores
        return result

    def update(self, step: int) -> bool:
        """Choose what stays from a step on, if the schedule says so; return whether anything may have changed."""
        self.step = step
        if self.done or not self.schedule.updates(step):
            return self._fading is not None and self._fading.turn(step, self.value)
        before = self.kept
        self.gone = self.schedule.share(step, self.target)
        last = step >= self.schedule.end or (self.schedule.ramp == "oneshot" and not self.schedule.alternates)
        chosen = self.method.keep(self, self.gone)
        if chosen is None:
            chosen = self.best(self.gone, last)
        self.kept = synchronised(chosen)
        self.done = last
        if last:
            self.method.settle(self)
        if self._fading is not None:
            old, new = (_product(u.expand(kept[u.name]) for u in self.units) for kept in (before, self.kept))
            self._fading.begin(step, {n: old[n] & ~new[n] for n in new}, self.value)
        return True

    def best(self, gone: float, last: bool) -> dict[str, Tensor]:
        """Return which units stay by their scores when a share is to go.

        Args:
            last: a target on the clock is met by measuring the whole model; else tables of its parts have to do.
        """
        if gone <= 0:
            return {u.name: torch.ones(u.size, dtype=torch.bool) for u in self.units}
        scores = self.scores()
        cost = None if self.stage.target is None else self.stage.target.cost
        if cost is not None:
            return self._affordable(scores, cost[0], 1 - gone, last)
        result: dict[str, Tensor] = {}
        for units in self._kinds().values():
            counted = {u.name: u.best(scores[u.name], gone) for u in units if isinstance(u, CountedUnits)}
            counts = {u.name: u.counts for u in units}
            own = {u.name: scores[u.name] for u in units}
            result |= counted or cut.keep(
                own, counts, gone, self.stage.scope, self._bounds, {u.name: _least(u) for u in units}
            )
        return result

    def _affordable(self, scores: Mapping[str, Tensor], kind: str, share: float, last: bool) -> dict[str, Tensor]:
        """What stays of widths or layers within a share of a cost."""
        layers = self.units[0]
        if isinstance(layers, LayerUnits):
            return {layers.name: self._layers(layers, scores[layers.name], kind, share)}
        chooser = self.chooser
        chooser.scores = {name: one.numpy() for name, one in scores.items()}
        if kind == "latency":
            kept = self._fast_enough(share, last)
        else:
            kept = chooser.kept(kind, share)
        return {u.name: _mask(u, kept) for u in self.units if isinstance(u, AxisUnits)}

    def _fast_enough(self, share: float, last: bool) -> Kept:
        """At the end the whole model is measured; before, tables of its parts do, which it needs anyway."""
        subject, chooser = self.subject, self.chooser
        if last:
            backend = backend_of(chooser.recipe.backend)
            kept, clocked = meet(chooser, subject.reference, subject.args, subject.kwargs, backend, subject.say)
            self.clocked = clocked
            return kept
        self.time_parts()
        return chooser.kept("latency", share)

    def _layers(self, units: LayerUnits, scores: Tensor, kind: str, share: float) -> Tensor:
        """Branches go in the order of their scores, as long as the cost is above its share."""
        mask = torch.ones(units.size, dtype=torch.bool)
        total = self.subject.costs.of(kind, {})
        gone: dict[fx.Node, fx.Node] = {}
        for number in torch.argsort(scores, stable=True).tolist():
            if self.subject.costs.without(gone).of(kind, {}) <= share * total:
                break
            block = units.blocks[number]
            gone[block.total] = block.stream
            mask[number] = False
        return mask

    # ------------------------------------------------------------------ masks
    def masks(self) -> dict[str, Tensor]:
        """Return the masks of all weights of this stage: bool, of their shapes."""
        masks = _product(u.expand(self.kept[u.name]) for u in self.units)
        left = {} if self._fading is None else self._fading.left
        return {n: m | left[n] if n in left else m for n, m in masks.items()}

    def selection(self) -> Kept:
        """Return what stays of axes, and the branches that are left out."""
        axes: dict[Axis, Indices] = {}
        removed: dict[fx.Node, fx.Node] = {}
        for u in self.units:
            if isinstance(u, AxisUnits):
                axes[u.group.axis] = self.kept[u.name].nonzero().flatten().numpy()
            elif isinstance(u, LayerUnits):
                removed |= {
                    b.total: b.stream for b, k in zip(u.blocks, self.kept[u.name].tolist(), strict=True) if not k
                }
        return Kept(axes, removed)

    def inside(self) -> dict[str, Tensor]:
        """Return the masks of patterns inside weights, which stay zeros, as far as no unit of an axis is removed."""
        return _product(u.expand(self.kept[u.name]) for u in self.units if not isinstance(u, AxisUnits | LayerUnits))

    def sparsity(self) -> float:
        """Return the share that is gone, over all units: of entries, or of what is counted (`Units.counts`)."""
        total = sum(u.size * u.counts for u in self.units)
        return sum(int((~self.kept[u.name]).sum()) * u.counts for u in self.units) / total

    # ------------------------------------------------------------------ checkpoints
    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {
            "kept": self.kept,
            "gates": self.gates,
            "gone": self.gone,
            "done": self.done,
            "method": self.method.state(),
            "generator": self.generator.get_state(),
            "fading": None if self._fading is None else self._fading.state(),
            "clocked": None if self.clocked is None else asdict(self.clocked),
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse what `load` could not go on from.

        Raises:
            InputError: it is of other units.
        """
        sizes = {u.name: u.size for u in self.units}
        if {n: len(k) for n, k in state["kept"].items()} != sizes:
            raise InputError("the checkpoint is of another model, or of other stages: its units are not these")

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: it is of other units.
        """
        self.check(state)
        self.kept, self.gone, self.done = dict(state["kept"]), state["gone"], state["done"]
        self.gates = dict(state["gates"])
        self.method.load(state["method"])
        self.generator.set_state(state["generator"])
        if self._fading is not None:
            self._fading.load(state["fading"])
        self.clocked = None if state["clocked"] is None else Clocked.of(state["clocked"])


def _least(units: Units) -> int:
    """How many units must stay."""
    return max(units.group.least, 1) if isinstance(units, AxisUnits) else 0


def _mask(units: AxisUnits, kept: Kept) -> Tensor:
    mask = torch.ones(units.size, dtype=torch.bool)
    if units.group.axis in kept:
        mask = torch.zeros(units.size, dtype=torch.bool)
        mask[torch.from_numpy(kept[units.group.axis])] = True
    return mask


def _product(several: Any) -> dict[str, Tensor]:
    """Masks of weights that several units say something of."""
    result: dict[str, Tensor] = {}
    for masks in several:
        for name, mask in masks.items():
            result[name] = result[name] & mask if name in result else mask
    return result


def synchronised(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what stays as the first process says, so that all agree."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return kept
    for name, mask in kept.items():
        numbers = mask.to(torch.uint8)
        torch.distributed.broadcast(numbers, 0)
        kept[name] = numbers.bool()
    return kept
