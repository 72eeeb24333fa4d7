"""The axis algebra: tensor dimensions are expressions over axes, and equating two dimensions unifies them.

A dimension is one of four things:

- `Axis`: a set of indices that must be removed together wherever it occurs; a variable of the algebra.
- `Fixed`: a size that no pruning may change (batch, sequence, image height, kernel size, a frozen axis).
- `Product`: a row-major merge of factors, as `view` makes it: 768 channels seen as 12 heads of 64.
- `Concat`: parts laid one behind the other, as `cat` makes it, and as `split`, `slice` and fused projections cut it.

Sizes are ints. Where a model is captured at several batch sizes at once, the size of a dimension that depends on
them is a tuple with one int for each capture; the arithmetic is element by element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Size = int | tuple[int, ...]

#: No dimension is cut into more pieces than this one by one; finer cuts freeze it instead.
MAX_PIECES = 1024


def times(a: Size, b: Size) -> Size:
    """Return the product of two sizes.

    >>> times(12, (2, 3))
    (24, 36)
    """
    if isinstance(a, int):
        return a * b if isinstance(b, int) else _tidy(a * y for y in b)
    return _tidy(x * b for x in a) if isinstance(b, int) else _tidy(x * y for x, y in zip(a, b, strict=True))


def plus(a: Size, b: Size) -> Size:
    """Return the sum of two sizes."""
    if isinstance(a, int):
        return a + b if isinstance(b, int) else _tidy(a + y for y in b)
    return _tidy(x + b for x in a) if isinstance(b, int) else _tidy(x + y for x, y in zip(a, b, strict=True))


def divide(a: Size, b: Size) -> Size | None:
    """Return a / b where b divides a in every capture, else None.

    >>> divide((24, 36), 12)
    (2, 3)
    >>> divide(7, 2) is None
    True
    """
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    pairs = [(x, y) for x, y in _pairs(a, b)]
    if any(y == 0 or x % y for x, y in pairs):
        return None
    return _tidy(x // y for x, y in pairs)


def _pairs(a: Size, b: Size) -> Iterator[tuple[int, int]]:
    n = len(a) if isinstance(a, tuple) else len(b) if isinstance(b, tuple) else 1
    left = a if isinstance(a, tuple) else (a,) * n
    right = b if isinstance(b, tuple) else (b,) * n
    return zip(left, right, strict=True)


def _tidy(values: Iterable[int]) -> Size:
    """A size that is the same in every capture is a plain int, so that equality is structural."""
    result = tuple(values)
    return result[0] if all(v == result[0] for v in result) else result


def tidy(values: Sequence[int]) -> Size:
    """Return one size from its values in each capture.

    >>> tidy((5, 5)), tidy((2, 3))
    (5, (2, 3))
    """
    return _tidy(values)


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """A variable: `size` indices that are kept or removed together. `birth` says where it first appeared."""

    size: int
    birth: str = ""

    def __eq__(self, other: object) -> bool:
        if isinstance(other, int):
            raise TypeError(f"an axis is not a number: compare its size, {self.size}, with {other}")
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<{self.birth or 'axis'}:{self.size}>"


@dataclass(frozen=True, slots=True)
class Fixed:
    """A size that stays as it is; `why` says what fixed it and does not take part in equality."""

    size: Size
    why: str = field(default="", compare=False)

    def __repr__(self) -> str:
        return str(self.size)


@dataclass(frozen=True, slots=True)
class Product:
    """Factors merged row-major. Build with `product`, which normalises."""

    factors: tuple[Dim, ...]

    def __repr__(self) -> str:
        return "(" + "*".join(map(repr, self.factors)) + ")"


@dataclass(frozen=True, slots=True)
class Concat:
    """Parts one behind the other. Build with `concat`, which normalises."""

    parts: tuple[Dim, ...]

    def __repr__(self) -> str:
        return "(" + "+".join(map(repr, self.parts)) + ")"


Dim = Axis | Fixed | Product | Concat
ONE = Fixed(1)


def size_of(dim: Dim) -> Size:
    """Return the size of a dimension: the product of a product's factors, the sum of a concatenation's parts."""
    if isinstance(dim, Axis | Fixed):
        return dim.size
    if isinstance(dim, Product):
        total: Size = 1
        for factor in dim.factors:
            total = times(total, size_of(factor))
        return total
    total = 0
    for part in dim.parts:
        total = plus(total, size_of(part))
    return total


def product(factors: Iterable[Dim]) -> Dim:
    """Return the normalised product: flat, without ones, neighbouring fixed sizes merged.

    >>> product([Fixed(2), product([Fixed(3), Axis(4, "c")]), ONE])
    (6*<c:4>)
    """
    flat: list[Dim] = []
    for factor in factors:
        for f in factor.factors if isinstance(factor, Product) else (factor,):
            if isinstance(f, Fixed):
                if f.size == 1:
                    continue
                if f.size == 0:
                    return f
                if flat and isinstance(flat[-1], Fixed):
                    flat[-1] = Fixed(times(flat[-1].size, f.size), flat[-1].why or f.why)
                    continue
            flat.append(f)
    if not flat:
        return ONE
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def concat(parts: Iterable[Dim]) -> Dim:
    """Return the normalised concatenation: flat, without empty parts, neighbouring fixed sizes merged.

    >>> concat([Fixed(1), Fixed(196), Axis(8, "c")])
    (197+<c:8>)
    """
    flat: list[Dim] = []
    for part in parts:
        for p in part.parts if isinstance(part, Concat) else (part,):
            if isinstance(p, Fixed):
                if p.size == 0:
                    continue
                if flat and isinstance(flat[-1], Fixed):
                    flat[-1] = Fixed(plus(flat[-1].size, p.size), flat[-1].why or p.why)
                    continue
            flat.append(p)
    if not flat:
        return Fixed(0)
    return flat[0] if len(flat) == 1 else Concat(tuple(flat))


def atoms(dim: Dim) -> Iterator[Axis]:
    """Yield the axes a dimension is made of, once for each occurrence.

    >>> c = Axis(4, "c")
    >>> list(atoms(concat([c, product([Fixed(2), c])])))
    [<c:4>, <c:4>]
    """
    if isinstance(dim, Axis):
        yield dim
    elif isinstance(dim, Product):
        for factor in dim.factors:
            yield from atoms(factor)
    elif isinstance(dim, Concat):
        for part in dim.parts:
            yield from atoms(part)


@dataclass(frozen=True, slots=True)
class Frozen:
    """Why an axis stays whole: a reason, and the node (an fx.Node, or None) that caused it."""

    reason: str
    node: Any = None


class Misfit(Exception):
    """Two dimensions, or a dimension and a shape, that cannot be brought together."""


class Axes:
    """The store of bindings: what each axis has turned out to be.

    >>> axes = Axes()
    >>> weight = axes.fresh(768, "weight.0")
    >>> heads = axes.regroup((Fixed(2), weight), (2, 12, 64))
    >>> heads
    (2, <weight.0/12:12>, <weight.0%64:64>)
    >>> axes.resolve(weight)
    (<weight.0/12:12>*<weight.0%64:64>)
    """

    def __init__(self) -> None:
        self._bound: dict[Axis, Dim] = {}
        self.frozen: dict[Axis, Frozen] = {}

    # ------------------------------------------------------------------ creating and looking up
    def fresh(self, size: Size, birth: str = "") -> Dim:
        """Return a new axis. A single index cannot be removed, nor can a size that varies: those are fixed."""
        if isinstance(size, tuple):
            return Fixed(size, f"{birth} has a dynamic size")
        return Axis(size, birth) if size > 1 else Fixed(size, "a single index cannot be removed")

    def resolve(self, dim: Dim) -> Dim:
        """Return what the dimension has become after all unifications so far."""
        if isinstance(dim, Fixed):
            return dim
        if isinstance(dim, Axis):
            bound = self._bound.get(dim)
            if bound is None:
                return dim
            result = self.resolve(bound)
            if result is not bound and not isinstance(result, Fixed):  # the way to a fixed one says why it is
                self._bound[dim] = result
            return result
        if isinstance(dim, Product):
            factors = [self.resolve(f) for f in dim.factors]
            same = all(a is b for a, b in zip(factors, dim.factors, strict=True))
            return dim if same else product(factors)
        parts = [self.resolve(p) for p in dim.parts]
        return dim if all(a is b for a, b in zip(parts, dim.parts, strict=True)) else concat(parts)

    def reason(self, dim: Dim | None) -> Frozen | None:
        """Return why the dimension, or the first frozen part of it, is frozen; None where it is free."""
        while isinstance(dim, Axis):
            if dim in self.frozen:
                return self.frozen[dim]
            dim = self._bound.get(dim)
        if dim is None:
            return None
        if isinstance(dim, Fixed):
            return Frozen(dim.why or "it meets a fixed dimension")
        parts = dim.factors if isinstance(dim, Product) else dim.parts
        return next((found for found in map(self.reason, parts) if found), None)

    # ------------------------------------------------------------------ freezing and unifying
    def freeze(self, dim: Dim, reason: str, node: Any = None) -> Dim:
        """Make every axis of the dimension stay whole; return the fixed dimension."""
        for axis in list(atoms(self.resolve(dim))):
            if axis not in self._bound:
                self._bound[axis] = Fixed(axis.size, reason)
                self.frozen[axis] = Frozen(reason, node)
        return self.resolve(dim)

    def unify(self, a: Dim, b: Dim, node: Any = None) -> Dim:
        """Make two dimensions one. What cannot be made one is frozen on both sides, with a reason."""
        try:
            self._unify(a, b, node)
        except Misfit as misfit:
            self.freeze(a, str(misfit), node)
            self.freeze(b, str(misfit), node)
        return self.resolve(a)

    def _unify(self, a: Dim, b: Dim, node: Any) -> None:
        a, b = self.resolve(a), self.resolve(b)
        if a == b:
            return
        if size_of(a) != size_of(b):
            raise Misfit(f"sizes {size_of(a)} and {size_of(b)} meet")
        if isinstance(a, Axis) and not isinstance(b, Fixed):
            self._bound[a] = b
        elif isinstance(b, Axis) and not isinstance(a, Fixed):
            self._bound[b] = a
        elif isinstance(a, Fixed):
            self.freeze(b, a.why or "it meets a fixed dimension", node)
        elif isinstance(b, Fixed):
            self.freeze(a, b.why or "it meets a fixed dimension", node)
        elif isinstance(a, Product) and isinstance(b, Product):
            self._unify_products(a, b, node)
        else:
            other, parts = (a, b.parts) if isinstance(b, Concat) else (b, a.parts if isinstance(a, Concat) else ())
            pieces = self.cut(other, [size_of(p) for p in parts], node)
            for piece, part in zip(pieces, parts, strict=True):
                self._unify(piece, part, node)

    def _unify_products(self, a: Product, b: Product, node: Any) -> None:
        left, right = list(a.factors), list(b.factors)
        while left or right:
            x, y = self._pop(left), self._pop(right)
            if x is None or y is None:
                break
            if size_of(x) == size_of(y):
                self._unify(x, y, node)
            elif divide(size_of(x), size_of(y)) is not None:
                major, minor = self.split(x, size_of(y), node)
                left.insert(0, minor)
                self._unify(major, y, node)
            elif divide(size_of(y), size_of(x)) is not None:
                major, minor = self.split(y, size_of(x), node)
                right.insert(0, minor)
                self._unify(x, major, node)
            else:
                raise Misfit(f"{a} and {b} share no common factors")

    def _pop(self, queue: list[Dim]) -> Dim | None:
        """Take the next factor that is neither a product nor 1."""
        while queue:
            x = self.resolve(queue.pop(0))
            if isinstance(x, Product):
                queue[:0] = x.factors
            elif size_of(x) != 1:
                return x
        return None

    # ------------------------------------------------------------------ splitting and cutting
    def split(self, dim: Dim, major: Size, node: Any = None) -> tuple[Dim, Dim]:
        """See a dimension of size n as (major, n / major), row-major, and return the two.

        Raises Misfit where its structure does not allow it.
        """
        dim = self.resolve(dim)
        minor = divide(size_of(dim), major)
        if minor is None:
            raise Misfit(f"{dim} cannot be seen as {major} times something")
        if minor == 1:
            return dim, ONE
        if major == 1:
            return ONE, dim
        if isinstance(dim, Fixed):
            return Fixed(major, dim.why), Fixed(minor, dim.why)
        if isinstance(dim, Axis):
            pair = self.fresh(major, f"{dim.birth}/{major}"), self.fresh(minor, f"{dim.birth}%{minor}")
            self._bound[dim] = product(pair)
            return pair
        if isinstance(dim, Product):
            majors, rest, need = [], list(dim.factors), major
            while need != 1:
                factor = self._pop(rest)
                assert factor is not None, "a product's factors multiply to its size"
                less = divide(need, size_of(factor))
                if less is not None:
                    majors.append(factor)
                    need = less
                else:
                    first, second = self.split(factor, need, node)
                    majors.append(first)
                    rest.insert(0, second)
                    need = 1
            return product(majors), product(rest)
        if not isinstance(major, int) or major > MAX_PIECES:
            raise Misfit(f"{dim} is not cut into {major} equal parts")
        pieces = self.cut(dim, [minor] * major, node)
        for piece in pieces[1:]:
            self._unify(pieces[0], piece, node)
        return Fixed(major, "a concatenation seen as equal rows"), self.resolve(pieces[0])

    def cut(self, dim: Dim, sizes: Sequence[Size], node: Any = None) -> list[Dim]:
        """Cut a dimension into consecutive pieces of the given sizes, splitting axes where a cut falls inside one."""
        if len(sizes) > MAX_PIECES:
            self.freeze(dim, f"it is cut into {len(sizes)} pieces", node)
            return [Fixed(s, "a piece of many") for s in sizes]
        queue: list[Dim] = [dim]
        result: list[list[Dim]] = []
        for size in sizes:
            piece: list[Dim] = []
            need = size
            while need != 0:
                if not queue:
                    raise Misfit(f"{dim} is shorter than its pieces {list(sizes)}")
                x = self.resolve(queue.pop(0))
                if isinstance(x, Concat):
                    queue[:0] = x.parts
                    continue
                have = size_of(x)
                less = plus(need, times(-1, have))
                if all(v >= 0 for v in (less if isinstance(less, tuple) else (less,))):
                    piece.append(x)
                    need = less
                else:
                    queue[:0] = self._cut_at(x, need, node)
            result.append(piece)
        return [self.resolve(concat(piece)) for piece in result]

    def _cut_at(self, x: Dim, at: Size, node: Any) -> list[Dim]:
        """Return two or more pieces whose first is not larger than `at`, or nearer to being so."""
        rest = plus(size_of(x), times(-1, at))
        if isinstance(x, Fixed):
            if any(v < 0 for v in (rest if isinstance(rest, tuple) else (rest,))):
                raise Misfit(f"{x} is cut at {at}, which is inside it in one capture only")
            return [Fixed(at, x.why), Fixed(rest, x.why)]
        if isinstance(x, Axis):
            pair = [self.fresh(at, f"{x.birth}[:{at}]"), self.fresh(rest, f"{x.birth}[{at}:]")]
            self._bound[x] = concat(pair)
            return pair
        assert isinstance(x, Product)
        first, others = x.factors[0], product(x.factors[1:])
        inner = size_of(others)
        if not (isinstance(at, int) and isinstance(inner, int)) or isinstance(size_of(first), tuple):
            raise Misfit(f"{x} is cut at {at}")
        heads, tail = self.cut(first, [max(at // inner, 1), plus(size_of(first), -max(at // inner, 1))], node)
        return [product([heads, others]), product([tail, others])]

    # ------------------------------------------------------------------ reshaping
    def regroup(self, dims: Sequence[Dim], sizes: Sequence[Size], node: Any = None) -> tuple[Dim, ...]:
        """Reshape: flatten the dimensions to one row-major list of factors and group them anew to `sizes`.

        Factors that straddle the new borders are frozen; the others stay free.
        """
        if any(s == 0 for s in sizes):
            for dim in dims:
                self.freeze(dim, "an empty tensor is reshaped", node)
            return tuple(Fixed(s) for s in sizes)
        queue = list(dims)
        result: list[Dim] = []
        pending = list(sizes)
        while pending:
            need = pending.pop(0)
            got: list[Dim] = []
            taken: Size = 1
            while need != 1:
                x = self._pop(queue)
                if x is None:
                    raise Misfit(f"{tuple(dims)} has not the size of {tuple(sizes)}")
                less = divide(need, size_of(x))
                if less is not None:
                    got.append(x)
                    need, taken = less, times(taken, size_of(x))
                    continue
                try:
                    first, second = self.split(x, need, node)
                except Misfit:
                    result += self._straddle([*got, x], times(taken, need), pending, queue, node)
                    got = []
                    break
                got.append(first)
                queue.insert(0, second)
                need = 1
            else:
                result.append(self.resolve(product(got)))
        return tuple(self.resolve(d) for d in result)

    def _straddle(self, taken: list[Dim], size: Size, pending: list[Size], queue: list[Dim], node: Any) -> list[Dim]:
        """Freeze whole factors and whole output sizes until both sides have the same number of elements again."""
        outs, total_out = [size], size
        total_in: Size = 1
        for x in taken:
            total_in = times(total_in, size_of(x))
        while total_in != total_out:
            grow = divide(total_out, total_in)
            if (grow is None and _smaller(total_out, total_in)) or (grow is None and not queue) or not queue:
                if not pending:
                    raise Misfit("a reshape does not keep the number of elements")
                outs.append(pending.pop(0))
                total_out = times(total_out, outs[-1])
            else:
                factor = self._pop(queue)
                if factor is not None:
                    taken.append(factor)
                    total_in = times(total_in, size_of(factor))
        why = "a reshape groups it across its borders"
        for x in taken:
            self.freeze(x, why, node)
        return [Fixed(s, why) for s in outs]


def _smaller(a: Size, b: Size) -> bool:
    return math.prod(x for x, _ in _pairs(a, b)) < math.prod(y for _, y in _pairs(a, b))
