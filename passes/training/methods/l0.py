"""Gates that learn to close: hard-concrete L0 regularisation under a constraint, as in CoFi."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxprune.axes import Axis
from fxprune.errors import RecipeError
from fxprune.passes.training.method import Kept, Method, method, of_choice
from fxprune.passes.training.pruning import Pruning
from fxprune.passes.training.units import AxisUnits, LayerUnits, Units

#: Temperature and stretch of the hard-concrete distribution.
_BETA, _LOW, _HIGH = 2 / 3, -0.1, 1.1
#: Halvings of a bracket, and doublings until there is one.
_TRIALS = 12


@method("l0")
class L0(Method):
    """Every unit has a gate z, drawn from a hard-concrete distribution whose parameter learns.

    z = clamp(sigmoid((log u - log(1 - u) + a) / b) (1.1 + 0.1) - 0.1, 0, 1), b = 2/3; Louizos et al., "Learning Sparse
    Neural Networks through L0 Regularization" (2018), equations 10 and 11. What gates cost is held to the schedule's
    share t of the target. s is the expected share that is gone: of the units, or of the cost that the target names.
    Under a target `speedup` that is the measured time of the model's parts at the expected widths, interpolated between
    the widths that were timed.

    With `hold="lagrangian"` the loss has l1 (s - t) + l2 (s - t)^2 besides, whose multipliers ascend: Xia et al.,
    "Structured Pruning Learns Compact and Accurate Models" (CoFi, 2022), section 3.2. They take thousands of steps, and
    overshoot in short runs. With `hold="exact"` the one multiplier of the constraint s = t is solved for after each
    step, by bisection: all gates move along the slope of s until it is met.

    At the end the most probable units stay, as many as meet the target exactly, and their gates' values go into the
    weights that read them.

    Attributes:
        lr: of the gates.
        lr_multipliers: of l1 and l2.
        hold: "exact" or "lagrangian".
        initial: a at the start; a gate is open with probability sigmoid(a + b log(0.1 / 1.1)).
    """

    lr: float = 0.1
    lr_multipliers: float = 0.1
    hold: str = "exact"
    initial: float = 2.0
    through: ClassVar[bool] = True
    soft: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    patterns: ClassVar[str] = "axes"

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.lr_multipliers <= 0:
            raise RecipeError("l0: learning rates are positive")
        of_choice("l0: hold", self.hold, ("exact", "lagrangian"))
        self._gates: dict[str, Tensor] = {}
        self._noise: dict[str, Tensor] = {}
        self._multipliers = torch.zeros(2)
        self._optimizer: Any = None

    def start(self, pruning: Pruning) -> None:
        """Make the gates; under a target on the clock time the model's parts."""
        for u in pruning.units:
            spread = 0.01 * torch.randn(u.size, generator=pruning.generator)
            self._gates[u.name] = (self.initial + spread).requires_grad_()
        self._optimizer = torch.optim.Adam(self._gates.values(), lr=self.lr)
        goal = pruning.stage.target
        if goal is not None and goal.speedup is not None:
            pruning.time_parts()

    # ------------------------------------------------------------------ gates
    def _value(self, name: str, noise: Tensor) -> Tensor:
        stretched = torch.sigmoid((torch.logit(noise) + self._gates[name]) / _BETA) * (_HIGH - _LOW) + _LOW
        return stretched.clamp(0, 1)

    def _open(self, name: str) -> Tensor:
        """The probability that a gate is not zero."""
        return torch.sigmoid(self._gates[name] - _BETA * torch.log(torch.tensor(-_LOW / _HIGH)))

    def fixed(self, name: str) -> Tensor:
        """Return the gates without noise."""
        stretched = torch.sigmoid(self._gates[name].detach()) * (_HIGH - _LOW) + _LOW
        return stretched.clamp(0, 1)

    def before_forward(self, pruning: Pruning) -> None:
        """Draw gates, and set them."""
        if pruning.done:
            return
        for u in pruning.units:
            self._noise[u.name] = pruning.random(u.size)
        with torch.no_grad():
            pruning.set_gates({u.name: self._value(u.name, self._noise[u.name]) for u in pruning.units})

    def before_step(self, pruning: Pruning) -> None:
        """Move gates down the loss and the Lagrangian, multipliers up it."""
        if pruning.done or not self._noise:
            return
        for u in pruning.units:
            gates = self._gates[u.name]
            gates.grad = None
            value = self._value(u.name, self._noise[u.name])
            value.backward(pruning.at_reads(u).to(value.device, value.dtype).cpu())  # type: ignore[no-untyped-call]
        if self.hold == "lagrangian":
            self._pull(pruning)
        self._optimizer.step()
        if self.hold == "exact":
            self._project(pruning)

    # ------------------------------------------------------------------ the constraint
    def _pull(self, pruning: Pruning) -> None:
        """Add the Lagrangian's gradient to that of the gates, and move the multipliers up it."""
        gone, slopes = self._expected(pruning)
        off = gone - pruning.schedule.share(pruning.step, pruning.target)
        force = float(self._multipliers[0] + 2 * self._multipliers[1] * off)
        for u in pruning.units:
            pull = torch.full((u.size,), -force * slopes[u.name])
            self._open(u.name).backward(pull)  # type: ignore[no-untyped-call]
        self._multipliers += self.lr_multipliers * torch.tensor([off, off * off])

    def _project(self, pruning: Pruning) -> None:
        """Move all gates along the slope of what is gone, until as much is expected to be gone as the schedule says."""
        goal = pruning.schedule.share(pruning.step + 1, pruning.target)
        gone, slopes = self._expected(pruning)
        largest = max(abs(s) for s in slopes.values()) or 1.0
        start = {n: g.detach().clone() for n, g in self._gates.items()}

        def shifted(by: float) -> float:
            for name, gates in self._gates.items():
                gates.data.copy_(start[name] - by * slopes[name] / largest)
            return self._expected(pruning)[0]

        low = high = 0.0
        step = 0.25
        for _ in range(_TRIALS):  # a bracket, then halves of it
            if gone < goal:
                low, high = high, high + step
                if shifted(high) >= goal:
                    break
            else:
                low, high = low - step, low
                if shifted(low) <= goal:
                    break
            step *= 2
        for _ in range(_TRIALS):
            middle = (low + high) / 2
            low, high = (middle, high) if shifted(middle) < goal else (low, middle)

    def _expected(self, pruning: Pruning) -> tuple[float, dict[str, float]]:
        """The expected share that is gone, and by how much it falls with one more open unit of each."""
        numbers = {u.name: float(self._open(u.name).detach().sum()) for u in pruning.units}
        goal = pruning.stage.target
        cost = None if goal is None else goal.cost
        if cost is None:
            total = sum(u.size * u.counts for u in pruning.units)
            gone = 1 - sum(numbers[u.name] * u.counts for u in pruning.units) / total
            return gone, {u.name: u.counts / total for u in pruning.units}
        kind, costs = cost[0], pruning.costs
        whole = float(costs.of(kind, {}))
        if isinstance(pruning.units[0], LayerUnits):
            return self._of_layers(pruning.units[0], pruning, kind, whole)
        counts: Mapping[Axis, float] = {
            u.group.axis: numbers[u.name] for u in pruning.units if isinstance(u, AxisUnits)
        }
        slopes = {}
        for u in pruning.units:
            assert isinstance(u, AxisUnits)
            axis = u.group.axis
            low, high = max(numbers[u.name] - 0.5, 0.0), min(numbers[u.name] + 0.5, float(u.size))
            change = costs.change(kind, {axis: high}, {**counts, axis: low})  # type: ignore[dict-item]
            slopes[u.name] = float(change) / max(high - low, 1e-9) / whole
        return 1 - float(costs.of(kind, counts)) / whole, slopes  # type: ignore[arg-type]

    def _of_layers(
        self, units: LayerUnits, pruning: Pruning, kind: str, whole: float
    ) -> tuple[float, dict[str, float]]:
        """Each branch counts as what the model saves without it alone."""
        costs = pruning.subject.costs
        if not hasattr(self, "_saved"):
            self._saved = torch.tensor(
                [1 - costs.without({b.total: b.stream}).of(kind, {}) / whole for b in units.blocks]
            )
        closed = 1 - self._open(units.name).detach()
        return float((closed * self._saved).sum()), {units.name: float(self._saved.mean())}

    # ------------------------------------------------------------------ the end
    def scores(self, pruning: Pruning, units: Units) -> Tensor:
        """Return the probabilities that gates are open."""
        return self._open(units.name).detach()

    def keep(self, pruning: Pruning, share: float) -> Kept | None:
        """Return the units whose gates are likelier open than closed, and at the end as many as the target says."""
        if pruning.step >= pruning.schedule.end:
            return None
        kept = {u.name: self.scores(pruning, u) > 0.5 for u in pruning.units}
        for u in pruning.units:
            if not bool(kept[u.name].any()):
                kept[u.name][int(self.scores(pruning, u).argmax())] = True
        return kept

    def settle(self, pruning: Pruning) -> None:
        """Put the gates' values into the weights that read the units."""
        for u in pruning.units:
            value = torch.where(pruning.kept[u.name], self.fixed(u.name).clamp_min(1e-3), torch.ones(u.size))
            for name, factor in u.expand(value).items():
                pruning.subject.weights.scale(name, factor)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {
            "gates": {n: g.detach() for n, g in self._gates.items()},
            "noise": self._noise,
            "multipliers": self._multipliers,
            "optimizer": self._optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        with torch.no_grad():
            for name, gates in state["gates"].items():
                self._gates[name].copy_(gates)
        self._noise, self._multipliers = dict(state["noise"]), state["multipliers"]
        self._optimizer.load_state_dict(state["optimizer"])
