"""A zoo of models to measure coverage on: random weights, seeded, nothing downloaded.

One file for each shelf; a shelf has `NAMES` and `build(name) -> (model in eval mode, example inputs)`. What a model is
made for does not matter here: whether it can be captured, pruned and proved does, and how long that takes.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bench.shims import shim_torchvision

SHELVES = ("timm", "transformers", "further", "torchvision", "handmade")


def names(patterns: Iterable[str] = (), shelves: Iterable[str] = SHELVES) -> list[tuple[str, str]]:
    """Return (shelf, name) of every model that matches one of the globs; of all without any.

    >>> names(["bert"], ["transformers"])
    [('transformers', 'bert')]
    """
    wanted = list(patterns)
    found = [(shelf, name) for shelf in shelves for name in importlib.import_module(f"bench.zoo.{shelf}").NAMES]
    return [(s, n) for s, n in found if not wanted or any(fnmatch.fnmatchcase(n, glob) for glob in wanted)]


def build(shelf: str, name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a model and inputs for it, the same each time."""
    shim_torchvision()
    torch.manual_seed(0)
    model, inputs = importlib.import_module(f"bench.zoo.{shelf}").build(name)
    return model.eval(), inputs
