"""Each worked example in a small size ends smaller, proved, and better than chance."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from examples import bert, cnn, decoder, recommender, vit
from examples.common import Result

EXAMPLES: list[tuple[ModuleType, dict[str, Any], float]] = [
    (cnn, {"width": 8, "steps": 120, "batch": 32}, 0.5),
    (vit, {"width": 32, "depth": 2, "heads": 4, "steps": 200, "batch": 32, "lr": 4e-3}, 0.3),
    (
        bert,
        {"pretrained": False, "width": 32, "depth": 2, "length": 16, "steps": 40, "batch": 8, "docstrings": 150},
        0.1,
    ),
    (
        decoder,
        {"width": 32, "depth": 2, "heads": 4, "context": 32, "steps": 80, "batch": 8, "files": 12},
        -5.5,
    ),
    (
        recommender,
        {"users": 20, "items": 20, "width": 8, "hidden": 16, "logs": 4000, "steps": 250, "batch": 64},
        0.6,
    ),
]


@pytest.mark.filterwarnings("ignore")  # of transformers about itself
@pytest.mark.parametrize(("example", "sizes", "floor"), EXAMPLES, ids=lambda e: getattr(e, "__name__", ""))
def test_an_example_ends_smaller_and_has_learnt(
    example: ModuleType, sizes: dict[str, Any], floor: float, capsys: pytest.CaptureFixture[str]
) -> None:
    result: Result = example.main(**sizes, rounds=6)
    report = result.pruned.report
    assert report.params.pruned < 0.95 * report.params.dense
    assert report.macs.pruned < 0.9 * report.macs.dense
    assert report.proof.error < 1e-3
    better = -1 if result.name == "bits per byte" else 1
    assert better * result.small > floor
    shown = capsys.readouterr().out
    assert "dense" in shown and "pruned" in shown and result.name in shown


def test_every_example_is_listed() -> None:
    folder = Path(bert.__file__).parent
    listed = (folder / "README.md").read_text()
    for path in folder.glob("*.py"):
        if path.stem not in ("__init__", "common"):
            assert f"python -m examples.{path.stem}" in listed


def test_examples_stand_alone() -> None:
    for path in Path(bert.__file__).parent.glob("*.py"):
        text = path.read_text()
        assert "bench" not in text
        assert "from tests" not in text
