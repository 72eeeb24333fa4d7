"""The recorder where code asks for values, writes to `out`, casts by itself or takes `.data`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.analyse import analyse
from fxprune.capture import Captured, capture
from fxprune.errors import CaptureError
from fxprune.kept import Kept
from fxprune.rewrite import rewrite

aten = torch.ops.aten


class Forward(nn.Module):
    """A linear layer, a buffer, and a forward pass given as a function of the module and its input."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.layer = nn.Linear(5, 8)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("sizes", torch.tensor([3, 5]))
        self.register_buffer("flags", torch.tensor([True, False, True, True, False, True, False, True]))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.layer(x))


def _same(function: Callable[..., Any]) -> Captured:
    """What is emitted gives the model's own outputs."""
    model, x = Forward(function).eval(), torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    captured = capture(model, (x,), {})
    module = rewrite(analyse(captured), Kept({}), model).module
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x))
    return captured


# ---------------------------------------------------------------------- values that are known
KNOWN: dict[str, Callable[..., Any]] = {
    "tolist of a constant": lambda m, h: h * torch.tensor([1.0, 2.0]).tolist()[1],
    "item of a buffer": lambda m, h: h[:, : m.sizes.max().item()],
    "a branch on a buffer": lambda m, h: h if m.flags.any() else h / 0,
    "sizes of a split from a buffer": lambda m, h: torch.cat(h.split(m.sizes.tolist(), 1), 1),
    "nonzero of a buffer": lambda m, h: h[:, m.flags.nonzero().squeeze(1)],
    "a mask as an index": lambda m, h: h[:, m.flags],
    "unique": lambda m, h: h * torch.unique(torch.tensor([3, 1, 3])).sum(),
    "repeats that are given": lambda m, h: h.repeat_interleave(torch.tensor([1, 2, 1, 1, 1, 0, 1, 1]), 1),
    "equal": lambda m, h: h if torch.equal(m.sizes, m.sizes + 0) else -h,
    "the largest of a computed constant": lambda m, h: h[:, : int((torch.arange(3) + 2).max())],
}


@pytest.mark.parametrize("name", KNOWN)
def test_values_that_depend_on_constants_are_known(name: str) -> None:
    _same(KNOWN[name])


UNKNOWN: dict[str, Callable[..., Any]] = {
    "of the input": lambda m, h: h * h.sum().item(),
    "of a parameter": lambda m, h: h * m.scale.item(),
    "of chance": lambda m, h: h * torch.rand(3).tolist()[0],
    "of what a mask of the input leaves": lambda m, h: h[h > 0],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_values_are_refused(name: str) -> None:
    with pytest.raises(CaptureError, match="values are not"):
        capture(Forward(UNKNOWN[name]).eval(), (torch.randn(4, 5),), {})


def test_what_is_known_is_found_in_a_graph_with_many_paths() -> None:
    """Every step uses the last one twice: as many paths as there are atoms, and one look at each step."""

    def doubled(m: Any, h: Tensor) -> Tensor:
        n = torch.tensor([1.0, 2.0])
        for _ in range(100):
            h, n = h + h, (n + n) / 2
        return h * n.tolist()[0]

    assert _same(doubled)
    with pytest.raises(CaptureError, match="values are not"):
        capture(Forward(lambda m, h: doubled(m, h) * h.sum().item()).eval(), (torch.randn(4, 5),), {})


# ---------------------------------------------------------------------- writes
def _written_real(m: Any, h: Tensor) -> Tensor:
    z = torch.complex(h, h.sin())
    z.real.mul_(2)
    torch.view_as_real(z)[..., 1] += 1
    return z.abs()


def _data(m: Any, h: Tensor) -> Tensor:
    other = torch.zeros(h.shape)
    other.data[:, 2:5] = h[:, 2:5]
    return h + other


def _filled(m: Any, h: Tensor) -> Tensor:
    table = h.new_zeros(8, 8) + h.mean(0)
    return h @ table.fill_diagonal_(0.5)


def _turned(m: Any, h: Tensor) -> Tensor:
    y = h * 2
    return y.transpose_(0, 1).t()


WRITES: dict[str, Callable[..., Any]] = {
    "out": lambda m, h: torch.add(h, 1, out=torch.empty_like(h)),
    "out of another type": lambda m, h: torch.mul(h, 2, out=torch.empty(h.shape, dtype=torch.float64)),
    "out with two results": lambda m, h: torch.max(
        h, 1, out=(torch.empty(len(h)), torch.empty(len(h), dtype=torch.int64))
    )[0],
    "out into a piece": lambda m, h: (z := torch.zeros(len(h), 10), torch.sin(h, out=z[:, 1:9]))[0],
    "real part": _written_real,
    "data": _data,
    "fill_diagonal_": _filled,
    "resize_ to the same size": lambda m, h: h.resize_(*h.shape),
    "transposed in place": _turned,
    "pieces of hsplit": lambda m, h: ((y := h + 0).hsplit(2)[1].mul_(2), y)[1],
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_equal_eager(name: str) -> None:
    _same(WRITES[name])


def test_a_normal_number_written_in_place_is_random() -> None:
    captured = capture(Forward(lambda m, h: h + 0 * torch.empty(8).normal_()).eval(), (torch.randn(4, 5),), {})
    assert aten.normal_functional.default in {n.target for n in captured.graph.nodes}


# ---------------------------------------------------------------------- autocast
class Cast(nn.Module):
    """Some layers in half precision by autocast."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.between(self.first(x))
        return self.last(y.float())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "between",
    [torch.relu, lambda y: y.softmax(-1) + y, lambda y: torch.einsum("bi,bj->bj", y, y), lambda y: y.add_(1).sin()],
    ids=["relu", "softmax", "einsum", "in place"],
)
def test_autocast_is_recorded_as_casts(between: Callable[[Tensor], Tensor]) -> None:
    model, x = Cast(between).eval(), torch.randn(4, 5)
    captured = capture(model, (x,), {})
    assert next(n for n in captured.graph.nodes if n.target is aten.linear.default).meta["dtype"] == torch.bfloat16
    module = rewrite(analyse(captured), Kept({}), model).module
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x))


def test_a_model_with_autocast_is_pruned() -> None:
    pruned = fxprune.compile(Cast().eval(), torch.randn(4, 5), target={"params": 0.6}, round_to=1)
    assert pruned.module.first.weight.shape[0] < 16


class CastLSTM(nn.Module):
    """A recurrent layer that autocast casts inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.LSTM(5, 8)

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x)[0]


def test_autocast_around_a_recurrent_layer() -> None:
    model, x = CastLSTM().eval(), torch.randn(3, 2, 5)
    module = rewrite(analyse(capture(model, (x,), {})), Kept({}), model).module
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x), atol=2e-2, rtol=2e-2)


# ---------------------------------------------------------------------- the model stays as it was
def test_a_container_that_refuses_to_be_written_to_is_left_alone() -> None:
    class Closed(dict[str, int]):
        def update(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("closed")

        clear = update

    model = Forward(lambda m, h: h)
    model.settings = Closed(width=8)
    capture(model.eval(), (torch.randn(4, 5),), {})
    assert model.settings == {"width": 8}
