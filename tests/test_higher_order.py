"""Control flow, function transforms and compiled modules are recorded as what they come down to, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import associative_scan, map, scan, while_loop
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import fxprune
from fxprune.analyse import analyse
from fxprune.capture import capture
from fxprune.errors import CaptureError
from fxprune.higher_order import MAX_STEPS
from fxprune.kept import Kept
from fxprune.rewrite import rewrite

aten = torch.ops.aten


class Forward(nn.Module):
    """Two linear layers, and a forward pass given as a function of the module and its inputs."""

    def __init__(self, function: Callable[..., Any], hidden: int = 8, out: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.first, self.last = nn.Linear(5, hidden), nn.Linear(out, 3)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def _input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _half(model: nn.Module, x: Tensor) -> nn.Module:
    """Half of the model is left, proved against the masked model and the model's own forward pass."""
    pruned = fxprune.compile(model.eval(), x, target={"params": 0.6}, criterion="random", round_to=1)
    assert pruned.report.proof.capture_error is not None
    small: nn.Module = pruned.module
    return small


def _same(model: nn.Module, x: Tensor, *, expected: Tensor | None = None) -> None:
    """What is emitted with nothing removed gives what the model gives."""
    module = rewrite(analyse(capture(model.eval(), (x,), {})), Kept({}), model).module
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x) if expected is None else expected)


# ---------------------------------------------------------------------- torch.cond
def _cond(m: Any, x: Tensor) -> Tensor:
    return m.last(torch.cond(x.sum() > 0, lambda y: m.first(y).sin(), lambda y: m.first(y).cos(), (x,)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cond_takes_the_branch_that_the_values_choose(sign: float) -> None:
    model, x = Forward(_cond), _input(4, 5).abs() * sign
    module = rewrite(analyse(capture(model.eval(), (-x,), {})), Kept({}), model).module
    branch = torch.sin if sign > 0 else torch.cos
    with torch.no_grad():
        torch.testing.assert_close(module(x), model.last(branch(model.first(x))))


def test_cond_is_pruned() -> None:
    model, x = Forward(_cond), _input(4, 5)
    analysis = analyse(capture(model.eval(), (x,), {}))
    assert not analysis.unknown
    assert [d.size for d in analysis.dims[next(n for n in analysis.captured.graph.nodes if "where" in n.name)][1:]] == [
        8
    ]
    small = rewrite(analysis, Kept({analysis.tensors["first.weight"][0]: torch.arange(4).numpy()}), model).module  # type: ignore[dict-item]
    assert small.first.out_features == 4


def test_cond_with_several_results_and_a_number_as_the_condition() -> None:
    def both(m: Any, x: Tensor) -> Tensor:
        a, b = torch.cond(x.mean() > 9, lambda y: (y.sin(), y), lambda y: (y, y.cos()), (m.first(x),))
        return m.last(torch.cond(x.shape[1] == 5, lambda y: y * 2, lambda y: y / 0, (a * b,)))  # type: ignore[no-any-return]

    x = _input(4, 5)
    model = Forward(both)
    h = model.first(x)
    _same(model, x, expected=model.last(h * h.cos() * 2))


def _write_in_a_branch(m: Any, x: Tensor) -> Tensor:
    return m.last(torch.cond(x.sum() > 0, lambda y: y.sin_(), lambda y: y.cos(), (m.first(x),)))  # type: ignore[no-any-return]


def _other_shape(m: Any, x: Tensor) -> Tensor:
    return m.last(torch.cond(x.sum() > 0, lambda y: y, lambda y: y[:, :1], (m.first(x),)))  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- loops
def _scan(m: Any, x: Tensor) -> Tensor:
    """A recurrent layer: (steps, N, 5), a state of 8."""
    start = torch.zeros(x.shape[1], 8)
    carried, steps = scan(lambda h, y: ((h + m.first(y)).tanh(), (h * 2).clone()), start, x)
    return m.last(steps.sum(0) + carried)  # type: ignore[no-any-return]


def _map(m: Any, x: Tensor) -> Tensor:
    return m.last(map(lambda y: m.first(y).relu(), x))  # type: ignore[no-any-return]


def _associative(m: Any, x: Tensor) -> Tensor:
    return m.last(associative_scan(lambda a, b: a * 0.5 + b, m.first(x), 0, combine_mode="generic"))  # type: ignore[no-any-return]


def _counted(m: Any, x: Tensor) -> Tensor:
    start = (torch.tensor(0), m.first(x))
    return m.last(while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, h.sin()), start)[1])  # type: ignore[no-any-return]


def _until(m: Any, x: Tensor) -> Tensor:
    start = (torch.tensor(0), m.first(x))
    return m.last(while_loop(lambda i, h: h.sum() < 3, lambda i, h: (i + 1, h + 1), start)[1])  # type: ignore[no-any-return]


def _for_ever(m: Any, x: Tensor) -> Tensor:
    start = (torch.tensor(0), m.first(x))
    return m.last(while_loop(lambda i, h: i < MAX_STEPS + 1, lambda i, h: (i + 1, h.clone()), start)[1])  # type: ignore[no-any-return]


def test_scan_is_unrolled() -> None:
    model, x = Forward(_scan), _input(3, 4, 5)
    h, total = torch.zeros(4, 8), torch.zeros(4, 8)
    for y in x:
        h, total = (h + model.first(y)).tanh(), total + h * 2
    _same(model, x, expected=model.last(total + h))
    assert _half(model, x).first.out_features < 8


def test_map_is_unrolled() -> None:
    model, x = Forward(_map), _input(3, 4, 5)
    _same(model, x, expected=model.last(model.first(x).relu()))
    assert _half(model, x).first.out_features < 8


def test_associative_scan() -> None:
    model, x = Forward(_associative), _input(3, 4, 5)
    h = model.first(x)
    _same(model, x, expected=model.last(torch.stack([h[0], h[0] / 2 + h[1], (h[0] / 2 + h[1]) / 2 + h[2]])))


def test_while_loop_with_a_counter_is_unrolled() -> None:
    model, x = Forward(_counted), _input(4, 5)
    _same(model, x, expected=model.last(model.first(x).sin().sin().sin()))


REFUSED = {
    "a branch that writes in place": (_write_in_a_branch, "writes in place to what was there before"),
    "branches of different shapes": (_other_shape, "return different things"),
    "a loop that depends on values": (_until, "depends on values"),
    "a loop without an end": (_for_ever, "more than"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name: str) -> None:
    function, words = REFUSED[name]
    with pytest.raises(CaptureError, match=words):
        capture(Forward(function).eval(), (_input(4, 5),), {})


# ---------------------------------------------------------------------- attention
def _attention(m: Any, x: Tensor, **options: Any) -> Tensor:
    q, k, v = m.first(x).view(x.shape[0], 6, 3, 2, 8).permute(2, 0, 3, 1, 4)
    return m.last(flex_attention(q, k, v, **options).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _causal_scores(m: Any, x: Tensor) -> Tensor:
    return _attention(m, x, score_mod=lambda score, b, h, q, k: torch.where(q >= k, score + h, -float("inf")))


def _masked_blocks(m: Any, x: Tensor) -> Tensor:
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 6, 6, device="cpu")
    return _attention(m, x, block_mask=mask)


@pytest.mark.parametrize("function", [_attention, _causal_scores, _masked_blocks])
def test_flex_attention_is_recorded_as_what_defines_it(function: Callable[..., Tensor]) -> None:
    model, x = Forward(function, 48, 16), _input(2, 6, 5)
    q, k, v = model.first(x).view(2, 6, 3, 2, 8).permute(2, 0, 3, 1, 4)
    causal = function is not _attention
    y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    _same(model, x, expected=model.last(y.transpose(1, 2).flatten(2)))
    if function is _attention:
        analysis = analyse(capture(model.eval(), (x,), {}))
        assert not analysis.unknown


# ---------------------------------------------------------------------- function transforms, compiled modules
class Doubled(torch.autograd.Function):
    """A function with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin() * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _ensemble(m: Any, x: Tensor) -> Tensor:
    twin = nn.Linear(5, 8)
    weights = {k: torch.stack([v, v * 2]) for k, v in m.first.named_parameters()}
    call = torch.func.vmap(lambda w, y: torch.func.functional_call(twin, w, (y,)), in_dims=(0, None))
    return m.last(call(weights, x).mean(0))  # type: ignore[no-any-return]


TRANSFORMED: dict[str, Callable[..., Any]] = {
    "vmap over a layer": lambda m, x: m.last(torch.func.vmap(m.first)(x)),
    "vmap over normalisation": lambda m, x: m.last(
        torch.func.vmap(lambda r: nn.functional.layer_norm(r * r.mean(-1, keepdim=True), (8,)))(m.first(x))
    ),
    "vmap twice": lambda m, x: m.last(torch.func.vmap(torch.func.vmap(lambda r: r.softmax(-1)))(m.first(x)[None])[0]),
    "an ensemble": _ensemble,
    "a gradient": lambda m, x: m.last(torch.func.grad(lambda y: m.first(y).sin().sum())(x) @ m.first.weight.t()),
    "checkpoint, reentrant": lambda m, x: m.last(checkpoint(m.first, x, use_reentrant=True)),
    "checkpoint": lambda m, x: m.last(checkpoint(m.first, x, use_reentrant=False)),
    "a function of its own": lambda m, x: m.last(Doubled.apply(m.first(x))),
    "functional_call": lambda m, x: m.last(torch.func.functional_call(m.first, dict(m.first.named_parameters()), (x,))),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of checkpoint, on its arguments
@pytest.mark.parametrize("name", TRANSFORMED)
def test_function_transforms(name: str) -> None:
    model, x = Forward(TRANSFORMED[name]), _input(4, 5)
    _same(model, x)
    assert _half(model, x).first.weight.shape[0] < 8


def test_compiled_modules_run_as_they_were_written() -> None:
    model = Forward(lambda m, x: m.last(m.compiled(x)))
    model.compiled = torch.compile(nn.Sequential(nn.Linear(5, 8), nn.ReLU()), backend="eager")
    x = _input(4, 5)
    captured = capture(model.eval(), (x,), {})
    assert aten.relu.default in {n.target for n in captured.graph.nodes}
    _same(model, x, expected=model.last(model.compiled._orig_mod(x)))


def test_torch_is_left_as_it_was() -> None:
    asked, exporting = torch.compiler.is_dynamo_compiling, torch.compiler.is_exporting()
    capture(Forward(_cond).eval(), (_input(4, 5),), {})
    with pytest.raises(CaptureError):
        capture(Forward(_until).eval(), (_input(4, 5),), {})
    assert torch.compiler.is_dynamo_compiling is asked and torch.compiler.is_exporting() == exporting
