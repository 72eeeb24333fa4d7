"""The command line: every command, its JSON, its errors and their exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner, Result

import fxprune
from fxprune import cli, doctor, sources
from fxprune.backends import BACKENDS
from fxprune.errors import BackendError, FxpruneError, InputError
from fxprune.recipe import Recipe, Target
from fxprune.sources import describe_inputs, parse_input, resolve

# torch's own: the first when its oneDNN switches are set, the second when a module with a tree specification is copied.
pytestmark = [
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]

NETS = """
import torch
from torch import nn
from neighbour import WIDTH


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        print("a model that prints")
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def net():
    return Net(), torch.randn(2, 8)


def bare():
    return Net()


def keyword():
    return nn.Bilinear(8, 6, 4), {"input1": torch.randn(2, 8), "input2": torch.randn(2, 6)}


ready = nn.Linear(8, 4)
number = 3


def broken():
    raise ValueError("no weights here")


def wrong():
    return "a string"


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def branch():
    return Branch(), torch.randn(2, 8)


def spoilt():
    model = Net()
    model.first.weight.data[0, 0] = float("nan")
    return model, torch.randn(2, 8)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with nets.py in it."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "neighbour.py").write_text("WIDTH = 64\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("neighbour", None)
    sys.modules.pop("fxprune_model_nets", None)


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def run_json(*arguments: object, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code).stdout)


def fails(code: int, message: str, *arguments: object) -> None:
    """Check exit code and text of an error, on standard error, and as JSON."""
    result = run(*arguments, code=code)
    assert result.stdout == ""
    assert f"error: {message}" in result.stderr
    error = run_json(*arguments, code=code)["error"]
    assert error["exit_code"] == code
    assert error["message"].startswith(message)


def subprocess_run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(fxprune.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-m", "fxprune", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# ---------------------------------------------------------------------- help
def options(command: str) -> set[str]:
    group = typer.main.get_command(cli.app)
    return {name for p in group.commands[command].params for name in p.opts}  # type: ignore[attr-defined]


def test_every_key_of_a_recipe_is_an_option_of_compile() -> None:
    assert {f"--{name.replace('_', '-')}" for name in Recipe.model_fields} <= options("compile")


def test_help_names_every_target_and_every_exit_code(folder: Path) -> None:
    shown = run("compile", "--help").stdout
    assert all(name in shown for name in Target.model_fields)
    shown = run("--help").stdout
    codes = {e.exit_code for e in FxpruneError.__subclasses__()} | {0, cli.INTERNAL, cli.INTERRUPTED}
    assert all(re.search(rf"^ +{code}  \w", shown, re.MULTILINE) for code in codes)
    assert all(form in " ".join(shown.split()) for form in sources.FORMS)


def test_every_command_has_json_and_one_line_of_help() -> None:
    group = typer.main.get_command(cli.app)
    names = {
        "compile",
        "explain",
        "ops",
        "bench",
        "profile",
        "criteria",
        "backends",
        "doctor",
        "export",
        "report",
        "sweep",
        "train",
    }
    assert set(group.commands) == names  # type: ignore[attr-defined]
    for name in names:
        assert "--json" in options(name)
        assert (group.commands[name].help or "").endswith(".")  # type: ignore[attr-defined]


def test_version() -> None:
    assert run("--version").stdout == f"fxprune {fxprune.__version__}\n"


def test_a_wrong_command_line_is_answered_with_code_2() -> None:
    assert "No such command" in run("frobnicate", code=2).stderr
    assert "Missing argument" in run("explain", code=2).stderr


# ---------------------------------------------------------------------- compile
def test_compile_saves_times_and_says_how_to_go_on(folder: Path) -> None:
    result = run("compile", "nets.py:net", "--target", "macs=0.5", "--out", "small/", "--onnx", "small.onnx")
    assert "a model that prints" not in result.stdout
    assert "a model that prints" in result.stderr
    for expected in ("parameters", "MACs", "speed-up", "proved: pruned equals masked dense", "wrote  small.onnx"):
        assert expected in result.stdout
    assert "bench  fxprune bench small --against nets.py:net\n" in result.stdout
    assert (folder / "small.onnx").stat().st_size > 0
    assert fxprune.load("small")(torch.randn(3, 8)).shape == (3, 4)


def test_compile_answers_in_json_and_its_commands_work(folder: Path) -> None:
    data = run_json(
        *("compile", "nets.py:net", "--target", "params=0.6", "--out", "a b", "--no-measure", "--seed", "3"),
        *("--criterion", "random", "--allocation", "global", "--round-to", "4", "--floor", "0.1", "--proof", "quick"),
        *("--keep", "first", "--groups", "hidden", "--backend", "torch"),
    )
    recipe = data["report"]["recipe"]
    assert recipe["target"] == Target(params=0.6).model_dump()
    assert (recipe["criterion"], recipe["allocation"], recipe["round_to"]) == ("random", "global", 4)
    assert (recipe["floor"], recipe["proof"], recipe["seed"], recipe["backend"]) == (0.1, "quick", 3, "torch")
    assert (recipe["keep"], recipe["groups"]) == (["first"], ["hidden"])
    assert data["report"]["params"]["pruned"] <= 0.6 * data["report"]["params"]["dense"]
    assert data["report"]["latency"] == []
    names = "graph.json", "plan.json", "recipe.yaml", "weights.safetensors"
    assert set(data["files"]) == {f"a b/{name}" for name in names}
    assert data["commands"]["bench"] == "fxprune bench 'a b' --against nets.py:net"
    shell = data["commands"]["load"].replace("python", sys.executable, 1)
    environment = {**os.environ, "PYTHONPATH": str(Path(fxprune.__file__).parent.parent)}
    shown = subprocess.run(shell, shell=True, env=environment, capture_output=True, text=True, check=True).stdout
    assert "Linear(in_features=8, out_features=64" in shown


def test_options_override_the_recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("target: {macs: 0.9}\nseed: 7\nround_to: 2\nkeep: [first]\n")
    common = ("compile", "nets.py:net", "--recipe", "recipe.yaml", "--no-measure", "--overwrite", "--out", "out")
    recipe = run_json(*common)["report"]["recipe"]
    assert (recipe["target"]["macs"], recipe["seed"], recipe["round_to"], recipe["keep"]) == (0.9, 7, 2, ["first"])
    recipe = run_json(*common, "--target", "params=0.8", "--seed", "1", "--keep", "head")["report"]["recipe"]
    assert recipe["target"] == Target(params=0.8).model_dump()
    assert (recipe["seed"], recipe["round_to"], recipe["keep"]) == (1, 2, ["head"])


def test_a_model_that_cannot_be_timed_is_saved_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise BackendError("the backend broke down")

    monkeypatch.setattr(type(BACKENDS["torch"]), "_build", refuse)
    result = run("compile", "nets.py:net", "--target", "macs=0.5", "--out", "small", "--backend", "torch", code=8)
    assert "error: the model was saved in 'small', but not timed: the backend broke down" in result.stderr
    assert "wrote  small/plan.json" in result.stdout
    assert fxprune.load("small")(torch.randn(1, 8)).shape == (1, 4)


def test_a_missing_backend_is_told_before_anything_is_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(BACKENDS["onnxruntime"]), "available", lambda self: "onnx is missing: pip install onnx")
    common = ("compile", "nets.py:net", "--target", "macs=0.5", "--out", "small")
    message = "backend 'onnxruntime' cannot be used here: onnx is missing: pip install onnx. Pass --no-measure"
    fails(8, message, *common)
    assert not (folder / "small").exists()
    run(*common, "--no-measure")


# ---------------------------------------------------------------------- explain, ops and the lists
def test_explain(folder: Path) -> None:
    data = run_json("explain", "nets.py:net")
    assert [(g["name"].split(".")[0], g["kind"], g["units"]) for g in data["groups"]] == [
        ("first", "hidden", 64),
        ("second", "hidden", 64),
    ]
    assert (data["model"], data["params"], data["inputs"]) == ("Net", 4996, "2x8 float32")
    shown = run("explain", "nets.py:net").stdout
    assert "Net: 4,996 parameters, 9,728 MACs on 2x8 float32" in shown
    assert re.search(r"second\.\w+\.0 +hidden +ffn +64 +69 +136 +3", shown)


def test_explain_answers_only_what_was_asked(folder: Path) -> None:
    name = run_json("explain", "nets.py:net")["groups"][0]["name"]
    asked = ("explain", "nets.py:net", "--coupled", "first.weight.0", "second.weight.1", "--group", name, "--frozen")
    data = run_json(*asked)
    assert set(data) == {"coupled", "group", "frozen"}
    assert data["coupled"]["groups"] == [name]
    assert [n["operator"] for n in data["group"]["nodes"]] == ["aten.linear.default", "aten.relu.default"]
    assert {w["tensor"] for w in data["frozen"]} == {"first.weight", "head.weight", "head.bias"}
    shown = run(*asked).stdout
    assert re.search(r"relu = aten.relu.default \(nets.py:\d+ in forward\)", shown)
    assert "stays whole because" in shown


def test_ops(folder: Path) -> None:
    data = run_json("ops", "nets.py:net")
    assert {(o["name"], o["count"], o["rule"]) for o in data["operators"]} == {
        ("aten.linear.default", 3, True),
        ("aten.relu.default", 2, True),
    }
    assert data["unknown"] == []
    assert "2 of 2 operators have a rule" in run("ops", "nets.py:net").stdout


def test_criteria_and_backends() -> None:
    data = run_json("criteria")
    assert {"magnitude", "random"} <= set(data["criteria"])
    assert {"uniform", "global"} <= set(data["allocations"])
    assert all(data["criteria"].values())
    assert "magnitude" in run("criteria").stdout
    assert {b["name"] for b in run_json("backends")["backends"]} == set(BACKENDS)
    assert "onnxruntime" in run("backends").stdout


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(BACKENDS["onnxruntime"]), "available", lambda self: "onnx is missing: pip install onnx")
    monkeypatch.setattr(doctor, "FRAGILE", {})
    data = run_json("doctor")
    assert data["fxprune"] == fxprune.__version__
    assert {p["name"]: p["version"] for p in data["packages"]}["torch"] == torch.__version__
    assert {b["name"]: b["problem"] for b in data["backends"]}["onnxruntime"] == "onnx is missing: pip install onnx"
    words = run("doctor").stdout.split()  # a narrow terminal wraps the column anywhere
    assert "no:" in words and "missing:" in words


def test_doctor_says_which_package_is_at_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "shaky.py").write_text("import wobbly\n")
    (folder / "wobbly.py").write_text("raise RuntimeError('operator wobbly::nms does not exist')\n")
    monkeypatch.syspath_prepend(str(folder))
    assert doctor._problem("shaky") == (
        "cannot be imported: RuntimeError in wobbly: operator wobbly::nms does not exist"
    )


# ---------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "there is no target; pass --target with one of macs=SHARE, params=SHARE, memory=SHARE, speedup=NUMBER", ()),
        (2, "recipe: there is no key 'target.mac'; did you mean 'macs'?", ("--target", "mac=0.5")),
        (2, "recipe: target.macs: Input should be less than or equal to 1", ("--target", "macs=1.5")),
        (
            2,
            "recipe: groups: there is no kind 'channel'; did you mean 'channels'?",
            ("--target", "macs=0.5", "--groups", "channel"),
        ),
        (2, "no criterion is called 'magnitud'; did you mean", ("--target", "macs=0.5", "--criterion", "magnitud")),
        (2, "no allocation is called 'unifrom'; did you mean", ("--target", "macs=0.5", "--allocation", "unifrom")),
        (2, "the recipe none.yaml cannot be read: No such file", ("--recipe", "none.yaml")),
        (2, "recipe: keep: 'nothing' matches no module", ("--target", "macs=0.5", "--keep", "nothing")),
        (3, "--onnx small.bin: the name must end in .onnx", ("--target", "macs=0.5", "--onnx", "small.bin")),
        (5, "the target of 0.001 of the macs cannot be reached", ("--target", "macs=0.001")),
        (8, "no backend is called 'onxruntime'", ("--target", "macs=0.5", "--backend", "onxruntime")),
        (9, "'nets.py' exists and is not a model that fxprune saved", ("--target", "macs=0.5", "--out", "nets.py")),
    ],
)
def test_what_compile_refuses(folder: Path, code: int, message: str, arguments: tuple[str, ...]) -> None:
    fails(code, message, "compile", "nets.py:net", "--no-measure", "--out", "out", *arguments)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("code", "message", "model"),
    [
        (3, "'resnet50' names no model. MODEL is one of: timm:NAME, hf:DIRECTORY", "resnet50"),
        (3, "there is no file 'none.py'", "none.py:net"),
        (
            3,
            "'nets.py' needs the name of a function that returns a module: nets.py:NAME. It defines: Net",
            "nets.py",
        ),
        (3, "'nets.py' has no 'nte'; did you mean 'net'? It defines: Net, net, bare", "nets.py:nte"),
        (3, "'nets.py:broken' failed: ValueError: no weights here (line 34)", "nets.py:broken"),
        (3, "'nets.py:wrong' returns str, not a module or (module, example inputs)", "nets.py:wrong"),
        (3, "'nets.py:number' is of type int, not a function that returns a module", "nets.py:number"),
        (3, "'nets.py:bare' comes without example inputs; give their shapes, for example --input", "nets.py:bare"),
        (3, "there is no file 'none.pt2'", "none.pt2"),
        (3, "'bad.pt2' is not what torch.export.save writes", "bad.pt2"),
        (3, "'syntax.py' cannot be imported: SyntaxError", "syntax.py:net"),
        (3, "'hub' was not saved by fxprune, but it has a config.json: did you mean hf:hub?", "hub"),
        (3, "hf:none is neither a directory with a config.json nor a config file", "hf:none"),
        (4, "the forward pass of Branch cannot be recorded", "nets.py:branch"),
        (9, "'empty/plan.json' is missing", "empty"),
    ],
)
def test_what_is_no_model(folder: Path, code: int, message: str, model: str) -> None:
    (folder / "bad.pt2").write_bytes(b"nothing")
    (folder / "syntax.py").write_text("def net(:\n")
    (folder / "hub").mkdir()
    (folder / "hub" / "config.json").write_text("{}")
    (folder / "empty").mkdir()
    fails(code, message, "explain", model)


def test_weights_that_are_not_finite(folder: Path) -> None:
    fails(7, "", "compile", "nets.py:spoilt", "--no-measure", "--out", "out", "--target", "macs=0.5")


def test_saved_models_are_replaced_only_when_told_to(folder: Path) -> None:
    common = ("compile", "nets.py:net", "--target", "macs=0.5", "--no-measure", "--out", "small")
    run(*common)
    fails(9, "'small' exists and holds a saved model; pass --overwrite, or choose another name", *common)
    run(*common, "--overwrite")
    (folder / "net.onnx").write_text("mine")
    fails(9, "'net.onnx' exists; pass --overwrite", *common[:-1], "other", "--onnx", "net.onnx")


def test_an_unexpected_error_is_printed_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(cli.explain, "Explainer", explode)
    result = run("explain", "nets.py:net", code=cli.INTERNAL)
    assert "ZeroDivisionError: a defect" in result.stderr
    assert "`fxprune doctor` prints" in result.stderr
    assert result.stdout == ""


def test_control_c(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.explain, "Explainer", interrupt)
    assert run("explain", "nets.py:net", code=cli.INTERRUPTED).stderr.endswith("stopped\n")


# ---------------------------------------------------------------------- sources
def test_input_replaces_what_a_model_lacks(folder: Path) -> None:
    assert run_json("explain", "nets.py:bare", "--input", "4x8")["inputs"] == "4x8 float32"
    assert run_json("explain", "nets.py:net", "--input", "x=3x8")["inputs"] == "x=3x8 float32"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1x3xx8", "this is not [NAME=]SHAPE[:DTYPE[:LOW-HIGH]]"),
        ("1x3:flaot32", "torch has no type 'flaot32'; did you mean 'float32'?"),
        ("1x3:float32:0-4", "a range is for whole numbers, and float32 is not"),
        ("1x3:int64:4-4", "the range holds nothing: LOW <= value < HIGH"),
    ],
)
def test_wrong_inputs(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"--input {text}: {message}")):
        parse_input(text)


def test_inputs_have_the_shape_type_and_range_asked_for() -> None:
    tensor = parse_input("ids=50x20:int32:-3-5").make()
    assert (tensor.shape, tensor.dtype, int(tensor.min()), int(tensor.max())) == ((50, 20), torch.int32, -3, 4)
    assert parse_input("7:bool").make().dtype == torch.bool
    assert parse_input("2x3:float64").make().dtype == torch.float64


def test_factories_modules_and_keyword_inputs(folder: Path) -> None:
    assert describe_inputs((), resolve("nets.py:keyword").kwargs) == "input1=2x8 float32, input2=2x6 float32"
    assert isinstance(resolve("nets.py:ready", needs_inputs=False).module, nn.Linear)
    assert type(resolve("nets.py:Net", ["2x8"]).module).__name__ == "Net"


def test_a_seed_gives_the_same_weights_and_leaves_the_random_state_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    first, second, other = (resolve("nets.py:net", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.module.first.weight, second.module.first.weight)
    assert torch.equal(first.args[0], second.args[0])
    assert not torch.equal(first.module.first.weight, other.module.first.weight)


def test_exported_programs_and_saved_directories(folder: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(net, (torch.randn(2, 8),), dynamic_shapes=shapes), "net.pt2")
    assert run_json("explain", "net.pt2")["inputs"] == "2x8 float32"
    run("compile", "net.pt2", "--target", "macs=0.5", "--no-measure", "--out", "small")
    data = run_json("compile", "small", "--target", "params=0.7", "--no-measure", "--out", "smaller", "--round-to", "1")
    assert data["report"]["params"]["dense"] == sum(p.numel() for p in fxprune.load("small").parameters())
    assert fxprune.load("smaller")(torch.randn(3, 8)).shape == (3, 4)


def test_timm(folder: Path) -> None:
    pytest.importorskip("timm")
    source = resolve("timm:test_resnet")
    assert describe_inputs(source.args, source.kwargs) == "1x3x160x160 float32"
    data = run_json("explain", "timm:test_resnet")
    assert "timm:test_resnet has random weights" in data["notes"][0]
    assert {g["kind"] for g in data["groups"]} == {"channels"}
    assert data["operators"][0]["first"]["source"].startswith("timm/")
    with pytest.raises(InputError, match="timm has no model 'resnet5'; the nearest are resnet5"):
        resolve("timm:resnet5")


@pytest.fixture
def bert(folder: Path) -> Path:
    """A directory with the configuration of a tiny BERT, without weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        architectures=["BertForSequenceClassification"],
    )
    config.save_pretrained("bert")
    return folder / "bert"


def test_transformers(bert: Path) -> None:
    source = resolve("hf:bert")
    assert type(source.module).__name__ == "BertForSequenceClassification"
    assert describe_inputs((), source.kwargs) == "input_ids=1x32 int64, attention_mask=1x32 int64"
    assert source.notes == ("hf:bert has random weights: there are none beside the configuration",)
    assert type(resolve("hf:bert/config.json").module) is type(source.module)
    source.module.save_pretrained("bert")
    loaded = resolve("hf:bert", seed=5)
    assert loaded.notes == ()
    assert torch.equal(loaded.module.classifier.weight, source.module.classifier.weight)
    assert {g["kind"] for g in run_json("explain", "hf:bert")["groups"]} == {"hidden", "heads", "head_dims"}


def test_code_that_comes_with_a_model_is_not_run(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"architectures": ["MyOwnModel"]}))
    with pytest.raises(InputError, match=r"asks for the class MyOwnModel, which transformers .* does not have"):
        resolve("hf:bert")


def test_a_package_that_is_missing_or_does_not_import(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    (folder / "shaky_one.py").write_text("import wobbly_one\n")
    (folder / "wobbly_one.py").write_text("raise RuntimeError('operator wobbly::nms does not exist')\n")
    (folder / "shaky_two.py").write_text("import not_there_at_all\n")
    with pytest.raises(InputError, match="the package not_there is not installed: pip install not_there"):
        sources._package("not_there")
    with pytest.raises(InputError, match="because it needs not_there_at_all: pip install not_there_at_all"):
        sources._package("shaky_two")
    with pytest.raises(InputError, match="cannot be imported: RuntimeError in wobbly_one: operator wobbly::nms"):
        sources._package("shaky_one")


# ---------------------------------------------------------------------- real processes
def test_json_is_all_that_a_real_process_writes(folder: Path) -> None:
    done = subprocess_run(
        folder, "compile", "nets.py:net", "--target", "macs=0.5", "--out", "small", "--json", "--backend", "torch"
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert len(data["report"]["latency"]) == 1
    assert "\x1b" not in done.stderr  # no spinner where there is no terminal


def test_a_real_process_fails_with_the_code_of_the_error(folder: Path) -> None:
    done = subprocess_run(folder, "explain", "nets.py:nte")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: 'nets.py' has no 'nte'; did you mean 'net'?")


# ---------------------------------------------------------------------- control
def test_a_dry_run_writes_nothing_and_its_plan_can_be_done(folder: Path) -> None:
    asked = ("--target", "params=0.6", "--round-to", "1", "--ratios", "first=0.25", "--keep", "second.weight.0")
    text = run("compile", "nets.py:net", *asked, "--dry-run").stdout
    assert {p.name for p in folder.iterdir()} <= {"nets.py", "neighbour.py", "__pycache__"}
    for expected in ("first.weight.0", "hidden (ffn)", "ratios: 'first' keeps 0.25", "parameters: 4,996 ->"):
        assert expected in " ".join(text.split())
    data = run_json("compile", "nets.py:net", *asked, "--dry-run")
    (folder / "plan.json").write_text(json.dumps(data))
    made = run_json(
        "compile", "nets.py:net", "--plan", "plan.json", "--out", "small", "--no-measure", "--proof", "quick"
    )
    assert made["report"]["groups"] == data["plan"]["groups"]
    assert [g["kept"] for g in data["plan"]["groups"]] == [16, 64]
    assert fxprune.load("small").get_parameter("first.weight").shape == (16, 8)
    again = run_json("compile", "nets.py:net", "--plan", "small/plan.json", "--out", "twice", "--no-measure")
    assert again["report"]["groups"] == data["plan"]["groups"]


@pytest.mark.parametrize(
    ("code", "text", "arguments"),
    [
        (2, "there is no --out DIRECTORY", ("--target", "macs=0.5")),
        (
            2,
            "--ratios first=half: write PATTERN=SHARE",
            ("--target", "macs=0.5", "--ratios", "first=half", "--dry-run"),
        ),
        (2, "no criterion is called 'magnitud'", ("--target", "macs=0.5", "--criterion", "magnitud", "--dry-run")),
        (2, "a plan says already what stays: keep", ("--plan", "plan.json", "--keep", "first", "--out", "small")),
        (2, "take one of the two", ("--plan", "plan.json", "--dry-run")),
        (2, "give --recipe or --plan, not both", ("--plan", "plan.json", "--recipe", "recipe.yaml", "--out", "small")),
        (9, "the plan nowhere.json cannot be read", ("--plan", "nowhere.json", "--out", "small")),
        (9, "this is not a plan", ("--plan", "list.json", "--out", "small")),
        (9, "the plan nets.py is not JSON", ("--plan", "nets.py", "--out", "small")),
    ],
)
def test_what_is_wrong_with_plans_and_dry_runs(folder: Path, code: int, text: str, arguments: tuple[str, ...]) -> None:
    empty = {"kept": {}, "groups": [], "biases": [], "recipe": {}, "dynamic": {}}
    (folder / "plan.json").write_text(json.dumps(empty))
    (folder / "list.json").write_text("[]")
    assert text in run("compile", "nets.py:net", *arguments, code=code).stderr


def test_explain_marks_what_a_recipe_says(folder: Path) -> None:
    """Each group says what blocks or forces it: a pattern, the floor, the steps."""
    (folder / "recipe.yaml").write_text("target: {macs: 0.5}\nround_to: 8\nfloor: 0.5\n")
    data = run_json("explain", "nets.py:net", "--recipe", "recipe.yaml", "--ratios", "second=0.5")
    assert {g["name"]: g["why"] for g in data["groups"]} == {
        "first.weight.0": "floor: 32 units or more; round_to: steps of 8",
        "second.weight.0": "ratios: 'second' keeps 0.5: 32 units; round_to: steps of 8",
    }
    text = " ".join(run("explain", "nets.py:net", "--groups", "not ffn").stdout.split())
    assert "blocked or forced by" in text and "whole: the recipe" in text
    assert (
        "whole: it cuts 'first.weight', which the recipe keeps"
        in run(*("explain", "nets.py:net", "--keep", "first", "--group", "first.weight.0")).stdout
    )
    assert "blocked or forced by" not in run("explain", "nets.py:net").stdout
