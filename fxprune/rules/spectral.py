"""Complex numbers and Fourier transforms: transformed dimensions stay whole, the others pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxprune.axes import Fixed
from fxprune.rules.core import Dims, Site, aten, positive, rule


@rule(aten.view_as_real.default)
def view_as_real(site: Site, x: Dims) -> Dims:
    return (*x, Fixed(2, "real and imaginary part"))


@rule(aten.view_as_complex.default)
def view_as_complex(site: Site, x: Dims) -> Dims:
    site.freeze(x[-1], "it holds real and imaginary part")
    return x[:-1]


def transformed(site: Site, x: Dims, dims: Any) -> Dims:
    """The named dimensions frozen, with the sizes that they have in the result."""
    named = range(len(x)) if dims is None else (dims if isinstance(dims, Sequence) else [dims])
    at = {positive(d, len(x)) for d in named}
    for i in at:
        site.freeze(x[i], "it is transformed to frequencies")
    return tuple(Fixed(site.shape[i], "frequencies") if i in at else d for i, d in enumerate(x))


@rule(aten.fft_fft, aten.fft_ifft, aten.fft_rfft, aten.fft_irfft, aten.fft_hfft, aten.fft_ihfft)
def fft(site: Site, x: Dims, n: Any = None, dim: int = -1, norm: Any = None) -> Dims:
    return transformed(site, x, dim)


@rule(aten.fft_fft2, aten.fft_ifft2, aten.fft_rfft2, aten.fft_irfft2, aten.fft_hfft2, aten.fft_ihfft2)
def fft2(site: Site, x: Dims, s: Any = None, dim: Sequence[int] = (-2, -1), norm: Any = None) -> Dims:
    return transformed(site, x, dim)


@rule(aten.fft_fftn, aten.fft_ifftn, aten.fft_rfftn, aten.fft_irfftn, aten.fft_hfftn, aten.fft_ihfftn)
def fftn(site: Site, x: Dims, s: Any = None, dim: Any = None, norm: Any = None) -> Dims:
    """Sizes without dimensions are those of the last ones."""
    return transformed(site, x, range(-len(s), 0) if dim is None and s is not None else dim)


@rule(aten._fft_c2c.default, aten._fft_r2c.default, aten._fft_c2r.default)
def fft_below(site: Site, x: Dims, dims: Sequence[int], *_: Any) -> Dims:
    """What the transforms above are made of."""
    return transformed(site, x, dims)


@rule(aten.fft_fftshift.default, aten.fft_ifftshift.default)
def fftshift(site: Site, x: Dims, dim: Any = None) -> Dims:
    return transformed(site, x, dim)


@rule(aten.stft)
def stft(site: Site, x: Dims, *rest: Any, **options: Any) -> Dims:
    """x (..., samples) -> (..., frequencies, windows), or one dimension of 2 more."""
    for dims in (x[-1:], *(v for v in (*rest, *options.values()) if isinstance(v, tuple))):
        for d in dims:
            site.freeze(d, "it is transformed to frequencies")
    made = site.shape[len(x) - 1 :]
    return (*x[:-1], *(Fixed(s, "frequencies of windows") for s in made))


@rule(aten.istft.default)
def istft(site: Site, x: Dims, *rest: Any, **options: Any) -> Dims:
    """x (..., frequencies, windows) -> (..., samples)."""
    for dims in (x[-2:], *(v for v in (*rest, *options.values()) if isinstance(v, tuple))):
        for d in dims:
            site.freeze(d, "it is transformed from frequencies")
    return (*x[:-2], Fixed(site.shape[-1], "samples"))
