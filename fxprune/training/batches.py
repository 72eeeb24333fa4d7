"""Batches as a training loop takes them: epoch by epoch, inputs and labels apart, on the model's device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fxprune.errors import InputError

#: Rows of a batch of a Dataset, where nothing is said.
ROWS = 32


@dataclass(frozen=True, slots=True)
class Given:
    """One batch: what the model is called with, and what its output is compared with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any


@dataclass(frozen=True, slots=True)
class Feed:
    """Where batches come from.

    Attributes:
        source: an iterable that can be gone through again for every epoch, or a function epoch -> iterable.
        count: how many positional inputs the model takes.
        names: of its keyword inputs.
    """

    source: Any
    count: int
    names: tuple[str, ...]

    @classmethod
    def of(cls, batches: Any, args: Sequence[Any], kwargs: Mapping[str, Any], rows: int | None, seed: int) -> Feed:
        """Return a feed of a loader, a list, a Dataset or a function.

        Args:
            args, kwargs: the example inputs.
            rows: of a batch of a Dataset.
            seed: of the order of a Dataset.

        Raises:
            InputError: it can be gone through only once, or not at all.
        """
        if isinstance(batches, Dataset):
            batches = _shuffled(batches, rows or ROWS, seed)
        elif isinstance(batches, Iterator):
            raise InputError(
                "batches: an iterator is used up after one epoch: pass a DataLoader, a list, or a function epoch -> "
                "iterable"
            )
        elif not callable(batches) and not isinstance(batches, Iterable):
            raise InputError(f"batches: {type(batches).__name__} holds no batches: pass a DataLoader or a list")
        return cls(batches, len(args), tuple(kwargs))

    def epoch(self, number: int) -> Iterable[Any]:
        """Return the batches of an epoch.

        Raises:
            InputError: the function gives something else.
        """
        if not callable(self.source):
            return self.source  # type: ignore[no-any-return]
        found = self.source(number)
        if not isinstance(found, Iterable):
            raise InputError(f"batches: the function gives {type(found).__name__} for epoch {number}, no iterable")
        return found

    def per_epoch(self) -> int | None:
        """Return how many batches make an epoch, None where that is not known."""
        first = self.epoch(0)
        return len(first) if isinstance(first, Sized) else None

    def given(self, item: Any, device: torch.device) -> Given:
        """Return inputs and labels of a batch, on a device.

        >>> feed = Feed([], 1, ())
        >>> found = feed.given((torch.zeros(4, 8), torch.ones(4)), torch.device("cpu"))
        >>> len(found.args), found.labels.shape
        (1, torch.Size([4]))
        """
        moved = pytree.tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), item)
        return Given(*self._parts(moved))

    def _parts(self, item: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        if isinstance(item, Mapping):
            known = {k: item[k] for k in self.names if k in item}
            rest = {k: v for k, v in item.items() if k not in known}
            return (), known, next(iter(rest.values())) if len(rest) == 1 else rest or None
        if isinstance(item, Tensor) or not isinstance(item, Sequence):
            return (item,), {}, None
        first = item[0] if item else None
        if isinstance(first, Mapping) or (isinstance(first, list | tuple) and len(item) <= 2):
            labels = item[1] if len(item) > 1 else None
            if isinstance(first, Mapping):
                return (), {k: first[k] for k in self.names if k in first}, labels
            return tuple(first), {}, labels
        more = tuple(item[self.count :])
        return tuple(item[: self.count]), {}, more[0] if len(more) == 1 else more or None


def _shuffled(data: Any, rows: int, seed: int) -> Callable[[int], Iterable[Any]]:
    """Batches of a Dataset, in an order of each epoch's own."""

    def epoch(number: int) -> Iterable[Any]:
        order = torch.Generator().manual_seed(seed + number)
        return DataLoader(data, batch_size=rows, shuffle=True, generator=order)

    return epoch
