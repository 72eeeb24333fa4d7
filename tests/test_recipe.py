"""Recipes: a dict, a YAML file and keyword overrides say the same; what is wrong with one is said by its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import RecipeError
from fxprune.recipe import Recipe, read_recipe

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")

FULL: dict[str, Any] = {
    "target": {"params": 0.4},
    "criterion": {"name": "magnitude", "p": 1, "normalize": "max"},
    "allocation": "global",
    "round_to": 4,
    "keep": ["4", "*.bias"],
    "groups": ["hidden", "channels"],
    "ratios": {"0": {"min": 0.25, "max": 0.75}},
    "floor": 0.2,
    "backend": "torch",
    "threads": 1,
    "reconstruction": "none",
    "sparsity": {"pattern": "2:4", "permute": False},
    "quantization": None,
    "basis": "none",
    "blocks": "none",
    "max_memory": 1e9,
    "keep_class": True,
    "proof": "quick",
    "seed": 3,
}
YAML = """
target: {params: 0.4}
criterion:
  name: magnitude
  p: 1
  normalize: max
allocation: global
round_to: 4
keep:
  - "4"
  - "*.bias"
groups: [hidden, channels]
ratios: {"0": {min: 0.25, max: 0.75}}
floor: 0.2
backend: torch
threads: 1
reconstruction: none
sparsity: {pattern: "2:4", permute: false}
quantization: null
basis: none
blocks: none
max_memory: 1.0e+9
keep_class: true
proof: quick
seed: 3
"""


def test_yaml_says_the_same_as_a_dict(tmp_path: Path) -> None:
    """Every key, read from a file by path or by name, or given as a dict, a Recipe, or overrides."""
    file = tmp_path / "recipe.yaml"
    file.write_text(YAML)
    expected = read_recipe(FULL)
    assert set(FULL) == set(Recipe.model_fields)
    assert read_recipe(file) == read_recipe(str(file)) == read_recipe(expected) == read_recipe(None, **FULL) == expected
    assert expected.keep == ("4", "*.bias") and expected.groups == ("hidden", "channels")
    assert expected.target.cost == ("params", 0.4)


def test_yaml_compiles_to_the_same_model(tmp_path: Path) -> None:
    """A model compiled with the file keeps the same units as one compiled with the dict, which the plan repeats."""
    recipe = FULL | {"keep": ["4"]}
    (tmp_path / "recipe.yaml").write_text(YAML.replace('  - "*.bias"\n', ""))
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(2, 8)
    plans = [fxprune.compile(net, x, source).plan for source in (recipe, tmp_path / "recipe.yaml")]
    assert plans[0] == plans[1]
    assert plans[0].kept
    assert read_recipe(plans[0].recipe) == read_recipe(recipe)
    assert fxprune.compile(net, x, plans[0].recipe).plan == plans[0]


def test_overrides_replace_single_keys(tmp_path: Path) -> None:
    """A key given beside the recipe wins; None leaves it as it is; all other keys stay."""
    file = tmp_path / "recipe.yaml"
    file.write_text(YAML)
    changed = read_recipe(file, target={"macs": 0.9}, seed=None, floor=0)
    assert changed.target.cost == ("macs", 0.9)
    assert changed.model_dump(exclude={"target", "floor"}) == read_recipe(FULL).model_dump(exclude={"target", "floor"})


def test_defaults() -> None:
    recipe = read_recipe(target={"dead": True})
    assert recipe.target.dead and recipe.target.macs is None
    assert recipe.model_dump(exclude={"target"}) == {
        "criterion": "auto",
        "allocation": "auto",
        "round_to": None,
        "keep": (),
        "groups": None,
        "ratios": {},
        "floor": 0.05,
        "backend": "onnxruntime",
        "threads": None,
        "reconstruction": "auto",
        "sparsity": None,
        "quantization": None,
        "basis": "auto",
        "blocks": "none",
        "max_memory": 2**31,
        "keep_class": False,
        "proof": "full",
        "seed": 0,
    }


def test_one_glob_and_one_kind_need_no_list() -> None:
    recipe = read_recipe(target={"macs": 1}, keep="head.*", groups="heads")
    assert recipe.keep == ("head.*",) and recipe.groups == ("heads",)


def test_recipes_do_not_change() -> None:
    """A recipe is a value: a caller's dict that changes afterwards changes nothing, and its fields cannot be set."""
    data = {"target": {"macs": 0.5}, "keep": ["a"]}
    recipe = read_recipe(data)
    data["keep"].append("b")
    assert recipe.keep == ("a",)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 2


T = {"macs": 0.5}
TARGETS = "macs, params, memory, speedup, latency_ms, max_drop, dead"
KNOWN = (
    "target, criterion, allocation, round_to, keep, groups, ratios, blocks, floor, backend, threads, reconstruction, "
    "sparsity, quantization, basis, max_memory, keep_class, proof, seed"
)


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ({"target": T, "criterium": "x"}, "recipe: there is no key 'criterium'; did you mean 'criterion'?"),
        ({"target": T, "xyz": 1}, f"recipe: there is no key 'xyz'. Known: {KNOWN}"),
        ({"target": {"mac": 0.5}}, "recipe: there is no key 'target.mac'; did you mean 'macs'?"),
        ({"target": {"latency": 0.5}}, "recipe: there is no key 'target.latency'; did you mean 'latency_ms'?"),
        ({"target": T | {"params": 0.5}},
         f"recipe: target: a target is exactly one of {TARGETS}, not macs and params (given: "
         "{'macs': 0.5, 'params': 0.5})"),
        ({"target": T | {"dead": True}},
         f"recipe: target: a target is exactly one of {TARGETS}, not macs and dead (given: "
         "{'macs': 0.5, 'dead': True})"),
        ({"target": {}}, f"recipe: target: a target is exactly one of {TARGETS}, not none (given: {{}})"),
        ({"target": {"dead": False}},
         f"recipe: target: a target is exactly one of {TARGETS}, not none (given: {{'dead': False}})"),
        ({}, 'the recipe has no target; say for example {"target": {"macs": 0.5}}'),
        (None, 'the recipe has no target; say for example {"target": {"macs": 0.5}}'),
        ({"target": 0.5}, "recipe: target: say for example {'macs': 0.5} (given: 0.5)"),
        ({"target": None}, "recipe: target: say for example {'macs': 0.5} (given: None)"),
        ({"target": {"macs": 1.5}}, "recipe: target.macs: Input should be less than or equal to 1 (given: 1.5)"),
        ({"target": {"macs": 0}}, "recipe: target.macs: Input should be greater than 0 (given: 0)"),
        ({"target": {"params": True}}, "recipe: target.params: give the share to keep, 0.5 for example (given: True)"),
        ({"target": {"macs": float("nan")}},
         "recipe: target.macs: Input should be less than or equal to 1 (given: nan)"),
        ({"target": {"macs": "half"}},
         "recipe: target.macs: Input should be a valid number, unable to parse string as a number (given: 'half')"),
        ({"target": {"dead": "maybe"}},
         "recipe: target.dead: Input should be a valid boolean, unable to interpret input (given: 'maybe')"),
        ({"target": T, "floor": 1}, "recipe: floor: Input should be less than 1 (given: 1)"),
        ({"target": T, "floor": -0.1}, "recipe: floor: Input should be greater than or equal to 0 (given: -0.1)"),
        ({"target": T, "round_to": 0}, "recipe: round_to: Input should be greater than or equal to 1 (given: 0)"),
        ({"target": T, "groups": ["head"]},
         "recipe: groups: there is no kind 'head'; did you mean 'heads'? Known: channels, heads, head_dims, hidden, "
         "ffn, residual; each also after 'not ' (given: ['head'])"),
        ({"target": T, "groups": "not ffm"}, "recipe: groups: there is no kind 'not ffm'; did you mean 'ffn'? Known: "
         "channels, heads, head_dims, hidden, ffn, residual; each also after 'not ' (given: 'not ffm')"),
        ({"target": T, "ratios": {"4": 1.5}}, "recipe: ratios: '4': shares are in (0, 1], the smaller one first "
         "(given: {'4': 1.5})"),
        ({"target": T, "ratios": {"4": {"most": 1}}},
         "recipe: ratios: '4' is given the share to keep, 0.5 for example, or {min: 0.3, "
         "max: 0.8} (given: {'4': {'most': 1}})"),
        ({"target": T, "ratios": {"4": {"min": 0.8, "max": 0.3}}},
         "recipe: ratios: '4': shares are in (0, 1], the smaller one first (given: {'4': {'min': 0.8, 'max': 0.3}})"),
        ({"target": {"dead": True}, "ratios": {"4": 0.5}},
         "recipe: target: dead removes what is dead and nothing else, so that `ratios` cannot be met with it "
         "(given: {'target': {'dead': True}, 'ratios': {'4': 0.5}})"),
        ({"target": T, "proof": "slow"}, "recipe: proof: Input should be 'full' or 'quick' (given: 'slow')"),
        ({"target": T, "keep": 3}, "recipe: keep: Input should be a valid tuple (given: 3)"),
        ({"target": T, "seed": 1.5, "proof": 1},
         "recipe: proof: Input should be 'full' or 'quick' (given: 1); seed: Input should be a valid integer, got a "
         "number with a fractional part (given: 1.5)"),
        (["target"], "a recipe is a mapping of keys to values, not list"),
        (3, "a recipe is a mapping of keys to values, not int"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_by_its_key(recipe: Any, text: str) -> None:
    """The message names the key, what it takes, and what was given; all that is wrong at once."""
    with pytest.raises(RecipeError) as caught:
        read_recipe(recipe)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"target: {macs: 0.5", "the recipe {file} is not YAML: while parsing a flow mapping"),
        (b"target:\n\tmacs: 0.5", "the recipe {file} is not YAML: while scanning for the next token"),
        (b"\xff\xfe\x00", "the recipe {file} is not YAML: "),
        (b"", "a recipe is a mapping of keys to values, not NoneType"),
        (b"- target", "a recipe is a mapping of keys to values, not list"),
        (b"target: {macs: 0.5}\nkeeep: [a]", "recipe: there is no key 'keeep'; did you mean 'keep'?"),
        (b"target: !!python/object/apply:os.getcwd []", "the recipe {file} is not YAML: could not determine a constr"),
        (None, "the recipe {file} cannot be read: No such file or directory"),
    ],
)
def test_files_that_are_no_recipes(content: bytes | None, text: str, tmp_path: Path) -> None:
    """Missing, malformed and foreign files; nothing in a file is executed."""
    file = tmp_path / "recipe.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_recipe(file)
    assert str(caught.value).startswith(text.format(file=file))


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(str(tmp_path))
    assert str(caught.value) == f"the recipe {tmp_path} cannot be read: Is a directory"
