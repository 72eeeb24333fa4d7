"""Dead units: what is removed is what the outputs do not need, and the outputs do not change."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import fxprune
from fxprune.pruned import Pruned

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")


def dead(model: nn.Module, *inputs: Tensor, **recipe: Any) -> Pruned:
    """Compile with the target "dead": proved in float64, then equal on new inputs of other batch sizes."""
    pruned = fxprune.compile(model, inputs, {"target": {"dead": True}, **recipe})
    proof = pruned.report.proof
    assert proof.lossless and proof.level == "full" and proof.error <= proof.tolerance == 1e-9
    modes = [m.training for m in model.modules()]
    model.eval()
    small = pruned.module.eval()
    for batch in (1, 5):
        fresh = [torch.randn(batch, *x.shape[1:]) * 2 for x in inputs]
        with torch.no_grad():
            for a, b in zip(pytree.tree_leaves(small(*fresh)), pytree.tree_leaves(model(*fresh)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    return pruned


def kept(pruned: Pruned, name: str, dim: int = 0) -> list[int]:
    """The kept indices of a dimension."""
    if dim in pruned.plan.kept.get(name, {}):
        return pruned.plan.kept[name][dim]
    assert pruned.dense is not None
    return list(range(pruned.dense.get_parameter(name).shape[dim]))


def sizes(pruned: Pruned) -> dict[str, tuple[int, int]]:
    """Units of each group: dense, kept."""
    return {g.name: (g.size, g.kept) for g in pruned.plan.groups}


def without(units: Iterable[int], size: int) -> list[int]:
    return [i for i in range(size) if i not in set(units)]


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Give every bias, norm and statistic a value that is neither 0 nor 1."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dim() <= 1:
            tensor.uniform_(0.3, 1.2) if name.endswith(("weight", "running_var")) else tensor.normal_()
    return model.eval()


# ---------------------------------------------------------------------- ways in which channels die
class Residual(nn.Module):
    """conv-bn-relu-conv-bn with a skip connection, then a classifier."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 8, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def _zero_rows(model: Residual, units: list[int]) -> None:
    model.conv1.weight[units] = 0


def _zero_gamma(model: Residual, units: list[int]) -> None:
    model.norm1.weight[units] = 0


def _zero_gamma_negative_beta(model: Residual, units: list[int]) -> None:
    model.norm1.weight[units] = 0
    model.norm1.bias[units] = -1.0  # silent behind the ReLU


def _zero_everything(model: Residual, units: list[int]) -> None:
    for tensor in (model.conv1.weight, model.norm1.weight, model.norm1.bias):
        tensor[units] = 0
    model.conv2.weight[:, units] = 0


WAYS = [_zero_rows, _zero_gamma, _zero_gamma_negative_beta, _zero_everything]


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_channels_inside_a_residual_block(way: Callable[..., None], seed: int) -> None:
    """Exactly the dead channels go, and their constants, where they have any, end in a new bias of the next layer."""
    model = randomise(Residual())
    units = sorted(random.Random(seed).sample(range(12), 5))
    with torch.no_grad():
        way(model, units)
    pruned = dead(model, IMAGE)
    assert kept(pruned, "conv1.weight") == kept(pruned, "conv2.weight", 1) == without(units, 12)
    assert kept(pruned, "norm1.running_mean") == without(units, 12)
    assert sizes(pruned) == {"conv1.weight.0": (12, 7), **{g: s for g, s in sizes(pruned).items() if s == (8, 8)}}
    silent = way in (_zero_gamma_negative_beta, _zero_everything)
    assert pruned.plan.biases == ([] if silent else ["conv2.bias"])
    assert (pruned.module.conv2.bias is None) == silent


def test_consumer_columns_zero() -> None:
    """A hidden unit that no row of the next linear layer reads is dead, whatever it computes."""
    model = nn.Sequential(nn.Linear(4, 10), nn.GELU(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[2].weight[:, [1, 4, 9]] = 0
    pruned = dead(model, torch.randn(2, 4))
    assert kept(pruned, "0.weight") == kept(pruned, "2.weight", 1) == without([1, 4, 9], 10)
    assert pruned.plan.biases == []
    assert pruned.report.params.pruned == 4 * 7 + 7 + 7 * 6 + 6 + 6 * 3 + 3


def test_convolution_columns_zero() -> None:
    """A channel that no filter of the next convolution reads is dead as well."""
    model = randomise(Residual())
    with torch.no_grad():
        model.conv2.weight[:, [0, 7]] = 0
    pruned = dead(model, IMAGE)
    assert kept(pruned, "conv1.weight") == without([0, 7], 12)


def test_death_travels() -> None:
    """A layer that only dead units read, or that reads only dead units, dies with them."""
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[0].bias[:4] = -1
        model[2].weight[:4, 4:] = 0  # these read dead units only: constants
        model[4].weight[:, 6:] = 0  # and these nobody reads
    pruned = dead(model, torch.randn(2, 4))
    assert [kept(pruned, f"{i}.weight") for i in (0, 2, 4)] == [[4, 5, 6, 7], [4, 5], list(range(8))]


def test_constants_into_an_existing_bias() -> None:
    """A unit that emits a constant adds it, times its weights, to the bias of its consumer."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[[2, 5]] = 0
    pruned = dead(model, torch.randn(2, 4))
    assert pruned.plan.biases == ["2.bias"]
    added = model[2].weight[:, [2, 5]] @ model[0].bias[[2, 5]].sigmoid()
    torch.testing.assert_close(pruned.module.get_parameter("2.bias"), model[2].bias + added)
    assert kept(pruned, "0.weight") == without([2, 5], 8)


def test_constants_into_a_new_bias() -> None:
    """A consumer without bias gets one; it is a parameter that can be trained."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 3, bias=False))
    with torch.no_grad():
        model[0].weight[[0, 3, 4]] = 0
    pruned = dead(model, torch.randn(2, 3, 8, 8))
    layer = pruned.module.get_submodule("2")
    assert isinstance(layer, nn.Conv2d) and isinstance(layer.bias, nn.Parameter) and layer.bias.requires_grad
    constant = model[0].bias[[0, 3, 4]].sigmoid()
    expected = torch.einsum("oihw,i->o", model[2].weight[:, [0, 3, 4]], constant)
    torch.testing.assert_close(layer.bias, expected)


@pytest.mark.parametrize(
    ("padding", "mode", "expected"),
    [(0, "zeros", [0, 2]), ("valid", "zeros", [0, 2]), (1, "zeros", [0, 1, 2, 3]), ("same", "zeros", [0, 1, 2, 3])],
)
def test_constants_before_padding_stay(padding: Any, mode: str, expected: list[int]) -> None:
    """At the border a padded convolution sees zeros instead of the constant: no bias can say that, the unit stays."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 3, padding=padding, padding_mode=mode))
    with torch.no_grad():
        model[0].weight[[1, 3]] = 0
    pruned = dead(model, torch.randn(2, 3, 6, 6))
    assert kept(pruned, "0.weight") == expected


def test_zeros_before_padding_go() -> None:
    """A constant of zero is zero at the border too."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    with torch.no_grad():
        model[0].weight[[1, 3]] = 0
        model[0].bias[[1, 3]] = torch.tensor([-1.0, 0.0])
    pruned = dead(model, torch.randn(2, 3, 6, 6))
    assert kept(pruned, "0.weight") == [0, 2]
    assert pruned.plan.biases == []


def test_depthwise() -> None:
    """Depthwise channels die with the layer before them, or by their own weights."""
    model = nn.Sequential(
        nn.Conv2d(3, 10, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU6(),
        nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=False), nn.BatchNorm2d(10), nn.ReLU6(),
        nn.Conv2d(10, 4, 1, bias=False), nn.BatchNorm2d(4),
    )  # fmt: skip
    randomise(model)
    with torch.no_grad():
        model[1].weight[[0, 6]] = 0
        model[1].bias[[0, 6]] = -0.5  # silent before the padding
        model[3].weight[[2, 5]] = 0  # a constant after the depthwise layer
        model[6].weight[:, 9] = 0
    pruned = dead(model, torch.randn(2, 3, 6, 6))
    assert kept(pruned, "0.weight") == kept(pruned, "3.weight") == without([0, 2, 5, 6, 9], 10)
    assert pruned.plan.biases == ["6.bias"]


class Attention(nn.Module):
    """Self-attention written out, between a stem and a head."""

    def __init__(self, heads: int = 4, width: int = 4) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.stem = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v = (nn.Linear(16, heads * width) for _ in range(3))
        self.out = nn.Linear(heads * width, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        q, k, v = (f(x).unflatten(-1, (self.heads, self.width)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


def test_attention_heads_without_readers() -> None:
    """Heads whose columns of the output projection are zero go, with their queries, keys and values."""
    model = Attention()
    with torch.no_grad():
        model.out.weight[:, 4:8] = 0
    pruned = dead(model, torch.randn(2, 5, 6))
    assert (
        kept(pruned, "out.weight", 1) == kept(pruned, "q.weight") == kept(pruned, "v.bias") == without(range(4, 8), 16)
    )


def test_attention_heads_without_values() -> None:
    """Heads whose values are zero give zero, whatever the attention weights are."""
    model = Attention()
    with torch.no_grad():
        model.v.weight[[0, 1, 2, 3, 12, 13, 14, 15]] = 0
        model.v.bias[[0, 1, 2, 3, 12, 13, 14, 15]] = 0
    pruned = dead(model, torch.randn(2, 5, 6))
    assert kept(pruned, "v.weight") == kept(pruned, "k.weight") == list(range(4, 12))
    assert kept(pruned, "out.weight", 1) == list(range(4, 12))


def test_query_and_key_dimensions() -> None:
    """A head dimension that is zero in the queries of all heads adds nothing to any score."""
    model = Attention()
    with torch.no_grad():
        model.q.weight[1::4] = 0
        model.q.bias[1::4] = 0
    pruned = dead(model, torch.randn(2, 5, 6))
    assert kept(pruned, "q.weight") == kept(pruned, "k.weight") == without(range(1, 16, 4), 16)
    assert len(kept(pruned, "v.weight")) == 16


def test_keys_of_zeros_stay() -> None:
    """A learned token whose key and value are zero still takes its part of the attention away from the others."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(torch.randn(6, 8))
            self.key, self.value = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, self.key(self.tokens)[None], self.value(self.tokens)[None])

    model = Tokens()
    with torch.no_grad():
        model.tokens[2] = 0
    assert kept(dead(model, torch.randn(2, 5, 8)), "tokens") == list(range(6))


def test_weights_that_depend_on_the_input() -> None:
    """A constant times an unknown weight is unknown: only units that are zero go."""

    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.make = nn.Linear(4, 8), nn.Linear(4, 24)
            self.bias = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.relu(self.linear(x)), self.make(x.mean(0)).view(3, 8), self.bias)

    model = Hyper()
    with torch.no_grad():
        model.linear.weight[[1, 4]] = 0
        model.linear.bias[[1, 4]] = torch.tensor([-1.0, 1.0])  # silent, constant
    pruned = dead(model, torch.randn(2, 4))
    assert set(kept(pruned, "linear.weight")) >= set(without([1], 8))
    assert pruned.plan.biases == []


def test_grouped_convolution_columns() -> None:
    """Each group of a grouped convolution reads its own part of the channels: a pair that nobody reads goes."""
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 4, 1, groups=2))
    with torch.no_grad():
        model[2].weight[:, 1] = 0  # channels 1 and 5
        model[2].weight[:2, 3] = 0  # channel 3, but not 7
    pruned = dead(model, torch.randn(2, 3, 5))
    assert set(without([1, 3, 5], 8)) <= set(kept(pruned, "0.weight")) <= set(without([1, 5], 8))


def test_concatenation() -> None:
    """Each part of a concatenation dies by itself; constants of both go into the one consumer."""

    class Concat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv1d(3, 6, 1), nn.Conv1d(3, 8, 1)
            self.out = nn.Conv1d(14, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat([torch.sigmoid(self.left(x)), torch.tanh(self.right(x))], 1))

    model = Concat()
    with torch.no_grad():
        model.left.weight[[1, 2]] = 0
        model.right.weight[[0, 7]] = 0
        model.out.weight[:, 6 + 3] = 0
    pruned = dead(model, torch.randn(2, 3, 5))
    assert kept(pruned, "left.weight") == without([1, 2], 6)
    assert kept(pruned, "right.weight") == without([0, 3, 7], 8)
    assert pruned.plan.biases == ["out.bias"]


def test_pixel_shuffle() -> None:
    """A channel behind a pixel shuffle is dead where all the channels that it is made of are."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        model[0].weight[4:8] = 0
        model[0].bias[4:8] = 0.25
        model[0].weight[13] = 0  # its three neighbours live
    pruned = dead(model, torch.randn(2, 3, 4, 4))
    assert kept(pruned, "0.weight") == without(range(4, 8), 16)
    assert kept(pruned, "3.weight", 1) == [0, 2, 3]


def test_normalised_channels_stay() -> None:
    """Layer norm reduces over its channels: a zero channel still counts in mean and variance."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[[1, 2]] = 0
        model[0].bias[[1, 2]] = 0
        model[1].weight[[1, 2]] = 0
        model[1].bias[[1, 2]] = 0
        model[2].weight[:, [1, 2]] = 0
    pruned = dead(model, torch.randn(2, 4))
    assert sizes(pruned) == {"0.weight.0": (8, 8)}
    assert "nothing was removed: the target is met by the model as it is" in pruned.report.notes


def test_group_norm_channels_stay() -> None:
    """Group norm reduces over the channels of a group."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        model[0].weight[[1, 2]] = 0
        model[1].weight[[1, 2]] = 0
    assert all(size == left for size, left in sizes(dead(model, torch.randn(2, 3, 4, 4))).values())


def test_embeddings() -> None:
    """An embedding dimension that is the same for every token is a constant."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(11, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.embed(ids))

    model = Text()
    with torch.no_grad():
        model.embed.weight[:, [0, 5]] = torch.tensor([0.0, 0.7])
    ids = torch.randint(0, 11, (2, 4))
    pruned = fxprune.compile(model, ids, target={"dead": True})
    assert kept(pruned, "embed.weight", 1) == without([0, 5], 8)
    every = torch.arange(11)[None]
    torch.testing.assert_close(pruned.module(every), model(every))


def test_gated_units() -> None:
    """A product with a factor that is always zero is zero."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(4, 10), nn.Linear(4, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    model = Gated()
    with torch.no_grad():
        for layer, units in ((model.gate, [0, 1]), (model.up, [5])):
            layer.weight[units] = 0
            layer.bias[units] = 0
    pruned = dead(model, torch.randn(2, 4))
    assert kept(pruned, "gate.weight") == kept(pruned, "up.weight") == without([0, 1, 5], 10)


def test_outputs_and_their_constants_stay() -> None:
    """A unit that is an output is never dead, even if it is zero."""
    model = nn.Linear(4, 6)
    with torch.no_grad():
        model.weight[:3] = 0
        model.bias[:3] = 0
    pruned = dead(model, torch.randn(2, 4))
    assert pruned.module(torch.randn(2, 4)).shape == (2, 6)
    assert pruned.plan.groups == []


# ---------------------------------------------------------------------- nothing, everything, some
def test_nothing_dead() -> None:
    """A model that is alive comes back whole, and the report says so."""
    pruned = dead(randomise(Residual()), IMAGE)
    assert pruned.plan.kept == {}
    assert pruned.report.params.ratio == pruned.report.macs.ratio == 1
    assert pruned.report.notes == ["nothing was removed: the target is met by the model as it is"]


def test_everything_dead() -> None:
    """Of a layer whose units are all dead one stays, because an empty layer is none."""
    model = randomise(Residual())
    with torch.no_grad():
        model.norm1.weight[:] = 0
    pruned = dead(model, IMAGE)
    assert kept(pruned, "conv1.weight") == [0]
    assert pruned.plan.biases == ["conv2.bias"]


def test_keep_is_respected() -> None:
    """Dead units of what the recipe keeps stay."""
    model = randomise(Residual())
    with torch.no_grad():
        model.norm1.weight[[1, 2]] = 0
    assert dead(model, IMAGE, keep=["conv2"]).plan.kept == {}
    assert dead(model, IMAGE, groups=["heads"]).plan.kept == {}
    assert kept(dead(model, IMAGE, keep=["head"]), "conv1.weight") == without([1, 2], 12)


def test_small_but_not_zero() -> None:
    """A weight of 1e-30 is not zero."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[2] = 1e-30
        model[0].bias[2] = 0
    assert dead(model, torch.randn(2, 4)).plan.kept == {}


@pytest.mark.parametrize("removed", [False, True], ids=["mask in place", "prune.remove"])
def test_masks_of_torch(removed: bool) -> None:
    """Structured masks of torch.nn.utils.prune, applied for good or still in place."""
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 3))
    for layer in (model[0], model[2]):
        prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0)
        if removed:
            prune.remove(layer, "weight")
    pruned = dead(model, torch.randn(2, 4))
    assert sorted(sizes(pruned).values()) == [(6, 3), (10, 5)]
    alive = [int(model[i].weight.abs().sum(1).count_nonzero()) for i in (0, 2)]
    assert alive == [5, 3]


def test_unstructured_masks() -> None:
    """Scattered zeros kill a unit only where they leave nothing of it."""
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3))
    prune.random_unstructured(model[0], "weight", amount=0.4)
    prune.remove(model[0], "weight")
    whole = (model[0].weight == 0).all(1).nonzero().flatten().tolist()
    assert kept(dead(model, torch.randn(2, 4)), "0.weight") == without(whole, 10)


def test_dead_in_other_precisions() -> None:
    """Folded constants are computed in float64 and rounded once."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight[:3] = 0
    pruned = fxprune.compile(model, torch.randn(2, 4, dtype=torch.bfloat16), target={"dead": True})
    assert pruned.report.proof.error <= 1e-9
    assert pruned.module.get_parameter("2.bias").dtype == torch.bfloat16
    x = torch.randn(7, 4, dtype=torch.bfloat16)
    torch.testing.assert_close(pruned.module(x), model(x), atol=2e-2, rtol=2e-2)


def test_training_mode_and_the_model_itself() -> None:
    """The pruned module is in the model's mode, and the model is not touched."""
    model = randomise(Residual()).train()
    with torch.no_grad():
        model.norm1.weight[[1, 2]] = 0
    before = {n: t.clone() for n, t in model.state_dict().items()}
    pruned = fxprune.compile(model, IMAGE, target={"dead": True})
    assert pruned.module.training and pruned.module.norm1.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# ---------------------------------------------------------------------- random networks
def _network(rng: random.Random) -> tuple[nn.Module, Tensor]:
    """A random chain of blocks."""
    width = rng.choice([4, 6, 8])
    layers: list[nn.Module] = [nn.Conv2d(3, width, rng.choice([1, 3]), padding=rng.choice([0, 1]))]
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["conv", "depthwise", "norm", "act", "pool", "shuffle", "group_norm", "transposed", "prelu"])
        if kind == "conv":
            new, kernel = rng.choice([4, 6, 8]), rng.choice([1, 3])
            bias, padding = rng.random() < 0.5, rng.choice([0, 1])
            layers.append(nn.Conv2d(width, new, kernel, padding=padding, bias=bias, stride=rng.choice([1, 2])))
            width = new
        elif kind == "depthwise":
            layers.append(nn.Conv2d(width, width, 3, padding=1, groups=width, bias=rng.random() < 0.5))
        elif kind == "norm":
            layers.append(nn.BatchNorm2d(width))
        elif kind == "act":
            layers.append(rng.choice([nn.ReLU(), nn.Sigmoid(), nn.GELU(), nn.Tanh(), nn.Hardswish(), nn.Softplus()]))
        elif kind == "pool":
            layers.append(rng.choice([nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1), nn.Dropout(0.5), nn.Identity()]))
        elif kind == "shuffle" and width % 4 == 0:
            layers.append(nn.PixelShuffle(2))
            width //= 4
        elif kind == "group_norm":
            layers.append(nn.GroupNorm(2 if width % 2 == 0 else 1, width))
        elif kind == "transposed":
            layers.append(nn.ConvTranspose2d(width, width, 3, padding=rng.choice([0, 1]), bias=rng.random() < 0.5))
        elif kind == "prelu":
            layers.append(nn.PReLU(width))
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 6), nn.ReLU(), nn.Linear(6, 2)]
    return randomise(nn.Sequential(*layers)), torch.randn(2, 3, 14, 14)


@torch.no_grad()
def _zero_at_random(model: nn.Module, rng: random.Random) -> int:
    """Zero random slices of random parameters; returns how many."""
    zeroed = 0
    for name, parameter in model.named_parameters():
        for dim in range(min(parameter.dim(), 2)):
            if rng.random() < 0.4:
                count = rng.randint(1, max(parameter.shape[dim] // 2, 1))
                index = torch.tensor(rng.sample(range(parameter.shape[dim]), count))
                parameter.index_fill_(dim, index, 0.0)
                zeroed += count
        if name.endswith("bias") and rng.random() < 0.3:
            parameter.neg_()
    return zeroed


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_outputs_never_change(seed: int) -> None:
    """Whatever is zero in a random network, compiling it changes no output."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model, x = _network(rng)
    _zero_at_random(model, rng)
    pruned = dead(model, x)
    assert pruned.report.params.pruned <= pruned.report.params.dense + sum(
        len(pruned.module.get_parameter(name)) for name in pruned.plan.biases
    )


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_outputs_of_attention_never_change(seed: int) -> None:
    """The same for attention: any slices of its projections may be zero."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = randomise(Attention(heads=rng.choice([2, 4]), width=rng.choice([2, 4])))
    _zero_at_random(model, rng)
    dead(model, torch.randn(2, 5, 6))


@settings(max_examples=15)
@given(st.sets(st.integers(0, 11)), st.sampled_from(WAYS))
def test_exactly_the_zeroed_units_go(units: set[int], way: Callable[..., None]) -> None:
    """Any subset of channels, zeroed in any way: these go and no others, one staying where all are dead."""
    torch.manual_seed(len(units))
    model = randomise(Residual())
    with torch.no_grad():
        way(model, sorted(units))
    assert kept(dead(model, IMAGE), "conv1.weight") == (without(units, 12) or [0])


class _Fused(nn.Module):
    """Queries, keys and values of one layer, cut as (3, heads, dims): they share one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(x + self.out(y.transpose(1, 2).reshape(n, t, 16)))


def test_a_dimension_that_values_alone_can_do_without_stays() -> None:
    net = _Fused().eval()
    with torch.no_grad():
        net.out.weight[:, 1::4] = 0  # no head's second dimension is read, but queries and keys are multiplied over it
    x = torch.randn(2, 5, 16)
    result = fxprune.compile(net, x, target={"dead": True})
    assert torch.allclose(result.module(x), net(x), atol=1e-6)
    assert not result.plan.kept
    with torch.no_grad():
        for part in (net.qkv.weight[16:32], net.qkv.bias[16:32]):
            part.view(4, 4, -1)[:, 1] = 0
    result = fxprune.compile(net, x, target={"dead": True})
    assert torch.allclose(result.module(x), net(x), atol=1e-6)
    assert result.module.get_parameter("qkv.weight").shape == (36, 16)


def test_a_layer_that_reads_and_writes_one_stream_counts_as_a_reader() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.block(x))

    net = Stream().eval()
    with torch.no_grad():
        net.head.weight[:, 3] = 0  # only the block reads channel 3 now
    x = torch.randn(3, 4)
    result = fxprune.compile(net, x, target={"dead": True})
    assert torch.allclose(result.module(x), net(x), atol=1e-6)
    assert not result.plan.kept
