"""Training recipes: what is wrong with one is said by its key; stages build on each other; a run that stops goes on."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError, NonFiniteError, RecipeError
from fxprune.passes.training import METHODS
from fxprune.training.optimizers import FALLS, OPTIMIZERS, optimizer, rate
from fxprune.training.recipe import OptimizerKeys, TrainRecipe, read_train_recipe
from fxprune.training.run import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]

X = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.randn(8, 4, generator=torch.Generator().manual_seed(1))).argmax(1)
DATA = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 96, 16)]
FAST: dict[str, Any] = {"proof": "quick", "optimizer": {"lr": 1e-2}}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    ).eval()


def run(stages: list[dict[str, Any]], model: nn.Module | None = None, **more: Any) -> fxprune.Pruned:
    recipe = {**FAST, **more.pop("keys", {}), "stages": stages}
    given = {"batches": DATA, "loss": nn.functional.cross_entropy} | more
    return train(model or net(), X[:4], recipe, **given)


def zeros(module: nn.Module, name: str) -> Tensor:
    return module.get_parameter(name) == 0


def accuracy(model: nn.Module) -> float:
    return float((model(X).argmax(1) == Y).double().mean())


# ---------------------------------------------------------------------- what a recipe says
@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"stage": []}, r"no key 'stage'; did you mean 'stages'\?"),
        ({"stages": []}, "nothing to do"),
        ({"epochs": 1}, "there are no stages"),
        ({"stages": [{"lock": {}}], "epochs": 1, "steps": 3}, "epochs or steps, not both"),
        ({"stages": [{"lock": {}, "tune": {}}]}, "stage 1: a stage is exactly one of .*, not lock and tune"),
        ({"stages": [{"epochs": 2}]}, "stage 1: a stage is exactly one of .*, not none"),
        ({"stages": [{"lock": {}, "epoch": 2}]}, r"stage 1: there is no key 'epoch'; did you mean 'epochs'\?"),
        ({"stages": [{"tune": {"fil": 0.1}}]}, r"stage 1: there is no key 'tune.fil'; did you mean 'fill'\?"),
        (
            {"stages": [{"prune": {"target_sparsity": 0.5}}]},
            "stage 1: pruning: there is no key .* here it is called tar",
        ),
        ({"stages": [{"prune": {"target": 1.5}}]}, "stage 1: pruning: target.sparsity: .* less than 1"),
        ({"stages": [{"quantize": "int8"}, {"tune": {}}]}, "stage 1: quantize comes last"),
        ({"stages": [{"quantize": "int8", "epochs": 1}]}, "trains nothing"),
        (
            {"stages": [{"lock": {}}], "optimizer": {"name": "adamv"}},
            r"no optimizer is called 'adamv'; did you mean 'ad",
        ),
        ({"stages": [{"lock": {}}], "optimizer": {"schedule": "cosin"}}, "did you mean 'cosine'"),
        (
            {"stages": [{"lock": {}}], "optimizer": {"learning_rate": 1}},
            r"'optimizer.learning_rate'; here it is called optimizer",
        ),
        ({"stages": [{"lock": {}, "optimizer": {"lr": -1}}]}, "stage 1: optimizer: lr: "),
        ({"stages": [{"lock": {}}], "num_train_epochs": 3}, "here it is called epochs"),
        ({"stages": "lock"}, "stages are a list"),
        ({"stages": ["lock"]}, "stage 1: a mapping of keys to values, not str"),
    ],
)
def test_what_is_wrong_is_said(recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read_train_recipe(recipe)


def test_yaml_says_the_same_as_a_dict(tmp_path: Path) -> None:
    data = {
        "epochs": 3,
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "schedule": "cosine", "warmup": 0.1},
        "stages": [{"prune": {"pattern": "2:4", "exclude": "head"}, "epochs": 2}, {"lock": None}, {"quantize": "int8"}],
    }
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(data))
    assert read_train_recipe(file) == read_train_recipe(str(file)) == read_train_recipe(data)
    assert read_train_recipe(data, seed=3).seed == 3 != read_train_recipe(data, seed=None).seed
    assert read_train_recipe(read_train_recipe(data), seed=3).stages == read_train_recipe(data).stages
    with pytest.raises(RecipeError, match="cannot be read"):
        read_train_recipe(tmp_path / "none.yaml")
    file.write_text("stages: [")
    with pytest.raises(RecipeError, match="is not YAML"):
        read_train_recipe(file)


def test_a_recipe_of_sparseml_is_recognised(tmp_path: Path) -> None:
    """Its YAML has tags, each of which is answered with what it is called here."""
    file = tmp_path / "recipe.yaml"
    file.write_text("pruning_modifiers:\n  - !ConstantPruningModifier\n    params: __ALL__\n")
    with pytest.raises(
        RecipeError, match=r"a modifier of SparseML, !ConstantPruningModifier; here it is called a stag"
    ):
        read_train_recipe(file)
    file.write_text("modifiers:\n  - !MadeUpModifier\n    a: 1\n")
    with pytest.raises(RecipeError, match="!MadeUpModifier; it has no counterpart"):
        read_train_recipe(file)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"epochs": 4, "stages": [{"lock": {}, "epochs": 1}, {"tune": {}}, {"quantize": "int8"}]}, [10, 30, 0]),
        ({"steps": 7, "stages": [{"lock": {}}, {"tune": {}}]}, [3, 4]),
        ({"stages": [{"lock": {}, "epochs": 0.5}, {"tune": {}, "steps": 3}]}, [5, 3]),
        ({"steps": 20, "stages": [{"lock": {}, "epochs": 1}, {"tune": {}, "steps": 10}]}, [10, 10]),
    ],
)
def test_stages_share_the_run(recipe: dict[str, Any], expected: list[int]) -> None:
    assert read_train_recipe(recipe).lengths(10) == expected


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"stages": [{"lock": {}}]}, "stage 1 does not say how long"),
        ({"steps": 9, "stages": [{"lock": {}, "epochs": 1}]}, "take 10 steps, and the run 9"),
        ({"steps": 10, "stages": [{"lock": {}, "epochs": 1}, {"tune": {}}]}, "stage 2 is left without any"),
    ],
)
def test_lengths_that_do_not_add_up(recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read_train_recipe(recipe).lengths(10)


def test_epochs_need_batches_that_can_be_counted() -> None:
    with pytest.raises(RecipeError, match="give `steps`"):
        read_train_recipe({"epochs": 1, "stages": [{"lock": {}}]}).lengths(None)


def test_a_run_is_stretched_with_its_schedules() -> None:
    when = {"start": 1, "end": 4, "unit": "epoch"}
    recipe = read_train_recipe(
        {"stages": [{"prune": {"target": 0.5, "schedule": when}, "epochs": 6}, {"tune": {}, "epochs": 2}]}
    )
    half = recipe.stretched(4)
    assert half.lengths(10) == [30, 10]
    assert half.stages[0].prune is not None
    schedule = half.stages[0].prune[0].schedule
    assert (schedule.start, schedule.end, schedule.unit) == (0.5, 2.0, "epoch")
    with pytest.raises(RecipeError, match="counts steps"):
        read_train_recipe({"steps": 10, "stages": [{"lock": {}}]}).stretched(1)


# ---------------------------------------------------------------------- optimizers
def test_every_optimizer_is_made_and_options_it_has_not_are_refused() -> None:
    for name in OPTIMIZERS:
        layer = nn.Linear(2, 2)
        made = optimizer(OptimizerKeys(name=name, lr=0.5), layer.parameters())
        before = layer.weight.clone()
        layer(torch.ones(1, 2)).sum().backward()
        made.step()
        assert made.param_groups[0]["lr"] == 0.5 and not torch.equal(layer.weight, before)
    with pytest.raises(RecipeError, match="'adamw' has no 'momentum'"):
        optimizer(OptimizerKeys(momentum=0.9), nn.Linear(2, 2).parameters())


@pytest.mark.parametrize("schedule", list(FALLS))
def test_the_rate_rises_and_falls_to_its_end(schedule: str) -> None:
    keys = OptimizerKeys(schedule=schedule, warmup=0.25, final=0.1)
    rates = [rate(keys, done, 40) for done in range(41)]
    assert rates[:10] == [(k + 1) / 10 for k in range(10)] and rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[40] == pytest.approx(1 if schedule == "constant" else 0.1)


# ---------------------------------------------------------------------- stages
def test_a_channel_stage_makes_the_model_smaller_and_leaves_the_first() -> None:
    model = net().train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    state = torch.get_rng_state()
    stages = [{"prune": {"pattern": "channel", "target": 0.5}, "epochs": 1}, {"tune": {}, "epochs": 1}]
    pruned = run(stages, model, metric=accuracy)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert pruned.dense is model and pruned.module.training and pruned.report.model == "Sequential"
    widths = [p.shape[0] for n, p in pruned.module.named_parameters() if n.endswith("weight")]
    assert sum(widths[:-1]) == 32 and widths[-1] == 4
    assert pruned.report.metric is not None
    assert pruned.report.metric.dense == accuracy(model.eval())
    assert pruned.report.metric.pruned == accuracy(pruned.module.eval()) > pruned.report.metric.dense
    said = [step.line() for step in pruned.report.steps]
    assert said[0].startswith("stage 1, prune magnitude channel: taken; 6 steps; metric")
    assert said[1].startswith("stage 2, tune: taken; 6 steps; metric")


def test_later_stages_prune_what_earlier_ones_left_and_the_plan_is_of_the_first_model(tmp_path: Path) -> None:
    """The saved plan replays on the model that the run began with, and gives the same outputs."""
    model = net()
    stages = [
        {"prune": {"pattern": "channel", "target": 0.25}, "epochs": 1},
        {"prune": {"pattern": "element", "target": 0.5, "max_sparsity": 0.9, "include": "3"}, "epochs": 1},
        {"prune": {"pattern": "channel", "target": 0.25}, "epochs": 1},
    ]
    pruned = run(stages, model)
    groups = [(g.size, g.kept) for g in pruned.report.groups]
    assert sum(size for size, _ in groups) == 64 and sum(kept for _, kept in groups) == 36
    dense = sum(p.numel() for p in model.parameters())
    assert pruned.report.params.dense == dense
    assert pruned.report.params.pruned == sum(p.numel() for p in pruned.module.parameters())
    assert bool(zeros(pruned.module, "3.weight")[~pruned.plan.masks["3.weight"]].all())
    assert (~pruned.plan.masks["3.weight"]).any()
    pruned.save(tmp_path / "small")
    replayed = fxprune.load(tmp_path / "small", model=net())
    assert torch.equal(replayed(X), pruned.module(X))
    assert torch.equal(pruned.module_like()(X), pruned.module(X))


def test_locked_and_tuned_zeros_stay_and_filled_ones_go() -> None:
    pruned = {"prune": {"pattern": "4x1", "target": 0.5, "schedule": {"end": 6}}, "steps": 6}
    for after in ({"lock": {}}, {"lock": {"pattern": "element"}}, {"tune": {}}):
        result = run([pruned, {**after, "steps": 6}])
        assert result.plan.masks
        for name, mask in result.plan.masks.items():
            assert torch.equal(zeros(result.module, name), ~mask) or not bool(
                result.module.get_parameter(name)[~mask].any()
            )
    filled = run([pruned, {"tune": {"fill": 0.1}, "steps": 6}])
    assert not filled.plan.masks
    assert not any(bool(zeros(filled.module, n).any()) for n, p in filled.module.named_parameters() if p.dim() > 1)
    with pytest.raises(RecipeError, match="stage 1: there are no zeros to fill"):
        run([{"tune": {"fill": 0.1}, "steps": 6}])


def test_a_first_stage_locks_the_zeros_that_are_there() -> None:
    model = net()
    with torch.no_grad():
        model[3].weight.mul_(torch.rand(32, 32) > 0.5)
    there = zeros(model, "3.weight")
    locked = run([{"lock": {}, "steps": 6}], model)
    assert torch.equal(zeros(locked.module, "3.weight"), there)
    assert not torch.equal(locked.module.get_parameter("3.weight"), model[3].weight)
    with pytest.raises(RecipeError, match="stage 1: no weight has zeros"):
        run([{"lock": {}, "steps": 6}])


def test_only_tuning_trains_a_dense_model() -> None:
    tuned = run([{"tune": {}, "epochs": 2}], metric=accuracy)
    assert tuned.report.params.ratio == 1 and tuned.report.metric is not None
    assert tuned.report.metric.pruned > tuned.report.metric.dense


def test_the_last_stage_quantizes() -> None:
    pytest.importorskip("onnxruntime")
    stages = [
        {"prune": {"pattern": "channel", "target": 0.5}, "epochs": 1},
        {"quantize": {"when": "always"}},
    ]
    pruned = run(stages, calibration=DATA, metric=accuracy)
    assert pruned.quantized is not None and pruned.quantized.fresh(pruned.graph_module())
    assert pruned.report.steps[-1].name.startswith("quantization int8")


# ---------------------------------------------------------------------- going on
class Stopped(Exception):
    """What stops a run."""


class Stopping:
    """Batches in an order of each epoch's own, which stop the run after a number of them."""

    def __init__(self, after: int | None) -> None:
        self.left = after

    def __len__(self) -> int:
        return len(DATA)

    def __iter__(self) -> Iterator[Any]:
        for number in torch.randperm(len(DATA)).tolist():  # from the global state, as a DataLoader does
            if self.left == 0:
                raise Stopped
            self.left = None if self.left is None else self.left - 1
            yield DATA[number]


STAGES: list[dict[str, Any]] = [
    {"prune": {"method": "snip_momentum", "pattern": "channel", "target": 0.4}, "epochs": 2},
    {"prune": {"method": "movement", "pattern": "element", "target": 0.5}, "epochs": 1.5},
    {"tune": {}, "epochs": 2},
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[fxprune.Pruned, Path]:
    """A run that is never stopped, and its log."""
    folder = tmp_path_factory.mktemp("straight")
    return run(STAGES, batches=Stopping(None), metric=accuracy, log=folder), folder


@pytest.mark.parametrize("after", [4, 7, 14, 27])
def test_a_run_that_stops_goes_on_to_the_same_result(
    after: int, straight: tuple[fxprune.Pruned, Path], tmp_path: Path
) -> None:
    """To the bit, wherever it is stopped: inside an epoch, inside each stage, with dropout and a shuffled order."""
    expected, log = straight
    kept: dict[str, Any] = {"checkpoint": tmp_path / "run", "every": 3, "log": tmp_path / "log", "metric": accuracy}
    with pytest.raises(Stopped):
        run(STAGES, batches=Stopping(after), **kept)
    resumed = run(STAGES, batches=Stopping(None), resume=True, **kept)
    first, second = expected.module.state_dict(), resumed.module.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert expected.plan == resumed.plan
    assert expected.report.metric == resumed.report.metric
    assert [s.line() for s in expected.report.steps] == [s.line() for s in resumed.report.steps]
    assert (log / "training.csv").read_text() == (tmp_path / "log/training.csv").read_text()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="say where"):
        run(STAGES, resume=True)
    with pytest.raises(InputError, match="there is no"):
        run(STAGES, resume=True, checkpoint=tmp_path)
    with pytest.raises(Stopped):
        run(STAGES, batches=Stopping(8), checkpoint=tmp_path)
    with pytest.raises(InputError, match="another recipe: seed, stages differ"):
        run(STAGES[:1], resume=True, checkpoint=tmp_path, keys={"seed": 1})
    (tmp_path / "now.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        run(STAGES, resume=True, checkpoint=tmp_path)


# ---------------------------------------------------------------------- what is written down, and refused
def test_the_table_has_every_update(tmp_path: Path) -> None:
    said: list[str] = []
    run([{"prune": {"target": 0.5, "schedule": {"end": 4}}, "epochs": 1}], log=tmp_path, progress=said.append)
    with (tmp_path / "training.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(6))
    sparsities = [float(row["sparsity"]) for row in rows]
    assert sparsities == sorted(sparsities) and sparsities[-1] == pytest.approx(0.5, abs=0.01)
    assert float(rows[0]["rate"]) == 1e-2 > float(rows[-1]["rate"])
    assert (tmp_path / "stage-1" / "pruning.csv").is_file()
    assert said[0] == "stage 1 of 1: prune magnitude element" and any("gone" in line for line in said)


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"batches": iter(DATA)}, InputError, "an iterator is used up"),
        ({"batches": 3}, InputError, "int holds no batches"),
        ({"batches": []}, InputError, "epoch 0 has none"),
        ({"batches": lambda epoch: None}, InputError, "gives NoneType for epoch 0"),
        ({"loss": lambda output, labels: output}, InputError, "not a scalar"),
        ({"loss": lambda output, labels: output.sum() * float("nan")}, NonFiniteError, "step 0: the loss is NaN"),
        ({"teacher": net()}, RecipeError, "the recipe has no `distillation`"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(more: dict[str, Any], error: type[Exception], said: str) -> None:
    stages = [{"prune": {"target": 0.5}, "steps": 5}]
    with pytest.raises(error, match=said):
        run(stages, **more)


def test_a_schedule_that_is_longer_than_its_stage_is_refused_before_anything_is_trained() -> None:
    stages = [{"tune": {}, "steps": 5}, {"prune": {"target": 0.5, "schedule": {"end": 7}}, "steps": 5}]
    with pytest.raises(RecipeError, match="stage 2: schedule: its last update is before step 7"):
        run(stages, batches=lambda epoch: pytest.fail("something is trained") if epoch else Stopping(0))


@pytest.mark.parametrize(
    "batches",
    [
        [(X[:16], Y[:16])],
        [((X[:16],), Y[:16])],
        [{"input": X[:16], "labels": Y[:16]}],
        torch.utils.data.TensorDataset(X, Y),
        lambda epoch: DATA[epoch:],
    ],
)
def test_batches_of_every_form(batches: Any) -> None:
    example: Any = {"input": X[:4]} if isinstance(batches, list) and isinstance(batches[0], dict) else X[:4]
    recipe = {**FAST, "batch": 8, "stages": [{"prune": {"pattern": "channel", "target": 0.5}, "steps": 4}]}
    pruned = train(net(), example, recipe, batches=batches, loss=nn.functional.cross_entropy)
    assert pruned.report.params.ratio < 0.6
    assert any("says nothing" in n for n in pruned.report.notes) == isinstance(batches, list)


def test_the_loss_that_a_hook_is_told_may_still_have_its_graph() -> None:
    """No warning, which would be an error here, and the row of the next update has it."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = fxprune.Pruner(model, X[:4], {"target": 0.5, "schedule": {"end": 2, "every": 1}})
    for x, y in DATA[:2]:
        pruner.on_step_begin()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        pruner.on_before_optimizer_step(loss)
        optimizer.step()
        pruner.on_step_end()
    pruner.on_train_end()
    assert pruner.rows[-1].step == 2 and pruner.rows[-1].loss == float(loss.detach())


def test_what_one_pruning_empties_tears_no_groups_of_another_apart() -> None:
    """Rows of the first layer become empty; the columns behind them stay, for every four of them hold two weights."""
    prunings = [
        {"pattern": "element", "target": 0.75, "exclude": "3", "schedule": {"end": 3}},
        {"pattern": "2:4", "include": "3", "schedule": {"ramp": "oneshot", "start": 2}},
    ]
    pruned = run([{"prune": prunings, "steps": 5}])
    mask = pruned.plan.masks["3.weight"]
    assert bool((~pruned.plan.masks["0.weight"]).all(1).any())
    assert mask.shape == (32, 32) and bool((mask.reshape(32, -1, 4).sum(2) == 2).all())


# ---------------------------------------------------------------------- other tools' examples
WHEN = {"start": 0, "end": 2, "every": 0.5, "unit": "epoch"}
#: What the documentation of other tools shows, as it is written here; "NC" is Intel Neural Compressor.
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "NC: two pruners": [
        {
            "prune": [
                {"method": "snip_momentum", "pattern": "4x1", "target": 0.9, "include": "0", "max_sparsity": 0.98},
                {"method": "snip_momentum", "pattern": "4x1", "target": 0.8, "include": "3", "progressive": 4},
            ]
        }
    ],
    "NC: defaults for some layers": [
        {"prune": {"method": "snip", "pattern": "element", "target": 0.5, "exclude": "5"}}
    ],
    "NC: local, exponential": [
        {
            "prune": {
                "target": 0.9,
                "scope": "local",
                "include": ["type:Linear"],
                "schedule": {"ramp": "exponential", "start": 0, "end": 10, "every": 1},
            }
        }
    ],
    "NC: channels": [{"prune": {"method": "snip_momentum", "pattern": "channelx1", "target": 0.5, "progressive": 2}}],
    "NC: group lasso": [{"prune": {"method": "group_lasso", "pattern": "4x1", "target": 0.5}}],
    "NC: prune once for all": [{"prune": {"target": 0.5}}, {"lock": {}}],
    "SparseML: gradual magnitude": [
        {"prune": {"target": 0.85, "scope": "local", "schedule": {**WHEN, "initial": 0.05}, "include": ["0", "3"]}},
        {"lock": {}},
    ],
    "SparseML: constant": [{"prune": {"target": 0.5}}, {"lock": {}}],
    "SparseML: AC/DC": [
        {"prune": {"target": 0.9, "schedule": {"end": 2, "dense": 0.5, "sparse": 0.5, "unit": "epoch"}}},
        {"prune": {"target": 0.9, "schedule": {"initial": 0.89, "end": 1, "unit": "epoch"}}},
    ],
    "SparseML: movement": [{"prune": {"method": "movement", "target": 0.5, "schedule": WHEN}}],
    "SparseML: RigL": [{"prune": {"method": "rigl", "target": 0.5, "schedule": WHEN}}],
    "SparseML: structured": [{"prune": {"pattern": "channel", "target": 0.5, "schedule": WHEN}}, {"tune": {}}],
    "SparseML: blocks": [{"prune": {"pattern": "1x4", "target": 0.5, "schedule": WHEN}}],
    "SparseML: n:m": [{"prune": {"pattern": "2:4", "schedule": WHEN}}],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_other_tools_run(name: str) -> None:
    stages = [one if "quantize" in one else {**one, "epochs": 2} for one in EXAMPLES[name]]
    keys = {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "schedule": "cosine"}}
    model = net()
    pruned = run(stages, model, keys=keys)
    target = stages[0]["prune"][0] if isinstance(stages[0]["prune"], list) else stages[0]["prune"]
    gone = 1 - sum(int(p.count_nonzero()) for n, p in pruned.module.named_parameters() if p.dim() > 1) / sum(
        p.numel() for n, p in model.named_parameters() if p.dim() > 1
    )
    assert gone > 0.35, (name, gone)
    assert target.get("method", "magnitude") in METHODS
    assert TrainRecipe.model_validate(read_train_recipe({"epochs": 1, "stages": stages[:1]}).model_dump()).stages


STAGES_WITH_A_TEACHER = [{"prune": {"pattern": "channel", "target": 0.5}, "steps": 8}, {"tune": {}, "steps": 6}]


def test_with_a_teacher_alone_labels_do_not_matter_in_any_stage() -> None:
    other = [(x, (y + 1) % 4) for x, y in DATA]
    keys = {"distillation": {"alpha": 1.0}}
    taught = [run(STAGES_WITH_A_TEACHER, keys=keys, batches=batches).module.state_dict() for batches in (DATA, other)]
    plain = run(STAGES_WITH_A_TEACHER, batches=other).module.state_dict()
    assert all(torch.equal(value, taught[1][name]) for name, value in taught[0].items())
    assert any(
        value.shape != plain[name].shape or not torch.equal(value, plain[name]) for name, value in taught[0].items()
    )


def test_another_teacher_teaches_something_else() -> None:
    keys = {"distillation": {"alpha": 1.0}}
    torch.manual_seed(5)
    teacher = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    own, others = (run(STAGES_WITH_A_TEACHER, keys=keys, teacher=t).module for t in (None, teacher))
    distances = [
        float((module.eval()(X).softmax(1) - teacher(X).softmax(1)).detach().abs().mean()) for module in (own, others)
    ]
    assert distances[1] < distances[0]


@pytest.mark.parametrize("after", [5, 11, 13])
def test_what_a_teacher_taught_is_not_lost_by_a_stop(after: int, tmp_path: Path) -> None:
    torch.manual_seed(5)
    teacher = nn.Sequential(
        nn.Linear(8, 48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4)
    )
    keys = {"distillation": {"hidden": {"0": "0"}, "maps": True, "maps_lr": 0.1}}
    expected = run(STAGES_WITH_A_TEACHER, batches=Stopping(None), keys=keys, teacher=teacher)
    with pytest.raises(Stopped):
        run(STAGES_WITH_A_TEACHER, batches=Stopping(after), keys=keys, teacher=teacher, checkpoint=tmp_path, every=2)
    resumed = run(
        STAGES_WITH_A_TEACHER, batches=Stopping(None), keys=keys, teacher=teacher, checkpoint=tmp_path, resume=True
    )
    first, second = expected.module.state_dict(), resumed.module.state_dict()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_key_of_distillation_that_is_unknown_is_refused_before_training() -> None:
    with pytest.raises(RecipeError, match="temprature"):
        run(STAGES_WITH_A_TEACHER, keys={"distillation": {"temprature": 2}})
