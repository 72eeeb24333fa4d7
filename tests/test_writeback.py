"""Write-back: the original class with smaller parameters, or a reason that names the line."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from bench.shims import shim_torchvision
from fxprune.errors import InputError, WriteBackError
from fxprune.saved import load_pruned
from fxprune.writeback.traced import Attribute, Traced, assign

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@dataclass
class Config:
    """A configuration that all layers share."""

    width: int = 48
    heads: int = 4
    inner: int = 64


class Attention(nn.Module):
    """Fused queries, keys and values; the default scale, which follows the width that it finds."""

    def __init__(self, config: Config, scale: str = "default") -> None:
        super().__init__()
        self.config = config
        self.heads = config.heads
        self.head_width = config.width // config.heads
        self.scale = scale
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.norm = nn.LayerNorm(self.head_width) if scale == "normed" else nn.Identity()
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = self.norm(q)
        if self.scale == "root":
            y = (q @ k.transpose(-2, -1) / math.sqrt(self.head_width)).softmax(-1) @ v
        elif self.scale == "matmul":
            q, k, v = (
                (x @ self.qkv.weight.T + self.qkv.bias)
                .view(*x.shape[:2], 3, self.heads, self.head_width)
                .permute(2, 0, 3, 1, 4)
                .unbind(0)
            )
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.scale == "power":
            y = (q * self.head_width**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], self.heads * self.head_width))


class Block(nn.Module):
    def __init__(self, config: Config, scale: str = "default") -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = Attention(config, scale)
        self.up, self.down = nn.Linear(config.width, config.inner), nn.Linear(config.inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Encoder(nn.Module):
    """Two blocks between two linear layers."""

    def __init__(self, scale: str = "default") -> None:
        super().__init__()
        config = Config()
        self.config = config
        self.embed = nn.Linear(10, config.width)
        self.blocks = nn.ModuleList([Block(config, scale) for _ in range(2)])
        self.head = nn.Linear(config.width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(0))


def encoder(scale: str = "default") -> Encoder:
    torch.manual_seed(0)
    model = Encoder(scale).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def state(model: nn.Module) -> dict[str, Any]:
    """Everything in the attributes of all modules that is not a tensor, and the tensors' bytes."""
    plain = {
        f"{path}.{k}": repr(v)
        for path, m in model.named_modules()
        for k, v in vars(m).items()
        if not k.startswith("_") and not isinstance(v, nn.Module)
    }
    return plain | {k: v.clone() for k, v in model.state_dict().items()}


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items()
    )


def check(model: nn.Module, inputs: Any, **recipe: Any) -> tuple[Any, Any]:
    """Compile, write back and compare; return the result and what it came from."""
    before = state(model)
    pruned = fxprune.compile(model, inputs, **{"target": {"macs": 0.5}, "round_to": 1, **recipe})
    small = pruned.module_like()
    assert same_state(state(model), before), "the dense model was changed"
    assert type(small) is type(model) and small is not model
    used = dict(pruned.module.named_parameters())
    own = dict(small.named_parameters())
    assert all(own[n].shape == p.shape for n, p in used.items() if n in own)
    assert pruned.report.params.pruned < pruned.report.params.dense
    assert {id(t) for t in small.parameters()}.isdisjoint({id(t) for t in pruned.module.parameters()})
    return small, pruned


# ---------------------------------------------------------------------- models of our own
@pytest.mark.parametrize("scale", ["default", "root", "power", "normed", "matmul"])
def test_attention_keeps_the_dense_scale(scale: str) -> None:
    """However the class arrives at its scale, what it computes with narrower heads is what the graph does."""
    model = encoder(scale)
    small, pruned = check(model, X)
    attention = small.blocks[0].attention
    widths = {g.kind: g.kept for g in pruned.plan.groups if "blocks.0.attention" in g.name}
    assert attention.head_width < 12 and attention.out.in_features == attention.heads * attention.head_width
    assert widths["heads"] == attention.heads
    for batch in (1, 5):
        x = torch.randn(batch, 7, 10)
        assert torch.allclose(small(x), pruned.module(x), atol=1e-5)


def test_a_copy_of_the_configuration_changes_not_the_one_shared() -> None:
    """The class reads no size from the configuration here; where it does, each module gets a copy of its own."""

    class FromConfig(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Config()
            self.up, self.down = nn.Linear(10, 48), nn.Linear(48, 5)
            self.scale = nn.Parameter(torch.rand(4, 12) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            heads, width = self.config.heads, self.config.width // self.config.heads
            y = self.up(x).view(*x.shape[:2], heads, width) * self.scale
            return self.down(y.reshape(*x.shape[:2], heads * width))

    model = FromConfig().eval()
    shared = model.config
    small, _ = check(model, X)
    assert (shared.heads, shared.width) == (4, 48) and small.config is not shared
    assert small.config.width < 48 and small.config.width % small.config.heads == 0


def test_numbers_in_lists_and_dicts() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = [32, 16]
            self.table = {"shape": (4, 8)}
            self.first, self.last = nn.Linear(10, 48), nn.Linear(16, 5)
            self.scale = nn.Parameter(torch.rand(4, 8) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.first(x).split(self.sizes, -1)
            a = (a.unflatten(-1, self.table["shape"]) * self.scale).sum(-2)
            return self.last(b * a.repeat_interleave(2, -1))

    small, _ = check(Nested().eval(), X)
    assert sum(small.sizes) == small.first.out_features < 48
    assert small.sizes[0] == math.prod(small.table["shape"])


@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_and_norms(groups: int) -> None:
    """Layers of torch.nn follow their weights: channels, groups, features."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=groups),
        nn.GroupNorm(4, 16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()
    small, _ = check(model, torch.randn(2, 3, 8, 8))
    assert small[0].out_channels == small[1].num_features == small[0].weight.shape[0] < 16
    assert small[3].in_channels == small[3].weight.shape[1] * small[3].groups
    assert small[4].num_channels == small[3].out_channels and small[7].in_features == small[7].weight.shape[1]
    assert repr(small[0]).startswith(f"Conv2d(3, {small[0].out_channels}")
    small.train()
    small(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert torch.allclose(small.eval()(torch.ones(1, 3, 8, 8)), small(torch.ones(1, 3, 8, 8)))


def test_recurrent_layers() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(10, 24, num_layers=2, bidirectional=True, batch_first=True)
            self.head = nn.Linear(48, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    small, _ = check(Tagger().eval(), X)
    assert small.rnn.hidden_size < 24 and small.head.in_features == 2 * small.rnn.hidden_size


# ---------------------------------------------------------------------- what a class cannot express
class WrittenDown(nn.Module):
    """Its forward pass has the number of channels in it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 400), nn.Linear(400, 5)
        self.scale = nn.Parameter(torch.rand(4, 100) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).view(x.shape[0], x.shape[1], 4, 100) * self.scale  # the number
        return self.down(y.flatten(-2))


class UsedAsNumber(nn.Module):
    """The width also multiplies the result, where it must not change."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 48
        self.up, self.down = nn.Linear(10, 48), nn.Linear(48, 5)
        self.shift = nn.Parameter(torch.randn(48))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).relu() + self.shift.expand(x.shape[0], x.shape[1], self.width)
        return self.down(y) * self.width


class Squared(nn.Module):
    """Heads times their width is written as the width of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.embed, self.qkv, self.out = nn.Linear(10, 48), nn.Linear(48, 144), nn.Linear(48, 48)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        return self.head(x + self.out(y))


def test_a_number_in_the_code_is_named_with_its_line() -> None:
    pruned = fxprune.compile(WrittenDown().eval(), X, target={"macs": 0.5}, round_to=1)
    with pytest.raises(WriteBackError) as caught:
        pruned.module_like()
    assert "test_writeback.py" in str(caught.value) and "4, 100) * self.scale  # the number" in str(caught.value)
    assert caught.value.nodes


def test_two_uses_that_disagree_are_both_named() -> None:
    pruned = fxprune.compile(UsedAsNumber().eval(), X, target={"macs": 0.5}, round_to=1)
    with pytest.raises(WriteBackError) as caught:
        pruned.module_like()
    assert "'width' would have to be" in str(caught.value) and "computes something else" in str(caught.value)


def test_keep_class_finds_what_the_class_can_express() -> None:
    torch.manual_seed(0)
    model = Squared().eval()
    free = fxprune.compile(model, X, target={"macs": 0.5}, round_to=1)
    with pytest.raises(WriteBackError):
        free.module_like()
    kept = fxprune.compile(model, X, target={"macs": 0.5}, round_to=1, keep_class=True)
    assert type(kept.module) is Squared and kept.report.macs.pruned <= 0.5 * kept.report.macs.dense
    assert kept.module.qkv.out_features == 3 * kept.module.embed.out_features < 144
    assert any("the class cannot express" in note for note in kept.report.notes)


def test_keep_class_gives_up_what_a_line_writes_down() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fixed, self.free, self.last = WrittenDown(), nn.Linear(5, 12), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.fixed(x)
            return y, self.last(self.free(y).relu())

    pruned = fxprune.compile(Mixed().eval(), X, target={"macs": 0.985}, round_to=1, keep_class=True)
    assert isinstance(pruned.module, Mixed) and pruned.module.fixed.up.out_features == 400
    assert pruned.module.free.out_features < 12
    assert any("fixed.up.weight" in note and "stays whole" in note for note in pruned.report.notes)


def test_keep_class_says_when_no_plan_reaches_the_target() -> None:
    with pytest.raises(WriteBackError, match="no selection that reaches the target can be expressed by WrittenDown"):
        fxprune.compile(WrittenDown().eval(), X, target={"macs": 0.5}, round_to=1, keep_class=True)


def test_without_a_dense_model(tmp_path: Path) -> None:
    fxprune.compile(encoder(), X, target={"macs": 0.5}).save(tmp_path / "small")
    loaded = load_pruned(tmp_path / "small")
    with pytest.raises(InputError, match="pass one as `model`"):
        loaded.module_like()
    small = loaded.module_like(Encoder().eval())
    assert torch.allclose(small(X), loaded.module(X), atol=1e-5)


# ---------------------------------------------------------------------- training and saving
def test_trained_weights_are_written_back_and_saved(tmp_path: Path) -> None:
    """The graph module trained, then written back; and a kept class trained, then saved."""
    pruned = fxprune.compile(encoder(), X, target={"macs": 0.5})
    _train(pruned.module)
    assert torch.allclose(pruned.module_like()(X), pruned.module(X), atol=1e-5)
    kept = fxprune.compile(encoder(), X, target={"macs": 0.5}, keep_class=True)
    before = kept.module(X)
    _train(kept.module)
    after = kept.module(X)
    assert not torch.allclose(before, after, atol=1e-3)
    kept.save(tmp_path / "small")
    assert torch.allclose(fxprune.load(tmp_path / "small")(X), after, atol=1e-5)


def _train(model: nn.Module) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimiser.zero_grad()
        (model(X) ** 2).mean().backward()
        optimiser.step()


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Embedding(20, 32), nn.Linear(32, 32)
            self.head = nn.Linear(32, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x) + self.inner(self.embed(x)).relu())

    small, _ = check(Tied().eval(), torch.randint(0, 20, (2, 5)))
    assert small.head.weight is small.embed.weight and small.embed.embedding_dim == small.head.in_features < 32


def test_dead_channels_and_their_biases() -> None:
    """A layer without a bias gets one where constants of removed units were folded into it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 5, bias=False)).eval()
    with torch.no_grad():
        model[0].weight[::2] = 0
        model[0].bias[::2] = 0.7
    small = fxprune.compile(model, X, target={"dead": True}).module_like()
    assert small[0].out_features == 16 and small[2].bias is not None
    assert torch.allclose(small(X), model(X), atol=1e-6)


# ---------------------------------------------------------------------- model libraries
def test_llama_generates_with_a_cache() -> None:
    transformers, model = _llama()
    inputs = {"input_ids": torch.randint(3, 60, (2, 12)), "use_cache": False}
    pruned = fxprune.compile(model, inputs, target={"macs": 0.5}, keep_class=True)
    small = pruned.module
    assert type(small) is transformers.LlamaForCausalLM and small.model.layers[0].mlp.up_proj.out_features < 128
    ids = torch.randint(3, 60, (2, 5))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = small.generate(ids, use_cache=True, **options)
    assert cached.shape == (2, 13) and torch.equal(cached, small.generate(ids, use_cache=False, **options))
    assert model.config.intermediate_size == 128


def _llama(**options: Any) -> Any:
    shim_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return transformers, transformers.LlamaForCausalLM(config).eval()


def test_a_configuration_that_says_the_smaller_sizes(tmp_path: Path) -> None:
    """Layers of one form stay alike, so that the configuration of the class can say it: `from_pretrained` reads it."""
    transformers, model = _llama()
    inputs = {"input_ids": torch.randint(3, 60, (2, 12)), "use_cache": False}
    pruned = fxprune.compile(model, inputs, target={"macs": 0.5})
    assert pruned.save_pretrained(tmp_path / "small")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert loaded.config.hidden_size < 64 and loaded.config.intermediate_size < 128
    assert torch.allclose(loaded(**inputs).logits, pruned.module(**inputs).logits, atol=1e-5)
    assert model.config.hidden_size == 64


def test_the_plan_beside_a_configuration_that_cannot(tmp_path: Path) -> None:
    transformers, model = _llama()
    inputs = {"input_ids": torch.randint(3, 60, (2, 12)), "use_cache": False}
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 10  # one layer stays wider than the other
    recipe = {"target": {"macs": 0.6}, "allocation": "global", "groups": ["hidden"], "round_to": 8}
    pruned = fxprune.compile(model, inputs, recipe, criterion={"name": "magnitude", "normalize": "none"})
    assert len({g.kept for g in pruned.plan.groups if "mlp" in g.name}) == 2
    assert not pruned.save_pretrained(tmp_path / "small")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "small")
    again = load_pruned(tmp_path / "small" / "fxprune").module_like(transformers.LlamaForCausalLM(config).eval())
    assert torch.allclose(again(**inputs).logits, pruned.module(**inputs).logits, atol=1e-5)


def test_a_model_without_configuration() -> None:
    with pytest.raises(InputError, match="use `save`"):
        fxprune.compile(nn.Linear(10, 8), X, target={"macs": 1.0}).save_pretrained("nowhere")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_timm(name: str) -> None:
    shim_torchvision()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    small, pruned = check(model, torch.randn(2, *model.pretrained_cfg["input_size"]), proof="quick")
    assert copy.deepcopy(small)(torch.randn(1, *model.pretrained_cfg["input_size"])).shape == (1, 10)
    assert sum(p.numel() for p in small.parameters()) == pruned.report.params.pruned


# ---------------------------------------------------------------------- traced numbers
_NUMBERS = st.integers(1, 50)


@given(_NUMBERS, _NUMBERS, _NUMBERS, _NUMBERS, st.lists(st.sampled_from("+-*/%r"), max_size=6))
def test_expressions_compute_what_python_does(a: int, b: int, c: int, d: int, steps: list[str]) -> None:
    """Computed on other values, an expression gives what the same code gives on them."""

    def run(x: int, y: int) -> int:
        for step in steps:
            if step == "r":
                x = 100 - x
            elif step == "%":
                x = x % (abs(y) + 1)
            else:
                x = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[step]
        return x

    traced = run(Traced(a, Attribute(("m", "x"))), Traced(b, Attribute(("m", "y"))))
    assert traced == run(a, b)
    if isinstance(traced, Traced) and not isinstance(traced.expression, int) and "%" not in steps:
        assert traced.expression.value({("m", "x"): c, ("m", "y"): d}) == run(c, d)


def test_numbers_are_replaced_where_they_are() -> None:
    config = Config()
    nested = {"a": (1, [2, config])}
    changed = assign(nested, ("a", 1, 1, "width"), 7)
    assert changed["a"][1][1].width == 7 and changed["a"][:1] == (1,)
    assert config.width == 48 and nested["a"][1][1] is config
