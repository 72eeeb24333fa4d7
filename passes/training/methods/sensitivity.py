"""Gradients: how much the loss depends on a unit."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fxprune.errors import RecipeError
from fxprune.passes.training.method import Method, mean, method, moving, of_choice
from fxprune.passes.training.pruning import Pruning
from fxprune.passes.training.units import Units


class _Accumulated(Method):
    """Scores that add up over steps."""

    comparable: ClassVar[bool] = True
    tensors: ClassVar[tuple[str, ...]] = ("_sums",)

    def __post_init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def _weights(self) -> tuple[float, float]:
        """What the scores so far, and those of a step, are multiplied with."""
        return 1.0, 1.0

    def _now(self, pruning: Pruning, units: Units) -> Tensor:
        """The scores of this step."""
        return mean(units, units.reduce(lambda n: (pruning.value(n) * pruning.gradient(n)).abs_()))

    def before_step(self, pruning: Pruning) -> None:
        """Add this step's scores, as long as anything is chosen by them."""
        if pruning.done:
            return
        keep, weigh = self._weights()
        for u in pruning.units:
            self._sums[u.name] = moving(self._sums.get(u.name), keep, self._now(pruning, u), weigh)

    def scores(self, pruning: Pruning, units: Units) -> Tensor:
        """Return the scores of units; before any gradient was seen those are |w|."""
        found = self._sums.get(units.name)
        return mean(units, units.reduce(lambda n: pruning.value(n).abs())) if found is None else found


@method("snip")
class Snip(_Accumulated):
    """The sensitivity |w g| of the connections of a model that has not been trained yet.

    Lee et al., "SNIP" (2019), equation 4. The gradient is that of the first `batches` steps, in which no weight moves;
    the first update of the schedule should come after them.

    Attributes:
        batches: steps that are looked at; 0 for Neural Compressor's `snip`: weights move from the first step on, and
            an update looks at the sensitivity in the step before it.
    """

    batches: int = 1
    tensors: ClassVar[tuple[str, ...]] = ("_sums", "_seen")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches < 0:
            raise RecipeError(f"snip: batches is a number of steps, not {self.batches}")
        self._seen = 0

    def _weights(self) -> tuple[float, float]:
        return (1.0, 1.0) if self.batches else (0.0, 1.0)

    def before_step(self, pruning: Pruning) -> None:
        """Add this step's scores, and let no weight move, as long as there are batches to look at."""
        if self.batches and self._seen >= self.batches:
            return
        super().before_step(pruning)
        if not self.batches:
            return
        self._seen += 1
        for parameter in pruning.subject.weights.model.parameters():
            parameter.grad = None


@method("snip_momentum")
class SnipMomentum(_Accumulated):
    """|w g| with momentum: S <- keep S + weigh |w g|, Neural Compressor's default.

    Its document writes 1.0 S + 0.9 |w g|, its code computes 0.9 S + 1.0 |w g|; the code's forgets, the document's never
    does.

    Attributes:
        form: "code" or "document".
    """

    form: str = "code"

    def __post_init__(self) -> None:
        super().__post_init__()
        of_choice("snip_momentum: form", self.form, ("code", "document"))

    def _weights(self) -> tuple[float, float]:
        return (0.9, 1.0) if self.form == "code" else (1.0, 0.9)


@method("gradient")
class Gradient(_Accumulated):
    """The size of the gradient: S <- momentum S + |g|. Units that the loss no longer wants to move go.

    Attributes:
        momentum: in [0, 1); with 0 it is Neural Compressor's `gradient`, that of the last step alone.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"gradient: momentum is a share in [0, 1), not {self.momentum}")

    def _weights(self) -> tuple[float, float]:
        return self.momentum, 1.0

    def _now(self, pruning: Pruning, units: Units) -> Tensor:
        return mean(units, units.reduce(lambda n: pruning.gradient(n).abs()))


@method("sensitivity")
class Sensitivity(_Accumulated):
    """How much the loss depends on a mask on the unit: the sum over steps of |dL/dm|.

    m is a factor on the unit where it is read, a head or a hidden unit, or on a block of weights. Michel et al., "Are
    Sixteen Heads Really Better than One?" (2019), equation 2; Kim and Awadalla, "FastFormers" (2020). The gradient is
    that of a step, a mean over its batch. What is masked has none: its sum stays as it is.
    """

    comparable: ClassVar[bool] = False

    def _now(self, pruning: Pruning, units: Units) -> Tensor:
        return pruning.at_reads(units).abs()
