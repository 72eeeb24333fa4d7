"""Engines: options, errors, what lies beside them, the command line; and on a fake what only a GPU can do."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fxprune
from fxprune.backends import BACKENDS, engines, onnxfile, onnxruntime
from fxprune.backends.engine_builder import Line, _load_cache, capabilities, errors, library
from fxprune.backends.engine_runner import EngineRunner
from fxprune.backends.engines import Engine, Profile, Sparsity
from fxprune.backends.tensorrt import TensorRTBackend
from fxprune.cli import app
from fxprune.errors import BackendError
from fxprune.pruned import Pruned
from fxprune.report import EngineSummary
from fxprune.saved import load_pruned

FULL, RTX = (BACKENDS[name] for name in ("tensorrt", "tensorrt-rtx"))
assert isinstance(RTX, TensorRTBackend) and isinstance(FULL, TensorRTBackend)
HALF = RTX.configured(dtype="float16")
builds = pytest.mark.skipif(RTX.can_build() is not None, reason=str(RTX.can_build()))
# torch's own, when a module with a tree specification is copied
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, image: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        x = nn.functional.interpolate(self.conv(image).relu(), scale_factor=2.0, mode="bilinear").mean((2, 3))
        return self.head(x) * scale, x


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file of `Net`, float32, with a dynamic batch."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    onnxruntime.export(Net().eval(), (torch.randn(2, 3, 8, 8),), {"scale": 2.0}, path)
    return path


@pytest.fixture(scope="module")
def built(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("engine") / "net.engine"
    return HALF.compile_engine(file, path=path, compute_capability="8.9")


@pytest.fixture
def engine(built: Engine, tmp_path: Path) -> Engine:
    """A copy that a test may damage."""
    for source in (built.path, engines.sidecar(built.path)):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    return replace(built, path=tmp_path / built.path.name)


# ------------------------------------------------------------------------------------------------------- what is built


@builds
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_module_in_every_dtype(dtype: str, tmp_path: Path) -> None:
    """Inputs and outputs stay float32, inside there is the dtype, and the file it is built from computes the same."""
    net, onnx_file = Net().eval(), tmp_path / "net.onnx"
    engine = RTX.configured(dtype=dtype).compile_engine(
        net, (torch.randn(4, 3, 8, 8),), path=tmp_path / "new" / "net.engine", compute_capability="8.9", onnx=onnx_file
    )
    assert [(p.name, p.shape, p.dtype) for p in engine.inputs] == [("image", (-1, 3, 8, 8), "float32")]
    assert [(p.shape, p.dtype) for p in engine.outputs] == [((-1, 4), "float32"), ((-1, 16), "float32")]
    assert engine.profiles == {"image": Profile((1, 3, 8, 8), (4, 3, 8, 8), (32, 3, 8, 8))}
    weights = {p.dtype for layer in engine.layers for p in layer.constants if len(p.shape) > 1}
    assert dtype in weights
    if dtype == "bfloat16":
        assert engine.parity is None  # onnxruntime has no such convolution on the CPU
    else:
        assert engine.parity is not None and engine.parity < {"float32": 1e-5, "float16": 5e-3}[dtype]
        onnx.checker.check_model(onnx.load(onnx_file), full_check=True)
    assert f"--onnx={onnx_file} --saveEngine={engine.path} --minShapes=image:1x3x8x8" in engine.command
    assert engine.command.startswith("tensorrt_rtx ") and "--computeCapabilities=89" in engine.command


@builds
def test_several_gpus_and_the_default(file: Path, tmp_path: Path) -> None:
    for given, expected in {("8.6, 8.9,12.0",): ("8.6", "8.9", "12.0"), ("7.5", "8.6"): ("7.5", "8.6")}.items():
        engine = HALF.compile_engine(file, path=tmp_path / "a.engine", compute_capability=given)
        assert engine.compute_capability == expected
    everywhere = HALF.compile_engine(file, path=tmp_path / "a.engine")
    assert everywhere.compute_capability == ()
    assert "--computeCapabilities" not in everywhere.command


@builds
def test_profiles(file: Path, tmp_path: Path) -> None:
    def profile(**options: Any) -> Profile:
        return HALF.compile_engine(file, path=tmp_path / "a.engine", **options).profiles["image"]

    assert profile(batch=64) == Profile((1, 3, 8, 8), (64, 3, 8, 8), (64, 3, 8, 8))
    assert profile(batch=(2, 2, 4)) == Profile((2, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))
    shapes = [(1, 3, 8, 8), (5, 3, 8, 8), (6, 3, 8, 8)]
    assert profile(shapes={"image": shapes}) == Profile(*shapes)
    with pytest.raises(BackendError, match=r"in order, not \(4, 2, 8\)"):
        profile(batch=(4, 2, 8))
    with pytest.raises(BackendError, match=r"input 'image' has the shape \(-1, 3, 8, 8\), where -1 is open"):
        profile(shapes={"image": [(1, 3, 8, 9)] * 3})
    with pytest.raises(BackendError, match="shapes are given for 'picture', but the inputs are image"):
        profile(shapes={"picture": shapes})
    with pytest.raises(BackendError, match="shapes of input 'image' are three"):
        profile(shapes={"image": shapes[:2]})


@builds
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_a_dynamic_sequence_needs_shapes(tmp_path: Path) -> None:
    net = nn.Linear(8, 4)
    path = tmp_path / "net.onnx"
    torch.onnx.export(
        net, (torch.randn(2, 5, 8),), path, dynamo=True, verbose=False, dynamic_shapes=({0: "batch", 1: "sequence"},)
    )
    with pytest.raises(BackendError, match=r"dimensions 0, 1 of input 'input' are open: pass shapes=\{'input': .*"):
        HALF.compile_engine(path, path=tmp_path / "a.engine")
    shapes = {"input": [(1, 1, 8), (8, 16, 8), (32, 128, 8)]}
    assert HALF.compile_engine(path, path=tmp_path / "a.engine", shapes=shapes).profiles == {
        "input": Profile(*shapes["input"])
    }


@builds
def test_a_fixed_batch_has_no_profile(tmp_path: Path) -> None:
    engine = HALF.compile_engine(
        nn.Linear(8, 4), (torch.randn(2, 8),), path=tmp_path / "a.engine", dynamic=False, onnx=tmp_path / "a.onnx"
    )
    assert (engine.profiles, engine.inputs[0].shape, "Shapes" in engine.command) == ({}, (2, 8), False)


@builds
@pytest.mark.filterwarnings("ignore")  # the quantiser's own
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_quantised_files(dtype: str, file: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Data(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{"image": torch.randn(2, 3, 8, 8).numpy()} for _ in range(2)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    def quantised(symmetric: bool) -> Path:
        path = tmp_path / f"{symmetric}.onnx"
        quantize_static(
            file,
            path,
            Data(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True},
        )
        return path

    backend = RTX.configured(dtype=dtype)
    engine = backend.compile_engine(quantised(True), path=tmp_path / "a.engine", compute_capability="8.9")
    assert "int8" in {port.dtype for layer in engine.layers for port in (*layer.inputs, *layer.constants)}
    with pytest.raises(BackendError, match=r"cannot read the ONNX file:\n.*Non-zero zero point is not supported"):
        backend.compile_engine(quantised(False), path=tmp_path / "a.engine")


@builds
def test_half_precision_keeps_what_must_stay(file: Path) -> None:
    """Scales of Resize stay float32; masks as large as float32 goes stay finite; infinities stay."""
    model = onnxfile.load(file)
    onnxfile.cast(model, "float16")
    resize = next(node for node in model.graph if node.op_type == "Resize")
    assert resize.inputs[2].dtype == ir.DataType.FLOAT
    numbers = ir.Tensor(torch.tensor([torch.finfo(torch.float32).min, -torch.inf, torch.nan, 0.5]).numpy())
    half = onnxfile._converted(numbers, ir.DataType.FLOAT16).numpy()
    assert half[:2].tolist() == [-65504.0, -float("inf")] and half[2] != half[2] and half[3] == 0.5
    before = onnxfile.load(file)
    onnxfile.cast(before, "float32")
    assert {v.dtype for v in before.graph.initializers.values()} & {ir.DataType.FLOAT16} == set()


@builds
def test_what_is_too_large_for_half_precision_is_noticed(tmp_path: Path) -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1e4 * 1e4 / 1e8

    with pytest.raises(BackendError, match="'tensorrt-rtx in float16' does not compute what Large computes"):
        HALF.compile_engine(Large(), (torch.ones(2, 3),), path=tmp_path / "a.engine")
    assert not (tmp_path / "a.engine").exists()


def test_two_of_four_is_seen_in_convolutions_and_matrices(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten(2), nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(3, 2)).eval()
    pattern = torch.tensor([1.0, 0.0, 0.0, 1.0])
    net[0].weight.data = pattern.repeat(8, 2)[..., None, None].clone()
    net[2].weight.data = pattern.repeat(8, 1)
    net[3].weight.data = pattern.repeat(3, 2).flip(1).roll(2, 1)  # across the border of two groups, so not 2:4 ...
    net[3].weight.data[:, 2:6] = 1
    path = tmp_path / "net.onnx"
    onnxruntime.export(net, (torch.randn(2, 8, 2, 2),), {}, path)
    found = onnxfile.two_of_four(onnxfile.load(path))
    assert (len(found.possible), len(found.held), found.share) == (3, 2, 2 / 3)
    assert onnxfile.TwoOfFour((), ()).share == 0


@builds
@pytest.mark.parametrize(("option", "asked"), [("auto", False), ("on", True), ("off", False)])
def test_sparse_kernels_are_asked_for_where_that_makes_sense(
    option: str, asked: bool, file: Path, tmp_path: Path
) -> None:
    engine = HALF.configured(sparse=option).compile_engine(file, path=tmp_path / "a.engine")
    assert engine.sparsity.asked is asked
    assert ("--sparsity=enable" in engine.command) is asked
    assert f"sparse kernels {'asked for' if asked else 'not asked for'}" in engine.sparsity.line()


# -------------------------------------------------------------------------------------------------------------- errors


@builds
def test_broken_files_and_operators_are_told(file: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.engine"
    whole = file.read_bytes()
    for content in (b"not onnx at all", whole[: len(whole) // 2]):
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(content)
        with pytest.raises(BackendError, match=r"broken.onnx' cannot be read as an ONNX file: .*Export it again"):
            HALF.compile_engine(broken, path=target)
    with pytest.raises(BackendError, match=r"nowhere.onnx' cannot be read as an ONNX file"):
        HALF.compile_engine(tmp_path / "nowhere.onnx", path=target)
    node = onnx.helper.make_node("Frobnicate", ["x"], ["y"], name="odd", domain="my.domain")
    ends = [onnx.helper.make_tensor_value_info(name, 1, [2, 3]) for name in "xy"]
    sets = [onnx.helper.make_opsetid(domain, version) for domain, version in (("", 20), ("my.domain", 1))]
    graph = onnx.helper.make_graph([node], "graph", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=sets), tmp_path / "odd.onnx")
    with pytest.raises(
        BackendError, match=r"cannot read the ONNX file:\n.*Plugin not found.*\(node odd, operator Frobnicate\)"
    ):
        HALF.compile_engine(tmp_path / "odd.onnx", path=target)
    assert not target.exists()


@builds
def test_other_gpus_and_timing_caches_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match=r"does not build for compute capability 9.0, x; it does for 7.5, 8.0, 8.6, 8.9, 12.0"
    ):
        HALF.compile_engine(file, path=tmp_path / "a.engine", compute_capability=["9.0", "x", "8.9"])
    with pytest.raises(BackendError, match="'tensorrt-rtx' times no kernels: leave out timing_cache"):
        HALF.compile_engine(file, path=tmp_path / "a.engine", timing_cache=tmp_path / "cache")
    (tmp_path / "no").write_text("a file")
    with pytest.raises(BackendError, match=r"'.*' was not written: "):
        HALF.compile_engine(file, path=tmp_path / "no" / "a.engine")


def test_backends_say_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = "tensorrt_rtx, onnx_ir, onnx, onnxscript, onnxruntime not installed; pip install 'fxprune[tensorrt-rtx]'"
    assert RTX.available() == RTX.can_build() == reason
    with pytest.raises(BackendError, match="'tensorrt-rtx' cannot build engines here: tensorrt_rtx, "):
        RTX.compile_engine(nn.Linear(2, 2), (torch.zeros(1, 2),), path=tmp_path / "a.engine")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert RTX.can_build() is None
    assert "engines can be built here (`fxprune export --engine`), not run" in str(RTX.available())
    assert FULL.can_build() == FULL.available()
    assert "torch sees no CUDA GPU; run this where there is one, or build with tensorrt-rtx" in str(FULL.available())
    with pytest.raises(BackendError, match="no_such_library cannot be imported"):
        library("no_such_library")
    with pytest.raises(BackendError, match="dtype is one of float32, float16, bfloat16, not 'int8'"):
        RTX.configured(dtype="int8")
    assert (RTX.preferred_multiple, RTX.configured(sparse="on").preferred_multiple) == (8, 32)


def test_the_last_errors_are_repeated_once() -> None:
    lines = [Line("INFO", "fine"), Line("ERROR", "a"), Line("INTERNAL_ERROR", "b"), Line("ERROR", "a")]
    assert errors(lines) == "a\n  b"
    assert errors(lines[:1]) == "it gave no reason"


# ------------------------------------------------------------------------------------------------- what lies beside it


@builds
def test_an_engine_is_read_again_as_it_was_written(engine: Engine) -> None:
    assert RTX.read(engine.path) == engine
    about = json.loads(engines.sidecar(engine.path).read_text())
    assert about["compute_capability"] == ["8.9"] and "path" not in about
    assert about["profiles"]["image"]["largest"] == [32, 3, 8, 8]


@builds
def test_damaged_engines_are_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    about = engines.sidecar(engine.path)
    good, text = engine.path.read_bytes(), about.read_text()
    engine.path.write_bytes(good[:-1])
    with pytest.raises(BackendError, match=r"net.engine' is truncated or altered: its checksum is not the one in net"):
        RTX.read(engine.path)
    engine.path.write_bytes(good)
    for broken in (text[: len(text) // 2], "[]", "{}"):
        about.write_text(broken)
        with pytest.raises(BackendError, match=r"net.engine.json' is truncated or altered: .*Build the engine again"):
            RTX.read(engine.path)
    about.write_text(json.dumps({**json.loads(text), "format": 7}))
    with pytest.raises(BackendError, match="is of format 7; this fxprune reads 1"):
        RTX.read(engine.path)
    about.write_text(json.dumps({**json.loads(text), "version": "0.9"}))
    with pytest.raises(BackendError, match=r"was built by tensorrt_rtx 0.9, and this is tensorrt_rtx 1.*cannot run it"):
        RTX.read(engine.path)
    about.unlink()
    with pytest.raises(BackendError, match=r"net.engine.json' is missing: an engine and its .json belong together"):
        RTX.read(engine.path)


def test_layers_of_an_inspector_are_those_of_the_log() -> None:
    """Both forms in which TensorRT describes an engine."""
    line = (
        "Layers:\nName: conv + relu, LayerType: correlation, Inputs: [ { Name: x, Dimensions: [-1,4,8,8], Strides: "
        "[256,1,32,4], Datatype: Half, Format: (NHWC) Channel major format }], Constants: [ { Name: w, Dimensions: "
        "[16,4,3,3], Datatype: Half, Format: a }, { Name: b, Dimensions: [], Datatype: Float, Format: a }], Outputs: [ "
        "{ Name: y, Dimensions: [-1,16,8,8], Datatype: Half, Format: a }], TacticName: t, StreamId: 0, Metadata: "
        "[ONNX Layer: node_conv][ONNX Layer: node_relu]\n\nI/O Tensors:\n Name: x, IOMode: Input"
    )

    def port(name: str, shape: list[int], dtype: str = "Half") -> dict[str, Any]:
        return {"Name": name, "Dimensions": shape, "Datatype": dtype}

    layer = {
        "Name": "conv + relu",
        "LayerType": "correlation",
        "Inputs": [port("x", [-1, 4, 8, 8])],
        "Constants": [port("w", [16, 4, 3, 3]), port("b", [], "Float")],
        "Outputs": [port("y", [-1, 16, 8, 8])],
        "Metadata": "[ONNX Layer: node_conv]\x1e[ONNX Layer: node_relu]",
    }
    (found,) = engines.layers_in_log(["another message", line])
    assert engines.layers_in_json(json.dumps({"Layers": [layer, "a name alone"], "I/O Tensors": []})) == (found,)
    assert (found.kind, found.nodes) == ("correlation", ("node_conv", "node_relu"))
    assert [p.shape for p in found.constants] == [(16, 4, 3, 3), ()]
    assert [p.dtype for p in found.constants] == ["float16", "float32"]
    assert engines.layers_in_log([]) == ()


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ([], (None, None, (), ())),
        (
            [
                "(Sparsity) Layers eligible for sparse math: conv1, conv2 + relu, fc",
                "(Sparsity) TRT inference plan picked sparse implementation for layers: conv2 + relu",
            ],
            (3, 1, ("conv1", "conv2 + relu", "fc"), ("conv2 + relu",)),
        ),
        (
            [
                "(Sparsity) Layers eligible for sparse math: fc",
                "(Sparsity) TRT inference plan picked sparse implementation for layers:",
            ],
            (1, 0, ("fc",), ()),
        ),
        (
            [
                "(Sparsity) Found 1 layer(s) eligible to use sparse tactics: a",
                "(Sparsity) Found 39 layer(s) eligible to use sparse tactics",
                "(Sparsity) Chose 0 layer(s) using sparse tactics",
            ],
            (39, 0, (), ()),
        ),
    ],
)
def test_what_builders_say_of_sparsity(log: list[str], expected: tuple[Any, ...]) -> None:
    found = engines.sparsity_in_log(log, asked=True, possible=40, held=39)
    assert (found.eligible, found.picked, found.eligible_layers, found.picked_layers) == expected
    if found.eligible is None:
        assert "the builder did not say which layers use them" in found.line()
    else:
        assert f"{found.eligible} layers eligible, {found.picked} picked" in found.line()


# ------------------------------------------------------------------------------------------------- with a GPU, on fakes


class FakeContext:
    """Doubles its input, wherever the addresses point; a batch above 4 is none it takes."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.works = True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= 4

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        count = torch.Size(self.shapes["x"]).numel()
        source, target = (ctypes.cast(self.addresses[n], ctypes.POINTER(ctypes.c_float)) for n in ("x", "y"))
        for index in range(count):
            target[index] = 2 * source[index]
        return self.works


class FakeStream:
    cuda_stream = 7

    def __init__(self, device: Any = None) -> None:
        self.waited = 0

    def synchronize(self) -> None:
        self.waited += 1

    def wait_stream(self, other: Any) -> None:
        pass


class Double(nn.Module):
    def forward(self, x: Tensor, *, factor: int = 2) -> Tensor:
        return x * factor


FAKE = Engine(
    path=Path("double.engine"),
    library="tensorrt",
    version="11.4",
    compute_capability=("8.9",),
    dtype="float32",
    inputs=(engines.Port("x", (-1, 3), "float32"),),
    outputs=(engines.Port("y", (-1, 3), "float32"),),
    profiles={"x": Profile((1, 3), (2, 3), (4, 3))},
    sparsity=Sparsity(False, 0, 0),
    layers=(),
    sha256="0",
    size=0,
    seconds=0.0,
    parity=None,
    command="",
)


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> FakeContext:
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    return FakeContext()


def opened(context: FakeContext, *rest: Any) -> EngineRunner:
    names = ["x", "y"]
    engine = SimpleNamespace(
        create_execution_context=lambda: context, num_io_tensors=2, get_tensor_name=lambda index: names[index]
    )
    return EngineRunner("tensorrt", engine, FAKE, 1, *rest, device="cpu")


def test_a_runner_gives_addresses_and_waits(context: FakeContext) -> None:
    runner = opened(context)
    for batch in (1, 4, 2):
        x = torch.randn(3, batch).T  # not contiguous
        (y,) = runner.run(x)
        torch.testing.assert_close(y, 2 * x)
    torch.testing.assert_close(runner.run(x=torch.ones(2, 3))[0], torch.full((2, 3), 2.0))
    call = runner.bind(torch.ones(2, 3))
    before = runner._stream.waited
    call()
    call()
    assert runner._stream.waited == before + 2
    told = json.loads(json.dumps(runner.describe()))
    assert (told["provider"], told["versions"]["tensorrt"], told["parity"]) == ("a GPU", "11.4", None)


def test_times_on_the_gpu_are_those_between_two_events(context: FakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.place = -1

        def record(self, stream: FakeStream) -> None:
            recorded.append(self)
            self.place = len(recorded)

        def elapsed_time(self, end: Event) -> float:
            return float(end.place - self.place)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert opened(context).milliseconds(3, torch.ones(2, 3)) == [1.0, 1.0, 1.0]
    assert len(recorded) == 6


def test_a_runner_of_a_module_takes_the_modules_arguments(context: FakeContext) -> None:
    import inspect

    runner = opened(context, inspect.signature(Double().forward), ((torch.ones(2, 3),), {"factor": 2}))
    torch.testing.assert_close(runner.run(torch.ones(1, 3), factor=2)[0], torch.full((1, 3), 2.0))
    with pytest.raises(BackendError, match="build it again with these arguments"):
        runner.run(torch.ones(1, 3), factor=3)


def test_a_runner_refuses_what_the_engine_was_not_built_for(context: FakeContext) -> None:
    runner = opened(context)
    for wrong in (torch.ones(5, 3), torch.ones(2, 3).double(), torch.ones(0, 3)):
        with pytest.raises(BackendError, match=r"input 'x' of the engine is \(1, 3\) to \(4, 3\) of float32, but was"):
            runner.run(wrong)
    with pytest.raises(BackendError, match="the engine takes x, but was given 2 tensors in order and none by name"):
        runner.run(torch.ones(1, 3), torch.ones(1, 3))
    context.get_tensor_shape = lambda name: (-1, 3)  # type: ignore[method-assign]
    with pytest.raises(BackendError, match=r"the shape of output 'y', .* depends on the numbers in the inputs"):
        runner.run(torch.ones(1, 3))
    context = FakeContext()
    context.works = False
    with pytest.raises(BackendError, match=r"TensorRT failed to run 'double.engine'"):
        opened(context).run(torch.ones(1, 3))
    with pytest.raises(BackendError, match="too little GPU memory"):
        EngineRunner("tensorrt", SimpleNamespace(create_execution_context=lambda: None), FAKE, 1, device="cpu")


@builds
def test_full_tensorrt_builds_for_the_gpu_at_hand(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code on the library that is here, told to do as full TensorRT does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    full = TensorRTBackend("tensorrt", "tensorrt_rtx", "trtexec", ahead_of_time=False)
    engine = full.compile_engine(file, path=tmp_path / "a.engine")
    assert engine.compute_capability == ("8.9",)
    assert engine.command.startswith("trtexec ") and "--computeCapabilities" not in engine.command
    with pytest.raises(BackendError, match=r"builds for the GPU at hand, of compute capability 8.9, not for 8.6"):
        full.compile_engine(file, path=tmp_path / "a.engine", compute_capability="8.6")


def test_timing_caches_are_loaded_and_others_refused(tmp_path: Path) -> None:
    given: list[bytes] = []

    def create(data: bytes) -> bytes:
        given.append(data)
        return data

    config = SimpleNamespace(create_timing_cache=create, set_timing_cache=lambda cache, ignore_mismatch: cache != b"x")
    assert _load_cache(config, None) is None
    assert _load_cache(config, tmp_path / "cache") == b""
    (tmp_path / "cache").write_bytes(b"x")
    with pytest.raises(BackendError, match="is of another GPU or version; delete it"):
        _load_cache(config, tmp_path / "cache")
    assert given == [b"", b"x"]


def test_compute_capabilities_by_name() -> None:
    trt = SimpleNamespace(ComputeCapability=SimpleNamespace(__members__={"NONE": 0, "SM89": 1, "SM121": 2}))
    assert capabilities(trt) == {"8.9": 1, "12.1": 2}


# ------------------------------------------------------------------------------------------ Pruned.export, command line


@pytest.fixture(scope="module")
def pruned() -> Pruned:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    return fxprune.compile(net, torch.randn(2, 8), target={"macs": 0.5})


@builds
def test_export_writes_an_engine_and_reports_it(pruned: Pruned, tmp_path: Path) -> None:
    path = tmp_path / "small.engine"
    for _ in range(2):  # the report has one line for one file
        assert pruned.export(path, compute_capability="8.9", dtype="float16", sparse="on", batch=4) == path
    (summary,) = pruned.report.engines
    assert isinstance(summary, EngineSummary)
    assert (summary.compute_capability, summary.dtype, summary.size) == (("8.9",), "float16", path.stat().st_size)
    assert f"engine {path}: tensorrt_rtx" in str(pruned.report)
    assert "sparse kernels asked for; the builder did not say which layers use them" in str(pruned.report)
    pruned.save(tmp_path / "saved")
    assert load_pruned(tmp_path / "saved").report.engines == [summary]
    assert 32 in {size for layer in engines.read(path).layers for p in layer.constants for size in p.shape}


def test_export_refuses_what_it_does_not_know(pruned: Pruned, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"ends in '.plan'; known endings: .onnx, .pt2, .engine"):
        pruned.export(tmp_path / "a.plan")
    with pytest.raises(BackendError, match=r"backend 'onnxruntime' has no option 'sparse'. Known: dtype, provider"):
        pruned.export(tmp_path / "a.onnx", sparse="on")
    with pytest.raises(
        BackendError, match=r"no option 'dtpye'; did you mean 'dtype'\? Known: backend, dtype, sparse, "
    ):
        pruned.export(tmp_path / "a.engine", dtpye="float16")
    with pytest.raises(BackendError, match="backend 'torch' builds no engines; tensorrt, tensorrt-rtx do"):
        pruned.export(tmp_path / "a.engine", backend="torch")
    assert pruned.export(tmp_path / "a.onnx").stat().st_size > 0


@pytest.fixture
def saved(pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pruned.save("small")


@builds
@pytest.mark.usefixtures("saved")
def test_the_command_writes_engines_and_tells_about_them() -> None:
    options = "--engine a.engine --onnx a.onnx --compute-capability 8.6 --compute-capability 8.9 --dtype float16"
    done = CliRunner().invoke(app, ["export", "small", *options.split(), "--sparse", "--batch", "1:2:4"])
    assert done.exit_code == 0, done.output
    for text in (
        "8.6, 8.9",
        "float16",
        "2:4 weights in 0 of 2 layers",
        "wrote  a.engine (",
        "wrote  a.onnx (",
        "best (2, 8)",
    ):
        assert text in done.stdout
    assert "the same elsewhere: tensorrt_rtx --onnx=a.onnx --saveEngine=a.engine" in done.stdout
    again = CliRunner().invoke(app, ["export", "small", "--engine", "b.engine", "--json"])
    data = json.loads(again.stdout)
    assert data["engine"]["dtype"] == "float32" and data["engine"]["layers"]
    assert set(data["files"]) == {"b.engine", "b.engine.json"}
    plain = CliRunner().invoke(app, ["export", "small", "--onnx", "b.onnx", "--json"])
    assert list(json.loads(plain.stdout)["files"]) == ["b.onnx"]


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize(
    ("code", "message", "options"),
    [
        (3, "nothing to write: pass --onnx FILE.onnx, --engine FILE.engine, or both", ""),
        (3, "--dtype are about an engine", "--onnx a.onnx --dtype float16"),
        (3, "--engine a.plan: the name must end in .engine", "--engine a.plan"),
        (3, "--batch many: write a number", "--engine a.engine --batch many"),
        (8, "dtype is one of float32, float16, bfloat16, not 'int3'", "--engine a.engine --dtype int3"),
        (8, "backend 'torch' builds no engines", "--engine a.engine --backend torch"),
        (9, "'taken.engine' exists; pass --overwrite", "--engine taken.engine"),
    ],
)
def test_the_command_refuses(code: int, message: str, options: str) -> None:
    Path("taken.engine").write_text("mine")
    done = CliRunner().invoke(app, ["export", "small", *options.split()])
    assert (done.exit_code, message in " ".join(done.stderr.split())) == (code, True), done.stderr


def test_importing_the_backends_imports_neither_library() -> None:
    code = "import sys, fxprune.cli; print(*{'tensorrt', 'tensorrt_rtx', 'onnx_ir'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.strip() == ""
