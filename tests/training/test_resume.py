"""A run that is killed and goes on from its last checkpoint ends as one that was not, bit for bit."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune import Pruned, Pruner
from fxprune.errors import InputError

STEPS, END, EVERY = 16, 12, 3
RAMP = {"start": 1, "end": END, "every": 2}
STAGES: dict[str, Any] = {
    "magnitude": {"method": "magnitude", "pattern": "channel", "target": 0.5},
    "snip_momentum": {"method": "snip_momentum", "pattern": "element", "target": 0.7},
    "movement": {"method": {"name": "movement", "initial": "magnitude"}, "pattern": "4x1", "target": 0.5},
    "l0": {"method": "l0", "pattern": "channel", "target": {"macs": 0.5}},
    "mask_learning": {"method": "mask_learning", "pattern": "2:4"},
    "straight_through": {"method": "straight_through", "pattern": "2:4"},
    "rigl": {"method": {"name": "rigl", "initial": "random"}, "pattern": "element", "target": 0.7},
    "growing_reg": {"method": {"name": "growing_reg", "every": 2, "delta": 0.1}, "pattern": "channel", "target": 0.5},
    "soft_mask": {"method": "soft_mask", "pattern": "channel", "target": 0.5},
    "progressive": {
        "method": "snip_momentum",
        "pattern": "4x1",
        "target": 0.5,
        "progressive": 2,
        "schedule": RAMP | {"every": 4},
    },
    "rewind": {"method": "magnitude", "pattern": "element", "target": 0.7, "rewind": 2},
}


def network(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The data of a step follow from its number, so that they go on where they were."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)


def made(stage: dict[str, Any], **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    pruner = Pruner(net, torch.randn(2, 8), {"schedule": RAMP} | stage, steps=STEPS, **options)
    return net, optimizer, pruner.attach(optimizer)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, file: Path, until: Any = None) -> None:
    while pruner.step < STEPS:
        inputs, wanted = batch(pruner.step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), wanted).backward()
        if until is not None and pruner.step == until[0]:
            if until[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Stop
        optimizer.step()
        if pruner.step % EVERY == 0:
            pruner.save(file, epoch=pruner.step // EVERY)


class Stop(Exception):
    pass


def killed_runs(folder: Path, step: int) -> None:
    """Come to a step of every run, and die there."""
    torch.set_num_threads(1)
    last = list(STAGES)[-1]
    for name, stage in STAGES.items():
        with contextlib.suppress(Stop):
            train(*made(stage), folder / name, (step, name == last))


def killed_write(stage: dict[str, Any], file: Path) -> None:
    """Die in the middle of the second checkpoint."""
    torch.set_num_threads(1)
    write = torch.save

    def half(content: Any, path: Path) -> None:
        write(content, path)
        if file.exists():
            with path.open("rb+") as written:
                written.truncate(path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    train(*made(stage), file)


def dies(function: Any, *args: Any) -> None:
    """Call a function in a process of its own, which is killed."""
    context = multiprocessing.get_context("forkserver")  # one that has imported the library waits for all tests
    context.set_forkserver_preload(["fxprune", "pytest"])
    process = context.Process(target=function, args=args)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ended(net: nn.Module, pruner: Pruner) -> tuple[Pruned, dict[str, Tensor]]:
    result = pruner.finish(proof="quick")
    return result, {n: p.detach().clone() for n, p in net.named_parameters()}


def same(one: tuple[Pruned, dict[str, Tensor]], other: tuple[Pruned, dict[str, Tensor]]) -> None:
    plans = [result.plan.to_json() for result, _ in (one, other)]
    assert plans[0] == plans[1]
    assert list(one[0].plan.masks) == list(other[0].plan.masks)
    assert all(torch.equal(mask, other[0].plan.masks[n]) for n, mask in one[0].plan.masks.items())
    assert all(torch.equal(weight, other[1][n]) for n, weight in one[1].items())


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process leaves behind that is killed in the middle of ramps, two steps after a checkpoint of each."""
    folder = tmp_path_factory.mktemp("left")
    dies(killed_runs, folder, 8)
    return folder


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_run_goes_on_as_if_nothing_had_been(name: str, left: Path, tmp_path: Path) -> None:
    stage, file = STAGES[name], left / name
    net, optimizer, pruner = made(stage)
    assert pruner.load(file) == {"epoch": 2}
    assert pruner.step == 6 and not pruner.prunings[0].done
    train(net, optimizer, pruner, file)
    whole = made(stage)
    train(*whole, tmp_path / "whole.ckpt")
    assert [row.step for row in pruner.rows] == [row.step for row in whole[2].rows]
    same(ended(net, pruner), ended(whole[0], whole[2]))


def test_stages_beside_each_other_go_on(tmp_path: Path) -> None:
    stages = [
        {"method": "l0", "pattern": "channel", "target": 0.5, "schedule": RAMP, "include": ["0", "3"]},
        {"method": "snip_momentum", "pattern": "element", "target": 0.5, "schedule": RAMP, "include": ["5"]},
    ]

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        return net, optimizer, Pruner(net, torch.randn(2, 8), stages, steps=STEPS).attach(optimizer)

    whole = fresh()
    while whole[2].step < STEPS:
        inputs, wanted = batch(whole[2].step)
        whole[1].zero_grad()
        nn.functional.cross_entropy(whole[0](inputs), wanted).backward()
        whole[1].step()
        if whole[2].step == 5:
            whole[2].save(tmp_path / "run")
    later = fresh()
    later[2].load(tmp_path / "run")
    train(*later, tmp_path / "later")
    same(ended(whole[0], whole[2]), ended(later[0], later[2]))


def test_death_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "run.ckpt"
    dies(killed_write, STAGES["magnitude"], file)
    net, optimizer, pruner = made(STAGES["magnitude"])
    pruner.load(file)
    assert pruner.step == EVERY
    train(net, optimizer, pruner, file)
    assert pruner.prunings[0].done
    pruner.load(file)  # and what another one has left half written is in nobody's way
    assert pruner.step == STEPS // EVERY * EVERY


def test_a_loop_of_hooks_goes_on_with_the_state_of_its_own_optimizer(tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        net = network()
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        return net, optimizer, Pruner(net, torch.randn(2, 8), {"schedule": RAMP} | STAGES["l0"], steps=STEPS)

    def go(net: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> None:
        while pruner.step < STEPS:
            if pruner.step == 7:
                pruner.save(tmp_path / "run", optimizer=optimizer.state_dict())
            pruner.on_step_begin()
            inputs, wanted = batch(pruner.step)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(inputs), wanted)
            loss.backward()
            pruner.on_before_optimizer_step(loss)
            optimizer.step()
            pruner.on_step_end()
        pruner.on_train_end()

    whole, later = fresh(), fresh()
    go(*whole)
    more = later[2].load(tmp_path / "run")
    later[1].load_state_dict(more["optimizer"])
    go(*later)
    same(ended(whole[0], whole[2]), ended(later[0], later[2]))
    with pytest.raises(InputError, match="saved without `attach`"):
        made(STAGES["l0"])[2].load(tmp_path / "run")


def test_a_state_is_a_copy() -> None:
    net, optimizer, pruner = made(STAGES["l0"])
    state = pruner.state_dict()
    multipliers = state["prunings"][0]["method"]["multipliers"]
    for step in range(3):
        optimizer.zero_grad()
        net(batch(step)[0]).square().mean().backward()
        optimizer.step()
    assert torch.equal(multipliers, torch.zeros(2)) and state["step"] == 0
    pruner.load_state_dict(state)
    optimizer.zero_grad()
    net(batch(0)[0]).square().mean().backward()
    optimizer.step()
    assert torch.equal(multipliers, torch.zeros(2)) and pruner.step == 1


def test_only_plain_values_are_in_the_file(tmp_path: Path) -> None:
    _, _, pruner = made(STAGES["mask_learning"])
    file = pruner.save(tmp_path / "run", epoch=1)
    before = file.read_bytes()
    content = torch.load(file, weights_only=True)
    assert content["more"] == {"epoch": 1}
    with pytest.raises(InputError, match=r"tensors and plain values only, not .*Linear"):
        pruner.save(file, layer=nn.Linear(2, 2))
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"pattern": "element"}, "stage 0 differs in 'pattern'"),
        ({"target": 0.25}, "stage 0 differs in 'target'"),
        ({"method": "soft_mask"}, "stage 0 differs in 'method'"),
        ({"schedule": RAMP | {"end": 10}}, "stage 0 differs in 'schedule'"),
    ],
)
def test_a_checkpoint_of_other_stages_is_refused(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    made(STAGES["magnitude"])[2].save(tmp_path / "run")
    _, _, pruner = made(STAGES["magnitude"] | other)
    with pytest.raises(InputError, match=message):
        pruner.load(tmp_path / "run")
    assert pruner.step == 0


def test_a_checkpoint_of_another_number_of_stages_is_refused(tmp_path: Path) -> None:
    made(STAGES["magnitude"])[2].save(tmp_path / "run")
    net = network()
    stage = {"schedule": RAMP} | STAGES["magnitude"]
    more = stage | {"pattern": "element", "target": 0.3}
    pruner = Pruner(net, torch.randn(2, 8), [stage, more]).attach(torch.optim.Adam(net.parameters()))
    with pytest.raises(InputError, match="it has 1 of them, and here are 2"):
        pruner.load(tmp_path / "run")


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    made({"pattern": "channel", "target": 0.5, "include": ["3", "5"]})[2].save(tmp_path / "run")
    net = network(width=24)
    optimizer = torch.optim.Adam(net.parameters())
    stage = {"schedule": RAMP, "pattern": "channel", "target": 0.5, "include": ["3", "5"]}
    pruner = Pruner(net, torch.randn(2, 8), stage, steps=STEPS).attach(optimizer)
    before = {n: p.clone() for n, p in net.state_dict().items()}
    with pytest.raises(InputError, match=r"'0.weight' is of shape \(16, 8\) there and of shape \(24, 8\) here"):
        pruner.load(tmp_path / "run")
    assert all(torch.equal(value, before[n]) for n, value in net.state_dict().items())


def test_a_teacher_belongs_to_the_run(tmp_path: Path) -> None:
    made(STAGES["magnitude"], distillation={"alpha": 0.5})[2].save(tmp_path / "with")
    made(STAGES["magnitude"])[2].save(tmp_path / "without")
    with pytest.raises(InputError, match="of a run with a teacher, and this Pruner was made without one"):
        made(STAGES["magnitude"])[2].load(tmp_path / "with")
    with pytest.raises(InputError, match="of a run without a teacher, and this Pruner was made with one"):
        made(STAGES["magnitude"], distillation={"alpha": 0.5})[2].load(tmp_path / "without")


def test_an_optimizer_is_attached_before(tmp_path: Path) -> None:
    made(STAGES["magnitude"])[2].save(tmp_path / "run")
    pruner = Pruner(network(), torch.randn(2, 8), {"schedule": RAMP} | STAGES["magnitude"], steps=STEPS)
    with pytest.raises(InputError, match="`attach` the optimizer before `load`"):
        pruner.load(tmp_path / "run")
    run = made(STAGES["magnitude"])
    while run[2].step < EVERY:
        run[1].zero_grad()
        run[0](batch(0)[0]).square().mean().backward()
        run[1].step()
    run[2].save(tmp_path / "run")
    net, _, pruner = made(STAGES["magnitude"])
    pruner.detach()
    pruner.attach(torch.optim.Adam(net.parameters()))  # weights are behind biases now
    with pytest.raises(InputError, match="its parameters are in another order"):
        pruner.load(tmp_path / "run")
    pruner.detach()
    pruner.attach(torch.optim.Adam([{"params": [p]} for p in net.parameters()]))
    with pytest.raises(InputError, match="is of another optimizer"):
        pruner.load(tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 and no more"])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(content)
    with pytest.raises(InputError, match="is damaged or no checkpoint"):
        made(STAGES["magnitude"])[2].load(tmp_path / "run")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "run")
    _, _, pruner = made(STAGES["magnitude"])
    with pytest.raises(InputError, match=r"`Pruner.save` writes one"):
        pruner.load(tmp_path / "run")
    with pytest.raises(InputError, match="there is no checkpoint"):
        pruner.load(tmp_path / "none")
    with pytest.raises(InputError, match="say where"):
        pruner.save()


def test_the_log_goes_on_without_what_is_trained_twice(tmp_path: Path) -> None:
    net, optimizer, pruner = made(STAGES["magnitude"], log=tmp_path / "log")
    train(net, optimizer, pruner, tmp_path / "run")
    rows = (tmp_path / "log" / "pruning.csv").read_text()
    net, optimizer, pruner = made(STAGES["magnitude"], log=tmp_path / "log")
    pruner.load(tmp_path / "run")
    train(net, optimizer, pruner, tmp_path / "run")
    assert (tmp_path / "log" / "pruning.csv").read_text() == rows
