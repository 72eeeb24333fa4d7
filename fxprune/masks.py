"""Masks as text: which entries of a weight stay, one bit each, compressed."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Masks(dict[str, Tensor]):
    """Masks by the name of their weight; equal where all of them are.

    >>> Masks(a=torch.tensor([True])) == Masks(a=torch.tensor([True])), Masks(a=torch.tensor([True])) == Masks()
    (True, False)
    """

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, dict) or self.keys() != other.keys():
            return False
        return all(torch.equal(mask, other[name]) for name, mask in self.items())

    __hash__ = None


def encode(mask: Tensor) -> dict[str, Any]:
    """Return a mask as plain JSON values.

    >>> decode(encode(torch.tensor([[True, False]]))).tolist()
    [[True, False]]
    """
    bits = np.packbits(mask.cpu().numpy().reshape(-1)).tobytes()
    return {"shape": list(mask.shape), "bits": base64.b85encode(zlib.compress(bits)).decode()}


def decode(text: Mapping[str, Any]) -> Tensor:
    """Return a mask from what `encode` wrote; raises ValueError where it is something else."""
    shape = [int(n) for n in text["shape"]]
    try:
        bits = zlib.decompress(base64.b85decode(text["bits"]))
    except zlib.error as error:
        raise ValueError(f"a mask is altered: {error}") from error
    count = int(np.prod(shape))
    if len(bits) != -(-count // 8):
        raise ValueError(f"a mask of the shape {shape} has {len(bits)} bytes")
    return torch.from_numpy(np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=count).astype(bool)).reshape(shape)
