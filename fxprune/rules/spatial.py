"""Pooling and interpolation: channels pass, positions stay whole."""

from __future__ import annotations

from typing import Any

from fxprune.axes import Fixed
from fxprune.rules.core import Dims, Site, aten, rule


def _pool(rank: int) -> Any:
    def pool(site: Site, x: Dims, *_: Any, **__: Any) -> Any:
        shapes = site.shape if isinstance(site.shape, list) else [site.shape]
        for d in x[-rank:]:
            site.freeze(d, "it is a spatial dimension")
        outs = [(*x[:-rank], *(Fixed(s, "a spatial dimension") for s in shape[-rank:])) for shape in shapes]
        return outs if isinstance(site.shape, list) else outs[0]

    return pool


rule(aten.max_pool1d, aten.avg_pool1d, aten.adaptive_avg_pool1d, aten.adaptive_max_pool1d)(_pool(1))
rule(aten.max_pool2d, aten.avg_pool2d, aten.adaptive_avg_pool2d, aten.adaptive_max_pool2d)(_pool(2))
rule(aten.max_pool3d, aten.avg_pool3d, aten.adaptive_avg_pool3d, aten.adaptive_max_pool3d)(_pool(3))
rule(aten.max_pool1d_with_indices, aten.upsample_nearest1d, aten.upsample_linear1d)(_pool(1))
rule(aten.max_pool2d_with_indices, aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d)(_pool(2))
rule(aten._upsample_nearest_exact2d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa)(_pool(2))
rule(aten.max_pool3d_with_indices, aten.upsample_nearest3d, aten.upsample_trilinear3d)(_pool(3))
rule(aten._upsample_nearest_exact1d)(_pool(1))
rule(aten._upsample_nearest_exact3d)(_pool(3))
