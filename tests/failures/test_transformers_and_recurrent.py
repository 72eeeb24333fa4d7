"""Rows 14-18 and 34: detection transformers, recurrent layers, language models and their classes after pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.failures.checks import Result, prune
from tests.failures.test_shape_operators import images
from tests.rules.checks import close


# ---------------------------------------------------------------------- 14
def _detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    return DetrForObjectDetection(
        DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4, num_queries=5, num_labels=4,
        )
    )  # fmt: skip


class Detections(nn.Module):
    """Classes and boxes; the other results are hidden states, whose width would stay."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        result = self.model(pixels)
        return result.logits, result.pred_boxes


def test_row_14_detr() -> None:
    """The backbone under its frozen batch norm, which is buffers only, and the transformer behind it. TP#307, #189."""
    model = Detections(_detr())
    assert any("FrozenBatchNorm" in type(m).__name__ for m in model.modules())
    result = prune(model, images(size=32))
    kinds = result.kinds
    assert kinds["heads"] == 3 and kinds["channels"] >= 3
    result.cut("*convolution.weight.0", "*_proj.weight.[01]", "*fc[12].weight.[01]", "*input_projection.weight.[01]")
    buffers = dict(model.named_buffers())
    shrunk = [
        n for n, b in result.pruned.module.named_buffers() if n.endswith("running_var") and b.shape < buffers[n].shape
    ]
    assert shrunk, "no frozen batch norm became narrower"


# ---------------------------------------------------------------------- 15
class Recurrent(nn.Module):
    """A recurrent layer between a convolution and a linear layer, with or without the states of its last step."""

    def __init__(self, layer: nn.RNNBase, states: bool = False) -> None:
        super().__init__()
        self.embed = nn.Conv1d(3, 16, 3, padding=1)
        self.layer = layer
        self.states = states
        width = layer.proj_size or layer.hidden_size
        self.head = nn.Linear(width * (1 + layer.bidirectional), 4)
        self.norm = nn.LayerNorm(width * (1 + layer.bidirectional))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(1, 2)
        y, last = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        if self.states:
            hidden = last[0] if isinstance(last, tuple) else last
            y = torch.cat([hidden[-2], hidden[-1]], -1) if self.layer.bidirectional else hidden[-1]
        elif not self.layer.batch_first:
            y = y.transpose(0, 1)
        return self.head(self.norm(y))


RECURRENT: dict[str, Any] = {
    "lstm": lambda: nn.LSTM(16, 20, batch_first=True),
    "lstm_two_layers": lambda: nn.LSTM(16, 20, num_layers=2, batch_first=True, dropout=0.1),
    "lstm_bidirectional": lambda: nn.LSTM(16, 20, bidirectional=True),
    "lstm_projected": lambda: nn.LSTM(16, 24, proj_size=12, batch_first=True),
    "gru": lambda: nn.GRU(16, 20),
    "gru_bidirectional": lambda: nn.GRU(16, 20, num_layers=2, bidirectional=True, batch_first=True),
    "rnn": lambda: nn.RNN(16, 20, batch_first=True),
}


STEPS = ["lstm", "lstm_two_layers", "lstm_projected", "gru", "gru_bidirectional", "rnn"]
LAST = ["lstm", "lstm_bidirectional", "gru"]


@pytest.mark.parametrize(
    ("name", "states"),
    [*((n, False) for n in STEPS), *((n, True) for n in LAST)],
    ids=[*STEPS, *(f"{n}_last_state" for n in LAST)],
)
def test_row_15_recurrent_layers(name: str, states: bool) -> None:
    """The gates, the recurrent weight on both sides, and every reader lose the same hidden units. TP#44, #276, #404."""
    result = prune(Recurrent(RECURRENT[name](), states), torch.randn(2, 3, 9))
    result.cut("embed.weight.0", "layer.weight_ih_*.[01]", "layer.weight_hh_*.[01]", "layer.bias_*.0", "head.weight.1")
    gates = {"l": 4, "g": 3, "r": 1}[name[0]]
    assert result.width("layer.weight_hh_l0") % gates == 0
    if "projected" not in name:
        assert result.width("layer.weight_hh_l0") == gates * result.width("layer.weight_hh_l0", 1)
    compare_with_class(result, torch.randn(5, 3, 9))


def compare_with_class(result: Result, inputs: Any) -> nn.Module:
    """Check that the model's own class computes the same with the smaller parameters; return it."""
    again = result.pruned.module_like()
    assert type(again) is type(result.model)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in result.model.parameters())
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        expected, actual = result.pruned.module(*arguments), again(*arguments)
    assert close([expected], [actual], 1e-4)
    return again


# ---------------------------------------------------------------------- 16 to 18
SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def causal_lm(family: str, **sizes: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config")(**(SIZES | sizes))
    return getattr(transformers, f"{family}ForCausalLM")(config)


class Logits(nn.Module):
    """A language model whose only result is a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def tokens(rows: int = 2, steps: int = 9) -> Tensor:
    return torch.randint(3, 60, (rows, steps))


LANGUAGE = {
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_of_other_head_width": ("Llama", {"head_dim": 6, "attention_bias": True}),
    "qwen2": ("Qwen2", {}),
    "multi_query": ("Llama", {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_row_16_grouped_query_attention(name: str, tmp_path: Path) -> None:
    """Key heads, query heads of each, head width and model width, each by itself; saved, loaded, and in the class.

    TP#516, #461, #436, #439, #512.
    """
    family, sizes = LANGUAGE[name]
    result = prune(Logits(causal_lm(family, **sizes)), tokens())
    result.cut("*.[qkv]_proj.weight.[01]", "*.o_proj.weight.[01]", "*.gate_proj.weight.[01]", "*embed_tokens.weight.1")
    q, k, v = (result.width(f"model.model.layers.0.self_attn.{p}_proj.weight") for p in "qkv")
    assert q % k == 0, "each key head has the same number of query heads"
    assert q // k * v == result.width("model.model.layers.0.self_attn.o_proj.weight", 1)
    ids = tokens(5)
    result.pruned.save(tmp_path / "saved")
    with torch.no_grad():
        expected = result.pruned.module(ids)
        assert torch.equal(fxprune.load(tmp_path / "saved")(ids), expected)
        fresh = Logits(causal_lm(family, **sizes)).eval()
        assert close([expected], [fxprune.load(tmp_path / "saved", model=fresh)(ids)], 1e-5)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_row_16_the_class_generates(family: str) -> None:
    """The smaller model of the original class generates, with its cache, what the graph says. TP#436, #439."""
    result = prune(Logits(causal_lm(family)), tokens(), keep_class=True, least=0.2)
    again = result.pruned.module
    assert type(again) is Logits
    result.cut("*.[qkv]_proj.weight.[01]", "*.o_proj.weight.[01]", "*.gate_proj.weight.[01]")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    ids = again.model.generate(tokens(1, 5), use_cache=True, **options)
    assert torch.equal(ids, again.model.generate(ids[:, :5], use_cache=False, **options))
    with torch.no_grad():
        likeliest = result.pruned.graph_module()(ids).argmax(-1)
    assert torch.equal(likeliest[:, 4:-1], ids[:, 5:])


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_row_17_causal_lm_with_model_output(family: str) -> None:
    """The model as it is: it returns a dataclass with a cache of keys and values. TP#519."""
    result = prune(causal_lm(family), {"input_ids": tokens()})
    result.cut("model.layers.*.mlp.*.weight.[01]", "model.embed_tokens.weight.1", "lm_head.weight.1")
    result.cut("model.layers.*.self_attn.[qkvo]_proj.weight.[01]", "model.norm.weight.0")
    output = result.pruned.module(input_ids=tokens(3))
    assert output["logits"].shape == (3, 9, 60)
    assert any("past_key_values" in note or "None" in note for note in result.pruned.report.notes)


def test_row_18_qwen3() -> None:
    """Norms of queries and keys of their own, and a deeper stack. TP#527."""
    result = prune(Logits(causal_lm("Qwen3", num_hidden_layers=6)), tokens())
    result.cut("*.[qk]_norm.weight.0", "*.[qkv]_proj.weight.[01]", "*.o_proj.weight.[01]", "*layernorm.weight.0")
    assert result.kinds["hidden"] == 6 + 1
    for layer in range(6):
        norm = result.width(f"model.model.layers.{layer}.self_attn.q_norm.weight")
        assert result.width(f"model.model.layers.{layer}.self_attn.k_proj.weight") % norm == 0


# ---------------------------------------------------------------------- 34
def _encoder(family: str) -> nn.Module:
    import transformers

    sizes = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 32, "embedding_size": 16, "num_labels": 3,
    }  # fmt: skip
    if family == "Bert":
        del sizes["embedding_size"]
    config = getattr(transformers, f"{family}Config")(**sizes)
    return getattr(transformers, f"{family}ForSequenceClassification")(config)


class Classes(Logits):
    """A classifier of texts whose only result is a tensor."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


@pytest.mark.parametrize("family", ["Albert", "Bert", "Electra"])
def test_row_34_heads_of_encoders(family: str) -> None:
    """Views of heads have their new number, in the graph and in the class; ALBERT's layers are one and the same.

    nni#5187, INC#525.
    """
    result = prune(Classes(_encoder(family)), tokens())
    assert result.kinds["heads"] == (1 if family == "Albert" else 2)
    result.cut("*query.weight.[01]", "*value.weight.[01]", "*embeddings.weight.1")
    compare_with_class(prune_heads(_encoder(family)), tokens(5))


def prune_heads(model: nn.Module) -> Result:
    """Cut what a user of these threads wanted to: heads and hidden units."""
    return prune(Classes(model), tokens(), groups=("heads", "hidden"), target={"macs": 0.7}, least=0.3)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_row_34_heads_of_language_models(family: str) -> None:
    """Only heads are asked for: nothing else is cut, and the class takes them. LLM-Pruner#69, #72."""
    model = Logits(causal_lm(family))
    result = prune(model, tokens(), groups=("heads",), target={"macs": 0.9}, least=0.3)
    assert set(result.kinds) == {"heads"}
    result.cut("*.q_proj.weight.0", "*.o_proj.weight.1")
    assert result.width("model.model.layers.0.mlp.up_proj.weight") == 48
    compare_with_class(result, tokens(5))
