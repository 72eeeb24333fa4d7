"""One name for each leaf of a model's inputs: those of graph placeholders, of `dynamic_shapes` and of ONNX inputs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.utils._pytree as pytree

#: Input name -> dimension -> name of its size: the dimensions that may differ from call to call.
Dynamic = Mapping[str, Mapping[int, str]]


def positional_names(signature: inspect.Signature, count: int) -> list[str]:
    """Return a name for each of `count` positional arguments; those that `*rest` takes are rest_0, rest_1, ...

    >>> positional_names(inspect.signature(lambda x, *rest, flag=True: 0), 3)
    ['x', 'rest_0', 'rest_1']
    """
    parameters = signature.parameters.values()
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in named][:count]
    rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL), "arg")
    return [*names, *(f"{rest}_{i}" for i in range(count - len(names)))]


def input_names(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Return one name for each leaf of (args, kwargs), in pytree order: the parameter's, then the keys that lead there.

    >>> input_names(inspect.signature(lambda x, *, options: 0), (1,), {"options": {"masks": [2, 3]}})
    ['x', 'options_masks_0', 'options_masks_1']
    """
    positional = positional_names(signature, len(args))
    names: list[str] = []
    keys: Any
    for keys, _ in pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))[0]:
        head = positional[keys[1].idx] if keys[0].idx == 0 else str(keys[1].key)
        name = "_".join(re.findall(r"\w+", f"{head} {pytree.keystr(keys[2:])}"))
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def renamed(dynamic: Dynamic, names: Sequence[str], others: Sequence[str]) -> dict[str, dict[int, str]]:
    """Return `dynamic` with each of `names` replaced by the one at its place in `others`.

    >>> renamed({"x": {0: "batch"}}, ["mask", "x"], ["mask", "image"])
    {'image': {0: 'batch'}}
    """
    places = dict(zip(names, others, strict=True))
    return {places[name]: dict(sizes) for name, sizes in dynamic.items()}
