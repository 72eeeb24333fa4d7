"""Dimensions whose size may differ from call to call: which they are, and the same arguments at other sizes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxprune.errors import InputError
from fxprune.input_names import Dynamic, input_names

#: The name of the size that `dynamic=True` leaves open.
BATCH = "batch"


def named_leaves(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return every leaf of the arguments by its name (`fxprune.input_names`), in pytree order.

    >>> list(named_leaves(inspect.signature(lambda x, *more: 0), (1, [2, 3]), {}))
    ['x', 'more_0_0', 'more_0_1']
    """
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    return dict(zip(input_names(signature, args, kwargs), leaves, strict=True))


def split(leaves: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors among named leaves, and everything else.

    >>> tensors, constants = split({"x": torch.zeros(1), "causal": True})
    >>> list(tensors), constants
    (['x'], {'causal': True})
    """
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    return tensors, {name: leaf for name, leaf in leaves.items() if name not in tensors}


def places(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: bool | Dynamic
) -> dict[str, dict[int, str]]:
    """Return input name -> dimension -> size name for what a caller wants dynamic.

    True is dimension 0 of every tensor that has the first tensor's size there; False is nothing.

    Raises InputError where there is no batch, a name or a dimension is not there, or one size name has two sizes.

    >>> signature, x = inspect.signature(lambda x, scale: 0), torch.zeros(2, 3)
    >>> places(signature, (x, torch.zeros(1)), {}, True)
    {'x': {0: 'batch'}}
    """
    tensors = {n: v for n, v in named_leaves(signature, args, kwargs).items() if isinstance(v, Tensor)}
    if dynamic is True:
        first = next(iter(tensors.values()), None)
        if first is None or first.dim() == 0:
            raise InputError("the first tensor of the arguments has no batch dimension; pass one, or dynamic=False")
        return {n: {0: BATCH} for n, t in tensors.items() if t.dim() and t.shape[0] == first.shape[0]}
    found = {name: dict(dims) for name, dims in (dynamic or {}).items() if dims}
    for name, dims in found.items():
        if name not in tensors:
            raise InputError(f"'{name}' cannot be dynamic: the tensor inputs are {', '.join(tensors) or 'none'}")
        for dim in dims:
            if not 0 <= dim < tensors[name].dim():
                raise InputError(f"dimension {dim} of '{name}' cannot be dynamic: it has {tensors[name].dim()}")
    sizes(signature, args, kwargs, found)
    return found


def sizes(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Dynamic
) -> dict[str, int]:
    """Return size name -> the size that the arguments have.

    Raises InputError where two dimensions of one name have two sizes.
    """
    leaves = named_leaves(signature, args, kwargs)
    found: dict[str, int] = {}
    for name, dims in dynamic.items():
        for dim, label in dims.items():
            size = int(leaves[name].shape[dim])
            if found.setdefault(label, size) != size:
                raise InputError(
                    f"the size '{label}' is {found[label]} elsewhere but {size} in dimension {dim} of '{name}'; give "
                    "example inputs in which it is one number, or two names"
                )
    return found


def resized(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic: Dynamic,
    wanted: Mapping[str, int],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with each dynamic dimension at its wanted size: entries repeated, or the last ones left out.

    >>> signature = inspect.signature(lambda x, scale: 0)
    >>> given = torch.tensor([[1], [2]]), torch.tensor([7.0])
    >>> resized(signature, given, {}, {"x": {0: "batch"}}, {"batch": 3})[0]
    (tensor([[1],
            [2],
            [1]]), tensor([7.]))
    """
    leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
    names = input_names(signature, args, kwargs)
    for i, name in enumerate(names):
        for dim, label in dynamic.get(name, {}).items():
            entries = torch.arange(wanted[label], device=leaves[i].device) % leaves[i].shape[dim]
            leaves[i] = leaves[i].index_select(dim, entries)
    result: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, structure)
    return result


def sizes_to_trace(given: Mapping[str, int]) -> dict[str, int]:
    """Return sizes to record a graph at: none of them 1, which broadcasts, and no two equal, which could be confused.

    >>> sizes_to_trace({"batch": 1, "sequence": 2}), sizes_to_trace({"batch": 8, "sequence": 8})
    ({'batch': 3, 'sequence': 2}, {'batch': 9, 'sequence': 8})
    """
    # The batch last: any model takes more rows, but not every one a longer sequence.
    chosen: dict[str, int] = {}
    for label in sorted(given, key=lambda label: label == BATCH):
        candidates = (n for n in _nearby(label, given[label]) if n > 1 and n not in chosen.values())
        chosen[label] = next(candidates)
    return {label: chosen[label] for label in given}


def _nearby(label: str, size: int) -> Iterator[int]:
    smaller = range(0) if label == BATCH else range(size - 1, 1, -1)
    return itertools.chain([size], smaller, itertools.count(size + 1))


def other_sizes(given: Mapping[str, int]) -> dict[str, int]:
    """Return another size for each: one more row; of other sizes less, where there is enough, as models have limits.

    >>> other_sizes({"batch": 2, "sequence": 12, "width": 2})
    {'batch': 3, 'sequence': 10, 'width': 4}
    """
    return {k: n + 1 if k == BATCH else n - 2 if n >= 6 else n + 2 for k, n in given.items()}
