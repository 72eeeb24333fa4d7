"""README.md and the pages of docs/ say what the results say, and the check fails where it does not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from bench import readme, readme_tables, tables, training_tables
from bench.suites import RESULTS


@pytest.fixture
def command() -> Any:
    app = typer.Typer()
    app.command()(readme.main)

    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(app, list(map(str, arguments)))

    return run


@pytest.fixture
def copy(tmp_path: Path) -> tuple[Path, Path]:
    """Return a copy of the README, with the other pages where they stand beside it, and of the results."""
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    for page in readme.PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(readme.ROOT / page, tmp_path / page)
    return tmp_path / "README.md", results


def test_the_readme_equals_the_results(command: Any) -> None:
    done = command("--check")
    assert done.exit_code == 0, done.output


def test_a_number_changed_by_hand_is_found_and_mended(command: Any, copy: tuple[Path, Path]) -> None:
    file, results = copy
    arguments = ["--root", file.parent, "--results", results]
    text = file.read_text()
    cell = re.search(r"\| ([0-9.]+) x \|", text)
    assert cell is not None
    file.write_text(text[: cell.start(1)] + "9.99" + text[cell.end(1) :])
    said = command("--check", *arguments)
    assert said.exit_code == 1
    assert re.search(r"^-\|.*9\.99 x", said.output, re.M) and re.search(r"^\+\|", said.output, re.M)
    assert "9.99" in file.read_text()  # the check changes nothing
    assert command(*arguments).exit_code == 0
    assert file.read_text() == text
    assert command("--check", *arguments).exit_code == 0


@pytest.mark.parametrize("name", ["accuracy", "compile_time", "coverage", "rounding"])
def test_a_figure_measured_anew_is_found(name: str, command: Any, copy: tuple[Path, Path]) -> None:
    file, results = copy
    path = results / f"{name}.json"
    data = json.loads(path.read_text())
    if name == "accuracy":
        next(iter(data["tasks"].values()))["dense"] = 0.123
    elif name == "compile_time":
        next(iter(data["models"].values()))["fxprune"]["seconds"]["whole"] = [77.0]
    elif name == "coverage":
        data["summary"]["proved"] -= 1
    else:
        next(iter(data["models"].values()))["timing"]["runners"]["1"]["ratio"]["median"] = 7.77
    path.write_text(json.dumps(data))
    said = command("--check", "--root", file.parent, "--results", results)
    assert said.exit_code == 1, said.output


def test_a_missing_file_is_a_line_with_its_command_and_no_number(command: Any, copy: tuple[Path, Path]) -> None:
    file, results = copy
    (results / "rounding.json").unlink()
    assert command("--root", file.parent, "--results", results).exit_code == 0
    part = re.search(r"<!-- bench:rounding -->\n(.*?)<!-- /bench:rounding -->", file.read_text(), re.S)
    assert part is not None
    assert part[1] == "*`bench/results/rounding.json` is not there: `python -m bench latency` measures it.*\n"


@pytest.mark.parametrize("edit", ["remove", "double", "cross", "unknown"])
def test_markers_that_are_not_right_are_named(edit: str, command: Any, copy: tuple[Path, Path]) -> None:
    file, results = copy
    text, mark = file.read_text(), "<!-- bench:rounding -->"
    new = {
        "remove": "",
        "double": f"{mark}\n{mark}",
        "cross": "<!-- /bench:rounding -->",
        "unknown": "<!-- bench:x -->",
    }
    file.write_text(text.replace(mark, new[edit]))
    before = file.read_text()
    said = command("--root", file.parent, "--results", results)
    assert said.exit_code == 2 and "rounding" in said.output
    assert file.read_text() == before


def _run(before: float) -> dict[str, float]:
    found = {"share": 0.6, "target": 0.6, "params": 0.4, "macs": 0.3, "proof": 2e-15}
    return found | {"before": before, "after": before + 0.2}


def test_every_part_renders_what_failed_without_a_number() -> None:
    about = {"processor": "P", "cores": 2, "threads": 2, "torch": "1", "x": "not installed", "date": "2020-01-01"}
    sizes = {"weights": 2 * 2**20, "onnx": 3 * 2**20}
    documents: dict[str, Any] = {
        "accuracy.json": {
            "backend": "b",
            "threads": 1,
            "machine": about,
            "tasks": {
                "t": {
                    "dense": -2.0,
                    "speedups": {
                        "2": {
                            "fxprune": {"measures": {"-bits": -2.5}, "speedup": 1.9, "macs": 0.5},
                            "torch masks": {"measures": {"-bits": -4.0}, "speedup": 1.01},
                            "onnxsim magnitude": {"error": "no"},
                            "Torch-Pruning Taylor, dims": {"error": "no"},
                            "Torch-Pruning Taylor, whole": {"measures": {"-bits": -3.0}, "speedup": 2.1},
                        }
                    },
                }
            },
        },
        "patterns.json": {
            "pattern": "2:4",
            "machine": about,
            "scores": {
                "t": {
                    "dense": {"accuracy": 1.0},
                    "methods": {"A": {"measures": {"accuracy": 0.5}, "error": 0.1}, "B": {"failed": "not installed"}},
                }
            },
        },
        "memory.json": {
            "share": 0.5,
            "batch": 8,
            "repeats": 3,
            "threads": 2,
            "machine": about,
            "models": {
                "m": {
                    "compile": {"fxprune": {"peak": [1, 3, 2], "weights": 1}, "torch_pruning": {"error": "no"}},
                    "files": {"dense": sizes, "pruned": sizes},
                    "onnxruntime": {"dense": {"peak": [2**20]}, "pruned": {"error": "no"}},
                }
            },
        },
        "ladder.json": {
            "dense": 0.9,
            "tested": 1600,
            "epochs": 4,
            "more": 2,
            "allowed": {"2": 0.8},
            "rows": {
                "ladder": {"2": {str(n): {"accuracy": 0.7 + 0.2 * n, "speedup": 1.9 + 0.2 * n} for n in range(2)}},
                "dense, trained on": {"1": {"0": {"accuracy": 0.92, "speedup": 1.0}}},
            },
        },
        "methods.json": {
            "epochs": 6,
            "until": 0.6,
            "models": {
                "m": {
                    "dense": 1.0,
                    "rows": {
                        "A / widths / 0.6": {str(n): _run(0.5 + 0.2 * n) for n in range(2)},
                        "B / 2:4 / 0.5": {"0": {"failed": "too few"}},
                    },
                }
            },
        },
        "mask_cost.json": {"rounds": 3, "rows": {"A": {"ratio": [1.07, 1.0, 1.1], "after": [0.88, 0.8, 0.9]}}},
    }
    assert readme_tables.accuracy("2")(documents)[-3:] == [
        "| task | dense | fxprune | at | Torch-Pruning's best | at | onnxsim's best | at "
        "| `torch.nn.utils.prune` | at |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| t, bits | 2.000 | 2.500 | 1.90 x | 3.000 | 2.10 x | fails |  | 4.000 | 1.01 x |",
    ]
    assert readme_tables.efficiency(documents)[-1] == "| t, asked for 2 x | 0.50 | 2.00 | 1.90 | 0.95 |"
    assert "| B | fails |" in readme_tables.patterns(documents)
    assert "B: not installed" in readme_tables.patterns(documents)
    assert readme_tables.memory(documents)[-1] == "| m | 2.00 | fails | 2.0 / 2.0 | 3.0 / 3.0 | 1.0 / fails |"
    assert training_tables.ladder(documents)[-2:] == [
        "| ladder | 2 x | 2.00 x | 80.00 ± 14.14 | +10.00 | 0.8 |",
        "| dense, trained on |  |  | 92.00 | -2.00 |  |",
    ]
    assert (
        "6 epochs at each speed-up; means and standard deviations of 1 to 2 seeds"
        in training_tables.ladder(documents)[0]
    )
    assert "1 to 2 seeds" in training_tables.methods("m")(documents)[0]
    assert training_tables.methods("m")(documents)[-2:] == [
        "| widths | 0.6 | A | 0.6000 | 0.600 ± 0.141 | 0.800 ± 0.141 | 0.40 | 0.30 | 2e-15 |",
        "| 2:4 | 0.5 | B | too few |  |  |  |  |  |",
    ]
    assert training_tables.mask_cost(documents)[-1] == "| A | 1.07 (1.00 to 1.10) | 0.88 (0.80 to 0.90) |"
    assert readme_tables.stamp({n: documents[n] for n in ("accuracy.json", "patterns.json", "memory.json")}) == [
        "- accuracy: P, 2 cores, 1 thread; torch 1; 2020-01-01",
        "- memory, patterns: P, 2 cores, 2 threads; torch 1; 2020-01-01",
    ]
    with pytest.raises(tables.Missing, match="No model was measured at 3 x"):
        readme_tables.accuracy("3")(documents)
