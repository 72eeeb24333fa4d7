"""One conformance suite for every registered backend, then what is particular to one of them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.backends import BACKENDS, Backend, chosen, onnxruntime
from fxprune.backends import torch as torch_backend
from fxprune.backends.base import TOLERANCE, compare_outputs, inference_copy
from fxprune.errors import BackendError, InputError

THREADS = 2


class Net(nn.Module):
    """Convolution, batch norm, dropout, attention; two tensor inputs, a constant, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, image: Tensor, bias: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        x = self.drop(self.norm(self.conv(image)).relu()).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return {"logits": self.head(x.mean(1)) * scale + bias, "hidden": [x, None]}


def arguments(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 6, 6), torch.randn(batch, 5)


def expected(net: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    with torch.no_grad():
        result = inference_copy(net)(*args, **kwargs)
    return [result["logits"], result["hidden"][0]]


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module", params=BACKENDS.names())
def backend(request: pytest.FixtureRequest) -> Backend:
    found = BACKENDS[request.param]
    if (reason := found.available()) is not None:
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def runner(backend: Backend, net: Net) -> Iterator[Any]:
    torch.manual_seed(1)
    built = backend.build(net, arguments(2), {"scale": 2.0}, threads=THREADS, batch_dynamic=True)
    yield built
    torch._dynamo.reset()


@pytest.mark.parametrize("batch", [2, 1, 5])
def test_parity_with_torch_at_any_batch_size(runner: Any, net: Net, batch: int) -> None:
    args = arguments(batch)
    outputs = runner.run(*args, scale=2.0)
    assert [output.shape for output in outputs] == [(batch, 5), (batch, 36, 16)]
    assert compare_outputs(expected(net, *args, scale=2.0), outputs).max_rel < 1e-4


def test_repeats_are_stable(runner: Any) -> None:
    args = arguments(2)
    first = runner.run(*args, scale=2.0)
    for _ in range(3):
        again = runner.run(*args, scale=2.0)
        assert compare_outputs(first, again).max_rel < 1e-6
    # An output must not be memory that the next call overwrites.
    kept = [output.clone() for output in first]
    runner.run(*arguments(2), scale=2.0)
    assert all(torch.equal(output, copy) for output, copy in zip(first, kept, strict=True))


def test_arguments_may_be_named(runner: Any, net: Net) -> None:
    image, bias = arguments(2)
    outputs = runner.run(bias=bias, image=image, scale=2.0)
    assert compare_outputs(expected(net, image, bias, scale=2.0), outputs).max_rel < 1e-4


def test_description_is_json_and_names_what_matters(runner: Any, backend: Backend) -> None:
    told = json.loads(json.dumps(runner.describe()))
    assert told["backend"] == backend.name
    assert told["threads"] == THREADS
    assert told["versions"]["torch"] == torch.__version__
    assert 0 <= told["parity"]["max_rel"] <= TOLERANCE


def test_runner_rejects_wrong_shapes(runner: Any) -> None:
    image, bias = arguments(2)
    with pytest.raises(BackendError):
        runner.run(image[:, :2], bias, scale=2.0)


def test_a_bound_call_runs_again_and_again(runner: Any) -> None:
    image, bias = arguments(3)
    call = runner.bind(image.permute(0, 1, 3, 2), bias, scale=2.0)
    call()
    call()
    with pytest.raises(BackendError):
        runner.bind(image[:, :2], bias, scale=2.0)()


def test_the_module_is_left_as_it_was(runner: Any, net: Net) -> None:
    assert all(module.training for module in net.modules())
    assert all(tensor.grad is None and tensor.requires_grad for tensor in net.parameters())


def test_a_batch_of_one_stays_dynamic(backend: Backend) -> None:
    layer = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(32, 4))
    built = backend.build(layer, (torch.randn(1, 3, 2, 2),), threads=THREADS)
    image = torch.randn(4, 3, 2, 2)
    assert compare_outputs([layer(image)], built.run(image)).max_rel < 1e-4


def test_threads_are_put_back(runner: Any) -> None:
    try:
        torch.set_num_threads(1)
        runner.run(*arguments(2), scale=2.0)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(2)


def test_preferred_multiple_is_a_power_of_two(backend: Backend) -> None:
    assert backend.preferred_multiple in (4, 8, 16, 32, 64)


def test_parts_built_together_are_those_built_alone(backend: Backend) -> None:
    """Also where two parts read one tensor, where one has two inputs or two outputs, and with numbers as inputs."""

    class Both(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x + y, x * y

    torch.manual_seed(0)
    x, ids = torch.randn(3, 4), torch.randint(0, 9, (3, 4))
    parts = [(nn.Linear(4, 5), [x]), (Both(), [x, torch.randn(3, 4)]), (nn.Embedding(9, 2), [ids]), (nn.ReLU(), [x])]
    for (module, tensors), runner in zip(parts, backend.build_parts(parts, threads=1), strict=True):
        with torch.no_grad():
            expected = module(*tensors)
        for a, b in zip(runner.run(*tensors), expected if isinstance(expected, tuple) else [expected], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_arguments_that_do_not_fit_are_refused(backend: Backend) -> None:
    with pytest.raises(InputError, match="the arguments do not fit forward"):
        backend.build(nn.Linear(2, 2), (torch.zeros(1, 2), torch.zeros(1, 2)), threads=THREADS)


def test_no_threads_are_refused(backend: Backend) -> None:
    with pytest.raises(BackendError, match="was asked for 0 threads; pass 1 or more"):
        backend.build(nn.Linear(2, 2), (torch.zeros(1, 2),), threads=0)


@pytest.mark.parametrize("name", BACKENDS.names())
def test_an_unavailable_backend_says_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BACKENDS[name]
    monkeypatch.setattr(type(backend), "available", lambda self: "not installed; pip install it")
    with pytest.raises(BackendError, match=f"backend '{name}' cannot be used here: not installed"):
        backend.build(nn.Linear(2, 2), (torch.zeros(1, 2),), threads=THREADS)


def test_an_unknown_backend_is_answered_with_the_known_ones() -> None:
    with pytest.raises(BackendError, match=r"no backend is called 'onnxrt'.*Known: .*onnxruntime"):
        BACKENDS["onnxrt"]


def test_importing_the_backends_imports_none_of_their_libraries() -> None:
    libraries = {"onnx", "onnxruntime", "onnxscript"}
    code = f"import sys, fxprune.backends; print(*{libraries} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.strip() == ""


# ---------------------------------------------------------------------------------------------------- compare_outputs


def test_equal_infinities_are_no_difference_and_others_are_infinite() -> None:
    masked = torch.tensor([1.0, -torch.inf, torch.nan])
    assert compare_outputs([masked], [masked.clone()]).max_rel == 0
    for other in (torch.nan, torch.inf, 1.0):
        assert compare_outputs([masked], [torch.tensor([1.0, other, torch.nan])]).max_rel == torch.inf
    assert compare_outputs([torch.zeros(2)], [torch.full((2,), torch.nan)]).max_rel == torch.inf


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(BackendError, match=r"other shapes than torch's: \[\(3,\)\] instead of \[\(2,\)\]"):
        compare_outputs([torch.zeros(2)], [torch.zeros(3)])


def test_a_module_that_cannot_be_copied_is_named() -> None:
    layer = nn.Linear(2, 2)
    layer.cache = layer(torch.zeros(1, 2))  # as a forward pass that keeps its result would
    with pytest.raises(BackendError, match=r"Linear cannot be copied: .*delete or detach them"):
        inference_copy(layer)


# -------------------------------------------------------------------------------------------------------- onnxruntime


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
    onnxruntime.export(nn.Linear(3, 4), (torch.randn(2, 3),), None, path)
    opened = onnxruntime.session(path, threads=1, optimized=optimized)
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
    onnxruntime.export(nn.Linear(3, 4), (torch.randn(2, 3),), None, path)
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda self: ["OtherExecutionProvider"])
    with pytest.raises(BackendError, match=r"runs model.onnx on \['OtherExecutionProvider'\] instead of"):
        onnxruntime.session(path, threads=1)


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
    # The exporter's own limit, lowered: two gigabytes are too much for a test.
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 100)
    layer = nn.Linear(300, 200)
    built = build(layer, torch.randn(2, 300), path=tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size >= 300 * 200 * 4
    x = torch.randn(3, 300)
    assert compare_outputs([layer(x)], built.run(x)).max_rel < 1e-4


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

    onnxruntime.export(Net(), inputs, {}, tmp_path / "net.onnx")
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
    onnxruntime.export(Net(), (x,), {}, tmp_path / "net.onnx")
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
    with pytest.raises(BackendError, match=r"(?s)inferred a static shape of 2.*build with batch_dynamic=False"):
        build(FixedBatch(), x)
    assert torch.equal(build(FixedBatch(), x, batch_dynamic=False).run(x)[0], x * 2)


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
    with pytest.raises(InputError, match="no batch dimension; pass one, or batch_dynamic=False"):
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


# -------------------------------------------------------------------------------------------------------------- torch


def test_threads_are_set_while_it_runs() -> None:
    seen: list[int] = []

    class Count(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return x

    built = BACKENDS["torch"].build(Count(), (torch.ones(1),), threads=1)
    seen.clear()
    built.run(torch.ones(1))
    assert (seen, torch.get_num_threads()) == ([1], 2)


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend.shutil, "which", lambda name: None)
    assert BACKENDS["torch"].available() is None
    assert "neither g++ nor clang++ was found" in str(BACKENDS["torch-compile"].available())


# ---------------------------------------------------------------------- options
def test_options_of_a_backend() -> None:
    class Optional(type(BACKENDS["torch"])):  # type: ignore[misc]
        OPTIONS = MappingProxyType({"dtype": ("float32", "bfloat16")})

    plain = Optional("optional", compiled=False)
    half = plain.configured(dtype="bfloat16")
    assert (plain.key, half.key, plain.options) == ("optional", "optional(dtype=bfloat16)", {"dtype": "float32"})
    with pytest.raises(BackendError, match="'optional' has no option 'dtpye'; did you mean 'dtype'"):
        plain.configured(dtpye="bfloat16")
    with pytest.raises(BackendError, match="dtype is one of float32, bfloat16, not 'int3'"):
        plain.configured(dtype="int3")


def test_a_recipe_entry_for_a_backend() -> None:
    assert chosen("torch") is not None
    assert chosen({"name": "torch"}).key == "torch"
    with pytest.raises(BackendError, match="backend is a name or"):
        chosen({"dtype": "float16"})
