"""Properties of the axis algebra.

The oracle throughout: a dimension of size n stands for the numbers 0 .. n-1, and whatever the algebra does to
dimensions must give the same numbers as torch gives when it does the same to `torch.arange(n)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxprune.axes import (
    MAX_PIECES,
    ONE,
    Axes,
    Axis,
    Concat,
    Dim,
    Fixed,
    Misfit,
    Product,
    atoms,
    concat,
    divide,
    plus,
    product,
    size_of,
    tidy,
    times,
)
from fxprune.kept import Kept

SIZES = st.integers(1, 5)
SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@st.composite
def dims(draw: st.DrawFn, depth: int = 2) -> Dim:
    """Any dimension: axes (some of which occur twice), fixed sizes, products and concatenations of them."""
    shared = [Axis(size, f"s{size}") for size in (2, 3, 4)]

    def any_dim(depth: int) -> Dim:
        kind = draw(st.sampled_from(["axis", "shared", "fixed", *(["product", "concat"] if depth else [])]))
        if kind == "axis":
            return Axis(draw(st.integers(2, 5)), "a")
        if kind == "shared":
            return draw(st.sampled_from(shared))
        if kind == "fixed":
            return Fixed(draw(st.integers(0 if depth == 0 else 1, 4)))
        parts = [any_dim(depth - 1) for _ in range(draw(st.integers(1, 3)))]
        return product(parts) if kind == "product" else concat(parts)

    return any_dim(depth)


def selection(draw: st.DrawFn, axes: Sequence[Axis]) -> Kept:
    """Any kept indices for each of the axes."""
    return Kept(
        {
            a: np.array(sorted(draw(st.sets(st.integers(0, a.size - 1), min_size=1, max_size=a.size))))
            for a in dict.fromkeys(axes)
        }
    )


def numbered(shape: Sequence[int]) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(tuple(shape))


def free(axes: Axes, found: Sequence[Dim]) -> list[Axis]:
    return [a for d in found for a in atoms(axes.resolve(d))]


# ---------------------------------------------------------------------- constructors
@given(st.lists(dims(), max_size=4), st.lists(dims(), max_size=4))
def test_products_and_concatenations_are_associative(left: list[Dim], right: list[Dim]) -> None:
    assert product([product(left), product(right)]) == product([*left, *right])
    assert concat([concat(left), concat(right)]) == concat([*left, *right])


@given(st.lists(dims(), min_size=1, max_size=4), st.integers(0, 4))
def test_one_and_nothing_are_neutral(parts: list[Dim], where: int) -> None:
    assert product([*parts[:where], ONE, *parts[where:]]) == product(parts)
    assert concat([*parts[:where], Fixed(0), *parts[where:]]) == concat(parts)
    assert product([parts[0]]) == concat([parts[0]]) == parts[0]


@given(dims(3))
def test_what_is_built_is_normal(dim: Dim) -> None:
    """No product directly in a product, no concatenation in a concatenation, no two fixed sizes side by side."""
    inner = dim.factors if isinstance(dim, Product) else dim.parts if isinstance(dim, Concat) else ()
    assert not any(type(d) is type(dim) for d in inner) and len(inner) != 1
    assert not any(isinstance(a, Fixed) and isinstance(b, Fixed) for a, b in itertools.pairwise(inner))
    for d in inner:
        test_what_is_built_is_normal.hypothesis.inner_test(d)  # type: ignore[attr-defined]


@given(st.lists(dims(), min_size=1, max_size=4))
def test_sizes_multiply_and_add(parts: list[Dim]) -> None:
    assert size_of(product(parts)) == math.prod(size_of(p) for p in parts)  # type: ignore[misc]
    assert size_of(concat(parts)) == sum(size_of(p) for p in parts)  # type: ignore[misc]


@given(st.data(), dims())
def test_kept_positions_agree_with_masks_and_sizes(data: st.DataObject, dim: Dim) -> None:
    kept = selection(data.draw, list(atoms(dim)))
    index = kept.index(dim)
    assert len(index) == kept.size(dim) and (np.diff(index) > 0).all()
    mask = kept.mask(dim)
    assert not kept.cut(dim) if mask is None else (np.flatnonzero(mask) == index).all()


@given(st.data(), st.lists(dims(1), min_size=1, max_size=3))
def test_selecting_commutes_with_merging_and_joining(data: st.DataObject, parts: list[Dim]) -> None:
    """Cutting each dimension and then flattening (or joining) is the same as flattening (or joining) first."""
    kept = selection(data.draw, [a for d in parts for a in atoms(d)])
    table = numbered([size_of(d) for d in parts])  # type: ignore[misc]
    assert torch.equal(kept.select(table, tuple(parts)).reshape(-1), kept.select(table.reshape(-1), (product(parts),)))
    rows = [numbered([size_of(d)]) + 100 * i for i, d in enumerate(parts)]  # type: ignore[list-item]
    joined = torch.cat([kept.select(r, (d,)) for r, d in zip(rows, parts, strict=True)])
    assert torch.equal(joined, kept.select(torch.cat(rows), (concat(parts),)))


# ---------------------------------------------------------------------- sizes that vary
def test_varying_sizes_are_tuples_only_where_they_vary() -> None:
    assert times((2, 3), (3, 2)) == 6 and plus((2, 3), (1, 0)) == 3 and divide((4, 6), (2, 3)) == 2
    assert times(2, (2, 3)) == (4, 6) and plus(1, (2, 3)) == (3, 4) and divide((4, 6), 4) is None
    assert tidy((4, 4)) == 4 and divide(4, 0) is None and divide((4, 6), (2, 0)) is None


@given(st.tuples(SIZES, SIZES), st.tuples(SIZES, SIZES))
def test_division_undoes_multiplication(a: tuple[int, int], b: tuple[int, int]) -> None:
    assert divide(times(tidy(a), tidy(b)), tidy(b)) == tidy(a)
    assert plus(plus(tidy(a), tidy(b)), times(-1, tidy(b))) == tidy(a)


def test_an_axis_is_no_number() -> None:
    with pytest.raises(TypeError, match="an axis is not a number: compare its size, 4, with 4"):
        assert Axis(4) == 4


# ---------------------------------------------------------------------- reshaping
@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of the same number of elements: factors grouped in two ways, or what does not fit at all."""
    factors = draw(st.lists(st.sampled_from([2, 2, 3, 3, 4, 5]), min_size=1, max_size=5))

    def grouped(factors: list[int]) -> list[int]:
        shape, rest = [], list(factors)
        while rest:
            count = draw(st.integers(1, len(rest)))
            shape.append(math.prod(rest[:count]))
            rest = rest[count:]
            if draw(st.booleans()) and len(shape) < 5:
                shape.append(1)
        return shape

    return grouped(factors), grouped(list(draw(st.permutations(factors))) if draw(st.booleans()) else factors)


@given(st.data(), reshapes())
def test_selecting_commutes_with_reshaping(data: st.DataObject, shapes: tuple[list[int], list[int]]) -> None:
    """The heart of it: what is left of x, reshaped, is what is left of x.reshape(...)."""
    before, after = shapes
    axes = Axes()
    sources = [axes.fresh(s, f"d{i}") for i, s in enumerate(before)]
    results = axes.regroup(sources, after)
    assert [size_of(d) for d in results] == after
    kept = selection(data.draw, free(axes, sources))
    old, new = tuple(map(axes.resolve, sources)), tuple(map(axes.resolve, results))
    small = kept.select(numbered(before), old)
    assert torch.equal(small.reshape([kept.size(d) for d in new]), kept.select(numbered(after), new))  # type: ignore[misc]


@given(reshapes())
def test_reshaping_there_and_back_changes_nothing(shapes: tuple[list[int], list[int]]) -> None:
    before, after = shapes
    axes = Axes()
    sources = [axes.fresh(s, f"d{i}") for i, s in enumerate(before)]
    back = axes.regroup(axes.regroup(sources, after), before)
    assert [axes.resolve(d) for d in back] == [axes.resolve(d) for d in sources]


@given(st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=5))
def test_splitting_into_factors_freezes_nothing(factors: list[int]) -> None:
    axes = Axes()
    whole = axes.fresh(math.prod(factors))
    parts = axes.regroup([whole], factors)
    assert free(axes, parts) == free(axes, [whole]) and not axes.frozen


def test_a_reshape_across_borders_freezes_just_the_factors_at_the_border() -> None:
    axes = Axes()
    first, second, third = axes.fresh(6), axes.fresh(4), axes.fresh(5)
    results = axes.regroup([first, second, third], (8, 3, 5))
    assert free(axes, results) == [third] and "across its borders" in axes.reason(first).reason  # type: ignore[union-attr]


@given(reshapes())
def test_borders_are_those_that_torch_finds(shapes: tuple[list[int], list[int]]) -> None:
    """Dimensions that torch's own analysis of views keeps apart, or splits, stay free here too."""
    view_ops = pytest.importorskip("torch.distributed.tensor._ops._view_ops")
    before, after = shapes
    axes = Axes()
    sources = [axes.fresh(s, f"d{i}") for i, s in enumerate(before)]
    results = axes.regroup(sources, after)
    for spec, result in zip(view_ops.view_groups(before, after), results, strict=True):
        alone = isinstance(spec, view_ops.InputDim)
        whole = isinstance(spec, view_ops.Flatten) and all(isinstance(d, view_ops.InputDim) for d in spec.input_dims)
        if alone or whole:
            names = [spec.input_dim] if alone else [d.input_dim for d in spec.input_dims]
            expected = [a for n in names for a in free(axes, [sources[n]])]
            assert free(axes, [result]) == expected and math.prod(a.size for a in expected) == size_of(result)


# ---------------------------------------------------------------------- cutting and joining
@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[int]:
    """Any sizes of consecutive pieces, empty ones among them."""
    borders = sorted(draw(st.lists(st.integers(0, size), max_size=4)))
    return [b - a for a, b in zip([0, *borders], [*borders, size], strict=True)]


@given(st.data(), dims())
def test_cut_then_join_is_the_identity(data: st.DataObject, dim: Dim) -> None:
    size = size_of(dim)
    assert isinstance(size, int)
    sizes = data.draw(cuts(size))
    axes = Axes()
    try:
        pieces = axes.cut(dim, sizes)
    except Misfit:
        return
    pieces = [axes.resolve(p) for p in pieces]
    assert [size_of(p) for p in pieces] == sizes
    kept = selection(data.draw, free(axes, [dim]))
    whole = numbered([size])
    small = kept.select(whole, (axes.resolve(dim),))
    parts = [kept.select(w, (p,)) for w, p in zip(whole.split(sizes), pieces, strict=True)]
    assert torch.equal(torch.cat(parts), small)
    assert kept.size(concat(pieces)) == kept.size(axes.resolve(dim))


@given(st.integers(2, 30), st.data())
def test_an_axis_can_be_cut_anywhere(size: int, data: st.DataObject) -> None:
    axes = Axes()
    axis = axes.fresh(size)
    pieces = axes.cut(axis, data.draw(cuts(size)))
    assert concat(pieces) == axes.resolve(axis) and not axes.frozen


def test_many_pieces_freeze() -> None:
    axes = Axes()
    axis = axes.fresh(2 * MAX_PIECES + 2)
    assert axes.cut(axis, [2] * (MAX_PIECES + 1))[0] == Fixed(2)
    assert axes.reason(axis).reason == f"it is cut into {MAX_PIECES + 1} pieces"  # type: ignore[union-attr]


@pytest.mark.parametrize("sizes", [[3, 3], [9]])
def test_pieces_longer_than_the_whole_are_refused(sizes: list[int]) -> None:
    with pytest.raises(Misfit, match="is shorter than its pieces"):
        Axes().cut(Axis(5), sizes)


@given(st.data(), dims(), st.integers(1, 6))
def test_a_split_is_a_row_major_view(data: st.DataObject, dim: Dim, major: int) -> None:
    axes = Axes()
    size = size_of(dim)
    assert isinstance(size, int)
    try:
        first, second = axes.split(dim, major)
    except Misfit:
        return
    pair = axes.resolve(first), axes.resolve(second)
    assert size_of(pair[0]) == major
    kept = selection(data.draw, free(axes, [dim, *pair]))
    small = kept.select(numbered([size]), (axes.resolve(dim),))
    table = kept.select(numbered([size]).reshape(major, -1), pair)
    assert torch.equal(small.reshape(table.shape), table)


# ---------------------------------------------------------------------- unifying
@st.composite
def pairs(draw: st.DrawFn) -> tuple[Dim, Dim]:
    """Two dimensions of one size; the second is the first's size built in any other way."""

    def built(size: int, depth: int) -> Dim:
        divisors = [d for d in range(2, size) if size % d == 0]
        kinds = ["axis"] + (["fixed"] if draw(st.integers(0, 5)) == 0 else [])
        if depth and size > 1:
            kinds += ["concat"] + (["product"] * 2 if divisors else [])
        kind = draw(st.sampled_from(kinds))
        if kind == "product":
            major = draw(st.sampled_from(divisors))
            return product([built(major, depth - 1), built(size // major, depth - 1)])
        if kind == "concat":
            at = draw(st.integers(1, size - 1))
            return concat([built(at, depth - 1), built(size - at, depth - 1)])
        return Axis(size) if kind == "axis" and size > 1 else Fixed(size)

    size = draw(st.sampled_from([4, 6, 8, 12, 24]))
    return built(size, 2), built(size, 2)


def sides(pair: tuple[Dim, Dim], swap: bool) -> tuple[Axes, Dim, Dim]:
    axes = Axes()
    a, b = pair
    axes.unify(*((b, a) if swap else (a, b)))
    return axes, axes.resolve(a), axes.resolve(b)


@given(st.data(), pairs())
def test_unified_dimensions_are_one(data: st.DataObject, pair: tuple[Dim, Dim]) -> None:
    """Whatever is kept afterwards, both sides keep the same positions; sizes are what they were."""
    axes, a, b = sides(pair, swap=False)
    assert size_of(a) == size_of(b) == size_of(pair[0])
    kept = selection(data.draw, free(axes, [a, b]))
    assert kept.index(a).tolist() == kept.index(b).tolist()
    assert kept.size(a) == kept.size(b)


@given(pairs())
def test_unifying_again_changes_nothing(pair: tuple[Dim, Dim]) -> None:
    axes, a, b = sides(pair, swap=False)
    frozen = dict(axes.frozen)
    axes.unify(a, b)
    axes.unify(*pair)
    assert (axes.resolve(a), axes.resolve(b), axes.frozen) == (a, b, frozen)


@given(pairs())
def test_the_order_of_the_sides_does_not_matter(pair: tuple[Dim, Dim]) -> None:
    """As many units of freedom, of the same sizes, and the same coupling either way."""
    forth, back = sides(pair, swap=False), sides(pair, swap=True)
    for side in (1, 2):
        assert _coupling(forth[side]) == _coupling(back[side])


def _coupling(dim: Dim) -> list[list[int]]:
    """For each axis of a dimension, and each of its indices, the positions that it takes away."""
    whole = Kept({}).index(dim)
    return sorted(
        sorted(set(whole) - set(Kept({axis: np.delete(np.arange(axis.size), i)}).index(dim)))
        for axis in set(atoms(dim))
        for i in range(axis.size)
    )


def test_a_fixed_side_freezes_the_other_and_says_why() -> None:
    axes = Axes()
    channels = axes.fresh(8, "conv.weight.0")
    axes.unify(channels, Fixed(8, "dimension 1 of the input 'x'"))
    assert axes.resolve(channels) == Fixed(8)
    assert axes.reason(channels).reason == "dimension 1 of the input 'x'"  # type: ignore[union-attr]


def test_different_sizes_freeze_both_sides() -> None:
    axes = Axes()
    a, b = axes.fresh(8), axes.fresh(6)
    axes.unify(a, b)
    assert axes.resolve(a) == Fixed(8) and axes.resolve(b) == Fixed(6)
    assert axes.reason(a).reason == "sizes 8 and 6 meet"  # type: ignore[union-attr]


def test_fused_projections_are_unified_part_by_part() -> None:
    """Query, key and value behind each other, against three heads of four for each: (3, heads, width)."""
    axes = Axes()
    parts = [axes.fresh(12, n) for n in "qkv"]
    heads, width = axes.fresh(3, "heads"), axes.fresh(4, "width")
    axes.unify(concat(parts), product([Fixed(3), heads, width]))
    assert {axes.resolve(p) for p in parts} == {product([heads, width])}


def test_rotated_halves_become_one() -> None:
    axes = Axes()
    whole = axes.fresh(8, "width")
    first, second = axes.cut(whole, [4, 4])
    axes.unify(concat([second, first]), whole)
    assert len(set(free(axes, [whole]))) == 1 and not axes.frozen
