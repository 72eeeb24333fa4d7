"""`fxprune bench` and `fxprune.bench`: every kind of artefact, every combination, and what cannot be timed."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import fxprune
from fxprune import cli
from fxprune.artefacts import Inputs, engine_inputs, example_inputs, file_tensors, open_file, read
from fxprune.backends import BACKENDS, engines
from fxprune.backends.aot import BACKEND as PACKAGES
from fxprune.backends.base import Runner
from fxprune.backends.engines import Engine, Port, Profile, Sparsity
from fxprune.backends.onnx_profile import FileInput
from fxprune.backends.onnxruntime import BACKEND as ONNXRUNTIME
from fxprune.backends.tensorrt import TensorRTBackend
from fxprune.cli.options import parse_options
from fxprune.errors import BackendError, InputError, SavedModelError
from fxprune.saved import load_pruned
from fxprune.sources import resolve

pytestmark = [
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]
needs_compiler = pytest.mark.skipif(PACKAGES.available() is not None, reason=str(PACKAGES.available()))

NETS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Short(nn.Module):
    def forward(self, image):
        if len(image) > 2:
            raise RuntimeError("two rows at most")
        return image[:, :4]


def net():
    return Net(), torch.randn(2, 8)


def bare():
    return Net()


def short():
    return Short()


def pair():
    return nn.Bilinear(8, 6, 4)


ready = nn.Linear(8, 4)
"""
ENGINE = Engine(
    path=Path("small.engine"),
    library="tensorrt_rtx",
    version="1.0",
    compute_capability=("8.9",),
    dtype="float32",
    inputs=(Port("x", (-1, 8), "float32"),),
    outputs=(Port("y", (-1, 4), "float32"),),
    profiles={"x": Profile((1, 8), (2, 8), (4, 8))},
    sparsity=Sparsity(False, 0, 0),
    layers=(),
    sha256=engines.checksum(b"an engine"),
    size=9,
    seconds=0.0,
    parity=None,
    command="",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nets.py, small/, small.onnx, and what looks like an engine."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "nets.py").write_text(NETS)
    source = resolve(f"{folder / 'nets.py'}:net")
    pruned = fxprune.compile(source.module, source.args, target={"macs": 0.5})
    pruned.save(folder / "small")
    pruned.export(folder / "small.onnx")
    engines.write(replace(ENGINE, path=folder / "small.engine"), b"an engine")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a copy of all that."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("fxprune_model_nets", None)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorRTBackend, "available", lambda self: "there is no GPU")


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def run_json(*arguments: object, code: int = 0) -> Any:
    quick = ("--rounds", "6") if "--rounds" not in arguments else ()
    return json.loads(run(*arguments, *quick, "--json", code=code).stdout)


def timed(data: Any) -> list[tuple[str, str | None, int, int]]:
    return [(r["artefact"], r["runs_on"], r["batch"], r["threads"]) for r in data["rows"]]


# ---------------------------------------------------------------------- what is timed
def test_a_saved_model_beside_the_dense_one_on_every_backend_asked_for(folder: Path) -> None:
    common = ("small", "--against", "nets.py:bare", "--threads", "1", "--batch", "4")
    data = run_json(*common, "--backend", "torch", "--backend", "onnxruntime")
    assert timed(data) == [
        (name, backend, 4, 1) for backend in ("torch", "onnxruntime") for name in ("nets.py:bare", "small")
    ]
    for row in data["rows"]:
        assert row["reference"] == "nets.py:bare"
        assert row["milliseconds"] > 0 and row["iqr"] >= 0 and row["failure"] is None
        assert row["interval"][0] <= row["speedup"] <= row["interval"][1]
    dense, small = ([r["size"] for r in data["rows"] if r["artefact"] == name] for name in ("nets.py:bare", "small"))
    assert dense[0] is None and dense[1] > small[1]  # the file that onnxruntime runs
    assert small[0] == sum(f.stat().st_size for f in (folder / "small").iterdir() if f.name != "recipe.yaml")
    assert data["models"]["small"]["params"]["dense"] == 4996
    assert data["notes"] == []


def test_what_people_read(folder: Path, no_gpu: None) -> None:
    shown = run("small", "small.engine", "--against", "nets.py:bare", "--backend", "torch", "--rounds", "6").stdout
    for expected in (
        r"torch, batch 2, \d+ thread",
        r"runs on +ms +IQR +speed-up +95 % in +file",
        r"nets.py:bare +torch +[\d.]+ +[\d.]+ +reference *\n",
        r"small +torch +[\d.]+ +[\d.]+ +[\d.]+ x +[\d.]+-[\d.]+ +[\d.]+ kB",
        r"small.engine +not timed",
        r"6 rounds, all of a table in turn; medians",
        r"small: [\d,]+ of 4,996 parameters \(0\.\d+\), [\d,]+ of 9,728 MACs",
        r"small.engine was not timed: backend 'tensorrt-rtx' cannot be used here: there is no GPU",
    ):
        assert re.search(expected, shown), expected


def test_files_run_on_their_own_runtime_beside_models(folder: Path, no_gpu: None) -> None:
    common = ("small", "small.onnx", "small.engine", "--against", "nets.py:bare", "--backend", "torch")
    data = run_json(*common, "--batch", "1", "--batch", "3", "--threads", "1")
    assert timed(data) == [
        (name, backend, batch, 1)
        for batch in (1, 3)
        for name, backend in (
            ("nets.py:bare", "torch"),
            ("small", "torch"),
            ("small.onnx", "onnxruntime"),
            ("small.engine", None),
        )
    ]
    assert {r["backend"] for r in data["rows"]} == {"torch"}
    rows = {r["artefact"]: r for r in data["rows"]}
    assert rows["small.onnx"]["size"] == (folder / "small.onnx").stat().st_size
    assert rows["small.engine"]["milliseconds"] is None
    assert rows["small.engine"]["failure"] == "backend 'tensorrt-rtx' cannot be used here: there is no GPU"


def test_several_thread_numbers_and_the_first_as_the_reference(folder: Path) -> None:
    data = run_json("small.onnx", "small", "small", "--threads", "1", "--threads", "2")
    assert timed(data) == [(n, "onnxruntime", 2, t) for t in (1, 2) for n in ("small.onnx", "small")]
    assert {r["reference"] for r in data["rows"]} == {"small.onnx"}


def test_a_reference_that_is_among_the_rest_is_timed_once_and_comes_first(folder: Path) -> None:
    data = run_json("small", "small.onnx", "--against", "small.onnx", "--backend", "torch")
    assert [r["artefact"] for r in data["rows"]] == ["small.onnx", "small"]


def test_a_file_alone_needs_no_inputs_and_no_backend(folder: Path) -> None:
    data = run_json("small.onnx", "--batch", "5", "--backend", "torch")
    (row,) = data["rows"]
    assert (row["runs_on"], row["batch"], row["backend"], row["speedup"]) == ("onnxruntime", 5, None, 1.0)
    assert data["notes"] == ["there is no model to build: files run on the runtime that they are for"]
    assert timed(run_json("small.onnx", "--input", "3x8"))[0][2] == 3
    assert timed(run_json("small.onnx", "--input", "x=4x8"))[0][2] == 4


def test_inputs_of_a_file_fit_a_model_that_has_none(folder: Path) -> None:
    data = run_json("small.onnx", "nets.py:bare", "nets.py:short", "--backend", "torch", "--batch", "2")
    assert [r["failure"] for r in data["rows"]] == [None] * 3


def test_an_engine_is_fed_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(Runner):
        names = ("x",)

        def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
            assert not args and kwargs.keys() == {"x"}
            return [kwargs["x"][:, :4]]

        def describe(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(TensorRTBackend, "load", lambda self, path, threads=1: Fake())
    data = run_json("small.engine")
    assert timed(data)[0][:3] == ("small.engine", "tensorrt-rtx", 2)  # the shape that it is best at
    assert data["rows"][0]["size"] == len(b"an engine")
    assert run_json("small.engine", "nets.py:bare", "--backend", "torch", "--batch", "1")["notes"] == []


@needs_compiler
def test_a_package_runs_beside_the_others(folder: Path) -> None:
    load_pruned("small").export("small.pt2")
    data = run_json("small", "small.pt2", "--backend", "torch", "--batch", "1", "--batch", "3", "--threads", "1")
    assert timed(data) == [(n, b, s, 1) for s in (1, 3) for n, b in (("small", "torch"), ("small.pt2", "torch-aot"))]
    assert all(r["failure"] is None for r in data["rows"])
    assert data["notes"] == [
        "small.pt2 computes with the number of threads that it was compiled for, whatever was asked for"
    ]
    assert timed(run_json("small.pt2", "--input", "4x8"))[0][:3] == ("small.pt2", "torch-aot", 4)
    package, x = PACKAGES.load("small.pt2"), torch.randn(3, 8)
    torch.testing.assert_close(package.run(x)[0], fxprune.load("small")(x), rtol=1e-4, atol=1e-5)
    assert package.describe()["provider"] == "cpu"
    for wrong in (torch.randn(1, 9), torch.randn(8), torch.randn(2, 8).double()):  # it would read beside the tensors
        with pytest.raises(BackendError, match=r"'small.pt2' does not run on these arguments: \w"):
            package.bind(wrong)
    with pytest.raises(BackendError, match="takes no tensors by name, but was given x"):
        package.run(x=x)
    error = run_json("small.pt2", code=3)["error"]["message"]
    assert error.startswith("there are no example inputs with small.pt2; give their shapes, for example --input 1x3")
    error = run_json("small.pt2", "--input", "3x9", code=8)["error"]["message"]
    assert error.startswith("nothing could be timed: small.pt2: 'small.pt2' does not run on these arguments: ")


@needs_compiler
def test_a_package_of_another_tool_has_names(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, *, mask: Tensor, scale: Tensor) -> Tensor:
            return x * mask + scale

    example = {"mask": torch.randn(2, 4), "scale": torch.randn(4)}
    program = torch.export.export(Net(), (torch.randn(2, 4),), example)
    path = str(tmp_path / "other.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    x, artefact = torch.randn(2, 4), read(path)
    opened = open_file(artefact, Inputs((), {"scale": example["scale"], "mask": example["mask"], "x": x}), 1)
    torch.testing.assert_close(opened.outputs()[0], Net()(x, **example))
    with pytest.raises(InputError, match="takes mask, scale by name, and the inputs are 0"):
        open_file(artefact, Inputs((x,), {}), 1)


def test_exported_programs_are_models(folder: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(8, 4), (torch.randn(2, 8),)), "linear.pt2")
    assert read("linear.pt2").kind == "model"
    assert timed(run_json("linear.pt2", "--backend", "torch"))[0][:3] == ("linear.pt2", "torch", 2)


def test_options_go_to_the_backends_that_have_them(folder: Path) -> None:
    common = ("small", "small.onnx", "--option", "provider=cpu", "--option", "dtype=float16")
    data = run_json(*common, "--backend", "onnxruntime", "--backend", "torch", "--option", "device=cpu")
    assert [r["runs_on"] for r in data["rows"]] == [
        "onnxruntime(dtype=float16)",
        "onnxruntime",
        "torch(dtype=float16)",
        "onnxruntime",
    ]
    assert parse_options(["sparse=auto"]) == {"sparse": "auto"}


# ---------------------------------------------------------------------- notes
def test_another_dense_model_is_said(folder: Path) -> None:
    data = run_json("small", "--against", "nets.py:ready", "--backend", "torch")
    assert data["notes"] == [
        "nets.py:ready is a Linear of 36 parameters, but small was made of a Net of 4,996: "
        "the two may not do the same work"
    ]


def test_outputs_of_other_shapes_are_said(folder: Path) -> None:
    fxprune.compile(nn.Linear(8, 6), torch.randn(2, 8), target={"params": 1.0}).export("six.onnx")
    data = run_json("small.onnx", "six.onnx")
    assert data["notes"] == ["six.onnx returns 1x6, but small.onnx 1x4: the two may not do the same work"]


# ---------------------------------------------------------------------- what cannot be timed
def test_a_row_says_why_and_another_artefact_is_the_reference(folder: Path) -> None:
    common = ("small", "--against", "nets.py:short", "--backend", "torch", "--batch", "2", "--batch", "3")
    data = run_json(*common)
    assert [r["failure"] for r in data["rows"]] == [
        None,
        None,
        "backend 'torch' cannot run the model: two rows at most",
        None,
    ]
    assert [r["reference"] for r in data["rows"]] == ["nets.py:short"] * 2 + ["small"] * 2
    assert data["notes"][-1] == "speed-ups are over small where nets.py:short was not timed"
    shown = run(*common, "--threads", "1", "--rounds", "6").stdout
    assert "nets.py:short was not timed (torch, batch 3, 1 thread): backend 'torch' cannot run" in shown


def test_whatever_a_build_raises_is_a_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(type(BACKENDS["torch"]), "_build", break_down)
    data = run_json("small", "small.onnx", "--backend", "torch")
    assert data["rows"][0]["failure"] == "it cannot be run on these inputs: RuntimeError: out of luck"
    assert data["rows"][1]["milliseconds"] > 0


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (8, "nothing could be timed: small.engine: backend 'tensorrt-rtx' cannot be used here", ("small.engine",)),
        (
            8,
            "nothing could be timed: small: backend 'tensorrt' cannot be used here: there is no GPU",
            ("small", "--backend", "tensorrt"),
        ),
        (
            3,
            "nothing could be timed: nets.py:pair: the arguments do not fit forward(",
            ("nets.py:pair", "--input", "2x8"),
        ),
        (3, "'nowhere.onnx' does not exist", ("small", "nowhere.onnx")),
        (3, "'nowhere.engine' does not exist", ("small", "--against", "nowhere.engine")),
        (3, "'smal' names no model. MODEL is one of: timm:NAME", ("smal",)),
        (9, "'small/", ("small",)),
        (8, "'broken.onnx' cannot be read as an ONNX file", ("broken.onnx",)),
        (8, "no backend is called 'onnxruntim'; did you mean 'onnxruntime'?", ("small", "--backend", "onnxruntim")),
        (8, "onnxruntime has no option 'dtyp'; did you mean 'dtype'?", ("small", "--option", "dtyp=float16")),
        (8, "torch has no option 'fusion'", ("small", "--backend", "torch", "--option", "fusion=graph")),
        (8, "backend 'onnxruntime': provider is one of cpu, ", ("small.onnx", "--option", "provider=gpu")),
        (8, "--option dtype: write KEY=VALUE", ("small", "--option", "dtype")),
        (3, "there are no example inputs with nets.py:bare; give", ("nets.py:bare",)),
        (3, "--input y: the inputs of 'small.onnx' are x", ("small.onnx", "--input", "y=2x8")),
        (3, "--input 2by8: this is not", ("small", "--input", "2by8")),
        (2, "", ("small", "--rounds", "5")),
        (2, "", ("small", "--threads", "0")),
        (2, "", ()),
    ],
)
def test_what_is_wrong(folder: Path, no_gpu: None, code: int, message: str, arguments: tuple[str, ...]) -> None:
    (folder / "broken.onnx").write_bytes(b"\xff\xff")
    if code == 9:
        (folder / "small" / "graph.json").write_text("{}")
    result = run(*arguments, code=code)
    assert result.stdout == ""
    assert (f"error: {message}" if message else "Usage") in result.stderr
    if message:
        assert run_json(*arguments, code=code)["error"]["message"].startswith(message)


def test_a_broken_engine_does_not_keep_the_others_from_being_timed(folder: Path) -> None:
    (folder / "small.engine").write_bytes(b"altered")
    data = run_json("small.engine", "small.onnx")
    assert "'small.engine' is truncated or altered" in data["rows"][0]["failure"]
    assert data["rows"][1]["milliseconds"] > 0


# ---------------------------------------------------------------------- in Python
def test_modules_and_results_of_compile(folder: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    pruned = fxprune.compile(net, torch.randn(2, 8), target={"macs": 0.5})
    stages: list[str] = []
    found = fxprune.bench(
        [pruned, net, nn.Linear(8, 4), nn.Linear(8, 4)], rounds=6, threads=[1], progress=stages.append
    )
    (combination,) = found.combinations
    assert [t.artefact for t in combination.timings] == ["pruned Sequential", "Sequential", "Linear", "Linear #2"]
    assert (combination.reference, combination.backend) == ("pruned Sequential", "onnxruntime")
    assert stages == ["read what is to be timed", "measure on onnxruntime, batch 2"]
    assert "pruned Sequential: " in str(found) and "6 rounds" in str(found)
    half = {"name": "torch", "dtype": "bfloat16"}
    found = fxprune.bench({"a": net}, against=net, inputs=["3x8"], backends=[half], rounds=6)
    assert [t.runs_on for t in found.combinations[0].timings] == ["torch(dtype=bfloat16)"]


def test_what_python_refuses(folder: Path) -> None:
    for arguments, message in (
        ({"artefacts": []}, "there is nothing to time"),
        ({"artefacts": ["small"], "rounds": 5}, "5 rounds allow no 95 % interval"),
        ({"artefacts": ["small"], "batches": [0, 1]}, "batches are 0, 1; each is 1 or more"),
        ({"artefacts": ["small"], "threads": [0]}, "threads are 0; each is 1 or more"),
    ):
        with pytest.raises(InputError, match=message):
            fxprune.bench(**arguments)
    (folder / "small" / "graph.json").unlink()
    with pytest.raises(SavedModelError):
        fxprune.bench(["small"])


def test_an_onnx_file_as_a_runner(folder: Path) -> None:
    runner, x = ONNXRUNTIME.load("small.onnx"), torch.randn(3, 8)
    assert (runner.names, runner.path, runner.describe()["dtype"]) == (["x"], Path("small.onnx"), None)
    for found in (runner.run(x), runner.run(x=x)):
        torch.testing.assert_close(found[0], fxprune.load("small")(x), rtol=1e-4, atol=1e-5)
    assert runner.profile(x, runs=2).nodes
    with pytest.raises(BackendError, match="the file takes x, but was given 1 tensors in order and y by name"):
        runner.run(x, y=x)
    with pytest.raises(BackendError, match=r"onnxruntime cannot load nowhere\.onnx"):
        ONNXRUNTIME.load("nowhere.onnx")


def test_a_runtime_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(BACKENDS["onnxruntime"]), "available", lambda self: "pip install onnxruntime")
    with pytest.raises(BackendError, match="backend 'onnxruntime' cannot be used here: pip install onnxruntime"):
        ONNXRUNTIME.load("small.onnx")
    with pytest.raises(BackendError, match=r"'small\.onnx' is no package of compiled code"):
        PACKAGES.load("small.onnx")


# ---------------------------------------------------------------------- inputs
def test_inputs_of_files(folder: Path) -> None:
    assert engine_inputs(folder / "small.engine") == [FileInput("x", (2, 8), torch.float32)]
    ports = [FileInput("ids", ("batch", "sequence"), torch.int64), FileInput("mask", (1, 4), torch.float32)]
    made = file_tensors("a.onnx", ports, ["ids=2x6:int64:5-9"])
    assert (made["ids"].shape, made["mask"].shape) == ((2, 6), (1, 4))
    assert 5 <= made["ids"].min() <= made["ids"].max() < 9
    with pytest.raises(InputError, match=r"the sizes sequence of the input 'ids' are open; .* --input ids=3x16:int64"):
        file_tensors("a.onnx", ports, [], batch=3)
    with pytest.raises(InputError, match=r"--input without a name: the inputs of 'a\.onnx' are ids, mask"):
        file_tensors("a.onnx", ports, ["2x6"])


def test_inputs_by_name_and_in_order() -> None:
    given = example_inputs([read(nn.Bilinear(8, 6, 4))], ["input2=2x6", "input1=2x8"])
    assert list(given.tensors()) == ["input1", "input2"]
    assert given.batch == 2 and given.rebatched(5).batch == 5
    assert {n: t.shape[1] for n, t in given.for_names(["a", "b"], "it").items()} == {"a": 8, "b": 6}
    assert list(given.for_names(["input2"], "it")) == ["input2"]
    with pytest.raises(InputError, match=r"it takes a, and the inputs are input1, input2; give those of the file"):
        given.for_names(["a"], "it")
    assert torch.equal(example_inputs([read(nn.ReLU())], ["2x2"]).args[0], example_inputs([], ["2x2"]).args[0])
