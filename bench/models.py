"""The reference models: what is timed, and what the compiler is tested on.

Each has a full size, the one that its name stands for, and a small one for tests: the same layers in the same
arrangement on smaller inputs, with fewer repetitions of a block where the library lets one choose. All but MiniLM have
random weights; nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.shims import shim_torchvision
from bench.tasks import minilm

Inputs = tuple[Tensor, ...]

#: The models that compile times are measured on.
TIMED = (
    "resnet50",
    "vit_base_patch16_224",
    "densenet121",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "mobilenetv3_small_050",
)


class TensorsOut(nn.Module):
    """A transformers model that takes tensors by position and gives one tensor back: the first of its results.

    Those models return a dataclass, which may also hold a cache object; a tensor is what can be compared, exported and
    trained on without knowing the model.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Pass the inputs on under the names that the model knows them by."""
        result: Tensor = self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=False)[0]
        return result


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """One model in two sizes.

    Attributes:
        name: as its library calls it.
        library: the package it needs, "timm" or "transformers".
        build: (full size?) -> the model in eval mode.
        inputs: (full size?, batch) -> inputs for it, drawn with torch's global generator.
    """

    name: str
    library: str
    build: Callable[[bool], nn.Module]
    inputs: Callable[[bool, int], Inputs]

    def make(self, full: bool = False, seed: int = 0) -> nn.Module:
        """Return the model in eval mode, with the weights that belong to the seed; the random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(full).eval()

    def example(self, batch: int = 2, full: bool = False, seed: int = 0) -> Inputs:
        """Return inputs with `batch` rows; the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.inputs(full, batch)


# ---------------------------------------------------------------------- timm
def _timm(name: str, small: int = 64, full: int = 224, **fewer: Any) -> ReferenceModel:
    """A timm model on images of `full` pixels, or of `small` ones with the options in `fewer`."""

    def build(whole: bool) -> nn.Module:
        shim_torchvision()
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, **({} if whole else fewer))
        return model

    def inputs(whole: bool, batch: int) -> Inputs:
        size = full if whole else small
        return (torch.randn(batch, 3, size, size),)

    return ReferenceModel(name, "timm", build, inputs)


# ---------------------------------------------------------------------- transformers
def _transformers() -> Any:
    """Import transformers, told to stay off the network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    shim_torchvision()
    import transformers

    return transformers


def _configured(name: str, kind: str, names: Sequence[str], inputs: Any, **small: Any) -> ReferenceModel:
    """A transformers model of class `kind` with random weights: its default configuration, or `small` instead."""

    def build(whole: bool) -> nn.Module:
        library = _transformers()
        cls = getattr(library, kind)
        model = cls(cls.config_class(**({} if whole else small)))
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False  # one forward pass has no past to keep
        return TensorsOut(model, names)

    return ReferenceModel(name, "transformers", build, inputs)


def _tokens(masked: bool, vocabulary: int, full_vocabulary: int, copies: int = 1) -> Callable[[bool, int], Inputs]:
    """Token numbers `copies` times, then a mask if `masked`: the last row is padded, as in a batch of sentences."""

    def inputs(whole: bool, batch: int) -> Inputs:
        length = 128 if whole else 12
        limit = full_vocabulary if whole else vocabulary
        ids = [torch.randint(3, limit, (batch, length)) for _ in range(copies)]
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[-1, 2 * length // 3 :] = 0
        return (*ids, mask) if masked else tuple(ids)

    return inputs


def _pixels(whole: bool, batch: int) -> Inputs:
    size = 224 if whole else 32
    return (torch.randn(batch, 3, size, size),)


_BERT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 32,
}
_VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
_LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 32,
}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
_DISTILBERT = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 128,
    "vocab_size": 100,
    "max_position_embeddings": 32,
}
_GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "vocab_size": 100,
    "bos_token_id": 1,  # those of the full vocabulary would be outside this one
    "eos_token_id": 2,
}
_TEXT = ("input_ids", "attention_mask")


# ---------------------------------------------------------------------- pretrained
def _minilm(_whole: bool) -> nn.Module:
    return minilm.encoder()


def _sentences(whole: bool, batch: int) -> Inputs:
    said = minilm.sentences(batch)
    return minilm.tokenize(said, length=128) if whole else minilm.tokenize(said, length=16)


_ALL = [
    _timm("resnet50", layers=(1, 2, 1, 1)),
    _timm("mobilenetv3_small_050"),
    _timm("efficientnet_b0", small=32),
    _timm("densenet121", block_config=(2, 3, 2, 2)),
    _timm("convnext_tiny", depths=(1, 1, 2, 1)),
    _timm("vit_base_patch16_224", img_size=64, depth=2),
    _timm("swin_tiny_patch4_window7_224", small=112, img_size=112, depths=(2, 2, 1, 1)),
    _timm("regnetx_002"),
    _configured("bert", "BertForSequenceClassification", _TEXT, _tokens(True, 100, 30522), **_BERT),
    _configured("distilbert", "DistilBertForSequenceClassification", _TEXT, _tokens(True, 100, 30522), **_DISTILBERT),
    _configured("gpt2", "GPT2LMHeadModel", _TEXT, _tokens(True, 100, 50257), **_GPT2),
    _configured("llama", "LlamaForCausalLM", _TEXT, _tokens(True, 100, 32000), **_LLAMA),
    _configured(
        "t5", "T5ForConditionalGeneration", ("input_ids", "decoder_input_ids"), _tokens(False, 100, 32128, 2), **_T5
    ),
    _configured("vit", "ViTForImageClassification", ("pixel_values",), _pixels, **_VIT),
    ReferenceModel("minilm", "transformers", _minilm, _sentences),
]

#: Every reference model by its name.
MODELS: dict[str, ReferenceModel] = {model.name: model for model in _ALL}
