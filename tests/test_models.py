"""The reference models from end to end: compile, export, save, load, train, compile again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from bench.models import MODELS, Inputs, ReferenceModel
from fxprune.analyse import analyse
from fxprune.backends.base import TOLERANCE
from fxprune.capture import capture
from fxprune.groups import find_groups
from fxprune.kept import Kept
from fxprune.prove import prove
from fxprune.rewrite import rewrite

#: The small models that Dynamo, which is slow, is tried on.
DYNAMO = ("vit", "mobilenetv3_small_050")
#: What is left of the MACs; the narrow ones' steps (a head, half a head's dimensions) are a good part of the whole.
LEAST = {"vit": 0.46, "bert": 0.46, "distilbert": 0.46, "gpt2": 0.48}
#: Why a dimension of a parameter may stay whole: nothing else in these models stands in the way.
REASONS = re.compile(
    r"it is a kernel dimension"
    r"|dimension 1 of the input '\w+'"
    r"|it is dimension [12] of a model output"
    r"|its rows are looked up by index"
    r"|its entries are picked by index"
)
#: The tokens of an image keep their number, and with it the position embedding its rows.
POSITIONS = re.compile(r"(.*\.)?(pos_embed|position_embeddings)\.1")
#: All groups of each small model by kind, as its architecture says: see `test_every_group_is_found`.
GROUPS = {
    # stem; the width of each of four stages; two inner widths in each of five blocks
    "resnet50": {"channels": 1 + 4 + 2 * 5},
    # stem; what squeeze-and-excitation, expansion and projection add in each block; two layers of the head
    "mobilenetv3_small_050": {"channels": 26},
    "efficientnet_b0": {"channels": 40},
    # stem; bottleneck and growth of nine layers; three transitions
    "densenet121": {"channels": 1 + 2 * 9 + 3},
    # the width of each of four stages; the hidden width of each of five blocks
    "convnext_tiny": {"channels": 4, "hidden": 5},
    # the width; heads, head dimensions and hidden width of each of two blocks
    "vit_base_patch16_224": {"channels": 1, "heads": 2, "head_dims": 2, "hidden": 2},
    # the width of each of four stages; heads, head dimensions and hidden width of each of seven blocks
    "swin_tiny_patch4_window7_224": {"channels": 1, "heads": 6, "head_dims": 6, "hidden": 3 + 6},
    # stem; four stages; groups, width in them before and after the grouped convolution of each of thirteen blocks
    "regnetx_002": {"channels": 1 + 4 + 3 * 13},
    # the width; heads, dimensions of queries and of values, hidden width of each of two layers; the pooler
    "bert": {"heads": 2, "head_dims": 4, "hidden": 1 + 2 + 1},
    "distilbert": {"heads": 2, "head_dims": 4, "hidden": 1 + 2 + 1},
    "gpt2": {"heads": 2, "head_dims": 4, "hidden": 1 + 2},
    # key heads and, for each, its query heads; the rotary embedding's frequencies are the same in all layers
    "llama": {"heads": 2 * 2, "head_dims": 1 + 2, "hidden": 1 + 2},
    # encoder, decoder and cross attention each share one position bias, and so their heads, between layers
    "t5": {"heads": 3, "head_dims": 2 * 2 * 3, "hidden": 1 + 2 + 2},
    "vit": {"channels": 1, "heads": 2, "head_dims": 4, "hidden": 2},
    # the width is what the model returns; six layers
    "minilm": {"heads": 6, "head_dims": 12, "hidden": 6},
}


@dataclass
class Case:
    """One model, compiled once for all tests of it."""

    reference: ReferenceModel
    model: nn.Module
    inputs: Inputs
    before: dict[str, Any]
    pruned: fxprune.Pruned


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return all that must not change: modes, attributes, hooks and tensors of every module."""
    state: dict[str, Any] = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                state[f"{path}.{key}"] = {k: id(v) for k, v in value.items()}
            elif isinstance(value, list | set | tuple):
                state[f"{path}.{key}"] = repr(value)
            else:
                state[f"{path}.{key}"] = id(value)
    state["tensors"] = {name: tensor.clone() for name, tensor in tensors(model).items()}
    state["gradients"] = {name: (tensor.requires_grad, tensor.grad) for name, tensor in model.named_parameters()}
    return state


def tensors(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Make vectors differ from the zeros and ones that models start with, which would hide mistakes and gradients."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor += 0.2 * torch.rand(tensor.shape, generator=generator)
    return model


def make(reference: ReferenceModel, seed: int = 0) -> nn.Module:
    if reference.name == "minilm":
        return reference.make(seed=seed)  # it is trained: its values are not to be touched
    return fill(reference.make(seed=seed))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose much to it where another process uses its core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest) -> Case:
    reference = MODELS[request.param]
    pytest.importorskip(reference.library)
    try:
        model = make(reference)
    except ModuleNotFoundError as error:  # MiniLM's weights are a package of their own
        pytest.skip(str(error))
    inputs = reference.example(batch=2)
    before = snapshot(model)
    before["output"] = run(model, *inputs)
    return Case(reference, model, inputs, before, fxprune.compile(model, inputs, target={"macs": 0.5}))


def run(module: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(*inputs)
    return result


def test_the_target_is_met_within_a_unit(case: Case) -> None:
    report = case.pruned.report
    assert LEAST.get(case.reference.name, 0.485) < report.macs.ratio <= 0.5
    assert report.params.pruned == sum(p.numel() for p in case.pruned.module.parameters())
    assert report.params.dense == sum(p.numel() for p in case.model.parameters())
    assert report.proof.error <= report.proof.tolerance == 1e-9
    assert report.proof.level == "full"
    assert run(case.pruned.module, *case.inputs).shape == case.before["output"].shape


def test_every_group_is_found(case: Case) -> None:
    report = case.pruned.report
    assert report.unknown == {}
    assert report.notes == []
    assert Counter(group.kind for group in report.groups) == GROUPS[case.reference.name]
    unexpected = {
        dimension: reason
        for dimension, reason in report.whole.items()
        if not REASONS.fullmatch(reason) and not POSITIONS.fullmatch(dimension)
    }
    assert unexpected == {}


def test_the_original_is_left_as_it_was(case: Case) -> None:
    after = snapshot(case.model)
    for key in ("tensors", "gradients"):
        before, now = case.before[key], after.pop(key)
        assert before.keys() == now.keys()
    for name, tensor in tensors(case.model).items():
        assert torch.equal(tensor, case.before["tensors"][name]), name
    assert {p.requires_grad for p in case.model.parameters()} == {True}
    assert all(p.grad is None for p in case.model.parameters())
    assert after == {k: v for k, v in case.before.items() if k not in ("tensors", "gradients", "output")}
    assert torch.equal(run(case.model, *case.inputs), case.before["output"])


def test_layers_are_ordinary_and_keep_their_names(case: Case) -> None:
    made = {name for name in tensors(case.pruned.module) if name.startswith(("_folded_", "_constant_"))}
    assert set(tensors(case.pruned.module)) - made <= set(tensors(case.model))
    assert set(case.pruned.module.state_dict()) <= set(case.model.state_dict())
    assert {name for name, _ in case.pruned.module.named_parameters(remove_duplicate=False)} == {
        name for name, _ in case.model.named_parameters(remove_duplicate=False)
    }
    kinds = {type(m) for m in case.pruned.module.modules() if any(True for _ in m.parameters(recurse=False))}
    assert all(kind.__module__.startswith("torch.") for kind in kinds)


def test_gradients_reach_every_parameter(case: Case) -> None:
    module = case.pruned.module
    output = module(*case.inputs)
    try:
        (output * torch.randn(output.shape)).sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    finally:
        module.zero_grad(set_to_none=True)


def test_another_batch_size(case: Case) -> None:
    more = case.reference.example(batch=5, seed=1)
    together = run(case.pruned.module, *more)
    assert len(together) == 5
    apart = torch.cat([run(case.pruned.module, *(x[i : i + 1] for x in more)) for i in range(5)])
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4 * float(together.abs().max()))


def test_onnx_file_computes_the_same(case: Case, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = case.pruned.export(tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    for batch in (2, 3):
        inputs = case.reference.example(batch=batch, seed=2)
        names = [value.name for value in session.get_inputs()]
        feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        (actual,) = session.run(None, feeds)
        expected = run(case.pruned.module, *inputs).numpy()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_saved_and_loaded_without_the_class(case: Case, tmp_path: Path) -> None:
    case.pruned.save(tmp_path / "saved")
    loaded = fxprune.load(tmp_path / "saved")
    check_loaded(loaded, case)


def test_saved_and_replayed_on_a_fresh_model(case: Case, tmp_path: Path) -> None:
    case.pruned.save(tmp_path / "saved")
    fresh = make(case.reference, seed=7)
    before = snapshot(fresh)
    loaded = fxprune.load(tmp_path / "saved", fresh)
    check_loaded(loaded, case)
    after = tensors(fresh)
    assert all(torch.equal(after[name], tensor) for name, tensor in before["tensors"].items())


def check_loaded(loaded: nn.Module, case: Case) -> None:
    own, other = tensors(case.pruned.module), tensors(loaded)
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in case.pruned.module.parameters()]
    assert {module.training for module in loaded.modules()} == {False}
    assert torch.equal(run(loaded, *case.inputs), run(case.pruned.module, *case.inputs))


def test_torch_export_takes_it(case: Case) -> None:
    program = torch.export.export(case.pruned.module, case.inputs)
    expected = run(case.pruned.module, *case.inputs)
    torch.testing.assert_close(run(program.module(), *case.inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DYNAMO)
def test_torch_compile_takes_it(name: str) -> None:
    reference = MODELS[name]
    pytest.importorskip(reference.library)
    inputs = reference.example()
    pruned = fxprune.compile(make(reference), inputs, target={"macs": 0.5}, proof="quick")
    try:
        compiled = torch.compile(pruned.module, backend="eager", fullgraph=True)
        torch.testing.assert_close(run(compiled, *inputs), run(pruned.module, *inputs))
    finally:
        torch.compiler.reset()


def test_it_can_be_compiled_again(case: Case) -> None:
    before = run(case.pruned.module, *case.inputs)
    again = fxprune.compile(case.pruned.module, case.inputs, target={"macs": 0.7}, proof="quick")
    assert again.report.macs.dense == case.pruned.report.macs.pruned
    assert 0.6 < again.report.macs.ratio <= 0.7
    # A group of which one unit is left is no group any more.
    assert len(again.report.groups) == sum(group.kept > 1 for group in case.pruned.report.groups)
    assert run(again.module, *case.inputs).shape == before.shape
    assert torch.equal(run(case.pruned.module, *case.inputs), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.library == "timm"])
def test_at_full_size(name: str) -> None:
    pytest.importorskip("timm")
    reference = MODELS[name]
    inputs = reference.example(batch=1, full=True)
    report = fxprune.compile(reference.make(full=True), inputs, target={"macs": 0.5}, proof="quick").report
    assert 0.49 < report.macs.ratio <= 0.5
    assert report.unknown == {}


def test_any_order_of_any_group_is_the_same_function(case: Case) -> None:
    """What 2:4 relies on: all groups in random orders, nothing removed."""
    model = make(case.reference)
    analysis = analyse(capture(model, case.inputs, {}))
    rng = np.random.default_rng(0)
    orders = {g.axis: rng.permutation(g.size) for g in find_groups(analysis)}
    kept = Kept(orders)
    assert len(kept) == sum(not np.array_equal(order, np.arange(len(order))) for order in orders.values())
    assert not kept.smaller
    rewritten = rewrite(analysis, kept, model)
    assert prove(analysis, kept, rewritten, model).error < 1e-9
