"""Training loops as people write them: the Pruner fits into each, or says why not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fxprune import Pruner
from fxprune.errors import InputError, NonFiniteError, RecipeError, TargetError

END, STEPS = 8, 10
RAMP = {"start": 1, "end": END, "every": 2}
CHANNELS = {"method": "magnitude", "pattern": "channel", "target": 0.5, "schedule": RAMP}
ELEMENTS = {"method": "snip_momentum", "pattern": "element", "target": 0.5, "schedule": RAMP}
GATES = {"method": "l0", "pattern": "channel", "target": 0.5, "schedule": RAMP}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 8, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def loss_of(net: nn.Module, step: int) -> Tensor:
    inputs, wanted = batch(step)
    return nn.functional.cross_entropy(net(inputs), wanted)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS, first: int = 0) -> None:
    for step in range(first, steps):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()


def plain(net: nn.Module) -> bool:
    """Whether nothing of a Pruner is left: no parametrisation, no buffer, no hook."""
    return not (
        any(parametrize.is_parametrized(m) or "Parametrized" in type(m).__name__ for m in net.modules())
        or list(net.buffers())
        or any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())
    )


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)


# ---------------------------------------------------------------------- the same run, driven in several ways
@pytest.mark.parametrize("stage", [CHANNELS, ELEMENTS, GATES], ids=["magnitude", "snip_momentum", "l0"])
def test_hooks_and_attach_are_one_run(stage: dict[str, Any]) -> None:
    ends = []
    for attached in (True, False):
        net = network()
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        pruner = Pruner(net, torch.randn(2, 8), stage)
        if attached:
            pruner.attach(optimizer)
            train(net, optimizer)
        else:
            pruner.on_train_begin()
            for epoch in range(2):
                pruner.on_epoch_begin(epoch)
                for step in range(epoch * STEPS // 2, (epoch + 1) * STEPS // 2):
                    pruner.on_step_begin(step)
                    optimizer.zero_grad()
                    loss = loss_of(net, step)
                    loss.backward()
                    pruner.on_before_optimizer_step(loss)
                    optimizer.step()
                    pruner.on_after_optimizer_step()
                    pruner.on_step_end()
                pruner.on_epoch_end()
                pruner.on_before_eval()
                net.eval()(torch.randn(2, 8))
                net.train()
                pruner.on_after_eval()
            pruner.on_train_end()
        assert pruner.step == STEPS
        result = pruner.finish(proof="quick")
        ends.append((result.plan.to_json(), weights(net), weights(result.module)))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1]) and same(ends[0][2], ends[1][2])


@pytest.mark.parametrize("stage", [CHANNELS, ELEMENTS, GATES], ids=["magnitude", "snip_momentum", "l0"])
@pytest.mark.parametrize("attached", [True, False], ids=["attach", "hooks"])
def test_accumulated_gradients_are_those_of_the_whole_batch(stage: dict[str, Any], attached: bool) -> None:
    kept = []
    for parts in (1, 4):
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        pruner = Pruner(net, torch.randn(2, 8), stage)
        if attached:
            pruner.attach(optimizer)
        for step in range(STEPS):
            pruner.on_step_begin()
            optimizer.zero_grad()
            inputs, wanted = batch(step)
            for some, their in zip(inputs.chunk(parts), wanted.chunk(parts), strict=True):
                (nn.functional.cross_entropy(net(some), their) / parts).backward()
            if not attached:
                pruner.on_before_optimizer_step()
            optimizer.step()
            if not attached:
                pruner.on_step_end()
        assert pruner.step == STEPS
        pruner.finish(proof="quick")
        kept.append(pruner.prunings[0].kept)
    assert same(*kept)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.001, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.5),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.001),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stage", [CHANNELS, ELEMENTS, GATES], ids=["magnitude", "snip_momentum", "l0"])
def test_every_optimizer_trains_a_model_that_gets_smaller(name: str, stage: dict[str, Any]) -> None:
    net = network()
    before = [id(p) for p in net.parameters()]
    optimizer = OPTIMIZERS[name](net.parameters())
    pruner = Pruner(net, torch.randn(2, 8), stage).attach(optimizer)
    train(net, optimizer)
    assert pruner.prunings[0].sparsity() == pytest.approx(0.5, abs=0.02)
    result = pruner.finish(proof="quick")
    assert plain(net)
    assert [id(p) for p in net.parameters()] == before
    if stage is ELEMENTS:
        zeros = sum(int((net[i].weight == 0).sum()) for i in (0, 2, 4))
        assert zeros >= 0.48 * sum(net[i].weight.numel() for i in (0, 2, 4))
    else:
        assert sum(p.numel() for p in result.module.parameters()) < sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by position"])
def test_a_closure_is_followed(named: bool) -> None:
    runs = []
    for closed in (True, False):
        net = network()
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        pruner = Pruner(net, torch.randn(2, 8), ELEMENTS).attach(optimizer)
        for step in range(STEPS):

            def closure(net: nn.Module = net, optimizer: Any = optimizer, step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(net, step)
                loss.backward()
                return loss

            if not closed:
                closure()
                optimizer.step()
            elif named:
                assert bool(optimizer.step(closure=closure) > 0)
            else:
                assert bool(optimizer.step(closure) > 0)
        assert pruner.step == STEPS
        assert (pruner.rows[-1].loss is not None) == closed
        pruner.finish(proof="quick")
        runs.append(weights(net))
    assert same(*runs)


def test_an_optimizer_of_several_evaluations_is_refused() -> None:
    net = network()
    pruner = Pruner(net, torch.randn(2, 8), CHANNELS)
    with pytest.raises(InputError, match="LBFGS moves weights several times within a step"):
        pruner.attach(torch.optim.LBFGS(net.parameters()))
    pruner.attach(torch.optim.SGD(net.parameters(), 0.1))  # nothing is left of the attempt


def test_a_schedule_of_the_learning_rate_is_followed() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner = Pruner(net, torch.randn(2, 8), CHANNELS).attach(optimizer)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS)
    for step in range(STEPS):
        train(net, optimizer, step + 1, step)
        scheduler.step()
    assert pruner.step == STEPS and optimizer.param_groups[0]["lr"] < 0.01
    pruner.finish(proof="quick")


def test_clipped_gradients_are_what_scores_see() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner = Pruner(net, torch.randn(2, 8), ELEMENTS).attach(optimizer)
    loss_of(net, 0).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    value, gradient = net[0].weight.detach().clone(), net[0].parametrizations.weight.original.grad.clone()
    optimizer.step()
    seen = pruner.prunings[0].method.scores(pruner.prunings[0], pruner.prunings[0].units[0])
    torch.testing.assert_close(seen, (value * gradient).abs().flatten())
    assert float(seen.sum()) < 1e-3


# ---------------------------------------------------------------------- mixed precision
def test_autocast_trains_in_bfloat16() -> None:
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    pruner = Pruner(net, torch.randn(2, 8), GATES).attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net, step)
        loss.backward()
        optimizer.step()
    assert all(p.dtype == torch.float32 for p in pruner.finish(proof="quick").module.parameters())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_steps_that_a_scaler_skips_do_not_count(fused: bool, unscale: bool) -> None:
    """The second of the runs meets an infinite gradient in between, and ends as the first."""
    ends = []
    for overflow in (None, 3):
        net = network()
        optimizer = torch.optim.AdamW(net.parameters(), 0.01, fused=fused)
        pruner = Pruner(net, torch.randn(2, 8), ELEMENTS).attach(optimizer)
        # powers of two, so that scaling rounds nothing
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        skipped = 0
        for turn in itertools.count():
            if pruner.step == STEPS:
                break
            optimizer.zero_grad()
            loss = loss_of(net, pruner.step)
            scaler.scale(loss).backward()
            if turn == overflow:
                next(net.parameters()).grad[0] = torch.inf
            if unscale:
                scaler.unscale_(optimizer)
            before = pruner.step
            scaler.step(optimizer)
            scaler.update()
            skipped += pruner.step == before
        assert skipped == (overflow is not None)
        pruner.finish(proof="quick")
        ends.append((pruner.prunings[0].kept, weights(net)))
    assert same(ends[0][0], ends[1][0])
    assert all(torch.allclose(ends[0][1][n], w, atol=1e-6) for n, w in ends[1][1].items())


def test_scores_do_not_know_the_scale() -> None:
    seen = []
    for scale in (1.0, 1024.0):
        net = network()
        optimizer = torch.optim.AdamW(net.parameters(), 0.01, fused=True)
        pruner = Pruner(net, torch.randn(2, 8), ELEMENTS).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        scaler.scale(loss_of(net, 0)).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append(pruner.prunings[0].method.scores(pruner.prunings[0], pruner.prunings[0].units[0]))
    torch.testing.assert_close(*seen)
    assert float(seen[0].sum()) > 0


# ---------------------------------------------------------------------- compiled, averaged, moved
# torch says so of each autograd function that it traces
TRACED = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@TRACED
@pytest.mark.parametrize("stage", [CHANNELS, ELEMENTS, GATES], ids=["magnitude", "snip_momentum", "l0"])
@pytest.mark.parametrize("early", [True, False], ids=["compiled before", "compiled after"])
def test_masks_change_without_compiling_anew(stage: dict[str, Any], early: bool) -> None:
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    net = network()
    compiled = torch.compile(net, backend=backend) if early else None
    pruner = Pruner(compiled if early else net, torch.randn(2, 8), stage)
    compiled = compiled or torch.compile(net, backend=backend)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(compiled, step).backward()
        optimizer.step()
        compiled.eval()
        with torch.no_grad():
            assert torch.allclose(compiled(batch(step)[0]), net(batch(step)[0]), atol=1e-5)
        compiled.train()
    assert len(pruner.rows) > 3  # masks have changed
    assert graphs <= 3  # in training, evaluated, and once more at most
    pruner.finish(proof="quick")


@TRACED
def test_aot_autograd_takes_masked_weights() -> None:
    torch._dynamo.reset()
    ends = []
    for compile_ in (True, False):
        net = network()
        pruner = Pruner(net, torch.randn(2, 8), GATES)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        pruner.attach(optimizer)
        run = torch.compile(net, backend="aot_eager") if compile_ else net
        train(run, optimizer)
        pruner.finish(proof="quick")
        ends.append(pruner.prunings[0].kept)
    assert same(*ends)


def test_a_moving_average_is_finished_in_the_models_place() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner = Pruner(net, torch.randn(2, 8), ELEMENTS).attach(optimizer)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for step in range(STEPS):
        train(net, optimizer, step + 1, step)
        average.update_parameters(net)
    assert torch.equal(average.module[0].weight == 0, net[0].weight == 0)  # masks follow, they are not averaged
    expected = average(batch(0)[0]).detach()
    net.load_state_dict(average.module.state_dict())
    result = pruner.finish(proof="quick")
    torch.testing.assert_close(result.module(batch(0)[0]), expected)


def test_evaluation_shows_what_would_stay_and_training_the_gates() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner = Pruner(net, torch.randn(2, 8), GATES).attach(optimizer)
    train(net, optimizer, 4)
    masked = [~pruner.prunings[0].masks()["2.weight"]]
    open_ = net.eval()[2].weight[masked[0].logical_not()]
    raw = net[2].parametrizations.weight.original[masked[0].logical_not()]
    assert torch.equal(open_, raw) and not bool(net[2].weight[masked[0]].any())
    net.train()
    assert not torch.equal(net[2].weight[masked[0].logical_not()], raw)


def test_a_state_dict_goes_round_while_it_trains() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    pruner = Pruner(net, torch.randn(2, 8), ELEMENTS).attach(optimizer)
    train(net, optimizer, 5)
    before = [{n: v.clone() for n, v in net.state_dict().items()}, net(batch(0)[0]).detach()]
    train(net, optimizer, 7, 5)
    masks = {n: pruner._subject.weights.mask(n).clone() for n in pruner._subject.weights}
    net.load_state_dict(before[0])
    assert all(torch.equal(pruner._subject.weights.mask(n), m) for n, m in masks.items())  # masks are the Pruner's
    assert not torch.equal(net(batch(0)[0]), before[1])
    assert not any("mask" in name for name in before[0])


@pytest.mark.parametrize("stage", [CHANNELS, ELEMENTS, GATES], ids=["magnitude", "snip_momentum", "l0"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_may_be_moved(stage: dict[str, Any], dtype: torch.dtype) -> None:
    net = network()
    pruner = Pruner(net, torch.randn(2, 8), stage)
    net.to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, wanted = batch(step)
        nn.functional.cross_entropy(net(inputs.to(dtype)), wanted).backward()
        optimizer.step()
    result = pruner.finish(proof="quick")
    assert all(p.dtype == dtype for p in result.module.parameters())
    assert pruner.prunings[0].sparsity() == pytest.approx(0.5, abs=0.02)


# ---------------------------------------------------------------------- models
class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.inner = nn.Linear(16, 32)
        self.outer = nn.Linear(32, 16)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.outer(self.inner(x).relu()))


@pytest.mark.parametrize("pattern", ["element", "hidden"])
def test_tied_weights_stay_one_parameter(pattern: str) -> None:
    net = Tied()
    tied = net.embed.weight
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    tokens = torch.randint(0, 12, (4, 6))
    pruner = Pruner(net, tokens, {"pattern": pattern, "target": 0.5, "schedule": RAMP}).attach(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
        assert torch.equal(net.embed.weight, net.head.weight)
        optimizer.step()
    result = pruner.finish(proof="quick")
    assert net.embed.weight is net.head.weight is tied
    if pattern == "hidden":
        assert result.module.embed.weight.shape[1] == 8
        assert result.module.embed.weight is result.module.head.weight


@pytest.mark.parametrize("method", ["magnitude", "group_lasso", "group_sl", "growing_reg", "straight_through", "l0"])
def test_frozen_parameters_do_not_move(method: str) -> None:
    """Masks close over them, but neither gradients nor penalties touch them."""
    net = network()
    net[2].weight.requires_grad_(False)
    frozen = net[2].weight.detach().clone()
    pattern = {"straight_through": "2:4"}.get(method, "channel")
    stage = {"method": method, "pattern": pattern, "schedule": RAMP} | ({} if pattern == "2:4" else {"target": 0.5})
    pruner = Pruner(net, torch.randn(2, 8), stage)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    pruner.attach(optimizer)
    train(net, optimizer, END - 1)
    parameter = net[2].parametrizations.weight.original
    assert not parameter.requires_grad and parameter.grad is None
    assert torch.equal(parameter, frozen)
    train(net, optimizer, STEPS, END - 1)
    pruner.finish(proof="quick")
    assert not net[2].weight.requires_grad


def test_a_weight_that_is_parametrised_already_is_refused_and_nothing_is_left() -> None:
    net = network()
    parametrize.register_parametrization(net[2], "weight", nn.Identity())
    with pytest.raises(InputError, match="parametri"):
        Pruner(net, torch.randn(2, 8), ELEMENTS)
    assert not parametrize.is_parametrized(net[0])


def test_a_normalised_weight_is_left_alone_or_refused() -> None:
    """A row of zeros has no direction: what weight_norm computes of it is no number."""
    net = network()
    nn.utils.parametrizations.weight_norm(net[2])
    with pytest.raises(InputError, match=r"is parametrised already: .* leave the layer out with `exclude`"):
        Pruner(net, torch.randn(2, 8), CHANNELS)
    assert not parametrize.is_parametrized(net[0])
    pruner = Pruner(net, torch.randn(2, 8), ELEMENTS)
    assert [u.name for u in pruner.prunings[0].units] == ["0.weight", "4.weight"]
    assert any(name.startswith("2.") for name in pruner.unfit())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner.attach(optimizer)
    train(net, optimizer)
    pruner.finish(proof="quick")
    assert not parametrize.is_parametrized(net[0]) and parametrize.is_parametrized(net[2])


def test_parameters_keep_their_places() -> None:
    """A state of an optimizer knows parameters by number."""
    net = network()
    before = [n for n, _ in net.named_parameters()]
    Pruner(net, torch.randn(2, 8), ELEMENTS).abort()
    assert [n for n, _ in net.named_parameters()] == before


def test_a_second_pruner_of_a_model_is_refused() -> None:
    net = network()
    first = Pruner(net, torch.randn(2, 8), ELEMENTS)
    with pytest.raises(InputError, match=r"of another Pruner, `abort` or `finish` that one"):
        Pruner(net, torch.randn(2, 8), ELEMENTS)
    first.abort()
    Pruner(net, torch.randn(2, 8), ELEMENTS)


# ---------------------------------------------------------------------- beginnings and ends
def test_abort_gives_the_model_back() -> None:
    net = network()
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner = Pruner(net, torch.randn(2, 8), ELEMENTS).attach(optimizer)
    train(net, optimizer, 6)
    zeros, expected = net[0].weight == 0, net(batch(0)[0]).detach()
    assert bool(zeros.any())
    pruner.abort()
    assert plain(net) and all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert torch.equal(net(batch(0)[0]), expected) and torch.equal(net[0].weight == 0, zeros)
    train(net, optimizer, 7, 6)  # the optimizer is on its own
    assert pruner.step == 6 and not bool((net[0].weight == 0).all())
    acts: list[Callable[[], Any]] = [
        pruner.abort,
        pruner.finish,
        pruner.on_step_begin,
        lambda: pruner.attach(optimizer),
    ]
    for act in acts:
        with pytest.raises(InputError, match="has finished"):
            act()


def test_abort_may_forget_the_zeros() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner = Pruner(net, torch.randn(2, 8), ELEMENTS).attach(optimizer)
    train(net, optimizer, 6)
    pruner.abort(zeros=False)
    assert plain(net) and not bool((net[0].weight == 0).any())


def test_a_context_takes_the_masks_off_where_training_fails() -> None:
    net = network()
    pruner = Pruner(net, torch.randn(2, 8), ELEMENTS)
    assert not plain(net)
    with pytest.raises(KeyError), pruner:
        raise KeyError
    assert plain(net)
    with Pruner(net, torch.randn(2, 8), CHANNELS) as pruner:
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        pruner.attach(optimizer)
        train(net, optimizer)
        pruner.finish(proof="quick")
    assert plain(net)


@pytest.mark.parametrize("stage", [CHANNELS, ELEMENTS, GATES], ids=["magnitude", "snip_momentum", "l0"])
def test_nothing_is_left_after_the_end(stage: dict[str, Any]) -> None:
    net = network()
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner = Pruner(net, torch.randn(2, 8), stage).attach(optimizer)
    train(net, optimizer)
    pruner.finish(proof="quick")
    assert plain(net) and type(net[0]) is nn.Linear
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    with pytest.raises(InputError, match="has finished"):
        pruner.finish()


def test_an_end_before_the_schedules_is_refused_and_training_goes_on() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner = Pruner(net, torch.randn(2, 8), CHANNELS).attach(optimizer)
    train(net, optimizer, 4)
    with pytest.raises(TargetError, match="step 4: the schedule of 'magnitude' goes on to step 8"):
        pruner.finish()
    train(net, optimizer, STEPS, 4)  # it is still followed
    assert pruner.step == STEPS
    assert pruner.finish(proof="quick").module.get_submodule("0").out_features == 8


def test_an_end_that_fails_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner = Pruner(net, torch.randn(2, 8), GATES).attach(optimizer)
    train(net, optimizer)
    with pytest.raises(RecipeError, match="proof"):
        pruner.finish(proof="none at all")
    with monkeypatch.context() as patch:
        patch.setattr("fxprune.training.finish.make", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pruner.finish(proof="quick")
    assert not plain(net)
    train(net, optimizer, STEPS + 1, STEPS)
    assert not bool(net[2].weight[~pruner.prunings[0].masks()["2.weight"]].any())
    assert pruner.finish(proof="quick").module.get_submodule("0").out_features < 16
    assert plain(net)


def test_optimizers_are_attached_once_and_are_of_the_model() -> None:
    net = network()
    pruner = Pruner(net, torch.randn(2, 8), CHANNELS)
    with pytest.raises(InputError, match="holds no parameter of the model"):
        pruner.attach(torch.optim.SGD(network().parameters(), 0.1))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner.attach(optimizer)
    with pytest.raises(InputError, match="attached already"):
        pruner.attach(optimizer)
    pruner.detach()
    pruner.attach(torch.optim.Adam(net.parameters()))


def test_what_grows_again_starts_at_zero() -> None:
    """Momentum moves what is masked; RigL's weights are zero when they come back all the same."""
    net = network()
    stage = {"method": {"name": "rigl", "initial": "random"}, "target": 0.5, "schedule": RAMP}
    pruner = Pruner(net, torch.randn(2, 8), stage)
    optimizer = torch.optim.SGD(net.parameters(), 0.5, momentum=0.9)
    pruner.attach(optimizer)
    grown = 0
    for step in range(END):
        before = {n: m.clone() for n, m in pruner._subject.weights.masks().items()}
        train(net, optimizer, step + 1, step)
        for name, mask in pruner._subject.weights.masks().items():
            new = mask & ~before[name]
            grown += int(new.sum()) if step else 0
            assert not bool(pruner._subject.weights.value(name)[new].any())
    assert grown > 0


# ---------------------------------------------------------------------- numbers that are none
def test_a_loss_that_is_no_number_leaves_the_state_before_it(tmp_path: Path) -> None:
    net = network()
    pruner = Pruner(net, torch.randn(2, 8), ELEMENTS, checkpoint=tmp_path / "run")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(5):
        pruner.on_step_begin()
        loss = loss_of(net, step)
        optimizer.zero_grad()
        loss.backward()
        if step == 4:
            scores = {n: s.clone() for n, s in pruner.prunings[0].method._sums.items()}
            with pytest.raises(NonFiniteError, match="step 4: the loss is NaN or infinite; the state before this step"):
                pruner.on_before_optimizer_step(loss * float("nan"))
            break
        pruner.on_before_optimizer_step(loss)
        optimizer.step()
        pruner.on_step_end()
    other = network()
    again = Pruner(other, torch.randn(2, 8), ELEMENTS, checkpoint=tmp_path / "run")
    again.load()
    assert again.step == 4
    assert same(weights(other), weights(net)) and same(again.prunings[0].method._sums, scores)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_no_number_stops_the_run(value: float, tmp_path: Path) -> None:
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    Pruner(net, torch.randn(2, 8), GATES, checkpoint=tmp_path / "run").attach(optimizer)
    train(net, optimizer, 3)
    before = weights(net)
    optimizer.zero_grad()
    loss_of(net, 3).backward()
    net[2].parametrizations.weight.original.grad[1, 1] = value
    with pytest.raises(
        NonFiniteError, match=r"step 3: the gradient of '2.weight' is NaN or infinite; the state before"
    ):
        optimizer.step()
    assert same(weights(net), before)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    again = Pruner(net, torch.randn(2, 8), GATES, checkpoint=tmp_path / "run").attach(optimizer)
    again.load()
    assert same(weights(net), before)
    train(net, optimizer, STEPS, 3)
    again.finish(proof="quick")


def test_scores_that_are_no_numbers_undo_the_update(tmp_path: Path) -> None:
    net = network()
    stages = [CHANNELS | {"include": ["0", "2"]}, ELEMENTS | {"include": ["4"]}]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner = Pruner(net, torch.randn(2, 8), stages, checkpoint=tmp_path / "run").attach(optimizer)
    train(net, optimizer, 4)
    kept = {n: k.clone() for n, k in pruner.prunings[0].kept.items()}
    pruner.prunings[1].method._sums["4.weight"][0] = float("nan")
    optimizer.zero_grad()
    loss_of(net, 4).backward()
    with pytest.raises(NonFiniteError, match=r"a score of '4.weight' is NaN or infinite"):
        optimizer.step()
    assert same(pruner.prunings[0].kept, kept)  # the first stage has not gone on alone
    assert (tmp_path / "run").exists()


def test_weights_that_are_no_numbers_do_not_replace_a_good_checkpoint(tmp_path: Path) -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruner = Pruner(net, torch.randn(2, 8), CHANNELS, checkpoint=tmp_path / "run").attach(optimizer)
    train(net, optimizer, 4)
    good = pruner.save().read_bytes()
    with torch.no_grad():
        net[0].parametrizations.bias.original[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"is so already, and .*run is as it was: go on from there"):
        train(net, optimizer, 6, 4)
    assert (tmp_path / "run").read_bytes() == good


def test_no_checkpoint_is_written_where_none_was_asked_for(tmp_path: Path) -> None:
    net = network()
    pruner = Pruner(net, torch.randn(2, 8), CHANNELS)
    pruner.on_step_begin()
    with pytest.raises(NonFiniteError, match="Under a GradScaler use `attach`"):
        pruner.on_before_optimizer_step(float("inf"))
