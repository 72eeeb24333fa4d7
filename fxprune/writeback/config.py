"""A configuration that makes the smaller model, where its class has one that can say it.

Models of Hugging Face's libraries are built from a configuration: `type(model)(model.config)`. Numbers in it are
lowered as sizes of the model were (or as the ratio of two of them), one or two at a time, as long as more of what the
configuration builds on the meta device agrees with the smaller model: shapes of all tensors, and the attributes that
write-back had to change.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from fxprune.writeback.traced import Key, assign

#: A change of one number: the attribute of the configuration, its place in it, and the value.
Change = tuple[str, Key, int]


def configured(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return (path, module) of the outermost module that has a configuration and can save itself, or None."""
    for path, module in model.named_modules():
        if hasattr(module, "config") and hasattr(module, "save_pretrained"):
            return path, module
    return None


def express(small: nn.Module, path: str, dense: nn.Module, numbers: Mapping[Key, tuple[int, int]]) -> Any | None:
    """Return a configuration that builds the module at `path` of the smaller model, or None where there is none.

    Args:
        dense: the dense model.
        numbers: the attributes that write-back changed, and their (dense, present) values.
    """
    model, before = small.get_submodule(path), dense.get_submodule(path)
    prefix = f"{path}." if path else ""
    wanted: dict[Any, Any] = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    own = {
        (key[0].removeprefix(prefix), *key[1:]): now for key, (_, now) in numbers.items() if key[0].startswith(prefix)
    }
    pairs = set(numbers.values())
    for name, tensor in before.state_dict().items():
        pairs |= set(zip(tensor.shape, wanted.get(name, ()), strict=False))
    shares = {Fraction(new, old) for old, new in pairs if old and new and old != new}
    shares |= {a / b for a in shares for b in shares if a < b}

    def missing(config: Any) -> int:
        """How much of what the configuration builds is not as it is in the smaller model."""
        try:
            with torch.device("meta"):
                twin = type(model)(config)
        except Exception:  # the sizes do not go together
            return len(wanted) + len(own) + 1
        found = {name: tuple(t.shape) for name, t in twin.state_dict().items()}
        modules = dict(twin.named_modules(remove_duplicate=False))
        wrong = sum(found.get(name) != shape for name, shape in wanted.items()) + len(found.keys() - wanted.keys())
        wrong += sum(bool(_read(modules.get(key[0]), key[1:]) != now) for key, now in own.items())
        return int(wrong)

    config = copy.deepcopy(before.config)
    left = missing(config)
    while left:
        changes = list(_changes(before.config, config, shares))
        for several in itertools.chain(((c,) for c in changes), itertools.combinations(changes, 2)):
            trial = _changed(config, several)
            if (now := missing(trial)) < left:
                config, left = trial, now
                break
        else:
            return None
    return config


def _read(module: nn.Module | None, where: Key) -> Any:
    """The number at a place in a module's attributes, or None."""
    value: Any = module
    for step in where:
        if isinstance(value, dict | list | tuple):
            value = value.get(step) if isinstance(value, dict) else value[step] if step < len(value) else None
        else:
            value = getattr(value, str(step), None)
    return value


def _changes(dense: Any, config: Any, shares: set[Fraction]) -> Iterator[Change]:
    """Every number of the configuration, times every share that leaves it whole."""
    for name, value in vars(dense).items():
        if name.startswith("_") or name.endswith("_id"):
            continue
        places: list[tuple[Key, Any]] = [((), value)]
        if isinstance(value, list | tuple):
            places = [((i,), v) for i, v in enumerate(value)]
        for where, number in places:
            if type(number) is int and number > 1:
                now = _read_number(config, name, where)
                wanted = sorted({int(number * s) for s in shares if (number * s).denominator == 1} - {now})
                yield from ((name, where, new) for new in wanted)


def _read_number(config: Any, name: str, where: Key) -> Any:
    value = vars(config)[name]
    return value[where[0]] if where else value


def _changed(config: Any, changes: tuple[Change, ...]) -> Any:
    result = copy.deepcopy(config)
    for name, where, number in changes:
        result.__dict__[name] = assign(result.__dict__[name], where, number)
    return result
