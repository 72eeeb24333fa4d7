"""Optimizers of torch by name, and how their rate goes over a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from fxprune.errors import RecipeError
from fxprune.registry import Registry

if TYPE_CHECKING:
    from fxprune.training.recipe import OptimizerKeys

OPTIMIZERS: Registry[type[torch.optim.Optimizer]] = Registry("optimizer")
for _name, _cls in {
    "adadelta": torch.optim.Adadelta,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}.items():
    OPTIMIZERS.add(_name, _cls)

#: The share of the way that is done, from 0 to 1 -> from 1 at the start to 0 at the end.
Fall = Callable[[float], float]
FALLS: Registry[Fall] = Registry("learning rate schedule")


@FALLS.register("constant")
def _constant(done: float) -> float:
    """The full rate throughout."""
    return 1.0


@FALLS.register("linear")
def _linear(done: float) -> float:
    """Down a straight line."""
    return 1 - done


@FALLS.register("cosine")
def _cosine(done: float) -> float:
    """Down half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * done))


def rate(keys: OptimizerKeys, done: int, steps: int) -> float:
    """Return the share of the full rate for the step behind `done` steps of all: up during warmup, then down.

    >>> from fxprune.training.recipe import OptimizerKeys
    >>> [round(rate(OptimizerKeys(schedule="linear", warmup=0.2), done, 10), 3) for done in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    warm = round(keys.warmup * steps)
    if done < warm:
        return (done + 1) / warm
    return keys.final + (1 - keys.final) * FALLS[keys.schedule](min(1.0, (done - warm) / max(1, steps - warm)))


def optimizer(keys: OptimizerKeys, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer that a recipe names, over parameters that take gradients.

    Raises:
        RecipeError: there is none of this name, or it has no such option.

    >>> from fxprune.training.recipe import OptimizerKeys
    >>> made = optimizer(OptimizerKeys(name="sgd", lr=0.1, momentum=0.9), nn.Linear(2, 2).parameters())
    >>> type(made).__name__, made.param_groups[0]["momentum"]
    ('SGD', 0.9)
    """
    cls = OPTIMIZERS[keys.name]
    given = keys.model_dump(include={"weight_decay", "momentum", "nesterov", "betas", "eps"}, exclude_none=True)
    known = inspect.signature(cls).parameters
    for option in given:
        if option not in known:
            raise RecipeError(f"optimizer: '{keys.name}' has no '{option}'; leave it out, or take another optimizer")
    return cls([p for p in parameters if p.requires_grad], lr=keys.lr, **given)  # type: ignore[call-arg]
