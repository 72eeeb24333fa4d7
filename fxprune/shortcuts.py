"""Results of the most frequent operators on fake tensors, without running their fake kernels.

Capture is the slowest stage of a compilation, and most of it would be spent in torch's fake kernels. For contiguous
operands the shapes below are simple; everything else takes the kernel. `tests/test_capture.py` compares each with it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch

aten = torch.ops.aten

#: Results look like the first operand, which is a floating-point tensor.
_SAME = {
    *(aten.batch_norm.default, aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default),
    *(aten.relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default),
    *(aten.hardswish.default, aten.hardsigmoid.default, aten.hardtanh.default, aten.relu6.default, aten.softmax.int),
}
#: In-place forms: the first operand is overwritten and returned; its shape and dtype stay.
_IN_PLACE = {
    *(aten.relu_.default, aten.silu_.default, aten.sigmoid_.default, aten.hardswish_.default, aten.hardtanh_.default),
    *(aten.hardsigmoid_.default, aten.relu6_.default, aten.leaky_relu_.default, aten.add_.Tensor, aten.mul_.Tensor),
    *(aten.sub_.Tensor, aten.div_.Tensor, aten.copy_.default, aten.fill_.Scalar, aten.zero_.default),
    *(aten.masked_fill_.Scalar, aten.dropout_.default, aten.clamp_.default),
}
#: Views, and frequent operators of fake tensors on one device, whose meta kernel needs nothing of the fake mode.
_DIRECT = {
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.select.int),
    *(aten.unbind.int, aten.split.Tensor, aten.chunk.default, aten.t.default, aten.unflatten.int),
    *(aten.cat.default, aten.matmul.default, aten.bmm.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor),
    *(aten.div.Tensor, aten.neg.default, aten.rsqrt.default, aten.pow.Tensor_Scalar, aten.mean.dim, aten.roll.default),
}


def shortcut(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the operator's fake result, or None where its kernel has to be run."""
    if func in _IN_PLACE:
        return args[0] if isinstance(args[0], FakeTensor) else None
    if func in _DIRECT and not kwargs:
        return _direct(func, args)
    rule = _RULES.get(func)
    if rule is None or kwargs:
        return None
    x = args[0]
    if not isinstance(x, FakeTensor) or not x.is_floating_point() or not x.is_contiguous() or not x.numel():
        return None
    shape = rule(*args)
    return None if shape is None else _like(x, shape)


def _direct(func: Any, args: tuple[Any, ...]) -> Any:
    """Run the operator's meta kernel, without the fake mode's caches and checks around it."""
    operands = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else (arg,)) if isinstance(a, Tensor)]
    tensors = [t for t in operands if isinstance(t, FakeTensor)]
    if not tensors or len(tensors) < len(operands) or any(t.fake_device != tensors[0].fake_device for t in tensors):
        return None
    mode, device = tensors[0].fake_mode, tensors[0].fake_device
    with in_kernel_invocation_manager(mode):
        result = func(*args)
    if isinstance(result, Tensor):
        return args[0] if result is args[0] else FakeTensor(mode, result, device)
    return [FakeTensor(mode, r, device) for r in result]


def _like(x: FakeTensor, shape: tuple[int, ...]) -> FakeTensor:
    with no_dispatch():
        meta = torch.empty(shape, dtype=x.dtype, device="meta")
    return FakeTensor(x.fake_mode, meta, x.fake_device)


def _plain(*tensors: Any) -> bool:
    """Whether all are contiguous fake tensors of one dtype."""
    first = tensors[0]
    return all(isinstance(t, FakeTensor) and t.dtype == first.dtype and t.is_contiguous() for t in tensors)


def _same(x: Tensor, *_: Any) -> tuple[int, ...] | None:
    return tuple(x.shape)


def _softmax(x: Tensor, dim: int, dtype: Any = None) -> tuple[int, ...] | None:
    return tuple(x.shape) if dtype is None else None


def _linear(x: Tensor, weight: Tensor, bias: Any = None) -> tuple[int, ...] | None:
    if not _plain(x, weight) or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return None  # also where it does not fit: the kernel says why
    return (*x.shape[:-1], weight.shape[0])


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[int, ...] | None:
    rank = weight.dim() - 2
    if (
        not _plain(x, weight)
        or not (_rows(x) and _rows(weight))
        or x.dim() != rank + 2
        or x.shape[1] != weight.shape[1] * groups
        or weight.shape[0] % groups
    ):
        return None
    steps = [_each(v, rank) for v in (stride, padding, dilation)]
    sizes = []
    for size, kernel, step, pad, spread in zip(x.shape[2:], weight.shape[2:], *steps, strict=True):
        room = size + 2 * pad - spread * (kernel - 1) - 1
        if room < 0:
            return None
        sizes.append(room // step + 1)
    return (x.shape[0], weight.shape[0], *sizes)


def _rows(x: Tensor) -> bool:
    """Whether the strides are row-major: with one channel or pixel, a contiguous tensor may be channels-last too."""
    return all(x.stride(i) == prod(x.shape[i + 1 :]) for i in range(1, x.dim()))


def _each(value: Any, rank: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * rank if len(values) == 1 else values


_RULES: dict[Any, Callable[..., tuple[int, ...] | None]] = {
    **dict.fromkeys(_SAME, _same),
    aten.softmax.int: _softmax,
    aten.linear.default: _linear,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
}
