"""Samples for pooling and interpolation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rules import Net, Sample, aten, sample


def _image(target: Any, rank: int, *args: Any, note: str = "") -> Sample:
    """One operator between two convolutions."""

    def function(net: Net, x: Tensor) -> Tensor:
        y = target(net.conv(x, 8).sin(), *args)
        return net.conv(y[0] * (1 + y[1]) if isinstance(y, tuple) else y, 3)

    return sample(target, function, 2, *(6, 5, 4)[:rank], groups=[8], note=note)


POOLS = [
    s
    for rank in (1, 2, 3)
    for s in (
        _image(getattr(aten, f"max_pool{rank}d").default, rank, [2] * rank, [2] * rank),
        _image(getattr(aten, f"max_pool{rank}d_with_indices").default, rank, [3] * rank, [1] * rank, [1] * rank),
        _image(getattr(aten, f"avg_pool{rank}d").default, rank, [3] * rank, [2] * rank, [1] * rank, True),
        _image(getattr(aten, f"adaptive_avg_pool{rank}d").default, rank, [2] * rank),
        _image(getattr(aten, f"adaptive_avg_pool{rank}d").default, rank, [1] * rank, note="global"),
        _image(getattr(aten, f"adaptive_max_pool{rank}d").default, rank, [2] * rank),
    )
]


def _resized(name: str, rank: int, *options: Any) -> list[Sample]:
    """Interpolation to a given size, and by a given factor."""
    packet = getattr(aten, name)
    return [
        _image(packet.default, rank, [7, 8, 9][:rank], *options),
        _image(packet.vec, rank, None, *options, [2.0] * rank),
        _image(packet.vec, rank, [7, 8, 9][:rank], *options, None, note="size"),
    ]


SAMPLES = [
    *POOLS,
    *_resized("upsample_nearest1d", 1),
    *_resized("upsample_nearest2d", 2),
    *_resized("upsample_nearest3d", 3),
    *_resized("upsample_linear1d", 1, False),
    *_resized("upsample_bilinear2d", 2, False),
    *_resized("upsample_bicubic2d", 2, True),
    *_resized("upsample_trilinear3d", 3, False),
    *_resized("_upsample_nearest_exact1d", 1),
    *_resized("_upsample_nearest_exact2d", 2),
    *_resized("_upsample_nearest_exact3d", 3),
    *[
        _image(getattr(aten, f"{kind}_pad{rank}d").default, rank, [1, 2] * rank)
        for kind in ("reflection", "replication")
        for rank in (1, 2, 3)
    ],
    *_resized("_upsample_bilinear2d_aa", 2, False),
    *_resized("_upsample_bicubic2d_aa", 2, False),
]
