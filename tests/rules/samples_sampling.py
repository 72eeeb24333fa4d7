"""Samples for pictures read at places that are computed.

Where torchvision's compiled operators are missing they are declared here with the same meaning, for the tests alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.shims import shim_torchvision
from rules import Net, Sample, aten, sample

_ROI = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_DEFORM = (
    "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, "
    "SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, SymInt offset_groups, "
    "bool use_mask"
)
_COMPOSITE = "CompositeImplicitAutograd"


def _roi_align(x: Tensor, rois: Tensor, scale: float, height: int, width: int, *_: Any) -> Tensor:
    """One sample in the middle of each cell."""
    size = torch.tensor([x.shape[3], x.shape[2]]).to(x)
    start, end = rois[:, 1:3] * scale / size, rois[:, 3:5] * scale / size
    across = (torch.arange(width).to(x) + 0.5) / width
    down = (torch.arange(height).to(x) + 0.5) / height
    u = start[:, 0, None] + (end - start)[:, 0, None] * across
    v = start[:, 1, None] + (end - start)[:, 1, None] * down
    grid = torch.stack([u[:, None, :].expand(-1, height, -1), v[:, :, None].expand(-1, -1, width)], -1) * 2 - 1
    return F.grid_sample(x[rois[:, 0].to(torch.int64)], grid, align_corners=False)


def _roi_pool(*args: Any) -> tuple[Tensor, Tensor]:
    result = _roi_align(*args)
    return result, torch.zeros_like(result, dtype=torch.int32)


def _deform_conv2d(x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *numbers: int) -> Tensor:
    """Read every tap at its own place, then convolve the taps."""
    stride, pad, dilation = numbers[0:2], numbers[2:4], numbers[4:6]
    groups, movers, use_mask = numbers[6:9]
    rows, columns = offset.shape[2:]
    height, width = weight.shape[2:]
    place = offset.view(x.shape[0], movers, height * width, 2, rows, columns)
    taps = []
    for tap in range(height * width):
        i, j = divmod(tap, width)
        y = torch.arange(rows).to(x)[:, None] * stride[0] - pad[0] + i * dilation[0] + place[:, :, tap, 0]
        z = torch.arange(columns).to(x) * stride[1] - pad[1] + j * dilation[1] + place[:, :, tap, 1]
        grid = torch.stack([(z * 2 + 1) / x.shape[3] - 1, (y * 2 + 1) / x.shape[2] - 1], -1)
        read = F.grid_sample(x.reshape(x.shape[0] * movers, -1, *x.shape[2:]), grid.flatten(0, 1), align_corners=False)
        if use_mask:
            read = read * mask.view(x.shape[0] * movers, -1, rows, columns)[:, tap, None]
        taps.append(read.view(x.shape[0], -1, rows, columns))
    whole = torch.stack(taps, 2).view(x.shape[0], groups, -1, height * width, rows, columns)
    result = torch.einsum("ngcthw,goct->ngohw", whole, weight.view(groups, -1, weight.shape[1], height * width))
    return result.flatten(1, 2) + bias[:, None, None]


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return scores.argsort(descending=True)


_STAND_INS: dict[str, tuple[str, Callable[..., Any]]] = {
    "roi_align": (f"({_ROI}, int sampling_ratio, bool aligned) -> Tensor", _roi_align),
    "roi_pool": (f"({_ROI}) -> (Tensor, Tensor)", _roi_pool),
    "deform_conv2d": (f"({_DEFORM}) -> Tensor", _deform_conv2d),
    "nms": ("(Tensor dets, Tensor scores, float iou_threshold) -> Tensor", _nms),
}


def _operators() -> Any:
    """torchvision's operators, or stand-ins for those that are not compiled."""
    shim_torchvision()
    for name, (schema, function) in _STAND_INS.items():
        full = f"torchvision::{name}"
        if not torch._C._dispatch_has_kernel(full):
            torch.library.define(full, schema)
        kernels = [torch._C._dispatch_has_kernel_for_dispatch_key(full, key) for key in ("CPU", _COMPOSITE)]
        if not any(kernels):
            torch.library.impl(full, _COMPOSITE)(function)
    return torch.ops.torchvision


vision = _operators()


def _grid(net: Net, x: Tensor, rank: int) -> Tensor:
    """(N, 4, ..., rank): an affine map for each picture."""
    theta = net.linear(x.flatten(2).mean(2), rank * (rank + 1)).view(-1, rank, rank + 1) * 0.3
    return aten.affine_grid_generator.default(theta, [x.shape[0], 1, *(4,) * rank], False)  # type: ignore[no-any-return]


def _sampled(target: Any, rank: int) -> Sample:
    return sample(
        [target, aten.affine_grid_generator.default],
        lambda net, x: net.conv(target(net.conv(x, 8).sin(), _grid(net, x, rank), 0, 0, False), 3),
        *(2, 5, 4, 3)[: rank + 1],
        groups=[8],
    )


def _unpooled(target: Any, rank: int, *more: Any) -> Sample:
    pool = (aten.max_pool2d_with_indices, aten.max_pool3d_with_indices)[rank - 2].default

    def function(net: Net, x: Tensor) -> Tensor:
        pooled, index = pool(net.conv(x, 8).sin(), [2] * rank, [2] * rank)
        return net.conv(target(pooled.cos(), index, [4] * rank, *more), 3)

    return sample(target, function, 2, *(4,) * rank, groups=[8])


def _fractional(target: Any, rank: int) -> Sample:
    def function(net: Net, x: Tensor) -> Tensor:
        h = net.conv(x, 8).sin()
        places = net.parameter(1, 8, rank).sigmoid().expand(x.shape[0], -1, -1) * 0.9
        return net.conv(target(h, [2] * rank, [3] * rank, places)[0], 3)

    return sample(target, function, 2, *(6,) * rank, groups=[8])


def _rois(x: Tensor) -> Tensor:
    """Two regions of the first picture."""
    return torch.tensor([[0, 1.0, 1.0, 4.0, 5.0], [0, 2.0, 0.0, 6.0, 3.0]]).to(x)


def _regions(target: Any, *more: Any) -> Sample:
    def function(net: Net, x: Tensor) -> Tensor:
        result = target(net.conv(x, 8).sin(), _rois(x), 1.0, 2, 2, *more)
        return net.conv(result[0] if isinstance(result, tuple) else result, 3)

    return sample(target, function, 2, 6, 6, groups=[8])


def _deformed(groups: int, movers: int, found: list[int], note: str, use_mask: bool = True) -> Sample:
    def function(net: Net, x: Tensor) -> Tensor:
        h = net.conv(x, 8).sin()
        offset = net.conv(x, 2 * movers * 9, 3, padding=1) * 0.4
        mask = net.conv(x, movers * 9, 3, padding=1).sigmoid() if use_mask else torch.zeros(x.shape[0], 1).to(x)
        layer = net.layer(lambda: nn.Conv2d(8, 12, 3, groups=groups))
        y = vision.deform_conv2d.default(
            h, layer.weight, offset, mask, layer.bias, *(1, 1), *(1, 1), *(1, 1), groups, movers, use_mask
        )
        return net.conv(y.sin(), 3)

    return sample(vision.deform_conv2d.default, function, 2, 5, 5, groups=found, note=note)


SAMPLES = [
    _sampled(aten.grid_sampler.default, 2),
    _sampled(aten.grid_sampler_2d.default, 2),
    _sampled(aten.grid_sampler_3d.default, 3),
    _unpooled(aten.max_unpool2d.default, 2),
    _unpooled(aten.max_unpool3d.default, 3, [2, 2, 2], [0, 0, 0]),
    _fractional(aten.fractional_max_pool2d.default, 2),
    _fractional(aten.fractional_max_pool3d.default, 3),
    _regions(vision.roi_align.default, 2, True),
    _regions(vision.roi_pool.default),
    _deformed(1, 1, [8, 12], "plain"),
    _deformed(1, 1, [8, 12], "no mask", use_mask=False),
    _deformed(2, 1, [2, 4, 6], "groups"),
    _deformed(1, 2, [4, 12], "offset groups"),
    sample(
        vision.nms.default,
        lambda net, x: (
            net.linear(net.linear(x, 8), 3)
            + 0 * vision.nms.default(net.linear(net.parameter(4, 6), 4), net.parameter(4), 0.5).to(torch.float32).sum()
        ),
        groups=[8, 6],
    ),
]
