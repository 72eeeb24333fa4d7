"""Saved models: what is loaded is what was saved, what is wrong with a directory is said, failures leave no traces."""

from __future__ import annotations

import errno
import json
import os
import pickle
import pickletools
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import BertConfig, BertForMaskedLM

import fxprune
from fxprune import graphfile, saved
from fxprune.errors import SavedModelError
from fxprune.pruned import Pruned
from fxprune.saved import load_pruned

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
FILES = ["graph.json", "plan.json", "recipe.yaml", "weights.safetensors"]


# ---------------------------------------------------------------------- models
class Layers(nn.Module):
    """One of each layer that takes part in pruning, with a frozen one and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16, momentum=0.3)
        self.act = nn.PReLU(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding="same", groups=16)
        self.group_norm = nn.GroupNorm(4, 16)
        self.drop = nn.Dropout2d(0.2)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.instance = nn.InstanceNorm2d(16, affine=True)
        self.head = nn.Linear(16, 5)
        self.last_drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.randn(16))
        self.register_buffer("mean", torch.randn(3, 1, 1))
        self.register_buffer("shift", torch.randn(16), persistent=False)
        self.depthwise.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x - self.mean)))
        x = self.drop(self.group_norm(self.depthwise(x)))
        x = self.instance(self.up(x)).mean((2, 3)) * self.scale + self.shift
        return self.last_drop(self.head(x))


class Text(nn.Module):
    """Nested outputs, an embedding with a padding index, layer norm, attention and a keyword input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16, padding_idx=0)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, ids: Tensor, scale: float = 1.0, more: dict[str, Tensor] | None = None) -> dict[str, Any]:
        x = self.norm(self.embed(ids))
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        if more is not None:
            x = x + more["bias"]
        x = x + self.down(torch.nn.functional.gelu(self.up(x))) * scale
        return {"hidden": x, "pooled": (x.mean(1), [x.amax(1)]), "nothing": None}


def _conv() -> tuple[nn.Module, Any]:
    model = Layers().train()
    model.norm.eval()
    model.drop.eval()
    return model, (torch.randn(2, 3, 8, 8),)


def _text() -> tuple[nn.Module, Any]:
    ids = torch.randint(0, 20, (2, 6))
    return Text().eval(), {"ids": ids, "scale": 0.5, "more": {"bias": torch.randn(2, 6, 16)}}


def _bert() -> tuple[nn.Module, Any]:
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    ids = torch.randint(0, 40, (2, 6))
    return BertForMaskedLM(config).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _half() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.RMSNorm(32), nn.Linear(32, 4)).eval()
    return model.to(torch.bfloat16), (torch.randn(2, 8, dtype=torch.bfloat16),)


def _frozen() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Conv1d(3, 16, 3), nn.BatchNorm1d(16), nn.ReLU6(), nn.Conv1d(16, 4, 1)).train()
    model.requires_grad_(False)
    return model, (torch.randn(2, 3, 9),)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "layers": _conv,
    "text": _text,
    "bert": _bert,
    "bfloat16": _half,
    "frozen": _frozen,
}


def compiled(name: str = "frozen", **recipe: Any) -> Pruned:
    model, inputs = MODELS[name]()
    return fxprune.compile(model, inputs, {"target": {"params": 0.7}, "round_to": 1, "proof": "quick", **recipe})


def outputs(module: nn.Module, pruned: Pruned) -> list[Any]:
    """Flat outputs on the example inputs in eval mode; the module's modes are put back."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    with torch.no_grad():
        result = pytree.tree_leaves(module(*pruned.args, **pruned.kwargs))
    for m, training in modes.items():
        m.training = training
    return result


def assert_same_module(found: nn.Module, wanted: nn.Module, pruned: Pruned) -> None:
    """The same weights, names, layers, modes, flags and outputs, to the last bit."""
    assert list(found.state_dict()) == list(wanted.state_dict())
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (found, wanted))
        assert set(ours) == set(theirs)
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype
            assert ours[name].requires_grad == tensor.requires_grad
            assert type(ours[name]) is type(tensor)
    modules, others = dict(found.named_modules()), dict(wanted.named_modules())
    assert set(modules) == set(others)
    for path, module in others.items():
        assert repr(modules[path]) == repr(module)
        assert modules[path].training == module.training, path
        assert modules[path]._non_persistent_buffers_set == module._non_persistent_buffers_set
    for a, b in zip(outputs(found, pruned), outputs(wanted, pruned), strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b


# ---------------------------------------------------------------------- round trips
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    """The loaded module equals the saved one in everything; plan, report and recipe come back too."""
    pruned = compiled(name)
    assert pruned.report.params.ratio < 0.8
    directory = pruned.save(tmp_path / "new" / "small")
    assert sorted(p.name for p in directory.iterdir()) == FILES
    again = load_pruned(directory)
    assert_same_module(again.module, pruned.module, pruned)
    assert_same_module(fxprune.load(str(directory)), pruned.module, pruned)
    assert again.plan == pruned.plan
    assert again.report.to_json() == pruned.report.to_json()
    assert str(again.report) == str(pruned.report)


@pytest.mark.parametrize("name", MODELS)
def test_load_into_a_fresh_model(name: str, tmp_path: Path) -> None:
    """The plan replayed on a fresh dense model, with the saved weights, is the same module."""
    pruned = compiled(name)
    directory = pruned.save(tmp_path / "small")
    torch.manual_seed(1)
    fresh, _ = MODELS[name]()
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    module = fxprune.load(directory, model=fresh)
    assert_same_module(module, pruned.module, pruned)
    assert all(torch.equal(t, before[n]) for n, t in fresh.state_dict().items())


def test_the_mode_is_the_saved_one(tmp_path: Path) -> None:
    """Loaded either way, whatever mode a fresh model is in, and layer by layer."""
    net = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.Linear(32, 4)).eval()
    net[1].train()
    directory = fxprune.compile(net, torch.randn(4, 8), target={"macs": 0.5}).save(tmp_path / "small")
    fresh = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.Linear(32, 4)).train()
    for module in (fxprune.load(directory), fxprune.load(directory, model=fresh)):
        modes = {type(m).__name__: m.training for m in module.modules()}
        assert modes["Dropout"] and not modes["BatchNorm1d"] and not module.training
    assert fresh.training


def test_saved_twice(tmp_path: Path) -> None:
    """A loaded model can be saved, and nothing changes."""
    first = compiled("text").save(tmp_path / "first")
    again = load_pruned(first)
    second = again.save(tmp_path / "second")
    assert (first / "graph.json").read_text() == (second / "graph.json").read_text()
    assert_same_module(fxprune.load(second), again.module, again)


def test_other_batch_sizes_after_loading(tmp_path: Path) -> None:
    """The batch is as dynamic as it was, loaded either way."""
    pruned = compiled("layers")
    directory = pruned.save(tmp_path / "small")
    pruned.module.eval()
    for module in (fxprune.load(directory), fxprune.load(directory, model=Layers())):
        module.eval()
        for batch in (1, 5):
            x = torch.randn(batch, 3, 8, 8)
            with torch.no_grad():
                assert torch.equal(module(x), pruned.module(x))


def test_other_lengths_after_loading(tmp_path: Path) -> None:
    """A dynamic length asked for in `compile` is dynamic after loading, either way."""
    model, ids = Text().eval(), torch.randint(0, 20, (2, 6))
    dynamic = {"ids": {0: "batch", 1: "length"}}
    pruned = fxprune.compile(model, ids, target={"params": 0.7}, dynamic_shapes=dynamic, proof="quick")
    directory = pruned.save(tmp_path / "small")
    ids = torch.randint(0, 20, (3, 11))
    with torch.no_grad():
        expected = pruned.module(ids)["hidden"]
        assert torch.equal(fxprune.load(directory)(ids)["hidden"], expected)
        assert torch.equal(fxprune.load(directory, model=Text().eval())(ids)["hidden"], expected)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    """One parameter under two names is stored once and is one parameter after loading, so that training keeps it."""
    pruned = compiled("bert")
    directory = pruned.save(tmp_path / "small")
    names = ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
    assert len(set(names) & set(load_file(directory / "weights.safetensors"))) == 1
    for module in (fxprune.load(directory), fxprune.load(directory, model=_bert()[0])):
        first, second = (module.get_parameter(n) for n in names)
        assert first is second
        module(**pruned.kwargs).logits.sum().backward()
        assert first.grad is not None


def test_loaded_models_can_be_trained(tmp_path: Path) -> None:
    """Dropout and batch norm follow train() and eval(); gradients reach what is not frozen."""
    pruned = compiled("layers")
    module = fxprune.load(pruned.save(tmp_path / "small"))
    x = torch.randn(4, 3, 8, 8)
    module.train()
    assert not torch.equal(module(x), module(x))
    count = int(module.norm.num_batches_tracked)
    module(x).sum().backward()
    assert int(module.norm.num_batches_tracked) == count + 1
    assert module.conv.weight.grad is not None and module.depthwise.weight.grad is None
    module.eval()
    assert torch.equal(module(x), module(x))


def test_folded_constants_are_saved(tmp_path: Path) -> None:
    """Biases that constants of dead units were folded into, new ones among them, come back both ways."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.Sigmoid(), nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))

    net = model()
    with torch.no_grad():
        net[0].weight[::2] = 0  # constant through the sigmoid
        net[2].weight[:3] = 0  # silent
    pruned = fxprune.compile(net, torch.randn(2, 4), target={"dead": True})
    assert pruned.plan.biases == ["2.bias"]
    directory = pruned.save(tmp_path / "small")
    x = torch.randn(5, 4)
    for module in (fxprune.load(directory), fxprune.load(directory, model=model())):
        assert [tuple(p.shape) for p in module.parameters()] == [(8, 4), (8,), (5, 8), (5,), (3, 5), (3,)]
        with torch.no_grad():
            assert torch.equal(module(x), pruned.module(x))
            torch.testing.assert_close(module(x), net(x))


def test_masks_of_torch_are_gone(tmp_path: Path) -> None:
    """A model under torch's own pruning masks is saved as the plain layers that it computes with."""
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    prune.ln_structured(net[0], "weight", amount=0.5, n=2, dim=0)
    pruned = fxprune.compile(net, torch.randn(2, 4), target={"params": 0.6})
    module = fxprune.load(pruned.save(tmp_path / "small"))
    with torch.no_grad():
        assert torch.equal(module(*pruned.args), pruned.module(*pruned.args))


SCRIPT = """
import sys
sys.modules["transformers"] = None  # its classes cannot be imported here
import torch
import fxprune
from safetensors.torch import load_file
directory, tensors = sys.argv[1:]
given = load_file(tensors)
module = fxprune.load(directory)
with torch.no_grad():
    found = module(**{n: t for n, t in given.items() if n != "expected"})
found = found if torch.is_tensor(found) else list(found.values())[0]
torch.testing.assert_close(found, given["expected"], rtol=1e-5, atol=1e-6)  # it may run on other threads
print(type(module).__name__, "transformers" in {n for n, m in sys.modules.items() if m is not None})
"""


@pytest.mark.parametrize(
    ("name", "field", "shown"), [("frozen", None, "Sequential"), ("bert", "logits", "BertForMaskedLM")]
)
def test_loading_needs_no_class(name: str, field: str | None, shown: str, tmp_path: Path) -> None:
    """A fresh process that knows neither the model's class nor its library loads and runs it."""
    pruned = compiled(name)
    directory = pruned.save(tmp_path / "small")
    pruned.module.eval()
    graph = json.loads((directory / "graph.json").read_text())
    given = dict(zip(graph["arguments"], pruned.args, strict=False)) | pruned.kwargs
    with torch.no_grad():
        out = pruned.module(**given)
    modes = {p: m.training for p, m in pruned.module.named_modules()}
    assert not any(modes.values())
    directory = pruned.save(tmp_path / "eval")
    save_file({**given, "expected": out[field] if field else out}, tmp_path / "tensors")
    command = [sys.executable, "-c", SCRIPT, str(directory), str(tmp_path / "tensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path.cwd(), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [shown, "False"]


# ---------------------------------------------------------------------- no pickles
def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is a pickle or an archive of some, and nothing is pickled or unpickled on the way."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle")

    for where, name in [(torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")]:
        monkeypatch.setattr(where, name, refuse)
    for name in ("dump", "dumps", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    pruned = compiled("text")
    directory = pruned.save(tmp_path / "small")
    fxprune.load(directory)
    fxprune.load(directory, model=Text().eval())
    for file in directory.iterdir():
        assert not zipfile.is_zipfile(file)
        data = file.read_bytes()
        assert data[:1] != b"\x80" and b"PK\x03\x04" not in data
        with pytest.raises(ValueError, match=r"opcode|pickle exhausted|no newline|not enough|unpack"):
            list(pickletools.genops(data))
    for name in ("graph.json", "plan.json"):
        json.loads((directory / name).read_text())


def test_graph_holds_no_code(tmp_path: Path) -> None:
    """A graph names operators of torch, a few functions of `operator` and torch.nn layers; all else is refused."""
    directory = compiled("text").save(tmp_path / "small")
    graph = json.loads((directory / "graph.json").read_text())
    functions = {target for _, op, target, *_ in graph["nodes"] if op == "call_function"}
    assert all(f.startswith(("aten.", "operator.")) for f in functions)
    for target in ("os.system", "builtins.eval", "operator.methodcaller"):
        with pytest.raises((SavedModelError, ValueError)):
            graphfile._function(target)
    with pytest.raises(SavedModelError, match=r"this torch has no operator aten\.nothing\.default; import the library"):
        graphfile._function("aten.nothing.default")


# ---------------------------------------------------------------------- damaged directories
@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return compiled("frozen").save(tmp_path_factory.mktemp("good") / "small")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "copy"
    directory.mkdir()
    for file in good.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    fxprune.load(directory)
    return directory


def _truncate(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def _alter(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


def _change(**values: Any) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        data = json.loads(file.read_text())
        file.write_text(json.dumps({**data, **values}))

    return change


CHECKSUM = "is truncated or altered: its checksum is not the one in plan.json. Save the model again"


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        ("weights.safetensors", _truncate, f"'{{file}}' {CHECKSUM}"),
        ("weights.safetensors", _alter, f"'{{file}}' {CHECKSUM}"),
        ("weights.safetensors", lambda f: f.write_bytes(b""), f"'{{file}}' {CHECKSUM}"),
        ("graph.json", _truncate, f"'{{file}}' {CHECKSUM}"),
        ("graph.json", _alter, f"'{{file}}' {CHECKSUM}"),
        ("graph.json", _change(format=2), f"'{{file}}' {CHECKSUM}"),
        ("weights.safetensors", Path.unlink, "'{file}' is missing (found: graph.json, plan.json, recipe.yaml)"),
        ("graph.json", Path.unlink, "'{file}' is missing (found: plan.json, recipe.yaml, weights.safetensors)"),
        ("plan.json", Path.unlink, "'{file}' is missing (found: graph.json, recipe.yaml, weights.safetensors)"),
        ("plan.json", lambda f: f.write_text("no json"), "'{file}' is truncated or altered: Expecting value: line 1"),
        ("plan.json", lambda f: f.write_bytes(b"\xff\xfe\x00"), "'{file}' is truncated or altered: "),
        ("plan.json", _truncate, "'{file}' is truncated or altered: "),
        ("plan.json", lambda f: f.write_text("[1]"), "'{file}' is not what fxprune writes. Save the model again"),
        ("plan.json", lambda f: f.write_text("{}"), "'{file}' is not what fxprune writes. Save the model again"),
        ("plan.json", _change(format=99), "'{file}' was written in format 99; this fxprune reads 2. Update fxprune"),
        ("plan.json", _change(plan={}), "'{file}' is altered: this is not a plan: KeyError: 'kept'. Save"),
        ("plan.json", _change(report=None), "'{folder}' cannot be read: TypeError: "),
        ("plan.json", _change(inputs={"spec": [9], "leaves": []}), "'{folder}' cannot be read: "),
    ],
)  # fmt: skip
def test_damage_is_noticed(copy: Path, name: str, damage: Callable[[Path], Any], text: str) -> None:
    """The message names the file, what is wrong with it, and what to do."""
    damage(copy / name)
    with pytest.raises(SavedModelError) as caught:
        fxprune.load(copy)
    assert str(caught.value).startswith(text.format(file=copy / name, folder=copy))


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(SavedModelError) as caught:
        fxprune.load(tmp_path / "nothing")
    assert str(caught.value) == f"'{tmp_path / 'nothing' / 'plan.json'}' is missing (found: no such directory)"
    (tmp_path / "empty").mkdir()
    with pytest.raises(SavedModelError, match=r"is missing \(found: an empty directory\)"):
        fxprune.load(tmp_path / "empty")


def _reseal(folder: Path) -> None:
    """Make the checksums fit again, as somebody would who edits a saved model."""
    plan = json.loads((folder / "plan.json").read_text())
    plan["sha256"] = {name: saved._checksum(folder / name) for name in plan["sha256"]}
    (folder / "plan.json").write_text(json.dumps(plan))


def test_weights_that_lack_a_tensor(copy: Path) -> None:
    weights = load_file(copy / "weights.safetensors")
    del weights["3.weight"]
    save_file(weights, copy / "weights.safetensors")
    _reseal(copy)
    with pytest.raises(SavedModelError, match=r"weights\.safetensors lacks 3\.weight"):
        fxprune.load(copy)


def test_a_graph_of_a_newer_format(copy: Path) -> None:
    _change(format=2)(copy / "graph.json")
    _reseal(copy)
    with pytest.raises(SavedModelError, match="the graph was written in format 2; this fxprune reads 1"):
        fxprune.load(copy)


@pytest.mark.parametrize(
    ("fresh", "text"),
    [
        (lambda: nn.Sequential(nn.Conv1d(3, 16, 3), nn.ReLU6(), nn.Conv1d(16, 4, 1)), "which this model does not have"),
        (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU6(), nn.Conv1d(8, 4, 1)),
         "the plan keeps index 15 of dimension 0 of '0."),
        (lambda: nn.Sequential(nn.Conv1d(3, 16, 3), nn.BatchNorm1d(16), nn.ReLU6(), nn.Conv1d(16, 9, 1)),
         "the model gives '3.weight' the shape (9, "),
        (lambda: nn.Sequential(nn.Conv1d(3, 16, 5), nn.BatchNorm1d(16), nn.ReLU6(), nn.Conv1d(16, 4, 1)),
         "the model gives '0.weight' the shape ("),
        (lambda: nn.Linear(9, 3), "', which this model does not have or does not use"),
    ],
)  # fmt: skip
def test_the_wrong_architecture(good: Path, fresh: Callable[[], nn.Module], text: str) -> None:
    """A model that the plan was not made for is refused, by the name of what does not fit."""
    with pytest.raises(SavedModelError) as caught:
        fxprune.load(good, model=fresh())
    assert text in str(caught.value)


def test_a_model_that_does_not_take_the_saved_inputs(good: Path) -> None:
    """The inputs come from the plan: a model of other inputs is an error of the saved model, not of capture."""
    fresh = nn.Sequential(nn.Conv1d(5, 16, 3), nn.BatchNorm1d(16), nn.ReLU6(), nn.Conv1d(16, 4, 1))
    with pytest.raises(SavedModelError, match="the model does not run on the inputs that the plan was made for"):
        fxprune.load(good, model=fresh)


# ---------------------------------------------------------------------- writing
def test_an_existing_directory_is_not_overwritten(tmp_path: Path) -> None:
    """A saved model is replaced only on request, anything else never."""
    pruned = compiled()
    directory = pruned.save(tmp_path / "small")
    with pytest.raises(SavedModelError) as caught:
        pruned.save(directory)
    assert (
        str(caught.value) == f"'{directory}' exists and is a saved model; pass overwrite=True, or choose another name"
    )
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("cat")
    for overwrite in (False, True):
        with pytest.raises(SavedModelError) as caught:
            pruned.save(other, overwrite=overwrite)
        assert str(caught.value) == f"'{other}' exists and is no saved model of fxprune, or choose another name"
    assert (other / "cat.jpg").read_text() == "cat"
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(SavedModelError, match="exists and is no saved model"):
        pruned.save(file, overwrite=True)


def test_overwrite_replaces_all_of_it(tmp_path: Path) -> None:
    directory = compiled("frozen").save(tmp_path / "small")
    (directory / "notes.txt").write_text("mine")
    pruned = compiled("text")
    assert pruned.save(directory, overwrite=True) == directory
    assert sorted(p.name for p in directory.iterdir()) == FILES
    assert_same_module(fxprune.load(directory), pruned.module, pruned)
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_others_may_read_what_is_saved(tmp_path: Path) -> None:
    """The directory has the permissions of any new directory, not those of a temporary one."""
    (tmp_path / "plain").mkdir()
    directory = compiled().save(tmp_path / "small")
    assert directory.stat().st_mode == (tmp_path / "plain").stat().st_mode


def _no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("where", ["save_file", "write_text", "rename", "second rename"])
def test_a_full_disk_leaves_nothing(
    where: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing under the name, or the old model as it was; no temporary folder; the reason and what to do."""
    pruned, directory = compiled("text"), tmp_path / "small"
    before = {}
    if existing:
        compiled("frozen").save(directory)
        before = {p.name: p.read_bytes() for p in directory.iterdir()}
    rename = Path.rename

    def second(path: Path, target: Path) -> Path:
        return _no_space() if path.name == "new" else rename(path, target)

    if where == "second rename":
        monkeypatch.setattr(Path, "rename", second)
    else:
        monkeypatch.setattr(saved if where == "save_file" else Path, where, _no_space)
    with pytest.raises(SavedModelError) as caught:
        pruned.save(directory, overwrite=True)
    monkeypatch.undo()
    what = "What was there before is unchanged" if existing else "Nothing is left under that name"
    assert str(caught.value) == (
        f"'{directory}' was not written: No space left on device. {what}; free some space or choose another place"
    )
    assert [p.name for p in tmp_path.iterdir()] == (["small"] if existing else [])
    if existing:
        assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


def test_a_graph_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of fxprune itself, and interrupts, clean up as well."""
    pruned = compiled()
    for error in (SavedModelError("an argument of type Foo cannot be written"), KeyboardInterrupt()):

        def fail(*_: Any, error: BaseException = error) -> Any:
            raise error

        monkeypatch.setattr(graphfile, "write", fail)
        with pytest.raises(type(error)):
            pruned.save(tmp_path / "small")
        assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys
from pathlib import Path
import fxprune
from fxprune.errors import SavedModelError
from fxprune.saved import load_pruned
pruned = load_pruned(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    pruned.save(sys.argv[2])
except SavedModelError as error:
    print(error)
"""


@pytest.mark.parametrize("share", [0.5, 1.1], ids=["weights do not fit", "graph does not fit"])
def test_a_file_that_really_cannot_be_written(good: Path, tmp_path: Path, share: float) -> None:
    """The operating system refuses to write on: no file is left."""
    sizes = {p.name: p.stat().st_size for p in good.iterdir()}
    limit = sizes["weights.safetensors"] * 0.5 if share < 1 else max(sizes["weights.safetensors"], 1024) * share
    assert share < 1 or limit < max(sizes["graph.json"], sizes["plan.json"])
    target = tmp_path / "small"
    command = [sys.executable, "-c", LIMITED, str(good), str(target), str(int(limit))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path.cwd(), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"'{target}' was not written: ")
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_parent_that_cannot_be_written(tmp_path: Path) -> None:
    """The reason is the operating system's."""
    pruned = compiled()
    (tmp_path / "file").write_text("text")
    with pytest.raises(SavedModelError) as caught:
        pruned.save(tmp_path / "file" / "small")
    small = tmp_path / "file" / "small"
    assert str(caught.value) == f"'{small}' cannot be written: '{small.parent}' is not a directory"
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):  # the superuser may write everywhere
        return
    with pytest.raises(SavedModelError, match="cannot be written: Permission denied"):
        pruned.save(locked / "small")


# ---------------------------------------------------------------------- values in graph.json
@pytest.mark.parametrize(
    "value",
    [None, True, 3, -0.5, "sum", float("inf"), float("-inf"), (1, (2, [3, None])), [slice(1, None, 2)], torch.float16,
     torch.strided, torch.channels_last, torch.device("cpu"), 1 + 2j],
    ids=repr,
)  # fmt: skip
def test_values_survive(value: Any) -> None:
    """Every kind of argument of a node is written as strict JSON and read back as it was."""
    text = json.dumps(graphfile.encode(value), allow_nan=False)
    again = graphfile.decode(json.loads(text), {})
    assert again == value and type(again) is type(value)


def test_nan_survives() -> None:
    assert str(graphfile.decode(json.loads(json.dumps(graphfile.encode(float("nan")))), {})) == "nan"


def test_values_that_cannot_be_written() -> None:
    with pytest.raises(SavedModelError, match=r"an argument of type set cannot be written: \{1\}"):
        graphfile.encode({1})
