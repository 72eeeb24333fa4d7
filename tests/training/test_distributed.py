"""Two processes that see different data choose the same, and finish with the same smaller model."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fxprune import Pruner
from fxprune.errors import InputError, NonFiniteError

STEPS = 10
RAMP = {"start": 2, "end": 8, "every": 2}
STAGES: dict[str, Any] = {
    "magnitude": {"method": "magnitude", "pattern": "channel", "target": 0.5},
    "snip_momentum": {"method": "snip_momentum", "pattern": "element", "target": 0.5},
    "gradient": {"method": "gradient", "pattern": "channel", "target": 0.5},
    "movement": {"method": "movement", "pattern": "element", "target": 0.5},
    "l0": {"method": "l0", "pattern": "channel", "target": 0.5},
    "mask_learning": {"method": {"name": "mask_learning", "freeze": False}, "pattern": "2:4"},
    "straight_through": {"method": {"name": "straight_through", "decay": 0.1}, "pattern": "2:4"},
    "rigl": {"method": {"name": "rigl", "initial": "random"}, "pattern": "element", "target": 0.5},
    "growing_reg": {"method": {"name": "growing_reg", "delta": 0.1, "every": 2}, "pattern": "channel", "target": 0.5},
    "rewind": {"method": "magnitude", "pattern": "element", "target": 0.5, "rewind": "start"},
}
SHARDED = ("magnitude", "snip_momentum", "movement", "l0", "straight_through", "rigl", "growing_reg", "rewind")


def network() -> nn.Module:
    torch.manual_seed(0)
    # 25 rows do not divide by two processes
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 25), nn.ReLU(), nn.Linear(25, 4))


def batch(step: int, rank: int | None) -> tuple[Tensor, Tensor]:
    """What a process sees; None: what all of them see, for one process that stands for both."""
    if rank is None:
        parts = [batch(step, r) for r in (0, 1)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    generator = torch.Generator().manual_seed(2 * step + rank)
    return torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)


def pruner_of(net: nn.Module, name: str) -> Pruner:
    exclude = {"exclude": ["4"]} if STAGES[name]["pattern"] == "2:4" else {}  # 25 inputs have no groups of four
    return Pruner(net, torch.randn(2, 8), {"schedule": RAMP} | STAGES[name] | exclude, steps=STEPS)


def train(net: nn.Module, pruner: Pruner, rank: int | None) -> dict[str, Any]:
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    pruner.attach(optimizer)
    steps(net, optimizer, rank, range(STEPS))
    return outcome(pruner)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, rank: int | None, numbers: range) -> None:
    for step in numbers:
        inputs, wanted = batch(step, rank)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), wanted).backward()
        optimizer.step()


def outcome(pruner: Pruner) -> dict[str, Any]:
    state = pruner.state_dict()["prunings"][0]
    kept, method = copy.deepcopy(state["kept"]), state["method"]
    result = pruner.finish(proof="quick")
    return {
        "kept": kept,
        "method": {k: v for k, v in method.items() if k != "optimizer"},
        "plan": result.plan.to_json(),
        "module": result.module.state_dict(),
        "output": result.module(torch.ones(2, 8)).detach(),
    }


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # names of the machine need not be known anywhere
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name in STAGES:
        net = network()
        pruner = pruner_of(net, name)
        results["ddp", "pruner first", name] = train(DistributedDataParallel(net), pruner, rank)
    mesh = init_device_mesh("cpu", (2,))
    for name in SHARDED:
        results["fsdp", "pruner first", name] = train(*sharded(name, mesh), rank)
        results["fsdp", "stopped", name] = stopped(name, mesh, rank, folder / name)
    results["refused"] = refusals(mesh, rank, folder)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def sharded(name: str, mesh: Any) -> tuple[nn.Module, Pruner]:
    net = network()
    pruner = pruner_of(net, name)
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, pruner


def stopped(name: str, mesh: Any, rank: int, folder: Path) -> dict[str, Any]:
    """A run that stops in the middle of the ramp, and what goes on from its files in new objects."""
    middle = 5
    for numbers in (range(middle), range(middle, STEPS)):
        net, pruner = sharded(name, mesh)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        pruner.attach(optimizer)
        if numbers.start:
            model, moments = get_state_dict(net, optimizer)
            content = {"model": model, "optimizer": moments}
            checkpoint.load(content, checkpoint_id=folder)
            set_state_dict(net, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
            pruner.load_state_dict(torch.load(folder / "pruner.pt"))
        steps(net, optimizer, rank, numbers)
        if not numbers.start:
            model, moments = get_state_dict(net, optimizer)
            checkpoint.save({"model": model, "optimizer": moments}, checkpoint_id=folder)
            state = pruner.state_dict()
            if rank == 0:
                torch.save(state, folder / "pruner.pt")
            dist.barrier()
    return outcome(pruner)


def refusals(mesh: Any, rank: int, folder: Path) -> dict[str, str]:
    """The texts of what sharded models do not do."""
    texts = {}
    for wrapped in (DistributedDataParallel(network()), torch.compile(DistributedDataParallel(network()))):
        try:
            pruner_of(wrapped, "magnitude")
        except InputError as error:
            texts["wrapped"] = texts.get("wrapped", "") + str(error)
    net = fully_shard(network(), mesh=mesh)
    try:
        pruner_of(net, "magnitude")
    except InputError as error:
        texts["late"] = str(error)
    net = network()
    pruner = pruner_of(net, "magnitude")
    fully_shard(net, mesh=mesh)
    for what, act in (("save", lambda: pruner.save(folder / "run")), ("abort", pruner.abort)):
        try:
            act()
        except InputError as error:
            texts[what] = str(error)
    net(torch.ones(2, 8)).sum().backward()
    if rank == 1:  # only one process has the bad number, and both stop
        net[0].parametrizations.weight.original.grad._local_tensor.fill_(float("nan"))
    try:
        pruner.on_step_begin()
        pruner.on_before_optimizer_step()
    except NonFiniteError as error:
        texts["nan"] = str(error)
    return texts


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What both processes return."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(work, (folder,), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


CASES = [("ddp", "pruner first", name) for name in STAGES]
CASES += [("fsdp", "pruner first", name) for name in SHARDED]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_both_processes_end_alike(case: tuple[str, str, str], ranks: list[dict[Any, Any]]) -> None:
    first, second = (results[case] for results in ranks)
    gone = sum(int((~mask).sum()) for mask in first["kept"].values())
    assert gone > 0
    assert equal(first, second)  # what methods have learned, too: that masks are sent around hides nothing


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_processes_do_what_one_with_both_batches_does(
    case: tuple[str, str, str], ranks: list[dict[Any, Any]]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    net = network()
    alone = train(net, pruner_of(net, case[2]), None)
    torch.set_num_threads(threads)
    both = ranks[0][case]
    assert equal(alone["kept"], both["kept"])
    assert alone["plan"] == both["plan"]
    torch.testing.assert_close(alone["output"], both["output"], atol=1e-4, rtol=1e-4)
    assert [tuple(v.shape) for v in alone["module"].values()] == [tuple(v.shape) for v in both["module"].values()]


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_run_goes_on_to_the_same_result(name: str, ranks: list[dict[Any, Any]]) -> None:
    for results in ranks:
        assert equal(results["fsdp", "stopped", name], results["fsdp", "pruner first", name])


def test_what_sharded_models_cannot_do_is_said(ranks: list[dict[Any, Any]]) -> None:
    for results in ranks:
        texts = results["refused"]
        assert texts["wrapped"].count("make the Pruner before, of the model that it wraps") == 2
        assert "make the Pruner before" in texts["late"]
        assert "torch.distributed.checkpoint" in texts["save"]
        assert "`finish` makes a copy" in texts["abort"]
        assert "the gradient of '0.weight' is NaN" in texts["nan"]
