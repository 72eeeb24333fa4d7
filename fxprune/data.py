"""What the command line calls `--calibration`, turned into batches: a number, a Python name, or a file (no pickle)."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from safetensors.torch import load_file
from torch import Tensor

from fxprune import named
from fxprune.errors import InputError
from fxprune.sources import Source, describe_inputs

_WANTED = "an iterable of batches or a function that returns one"


def _load_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_numpy(path: Path) -> Any:
    found = np.load(path, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return found
    with found:
        return {name: found[name] for name in found.files}


#: Ending -> what reads such a file.
READERS: dict[str, Callable[[Path], Any]] = {
    ".pt": _load_torch,
    ".pth": _load_torch,
    ".npz": _load_numpy,
    ".npy": _load_numpy,
    ".safetensors": load_file,
}
FORMS = ("a number of random samples", "FILE.py:NAME or MODULE:NAME", f"a file ending in {', '.join(READERS)}")


@dataclass(frozen=True, slots=True)
class Data:
    """Calibration data as they were given.

    Attributes:
        what: as on the command line.
        value: a number of random samples; a tensor, array, tuple or dict of many rows; or a list of batches.
    """

    what: str
    value: Any

    def batches(self, source: Source) -> int | list[Any]:
        """Return a number of random samples, or batches; many rows are cut into batches as large as the example's.

        A tuple is one batch of many rows: inputs and what follows them. A list, and whatever else is iterable, holds
        batches.

        Raises:
            InputError: there is no batch, or what is to be cut has no rows, or not the same number of rows throughout.
        """
        if isinstance(self.value, int):
            return self.value
        found = self._cut(source) if _whole(self.value) else self.value
        if not found:
            raise InputError(f"'{self.what}' yields no batch")
        return found

    def describe(self, batches: int | list[Any]) -> str:
        """Return what `batches` gave in a few words."""
        if isinstance(batches, int):
            return f"{batches} samples of random numbers, not data"
        first = batches[0]
        if isinstance(first, Mapping):
            shown = describe_inputs((), dict(first))
        else:
            shown = describe_inputs(tuple(first) if isinstance(first, list | tuple) else (first,), {})
        return f"{self.what}, {len(batches)} batches, the first {shown}"

    def _cut(self, source: Source) -> list[Any]:
        if self.what.endswith(".safetensors"):
            self._check_names(source)
        leaves, spec = pytree.tree_flatten(self.value)
        leaves = [self._tensor(leaf) for leaf in leaves]
        counts = {len(x) for x in leaves if isinstance(x, Tensor) and x.dim()}
        if len(counts) != 1:
            shapes = ", ".join(str(tuple(x.shape)) for x in leaves if isinstance(x, Tensor))
            why = "tensors of different numbers of rows" if counts else "no tensor with rows"
            raise InputError(f"'{self.what}' holds {why}{f': {shapes}' if shapes else ''}")
        example = next((x for x in pytree.tree_leaves((source.args, source.kwargs)) if isinstance(x, Tensor)), None)
        size = len(example) if example is not None and example.dim() else 1
        device = example.device if example is not None else "cpu"

        def rows(leaf: Any, start: int) -> Any:
            return leaf[start : start + size].to(device) if isinstance(leaf, Tensor) and leaf.dim() else leaf

        starts = range(0, counts.pop(), size)
        return [pytree.tree_unflatten([rows(leaf, start) for leaf in leaves], spec) for start in starts]

    def _tensor(self, leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray):
            return leaf
        try:
            return torch.from_numpy(np.ascontiguousarray(leaf.astype(leaf.dtype.newbyteorder("="))))
        except TypeError:
            raise InputError(f"'{self.what}' holds an array of {leaf.dtype}, which no tensor can hold") from None

    def _check_names(self, source: Source) -> None:
        """Tensors in this format have no order, so that positional inputs are found by their names."""
        positional = list(inspect.signature(source.module.forward).parameters)[: len(source.args)]
        missing = [name for name in positional if name not in self.value]
        if missing and len(self.value) > 1:
            raise InputError(
                f"'{self.what}' holds {', '.join(sorted(self.value))}, but no {' and no '.join(missing)}: tensors in "
                "such files have no order, so name them as the model's inputs are called"
            )


def read_data(what: str, seed: int = 0) -> Data:
    """Return the calibration data that a text names.

    Args:
        seed: of what a function draws; the global random state is left as it was.

    Raises:
        InputError: there is no such file or name, its form or ending is unknown, or reading it fails.

    >>> read_data("64")
    Data(what='64', value=64)
    """
    if re.fullmatch(r"[+-]?\d+", what):
        if int(what) < 1:
            raise InputError(f"--calibration {what}: this is no number of samples; take a few hundred")
        return Data(what, int(what))
    if named.is_name(what):
        return Data(what, _named(what, seed))
    path = Path(what)
    if path.suffix not in READERS:
        raise InputError(f"--calibration {what}: this is none of: {'; '.join(FORMS)}")
    if not path.is_file():
        raise InputError(f"there is no file '{path}'")
    try:
        value = READERS[path.suffix](path)
    except Exception as error:  # damaged files fail in many ways
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError) or "pickle" in text:
            text = "it is damaged, or holds pickled objects"
        raise InputError(
            f"'{path}' cannot be read as {path.suffix}: {text}. Save tensors or arrays, in tuples, lists and dicts"
        ) from error
    if not isinstance(value, list) and not _whole(value):
        raise InputError(f"'{path}' holds {type(value).__name__}, not a tensor, tuple, dict or list of batches")
    return Data(what, value)


def _named(what: str, seed: int) -> Any:
    found = named.load(what, _WANTED, seed)
    told = f"'{what}' is of type {type(found).__name__}, not {_WANTED}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if callable(found) and not isinstance(found, Iterable):
            found = named.call(what, found)
            told = f"'{what}' returns {type(found).__name__}, not an iterable of batches"
        if isinstance(found, str | bytes) or not isinstance(found, Iterable):
            raise InputError(told)
        return found if _whole(found) else named.call(what, list, found)


def _whole(value: Any) -> bool:
    """Whether all rows come in one piece, to be cut into batches."""
    return isinstance(value, Tensor | np.ndarray | tuple | Mapping)
