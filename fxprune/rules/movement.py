"""Operators that move elements without computing: reshape, permute, cat, split, slice, pad, expand, roll, shuffles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxprune.axes import ONE, Dim, Fixed, Misfit, Size, concat, divide, plus, product, size_of, times
from fxprune.rules.core import Dims, Literals, Site, as_size, aten, output_shape, positive, rule


# ---------------------------------------------------------------------- reshape
def _as_reshape(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    """A kernel of other sizes may lay out its result in another way, of which there is no view."""
    return {"": aten.reshape.default, "self": args["self"], "shape": output_shape("size")(rw, node, args)["size"]}


@rule(aten.view.default, literals=_as_reshape)
@rule(aten._unsafe_view.default, literals=_as_reshape)
@rule(aten.reshape.default, literals=output_shape("shape"))
@rule(aten.flatten.using_ints, aten.unsqueeze.default, aten.ravel.default)
@rule(aten.atleast_1d.default, aten.atleast_2d.default, aten.atleast_3d.default)
def reshape(site: Site, x: Dims, *_: Any) -> Dims:
    """The factors of all dimensions in row-major order, grouped anew."""
    return site.axes.regroup(x, site.shape, site.node)


@rule(aten.view_as.default, aten.reshape_as.default)
def reshape_as(site: Site, x: Dims, other: Dims) -> Dims:
    """The shape comes from another tensor, and follows it."""
    dims = site.axes.regroup(x, site.shape, site.node)
    return tuple(site.unify(a, b) for a, b in zip(dims, other, strict=True))


def _squeezed(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    """A dimension of which one index is left is no dimension to squeeze: name those that had size 1 before."""
    x = rw.dims(args["self"])
    if not any(rw.cut(d) for d in x):
        return {}
    asked = args.get("dim", range(len(x)))
    dims = [positive(d, len(x)) for d in (asked if isinstance(asked, list | tuple | range) else [asked])]
    return {"": aten.squeeze.dims, "self": args["self"], "dim": [d for d in dims if size_of(x[d]) == 1]}


@rule(aten.squeeze, literals=_squeezed)
def squeeze(site: Site, x: Dims, *_: Any) -> Dims:
    return site.axes.regroup(x, site.shape, site.node)


def _unflatten_sizes(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    dims = rw.dims(node)
    start = positive(args["dim"], len(rw.dims(args["self"])))
    return {"sizes": [s if s == -1 else rw.size(dims[start + i]) for i, s in enumerate(args["sizes"])]}


@rule(aten.unflatten.int, literals=_unflatten_sizes)
def unflatten(site: Site, x: Dims, *_: Any) -> Dims:
    """A reshape whose sizes name one dimension's factors only."""
    return site.axes.regroup(x, site.shape, site.node)


# ---------------------------------------------------------------------- order of dimensions
@rule(aten.permute.default)
def permute(site: Site, x: Dims, order: Sequence[int]) -> Dims:
    return tuple(x[d] for d in order)


@rule(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def transpose(site: Site, x: Dims, a: int, b: int) -> Dims:
    dims = list(x)
    if dims:
        dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


@rule(aten.t.default, aten.mT.default, aten.mH.default, aten.adjoint.default)
def t(site: Site, x: Dims) -> Dims:
    return (*x[:-2], x[-1], x[-2]) if len(x) > 1 else x


@rule(aten.numpy_T.default)
def numpy_t(site: Site, x: Dims) -> Dims:
    """All dimensions in reverse order."""
    return x[::-1]


@rule(aten.movedim.int)
def movedim(site: Site, x: Dims, source: int, destination: int) -> Dims:
    dims = list(x)
    dims.insert(positive(destination, len(x)), dims.pop(source))
    return tuple(dims)


@rule(aten.movedim.intlist)
def movedims(site: Site, x: Dims, source: Sequence[int], destination: Sequence[int]) -> Dims:
    rank = len(x)
    place = {positive(d, rank): positive(s, rank) for s, d in zip(source, destination, strict=True)}
    rest = iter(i for i in range(rank) if i not in place.values())
    return tuple(x[place[i]] if i in place else x[next(rest)] for i in range(rank))


# ---------------------------------------------------------------------- repeating
def _stretch(site: Site, x: Dims, like: Sequence[Any]) -> Dims:
    """Dimensions of size 1 become those of `like`: other dimensions, or sizes that make new axes."""
    result: list[Dim] = []
    for i in range(-len(like), 0):
        have = x[i] if len(x) >= -i else ONE
        if size_of(have) != 1:
            result.append(have)
        elif isinstance(like[i], int | tuple):
            result.append(site.fresh(like[i], f".{len(like) + i}"))
        else:
            result.append(like[i])
    return tuple(result)


@rule(aten.expand.default, literals=output_shape("size"))
@rule(aten.broadcast_to.default, literals=output_shape("size"))
def expand(site: Site, x: Dims, *_: Any, **__: Any) -> Dims:
    """A stretched dimension is a new axis: its literal follows whatever it turns out to be."""
    return _stretch(site, x, site.shape)


@rule(aten.expand_as.default)
def expand_as(site: Site, x: Dims, other: Dims) -> Dims:
    return site.broadcast(_stretch(site, x, other), other)


@rule(aten.repeat.default, aten.tile.default)
def repeat(site: Site, x: Dims, repeats: Sequence[Any]) -> Dims:
    """Copies one behind the other: the copy number is the major factor."""
    rank = max(len(x), len(repeats))
    dims = (ONE,) * (rank - len(x)) + x
    counts = [1] * (rank - len(repeats)) + [as_size(r) for r in repeats]
    return tuple(product([Fixed(n, "copies"), d]) for n, d in zip(counts, dims, strict=True))


def _repeated_size(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    """The size of the result is an optional argument: what is left of it."""
    if args.get("output_size") is None:
        return {}
    dims = rw.dims(node)
    return {"output_size": rw.size(dims[0 if args["dim"] is None else args["dim"]])}


@rule(aten.repeat_interleave.self_int, literals=_repeated_size)
def repeat_interleave(site: Site, x: Dims, count: Any, dim: int | None = None, **_: Any) -> Dims:
    """Each index is repeated in place: the copy number is the minor factor."""
    if dim is None:
        return (product([*x, Fixed(as_size(count), "copies")]),)
    dims = list(x)
    dims[dim] = product([dims[dim], Fixed(as_size(count), "copies")])
    return tuple(dims)


# ---------------------------------------------------------------------- joining and cutting
@rule(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(site: Site, tensors: Sequence[Dims], dim: int = 0) -> Dims:
    tensors = [t for t in tensors if not (len(t) == 1 and size_of(t[0]) == 0)]
    dim = positive(dim, len(tensors[0]))
    rest = site.broadcast(*[(*t[:dim], ONE, *t[dim + 1 :]) for t in tensors])
    return (*rest[:dim], concat([t[dim] for t in tensors]), *rest[dim + 1 :])


@rule(aten.stack.default)
def stack(site: Site, tensors: Sequence[Dims], dim: int = 0) -> Dims:
    rest = site.broadcast(*tensors)
    dim = positive(dim, len(rest) + 1)
    return (*rest[:dim], Fixed(len(tensors), "stacked tensors"), *rest[dim:])


def _split_sizes(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    """Unequal parts after pruning: every way of splitting becomes `split_with_sizes`."""
    outs = rw.dims(node)
    x = next(iter(args.values()))
    dim = positive(args["dim"], len(rw.dims(x)))
    if not any(rw.cut(o[dim]) for o in outs) and not any("sizes" in name for name in args):
        return {}
    return {"": aten.split_with_sizes.default, "self": x, "split_sizes": [rw.size(o[dim]) for o in outs], "dim": dim}


@rule(aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, literals=_split_sizes)
@rule(aten.tensor_split.sections, aten.tensor_split.indices, aten.unsafe_split.Tensor, literals=_split_sizes)
@rule(aten.unsafe_chunk.default, literals=_split_sizes)
def split(site: Site, x: Dims, _sizes: Any, dim: int = 0) -> list[Dims]:
    return cut_along(site, x, positive(dim, len(x)))


def cut_along(site: Site, x: Dims, dim: int) -> list[Dims]:
    """The results of cutting a dimension in pieces of the sizes that the results have."""
    total: Size = 0
    for shape in site.shape:
        total = plus(total, shape[dim])
    if total != size_of(x[dim]):
        raise Misfit("the pieces of a split overlap or leave something out")
    pieces = site.axes.cut(x[dim], [shape[dim] for shape in site.shape], site.node)
    return [(*x[:dim], piece, *x[dim + 1 :]) for piece in pieces]


def _bounds(size: Size, start: Any, end: Any) -> tuple[Size, Size]:
    """(start, length) of a slice with step 1, as Python clips it."""

    def clip(value: Any, default: Size) -> Size:
        value = default if value is None else as_size(value)
        pairs = [(v, n) for v, n in _zip(value, size)]
        values = tuple(min(max(v + n if v < 0 else v, 0), n) for v, n in pairs)
        return values[0] if len(set(values)) == 1 else values

    first, last = clip(start, 0), clip(end, size)
    return first, plus(last, times(-1, first))


def _zip(a: Size, b: Size) -> list[tuple[int, int]]:
    n = max(len(v) if isinstance(v, tuple) else 1 for v in (a, b))
    return list(zip(a if isinstance(a, tuple) else (a,) * n, b if isinstance(b, tuple) else (b,) * n, strict=True))


def _three(size: Size, start: Size, length: Size) -> list[Size]:
    return [start, length, plus(size, times(-1, plus(start, length)))]


def _slice_bounds(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    x = rw.dims(args["self"])
    dim = positive(args["dim"], len(x))
    if args["step"] != 1 or not rw.cut(x[dim]):
        return {}
    size = size_of(x[dim])
    before, piece, _ = rw.pieces(x[dim], _three(size, *_bounds(size, args["start"], args["end"])))
    start = rw.size(before)
    length = rw.size(piece)
    return {"start": start, "end": start + length if isinstance(start, int) and isinstance(length, int) else None}


@rule(aten.slice.Tensor, literals=_slice_bounds)
def slice_(site: Site, x: Dims, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Dims:
    """Step 1 cuts the dimension in three; a larger step keeps the major factor of (size / step, step)."""
    dim = positive(dim, len(x))
    d = site.axes.resolve(x[dim])
    if isinstance(d, Fixed):
        return (*x[:dim], Fixed(site.shape[dim], d.why), *x[dim + 1 :])
    size = size_of(d)
    if step == 1:
        _, piece, _ = site.axes.cut(d, _three(size, *_bounds(size, start, end)), site.node)
    else:
        count = divide(size, step)
        first, length = _bounds(size, start, end)
        try:
            if count is None or plus(first, length) != size or not (isinstance(first, int) and first < step):
                raise Misfit("a slice with a step does not take one of every so many")
            piece, minor = site.axes.split(d, count, site.node)
            site.freeze(minor, f"one in {step} is taken")
        except Misfit as misfit:
            site.freeze(d, str(misfit))
            piece = Fixed(site.shape[dim], "a slice with a step")
    return (*x[:dim], piece, *x[dim + 1 :])


def _narrow_bounds(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    x = rw.dims(args["self"])
    dim = positive(args["dim"], len(x))
    if not rw.cut(x[dim]):
        return {}
    before, piece, _ = rw.pieces(x[dim], _three(size_of(x[dim]), args["start"], as_size(args["length"])))
    return {"start": rw.size(before), "length": rw.size(piece)}


@rule(aten.narrow.default, aten.narrow_copy.default, literals=_narrow_bounds)
def narrow(site: Site, x: Dims, dim: int, start: Any, length: Any) -> Dims:
    return slice_(site, x, dim, start, _end(start, length))  # type: ignore[no-any-return]


def _end(start: Any, length: Any) -> Any:
    from fxprune.capture import Varying

    end = plus(as_size(start), as_size(length))
    return Varying(end) if isinstance(end, tuple) else end


@rule(aten.slice_scatter.default, literals=_slice_bounds)
def slice_scatter(
    site: Site, x: Dims, source: Dims, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Dims:
    """A slice is overwritten: what is written has the dimensions of the slice."""
    dim = positive(dim, len(x))
    if step != 1:
        site.freeze(x[dim], "a slice with a step is overwritten")
        site.freeze(source[dim], "it overwrites a slice with a step")
    else:
        size = size_of(x[dim])
        _, piece, _ = site.axes.cut(x[dim], _three(size, *_bounds(size, start, end)), site.node)
        site.unify(piece, source[dim])
    rest = site.broadcast((*x[:dim], ONE, *x[dim + 1 :]), (*source[:dim], ONE, *source[dim + 1 :]))
    return (*rest[:dim], x[dim], *rest[dim + 1 :])


def _pad_amounts(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    """A negative amount cuts off as many indices as are left of those that it cut off."""
    x, amounts = rw.dims(args["self"]), list(args["pad"])
    for i in range(len(amounts) // 2):
        have = x[len(x) - 1 - i]
        left, right = amounts[2 * i], amounts[2 * i + 1]
        if rw.cut(have) and isinstance(left, int) and isinstance(right, int) and min(left, right) < 0:
            first, last = max(-left, 0), max(-right, 0)
            ends = rw.pieces(have, [first, plus(size_of(have), -first - last), last])
            amounts[2 * i : 2 * i + 2] = [
                -rw.size(end) if amount < 0 else amount for end, amount in zip(ends[::2], (left, right), strict=True)
            ]
    return {"pad": amounts} if amounts != list(args["pad"]) else {}


@rule(aten.pad.default, aten.constant_pad_nd.default, literals=_pad_amounts)
def pad(site: Site, x: Dims, amounts: Sequence[Any], mode: Any = "constant", value: Any = None) -> Dims:
    """Constant padding concatenates fixed parts, a negative amount cuts pieces off; reflection and the like freeze."""
    dims = list(x)
    for i in range(len(amounts) // 2):
        d = len(x) - 1 - i
        left, right = as_size(amounts[2 * i]), as_size(amounts[2 * i + 1])
        have = site.axes.resolve(dims[d])
        if left == 0 and right == 0:
            dims[d] = have
        elif isinstance(have, Fixed):
            dims[d] = Fixed(site.shape[d], have.why)
        elif (isinstance(mode, str) and mode != "constant") or isinstance(left, tuple) or isinstance(right, tuple):
            site.freeze(have, "it is padded by reflection or repetition")
            dims[d] = Fixed(site.shape[d], "padding")
        else:
            first, last = max(-left, 0), max(-right, 0)
            _, piece, _ = site.axes.cut(have, [first, plus(size_of(have), -first - last), last], site.node)
            dims[d] = concat([Fixed(max(left, 0), "padding"), piece, Fixed(max(right, 0), "padding")])
    return tuple(dims)


# ---------------------------------------------------------------------- order of indices
@rule(aten.roll.default)
def roll(site: Site, x: Dims, shifts: Any, dims: Sequence[int] = ()) -> Dims:
    rolled = dims if dims else range(len(x))
    return _frozen(site, x, rolled, "it is rolled")


@rule(aten.flip.default)
def flip(site: Site, x: Dims, dims: Sequence[int]) -> Dims:
    return _frozen(site, x, dims, "its order is reversed")


@rule(aten.tril.default, aten.triu.default)
def triangle(site: Site, x: Dims, *_: Any) -> Dims:
    return _frozen(site, x, (-2, -1), "a triangle of it is taken")


def _frozen(site: Site, x: Dims, dims: Any, why: str) -> Dims:
    result = list(x)
    for d in dims:
        result[d] = site.freeze(result[d], why)
    return tuple(result)


# ---------------------------------------------------------------------- shuffles between channels and space
@rule(aten.pixel_shuffle.default)
def pixel_shuffle(site: Site, x: Dims, factor: int) -> Dims:
    """(C r r, H, W) -> (C, H r, W r): r r channels go to each pixel."""
    channels, inner = site.axes.split(x[-3], _quotient(x[-3], factor * factor), site.node)
    site.freeze(inner, "a block of channels becomes a block of pixels")
    return (*x[:-3], channels, *_spatial(site, x, 2))


@rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(site: Site, x: Dims, factor: int) -> Dims:
    return (*x[:-3], product([x[-3], Fixed(factor * factor, "a block of pixels")]), *_spatial(site, x, 2))


@rule(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def channel_shuffle(site: Site, x: Dims, groups: int) -> Dims:
    """(groups, C / groups) channels become (C / groups, groups)."""
    major, minor = site.axes.split(x[1], groups, site.node)
    site.freeze(major, "the number of shuffled groups is an argument")
    return (x[0], product([minor, Fixed(groups, "shuffled groups")]), *x[2:])


def _quotient(dim: Dim, n: int) -> Size:
    size = divide(size_of(dim), n)
    if size is None:
        raise Misfit(f"{dim} is not a multiple of {n}")
    return size


@rule(aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)
@rule(aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default)
def pad_space(site: Site, x: Dims, amounts: Sequence[Any]) -> Dims:
    """Positions are padded by reflection or repetition, channels pass."""
    count = len(amounts) // 2
    return (*x[:-count], *_spatial(site, x, count))


def _spatial(site: Site, x: Dims, count: int) -> Dims:
    """The last `count` dimensions, frozen, with the sizes of the result."""
    for d in x[-count:]:
        site.freeze(d, "it is a spatial dimension")
    return tuple(Fixed(s, "a spatial dimension") for s in site.shape[-count:])


@rule(aten.unfold.default)
def unfold(site: Site, x: Dims, dim: int, size: Any, step: Any) -> Dims:
    dim = positive(dim, len(x))
    site.freeze(x[dim], "windows slide over it")
    return (*x[:dim], Fixed(site.shape[dim], "windows"), *x[dim + 1 :], Fixed(as_size(size), "a window"))


@rule(aten.im2col.default)
def im2col(site: Site, x: Dims, kernel: Sequence[int], *_: Any) -> Dims:
    """(N, C, H, W) -> (N, C kh kw, L)."""
    for d in x[-2:]:
        site.freeze(d, "it is a spatial dimension")
    window = Fixed(kernel[0] * kernel[1], "a window")
    return (*x[:-3], product([x[-3], window]), Fixed(site.shape[-1], "windows"))


@rule(aten.col2im.default)
def col2im(site: Site, x: Dims, _size: Any, kernel: Sequence[int], *_: Any) -> Dims:
    """(N, C kh kw, L) -> (N, C, H, W)."""
    channels, window = site.axes.split(x[-2], _quotient(x[-2], kernel[0] * kernel[1]), site.node)
    site.freeze(window, "a window")
    site.freeze(x[-1], "it is a spatial dimension")
    return (*x[:-2], channels, *(Fixed(s, "a spatial dimension") for s in site.shape[-2:]))
