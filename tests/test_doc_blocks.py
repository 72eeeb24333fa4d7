"""Every Python block of the README and of `docs/`, run as a reader would: page by page, from the top down.

A `text` block shows what the Python block before it prints, and is compared; "..." stands for anything. A block is left
out only where the line before it says so, with the reason: `<!-- not run: reason -->`, or, to be read on the page,
`*Not run by the tests: reason.*`
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

import fxprune
from fxprune import passes, rules
from fxprune.rules.core import RULES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

pytestmark = [
    # torch's own, when its oneDNN switches are set, and when a module with a tree specification is copied
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.onnx, transformers and the like
]

NOT_RUN = re.compile(r"(?:<!-- not run: .+? -->|\*Not run by the tests: .+?\*)\s*\Z", re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page: Path) -> list[Example]:
    """Return the Python and text blocks of a page in their order."""
    printed: dict[str, str] = {}

    def run(example: Example) -> None:
        if NOT_RUN.search(example.document.text[: example.start]):
            return
        heading = HEADING.findall(example.document.text[: example.start])[-1:]
        for setup in map(SETUPS.get, (f"{page.name}: {h}" for h in heading)):
            if setup is not None:
                example.namespace.update(setup())
        with contextlib.redirect_stdout(io.StringIO()) as out:
            PythonEvaluator()(example)
        printed["last"] = out.getvalue()

    def compare(example: Example) -> None:
        assert "last" in printed, f"line {example.line}: no block before it was run"
        checker, found = doctest.OutputChecker(), printed.pop("last")
        if not checker.check_output(example.parsed, found, _FLAGS):
            difference = checker.output_difference(doctest.Example("", example.parsed), found, _FLAGS)
            raise AssertionError(f"{page.relative_to(ROOT)}, line {example.line}: {difference}")

    document = Sybil([CodeBlockParser("python", run), CodeBlockParser("text", compare)]).parse(page)
    document.namespace["__name__"] = "__main__"
    return list(document.examples())


def _llama() -> dict[str, Any]:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    inputs = {"input_ids": torch.randint(0, 64, (2, 8)), "use_cache": False}
    return {"fxprune": fxprune, "model": transformers.LlamaForCausalLM(config).eval(), "inputs": inputs}


def _front() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)).eval()
    loader = [torch.randn(32, 8) for _ in range(2)]

    def accuracy(module: torch.nn.Module) -> float:
        return -float(module(loader[0]).detach().square().mean())

    return {"fxprune": fxprune, "model": model, "x": torch.randn(4, 8), "loader": loader, "accuracy": accuracy}


def _loop() -> dict[str, Any]:
    found = _front()
    found["model"].train()
    data = [(torch.randn(32, 8), torch.randint(0, 4, (32,))) for _ in range(10)]
    stages = [{"prune": {"pattern": "channel", "target": 0.25}, "epochs": 1}, {"tune": {}, "epochs": 1}]
    Path("train.yaml").write_text(yaml.safe_dump({"stages": stages}))
    optimizer = torch.optim.AdamW(found["model"].parameters())
    return found | {"loader": data, "loss": torch.nn.functional.cross_entropy, "optimizer": optimizer}


#: What a block under this heading of the README takes for granted.
SETUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md: The original class": _llama,
    "README.md: Pruning while training": _loop,
    "README.md: Several targets, one page, the same again": _front,
}


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory that is thrown away, and one thread; what a page registers is forgotten."""
    from fxprune.backends import BACKENDS
    from fxprune.passes import ALLOCATORS, CRITERIA

    rules.load()
    passes.load()
    monkeypatch.chdir(tmp_path)
    tables: list[dict[Any, Any]] = [RULES, *(r._items for r in (BACKENDS, CRITERIA, ALLOCATORS))]
    before, threads = [set(table) for table in tables], torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for table, known in zip(tables, before, strict=True):
        for name in table.keys() - known:
            del table[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page: Path, somewhere: None) -> None:
    for example in blocks(page):
        example.evaluate()


def test_few_blocks_are_left_out() -> None:
    """And each says why: the reason is what `NOT_RUN` asks for."""
    left_out = {page: sum(bool(NOT_RUN.search(b.document.text[: b.start])) for b in blocks(page)) for page in PAGES}
    assert sum(left_out.values()) <= 17, {str(page): n for page, n in left_out.items() if n}
