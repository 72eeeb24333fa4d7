"""Samples for normalisation layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from rules import Net, Sample, aten, sample


def _image(
    target: object, make: Callable[[], nn.Module], groups: list[int], *, out: int = 8, rank: int = 2, note: str = ""
) -> Sample:
    """One layer between two convolutions."""
    function = lambda net, x: net.conv(net.layer(make)(net.conv(x, out)).sin(), 3)  # noqa: E731
    return sample(target, function, 2, *(4, 3, 2)[:rank], groups=groups, note=note)


def _tokens(target: object, make: Callable[[], nn.Module], groups: list[int], note: str = "") -> Sample:
    """One layer between two linear layers."""
    return sample(
        target, lambda net, x: net.linear(net.layer(make)(net.linear(x, 8)).sin(), 3), 4, 5, groups=groups, note=note
    )


def _per_head(net: Net, x: Tensor) -> Tensor:
    """Queries normalised in each head."""
    y = net.linear(x, 12).unflatten(-1, (3, 4))
    return net.linear(net.layer(lambda: nn.RMSNorm(4))(y).flatten(-2), 3)


def _no_bias() -> nn.Module:
    norm = nn.GroupNorm(1, 8)
    norm.bias = None  # type: ignore[assignment]
    return norm


def _standardised(net: Net, x: Tensor) -> Tensor:
    """A convolution whose weights are normalised over their inputs, as NFNets do."""
    y = net.conv(x, 8).sin()
    weight = net.parameter(6, 8, 3, 3)
    shaped = aten.batch_norm.default(
        weight.reshape(1, 6, -1), net.parameter(6), None, None, None, True, 0.0, 1e-6, False
    ).reshape_as(weight)
    return net.conv(nn.functional.conv2d(y, shaped, padding=1).sin(), 3)


BATCH, INSTANCE, GROUP = aten.batch_norm.default, aten.instance_norm.default, aten.group_norm.default
NATIVE, QUANTISED = aten.native_layer_norm.default, aten.fake_quantize_per_channel_affine.default
LAYER, RMS, WEIGHT = aten.layer_norm.default, aten.rms_norm.default, aten._weight_norm.default

SAMPLES = [
    sample(
        NATIVE,
        lambda net, x: net.linear(
            (n := NATIVE(net.linear(x, 8), [8], net.parameter(8), net.parameter(8), 1e-3))[0] * n[2] + n[1], 3
        ),
        *(4, 5),
        groups=[8],
    ),
    sample(
        QUANTISED,
        lambda net, x: net.linear(
            QUANTISED(net.linear(x, 8), net.parameter(8).abs() + 0.1, net.parameter(8).to(torch.int32), 1, -9, 9), 3
        ),
        groups=[8],
    ),
    sample(
        aten.fake_quantize_per_tensor_affine.default,
        lambda net, x: net.linear(aten.fake_quantize_per_tensor_affine.default(net.linear(x, 8), 0.1, 0, -9, 9), 3),
        groups=[8],
    ),
    sample(
        aten.fake_quantize_per_tensor_affine.tensor_qparams,
        lambda net, x: net.linear(
            aten.fake_quantize_per_tensor_affine.tensor_qparams(
                net.linear(x, 8), torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32), -9, 9
            ),
            3,
        ),
        groups=[8],
    ),
    _image(BATCH, lambda: nn.BatchNorm2d(8), [8]),
    _image(BATCH, lambda: nn.BatchNorm3d(8), [8], rank=3, note="rank 3"),
    _image(BATCH, lambda: nn.BatchNorm1d(8), [8], rank=1, note="rank 1"),
    _image(BATCH, lambda: nn.BatchNorm2d(8, affine=False), [8], note="no weight"),
    sample(
        BATCH,
        lambda net, x: net.linear(net.layer(lambda: nn.BatchNorm1d(8))(net.linear(x, 8)).sin(), 3),
        groups=[8],
        note="vector",
    ),
    _image(INSTANCE, lambda: nn.InstanceNorm2d(8, affine=True), [8]),
    _image(INSTANCE, lambda: nn.InstanceNorm2d(8), [8], note="no weight"),
    _image(
        INSTANCE, lambda: nn.InstanceNorm1d(8, affine=True, track_running_stats=True), [8], rank=1, note="statistics"
    ),
    _tokens(LAYER, lambda: nn.LayerNorm(8), [8]),
    _tokens(LAYER, lambda: nn.LayerNorm(8, bias=False), [8], note="no bias"),
    _tokens(LAYER, lambda: nn.LayerNorm(8, elementwise_affine=False), [8], note="no weight"),
    _tokens(LAYER, lambda: nn.LayerNorm((4, 8)), [8], note="two dimensions"),
    sample(
        LAYER,
        lambda net, x: net.conv(
            net.layer(lambda: nn.LayerNorm(8))(net.conv(x, 8).permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 3
        ),
        *(2, 4, 4),
        groups=[8],
        note="channels last",
    ),
    _tokens(RMS, lambda: nn.RMSNorm(8), [8]),
    _tokens(RMS, lambda: nn.RMSNorm(8, eps=1e-3, elementwise_affine=False), [8], note="no weight"),
    sample(RMS, _per_head, 4, 5, groups=[3, 4], note="each head"),
    _image(GROUP, lambda: nn.GroupNorm(2, 8), [2, 4]),
    _image(GROUP, lambda: nn.GroupNorm(4, 8, affine=False), [4, 2], note="no weight"),
    _image(GROUP, lambda: nn.GroupNorm(1, 8), [8], note="one group"),
    _image(GROUP, _no_bias, [8], note="no bias"),
    sample(BATCH, _standardised, 2, 4, 4, groups=[8, 6], note="of weights"),
    _image(GROUP, lambda: nn.GroupNorm(8, 8), [8], note="groups of one"),
    sample(
        GROUP,
        lambda net, x: net.linear(net.layer(lambda: nn.GroupNorm(2, 8))(net.linear(x, 8)).sin(), 3),
        groups=[2, 4],
        note="vector",
    ),
    _image(aten.prelu.default, lambda: nn.PReLU(8), [8]),
    _image(aten.prelu.default, nn.PReLU, [8], note="one slope"),
    _image(WEIGHT, lambda: weight_norm(nn.Conv2d(8, 6, 1)), [8, 6], note="rows"),
    _image(WEIGHT, lambda: weight_norm(nn.Conv2d(8, 6, 3, padding=1, groups=2), dim=2), [2, 4, 3], note="kernel"),
    _image(WEIGHT, lambda: weight_norm(nn.Conv2d(8, 6, 1), dim=1), [8, 6], note="columns"),
]
