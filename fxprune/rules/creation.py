"""Operators that make tensors out of sizes.

A tensor filled with one value can take any size: its dimensions are new axes. One whose values depend on the position
(`arange`) stays as it is; where its arguments are constants it has been folded into a constant beforehand.
"""

from __future__ import annotations

from typing import Any

from fxprune.rules.core import Dims, Site, aten, output_shape, rule


@rule(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format, literals=output_shape("size"))
@rule(aten.rand.default, aten.randn.default, literals=output_shape("size"))
def filled(site: Site, *_: Any, **__: Any) -> Dims:
    return tuple(site.fresh(s, f".{i}") for i, s in enumerate(site.shape))


@rule(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, literals=output_shape("size"))
@rule(aten.new_empty.default, literals=output_shape("size"))
def filled_like(site: Site, *_: Any, **__: Any) -> Dims:
    return tuple(site.fresh(s, f".{i}") for i, s in enumerate(site.shape))


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default, aten.eye.default)
@rule(aten.randint.default, aten.randint.low, literals=output_shape("size"))
@rule(aten.rand.generator, aten.randn.generator, literals=output_shape("size"))
def random_numbers(site: Site, *_: Any, **__: Any) -> Dims:
    return filled(site)  # type: ignore[no-any-return]


@rule(aten.randperm.default, aten.logspace.default)
@rule(aten.hann_window.default, aten.hann_window.periodic, aten.hamming_window.default, aten.empty_strided.default)
@rule(aten.scalar_tensor.default)
def positions(site: Site, *_: Any, **__: Any) -> Any:
    return site.outputs("its values depend on the position")
