"""The options of the torch backends, as far as a machine without a GPU shows them: types, layouts, refusals."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from bench.models import MODELS
from fxprune.backends import BACKENDS, Backend, chosen
from fxprune.backends import torch as torch_backend
from fxprune.backends.place import TOLERANCES, Placement, home
from fxprune.errors import BackendError, InputError

CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a CUDA device")


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval()


def build(module: nn.Module, *args: Any, **options: Any) -> Any:
    return BACKENDS["torch"].configured(**options).build(module, args, threads=1)


class Seen(nn.Module):
    """Writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        self.calls: list[tuple[torch.dtype, bool, torch.dtype]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((x.dtype, x.is_contiguous(memory_format=torch.channels_last), self.layer.weight.dtype))
        return self.layer(x)


# ---------------------------------------------------------------------------------------------------------- the module


def test_nothing_is_copied_where_nothing_changes() -> None:
    module = net()
    assert Placement(CPU).module(module) is module
    half = net().bfloat16()
    assert Placement(CPU, torch.bfloat16).module(half) is half
    flat = nn.Linear(2, 2)
    assert Placement(CPU, channels_last=True).module(flat) is flat


def test_a_cast_copy_leaves_the_module_alone_and_keeps_what_is_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.table.weight
            self.register_buffer("steps", torch.arange(4))

    module = Tied()
    cast = Placement(CPU, torch.float16).module(module)
    assert module.head.weight.dtype == torch.float32
    assert cast.head.weight is cast.table.weight and cast.head.weight.dtype == torch.float16
    assert cast.steps is module.steps  # whole numbers are not cast, and not copied


def test_only_the_weights_of_images_have_their_channels_last() -> None:
    module = net()
    placed = Placement(CPU, channels_last=True).module(module)
    assert placed[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not placed[0].weight.is_contiguous()
    assert placed[4].weight.data_ptr() == module[4].weight.data_ptr()
    assert module[0].weight.is_contiguous()


def test_the_literals_of_a_graph_follow() -> None:
    class Fills(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bias = torch.full((3,), torch.finfo(torch.float32).min, dtype=torch.float32, device=x.device)
            wide = torch.zeros(3, dtype=torch.float64, device="cpu")
            return x.to(torch.float32) + bias.masked_fill(x > 0, 1e30) + wide.sum().to(torch.float32)

    graph = torch.export.export(Fills(), (torch.ones(3),)).module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    placed = Placement(torch.device("meta"), torch.float16).module(graph)
    said: list[Any] = []
    for node in placed.graph.nodes:
        fx.node.map_aggregate((node.args, dict(node.kwargs)), said.append)
    assert torch.float32 not in said and {torch.float16, torch.float64} <= {s for s in said if type(s) is torch.dtype}
    assert {s for s in said if isinstance(s, torch.device)} == {torch.device("meta")}
    assert {-65504.0, 65504.0} <= {s for s in said if isinstance(s, float)}
    before: list[Any] = []
    for node in graph.graph.nodes:
        fx.node.map_aggregate((node.args, dict(node.kwargs)), before.append)
    assert torch.float16 not in before  # a copy's graph is its own


def test_masks_keep_their_infinities_and_lose_none_of_their_bounds() -> None:
    class Mask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -math.inf, torch.finfo(torch.float32).min]))

    cast = Placement(CPU, torch.float16).module(Mask())
    assert cast.mask.tolist() == [0.0, -math.inf, -65504.0]


def test_arguments_are_placed_and_stay_one_where_they_are_one() -> None:
    x, ids = torch.randn(2, 3, 4, 4), torch.arange(3)
    (a, b), named = Placement(CPU, torch.bfloat16, channels_last=True).arguments(((x, x), {"ids": ids, "n": 2}))
    assert a is b and a.dtype == torch.bfloat16 and a.is_contiguous(memory_format=torch.channels_last)
    assert named["ids"] is ids and named["n"] == 2
    assert Placement(CPU).arguments([x])[0] is x


def test_home_is_where_the_tensors_are() -> None:
    assert home(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert home(nn.ReLU(), torch.zeros(1, device="meta")) == torch.device("meta")


# ---------------------------------------------------------------------------------------------------------- the runner


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_inputs_are_cast_on_entry_and_outputs_come_back_in_float32(dtype: str) -> None:
    module = Seen()
    built = build(module, torch.randn(2, 3, 4, 4), dtype=dtype)
    (output,) = built.run(torch.randn(5, 3, 4, 4))
    assert output.dtype == torch.float32
    told = json.loads(json.dumps(built.describe()))
    assert (told["dtype"], told["tolerance"]) == (dtype, TOLERANCES[getattr(torch, dtype)])
    assert told["options"]["dtype"] == dtype
    assert 0 < told["parity"]["max_rel"] <= told["tolerance"]
    assert module.layer.weight.dtype == torch.float32


def test_a_module_of_half_precision_stays_so_by_default() -> None:
    built = build(nn.Linear(3, 4).bfloat16(), torch.randn(2, 3).bfloat16())
    assert built.run(torch.randn(2, 3).bfloat16())[0].dtype == torch.bfloat16
    assert built.describe()["dtype"] == "bfloat16"


def test_a_bound_call_moves_and_casts_once() -> None:
    module = Seen()
    backend = BACKENDS["torch"].configured(dtype="bfloat16", channels_last=True)
    built = backend.build(module, (torch.randn(2, 3, 4, 4),), threads=1)
    calls = built._call.calls
    calls.clear()
    call = built.bind(torch.randn(2, 3, 4, 4))
    call()
    call()
    assert calls == [(torch.bfloat16, True, torch.bfloat16)] * 2


def test_plain_torch_shares_the_parameters() -> None:
    module = nn.Linear(3, 4)
    built = build(module, torch.randn(2, 3))
    with torch.no_grad():
        module.weight.zero_()
        module.bias.fill_(1)
    assert torch.equal(built.run(torch.randn(2, 3))[0], torch.ones(2, 4))


def test_compiled_in_half_precision() -> None:
    backend = BACKENDS["torch-compile"].configured(dtype="bfloat16", channels_last=True)
    if (reason := backend.available()) is not None:
        pytest.skip(reason)
    x = torch.randn(2, 3, 6, 6)
    built = backend.build(net(), (x,), threads=1)
    assert 0 < built.parity.max_rel <= 0.05
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["bert", "llama", "resnet50"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pruned_models_in_half_precision(name: str, dtype: str) -> None:
    """Their graphs hold float32 by name: in masks, around norms."""
    inputs = MODELS[name].example()
    pruned = fxprune.compile(MODELS[name].make(), inputs, target={"macs": 0.5}, proof="quick")
    built = build(pruned.module, *inputs, dtype=dtype, channels_last=True)
    assert built.describe()["dtype"] == dtype
    assert built.parity.max_rel < TOLERANCES[getattr(torch, dtype)]


def test_what_half_precision_cannot_hold_is_refused() -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 1e6) / 1e6

    with pytest.raises(BackendError, match=r"relative difference inf, .*allowed 0.01 relative"):
        build(Large(), torch.ones(2, 3), dtype="float16")


class Elsewhere:
    """Stands in for a placement on a GPU, and leaves everything where it is."""

    device = torch.device("cuda")
    dtype = None
    tolerance = 1e-2

    def arguments(self, arguments: Any) -> Any:
        return arguments


def elsewhere(call: Any, monkeypatch: pytest.MonkeyPatch, said: list[str], **options: Any) -> Any:
    """Return a runner that believes that it is on a GPU; what it asks of CUDA is written down."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: said.append(f"wait for {device}"))
    backend: Any = BACKENDS["torch"].configured(device="cuda", **options)
    return torch_backend.TorchRunner(backend, call, 2, Elsewhere())  # type: ignore[arg-type]


def test_a_bound_call_on_a_gpu_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    call = elsewhere(lambda: said.append("model"), monkeypatch, said).bind()
    assert said == []
    call()
    call()
    assert said == ["model", "wait for cuda"] * 2


def test_a_bound_call_replays_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def graphed(call: Any) -> Any:
        call()
        return lambda: said.append("replay")

    monkeypatch.setattr(torch_backend.sparse, "graphed", graphed)
    call = elsewhere(lambda: said.append("model"), monkeypatch, said, cuda_graphs=True).bind()
    assert said == ["model", "model"]
    call()
    assert said[2:] == ["replay", "wait for cuda"]


def test_what_cannot_be_recorded_is_told_from_what_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def graphed(call: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nFor debugging consider ...")

    monkeypatch.setattr(torch_backend.sparse, "graphed", graphed)
    runner = elsewhere(lambda x: x, monkeypatch, [], cuda_graphs=True)
    with pytest.raises(
        BackendError, match=r"as a CUDA graph: operation .* capturing\. Build it with cuda_graphs=False"
    ):
        runner.bind(1)
    with pytest.raises(BackendError, match="backend 'torch' cannot run the model"):
        runner.bind()


# ---------------------------------------------------------------------------------------------------------- refusals


def test_options_by_name() -> None:
    backend = chosen({"name": "torch", "dtype": "bfloat16", "channels_last": True})
    assert backend.key == "torch(dtype=bfloat16, channels_last=True)"
    with pytest.raises(BackendError, match="dtype is one of float32, bfloat16, float16, not 'int8'"):
        chosen({"name": "torch", "dtype": "int8"})


@no_gpu
@pytest.mark.parametrize("name", ["torch", "torch-compile", "torch-aot"])
def test_cuda_where_there_is_none(name: str) -> None:
    backend = BACKENDS[name].configured(device="cuda")
    assert "choose device cpu" in str(backend.available())
    with pytest.raises(BackendError, match=rf"backend '{name}' cannot be used here: torch .*CUDA.*choose device cpu"):
        backend.build(nn.Linear(2, 2), (torch.zeros(1, 2),), threads=1)


def test_why_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA; install a CUDA build" in torch_backend.no_cuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "finds no CUDA device; check the driver with nvidia-smi" in torch_backend.no_cuda()


def test_options_that_need_others() -> None:
    torch_ = BACKENDS["torch"]
    assert torch_.configured(cuda_graphs=True).available() == "cuda_graphs needs device cuda"
    said = str(torch_.configured(sparse="auto", dtype="float16").available())
    assert said.startswith("sparse auto needs device cuda and dtype float16 or bfloat16")


def test_arguments_that_do_not_fit_are_refused_before_anything_is_cast() -> None:
    with pytest.raises(InputError, match="the arguments do not fit forward"):
        build(nn.Linear(2, 2), torch.zeros(1, 2), torch.zeros(1, 2), dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "multiple"),
    [({}, 8), ({"dtype": "bfloat16"}, 16), ({"device": "cuda"}, 32), ({"device": "cuda", "dtype": "float16"}, 64)],
)
def test_what_widths_are_rounded_to(options: dict[str, str], multiple: int) -> None:
    backend: Backend = BACKENDS["torch"].configured(**options)
    assert backend.preferred_multiple == multiple
