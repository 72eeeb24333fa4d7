"""Samples for complex numbers and Fourier transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rules import Net, Sample, aten, sample


def _h(net: Net, x: Tensor, out: int = 8) -> Tensor:
    return net.linear(x, out).tanh()


def _real(y: Tensor) -> Tensor:
    return y.real + y.imag if y.is_complex() else y


def _halves(h: Tensor) -> Tensor:
    """What an inverse transform takes: complex numbers."""
    return torch.complex(h, h.cos())


def _pair(target: Any, *args: Any, of: Any = lambda h: h, dims: tuple[Any, Any] = (1, -1)) -> list[Sample]:
    """Positions are transformed, features pass; and the other way round."""
    along, across = dims

    def rows(net: Net, x: Tensor) -> Tensor:
        return net.linear(_real(target(of(_h(net, x).view(-1, 2, 4, 8)), *args, along)), 3).sum((1, 2))

    def channels(net: Net, x: Tensor) -> Tensor:
        return net.linear(_real(target(of(_h(net, x).view(-1, 2, 4, 8)), *args, across)), 3).sum((1, 2))

    return [
        sample(target, rows, 8, 5, groups=[8], note="rows"),
        sample(target, channels, 8, 5, groups=[], note="channels"),
    ]


_BACK = ("irfft", "hfft")


def _family(kind: str, dims: tuple[Any, Any]) -> list[Sample]:
    found = []
    for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
        target = getattr(aten, f"fft_{name}{kind}").default
        found += _pair(target, None, of=_halves if name in _BACK else lambda h: h, dims=dims)
    return found


def _rotated(net: Net, x: Tensor) -> Tensor:
    """Rotary embedding of complex numbers: pairs of features are turned by the angle of their position."""
    h = net.linear(x, 8).view(-1, 6, 4, 2)
    turn = torch.polar(torch.ones(6, 4), torch.arange(24.0).view(6, 4) * 0.1)
    return net.linear(aten.view_as_real.default(aten.view_as_complex.default(h) * turn).flatten(2), 3)


def _windows(net: Net, x: Tensor, target: Any, rest: tuple[Any, ...]) -> Tensor:
    """Each feature is a signal."""
    signals = _h(net, x).transpose(1, 2).reshape(-1, 6)
    spectrum = target(signals, 4, 2, 4, torch.ones(4), *rest, return_complex=True).abs()
    return net.linear(spectrum.reshape(x.shape[0], 8, -1).transpose(1, 2), 3)


def _signals(net: Net, x: Tensor) -> Tensor:
    spectrum = _halves(net.linear(x, 6).sin().view(-1, 2, 3, 4)).flatten(0, 1)
    return net.linear(aten.istft.default(spectrum, 4, 2, 4, torch.ones(4)).view(x.shape[0], -1), 3)


SAMPLES = [
    sample([aten.view_as_real.default, aten.view_as_complex.default], _rotated, 6, 5, groups=[4]),
    *_family("", (1, -1)),
    *_family("2", ([1, 2], [-2, -1])),
    *_family("n", ([1, 2], None)),
    sample(
        aten.fft_fftn.default,
        lambda net, x: net.linear(aten.fft_fftn.default(_h(net, x).transpose(1, 2), [3]).real.transpose(1, 2), 3),
        *(4, 5),
        groups=[8],
        note="sizes",
    ),
    sample(
        aten._fft_c2c.default,
        lambda net, x: net.linear(_real(aten._fft_c2c.default(_halves(_h(net, x)), [1], 0, True)), 3),
        *(4, 5),
        groups=[8],
    ),
    sample(
        aten._fft_r2c.default,
        lambda net, x: net.linear(_real(aten._fft_r2c.default(_h(net, x), [1], 0, True)), 3),
        *(4, 5),
        groups=[8],
    ),
    sample(
        aten._fft_c2r.default,
        lambda net, x: net.linear(aten._fft_c2r.default(_halves(_h(net, x)), [1], 0, 6), 3),
        *(4, 5),
        groups=[8],
    ),
    *[s for t in (aten.fft_fftshift.default, aten.fft_ifftshift.default) for s in _pair(t, dims=([1], [-1]))],
    *[
        sample(t, lambda net, x, t=t, rest=rest: _windows(net, x, t, rest), 6, 5, groups=[8])
        for t, rest in ((aten.stft.default, ()), (aten.stft.center, (True,)))
    ],
    sample(aten.istft.default, _signals, 4, 5, groups=[]),
]
