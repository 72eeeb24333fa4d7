"""`python -m bench`: the page, the registry, what runs and what goes on after a failure or an interruption."""

from __future__ import annotations

import doctest
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from bench import __main__ as program
from bench import accuracy, compile_time, document, memory, patterns, readme_tables, resident, suites
from bench.models import MODELS, ReferenceModel
from bench.peers import modelopt, onnxsim, torch_masks
from bench.suites import RESULTS, SUITES, Step, Suite
from bench.tasks import digits

NAMES = ["compile_time", "coverage", "accuracy", "latency", "patterns", "training", "memory", "gpu"]

#: A program that takes what those of a suite take, adds a row a call, and fails where it is told to.
STAND_IN = """
import json, pathlib, sys
arguments = sys.argv[1:]
file = pathlib.Path(arguments[arguments.index("--json") + 1])
file.parent.mkdir(parents=True, exist_ok=True)
rows = json.loads(file.read_text()) if "--resume" in arguments and file.exists() else []
file.write_text(json.dumps([*rows, "quick" if "--few" in arguments else "all"]))
if "--fail" in arguments:
    raise SystemExit("it went wrong")
"""


def command(main: Any) -> Any:
    app = typer.Typer()
    app.command()(main)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(program, "WIDTH", 200)
    return command(program.main)


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put three small suites into the place of the real ones."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def suite(name: str, *full: str, needs: tuple[str, ...] = (), gpu: bool = False) -> Suite:
        step = Step("stand_in", f"{name}.json", full=full, quick=(*full, "--few"))
        return Suite(name, f"what {name} is", "nobody", (step,), (1, 1), needs, gpu)

    found = [
        suite("first", "--fail"),
        suite("second"),
        suite("absent", needs=("no_such_package",)),
        suite("on", gpu=True),
    ]
    monkeypatch.setattr(program, "SUITES", {s.name: s for s in found})


# ---------------------------------------------------------------------- the registry
def test_the_registry_has_the_suites_and_each_file_once() -> None:
    assert list(SUITES) == NAMES
    assert all(name == suite.name for name, suite in SUITES.items())
    files = [file for suite in SUITES.values() for file in suite.files]
    assert len(files) == len(set(files))
    assert {path.name for path in RESULTS.glob("*.json")} <= set(files)
    assert sum(suite.minutes[1] for suite in SUITES.values()) <= 15
    assert [suite.name for suite in SUITES.values() if suite.gpu] == ["gpu"]


@pytest.mark.parametrize("name", NAMES)
def test_every_program_takes_what_its_suite_gives_it(name: str) -> None:
    for step in SUITES[name].steps:
        app = typer.Typer()
        app.command()(importlib.import_module(step.module).main)
        parser = typer.main.get_command(app)
        for quick in (True, False):
            for resume in (True, False):
                _, _, *arguments = step.arguments(Path("out"), quick, resume)
                assert str(Path("out") / step.file) in map(str, parser.make_context(name, arguments).params.values())


def test_the_page_lists_every_suite(bench: Any) -> None:
    said = bench()
    assert said.exit_code == 0, said.output
    for suite in SUITES.values():
        assert suite.name in said.output
        assert all(file in said.output for file in suite.files)
    for word in (
        "nn_pruning",
        "llm-compressor",
        "Torch-Pruning",
        "ModelOpt",
        "onnxsim",
        "--quick",
        "--resume",
        "needs one",
    ):
        assert word in said.output


@pytest.mark.parametrize("module", [program, suites, document, memory, readme_tables, torch_masks, accuracy, patterns])
def test_examples_in_docstrings(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


# ---------------------------------------------------------------------- running
def test_an_unknown_suite_is_an_error_that_names_the_known(bench: Any) -> None:
    said = bench("accurate", "memory")
    assert said.exit_code == 2
    assert "accurate" in said.output and all(name in said.output for name in NAMES)


@pytest.mark.usefixtures("stand_ins")
def test_a_suite_that_fails_is_reported_and_the_others_run(bench: Any, tmp_path: Path) -> None:
    said: Result = bench("first", "absent", "second", "--out", tmp_path / "out")
    assert said.exit_code == 1
    assert "stand_in ended with exit code 1: it went wrong" in said.output
    assert "not run: not installed: no_such_package" in said.output
    assert json.loads((tmp_path / "out" / "second.json").read_text()) == ["all"]


@pytest.mark.usefixtures("stand_ins")
def test_what_runs_well_ends_well_and_resumes(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments, rows in ((["--resume"], ["all"]), (["--resume"], ["all", "all"]), ([], ["all"])):
        said = bench("second", "--out", out, *arguments)
        assert said.exit_code == 0, said.output
        assert json.loads((out / "second.json").read_text()) == rows


@pytest.mark.usefixtures("stand_ins")
def test_a_quick_run_takes_all_that_need_no_gpu_and_leaves_the_results_alone(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench("--quick").exit_code == 1  # one of them fails
    written = {path.name: json.loads(path.read_text()) for path in (tmp_path / program.QUICK_RESULTS).iterdir()}
    assert written == {"first.json": ["quick"], "second.json": ["quick"]}
    said = bench("--quick", "--out", RESULTS)
    assert said.exit_code == 2 and "does not write over" in said.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = bench("on", "--out", tmp_path)
    assert said.exit_code == 1 and "finds no CUDA device" in said.output


# ---------------------------------------------------------------------- going on
def _timed(*_: Any) -> dict[str, Any]:
    return {tool: {"error": "not today"} for tool in compile_time.TOOLS}


def _weighed(*_: Any) -> dict[str, Any]:
    return {"compile": _timed(), "files": {"error": "not today"}, "onnxruntime": {}}


@pytest.mark.parametrize(
    ("module", "made", "arguments"),
    [(compile_time, _timed, ["--models", "vit,bert"]), (memory, _weighed, ["vit", "bert"])],
)
def test_an_interrupted_run_goes_on_after_its_last_row(
    module: Any, made: Any, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_pruning")
    asked: list[str] = []

    def measure(name: str, *rest: Any) -> dict[str, Any]:
        asked.append(name)
        if asked == ["vit", "bert"]:
            raise KeyboardInterrupt
        found: dict[str, Any] = made()
        return found

    monkeypatch.setattr(module, "measure", measure)
    run, file = command(module.main), tmp_path / "rows.json"
    assert run(*arguments, "--json", file).exit_code == 130
    assert list(json.loads(file.read_text())["models"]) == ["vit"]
    done = run(*arguments, "--json", file, "--resume")
    assert done.exit_code == 0, done.output
    assert "not today" in done.output
    assert asked == ["vit", "bert", "bert"]
    assert list(json.loads(file.read_text())["models"]) == ["vit", "bert"]
    other = run(*arguments, "--json", file, "--resume", "--repeats", "1")
    assert other.exit_code == 2 and "was measured with" in other.output


def test_a_document_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.json"
    about = document.opened(file, True, rounds=2)
    about["rows"] = [1]
    document.write(file, about)
    assert document.opened(file, True, rounds=2) == {"rounds": 2, "rows": [1]}
    assert document.opened(file, False, rounds=3) == {"rounds": 3}
    with pytest.raises(typer.BadParameter, match=r"rows\.json was measured with rounds 2, not 3"):
        document.opened(file, True, rounds=3)
    assert [path.name for path in file.parent.iterdir()] == ["rows.json"]


# ---------------------------------------------------------------------- memory
@pytest.mark.skipif(not resident.STATUS.exists(), reason="needs Linux's account of memory")
def test_the_peak_is_of_what_was_resident_since_the_start() -> None:
    before = resident.start()
    held = torch.ones(16 * 2**20)
    del held
    assert 60 * 2**20 < resident.peak() - before < 200 * 2**20
    assert resident.peak() - resident.start() >= 0
    assert "error" in resident.child("no_such_module")


def _tiny(_whole: bool) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))


def _images(_whole: bool, batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, 12, 12),)


def test_the_memory_of_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("torch_pruning")
    monkeypatch.setitem(MODELS, "tiny", ReferenceModel("tiny", "torch", _tiny, _images))
    run = command(memory.main)

    def here(module: str, *arguments: str) -> Any:
        assert module == "bench.memory"
        done = run(*arguments)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout.splitlines()[-1])

    monkeypatch.setattr(resident, "child", here)
    file = tmp_path / "memory.json"
    done = run("tiny", "--small", "--repeats", "2", "--batch", "2", "--threads", "1", "--json", file)
    assert done.exit_code == 0, done.output
    row = json.loads(file.read_text())["models"]["tiny"]
    for kind in ("weights", "onnx"):
        assert 0 < row["files"]["pruned"][kind] < row["files"]["dense"][kind]
    for found in [*row["compile"].values(), *row["onnxruntime"].values()]:
        assert len(found["peak"]) == 2 and min(found["peak"]) > -(2**20)  # the kernel counts in batches
    assert "tiny" in done.output and "->" in done.output and "fails" not in done.output


# ---------------------------------------------------------------------- other tools
@pytest.fixture(scope="module")
def place() -> Iterator[accuracy.Place]:
    """Return a small untrained ResNet on digits, in the place of a task."""
    pytest.importorskip("sklearn")
    pytest.importorskip("onnxruntime")

    def build() -> nn.Module:
        torch.manual_seed(0)
        return digits.resnet(widths=(8, 16, 16)).eval()

    task = digits.as_task("tiny", build)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(accuracy.TASKS, "tiny", task)
        yield accuracy.Place("tiny", task, threads=1, samples=16)


def test_masks_leave_the_speed_and_what_is_not_installed_is_a_row(
    place: accuracy.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelopt, "missing", lambda search=False: "no ModelOpt here")
    monkeypatch.setattr(onnxsim, "missing", lambda: "no onnxsim here")
    rows = accuracy.cell(place, 4.0, list(accuracy.OTHERS), lambda text: None)
    assert list(rows) == list(accuracy.OTHERS)
    masked = rows["torch masks"]
    assert masked["ratio"] == 0.5 and masked["macs"] == 1.0 and 0 <= masked["measures"]["accuracy"] <= 1
    assert 0.3 < masked["speedup"] < 3  # the same work; the machine may be busy
    assert rows["ModelOpt FastNAS"] == {"error": "ModuleNotFoundError: no ModelOpt here"}
    assert rows["onnxsim Wanda"] == {"error": "ModuleNotFoundError: no onnxsim here"}
    found = patterns.scores("tiny", {}, list(patterns.PEERS), 16, lambda text: None)
    assert {label: row["failed"].split()[1] for label, row in found["methods"].items()} == {
        "ModelOpt magnitude": "ModelOpt",
        "ModelOpt SparseGPT": "ModelOpt",
        "onnxsim Wanda": "onnxsim",
        "onnxsim SparseGPT": "onnxsim",
    }
    assert patterns.score_table("tiny", found).row_count == 5


def test_masks_zero_whole_channels_of_a_copy(place: accuracy.Place) -> None:
    ignored = accuracy.whole(place.model, place.example)
    masked = torch_masks.prune(place.model, 0.5, ignored)
    for name, layer in masked.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            dense = place.model.get_submodule(name)
            assert layer.weight.shape == dense.weight.shape
            used = int(layer.weight.flatten(1).any(dim=1).sum())
            assert used == (len(layer.weight) if name in ignored else len(layer.weight) // 2)
            assert bool(dense.weight.all())


def test_modelopt_masks_two_of_four(place: accuracy.Place) -> None:
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")
    if (reason := modelopt.missing()) is not None:
        pytest.skip(reason)
    data = [inputs for inputs, _ in place.data]
    for method in ("sparse_magnitude", "sparsegpt"):
        assert 0.3 < patterns.zeros(modelopt.sparsify(place.model, method, data)) < 0.55
    assert patterns.zeros(place.model) < 0.1


def test_onnxsim_makes_a_smaller_file_that_runs(place: accuracy.Place, tmp_path: Path) -> None:
    pytest.importorskip("onnxsim", reason="onnxsim is not installed")
    if (reason := onnxsim.missing()) is not None:
        pytest.skip(reason)
    data = [inputs for inputs, _ in place.data]
    found = onnxsim.prune(place.model, place.example, 0.5, "magnitude", data, tmp_path, 1)
    assert found.size < 0.8 * sum(value.numel() for value in place.model.parameters())
    assert place.build(found) is found.runner
    assert 0 <= place.task.score(found) <= 1
    masked = onnxsim.prune(place.model, place.example, 0.5, "2:4 wanda", data, tmp_path, 1)
    assert 0.4 < patterns.zeros(masked) < 0.55
