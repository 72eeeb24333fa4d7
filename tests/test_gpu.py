"""What only a CUDA device shows: parity there, CUDA graphs, times by events, 2:4 kernels. `make gpu-test`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.backends import BACKENDS, Backend, sparse
from fxprune.backends.base import compare_outputs, inference_copy
from fxprune.backends.place import Placement
from fxprune.errors import BackendError
from fxprune.passes.patterns import pattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # The libraries on a machine with a GPU are not those whose warnings the project knows.
    pytest.mark.filterwarnings("default"),
]
SPARSE = {"device": "cuda", "dtype": "float16", "sparse": "auto"}


class Net(nn.Module):
    """Convolution, batch norm, attention; a mask that is made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3, padding=1)
        self.norm = nn.BatchNorm2d(64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.head = nn.Linear(64, 8)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.conv(image)).relu().flatten(2).transpose(1, 2)
        mask = torch.zeros(x.shape[1], x.shape[1], device=x.device, dtype=x.dtype)
        x = x + self.attention(x, x, x, need_weights=False, attn_mask=mask)[0]
        return self.head(x.mean(1))


def image(batch: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def dense(module: nn.Module, *args: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = inference_copy(module)(*args)
    return result


def usable(name: str, **options: Any) -> Backend:
    backend = BACKENDS[name].configured(**options)
    if (reason := backend.available()) is not None:
        pytest.skip(reason)
    return backend


@pytest.fixture(autouse=True)
def compiled_code_forgotten() -> Iterator[None]:
    yield
    torch.compiler.reset()


def masked(*layers: nn.Module) -> nn.Module:
    net = nn.Sequential(*layers)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            layer.weight.data *= pattern("2:4").mask(layer.weight.data.abs())
    return net


# ---------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("more", [{}, {"channels_last": True}, {"cuda_graphs": True}], ids=str)
@pytest.mark.parametrize("name", ["torch", "torch-compile"])
def test_parity_with_the_cpu(name: str, more: dict[str, bool], dtype: str) -> None:
    net = Net()
    built = usable(name, device="cuda", dtype=dtype, **more).build(net, (image(2),), threads=1)
    for batch in (2, 5):
        x = image(batch)
        (found,) = built.run(x)
        assert found.device.type == "cpu" and found.dtype == torch.float32
        assert compare_outputs([dense(net, x)], [found]).max_rel <= built.describe()["tolerance"]
    told = json.loads(json.dumps(built.describe()))
    assert (told["provider"], told["dtype"], told["gpu"]) == ("cuda", dtype, torch.cuda.get_device_name())
    assert net.head.weight.device.type == "cpu"


def test_a_package_compiled_ahead_of_time(tmp_path: Path) -> None:
    net = Net()
    backend = usable("torch-aot", device="cuda", dtype="float16")
    built = backend.build(net, (image(2),), threads=1, path=tmp_path / "net.pt2")
    x = image(5)
    assert compare_outputs([dense(net, x)], built.run(x)).max_rel <= built.describe()["tolerance"]
    built.bind(x)()


def test_the_graph_of_a_pruned_model_moves_with_it() -> None:
    """Its literals say where tensors are made, and it was captured on the CPU."""
    pytest.importorskip("transformers")
    from bench.models import MODELS

    inputs = MODELS["bert"].example()
    pruned = fxprune.compile(MODELS["bert"].make(), inputs, target={"macs": 0.5}, proof="quick")
    options = {"device": "cuda", "dtype": "float16", "cuda_graphs": True}
    built = usable("torch", **options).build(pruned.module, inputs, threads=1)
    built.bind(*inputs)()
    moved = Placement(torch.device("cuda")).module(inference_copy(pruned.module))
    on_device = usable("torch", **options).build(moved, tuple(t.cuda() for t in inputs), threads=1)
    assert on_device.parity.max_rel <= 1e-2


def test_a_module_on_the_gpu_runs_on_the_cpu_where_that_is_asked_for() -> None:
    layer = nn.Linear(4, 4).cuda()
    built = BACKENDS["torch"].build(layer, (torch.randn(2, 4, device="cuda"),), threads=1)
    assert built.describe()["provider"] == "cpu"
    assert layer.weight.is_cuda


def test_dense_and_pruned_are_measured() -> None:
    net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64))
    pruned = fxprune.compile(net, torch.randn(2, 64), target={"macs": 0.5})
    latency = pruned.measure(backend={"name": "torch", "device": "cuda", "dtype": "float16"}, rounds=6)
    assert latency.backend == "torch(device=cuda, dtype=float16)"
    assert latency.milliseconds.dense > 0


# -------------------------------------------------------------------------------------------------- graphs and time


def test_a_cuda_graph_computes_what_the_call_does() -> None:
    layer, x = Net().eval().cuda(), image(4).cuda()
    result = torch.empty(4, 8, device="cuda")
    with torch.no_grad():
        replay = sparse.graphed(lambda: result.copy_(layer(x)))
        for _ in range(3):
            x.copy_(image(4))
            replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(result, layer(x), rtol=1e-2, atol=1e-2)


def test_what_cannot_be_recorded_is_said_when_it_is_bound() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.sum())

    built = usable("torch", device="cuda", cuda_graphs=True).build(Reads(), (torch.ones(2, 2),), threads=1)
    with pytest.raises(
        BackendError, match=r"cannot record the model as a CUDA graph: .* Build it with cuda_graphs=False"
    ):
        built.bind(torch.ones(2, 2))


@pytest.mark.parametrize("graphs", [False, True])
def test_a_bound_call_takes_as_long_as_the_gpu(graphs: bool) -> None:
    """A call that only started the work would be over long before the events say that the GPU is done."""
    net = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(8))).requires_grad_(False)
    x = torch.randn(4096, 4096)
    call = usable("torch", device="cuda", cuda_graphs=graphs).build(net, (x[:8],), threads=1).bind(x)
    for _ in range(3):
        call()
    clock = sparse.EventClock()
    wall, by_events = time.perf_counter(), clock()
    for _ in range(5):
        call()
    by_events, wall = clock() - by_events, time.perf_counter() - wall
    assert by_events > 1e-3
    assert 0.8 * by_events < wall < 1.5 * by_events + 0.01


def test_events_count_what_was_started_before_them() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    clock = sparse.EventClock()
    start = clock()
    for _ in range(20):
        x @ x
    assert clock() - start > 20 * 2 * 4096**3 / 1e15  # no GPU computes a petaflop a second in float32


# ---------------------------------------------------------------------------------------------------------- 2:4


@pytest.mark.parametrize("kernel", sparse.KERNELS)
@pytest.mark.parametrize("rows", [128, 40, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_kernels_compute_the_linear_layer(kernel: str, rows: int, dtype: torch.dtype) -> None:
    layer = masked(nn.Linear(256, 512)).to("cuda", dtype)[0]
    x = torch.randn(rows, 256, dtype=dtype, device="cuda")
    with torch.no_grad():
        try:
            weight = sparse.Compressor()(layer.weight.detach(), kernel, rows)
            found = nn.functional.linear(x, weight, layer.bias)
        except RuntimeError as error:
            pytest.skip(f"{kernel} does not run here: {str(error).splitlines()[0]}")
        torch.testing.assert_close(found, layer(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("more", [{}, {"cuda_graphs": True}], ids=str)
@pytest.mark.parametrize("name", ["torch", "torch-compile"])
def test_each_layer_is_chosen_by_its_own_time(name: str, more: dict[str, bool]) -> None:
    """The last layer has no pattern; whether the others are sparse is for the times to say."""
    net = masked(nn.Linear(4096, 4096), nn.GELU(), nn.Linear(4096, 64))
    net.append(nn.Linear(64, 64))
    built = usable(name, **SPARSE, **more).build(net, (torch.randn(2048, 4096),), threads=1)
    told = json.loads(json.dumps(built.describe()))["sparse"]
    assert [(c["layer"], c["rows"], c["shape"]) for c in told] == [("0", 2048, [4096, 4096]), ("2", 2048, [64, 4096])]
    for choice in told:
        if choice["speedup"] is None:
            assert choice["kernel"] is None and choice["reason"]
            continue
        assert choice["dense_ms"] > 0 and choice["sparse_ms"] > 0
        assert (choice["kernel"] is not None) == (choice["speedup"][1] > 1)
    assert built.parity.max_rel <= 1e-2
    assert net[0].weight.dtype == torch.float32
    built.bind(torch.randn(2048, 4096))()


# ---------------------------------------------------------------------------------------------------------- onnxruntime


def test_onnxruntime_on_cuda_computes_the_same(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("onnxruntime has no CUDA provider here")
    net, x = Net(), image(3)
    pruned = fxprune.compile(net.eval(), image(2), target={"macs": 0.5}, proof="quick")
    usable("onnxruntime")
    path = pruned.export(tmp_path / "net.onnx")
    session = ort.InferenceSession(str(path), providers=["CUDAExecutionProvider"])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        pytest.skip(f"onnxruntime fell back to {session.get_providers()[0]}")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert compare_outputs([dense(pruned.module, x)], [torch.as_tensor(found)]).max_rel <= 1e-2
