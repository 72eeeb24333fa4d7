"""fxprune beside the rest of PyTorch: wrappers, parametrisations, hooks, dtypes, custom operators."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as masks
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fxprune
from fxprune.admit import admit
from fxprune.errors import CaptureError, InputError
from fxprune.saved import load_pruned

# What is tested is how old ways are met, which torch advises against.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{what}")
    for what in ("torch.jit", "torch.ao.quantization", "nested tensors", "weight_norm", "quantize", "quant_min")
]
HALF = {"target": {"params": 0.5}, "round_to": 1}
INPUT = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def mlp() -> Any:
    """Three linear layers that prune to about half."""
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def halved(model: Any, example: Any = INPUT, **options: Any) -> fxprune.Pruned:
    """Prune, and check that something went and that the model is as it was, to the classes of its modules."""
    known = isinstance(model, nn.Module)
    before = {n: t.clone() for n, t in model.state_dict().items()} if known else {}
    kinds = [(type(m), dict(vars(m))) for m in model.modules()] if known else []
    pruned = fxprune.compile(model, example, {**HALF, **options})
    assert pruned.report.params.pruned < 0.7 * pruned.report.params.dense
    if known:
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(t.is_meta or torch.equal(t, after[n]) for n, t in before.items())
        for (kind, attributes), module in zip(kinds, model.modules(), strict=True):
            assert type(module) is kind
            assert list(vars(module)) == list(attributes)
    return pruned


def noted(pruned: fxprune.Pruned, *words: str) -> None:
    """One note holds all the words."""
    assert any(all(w in note for w in words) for note in pruned.report.notes), pruned.report.notes


# ---------------------------------------------------------------------- weights
class Tied(nn.Module):
    """An embedding whose weight is that of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of tokens."""
        x = self.embedding(tokens)
        scores: Tensor = self.head(x + self.down(self.up(x).relu()))
        return scores


def tied(module: Any) -> bool:
    return module.embedding.weight is module.head.weight


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tokens = torch.randint(0, 20, (3, 7))
    pruned = halved(Tied().train(), tokens)
    module = pruned.module
    assert tied(module)
    assert pruned.module.get_parameter("head.weight").shape[1] < 32
    pruned.save(tmp_path / "small")
    loaded = [
        fxprune.load(tmp_path / "small"),
        load_pruned(tmp_path / "small").module,
        fxprune.load(tmp_path / "small", Tied()),
    ]
    for one in [module, *loaded]:
        assert tied(one)
        torch.testing.assert_close(one(tokens), pruned.module(tokens))
    for one in [*loaded, module]:
        before = one.get_parameter("head.weight").detach().clone()
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        one(tokens).square().sum().backward()
        optimizer.step()
        assert tied(one)
        assert not torch.equal(one.get_parameter("embedding.weight"), before)


def test_frozen_weights_are_pruned_and_stay_frozen() -> None:
    model = mlp().requires_grad_(False)
    model[4].requires_grad_(True)
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in halved(model).module.named_parameters()} == wanted


@pytest.mark.parametrize("outside", [False, True])
def test_inference_weights_give_a_result_that_trains(outside: bool) -> None:
    with torch.inference_mode():
        model = mlp()
        module = halved(model).module if not outside else None
    module = module or halved(model).module
    module(INPUT).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    module = halved(mlp().to(dtype), INPUT.to(dtype)).module
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module(INPUT.to(dtype)).dtype is dtype


class Mixed(nn.Module):
    """The body in bfloat16, the head in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 32).bfloat16(), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Cast down and up."""
        scores: Tensor = self.head(self.body(x.bfloat16()).relu().float())
        return scores


def test_parts_in_other_dtypes() -> None:
    module = halved(Mixed()).module
    assert module.get_parameter("body.weight").dtype is torch.bfloat16
    assert module.get_parameter("head.weight").dtype is torch.float32


def test_meta_models_are_ranked_at_random_or_refused() -> None:
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(InputError, match=r"meta device.*random"):
        fxprune.compile(model, INPUT, HALF)
    assert halved(model, criterion="random").module.get_parameter("0.weight").is_meta


class Buffers(nn.Module):
    """Scales its features by one buffer that is saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4)
        self.register_buffer("scale", torch.rand(32) + 0.5)
        self.register_buffer("shift", torch.rand(32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scale, shift, project."""
        scores: Tensor = self.down((self.up(x) * self.scale + self.shift).relu())
        return scores


def test_buffers_are_cut_and_stay_as_persistent_as_they_were(tmp_path: Path) -> None:
    pruned = halved(Buffers())
    width = pruned.module.get_parameter("up.weight").shape[0]
    pruned.save(tmp_path / "small")
    for module in (pruned.module, fxprune.load(tmp_path / "small")):
        assert module.get_buffer("scale").shape == module.get_buffer("shift").shape == (width,)
        assert "scale" in module.state_dict()
        assert "shift" not in module.state_dict()
        torch.testing.assert_close(module(INPUT), pruned.module(INPUT))


# ---------------------------------------------------------------------- parametrisations and masks
class Softplus(nn.Module):
    """A parametrisation of the user's own."""

    def forward(self, x: Tensor) -> Tensor:
        """Make positive."""
        return nn.functional.softplus(x)


@pytest.mark.parametrize(
    "put",
    [
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.spectral_norm,
        lambda layer: parametrize.register_parametrization(layer, "weight", Softplus()),
        lambda layer: masks.l1_unstructured(layer, "weight", 0.5),
        lambda layer: masks.random_unstructured(masks.l1_unstructured(layer, "weight", 0.2), "weight", 0.2),
    ],
    ids=["spectral", "orthogonal", "old spectral", "own", "mask", "two masks"],
)
@pytest.mark.parametrize("training", [False, True])
def test_what_computes_a_weight_is_folded(put: Callable[[Any], Any], training: bool) -> None:
    model = mlp()
    put(model[2])
    model.train(training)
    pruned = halved(model)
    noted(pruned, "2.weight", "folded")
    assert pruned.module.training is training
    assert isinstance(pruned.module.get_submodule("2"), nn.Linear)
    assert pruned.module.get_parameter("2.weight").requires_grad
    folded = admit(model).model
    torch.testing.assert_close(folded.eval()(INPUT), model.eval()(INPUT))


def test_a_folded_layer_keeps_what_else_it_is() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(8, 32)).requires_grad_(False)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(32, 4), nn.Dropout())
    folded: Any = admit(model.eval()).model
    assert type(folded[0]) is nn.Linear
    assert not folded[0].weight.requires_grad
    assert folded[0].bias is layer.bias
    assert folded[2].weight is model.get_parameter("2.weight")  # nothing is copied that does not change


def test_a_mask_makes_dead_units() -> None:
    model = mlp()
    masks.ln_structured(model[0], "weight", 0.5, 2, 0)
    masks.custom_from_mask(model[0], "bias", model[0].weight_mask[:, 0])
    pruned = fxprune.compile(model, INPUT, target={"dead": True})
    assert pruned.module.get_parameter("0.weight").shape[0] == 16
    torch.testing.assert_close(pruned.module(INPUT), model(INPUT))


@pytest.mark.parametrize("put", [parametrizations.weight_norm, nn.utils.weight_norm], ids=["parametrised", "hook"])
def test_weight_norm_is_pruned_and_stays(put: Callable[[Any], Any]) -> None:
    model = mlp()
    put(model[2])
    module = halved(model).module
    assert {"2.weight_g", "2.parametrizations.weight.original0"} & set(dict(module.named_parameters()))


def test_a_masked_recurrent_layer_runs_on_its_mask() -> None:
    layer = nn.LSTM(8, 16, batch_first=True)
    masks.l1_unstructured(layer, "weight_ih_l0", 0.5)
    folded: Any = admit(layer).model
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(folded(x)[0], layer(x)[0])
    assert (folded.weight_ih_l0 == 0).float().mean() >= 0.5


class Uncopyable(nn.Module):
    """A layer that holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = (i for i in range(3))
        self.layer = parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        y: Tensor = self.layer(x)
        return y


def test_what_cannot_be_copied_cannot_be_folded_and_says_so() -> None:
    model = Uncopyable()
    with pytest.raises(InputError, match="cannot be copied"):
        fxprune.compile(model, INPUT, HALF)
    assert parametrize.is_parametrized(model.layer)


def test_folding_survives_saving_and_writing_back(tmp_path: Path) -> None:
    model = mlp()
    parametrizations.spectral_norm(model[2])
    pruned = halved(model.eval())
    pruned.save(tmp_path / "small")
    again = fxprune.load(tmp_path / "small", model)
    torch.testing.assert_close(again(INPUT), pruned.module(INPUT))
    torch.testing.assert_close(pruned.module_like(model)(INPUT), pruned.module(INPUT))


# ---------------------------------------------------------------------- hooks
def test_a_hook_that_changes_the_output_is_in_the_graph() -> None:
    model = mlp()
    model[0].register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
    model[2].register_forward_hook(lambda _m, _args, out: out * 2)
    pruned = fxprune.compile(model, INPUT, {"target": {"params": 1.0}})
    torch.testing.assert_close(pruned.module(INPUT), model(INPUT))
    noted(pruned, "forward hooks", "'2'", "in the graph")
    noted(pruned, "forward pre-hooks", "'0'")


def test_other_hooks_are_reported_and_kept_on_the_model() -> None:
    model = mlp()
    model[0].register_full_backward_hook(lambda *_: None)
    model.register_full_backward_pre_hook(lambda *_: None)
    model[2].register_state_dict_post_hook(lambda *_: None)
    model[2].register_load_state_dict_pre_hook(lambda *_: None)
    model[4].weight.register_hook(lambda gradient: gradient)
    pruned = halved(model)
    for label, place in [
        ("backward hooks", "'0'"),
        ("backward pre-hooks", "the model"),
        ("state_dict hooks", "'2'"),
        ("load_state_dict pre-hooks", "'2'"),
        ("gradient hooks", "'4.weight'"),
    ]:
        noted(pruned, label, place)
    assert len(model[0]._backward_hooks) == 1


def test_the_hooks_of_torch_itself_are_no_news() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    assert not admit(nn.Sequential(layer, parametrizations.weight_norm(nn.Linear(32, 4)))).notes


# ---------------------------------------------------------------------- wrappers
@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel, lambda m: nn.DataParallel(m).train()]
)
def test_wrappers_come_off(wrap: Callable[[Any], Any]) -> None:
    pruned = halved(wrap(mlp()))
    noted(pruned, "wrapped in")
    assert {"0", "2", "4"} <= set(dict(pruned.module.named_modules()))


def test_distributed_wrappers() -> None:
    from torch.distributed.fsdp import fully_shard

    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            noted(halved(nn.parallel.DistributedDataParallel(mlp())), "DistributedDataParallel")
            with pytest.raises(InputError, match="sharded by FSDP"):
                fxprune.compile(fully_shard(mlp()), INPUT, HALF)
        finally:
            torch.distributed.destroy_process_group()


def test_wrappers_inside_and_compiled_in_place() -> None:
    model = mlp()
    model[2] = torch.compile(model[2])
    pruned = halved(model)
    noted(pruned, "'2'", "OptimizedModule")
    assert isinstance(pruned.module.get_submodule("2"), nn.Linear)
    model = mlp()
    model[2].compile()
    noted(halved(model), "'2'", "compiled in place")
    assert model[2]._compiled_call_impl is not None


def test_exported_programs_are_taken_as_their_module() -> None:
    program = torch.export.export(mlp(), (INPUT,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    pruned = halved(program)
    noted(pruned, "exported program")
    assert pruned.plan.dynamic
    assert isinstance(pruned.module.get_submodule("2"), nn.Linear)


# ---------------------------------------------------------------------- refusals
class Codes(nn.Module):
    """A layer whose weight is held as 8-bit codes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 8, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Decode and multiply."""
        return x @ self.weight.float().t()


class Special(Tensor):
    """A tensor with operators of its own."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass on."""
        return func(*args, **(kwargs or {}))


def special() -> nn.Module:
    model = mlp()
    model[0]._parameters["weight"] = torch.randn(32, 8).as_subclass(Special)
    return model  # type: ignore[no-any-return]


def sparse() -> nn.Module:
    model = mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())
    return model  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "scripted": (lambda: torch.jit.script(mlp()), "torch.jit"),
    "traced": (lambda: torch.jit.trace(mlp(), INPUT), "torch.jit"),
    "scripted part": (lambda: nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Linear(8, 8))), "'1'.*torch.jit"),
    "dynamically quantised": (lambda: torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}), "quantised Linear"),
    "codes": (Codes, "int8: codes"),
    "special tensor": (special, "'0.weight' is a Special"),
    "sparse": (sparse, "to_dense"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), "run the model once"),
    "function": (lambda: lambda x: x, "not function; let the `forward` of a module call it"),
    "class": (lambda: nn.Linear, "make one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pruned_is_refused_with_a_reason(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(InputError, match=reason):
        fxprune.compile(make(), INPUT, HALF)


def test_statically_quantised_models_are_refused() -> None:
    model: Any = nn.Sequential(torch.ao.quantization.QuantStub(), mlp(), torch.ao.quantization.DeQuantStub()).eval()
    model.qconfig = torch.ao.quantization.get_default_qconfig()
    prepared = torch.ao.quantization.prepare(model)
    prepared(INPUT)
    with pytest.raises(InputError, match="quantised"):
        fxprune.compile(torch.ao.quantization.convert(prepared), INPUT, HALF)


def test_special_inputs() -> None:
    class Plain(Tensor):
        pass

    class Named(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(func, types, args, kwargs)

    assert not halved(mlp(), INPUT.as_subclass(Plain)).report.notes
    noted(halved(mlp(), INPUT.as_subclass(Named)), "'input' is a Named")
    for value in (INPUT.to_sparse(), INPUT.as_subclass(Special), torch.nested.nested_tensor([INPUT, INPUT])):
        with pytest.raises(InputError, match=r"'input'.*plain dense tensor"):
            fxprune.compile(mlp(), value, HALF)


# ---------------------------------------------------------------------- custom operators and functions
@torch.library.custom_op("fxprune_test::ruled", mutates_args=())
def ruled(x: Tensor) -> Tensor:
    """An operator that gets a rule."""
    return x * 2


@torch.library.custom_op("fxprune_test::unruled", mutates_args=())
def unruled(x: Tensor) -> Tensor:
    """An operator without a rule."""
    return x * 2


@torch.library.custom_op("fxprune_test::unfaked", mutates_args=())
def unfaked(x: Tensor) -> Tensor:
    """An operator whose result's shape nobody knows."""
    return x * 2


ruled.register_fake(torch.empty_like)
unruled.register_fake(torch.empty_like)
fxprune.register_rule(torch.ops.fxprune_test.ruled.default, lambda _site, x: x)


class Calls(nn.Module):
    """Calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Call it."""
        return self.function(x)


def test_an_operator_with_a_rule_is_cut_through_and_one_without_is_not() -> None:
    model = mlp()
    model[1] = Calls(torch.ops.fxprune_test.ruled)
    assert halved(model).module.get_parameter("0.weight").shape[0] < 32
    model[1] = Calls(torch.ops.fxprune_test.unruled)
    pruned = halved(model)
    assert pruned.module.get_parameter("0.weight").shape[0] == 32
    assert pruned.report.unknown == {"fxprune_test.unruled.default": 1}


def test_nothing_but_unknown_operators_comes_back_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 8), *(Calls(torch.ops.fxprune_test.unruled) for _ in range(50)))
    pruned = fxprune.compile(model, INPUT, HALF | {"target": {"params": 1.0}})
    noted(pruned, "no group can be cut")
    assert pruned.report.unknown == {"fxprune_test.unruled.default": 50}
    assert pruned.report.seconds["analyse"] < 1
    torch.testing.assert_close(pruned.module(INPUT), model(INPUT))


def test_an_operator_without_a_fake_says_what_is_missing() -> None:
    model = mlp()
    model[1] = Calls(torch.ops.fxprune_test.unfaked)
    with pytest.raises(CaptureError, match="register_fake"):
        fxprune.compile(model, INPUT, HALF)


class Clamp(torch.autograd.Function):
    """A function with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Clamp."""
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Pass straight through."""
        return gradients[0]


def test_autograd_functions_are_recorded_as_their_operators() -> None:
    model = mlp()
    model[1] = Calls(Clamp.apply)  # type: ignore[arg-type]
    noted(halved(model), "Clamp", "backward")


# ---------------------------------------------------------------------- inputs and outputs
@dataclass
class Result:
    """An output that is a dataclass."""

    scores: Tensor
    hidden: Tensor | None


torch.utils._pytree.register_dataclass(Result)


class Structured(nn.Module):
    """Nested inputs, an option, and nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, batch: dict[str, Any], *, scale: float = 1.0, mode: str = "plain") -> Any:
        """Return the scores in the form that is asked for."""
        hidden = self.up(batch["x"] + batch["pair"][0]).relu() * scale
        scores = self.down(hidden)
        if mode == "dataclass":
            return Result(scores, None)
        return {"scores": scores, "rest": (hidden.sum(-1), [scores])}


@pytest.mark.parametrize("mode", ["plain", "dataclass"])
def test_nested_inputs_and_outputs(mode: str, tmp_path: Path) -> None:
    batch = {"x": INPUT, "pair": (INPUT, 3)}
    model = Structured()
    pruned = fxprune.compile(model, (batch,), {"target": {"params": 1.0}}, kwargs={"scale": 2.0, "mode": mode})
    found, wanted = pruned.module(batch, scale=2.0, mode=mode), model(batch, scale=2.0, mode=mode)
    assert type(found) is type(wanted)
    if mode == "dataclass":
        torch.testing.assert_close(found.scores, wanted.scores)
        assert found.hidden is None
        return
    torch.testing.assert_close(found, wanted)
    small = fxprune.compile(model, (batch,), HALF, kwargs={"scale": 2.0, "mode": mode})
    small.save(tmp_path / "small")
    loaded = fxprune.load(tmp_path / "small")
    torch.testing.assert_close(loaded(batch, scale=2.0, mode=mode), small.module(batch, scale=2.0, mode=mode))


def test_inputs_that_are_no_tensors_are_noted() -> None:
    """Another value of theirs would be ignored: the report says so."""
    pruned = fxprune.compile(Structured(), ({"x": INPUT, "pair": (INPUT, 3)},), HALF, kwargs={"scale": 2.0})
    note = "inputs that are no tensors are written into the graph, which ignores others: batch_pair_1=3, scale=2.0"
    assert note in pruned.report.notes


class Unpacks(nn.Module):
    """An input that torch cannot look into."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(8, 4)

    def forward(self, packed: Any) -> Tensor:
        return self.down(packed.scores)


def test_tensors_hidden_in_an_input_are_refused() -> None:
    """They would become constants, and the pruned module would give the same result for every input."""
    with pytest.raises(InputError, match="is a Unregistered that holds tensors, which would become constants"):
        fxprune.compile(Unpacks(), (Unregistered(INPUT),), HALF)
    with pytest.raises(InputError, match="is a SimpleNamespace that holds tensors"):
        fxprune.compile(Unpacks(), (SimpleNamespace(scores=[INPUT]),), HALF)


def test_models_prepared_for_quantisation_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
    with pytest.raises(InputError, match="prepares for quantisation with the dense model's ranges"):
        fxprune.compile(torch.ao.quantization.prepare_qat(model), INPUT, HALF)


@dataclass
class Unregistered:
    """An output that torch cannot look into."""

    scores: Tensor


def test_an_output_that_cannot_be_looked_into_says_how_it_could() -> None:
    with pytest.raises(CaptureError, match=r"register_dataclass\(Unregistered\)"):
        fxprune.compile(nn.Sequential(mlp(), Calls(Unregistered)), INPUT, HALF)  # type: ignore[arg-type]
