"""All that Neural Compressor's pruning page names, by those names, does here what it says there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune import Pruned, Pruner
from fxprune.errors import RecipeError
from fxprune.passes.training import Schedule

END = 6
RAMP = {"start": 1, "end": END, "every": 1}


def network(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64, bias=bias), nn.ReLU(), nn.Linear(64, 32, bias=bias), nn.ReLU(), nn.Linear(32, 4)
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.inner, self.outer = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], x.shape[1], 4, 8)
        q, k, v = (layer(x).reshape(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.outer(self.inner(x).relu())


def loss_of(net: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    shape = (4, 5, 32) if isinstance(net, Attention) else (16, 32)
    inputs = torch.randn(shape, generator=generator)
    return (net(inputs) - 1).square().mean()


def pruner_of(net: nn.Module, stages: Any, **options: Any) -> Pruner:
    example = torch.randn((1, 5, 32) if isinstance(net, Attention) else (2, 32))
    return Pruner(net, example, stages, **options)


def train(
    net: nn.Module,
    pruner: Pruner,
    steps: int = END,
    lr: float = 0.01,
    look: Callable[[int], None] = lambda step: None,
) -> None:
    """A loop with the hooks where Neural Compressor's page has them."""
    optimizer = torch.optim.SGD(net.parameters(), lr)
    pruner.on_train_begin()
    pruner.on_epoch_begin(0)
    for step in range(steps):
        pruner.on_step_begin(step)
        optimizer.zero_grad()
        loss = loss_of(net, step)
        loss.backward()
        look(step)
        pruner.on_before_optimizer_step()
        optimizer.step()
        pruner.on_after_optimizer_step()
        pruner.on_step_end()
    pruner.on_epoch_end()
    pruner.on_before_eval()
    pruner.on_after_eval()
    pruner.on_train_end()


def done(pruner: Pruner) -> Pruned:
    """Finish, which raises ProofError where the smaller model is not the masked one."""
    result = pruner.finish()
    assert result.report.proof.error <= result.report.proof.tolerance and result.report.proof.runs > 0
    return result


# ---------------------------------------------------------------------- hooks
HOOKS = [
    "on_train_begin",
    "on_epoch_begin",
    "on_step_begin",
    "on_before_optimizer_step",
    "on_after_optimizer_step",
    "on_step_end",
    "on_epoch_end",
    "on_before_eval",
    "on_after_eval",
    "on_train_end",
]


def test_the_hooks_in_their_order_are_a_run() -> None:
    assert all(callable(getattr(Pruner, hook)) for hook in HOOKS)
    net = network()
    pruner = pruner_of(net, {"pattern": "channel", "target": 0.5, "schedule": RAMP})
    train(net, pruner)
    module = done(pruner).module
    assert pruner.step == END
    assert sum(module.get_submodule(name).out_features for name in ("0", "2")) == (64 + 32) // 2


@pytest.mark.parametrize("hook", ["on_train_begin", "on_step_begin"])
def test_what_begins_makes_the_update_of_its_step(hook: str) -> None:
    net = network()
    pruner = pruner_of(net, {"target": 0.5, "schedule": {"start": 0, "end": 0}})
    assert pruner.sparsity() == 0
    getattr(pruner, hook)()
    assert pruner.sparsity() == pytest.approx(0.5, abs=1e-3)


def test_on_step_begin_takes_the_number_that_loops_pass() -> None:
    net = network()
    pruner = pruner_of(net, {"target": 0.5, "schedule": RAMP})
    pruner.on_step_begin(17)
    assert pruner.step == 0


def test_on_before_optimizer_step_looks_at_gradients() -> None:
    net = network()
    pruner = pruner_of(net, {"method": "snip_momentum", "target": 0.5, "schedule": RAMP})
    pruner.on_step_begin()
    loss_of(net, 0).backward()
    one = pruner.prunings[0]
    assert not one.method._sums
    pruner.on_before_optimizer_step()
    assert set(one.method._sums) == {u.name for u in one.units}


@pytest.mark.parametrize("hooks", [["on_after_optimizer_step"], ["on_step_end"], HOOKS[4:6]], ids="+".join)
def test_a_step_is_counted_once(hooks: list[str]) -> None:
    net = network()
    pruner = pruner_of(net, {"target": 0.5, "schedule": RAMP})
    for step in range(3):
        pruner.on_step_begin(step)
        for hook in hooks:
            getattr(pruner, hook)()
    assert pruner.step == 3


@pytest.mark.parametrize("hook", ["on_epoch_begin", "on_epoch_end", "on_before_eval", "on_after_eval"])
def test_what_surrounds_steps_changes_none_of_them(hook: str) -> None:
    ends = []
    for called in (False, True):
        net = network()
        pruner = pruner_of(net, {"target": 0.5, "schedule": RAMP})

        def look(step: int, pruner: Pruner = pruner, called: bool = called) -> None:
            if called:
                getattr(pruner, hook)(*([step] if hook == "on_epoch_begin" else []))

        train(net, pruner, look=look)
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_on_train_end_makes_the_last_update() -> None:
    net = network()
    pruner = pruner_of(net, {"target": 0.5, "schedule": {"start": 0, "end": 1}})
    pruner.on_train_begin()
    pruner.on_step_end()
    assert not pruner.prunings[0].done
    pruner.on_train_end()
    assert pruner.prunings[0].done and pruner.sparsity() == pytest.approx(0.5, abs=1e-3)


# ---------------------------------------------------------------------- patterns: each ends in a smaller or a 2:4 model
@pytest.mark.parametrize("pattern", ["element", "1x1", "4x1", "1x4", "32x32", "1xchannel"])
def test_patterns_in_weights_end_in_a_smaller_model(pattern: str) -> None:
    """Half of the rows of a layer are near zero: whatever goes as one, they go, and what they empty is removed."""
    net = network(bias=False)
    with torch.no_grad():
        net[0].weight[32:] *= 1e-6
    stage = {"method": "magnitude", "pattern": pattern, "target": 0.5, "include": ["0"], "schedule": RAMP}
    pruner = pruner_of(net, stage)
    train(net, pruner, lr=1e-6)
    result = done(pruner)
    assert result.module.get_submodule("0").weight.shape == (32, 32) and result.module.get_submodule(
        "2"
    ).weight.shape == (32, 32)
    assert not bool(net[0].weight[32:].any()) and bool(net[0].weight[:32].all())


def test_channelx1_ends_in_a_smaller_model() -> None:
    """A column for all outputs: the input is read by nobody, so that it is not computed either."""
    net = network(bias=False)
    with torch.no_grad():
        net[2].weight[:, 32:] *= 1e-3
    stage = {"method": "magnitude", "pattern": "channelx1", "target": 0.5, "include": ["2"], "schedule": RAMP}
    pruner = pruner_of(net, stage)
    train(net, pruner)
    result = done(pruner)
    assert result.module.get_submodule("0").weight.shape == (32, 32) and result.module.get_submodule(
        "2"
    ).weight.shape == (32, 32)


@pytest.mark.parametrize("pattern", ["4x1", "1x4", "32x32", "1xchannel", "channelx1"])
def test_blocks_lie_as_the_pages_figures_show(pattern: str) -> None:
    """N x M is N rows, which are output channels, by M columns; a channel is all there are."""
    net = network()
    pruner = pruner_of(net, {"pattern": pattern, "target": 0.5, "include": ["2"], "schedule": RAMP})
    train(net, pruner)
    high, wide = (int(n) if n != "channel" else 0 for n in pattern.split("x"))
    zero = net[2].weight == 0
    high, wide = high or zero.shape[0], wide or zero.shape[1]
    blocks = zero.reshape(zero.shape[0] // high, high, zero.shape[1] // wide, wide).transpose(1, 2).flatten(2)
    assert torch.equal(blocks.all(2), blocks.any(2))
    assert int(blocks.all(2).sum()) == blocks.shape[0] * blocks.shape[1] // 2
    done(pruner)


def test_2in4_ends_in_a_2_4_model() -> None:
    net = network()
    pruner = pruner_of(net, {"method": "magnitude", "pattern": "2:4", "include": ["0", "2"], "schedule": RAMP})
    train(net, pruner)
    result = done(pruner)
    for layer in (result.module.get_submodule("0"), result.module.get_submodule("2")):
        assert bool(((layer.weight.reshape(-1, 4) == 0).sum(1) == 2).all())
    assert set(result.plan.masks) == {"0.weight", "2.weight"}


def test_mha_ends_with_fewer_heads() -> None:
    net = Attention()
    with torch.no_grad():
        for layer in (net.query, net.key, net.value):
            layer.weight[8:24] *= 1e-3
    pruner = pruner_of(net, {"method": "magnitude", "pattern": "head", "target": 0.5, "schedule": RAMP})
    train(net, pruner)
    result = done(pruner)
    assert [int(k.sum()) for k in pruner.prunings[0].kept.values()] == [2]
    assert result.report.params.pruned < result.report.params.dense
    names = dict(result.module.named_parameters())
    assert names["query.weight"].shape == (16, 32) and names["out.weight"].shape == (32, 16)


# ---------------------------------------------------------------------- criteria, stated anew
def recorded(stage: dict[str, Any], steps: int = 4, of: str = "0.weight") -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The scores after some steps before the first update, and weights and gradients of each."""
    net = network()
    pruner = pruner_of(net, {"target": 0.5, "schedule": {"start": 50, "end": 60}, "include": ["0"]} | stage)
    seen: list[tuple[Tensor, Tensor]] = []

    def look(step: int) -> None:
        weight = net[0].parametrizations.weight.original
        seen.append((weight.detach().clone(), weight.grad.detach().clone()))

    train(net, pruner, steps, look=look)
    (one,) = pruner.prunings
    seen.append((net[0].parametrizations.weight.original.detach().clone(), torch.empty(0)))
    return one.scores()[of].reshape(64, 32).float(), seen


def test_magnitude_is_the_size_now() -> None:
    scores, seen = recorded({"method": "magnitude"})
    torch.testing.assert_close(scores, seen[-1][0].abs())


def test_snip_is_the_sensitivity_of_the_untrained_model() -> None:
    scores, seen = recorded({"method": "snip"})
    torch.testing.assert_close(scores, (seen[0][0] * seen[0][1]).abs())
    assert torch.equal(seen[0][0], seen[1][0])  # in the step that is looked at no weight moves


def test_snip_of_neural_compressor_is_the_sensitivity_of_the_last_step() -> None:
    scores, seen = recorded({"method": {"name": "snip", "batches": 0}})
    torch.testing.assert_close(scores, (seen[3][0] * seen[3][1]).abs())
    assert not torch.equal(seen[0][0], seen[1][0])


@pytest.mark.parametrize(("form", "keep", "weigh"), [("code", 0.9, 1.0), ("document", 1.0, 0.9)])
def test_snip_momentum_in_both_forms(form: str, keep: float, weigh: float) -> None:
    scores, seen = recorded({"method": {"name": "snip_momentum", "form": form}})
    expected = torch.zeros(64, 32)
    for weight, gradient in seen[:-1]:
        expected = keep * expected + weigh * (weight * gradient).abs()
    torch.testing.assert_close(scores, expected)


def test_snip_momentum_is_that_of_the_code_by_default() -> None:
    torch.testing.assert_close(
        recorded({"method": "snip_momentum"})[0], recorded({"method": {"name": "snip_momentum", "form": "code"}})[0]
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradient_is_the_size_of_it(momentum: float) -> None:
    """Neural Compressor's is that of the last step alone: momentum 0."""
    scores, seen = recorded({"method": {"name": "gradient", "momentum": momentum}})
    expected = torch.zeros(64, 32)
    for _, gradient in seen[:-1]:
        expected = momentum * expected + gradient.abs()
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize(
    ("method", "message"),
    [({"name": "gradient", "momentum": 1.0}, "gradient: momentum"), ({"name": "snip", "batches": -1}, "snip: batches")],
)
def test_options_out_of_range_are_refused(method: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        pruner_of(network(), {"method": method, "target": 0.5, "schedule": RAMP})


def test_gradient_sensitivity_is_that_of_masks_on_heads() -> None:
    """|dL/dm| of a factor m on a head's output, added up over steps, by differentiation of just that."""
    net = Attention()
    pruner = pruner_of(
        net, {"method": "sensitivity", "pattern": "head", "target": 0.5, "schedule": {"start": 50, "end": 60}}
    )
    total = torch.zeros(4)

    def look(step: int) -> None:
        factor = torch.ones(4, requires_grad=True)
        weight = net.out.weight.detach() * factor.repeat_interleave(8)
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn((4, 5, 32), generator=generator)
        names = {n: p for n, p in net.named_parameters() if not n.startswith("out.")}
        given = names | {"out.parametrizations.weight.original": weight, "out.bias": net.out.bias}
        output = torch.func.functional_call(net, given, inputs)
        total.add_(torch.autograd.grad((output - 1).square().mean(), factor)[0].abs())

    train(net, pruner, 3, look=look)
    (one,) = pruner.prunings
    torch.testing.assert_close(one.method.scores(one, one.units[0]).float(), total, atol=1e-6, rtol=1e-4)


def test_group_lasso_pulls_every_block_with_the_same_force() -> None:
    net = network()
    stage = {"method": {"name": "group_lasso", "reg": 0.1, "scaled": False}, "pattern": "4x1", "include": ["0"]}
    pruner = pruner_of(net, stage | {"target": 0.5, "schedule": RAMP})
    weight = net[0].parametrizations.weight.original
    pruner.on_step_begin()
    loss_of(net, 0).backward()
    before = weight.grad.clone()
    pruner.on_before_optimizer_step()
    blocks = (weight.grad - before).reshape(16, 4, 32)
    torch.testing.assert_close(blocks.norm(dim=1), torch.full((16, 32), 0.1))
    expected = weight.detach().clone().requires_grad_()
    (0.1 * expected.reshape(16, 4, 32).norm(dim=1).sum()).backward()
    torch.testing.assert_close(weight.grad - before, expected.grad)
    pruner.abort()


def test_pattern_lock_keeps_zeros_and_adds_none() -> None:
    net = network()
    with torch.no_grad():
        net[0].weight[8:12] = 0
        net[0].weight[0, 0] = 0  # a single zero is no block
    zero = net[0].weight == 0
    zero[0, 0] = False
    pruner = pruner_of(net, {"method": "pattern_lock", "pattern": "4x1", "include": ["0"], "schedule": {"end": 0}})
    train(net, pruner)
    assert torch.equal(net[0].weight == 0, zero)
    assert done(pruner).module.get_submodule("0").out_features <= 64


@pytest.mark.parametrize("method", ["magnitude", "snip", "snip_momentum", "gradient"])
def test_progressive_types_go_entry_by_entry(method: str) -> None:
    """magnitude_progressive, snip_progressive, snip_momentum_progressive, gradient_progressive."""
    net = network()
    ramp = {"start": 2, "end": 10, "every": 4}
    stage = {"method": method, "pattern": "1xchannel", "progressive": 3, "include": ["0"]}
    pruner = pruner_of(net, stage | {"target": 0.5, "schedule": ramp})
    zeros: list[int] = []
    whole: list[bool] = []

    def look(step: int) -> None:
        rows = (~pruner._subject.weights.mask("0.weight")).sum(1)
        zeros.append(int(rows.sum()))
        whole.append(bool(((rows == 0) | (rows == 32)).all()))

    train(net, pruner, 15, look=look)
    assert zeros == sorted(zeros) and len(set(zeros)) > 5  # little by little
    assert not all(whole) and whole[-1]  # by entries at first, by whole rows at the end
    assert zeros[-1] == 32 * 32
    done(pruner)


# ---------------------------------------------------------------------- schedules
def decayed(decay_type: str, first: float, last: float, k: int, n: int) -> float:
    """The sparsity after k of n updates as `sparsity_decay_type` says it."""
    if decay_type == "exp":
        density = (1 - first) * ((1 - last) / (1 - first)) ** (k / n)  # falls by the same factor each time
        return 1 - density
    shape = {"cos": 1 - math.cos(k / n * math.pi / 2), "cube": (k / n) ** 3, "linear": k / n}[decay_type]
    return first + shape * (last - first)


@pytest.mark.parametrize("initial", [0.0, 0.2])
@pytest.mark.parametrize(
    ("decay_type", "ramp"), [("exp", "exponential"), ("cos", "quarter_cosine"), ("cube", "cube"), ("linear", "linear")]
)
def test_decay_types(decay_type: str, ramp: str, initial: float) -> None:
    schedule = Schedule(ramp, start=4, end=44, every=5, initial=initial)
    for k in range(9):
        expected = decayed(decay_type, initial, 0.9, k, 8)
        assert schedule.share(4 + 5 * k, 0.9) == pytest.approx(expected, abs=1e-12)
        assert schedule.updates(4 + 5 * k)


def test_iterative_pruning_is_in_several_steps_and_oneshot_in_one() -> None:
    seen: dict[str, list[float]] = {}
    for name, when in {
        "iterative": {"start": 1, "end": 5, "every": 2, "ramp": "linear"},
        "oneshot": {"start": 3, "end": 3},
        "oneshot by name": {"start": 3, "ramp": "oneshot"},
    }.items():
        net = network()
        pruner = pruner_of(net, {"target": 0.8, "schedule": when})
        seen[name] = []
        train(net, pruner, 7, look=lambda step, p=pruner, s=seen[name]: s.append(round(p.sparsity(), 2)))
        done(pruner)
    assert seen["iterative"] == [0, 0, 0, 0.4, 0.4, 0.8, 0.8]
    assert seen["oneshot"] == seen["oneshot by name"] == [0, 0, 0, 0.8, 0.8, 0.8, 0.8]


# ---------------------------------------------------------------------- scope and layers
def shares(net: nn.Module) -> list[float]:
    return [round(float((net[i].weight == 0).float().mean()), 3) for i in (0, 2, 4)]


def uneven() -> nn.Sequential:
    net = network()
    with torch.no_grad():
        net[0].weight *= 0.1
        net[2].weight *= 3
    return net


def test_scope_local_takes_the_same_of_each_layer() -> None:
    net = uneven()
    pruner = pruner_of(net, {"target": 0.5, "scope": "local", "schedule": RAMP})
    train(net, pruner)
    assert shares(net) == [0.5, 0.5, 0.5]


def test_scope_global_takes_more_of_layers_with_low_scores() -> None:
    net = uneven()
    pruner = pruner_of(net, {"target": 0.5, "scope": "global", "schedule": RAMP})
    train(net, pruner)
    assert shares(net)[0] > 0.7 > 0.3 > shares(net)[1]
    assert pruner.sparsity() == pytest.approx(0.5, abs=1e-3)


def test_min_and_max_sparsity_ratio_per_op_bound_each_layer() -> None:
    net = uneven()
    pruner = pruner_of(net, {"target": 0.5, "min_sparsity": 0.3, "max_sparsity": 0.65, "schedule": RAMP})
    train(net, pruner)
    assert all(0.29 <= share <= 0.65 for share in shares(net))
    assert shares(net)[0] == pytest.approx(0.65, abs=1e-3)
    assert pruner.sparsity() == pytest.approx(0.5, abs=1e-3)


def test_bounds_at_the_target_are_local_in_a_global_way() -> None:
    net = uneven()
    pruner = pruner_of(net, {"target": 0.5, "min_sparsity": 0.5, "max_sparsity": 0.5, "schedule": RAMP})
    train(net, pruner)
    assert shares(net) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({"include": ["0"]}, [True, False, False]),  # op_names
        ({"exclude": ["4"]}, [True, True, False]),  # excluded_op_names
        ({"include": ["type:Linear"], "exclude": ["2"]}, [True, False, True]),  # pruning_op_types
    ],
    ids=["op_names", "excluded_op_names", "pruning_op_types"],
)
def test_only_the_layers_that_are_meant_are_pruned(layers: dict[str, Any], expected: list[bool]) -> None:
    net = network()
    pruner = pruner_of(net, {"target": 0.5, "scope": "local", "schedule": RAMP} | layers)
    train(net, pruner)
    assert [share == 0.5 for share in shares(net)] == expected
    assert [share == 0.0 for share in shares(net)] == [not one for one in expected]


def test_pruning_op_types_tell_convolutions_from_linear_layers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    for kind, name in (("Conv2d", "0.weight"), ("Linear", "3.weight")):
        stage = {"target": 0.5, "include": [f"type:{kind}"], "schedule": RAMP}
        with Pruner(net, torch.randn(1, 3, 8, 8), stage) as pruner:
            assert [u.name for u in pruner.prunings[0].units] == [name]


def test_several_pruners_have_layers_of_their_own() -> None:
    net = network()
    pruner = pruner_of(
        net,
        [
            {"method": "snip_momentum", "pattern": "4x1", "target": 0.75, "include": ["0"], "schedule": RAMP},
            {"method": "magnitude", "pattern": "element", "target": 0.5, "include": ["2"], "schedule": RAMP},
        ],
    )
    train(net, pruner)
    assert shares(net) == [0.75, 0.5, 0.0]
    done(pruner)


@pytest.mark.parametrize(
    "key",
    [
        "target_sparsity",
        "pruning_type",
        "op_names",
        "excluded_op_names",
        "pruning_op_types",
        "pruning_scope",
        "start_step",
        "end_step",
        "pruning_frequency",
        "min_sparsity_ratio_per_op",
        "max_sparsity_ratio_per_op",
        "sparsity_decay_type",
    ],
)
def test_its_keys_are_told_by_what_they_are_called_here(key: str) -> None:
    with pytest.raises(RecipeError, match=f"there is no key '{key}'; here it is called "):
        pruner_of(network(), {"target": 0.5, key: 1, "schedule": RAMP})
