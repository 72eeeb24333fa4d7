"""Every error that fxprune promises is raised by a public function, and its text says what to do next."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fxprune
from fxprune import cli, errors
from fxprune.errors import (
    BackendError,
    CaptureError,
    FxpruneError,
    InputError,
    NonFiniteError,
    ProofError,
    RecipeError,
    SavedModelError,
    TargetError,
    WriteBackError,
)
from fxprune.passes import ALLOCATORS, CRITERIA, criterion
from fxprune.rules.core import RULES

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")

CLASSES = [e for e in vars(errors).values() if inspect.isclass(e) and e is not FxpruneError]
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def failure(model: Any = None, x: Any = X, **recipe: Any) -> FxpruneError:
    """The error of a compilation."""
    with pytest.raises(FxpruneError) as caught:
        fxprune.compile(net() if model is None else model, x, **{"target": {"macs": 0.5}, **recipe})
    return caught.value


def test_exit_codes_are_distinct() -> None:
    """Each class has its own exit code, none of those that a shell or Python use, and a sentence about it."""
    codes = [e.exit_code for e in CLASSES]
    assert len(set(codes)) == len(codes) == 9
    assert not {0, 1, 126, 127, cli.INTERNAL, cli.INTERRUPTED} & set(codes)
    assert all(issubclass(e, FxpruneError) and e.__doc__ for e in CLASSES)
    assert set(codes) < set(cli.EXIT_CODES)


def test_all_are_raised_somewhere_below() -> None:
    """This file has a test for each."""
    text = Path(__file__).read_text()
    for error in CLASSES:
        assert f"is {error.__name__}" in text or f"pytest.raises({error.__name__}" in text, error


# ---------------------------------------------------------------------- recipes
@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ({"criterion": "magnitud"},
         "no criterion is called 'magnitud'; did you mean 'magnitude'? Known: CRITERIA"),
        ({"criterion": "l3"}, "no criterion is called 'l3'. Known: CRITERIA"),
        ({"criterion": {"nam": "random"}},
         'criterion is a name or {"name": ..., option: value}, not {\'nam\': \'random\'}'),
        ({"criterion": {"name": "magnitude", "normalise": "max"}},
         "criterion 'magnitude' has no option 'normalise'; did you mean 'normalize'? Known: p, normalize"),
        ({"criterion": {"name": "magnitude", "q": 1}}, "criterion 'magnitude' has no option 'q'. Known: p, normalize"),
        ({"criterion": {"name": "random", "p": 1}}, "criterion 'random' has no option 'p'. Known: none"),
        ({"criterion": {"name": "magnitude", "p": -1}}, "criterion 'magnitude': p must be positive, not -1"),
        ({"criterion": {"name": "magnitude", "normalize": "sum"}},
         "criterion 'magnitude': normalize is mean, max, size or none, not 'sum'"),
        ({"allocation": "unifrom"},
         "no allocation is called 'unifrom'; did you mean 'uniform'? Known: ALLOCATORS"),
        ({"allocation": {"name": "uniform", "x": 1}}, "allocation 'uniform' has no option 'x'. Known: none"),
        ({"keep": ["heads"]}, "recipe: keep: 'heads' matches no module and no parameter of the model"),
        ({"keep": ["0", "9.*"]}, "recipe: keep: '9.*' matches no module and no parameter of the model"),
        ({"criterium": "random"}, "recipe: there is no key 'criterium'; did you mean 'criterion'?"),
        ({"target": {"mcas": 0.5}}, "recipe: there is no key 'target.mcas'; did you mean 'macs'?"),
    ],
)  # fmt: skip
def test_recipe_errors(recipe: dict[str, Any], text: str) -> None:
    """What the recipe names is answered with what there is, the nearest first."""
    error = failure(**recipe)
    assert type(error) is RecipeError
    for name, registry in (("CRITERIA", CRITERIA), ("ALLOCATORS", ALLOCATORS)):
        text = text.replace(name, ", ".join(registry))
    assert str(error) == text


# ---------------------------------------------------------------------- inputs and models
@pytest.mark.parametrize(
    ("model", "x", "text"),
    [
        (lambda x: x, X, "the model is a torch.nn.Module, not function; let the `forward` of a module call it"),
        (nn.Linear, X, "the model is a torch.nn.Module, not type; a class is not a model yet, make one"),
        (None, "x", "example inputs are a tensor, a tuple of positional inputs or a dict of keyword inputs, not str"),
        (None, (X, X), "Sequential.forward(input) does not take these inputs: too many positional arguments"),
        (None, {"y": X}, "Sequential.forward(input) does not take these inputs: missing a required argument: 'input'"),
        (None, (), "Sequential.forward(input) does not take these inputs: missing a required argument: 'input'"),
    ],
)
def test_input_errors(model: Any, x: Any, text: str) -> None:
    """What was expected, and what was given."""
    error = failure(model, x)
    assert type(error) is InputError
    assert str(error).replace(" -> torch.Tensor", "") == text


def test_weights_without_values() -> None:
    """A meta model can be pruned by criteria that do not look at weights, and the message names one."""
    with torch.device("meta"):
        model = net()
    error = failure(model)
    assert type(error) is InputError
    assert str(error) == "'0.weight' is on the meta device and has no values to rank; use criterion 'random'"
    assert fxprune.compile(model, X, target={"macs": 0.5}, criterion="random").report.macs.ratio <= 0.5


def test_there_is_nothing_to_measure_against(tmp_path: Path) -> None:
    """A loaded model has no dense one beside it."""
    from fxprune.saved import load_pruned

    directory = fxprune.compile(net(), X, target={"macs": 0.5}, proof="quick").save(tmp_path / "small")
    with pytest.raises(InputError) as caught:
        load_pruned(directory).measure()
    assert str(caught.value) == "there is no dense model to measure against; pass it as `against`"


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if x.mean() > 0:  # depends on the data
            return x
        return -x


def test_capture_errors() -> None:
    """The line of the user's code that cannot be recorded, and what to do with it."""
    error = failure(Branching())
    assert type(error) is CaptureError
    head, where, advice = str(error).splitlines()
    line = inspect.getsourcelines(Branching.forward)[1] + 2
    assert head.startswith("the forward pass of Branching cannot be recorded: DataDependentOutputException: ")
    assert where == f"  at {__file__}:{line} in forward: if x.mean() > 0:  # depends on the data"
    assert advice.endswith("Move that line out of `forward`.")


def test_a_forward_that_fails_by_itself() -> None:
    error = failure(x=torch.randn(2, 9))
    assert type(error) is CaptureError
    assert str(error).splitlines()[-1] == "  Check that the model runs on the example inputs."


# ---------------------------------------------------------------------- targets
def test_a_target_out_of_reach() -> None:
    """The message says what can be reached and what stands in the way: kept groups, frozen dimensions, settings."""
    error = failure(target={"macs": 0.01}, keep=["4"], round_to=8)
    assert type(error) is TargetError
    head, title, *reasons = str(error).splitlines()
    assert head == ("the target of 0.01 of the macs cannot be reached: with every group at its floor, 0.167 are left.")
    share = (8 * 8 + 8 * 32 + 32 * 4) / (8 * 64 + 64 * 32 + 32 * 4)  # 8 of 64 units, which 32 read
    assert round(share, 3) == 0.167
    assert title == "What stands in the way:"
    assert reasons[0] == "  2.weight.0 (32 units): it cuts '4.weight', which the recipe keeps"
    assert "  0.weight, dimension 1 (8): dimension 1 of the input 'input'" in reasons
    assert "  4.weight, dimension 0 (4): it is dimension 1 of a model output" in reasons
    assert reasons[-1] == "  widths are multiples of 8 (round_to), and no group keeps less than 5% (floor)"


def test_what_is_said_to_be_reachable_is() -> None:
    """The share in the message is one that compiles."""
    error = failure(target={"macs": 0.01}, floor=0.3)
    share = float(str(error).split("at its floor, ")[1].split(" ")[0])
    report = fxprune.compile(net(), X, target={"macs": share + 5e-4}, floor=0.3).report
    assert report.macs.ratio == pytest.approx(share, abs=1e-3)
    assert type(failure(target={"macs": share - 5e-3}, floor=0.3)) is TargetError


def test_a_model_with_nothing_to_cut() -> None:
    """One layer between input and output: no group, and each dimension with its reason."""
    error = failure(nn.Linear(8, 4))
    assert type(error) is TargetError
    lines = str(error).splitlines()
    assert lines[0].endswith("cannot be reached: with every group at its floor, 1 are left.")
    assert "  weight, dimension 1 (8): dimension 1 of the input 'input'" in lines


def test_kinds_that_are_not_there() -> None:
    """Groups of other kinds than the recipe cuts are named as obstacles."""
    error = failure(groups=["heads"])
    assert "  0.weight.0 (64 units): the recipe cuts heads only, and this is of kind hidden" in str(error).splitlines()


# ---------------------------------------------------------------------- weights
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(value: float) -> None:
    """The tensor is named and where in it; keeping its module whole is a way out."""
    model = net()
    with torch.no_grad():
        model[2].weight[5, 3] = value
    error = failure(model)
    assert type(error) is NonFiniteError
    assert str(error) == (
        "'2.weight' holds NaN or infinite values (first at index 5 of dimension 0); mend the weights, or list the "
        "module under `keep`"
    )
    model = nn.Sequential(net()[:3], nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[4].weight[1, 1] = value
    assert fxprune.compile(model, X, target={"macs": 0.9}, keep=["4"], round_to=1).report.macs.ratio <= 0.9


# ---------------------------------------------------------------------- proofs
@pytest.fixture
def reverse() -> Iterator[Any]:
    """An operator that reverses the order of channels, under a rule that says it does not."""
    with torch.library._scoped_library("fxprune_errors", "DEF") as library:
        library.define("reverse(Tensor x) -> Tensor")
        library.impl("reverse", lambda x: x.flip(-1), "CompositeExplicitAutograd")
        library.impl("reverse", lambda x: torch.empty_like(x), "Meta")
        operator = torch.ops.fxprune_errors.reverse.default
        yield operator
        RULES.pop(operator, None)


class Reversing(nn.Module):
    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4)
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(x))
        x = self.operator(x)
        return self.down(x)


@pytest.mark.parametrize("proof", ["full", "quick"])
@pytest.mark.parametrize("macs", [0.3, 0.5, 0.9])
def test_a_wrong_rule_is_caught(reverse: Any, proof: str, macs: float) -> None:
    """Nothing is returned; the message names the first node that differs, its module and its line, and a way out."""
    fxprune.register_rule(reverse, lambda site, x: x)
    model = nn.Sequential(Reversing(reverse))
    error = failure(model, target={"macs": macs}, proof=proof, round_to=1)
    assert type(error) is ProofError
    head, where, advice = str(error).splitlines()
    assert head.startswith("the pruned module differs from the masked dense model by ")
    assert head.endswith("(allowed: 1e-09)." if proof == "full" else "(allowed: 2e-03).")
    line = inspect.getsourcelines(Reversing.forward)[1] + 2
    assert where == (f"  The first node that differs is reverse = {reverse} in 0 ({__file__}:{line} in forward).")
    assert advice.startswith("  Nothing is returned, because this is a defect of a rule")
    assert advice.endswith("to go on, name its module under `keep` in the recipe.")


def test_the_way_out_of_a_wrong_rule(reverse: Any) -> None:
    """What the message advises works: the module kept whole, or no rule at all, which freezes what it touches."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), Reversing(reverse))
    fxprune.register_rule(reverse, lambda site, x: x)
    assert fxprune.compile(model, X, target={"macs": 0.9}, keep=["3"], round_to=1).report.macs.ratio <= 0.9
    RULES.pop(reverse)
    report = fxprune.compile(model, X, target={"macs": 0.9}, round_to=1).report
    assert report.unknown == {"fxprune_errors.reverse.default": 1}
    assert report.whole["3.up.weight.0"] == "fxprune_errors.reverse.default has no rule"
    assert "no rule for fxprune_errors.reverse.default (1 x): what it touches stays whole" in report.lines()


def test_a_rule_of_the_wrong_shape_is_no_rule(reverse: Any) -> None:
    """Dimensions that do not have the sizes of the result are not believed."""
    fxprune.register_rule(reverse, lambda site, x: x[:1])
    report = fxprune.compile(Reversing(reverse), X, target={"macs": 1}).report
    assert report.whole["up.weight.0"].startswith(
        "the rule of fxprune_errors.reverse.default does not give the shape ("
    )


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + torch.rand(4)


def test_a_forward_that_is_not_deterministic() -> None:
    """The captured graph and the model give different outputs: what may be the cause, and what to do."""
    error = failure(Noisy())
    assert type(error) is ProofError
    assert str(error).startswith("the captured graph differs from Noisy itself by ")
    assert str(error).endswith("state outside its weights. Make it deterministic in eval mode.")


# ---------------------------------------------------------------------- backends and files
def test_backend_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An unknown backend, a missing one, and an ending that no backend writes."""
    error = failure(backend="onnxruntim")
    assert type(error) is BackendError
    assert str(error) == (
        "no backend is called 'onnxruntim'; did you mean 'onnxruntime'? "
        "Known: onnxruntime, tensorrt, tensorrt-rtx, torch, torch-aot, torch-compile"
    )
    pruned = fxprune.compile(net(), X, target={"macs": 0.5}, proof="quick")
    with pytest.raises(BackendError) as caught:
        pruned.export(tmp_path / "model.trt")
    assert str(caught.value) == f"'{tmp_path / 'model.trt'}' ends in '.trt'; known endings: .onnx, .pt2, .engine"
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else found(name, *a)
    )
    for run in (pruned.measure, lambda: pruned.export(tmp_path / "model.onnx")):
        with pytest.raises(BackendError) as caught:
            run()
        assert str(caught.value) == (
            "backend 'onnxruntime' cannot be used here: onnxruntime not installed; pip install 'fxprune[onnx]'"
        )
    assert list(tmp_path.iterdir()) == []


def test_saved_model_errors(tmp_path: Path) -> None:
    with pytest.raises(SavedModelError) as caught:
        fxprune.load(tmp_path)
    assert str(caught.value) == f"'{tmp_path / 'plan.json'}' is missing (found: an empty directory)"


# ---------------------------------------------------------------------- registries
def test_names_are_taken_once() -> None:
    """A second criterion or rule under a taken name is refused, and the first one stays."""
    before = CRITERIA["magnitude"]
    with pytest.raises(ValueError, match="criterion 'magnitude' is registered twice: by "):
        criterion("magnitude")(lambda group, statistics: None)
    assert CRITERIA["magnitude"] is before
    with pytest.raises(ValueError, match=r"aten\.relu\.default has a rule already, "):
        fxprune.register_rule(torch.ops.aten.relu.default, lambda site, x: x)


# ---------------------------------------------------------------------- the command line
def test_the_command_line_returns_the_exit_code(tmp_path: Path) -> None:
    """An error is one line on standard error and its class's exit code."""
    result = CliRunner().invoke(
        cli.app, ["compile", "nothing-like-this", "--out", str(tmp_path / "x"), "--target", "macs"]
    )
    assert result.exit_code == RecipeError.exit_code
    assert "recipe: target.macs: give the share to keep, 0.5 for example (given: True)" in result.stderr


def test_a_class_that_writes_its_width_down() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.scale = nn.Linear(8, 64), nn.Linear(64, 4), nn.Parameter(torch.rand(4, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down((self.up(x).view(-1, 4, 16) * self.scale).flatten(1))

    pruned = fxprune.compile(Written(), X, target={"macs": 0.5})
    with pytest.raises(WriteBackError) as caught:
        pruned.module_like()
    assert "Written does not run with the smaller tensors at " in str(caught.value)
    assert "test_errors.py" in str(caught.value) and ".view(-1, 4, 16)" in str(caught.value)
