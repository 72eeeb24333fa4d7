"""One conformance suite for every registered backend, then what is particular to one of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.backends import BACKENDS, Backend, chosen
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
    built = backend.build(net, arguments(2), {"scale": 2.0}, threads=THREADS, dynamic=True)
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
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        runner.run(*arguments(2), scale=2.0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


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


# -------------------------------------------------------------------------------------------------------------- torch


def test_threads_are_set_while_it_runs() -> None:
    seen: list[int] = []

    class Count(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return x

    before = torch.get_num_threads()
    built = BACKENDS["torch"].build(Count(), (torch.ones(1),), threads=3)
    seen.clear()
    built.run(torch.ones(1))
    assert (seen, torch.get_num_threads()) == ([3], before)


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
