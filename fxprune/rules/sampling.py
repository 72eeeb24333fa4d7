"""Pictures read at places that are computed: grids, regions of interest, deformable convolutions, unpooling."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxprune.axes import Fixed, Misfit, divide, product, size_of
from fxprune.rules.core import Dims, Literals, Site, aten, rule

_WHY = "a spatial dimension"


@rule(aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sampler(site: Site, x: Dims, grid: Dims, *_: Any) -> Dims:
    """x (N, C, ...), grid (N, ..., rank) -> (N, C, ...): channels pass."""
    for d in (*x[2:], *grid[1:]):
        site.freeze(d, "it is a spatial dimension")
    (batch,) = site.broadcast((x[0],), (grid[0],))
    return (batch, x[1], *(Fixed(s, _WHY) for s in site.shape[2:]))


@rule(aten.affine_grid_generator.default)
def affine_grid(site: Site, theta: Dims, *_: Any) -> Dims:
    """theta (N, rank, rank + 1) -> (N, ..., rank)."""
    for d in theta[1:]:
        site.freeze(d, "it is an affine map")
    return (theta[0], *(Fixed(s, _WHY) for s in site.shape[1:]))


@rule(aten.max_unpool2d.default, aten.max_unpool3d.default)
def max_unpool(site: Site, x: Dims, index: Dims, *_: Any) -> Dims:
    """Entries go back to where pooling took them from; channels pass."""
    rank = 2 if site.node.target is aten.max_unpool2d.default else 3
    for d in (*x[-rank:], *index[-rank:]):
        site.freeze(d, "it is a spatial dimension")
    return (*site.broadcast(x[:-rank], index[:-rank]), *(Fixed(s, _WHY) for s in site.shape[-rank:]))


@rule(aten.fractional_max_pool2d.default, aten.fractional_max_pool3d.default)
def fractional_max_pool(site: Site, x: Dims, kernel: Any, output: Any, samples: Dims) -> list[Dims]:
    """x (N, C, ...), samples (N, C, rank): where each picture's regions begin."""
    rank = 2 if site.node.target is aten.fractional_max_pool2d.default else 3
    for d in (*x[-rank:], samples[2]):
        site.freeze(d, "it is a spatial dimension")
    if len(x) == rank + 2:
        site.broadcast(x[:2], samples[:2])
    else:
        site.unify(x[0], samples[1])
    return [(*x[:-rank], *(Fixed(s, _WHY) for s in site.shape[0][-rank:]))] * 2


# ---------------------------------------------------------------------- torchvision
@rule("torchvision.roi_align.default", "torchvision.roi_pool.default")
def roi_align(site: Site, x: Dims, rois: Dims, *_: Any) -> Any:
    """x (N, C, H, W), rois (K, 5), whose first column is a picture's number -> (K, C, h, w)."""
    for d in (x[0], *x[2:], rois[1]):
        site.freeze(d, "regions of it are taken by number")
    many = isinstance(site.shape, list)
    outs = [(rois[0], x[1], *(Fixed(s, _WHY) for s in shape[2:])) for shape in (site.shape if many else [site.shape])]
    return outs if many else outs[0]


@rule("torchvision.nms.default")
def nms(site: Site, boxes: Dims, scores: Dims, *_: Any) -> Any:
    """Which boxes are kept depends on all of them."""
    for d in (*boxes, *scores):
        site.freeze(d, "boxes are compared with each other")
    return site.outputs("boxes that are kept")


def _groups(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    groups, _ = rw.split(rw.dims(args["input"])[1], args["groups"])
    return {"groups": rw.size(groups)}


@rule("torchvision.deform_conv2d.default", literals=_groups)
def deform_conv2d(site: Site, x: Dims, weight: Dims, offset: Dims, mask: Dims, bias: Dims, *rest: Any) -> Dims:
    """A convolution (groups, in) -> (groups, out) whose taps are moved by `offset`, and weighted by `mask`.

    rest: strides, paddings, dilations (two each), groups, offset groups, whether the mask is used. Every offset group
    moves a run of channels, all of which take part.
    """
    groups, movers = rest[6:8]
    if divide(size_of(x[1]), movers) is None:
        raise Misfit("offset groups of different sizes")
    out = site.axes.split(weight[0], groups, site.node)
    into = site.axes.split(x[1], groups, site.node)
    site.unify(into[1], weight[1])
    site.unify(into[0], out[0])
    if movers > 1:
        moved, _ = site.axes.split(x[1], movers, site.node)
        site.freeze(moved, "each run of channels is moved by its own offsets")
    for d in (*offset[1:], *mask[1:], *weight[2:], *x[2:]):
        site.freeze(d, "it is a spatial or a kernel dimension, or counts them")
    channels = site.axes.resolve(product(out))
    site.unify(bias[0], channels)
    result = (x[0], channels, *(Fixed(s, _WHY) for s in site.shape[2:]))
    site.multiply(*result, weight[1], *weight[2:])
    return result
