"""The contract of a method: what it is told at each step, and what it says about units."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from fxprune.errors import RecipeError
from fxprune.passes.training.units import Units
from fxprune.registry import Registry, nearest

if TYPE_CHECKING:
    from fxprune.passes.training.pruning import Pruning

Kept = dict[str, Tensor]
"""Name of units -> which of them stay: bool, (units,)."""


class Method:
    """How it is decided what stays, while a model trains. A subclass is a dataclass whose fields are its options.

    A step is: `before_forward`, the user's forward and backward passes, `before_step`, the optimizer, `after_step`.

    Attributes:
        through: masked weights get the gradient of what is computed with them (straight through). Widths, heads and
            layers are then masked at `Units.gated` alone, because a unit that is zero at both its ends has none.
        trains_masked: the optimizer sees that gradient; else it is masked before.
        soft: weights are multiplied with gates of real numbers while the model trains.
        patterns: what may go as one: "any", "blocks" (elements, blocks), "axes" (widths, heads, layers) or "n:m".
        comparable: scores of different groups mean the same.
        targetless: what goes is said by something else than a target.
        zeroes: what is masked is zero when it comes back.
        tensors: names of the attributes that a checkpoint holds.
    """

    through: ClassVar[bool] = False
    trains_masked: ClassVar[bool] = False
    soft: ClassVar[bool] = False
    patterns: ClassVar[str] = "any"
    comparable: ClassVar[bool] = False
    targetless: ClassVar[bool] = False
    zeroes: ClassVar[bool] = False
    tensors: ClassVar[tuple[str, ...]] = ()

    def start(self, pruning: Pruning) -> None:
        """Look at what is to be pruned, before the first step."""

    def before_forward(self, pruning: Pruning) -> None:
        """Set gates."""

    def before_step(self, pruning: Pruning) -> None:
        """Look at gradients, and change them."""

    def after_step(self, pruning: Pruning) -> None:
        """Look at weights, and change them."""

    def scores(self, pruning: Pruning, units: Units) -> Tensor:
        """Return the scores of units, (units,), float; high ones stay."""
        raise NotImplementedError

    def keep(self, pruning: Pruning, share: float) -> Kept | None:
        """Return which units stay when a share of them is to go; None: those with the best scores."""
        return None

    def settle(self, pruning: Pruning) -> None:
        """Finish, after the last update: what stays is known now."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {name: getattr(self, name) for name in self.tensors}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name in self.tensors:
            setattr(self, name, state[name])


METHODS: Registry[type[Method]] = Registry("training method")
M = TypeVar("M", bound=type[Method])


def method(name: str) -> Callable[[M], M]:
    """Register a subclass of `Method`, and make it a dataclass whose fields are options by keyword."""

    def decorate(cls: M) -> M:
        cls = dataclasses.dataclass(kw_only=True, eq=False)(cls)  # type: ignore[assignment]
        METHODS.add(name, cls)
        return cls

    return decorate


def made(name: str, options: dict[str, Any]) -> Method:
    """Return a method with its options.

    Raises:
        RecipeError: there is no such method, or it has no such option.
    """
    cls = METHODS[name]
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise RecipeError(
                f"training method '{name}' has no option '{option}'{nearest(option, known) or '.'} "
                f"Known: {', '.join(known) or 'none'}"
            )
    return cls(**options)


def of_choice(what: str, value: Any, known: tuple[str, ...]) -> None:
    """Refuse an option that is none of a few names.

    Raises:
        RecipeError: it is not.
    """
    if value not in known:
        raise RecipeError(f"{what} is {' or '.join(known)}, not {value!r}")


def mean(units: Units, total: Tensor) -> Tensor:
    """Return sums over units as means over their entries, so that units of any size compare."""
    return total.float() if units.entries == 1 else total.float() / units.entries


def moving(old: Tensor | None, keep: float, new: Tensor, weigh: float) -> Tensor:
    """Return keep * old + weigh * new; the old one is overwritten."""
    return weigh * new if old is None else old.mul_(keep).add_(new, alpha=weigh)
