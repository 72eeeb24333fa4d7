"""The masked reference: what the dense model computes when removed indices are masked out of consumers and reductions.

Masking an operand with zeros is enough for sums of products. The operators here reduce in another way, and leave
masked entries out explicitly. They are written from the definition of the operator, independent of the rewriter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxprune.rules.core import aten, overloads
from fxprune.rules.experts import by_expert
from fxprune.rules.recurrent import GATES

#: A mask broadcastable to the operand, True where it is kept; None where all of it is.
Mask = Tensor | None
Masked = Callable[..., Any]

#: Operator -> its masked form: (first operand, its mask, *the other arguments).
MASKED: dict[Any, Masked] = {}

#: Operators that work on several operands at once -> (arguments, masks of the same structure) -> arguments in which
#: what is removed takes no part.
PREPARED: dict[Any, Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...]]] = {}


def _for(*targets: Any) -> Callable[[Masked], Masked]:
    def decorate(function: Masked) -> Masked:
        for target in targets:
            for overload in overloads(target):
                MASKED[overload] = function
        return function

    return decorate


def _dims(x: Tensor, dims: Any) -> list[int]:
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(x.dim()))
    return [d % x.dim() for d in (dims if isinstance(dims, list | tuple) else [dims])]


def _count(x: Tensor, mask: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    return mask.expand(x.shape).to(x.dtype).sum(list(dims), keepdim=keepdim)


@_for(aten.mean)
def _mean(x: Tensor, mask: Tensor, dims: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    dims = _dims(x, dims)
    return (x * mask).sum(dims, keepdim=keepdim) / _count(x, mask, dims, keepdim)


def _moments(x: Tensor, mask: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the kept entries, keeping the dimensions."""
    count = _count(x, mask, dims, True)
    mean = (x * mask).sum(list(dims), keepdim=True) / count
    return mean, (((x - mean) * mask) ** 2).sum(list(dims), keepdim=True) / count


def _variance(x: Tensor, mask: Tensor, dims: Any, keepdim: bool, correction: float) -> Tensor:
    dims = _dims(x, dims)
    _, biased = _moments(x, mask, dims)
    count = _count(x, mask, dims, True)
    result = biased * count / (count - correction)
    return result if keepdim else result.sum(dims)


@_for(aten.var.correction)
def _var(x: Tensor, mask: Tensor, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return _variance(x, mask, dims, keepdim, 1 if correction is None else correction)


@_for(aten.std.correction)
def _std(x: Tensor, mask: Tensor, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return _variance(x, mask, dims, keepdim, 1 if correction is None else correction).sqrt()


@_for(aten.var.dim)
def _var_dim(x: Tensor, mask: Tensor, dims: Any, unbiased: bool = True, keepdim: bool = False) -> Tensor:
    return _variance(x, mask, dims, keepdim, int(unbiased))


@_for(aten.std.dim)
def _std_dim(x: Tensor, mask: Tensor, dims: Any, unbiased: bool = True, keepdim: bool = False) -> Tensor:
    return _variance(x, mask, dims, keepdim, int(unbiased)).sqrt()


@_for(aten.var_mean.correction)
def _var_mean(
    x: Tensor, mask: Tensor, dims: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    variance = _variance(x, mask, dims, keepdim, 1 if correction is None else correction)
    return variance, _mean(x, mask, dims, keepdim)


@_for(aten.var.default)
def _var_all(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    return _variance(x, mask, None, False, int(unbiased))


@_for(aten.std.default)
def _std_all(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    return _variance(x, mask, None, False, int(unbiased)).sqrt()


@_for(aten.var_mean.default)
def _var_mean_all(x: Tensor, mask: Tensor, unbiased: bool = True) -> tuple[Tensor, Tensor]:
    return _var_all(x, mask, unbiased), _mean(x, mask)


@_for(aten.var_mean.dim)
def _var_mean_dim(
    x: Tensor, mask: Tensor, dims: Any, unbiased: bool = True, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    return _var_dim(x, mask, dims, unbiased, keepdim), _mean(x, mask, dims, keepdim)


def _rooted(of: Masked) -> Masked:
    """Standard deviation and mean from variance and mean."""

    def std_mean(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        variance, mean = of(*args, **kwargs)
        return variance.sqrt(), mean

    return std_mean


MASKED[aten.std_mean.default] = _rooted(_var_mean_all)
MASKED[aten.std_mean.dim] = _rooted(_var_mean_dim)
MASKED[aten.std_mean.correction] = _rooted(_var_mean)


@_for(aten.nanmean)
def _nanmean(x: Tensor, mask: Tensor, dims: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    return torch.nanmean(_filled(x, mask, math.nan), _dims(x, dims), keepdim)


@_for(aten.aminmax.default)
def _aminmax(x: Tensor, mask: Tensor, *, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    dims = _dims(x, dim)
    low, high = _filled(x, mask, math.inf), _filled(x, mask, -math.inf)
    return torch.amin(low, dims, keepdim), torch.amax(high, dims, keepdim)


@_for(aten.pairwise_distance.default)
def _pairwise_distance(
    x: Tensor, mask: Tensor, y: Tensor, p: Any = 2, eps: float = 1e-6, keepdim: bool = False
) -> Tensor:
    result: Tensor = torch.linalg.vector_norm((x - y + eps) * mask, p, -1, keepdim)
    return result


def _filled(x: Tensor, mask: Tensor, value: float) -> Tensor:
    return torch.where(mask, x, torch.full((), value, dtype=x.dtype, device=x.device))


@_for(aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default)
def _softmax(x: Tensor, mask: Tensor, dim: int, *_: Any, **__: Any) -> Tensor:
    return torch.softmax(_filled(x, mask, -math.inf), dim).nan_to_num(0.0)


@_for(aten.log_softmax.int, aten._log_softmax.default, aten.special_log_softmax.default)
def _log_softmax(x: Tensor, mask: Tensor, dim: int, *_: Any, **__: Any) -> Tensor:
    return torch.where(mask, torch.log_softmax(_filled(x, mask, -math.inf), dim), torch.zeros_like(x))


@_for(aten.logsumexp.default)
def _logsumexp(x: Tensor, mask: Tensor, dims: Any, keepdim: bool = False) -> Tensor:
    return torch.logsumexp(_filled(x, mask, -math.inf), dims, keepdim)


@_for(aten.amax.default)
def _amax(x: Tensor, mask: Tensor, dims: Any = (), keepdim: bool = False) -> Tensor:
    return torch.amax(_filled(x, mask, -math.inf), dims, keepdim)


@_for(aten.amin.default)
def _amin(x: Tensor, mask: Tensor, dims: Any = (), keepdim: bool = False) -> Tensor:
    return torch.amin(_filled(x, mask, math.inf), dims, keepdim)


@_for(aten.max.default)
def _max(x: Tensor, mask: Tensor) -> Tensor:
    return _filled(x, mask, -math.inf).max()


@_for(aten.min.default)
def _min(x: Tensor, mask: Tensor) -> Tensor:
    return _filled(x, mask, math.inf).min()


@_for(aten.prod.dim_int)
def _prod(x: Tensor, mask: Tensor, dim: int, keepdim: bool = False, **_: Any) -> Tensor:
    return _filled(x, mask, 1.0).prod(dim, keepdim)


@_for(aten.prod.default)
def _prod_all(x: Tensor, mask: Tensor, **_: Any) -> Tensor:
    return _filled(x, mask, 1.0).prod()


@_for(aten.all.dim, aten.all.dims, aten.all.default)
def _all(x: Tensor, mask: Tensor, dims: Any = None, keepdim: bool = False) -> Tensor:
    return ((x != 0) | ~mask).all(_dims(x, dims), keepdim)


@_for(aten.linalg_vector_norm.default)
def _vector_norm(x: Tensor, mask: Tensor, order: Any = 2, dims: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    """A norm of negative order is small where one entry is: there, entries that are infinite do not count."""
    value = math.inf if order < 0 else 0.0
    result: Tensor = torch.linalg.vector_norm(_filled(x, mask, value), order, _dims(x, dims), keepdim)
    return result


@_for(aten.norm.ScalarOpt_dim, aten.norm.Scalar, aten.norm.ScalarOpt_dim_dtype, aten.norm.ScalarOpt_dtype)
def _norm(x: Tensor, mask: Tensor, order: Any = 2, dims: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    result: Tensor = _vector_norm(x, mask, 2 if order is None else order, dims, keepdim)
    return result


@_for(aten.batch_norm.default)
def _batch_norm(
    x: Tensor,
    mask: Tensor,
    weight: Mask,
    bias: Mask,
    mean: Mask,
    variance: Mask,
    training: bool,
    _momentum: float,
    eps: float,
    *_: Any,
) -> Tensor:
    """In eval mode nothing is reduced. With statistics of the operand itself, those of what is kept."""
    dims = [i for i in range(x.dim()) if i != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    if training or mean is None or variance is None:
        mean, variance = _moments(x, mask, dims)
    normal = (x - mean.reshape(shape)) / torch.sqrt(variance.reshape(shape) + eps)
    return _affine(
        normal, weight if weight is None else weight.reshape(shape), bias if bias is None else bias.reshape(shape)
    )


@_for(aten.layer_norm.default)
def _layer_norm(
    x: Tensor, mask: Tensor, shape: Any, weight: Mask = None, bias: Mask = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    mean, variance = _moments(x, mask, list(range(x.dim() - len(shape), x.dim())))
    return _affine((x - mean) / torch.sqrt(variance + eps), weight, bias)


@_for(aten.native_layer_norm.default)
def _native_layer_norm(
    x: Tensor, mask: Tensor, shape: Any, weight: Mask, bias: Mask, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance = _moments(x, mask, list(range(x.dim() - len(shape), x.dim())))
    return _layer_norm(x, mask, shape, weight, bias, eps), mean, 1 / torch.sqrt(variance + eps)


@_for(aten.rms_norm.default)
def _rms_norm(x: Tensor, mask: Tensor, shape: Any, weight: Mask = None, eps: float | None = None) -> Tensor:
    dims = list(range(x.dim() - len(shape), x.dim()))
    square = ((x * mask) ** 2).sum(dims, keepdim=True) / _count(x, mask, dims, True)
    return _affine(x / torch.sqrt(square + (torch.finfo(x.dtype).eps if eps is None else eps)), weight, None)


@_for(aten.group_norm.default)
def _group_norm(
    x: Tensor, mask: Tensor, groups: int, weight: Mask = None, bias: Mask = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    grouped = x.reshape(x.shape[0], groups, -1)
    kept = mask.expand(x.shape).reshape(grouped.shape)
    mean, variance = _moments(grouped, kept, [2])
    normal = ((grouped - mean) / torch.sqrt(variance + eps)).nan_to_num(0.0).reshape(x.shape)
    shape = [1, -1] + [1] * (x.dim() - 2)
    return _affine(
        normal, weight if weight is None else weight.reshape(shape), bias if bias is None else bias.reshape(shape)
    )


def _affine(x: Tensor, weight: Mask, bias: Mask) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def zeroed(args: tuple[Any, ...], masks: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return all operands zero where removed: a hidden unit then starts at zero and stays there, for any gate."""
    flat, spec = pytree.tree_flatten(args)
    pairs = zip(flat, spec.flatten_up_to(masks), strict=True)
    result = [a * m if isinstance(a, Tensor) and m is not None else a for a, m in pairs]
    return pytree.tree_unflatten(result, spec)  # type: ignore[no-any-return]


PREPARED |= dict.fromkeys(GATES, zeroed)
#: In these, two weights may meet beside what is computed from the inputs; weights are not masked by themselves.
PREPARED |= dict.fromkeys(
    (
        *(aten.einsum.default, aten.linalg_multi_dot.default, aten.chain_matmul.default, aten.addmm.default),
        *(aten.baddbmm.default, aten.addbmm.default, aten.addmv.default, aten.cdist.default, aten.dist.default),
        *(aten.cosine_similarity.default, aten.pairwise_distance.default),
    ),
    zeroed,
)
PREPARED[aten._weight_norm.default] = lambda args, _: args  # the rewriter keeps what it gives, see `kept_norms`


def _without_rows(args: tuple[Any, ...], _: tuple[Any, ...]) -> tuple[Any, ...]:
    """The end of a removed expert's rows, masked to zero, is that of the expert before it: it has no rows."""
    x, weight, offsets, *rest = args
    return x, weight, torch.cummax(offsets, 0).values, *rest


PREPARED |= dict.fromkeys((aten._grouped_mm.default, "transformers.grouped_mm_fallback.default"), _without_rows)


def _fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, axis: int, low: int, high: int) -> Tensor:
    shape = [-1 if i == axis % x.dim() else 1 for i in range(x.dim())]
    scale, zero = scale.reshape(shape), zero.reshape(shape)
    return ((x / scale).round().add(zero).clamp(low, high) - zero) * scale


def _reshaped(x: Tensor, size: Sequence[int]) -> Tensor:
    return x.reshape(list(size))


#: Operators that torch has no kernel of in double precision, or whose operands its kernels lay out in another way there
#: -> the same as a function.
EXACT: dict[Any, Callable[..., Tensor]] = {
    aten.view.default: _reshaped,
    aten._grouped_mm.default: by_expert,
    aten.fake_quantize_per_channel_affine.default: _fake_quantize,
}


def _extreme(pick: Callable[..., Any], value: float) -> Masked:
    """Pick the index of an extreme entry of what is kept."""
    return lambda x, mask, *args, **kwargs: pick(_filled(x, mask, value), *args, **kwargs)


for _pick, _worst in ((aten.argmax.default, -math.inf), (aten.argmin.default, math.inf)):
    MASKED[_pick] = _extreme(_pick, _worst)
for _pick, _worst in ((aten.max.dim, -math.inf), (aten.min.dim, math.inf)):
    MASKED[_pick] = _extreme(_pick, _worst)


@_for(aten.topk.default)
def _topk(x: Tensor, mask: Tensor, k: int, dim: int = -1, largest: bool = True, ordered: bool = True) -> Any:
    return torch.topk(_filled(x, mask, -math.inf if largest else math.inf), k, dim, largest, ordered)
