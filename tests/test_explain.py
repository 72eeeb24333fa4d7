"""What `explain` says about small models, against golden files.

`FXPRUNE_GOLDEN=1 pytest tests/test_explain.py` rewrites them; read the difference before you commit it.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console, RenderableType
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import cli
from fxprune.errors import InputError
from fxprune.explain import Explainer, Step, shorten

GOLDEN = Path(__file__).parent / "golden"


class Residual(nn.Module):
    """A convolution net with a residual connection, a grouped convolution and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.block = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
        self.side = nn.Conv2d(16, 8, 1, bias=False)
        self.head = nn.Linear(24, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(image)))
        x = x + self.block(x)
        x = torch.cat([x, self.side(x)], dim=1)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """A transformer block with a fused projection of queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, 32))
        return x + self.down(F.gelu(self.up(x)))


@torch.library.custom_op("fxprune_test_explain::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x.flip(-1)


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Mystery(nn.Module):
    """A perceptron with an operator that nobody wrote a rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 12)
        self.third = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(torch.ops.fxprune_test_explain.mystery(self.first(x)))))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (2, 3, 8, 8)),
    "attention": (Attention, (2, 7, 32)),
    "mystery": (Mystery, (2, 6)),
}
#: Pairs of dimensions to explain: coupled, and not.
PAIRS = {
    "residual": [("stem.weight.0", "head.weight.1"), ("stem.weight.0", "side.weight.0")],
    "attention": [("qkv.weight.0", "out.weight.1"), ("qkv.weight.1", "down.weight.0")],
    "mystery": [("second.weight.0", "third.weight.1"), ("first.weight.0", "second.weight.1")],
}


def text(items: Iterable[RenderableType]) -> str:
    """What a terminal of 100 columns shows, without source lines, which move, and without spaces at the end."""
    console = Console(file=io.StringIO(), width=100, color_system=None, highlight=False)
    for item in items:
        console.print(item, markup=False, soft_wrap=isinstance(item, str))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def without_sources(step: Step) -> Step:
    return Step(step.name, step.operator, step.path, "")


def report(name: str) -> str:
    make, shape = MODELS[name]
    explainer = Explainer(make(), (torch.randn(shape),))
    explanation = explainer.explain()
    pieces = [text(cli.explain.show_explanation(explanation, "the example input"))]
    for group in explanation.groups:
        carriers = [without_sources(c) for c in explainer.carriers(group.name)]
        pieces.append(f"--group {group.name}\n" + text(cli.explain.show_group(group, carriers)))
    for first, second in PAIRS[name]:
        shown = text(cli.explain.show_coupling(explainer.coupled(first, second)))
        pieces.append(f"--coupled {first} {second}\n" + re.sub(r" \([^()]*:\d+ in \w+\)", "", shown))
    frozen = [replace(w, cause=without_sources(w.cause)) if w.cause else w for w in explanation.frozen]
    pieces.append("--frozen\n" + text(cli.explain.show_frozen(frozen)))
    return "\n\n".join(pieces) + "\n"


@pytest.mark.parametrize("name", MODELS)
def test_golden(name: str) -> None:
    found, path = report(name), GOLDEN / f"{name}.txt"
    if os.environ.get("FXPRUNE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text(), f"what is printed has changed; FXPRUNE_GOLDEN=1 rewrites {path.name}"


@pytest.mark.parametrize("name", MODELS)
def test_nothing_depends_on_the_run(name: str) -> None:
    first, second = report(name), report(name)
    assert first == second
    assert not re.search(r"0x[0-9a-f]{6}|/site-packages/|\bms\b", first)


@pytest.fixture(scope="module")
def residual() -> Explainer:
    return Explainer(Residual(), (torch.randn(2, 3, 8, 8),))


def test_costs_of_a_unit_are_those_of_removing_it(residual: Explainer) -> None:
    side = next(g for g in residual.explain().groups if g.name == "side.weight.0")
    assert (side.units, side.params, side.macs) == (8, 16 + 5, 2 * (16 * 64 + 5))


def test_paths_are_made_of_members_and_nodes_with_source_lines(residual: Explainer) -> None:
    steps = residual.coupled("stem.weight.0", "head.weight.1").steps
    assert steps[0] == "stem.weight, dimension 0"
    assert steps[-1] == "head.weight, dimension 1"
    assert re.fullmatch(r"conv2d = aten.conv2d.default in stem \(tests/test_explain.py:\d+ in forward\)", steps[1])


def test_a_path_begins_at_either_end(residual: Explainer) -> None:
    there = residual.coupled("block.weight.0", "side.weight.1").steps
    back = residual.coupled("side.weight.1", "block.weight.0").steps
    assert there[0] == back[-1] == "block.weight, dimension 0"
    assert len(there) == len(back) > 2


@pytest.mark.parametrize("name", MODELS)
def test_every_pair_of_parameter_dimensions_in_a_group_has_a_path(name: str) -> None:
    make, shape = MODELS[name]
    explainer = Explainer(make(), (torch.randn(shape),))
    for group in explainer.explain().groups:
        labels = [f"{m.tensor}.{m.dim}" for m in group.members if m.role == "parameter"]
        for label in labels[1:]:
            assert explainer.coupled(labels[0], label).steps, (group.name, label)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("stem.weigth.0", "the model uses no parameter 'stem.weigth'; did you mean 'stem.weight'?"),
        ("nothing.like.it.0", "the model uses no parameter 'nothing.like.it'; `fxprune explain MODEL --json` lists"),
        (
            "head.weight",
            "'head.weight' names no dimension of 'head.weight'; it has head.weight.0 (size 5), head.weight.1",
        ),
        ("head.weight.2", "'head.weight.2' names no dimension of 'head.weight'; it has head.weight.0 (size 5)"),
    ],
)
def test_a_wrong_dimension_is_answered_with_the_right_ones(residual: Explainer, label: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        residual.coupled(label, "head.weight.1")


def test_a_wrong_group_is_answered_with_the_right_ones(residual: Explainer) -> None:
    with pytest.raises(InputError, match=r"no group 'side.weigt.0'; did you mean 'side.weight.0'\?"):
        residual.carriers("side.weigt.0")
    with pytest.raises(InputError, match=r"the groups that cut this dimension: stem\.weight\.0"):
        residual.carriers("side.weight.1")


def test_tied_parameters_answer_to_both_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 6)
            self.out = nn.Linear(6, 11, bias=False)
            self.out.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.table(x))

    explainer = Explainer(Tied(), (torch.zeros(2, 3, dtype=torch.int64),))
    assert explainer.coupled("out.weight.1", "table.weight.1").groups == ("table.weight.1",)


def test_shorten_leaves_other_text_alone() -> None:
    assert shorten("a / b, and /srv/x.py") == "a / b, and /srv/x.py"
