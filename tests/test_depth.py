"""Blocks that go whole: found, removed, proved, counted, chosen, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.analyse import analyse
from fxprune.blocks import find_blocks
from fxprune.capture import capture
from fxprune.costs import Costs
from fxprune.errors import InputError, RecipeError, SavedModelError, TargetError, WriteBackError
from fxprune.kept import Kept
from fxprune.prove import prove
from fxprune.rewrite import rewrite
from fxprune.saved import load_pruned

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")


class Layer(nn.Module):
    """Attention and an MLP on a stream, with norms before or after."""

    def __init__(self, width: int, after: bool) -> None:
        super().__init__()
        self.after = after
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        if self.after:
            x = self.one(x + self.attend(x))
            return self.two(self.mlp(x) + x)  # type: ignore[no-any-return]
        x = x + self.attend(self.one(x))
        return x + self.mlp(self.two(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Three layers, the second of which hardly does anything."""

    def __init__(self, after: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.layers = nn.ModuleList(Layer(16, after) for _ in range(3))
        with torch.no_grad():
            for layer in (self.layers[1].out, self.layers[1].mlp[2]):  # type: ignore[union-attr, index]
                layer.weight *= 1e-3  # type: ignore[operator]
                layer.bias *= 1e-3  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Two residual units, the first behind a projection and therefore no block; a stream that is read from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.project = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        self.a = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.project(x) + self.a(x)
        return self.head((x + self.b(x)).mean((2, 3)))  # type: ignore[no-any-return]


def made(after: bool = False) -> Transformer:
    torch.manual_seed(0)
    return Transformer(after).eval()


X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))
DATA = [torch.randn(16, 5, 6, generator=torch.Generator().manual_seed(s)) for s in (2, 3)]


@pytest.mark.parametrize("after", [False, True])
def test_the_blocks_of_a_transformer(after: bool) -> None:
    blocks = find_blocks(analyse(capture(made(after), (X,), {})))
    if after:  # the norm belongs to the stream
        assert [b.name for b in blocks] == [n for i in range(3) for n in (f"layers.{i}", f"layers.{i}.mlp")]
        assert {p.split(".")[2] for p in blocks[0].parameters} == {"qkv", "out"}
    else:
        assert [b.name for b in blocks] == [f"layers.{i}{k}" for i in range(3) for k in (":0", ":1")]
        assert {p.split(".")[2] for p in blocks[0].parameters} == {"qkv", "out", "one"}


def test_a_projection_is_no_block() -> None:
    blocks = find_blocks(analyse(capture(Residual().eval(), (torch.randn(2, 3, 6, 6),), {})))
    assert [b.name for b in blocks] == ["b"]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("gone", [(0,), (1, 2), (0, 3, 5), (0, 1, 2, 3, 4, 5)])
def test_what_is_left_computes_without_them(after: bool, gone: tuple[int, ...]) -> None:
    """Equal to the model whose branches give zero, proved against the masked reference, and counted rightly."""
    model = made(after)
    analysis = analyse(capture(model, (X,), {}))
    blocks = find_blocks(analysis)
    kept = Kept({}, {blocks[i].total: blocks[i].stream for i in gone})
    rewritten = rewrite(analysis, kept, model)
    prove(analysis, kept, rewritten, model, "full", 0, False)
    for i in gone:
        layer = model.layers[i // 2]
        last = layer.mlp[2] if i % 2 else layer.out  # type: ignore[union-attr, index]
        with torch.no_grad():
            last.weight.zero_()  # type: ignore[union-attr, operator]
            last.bias.zero_()  # type: ignore[union-attr, operator]
    with torch.no_grad():
        torch.testing.assert_close(rewritten.module(X), model(X), rtol=1e-5, atol=1e-6)
    costs = Costs(analysis).without(kept.removed)
    assert costs.params({}) == sum(p.numel() for p in rewritten.module.parameters())
    again = analyse(capture(rewritten.module, (X,), {}))
    assert costs.macs({}) == Costs(again).macs({})
    assert costs.memory({}) <= Costs(analysis).memory({})


@pytest.mark.parametrize("name", ["influence", "greedy"])
@pytest.mark.parametrize("after", [False, True])
def test_the_block_that_does_nothing_goes_first(name: str, after: bool) -> None:
    """And everything is said: plan, report, costs; widths make up the rest of the target."""
    model = made(after)
    recipe = {"target": {"macs": 0.4}, "blocks": {"name": name, "remove": 2}, "round_to": 4}
    pruned = fxprune.compile(model, X, recipe, calibration=DATA)
    assert {n[: len("layers.1")] for n in pruned.plan.blocks} == {"layers.1"}
    assert len(pruned.plan.blocks) == 2
    assert 0.3 < pruned.report.macs.ratio <= 0.4
    assert pruned.report.params.pruned == sum(p.numel() for p in pruned.module.parameters())
    assert "2 blocks are removed whole: layers.1" in str(pruned.report)
    assert not any(n.startswith("layers.1.qkv") for n, _ in pruned.module.named_parameters())
    assert {g.kept for g in pruned.plan.groups if g.why == "in a removed block"} == {0}


def test_as_many_go_as_the_target_takes() -> None:
    """Without a number no more go than the target needs; less is lost than by widths alone."""
    model = made()
    wide = fxprune.compile(model, X, {"target": {"macs": 0.6}, "round_to": 4}, calibration=DATA)
    deep = fxprune.compile(model, X, {"target": {"macs": 0.6}, "round_to": 4, "blocks": "greedy"}, calibration=DATA)
    assert deep.plan.blocks
    assert deep.report.macs.ratio <= 0.6

    def lost(module: nn.Module) -> float:
        with torch.no_grad():
            return float((module(DATA[0]) - model(DATA[0])).square().sum())

    assert lost(deep.module) < lost(wide.module)


def test_a_plan_with_blocks_comes_back(tmp_path: Path) -> None:
    model = made()
    recipe = {"target": {"macs": 0.5}, "blocks": {"name": "influence", "remove": 2}, "reconstruction": "none"}
    plan = fxprune.dry_run(model, X, recipe, calibration=DATA)
    pruned = fxprune.compile(model, X, plan=plan, calibration=DATA)
    assert pruned.plan.blocks == plan.blocks
    assert len(plan.blocks) == 2
    loaded = load_pruned(pruned.save(tmp_path / "it"))
    assert loaded.plan.blocks == plan.blocks
    torch.testing.assert_close(loaded.module(X), pruned.module(X))
    with pytest.raises(WriteBackError, match="whole blocks are removed"):
        pruned.module_like()
    plan.blocks[0] = "layers.9"
    with pytest.raises(SavedModelError, match=r"removes the block 'layers\.9'"):
        fxprune.compile(model, X, plan=plan, calibration=DATA)


def test_what_is_kept_stays() -> None:
    recipe = {"target": {"macs": 0.9}, "blocks": {"name": "influence", "remove": 2}, "keep": ["layers.1.*"]}
    pruned = fxprune.compile(made(), X, recipe, calibration=DATA)
    assert not any(n.startswith("layers.1") for n in pruned.plan.blocks)


@pytest.mark.parametrize(
    ("blocks", "more", "kind", "text"),
    [
        ("gready", {}, RecipeError, "no way to remove blocks is called 'gready'; did you mean 'greedy'"),
        ({"name": "greedy", "remove": 0}, {}, RecipeError, "remove is a number of blocks"),
        ({"name": "greedy", "number": 1}, {}, RecipeError, "blocks is a name or"),
        ("greedy", {"keep_class": True}, RecipeError, "neither with keep_class"),
        ({"name": "influence", "remove": 7}, {}, TargetError, "removes 7 blocks, and only 6 can go"),
    ],
)
def test_what_is_wrong_is_said(blocks: Any, more: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        fxprune.compile(made(), X, {"target": {"macs": 0.5}, "blocks": blocks, **more}, calibration=DATA)


def test_data_are_asked_for() -> None:
    with pytest.raises(InputError, match="blocks 'greedy' are chosen on calibration data"):
        fxprune.compile(made(), X, {"target": {"macs": 0.5}, "blocks": "greedy"})


def test_a_branch_on_an_input_goes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.branch(x))  # type: ignore[no-any-return]

    model, x = Net().eval(), torch.randn(8, 4)
    recipe = {"target": {"macs": 0.9}, "round_to": 1, "blocks": {"name": "influence", "remove": 1}}
    pruned = fxprune.compile(model, (x,), recipe, reconstruction="none", calibration=[(x,)])
    assert pruned.plan.blocks == ["branch"]
    torch.testing.assert_close(pruned.module(x), model.head(x))
