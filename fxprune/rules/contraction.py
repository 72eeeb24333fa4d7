"""Matrix products, linear layers, einsum and convolutions. Each records its multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxprune.axes import ONE, Dim, Fixed, product, size_of
from fxprune.rules.core import Dims, Literals, Site, as_size, aten, rule


@rule(aten.linear.default)
def linear(site: Site, x: Dims, weight: Dims, bias: Dims | None = None) -> Dims:
    """x (..., in), weight (out, in), bias (out) -> (..., out)."""
    site.unify(x[-1], weight[-1])
    out = weight[:-1]
    if bias is not None and out:
        site.unify(bias[-1], out[0])
    site.multiply(*x, *out)
    return (*x[:-1], *out)


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default, aten.mv.default, aten.dot.default)
def matmul(site: Site, a: Dims, b: Dims, **_: Any) -> Dims:
    """a (..., m, k), b (..., k, n) -> (..., m, n); vectors as torch.matmul treats them."""
    site.unify(a[-1], b[-2] if len(b) > 1 else b[-1])
    batch = site.broadcast(a[:-2], b[:-2])  # either may have none
    rows = a[-2:-1]
    columns = b[-1:] if len(b) > 1 else ()
    site.multiply(*batch, *rows, *columns, a[-1])
    return (*batch, *rows, *columns)


@rule(aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
def addmm(site: Site, bias: Dims, a: Dims, b: Dims, **_: Any) -> Dims:
    """bias + a b."""
    return site.broadcast(bias, matmul(site, a, b))


@rule(aten.addbmm.default)
def addbmm(site: Site, bias: Dims, a: Dims, b: Dims, **_: Any) -> Dims:
    """bias + the sum over the batch of a b."""
    return site.broadcast(bias, matmul(site, a, b)[1:])


@rule(aten.outer.default)
def outer(site: Site, a: Dims, b: Dims) -> Dims:
    return (*a, *b)


@rule(aten.einsum.default)
def einsum(site: Site, equation: str, operands: Sequence[Dims], **_: Any) -> Dims:
    """Every letter is one dimension, whichever operand it occurs in."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    ranks = [len(o) - len(t.replace("...", "")) for o, t in zip(operands, terms, strict=True)]
    dots = max([r for r, t in zip(ranks, terms, strict=True) if "..." in t], default=0)
    hidden = [f"<{i}>" for i in range(dots)]

    def letters(term: str, rank: int | None) -> list[str]:
        head, ellipsis, tail = term.partition("...")
        return [*head, *((hidden[dots - rank :] if rank else []) if ellipsis and rank is not None else []), *tail]

    if not arrow:
        counts = "".join(terms).replace("...", "")
        right = ("..." if dots else "") + "".join(sorted(c for c in set(counts) if counts.count(c) == 1))
    found: dict[str, Dim] = {}
    for dims, term, rank in zip(operands, terms, ranks, strict=True):
        for letter, dim in zip(letters(term, rank), dims, strict=True):
            known = found.get(letter, ONE)
            found[letter] = dim if size_of(known) == 1 else known if size_of(dim) == 1 else site.unify(known, dim)
    site.multiply(*found.values())
    return tuple(found[letter] for letter in letters(right, dots))


# ---------------------------------------------------------------------- convolutions
def _groups(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    """A grouped convolution whose groups were cut has fewer of them."""
    rank = len(rw.dims(args["weight"])) - 2
    groups, _ = rw.split(rw.dims(args["input"])[-rank - 1], as_size(args["groups"]))
    return {"groups": rw.size(groups)}


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, literals=_groups)
@rule(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, literals=_groups)
def convolution(
    site: Site, x: Dims, weight: Dims, bias: Dims | None, _stride: Any, _pad: Any, _dilation: Any, groups: int
) -> Dims:
    """x (N, groups * in, ...), weight (groups * out, in, ...), bias (groups * out) -> (N, groups * out, ...)."""
    rank = len(weight) - 2
    out = site.axes.split(weight[0], as_size(groups), site.node)
    into = site.axes.split(x[-rank - 1], as_size(groups), site.node)
    site.unify(into[1], weight[1])
    site.unify(into[0], out[0])
    channels = site.axes.resolve(product(out))
    if bias is not None:
        site.unify(bias[0], channels)
    result = (*x[: -rank - 1], channels, *_space(site, x, weight))
    site.multiply(*result, weight[1], *weight[2:])
    return result


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input, literals=_groups)
def convolution_transpose(
    site: Site, x: Dims, weight: Dims, bias: Dims | None, _stride: Any, _pad: Any, _outpad: Any, groups: int, _dil: Any
) -> Dims:
    """x (N, groups * in, ...), weight (groups * in, out, ...), bias (groups * out) -> (N, groups * out, ...)."""
    rank = len(weight) - 2
    into = site.axes.split(x[-rank - 1], as_size(groups), site.node)
    site.unify(product(into), weight[0])
    channels = site.axes.resolve(product([into[0], weight[1]]))
    if bias is not None:
        site.unify(bias[0], channels)
    result = (*x[: -rank - 1], channels, *_space(site, x, weight))
    site.multiply(*x, weight[1], *weight[2:])
    return result


@rule(aten.convolution.default, literals=_groups)
def plain_convolution(
    site: Site, x: Dims, weight: Dims, bias: Any, stride: Any, pad: Any, dilation: Any, transposed: bool, *rest: Any
) -> Any:
    """What convolutions of any rank are made of, as `torch.vmap` records them."""
    more, groups = rest
    if transposed:
        return convolution_transpose(site, x, weight, bias, stride, pad, more, groups, dilation)
    return convolution(site, x, weight, bias, stride, pad, dilation, groups)


def _space(site: Site, x: Dims, weight: Dims) -> Dims:
    """Kernel and spatial dimensions stay whole."""
    rank = len(weight) - 2
    for d in weight[2:]:
        site.freeze(d, "it is a kernel dimension")
    for d in x[-rank:]:
        site.freeze(d, "it is a spatial dimension")
    return tuple(Fixed(s, "a spatial dimension") for s in site.shape[-rank:])
