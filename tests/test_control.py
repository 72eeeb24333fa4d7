"""What a recipe lets a user say: what stays whole, how much of a group stays, which kinds are cut; and dry runs."""

from __future__ import annotations

import copy
import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from bench.models import MODELS
from fxprune.analyse import analyse
from fxprune.capture import capture
from fxprune.errors import RecipeError, SavedModelError, TargetError
from fxprune.groups import find_groups
from fxprune.plan import Plan
from fxprune.streams import roles

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A pre-norm residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    """Two blocks between a stem and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 32)
        self.first, self.second = Block(), Block()
        self.mid = nn.Linear(32, 48)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.second(self.first(self.stem(x)))).relu())


RESIDUAL, FIRST, SECOND, MID = "stem.weight.0", "first.up.weight.0", "second.up.weight.0", "mid.weight.0"


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def kept(model: nn.Module, **recipe: Any) -> dict[str, int]:
    """How many units of each group stay, in a model that was really cut; whole groups are left out."""
    recipe = {"target": {"params": 0.6}, "round_to": 1, "proof": "quick"} | recipe
    return {g.name: g.kept for g in fxprune.compile(model, X, recipe).plan.groups if g.kept < g.size}


# ---------------------------------------------------------------------- keep
@pytest.mark.parametrize(
    ("keep", "whole"),
    [
        ("second.*", {SECOND, RESIDUAL}),
        ("type:LayerNorm", {RESIDUAL}),
        ("type:Block", {FIRST, SECOND, RESIDUAL}),
        ("kind:ffn", {FIRST, SECOND, MID}),
        ("kind:residual", {RESIDUAL}),
        ("mid.weight.0", {MID}),
        ("mid.weight.1", {RESIDUAL}),
        (MID, {MID}),
        (["mid", "first.up"], {MID, RESIDUAL, FIRST}),
    ],
)
def test_keep(net: nn.Module, keep: Any, whole: set[str]) -> None:
    """Globs, classes, kinds, single dimensions and groups; the others are cut."""
    assert kept(net, keep=keep, target={"params": 0.9}).keys() == {RESIDUAL, FIRST, SECOND, MID} - whole


def test_a_kept_layer_is_entirely_unchanged(net: nn.Module) -> None:
    """Its inputs stay, too: users of other tools found that only its outputs did."""
    module = fxprune.compile(net, X, target={"params": 0.7}, keep="mid", round_to=1).module
    assert torch.equal(module.get_submodule("mid").weight, net.mid.weight)  # type: ignore[arg-type,union-attr]
    assert module.get_submodule("first.up").weight.shape[0] < 64  # type: ignore[union-attr,operator]


class Tied(nn.Module):
    """An embedding whose weight is the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.mid = nn.Linear(32, 32)
        self.out = nn.Linear(32, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.mid(self.embed(ids)).relu())


@pytest.mark.parametrize("keep", ["embed", "out", "type:Embedding", "out.weight.1"])
def test_keep_knows_every_name_of_a_tied_weight(keep: str) -> None:
    """A tensor with two names stays whole under either."""
    plan = fxprune.dry_run(Tied().eval(), torch.arange(6).view(2, 3), target={"params": 1.0}, keep=keep)
    assert plan.groups and all(g.why and g.kept == g.size for g in plan.groups if g.name == "embed.weight.1")
    assert any(g.name == "embed.weight.1" for g in plan.groups)


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ({"keep": "type:LayerNrm"}, "keep: the model has no module of the class 'LayerNrm'; did you mean 'LayerNorm'?"),
        ({"keep": "kind:head"}, "keep: there is no kind 'head'; did you mean 'heads'? Known: channels, heads"),
        ({"keep": "nothing"}, "keep: 'nothing' matches no module and no parameter of the model"),
        ({"keep": "mid.weight.2"}, "keep: 'mid.weight.2' matches no module and no parameter of the model"),
        ({"ratios": {"frst.*": 0.5}}, "ratios: 'frst.*' matches no module and no parameter of the model"),
        ({"ratios": {"head.weight.0": 0.5}}, "ratios: 'head.weight.0' means no group that may be cut: none is made"),
        ({"ratios": {"mid": 0.5}, "keep": "head"},
         "ratios: 'mid' means no group that may be cut: it cuts 'head.weight', which the recipe keeps"),
        ({"ratios": {"kind:heads": 0.5}}, "ratios: 'kind:heads' means no group that may be cut: none is made"),
        ({"ratios": {"stem": 0.5}}, "ratios: 'stem' means no group that may be cut: none is made there alone"),
        ({"ratios": {"first": 0.5, "type:Block": 0.25}},
         "ratios: 'first' and 'type:Block' both mean the group first.up.weight.0 and say different things"),
    ],
)  # fmt: skip
def test_what_means_nothing_or_contradicts_itself(net: nn.Module, recipe: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        kept(net, **recipe)
    assert text in str(caught.value)


# ---------------------------------------------------------------------- ratios
def test_ratios_override_the_allocation(net: nn.Module) -> None:
    """A block's ratio is about what the block alone makes; the rest of the budget is spread over the others."""
    free = kept(net)
    assert free[FIRST] == free[SECOND] and free[FIRST] > 16 and free[MID] < 48
    pruned = fxprune.compile(net, X, target={"params": 0.6}, round_to=1, ratios={"first": 0.25, MID: 1.0})
    said = {g.name: g.kept for g in pruned.plan.groups}
    assert (said[FIRST], said[MID]) == (16, 48)
    assert 0.55 < pruned.report.params.ratio <= 0.6


class Turned(nn.Module):
    """Layers written out: weights that are turned, or scaled to norms, before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ParameterDict({"weight": torch.randn(32, 8), "bias": torch.randn(32)})
        self.second = nn.utils.parametrizations.weight_norm(nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ self.first["weight"].t() + self.first["bias"]).relu()
        return self.head(self.second(x).relu())


def test_ratios_of_layers_that_are_written_out() -> None:
    recipe = {"target": {"params": 1.0}, "round_to": 1, "ratios": {"first": 0.5, "second": 0.25}}
    plan = fxprune.compile(Turned().eval(), X, recipe).plan
    assert sorted((g.size, g.kept) for g in plan.groups) == [(16, 4), (32, 16)]


@pytest.mark.parametrize("allocation", ["uniform", "global", "width"])
def test_every_allocation_keeps_to_ratios(net: nn.Module, allocation: str) -> None:
    ratios = {"first.up": 0.25, SECOND: {"min": 0.75, "max": 0.9}}
    pruned = fxprune.compile(net, X, target={"params": 0.6}, allocation=allocation, round_to=1, ratios=ratios)
    sizes = {g.name: g.kept for g in pruned.plan.groups}
    assert sizes[FIRST] == 16 and 48 <= sizes[SECOND] <= 57
    assert pruned.report.params.ratio <= 0.6


def test_only_ratios(net: nn.Module) -> None:
    """With everything affordable nothing else is cut."""
    assert kept(net, target={"params": 1.0}, ratios={"type:Block": 0.5, "kind:residual": 1.0}) == {
        FIRST: 32,
        SECOND: 32,
    }


def test_ratios_beyond_the_floor_and_in_steps(net: nn.Module) -> None:
    said = kept(net, target={"params": 1.0}, ratios={"mid": 0.3}, floor=0.5, round_to=8)
    assert said[MID] == 16  # 14.4 in steps of 8


def test_the_closest_pattern_counts(net: nn.Module) -> None:
    """A dimension or group before the layer that makes it."""
    said = kept(net, target={"params": 1.0}, ratios={"type:Block": 0.5, FIRST: 0.25, "mid.weight.1": 0.75})
    assert said == {FIRST: 16, SECOND: 32, RESIDUAL: 24}


def test_a_target_that_ratios_make_impossible_names_them(net: nn.Module) -> None:
    with pytest.raises(TargetError) as caught:
        kept(net, target={"params": 0.05}, ratios={"type:Block": 1.0})
    assert "first.up.weight.0 (64 units): ratios: 'type:Block' keeps 1" in str(caught.value)


# ---------------------------------------------------------------------- kinds
@pytest.mark.parametrize(
    ("groups", "cut"),
    [
        ("ffn", {FIRST, SECOND, MID}),
        ("residual", {RESIDUAL}),
        ("not residual", {FIRST, SECOND, MID}),
        (["hidden", "not ffn"], {RESIDUAL}),
    ],
)
def test_kinds_by_role(net: nn.Module, groups: Any, cut: set[str]) -> None:
    assert kept(net, groups=groups, target={"params": 0.9}).keys() == cut


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", {("channels", "residual"), ("channels", "")}),
        ("vit_base_patch16_224", {("channels", "residual"), ("hidden", "ffn"), ("heads", ""), ("head_dims", "")}),
        ("bert", {("hidden", "residual"), ("hidden", "ffn"), ("heads", ""), ("head_dims", "")}),
        ("llama", {("hidden", "residual"), ("hidden", "ffn"), ("heads", ""), ("head_dims", "")}),
        ("swin_tiny_patch4_window7_224",
         {("channels", "residual"), ("hidden", "residual"), ("hidden", "ffn"), ("heads", ""), ("head_dims", "")}),
    ],
)  # fmt: skip
def test_roles_in_known_models(name: str, expected: set[tuple[str, str]]) -> None:
    """Read off the graph: skip connections, MLPs, attention."""
    model = next(m for m in (MODELS.values() if isinstance(MODELS, dict) else MODELS) if m.name == name)
    pytest.importorskip(model.library)
    analysis = analyse(capture(model.build(False), model.inputs(False, 2), {}))
    groups = find_groups(analysis)
    found = roles(analysis, groups)
    assert {(g.kind, found.get(g.name, "")) for g in groups} == expected
    inner = [g for g in groups if found.get(g.name) == "ffn"]
    assert all(any(part in g.name for part in ("fc1", "intermediate", "gate_proj", "pooler")) for g in inner)


class Mixer(nn.Module):
    """A block of MLP-Mixer: one MLP over tokens, one over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.tokens = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.channels = nn.Sequential(nn.Linear(32, 64), nn.GELU(approximate="tanh"), nn.Linear(64, 32))
        self.head = nn.Linear(32, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2)
        x = x + self.tokens(x)
        x = x.transpose(1, 2)
        y = self.channels[0](x)
        y = 0.5 * y * (1 + torch.tanh(0.8 * (y + 0.044715 * y**3)))  # a sum of y and its cube is no skip connection
        return self.head((x + self.channels[2](y)).mean(1))


def test_roles_of_a_mixer() -> None:
    analysis = analyse(capture(Mixer().eval(), (torch.randn(2, 3, 16, 16),), {}))
    assert roles(analysis, find_groups(analysis)) == {
        "patch.weight.0": "residual",
        "tokens.0.weight.0": "ffn",
        "channels.0.weight.0": "ffn",
    }


class Rotary(nn.Module):
    """Two layers whose queries are turned by angles that are an input, as language models do it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.outside = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        for inside, outside in zip(self.inside, self.outside, strict=True):
            q = inside(x)
            q = q * angle.cos() + q.relu() * angle.sin()
            x = x + outside(q)
        return self.head(x)


def test_what_is_multiplied_into_every_layer_is_no_stream() -> None:
    analysis = analyse(capture(Rotary().eval(), (torch.randn(2, 16), torch.randn(2, 1)), {}))
    found = roles(analysis, find_groups(analysis))
    assert Counter(found.values()) == {"ffn": 2}  # the stream itself is an input and stays whole


# ---------------------------------------------------------------------- dry runs and plans
def test_a_dry_run_cuts_nothing_and_its_plan_gives_the_same_model(net: nn.Module) -> None:
    before = copy.deepcopy(net.state_dict())
    recipe = {"target": {"params": 0.6}, "round_to": 1, "ratios": {"mid": 0.5}, "keep": "second.up.weight.0"}
    plan = fxprune.dry_run(net, X, recipe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    direct = fxprune.compile(net, X, recipe)
    assert plan == direct.plan
    assert plan.costs["params"] == (direct.report.params.dense, direct.report.params.pruned)
    assert plan.costs["macs"] == (direct.report.macs.dense, direct.report.macs.pruned)
    replayed = fxprune.compile(net, X, plan=Plan.from_json(plan.to_json()), proof="quick")
    assert replayed.plan.kept == plan.kept and replayed.report.proof.level == "quick"
    assert replayed.report.recipe["ratios"] == {"mid": 0.5}
    for name, tensor in replayed.module.state_dict().items():
        assert torch.equal(tensor, direct.module.state_dict()[name])


def test_what_a_plan_says_about_each_group(net: nn.Module) -> None:
    """What it is, what it saves by itself, and what of the recipe blocks or forces it."""
    recipe = {"target": {"params": 0.6}, "round_to": 1, "ratios": {"mid": 0.5}, "keep": "first.up.weight.0"}
    plan = fxprune.dry_run(net, X, recipe)
    rows = {g.name: g for g in plan.groups}
    assert rows[MID].why == "ratios: 'mid' keeps 0.5" and rows[MID].kept == 24
    assert rows[MID].params == 24 * (32 + 1 + 4)
    assert rows[MID].macs == 2 * 24 * (32 + 4)
    assert rows[FIRST].why == "the recipe keeps 'first.up.weight.0'" and rows[FIRST].params == 0
    assert rows[SECOND].why == "" and rows[SECOND].kept < 64, rows
    assert [rows[n].role for n in (RESIDUAL, FIRST, MID)] == ["residual", "ffn", "ffn"]
    report = str(fxprune.compile(net, X, plan=plan, proof="quick").report)
    assert "1 group stays whole: the recipe keeps 'first.up.weight.0' (first.up.weight.0)" in report


def test_plans_of_dead_units(net: nn.Module) -> None:
    with torch.no_grad():
        net.first.up.weight[:5], net.first.up.bias[:5] = 0, 0  # type: ignore[index,union-attr,operator]
    plan = fxprune.dry_run(net, X, target={"dead": True})
    pruned = fxprune.compile(net, X, plan=plan)
    assert pruned.plan == plan and pruned.report.proof.lossless
    assert next(g.kept for g in plan.groups if g.name == FIRST) == 59
    with pytest.raises(SavedModelError, match="this model's are others"):
        fxprune.compile(Net().eval(), X, plan=plan)


def test_plans_that_do_not_fit(net: nn.Module) -> None:
    plan = fxprune.dry_run(net, X, target={"params": 0.6})
    with pytest.raises(RecipeError, match="give a recipe or a plan, not both"):
        fxprune.compile(net, X, {"target": {"params": 0.5}}, plan=plan)
    with pytest.raises(
        SavedModelError, match="the plan does not fit the model and its inputs: dynamic_shapes names 'x'"
    ):
        fxprune.compile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), X, plan=plan)


def test_a_plan_of_before_there_were_roles_is_read() -> None:
    old = {"kept": {}, "groups": [{"name": "a", "kind": "hidden", "size": 4, "kept": 2}], "biases": [], "recipe": {}}
    plan = Plan.from_json(json.dumps({**old, "dynamic": {}}))
    assert (plan.groups[0].role, plan.groups[0].why, plan.costs) == ("", "", {})


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ({"criterion": "magnitud"}, "no criterion is called 'magnitud'"),
        ({"allocation": {"name": "uniform", "speed": 1}}, "allocation 'uniform' has no option 'speed'"),
        ({"backend": "onnx"}, "no backend is called 'onnx'"),
    ],
)
@pytest.mark.parametrize("run", [fxprune.compile, fxprune.dry_run])
def test_names_are_refused_before_anything_runs(run: Any, recipe: dict[str, Any], text: str) -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the model ran")

    with pytest.raises(fxprune.FxpruneError, match=text):
        run(Never(), X, target={"macs": 0.5}, **recipe)
