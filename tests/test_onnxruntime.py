"""The onnxruntime backend: files and what is in them, sessions, dynamic sizes, types, fusion, profiles."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import fxprune
from fxprune import cli
from fxprune.backends import BACKENDS, onnx_export, onnxfile, onnxruntime
from fxprune.backends.base import compare_outputs
from fxprune.backends.onnx_cast import compute_in
from fxprune.backends.onnx_profile import file_inputs
from fxprune.backends.onnx_session import SessionSettings, session
from fxprune.errors import BackendError, InputError
from fxprune.saved import load_pruned

# When a module with a tree specification is copied.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")

THREADS = 2


needs_onnxruntime = pytest.mark.skipif(
    BACKENDS["onnxruntime"].available() is not None, reason=str(BACKENDS["onnxruntime"].available())
)


class Nested(nn.Module):
    """Tensors inside containers, constants between them, an unused input, an input that is an output."""

    def forward(
        self, x: Tensor, *more: Tensor, options: dict[str, Any], unused: Tensor | None = None
    ) -> tuple[Any, ...]:
        return x, (x + more[0]) * options["factor"], options["mask"], None


class Unlucky(nn.Module):
    """Cannot be exported, and talks about it."""

    def forward(self, x: Tensor) -> Tensor:
        print("here it comes")
        warnings.warn("some advice", stacklevel=1)
        logging.getLogger("torch.onnx").warning("a log line")
        return torch.linalg.eigvals(x).real


class FixedBatch(nn.Module):
    """Works for a batch of two alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 3) * 2


class Noisy(nn.Module):
    """Gives something else every time."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(3)


def build(module: nn.Module, *args: Any, **options: Any) -> Any:
    kwargs = options.pop("kwargs", {})
    return BACKENDS["onnxruntime"].build(module, args, kwargs, threads=THREADS, **options)


@needs_onnxruntime
def test_nested_arguments_become_named_inputs() -> None:
    import onnxruntime as ort

    x = torch.randn(2, 3)
    given = {"options": {"factor": 3, "mask": x.bool()}, "unused": x + 1}
    built = build(Nested(), x, x + 2, kwargs=given)
    names = [(entry.name, entry.shape) for entry in built._session.get_inputs()]
    assert names == [(name, ["batch", 3]) for name in ("x", "more_0", "options_mask", "unused")]
    assert isinstance(built._session, ort.InferenceSession)
    assert len(built.run(x, x + 2, **given)) == 3
    # A dictionary in another order is the same dictionary.
    swapped = {"options": {"mask": x.bool(), "factor": 3}, "unused": x + 1}
    assert compare_outputs(built.run(x, x + 2, **given), built.run(x, x + 2, **swapped)).max_abs == 0
    with pytest.raises(BackendError, match=r"constants \{'options_factor': 3\}.*constants \{'options_factor': 4\}"):
        built.run(x, x + 2, options={"factor": 4, "mask": x.bool()}, unused=x)


@needs_onnxruntime
def test_the_session_has_the_options_that_were_asked_for(tmp_path: Path) -> None:
    import onnxruntime as ort

    path, optimized = tmp_path / "new" / "model.onnx", tmp_path / "optimized.onnx"
    onnx_export.export(nn.Linear(3, 4), (torch.randn(2, 3),), None, path)
    opened = session(path, SessionSettings(optimized=optimized))
    options = opened.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    assert options.execution_mode == ort.ExecutionMode.ORT_SEQUENTIAL
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert opened.get_providers() == ["CPUExecutionProvider"]
    assert optimized.exists()


@needs_onnxruntime
def test_denormal_numbers_are_zero_there_and_nowhere_else() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0.1 * 1e10

    tiny = torch.full((4, 3), 1e-38)
    runner = BACKENDS["onnxruntime"].build(Net(), (torch.ones(4, 3),), threads=1)
    assert torch.equal(runner.run(tiny)[0], torch.zeros(4, 3))
    assert (tiny * 0.1).min() > 0
    runner.bind(tiny)()
    assert (tiny * 0.1).min() > 0


@needs_onnxruntime
def test_another_provider_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    path = tmp_path / "model.onnx"
    onnx_export.export(nn.Linear(3, 4), (torch.randn(2, 3),), None, path)
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda self: ["OtherExecutionProvider"])
    with pytest.raises(BackendError, match=r"runs model.onnx on \['OtherExecutionProvider'\] instead of"):
        session(path, SessionSettings())


@needs_onnxruntime
def test_the_file_is_kept_where_asked_and_removed_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    layer = nn.Sequential(nn.Linear(3, 4))
    kept = build(layer, torch.randn(2, 3), path=tmp_path / "model.onnx")
    assert kept.path == tmp_path / "model.onnx"
    assert {entry.name for entry in onnx.load(kept.path).graph.initializer} == {"0.weight", "0.bias"}
    other = build(layer, torch.randn(2, 3))
    assert other.path is None
    assert any((tmp_path / "temporary").iterdir())
    del other
    with pytest.raises(BackendError):
        build(Noisy(), torch.randn(2, 3))
    assert not any((tmp_path / "temporary").iterdir())


@needs_onnxruntime
def test_large_weights_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The limit, lowered: two gigabytes are too much for a test.
    monkeypatch.setattr(onnxfile, "LARGE", 100)
    layer = nn.Linear(300, 200)
    built = build(layer, torch.randn(2, 300), path=tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size >= 300 * 200 * 4
    x = torch.randn(3, 300)
    assert compare_outputs([layer(x)], built.run(x)).max_rel < 1e-4
    build(nn.Linear(3, 2), torch.randn(2, 3), path=tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]  # what the large model left there is gone


@needs_onnxruntime
def test_a_good_export_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(
            Nested(), torch.randn(2, 3), torch.randn(2, 3), kwargs={"options": {"factor": 1, "mask": torch.ones(2, 1)}}
        )
    assert capfd.readouterr() == ("", "")
    assert not caught


@needs_onnxruntime
@pytest.mark.parametrize(("heads", "fused"), [(2, True), (1, False), (4, False)])
def test_attention_is_one_operator_where_onnx_has_it(tmp_path: Path, heads: int, fused: bool) -> None:
    """Keys that broadcast over heads, and as many groups as heads, have no such operator."""
    inputs = (torch.randn(2, 4, 5, 8), torch.randn(2, heads, 5, 8))

    class Net(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, k, enable_gqa=heads > 1)

    onnx_export.export(Net(), inputs, {}, tmp_path / "net.onnx")
    operators = {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}
    assert ("Attention" in operators) == fused
    assert BACKENDS["onnxruntime"].build(Net(), inputs, threads=1).parity.max_rel < 1e-5


def test_a_row_that_is_wholly_masked_attends_to_nothing() -> None:
    class Net(nn.Module):
        def forward(self, q: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    mask = torch.rand(2, 1, 5, 5) > 0.3
    mask[0, 0, 2] = False
    inputs = (torch.randn(2, 3, 5, 8), mask)
    (found,) = BACKENDS["onnxruntime"].build(Net(), inputs, threads=1).run(*inputs)
    assert torch.equal(found[0, :, 2], torch.zeros(3, 8))
    torch.testing.assert_close(found, Net()(*inputs), rtol=1e-4, atol=1e-5)


def test_an_operator_that_is_missing_in_the_later_set_keeps_attention_in_pieces(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q) + 0 * torch.rand_like(q)

    x = torch.randn(2, 4, 5, 8)
    onnx_export.export(Net(), (x,), {}, tmp_path / "net.onnx")
    assert "Softmax" in {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert BACKENDS["onnxruntime"].build(Net(), (x,), threads=1).parity.max_rel < 1e-5


def test_a_failed_export_tells_what_the_exporter_said(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError) as caught:
        build(Unlucky(), torch.randn(2, 3, 3))
    message = str(caught.value)
    assert message.startswith("torch.onnx.export failed for Unlucky: ")
    assert "linalg_eig" in message
    assert "here it comes" in message
    assert "UserWarning: some advice" in message
    assert capfd.readouterr() == ("", "")


@needs_onnxruntime
def test_a_batch_that_cannot_be_dynamic_is_said_and_can_be_fixed() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(BackendError, match=r"(?s)inferred a static shape of 2.*build with dynamic=False"):
        build(FixedBatch(), x)
    assert torch.equal(build(FixedBatch(), x, dynamic=False).run(x)[0], x * 2)


@needs_onnxruntime
def test_what_computes_something_else_is_refused() -> None:
    with pytest.raises(
        BackendError, match=r"does not compute what Noisy computes: relative difference .* allowed 0\.001"
    ):
        build(Noisy(), torch.randn(2, 3))


@needs_onnxruntime
def test_types_that_onnxruntime_lacks_are_an_error_not_a_crash() -> None:
    with pytest.raises(BackendError, match="onnxruntime cannot"):
        build(nn.Linear(3, 4).bfloat16(), torch.randn(2, 3).bfloat16())


@needs_onnxruntime
def test_no_batch_dimension_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no batch dimension; pass one, or dynamic=False"):
        build(nn.ReLU(), torch.tensor(1.0))


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = onnxruntime.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else found(name))
    assert BACKENDS["onnxruntime"].available() == "onnxscript not installed; pip install 'fxprune[onnx]'"


def test_the_preferred_multiple_follows_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, multiple in {"AVX512": 16, "AVX2": 8, "DEFAULT": 8}.items():
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert BACKENDS["onnxruntime"].preferred_multiple == multiple


@pytest.mark.slow
@needs_onnxruntime
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "bert"])
def test_real_models(name: str) -> None:
    if name == "bert":
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
        model = transformers.BertForSequenceClassification(config).eval()
        ids = torch.randint(0, 64, (1, 12))
        built = build(model, ids, kwargs={"attention_mask": torch.ones_like(ids)})
        more = torch.randint(0, 64, (3, 12))
        outputs = built.run(more, attention_mask=torch.ones_like(more))
        reference = model(more, attention_mask=torch.ones_like(more)).logits
    else:
        model = pytest.importorskip("timm").create_model(name).eval()
        built = build(model, torch.randn(1, 3, 224, 224))
        more = torch.randn(3, 3, 224, 224)
        outputs, reference = built.run(more), model(more)
    assert compare_outputs([reference], outputs).max_rel < 1e-4


# ------------------------------------------------------------------------------------------------------ dynamic sizes
SEQUENCE = {"x": {0: "batch", 1: "sequence"}, "mask": {0: "batch", 1: "sequence"}}


class Encoder(nn.Module):
    """A transformer layer and a head, with a mask of padding: heads of its own number, names as libraries have them."""

    def __init__(self, heads: int = 4, head: int = 8, width: int = 32) -> None:
        super().__init__()
        self.heads, self.head = heads, head
        self.query, self.key, self.value = (nn.Linear(width, heads * head) for _ in range(3))
        self.out, self.norm = nn.Linear(heads * head, width), nn.LayerNorm(width)
        self.first, self.second, self.last = nn.Linear(width, 64), nn.Linear(64, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.view(t.shape[0], t.shape[1], -1, self.head).transpose(1, 2)

        q, k, v = (split(layer(x)) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = self.norm(x + self.out(y.transpose(1, 2).flatten(2)))
        return self.last(x + self.second(F.gelu(self.first(x))))


def texts(batch: int, length: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, length // 2 :] = False
    return torch.randn(batch, length, 32), mask


@pytest.fixture(scope="module")
def small() -> fxprune.Pruned:
    """Half an encoder, its sequence dynamic."""
    torch.manual_seed(0)
    model = Encoder().eval()
    return fxprune.compile(model, texts(2, 12), target={"macs": 0.5}, dynamic_shapes=SEQUENCE, proof="quick")


def shapes(path: Path) -> dict[str, list[Any]]:
    """Input name -> sizes, of a file."""
    return {i.name: list(i.shape) for i in file_inputs(path)}


@needs_onnxruntime
def test_a_pruned_model_keeps_its_dynamic_sequence(small: fxprune.Pruned, tmp_path: Path) -> None:
    path = small.export(tmp_path / "small.onnx")
    assert shapes(path) == {"x": ["batch", "sequence", 32], "mask": ["batch", "sequence"]}
    assert "Attention" in {node.op_type for node in onnx.load(path).graph.node}
    opened = session(path, SessionSettings())
    for batch, length in ((1, 5), (3, 40)):
        x, mask = texts(batch, length)
        (found,) = opened.run(None, {"x": x.numpy(), "mask": mask.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), small.module(x, mask), rtol=1e-4, atol=1e-5)


@needs_onnxruntime
def test_a_loaded_model_does_too(small: fxprune.Pruned, tmp_path: Path) -> None:
    folder = small.save(tmp_path / "small")
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"batch_dynamic": True}))  # as fxprune wrote before
    path = load_pruned(folder).export(tmp_path / "small.onnx")
    assert shapes(path) == {"x": ["batch", "sequence", 32], "mask": ["batch", "sequence"]}


@needs_onnxruntime
def test_measuring_against_a_dense_model_with_other_names(small: fxprune.Pruned) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder().eval()

        def forward(self, *inputs: Tensor) -> Tensor:
            return self.encoder(*inputs)

    assert small.measure(Wrapped(), rounds=6, threads=1).speedup > 0
    small.report.latency.clear()


class Rich(nn.Module):
    """Inputs of every kind: in containers, of `*more` and of `**rest`, with a name that one of them could take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor, *more: Any, options: dict[str, Any], flag: bool = True, **rest: Tensor) -> Tensor:
        y = x + more[0]["k"] + more[1] + options["m"][0] + rest["z"]
        return self.second(self.first(y).relu())


@needs_onnxruntime
def test_nested_and_keyword_inputs_of_a_pruned_model(tmp_path: Path) -> None:
    def value() -> Tensor:
        return torch.randn(2, 5, 8)

    args, kwargs = (value(), {"k": value()}, value()), {"z": value(), "options": {"m": [value()]}}
    names = ["x", "more_0_k", "more_1", "z", "options_m_0"]
    spec = {name: {0: "batch", 1: "length"} for name in names}
    pruned = fxprune.compile(Rich(), args, kwargs=kwargs, target={"macs": 0.5}, dynamic_shapes=spec, proof="quick")
    assert pruned.plan.dynamic == spec
    path = pruned.export(tmp_path / "rich.onnx")
    assert shapes(path) == {name: ["batch", "length", 8] for name in names}
    # The dense model's file has the same inputs, in the order of its own signature.
    dense = build(Rich(), *args, kwargs=kwargs, dynamic=spec, path=tmp_path / "dense.onnx")
    assert sorted(shapes(dense.path)) == sorted(names)
    assert pruned.measure(rounds=6, threads=1).rounds == 6


@needs_onnxruntime
@pytest.mark.parametrize("dynamic", [False, {}, {"input": {}}])
def test_nothing_need_be_dynamic(dynamic: Any, tmp_path: Path) -> None:
    built = build(nn.Linear(3, 4), torch.randn(2, 3), dynamic=dynamic, path=tmp_path / "a")
    assert shapes(built.path) == {"input": [2, 3]}


def test_what_cannot_be_dynamic_is_said() -> None:
    x = torch.randn(2, 3)
    for dynamic, message in (
        ({"y": {0: "batch"}}, "'y' cannot be dynamic: the tensor inputs are x, more_0"),
        ({"x": {2: "batch"}}, "dimension 2 of 'x' cannot be dynamic: it has 2"),
        ({"x": {0: "n", 1: "n"}}, "the size 'n' is 2 elsewhere but 3 in dimension 1 of 'x'; give example inputs"),
    ):
        with pytest.raises(InputError, match=message):
            build(Nested(), x, x, kwargs={"options": {"factor": 1, "mask": None}}, dynamic=dynamic)


# -------------------------------------------------------------------------------------------------------------- types
class Upsampled(nn.Module):
    """What float16 is difficult for: scales of a resize, a range, a tiny number, the lowest number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = F.interpolate(self.norm(self.conv(x)), scale_factor=2.0, mode="bilinear")
        y = y / (y.norm(dim=1, keepdim=True) + 1e-12) * torch.arange(1.0, y.shape[-1] + 1)
        lowest = torch.finfo(torch.float32).min
        hidden = torch.where(torch.arange(y.shape[-1]) < 2, lowest, 0.0)
        return y.mean(1), y > 0, (hidden + y).softmax(-1).mean((1, 2))


@needs_onnxruntime
def test_float16_inside_and_float32_outside(tmp_path: Path) -> None:
    backend = BACKENDS["onnxruntime"].configured(dtype="float16")
    built = backend.build(Upsampled(), (torch.randn(2, 3, 8, 8),), threads=1, path=tmp_path / "a.onnx")
    graph = onnx.load(built.path).graph
    assert {onnx.TensorProto.DataType.Name(w.data_type) for w in graph.initializer} == {"FLOAT16", "INT64"}
    assert [i.type for i in built._session.get_inputs()] == ["tensor(float)"]
    assert [o.type for o in built._session.get_outputs()] == ["tensor(float)", "tensor(bool)", "tensor(float)"]
    told = built.describe()
    assert (told["dtype"], told["tolerance"]) == ("float16", 0.02)
    assert 1e-5 < told["parity"]["max_rel"] < 0.02
    assert all(torch.isfinite(output.float()).all() for output in built.run(torch.randn(3, 3, 8, 8)))


@needs_onnxruntime
def test_attention_in_float16_stays_one_operator(
    small: fxprune.Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small.export(tmp_path / "half.onnx", dtype="float16")
    assert path.stat().st_size < 0.8 * small.export(tmp_path / "whole.onnx").stat().st_size
    monkeypatch.setitem(small.report.recipe, "backend", {"name": "onnxruntime", "dtype": "float16"})
    assert small.export(tmp_path / "measured.onnx").read_bytes() == path.read_bytes()
    assert small.export(tmp_path / "single.onnx", dtype="float32").stat().st_size > path.stat().st_size / 0.8
    assert "Attention" in {node.op_type for node in onnx.load(path).graph.node}
    assert shapes(path) == {"x": ["batch", "sequence", 32], "mask": ["batch", "sequence"]}


@needs_onnxruntime
def test_kernels_that_are_missing_are_named_in_the_words_of_onnxruntime() -> None:
    backend = BACKENDS["onnxruntime"].configured(dtype="bfloat16")
    with pytest.raises(BackendError) as caught:
        backend.build(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), (torch.randn(1, 3, 4, 4),), threads=1)
    assert "NOT_IMPLEMENTED : Could not find an implementation" in str(caught.value)
    assert "The provider 'cpu' may lack kernels in bfloat16; take another dtype" in str(caught.value)


def ir_of(text: str) -> onnx_ir.Model:
    return onnx_ir.serde.deserialize_model(onnx.parser.parse_model(text))


@needs_onnxruntime
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_casts_stand_where_an_operator_takes_float32_alone(dtype: str) -> None:
    """Whatever stays float32 is cast before it is read; a value that is an output, too, keeps its name."""
    model = ir_of(
        """<ir_version: 8, opset_import: ["" : 20]> net (float[N, 4] x, float last) => (float[N, 4] y, float[N] z) {
            first = Constant <value_float = 0.0> ()
            step = Constant <value_float = 1.0> ()
            ends = Range(first, last, step)
            h = Mul(x, ends)
            y = Relu(h)
            axes = Constant <value_ints = [1]> ()
            z = ReduceSum <keepdims = 0> (y, axes)
        }"""
    )
    compute_in(model, dtype)
    proto = onnx_ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    assert [o.name for o in proto.graph.output] == ["y", "z"]
    (reach,) = (node for node in model.graph if node.op_type == "Range")
    assert {value.dtype.name for value in reach.inputs if value is not None} == {"FLOAT"}
    (product,) = (node for node in model.graph if node.op_type == "Mul")
    assert {value.dtype.name for value in product.inputs if value is not None} == {dtype.upper()}


@needs_onnxruntime
def test_branches_and_operators_of_others_are_refused_in_half_precision() -> None:
    branch = "g () => (float[N] a) { a = Identity(x) }"
    lines = {
        "does not reach into the branches": f"y = If (c) <then_branch = {branch}, else_branch = {branch}>",
        "the operator other::Thing is not in onnx's set 1": "y = other.Thing(x)",
    }
    for message, line in lines.items():
        head = '<ir_version: 8, opset_import: ["" : 20, "other" : 1]> net (float[N] x, bool c) => (float[N] y)'
        model = ir_of(f"{head} {{ {line} }}")
        with pytest.raises(BackendError, match=message):
            compute_in(model, "float16")


def test_options_are_known_by_name(small: fxprune.Pruned, tmp_path: Path) -> None:
    known = "Known: dtype, provider, fusion, keep_optimized"
    with pytest.raises(BackendError, match=f"backend 'onnxruntime' has no option 'fuson'; did you mean.*{known}"):
        small.export(tmp_path / "small.onnx", fuson="transformer")
    assert not any(tmp_path.iterdir())


@needs_onnxruntime
@pytest.mark.parametrize(("provider", "name"), [("cuda", "CUDA"), ("tensorrt", "Tensorrt")])
def test_a_provider_that_is_missing_is_said(provider: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    backend = BACKENDS["onnxruntime"].configured(provider=provider)
    assert backend.preferred_multiple == 8
    message = rf"has no {name}ExecutionProvider \(it has CPUExecutionProvider\); .* install onnxruntime-gpu"
    with pytest.raises(BackendError, match=rf"backend 'onnxruntime' cannot be used here: this onnxruntime {message}"):
        backend.build(nn.Linear(2, 2), (torch.zeros(1, 2),), threads=1)


# ------------------------------------------------------------------------------------------------------------- fusion
@needs_onnxruntime
def test_the_transformer_optimizer_fuses_what_it_knows(small: fxprune.Pruned, tmp_path: Path) -> None:
    backend = BACKENDS["onnxruntime"].configured(fusion="transformer")
    x, mask = texts(2, 12)
    built = backend.build(small.module, (x, mask), threads=1, dynamic=small.plan.dynamic, path=tmp_path / "a.onnx")
    told = built.describe()
    assert told["fused"]["SkipLayerNormalization"] == 2
    assert told["fused"]["BiasGelu"] == 1
    assert told["parity"]["max_rel"] < 1e-4
    assert shapes(built.path) == {"x": ["batch", "sequence", 32], "mask": ["batch", "sequence"]}
    operators = {node.op_type for node in onnx.load(built.path).graph.node}
    assert {"SkipLayerNormalization", "BiasGelu"} <= operators


class Unmasked(Encoder):
    """The same without a mask."""

    scale: float | None = None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        def split(t: Tensor) -> Tensor:
            return t.view(t.shape[0], t.shape[1], self.heads, self.head).transpose(1, 2)

        q, k, v = (split(layer(x)) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        x = self.norm(x + self.out(y.transpose(1, 2).flatten(2)))
        return self.last(x + self.second(F.gelu(self.first(x))))


@needs_onnxruntime
def test_heads_are_inferred_for_each_layer(tmp_path: Path) -> None:
    """Layers of a pruned model have unequal numbers of them, and inner widths other than the outer one."""
    net = nn.Sequential(nn.LayerNorm(32), Unmasked(heads=2), Unmasked(heads=3), Unmasked(heads=1, head=16))
    backend = BACKENDS["onnxruntime"].configured(fusion="transformer")
    built = backend.build(net, (torch.randn(2, 6, 32),), threads=1, path=tmp_path / "a.onnx")
    told = built.describe()
    assert told["fused"]["Attention"] == 3
    found = [n for n in onnx.load(built.path).graph.node if n.op_type == "Attention"]
    assert [a.i for n in found for a in n.attribute if a.name == "num_heads"] == [2, 3, 1]
    assert told["parity"]["max_rel"] < 1e-4
    # onnxruntime's operator would divide by the root of the head size all the same.
    net[1].scale = 0.3
    told = backend.build(net, (torch.randn(2, 6, 32),), threads=1).describe()
    assert "Attention" not in told["fused"]
    assert told["parity"]["max_rel"] < 1e-4


@needs_onnxruntime
def test_it_says_so_where_it_knows_nothing() -> None:
    built = (
        BACKENDS["onnxruntime"]
        .configured(fusion="transformer")
        .build(nn.Conv2d(3, 4, 1), (torch.randn(1, 3, 4, 4),), threads=1)
    )
    assert built.describe()["fused"] == "nothing: the transformer optimizer knows no pattern in this graph"


# ------------------------------------------------------------------------------------------- the graph that really runs
@needs_onnxruntime
def test_the_optimised_graph_is_kept_beside_the_file(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4))
    pruned = fxprune.compile(net, torch.randn(2, 3, 8, 8), target={"macs": 0.9}, proof="quick")
    path = pruned.export(tmp_path / "net.onnx", keep_optimized=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.optimized.onnx"]
    operators = [node.op_type for node in onnx.load(path).graph.node]
    really = [node.op_type for node in onnx.load(tmp_path / "net.optimized.onnx").graph.node]
    assert "Relu" in operators and "Relu" not in really and "Conv" in really


@needs_onnxruntime
def test_files_hold_no_path_of_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx_export.export(nn.Linear(3, 4), (torch.randn(2, 3),), None, path)
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()
    assert str(Path(__file__).parent.parent).encode() not in path.read_bytes()


@needs_onnxruntime
@pytest.mark.parametrize("options", [{}, {"fusion": "transformer"}, {"dtype": "float16"}])
def test_everything_works_with_weights_beside_the_file(
    small: fxprune.Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    monkeypatch.setattr(onnxfile, "LARGE", 100)
    backend = BACKENDS["onnxruntime"].configured(keep_optimized=True, **options)
    x, mask = texts(2, 12)
    path = tmp_path / "a.onnx"
    built = backend.build(small.module, (x, mask), threads=1, dynamic=small.plan.dynamic, path=path)
    files = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert set(files) == {"a.onnx", "a.onnx.data", "a.optimized.onnx", "a.optimized.onnx.data"}
    weights = sum(p.numel() for p in small.module.parameters()) * (2 if options.get("dtype") else 4)
    assert weights * 0.9 < files["a.onnx.data"] < weights * 1.2
    assert built.profile(x, mask, runs=2).nodes
    feeds = {"x": x.numpy(), "mask": mask.numpy()}
    (found,) = session(path, SessionSettings()).run(None, feeds)
    torch.testing.assert_close(torch.from_numpy(found), built.run(x, mask)[0])
    (really,) = session(tmp_path / "a.optimized.onnx", SessionSettings()).run(None, feeds)
    torch.testing.assert_close(torch.from_numpy(really), torch.from_numpy(found))


# ----------------------------------------------------------------------------------------------------------- profiles
@needs_onnxruntime
def test_a_profile_names_nodes_and_their_modules() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.MaxPool2d(2), nn.Flatten()
    )
    x = torch.randn(2, 3, 16, 16)
    built = build(nn.Sequential(net, nn.Linear(32 * 36, 4)), x)
    found = built.profile(x, runs=5)
    assert found.runs == 5
    modules = {(n.operator, n.module) for n in found.nodes}
    assert {("Conv", "0.0"), ("Conv", "0.3"), ("MaxPool", "0.4"), ("Gemm", "1")} <= modules
    assert [n.microseconds for n in found.nodes] == sorted((n.microseconds for n in found.nodes), reverse=True)
    assert sum(n.share for n in found.nodes) == pytest.approx(1)
    assert sum(found.by_operator().values()) == pytest.approx(found.microseconds)
    data = json.loads(json.dumps(found.to_json()))
    assert data["nodes"][0].keys() == {"name", "operator", "module", "microseconds", "share"}
    assert found.table("title", top=2).row_count == 2
    with pytest.raises(BackendError, match="a profile of 0 runs has no median; take 1 or more"):
        built.profile(x, runs=0)
    with pytest.raises(BackendError, match=r"onnxruntime cannot run model\.onnx on these arguments"):
        built.profile(torch.randn(2, 4, 16, 16), runs=1)


@needs_onnxruntime
def test_a_part_has_no_profile() -> None:
    x = torch.randn(2, 3)
    part, _ = BACKENDS["onnxruntime"].build_parts([(nn.Linear(3, 4), [x]), (nn.ReLU(), [x])], threads=1)
    with pytest.raises(BackendError, match="built as one of several parts has no file to profile; build it alone"):
        part.profile(x)


@needs_onnxruntime
def test_a_file_that_is_no_onnx_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("no model")
    with pytest.raises(BackendError, match="cannot be read as an ONNX file"):
        file_inputs(tmp_path / "a.onnx")


# -------------------------------------------------------------------------------------------------- `fxprune profile`
def run_cli(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["profile", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


@needs_onnxruntime
def test_the_command_profiles_saved_models_and_files(small: fxprune.Pruned, tmp_path: Path) -> None:
    folder, file = small.save(tmp_path / "small"), small.export(tmp_path / "small.onnx")
    shown = run_cli(str(folder), "--threads", "1", "--runs", "3", "--top", "2")
    assert "medians of 3 runs" in shown and "module" in shown
    sizes = ("--input", "x=2x8x32", "--input", "mask=2x8:bool")
    data = json.loads(run_cli(str(folder), "--against", str(file), "--json", *sizes, "--runs", "2"))
    assert set(data["profiles"]) == {str(folder), str(file)}
    assert data["against"] == str(file)
    shown = run_cli(str(file), "--against", str(folder), *sizes, "--runs", "2", "--option", "fusion=transformer")
    assert "By type of node" in shown and "SkipLayerNormalization" in shown


@needs_onnxruntime
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gone.onnx"], 3, "'gone.onnx' does not exist"),
        (["FILE"], 3, "the sizes sequence of the input 'x' are open; give its shape, for example --input x=1x16x32"),
        (["FILE", "--input", "y=1x2"], 3, "--input y: the inputs of"),
        (["FILE", "--option", "dtype"], 8, "--option dtype: write KEY=VALUE"),
        (["FILE", "--option", "dtpye=float16"], 8, "has no option 'dtpye'; did you mean 'dtype'"),
    ],
)
def test_what_the_command_refuses(
    small: fxprune.Pruned, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    if "FILE" in arguments:
        file = small.export(tmp_path / "small.onnx")
        arguments = [str(file) if a == "FILE" else a for a in arguments]
    assert message in run_cli(*arguments, code=code).replace("\n", " ")
