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


def _filled(x: Tensor, mask: Tensor, value: float) -> Tensor:
    return torch.where(mask, x, torch.full((), value, dtype=x.dtype, device=x.device))


@_for(aten.softmax.int, aten._softmax.default)
def _softmax(x: Tensor, mask: Tensor, dim: int, *_: Any, **__: Any) -> Tensor:
    return torch.softmax(_filled(x, mask, -math.inf), dim).nan_to_num(0.0)


@_for(aten.log_softmax.int, aten._log_softmax.default)
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


@_for(aten.norm.ScalarOpt_dim, aten.norm.Scalar)
def _norm(x: Tensor, mask: Tensor, order: Any = 2, dims: Any = None, keepdim: bool = False) -> Tensor:
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
PREPARED[aten._weight_norm.default] = lambda args, _: args  # the rewriter keeps what it gives, see `kept_norms`


def _without_rows(args: tuple[Any, ...], _: tuple[Any, ...]) -> tuple[Any, ...]:
    """The end of a removed expert's rows, masked to zero, is that of the expert before it: it has no rows."""
    x, weight, offsets, *rest = args
    return x, weight, torch.cummax(offsets, 0).values, *rest


PREPARED |= dict.fromkeys((aten._grouped_mm.default, "transformers.grouped_mm_fallback.default"), _without_rows)
#: Operators that torch has no kernel of in double precision -> the same as a function.
EXACT = {aten._grouped_mm.default: by_expert}


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
