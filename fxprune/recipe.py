"""Recipes: what to do to a model, as a Python dict or the same thing in YAML. Unknown keys are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fxprune.errors import RecipeError
from fxprune.registry import nearest

Kind = Literal["channels", "heads", "head_dims", "hidden", "ffn", "residual"]


class Range(BaseModel):
    """Bounds of the share of its units that a group keeps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: float = Field(default=0.0, ge=0, le=1)
    max: float = Field(default=1.0, gt=0, le=1)


def _share_or_range(pattern: Any, value: Any) -> Any:
    """One value of `ratios`, checked here so that the message names its pattern."""
    bounds = dict(value) if isinstance(value, Mapping) else {"min": value, "max": value}
    if isinstance(value, Range):
        return value
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in bounds.values())
    if not numbers or not bounds or not bounds.keys() <= {"min", "max"}:
        raise ValueError(f"'{pattern}' is given the share to keep, 0.5 for example, or {{min: 0.3, max: 0.8}}")
    low, high = bounds.get("min", 0.0), bounds.get("max", 1.0)
    if not 0 <= low <= high <= 1 or high == 0:
        raise ValueError(f"'{pattern}': shares are in (0, 1], the smaller one first")
    return Range(min=low, max=high) if isinstance(value, Mapping) else value


class Target(BaseModel):
    """What to reach: exactly one of the keys.

    Attributes:
        macs: share of the multiply-accumulates to keep, in (0, 1].
        params: share of the parameters to keep, in (0, 1].
        memory: share to keep of the bytes of weights and of the most activations alive at a time, in (0, 1].
        speedup: how many times faster than the dense model on the recipe's backend, above 1; met by measuring.
        latency_ms: milliseconds of one call on the example inputs on the recipe's backend; met by measuring.
        max_drop: how much of the metric given to `compile` may be lost; as few multiply-accumulates as that allows.
        dead: remove only what is already zero or constant, without changing any output.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    macs: float | None = Field(default=None, gt=0, le=1)
    params: float | None = Field(default=None, gt=0, le=1)
    memory: float | None = Field(default=None, gt=0, le=1)
    speedup: float | None = Field(default=None, gt=1)
    latency_ms: float | None = Field(default=None, gt=0)
    max_drop: float | None = Field(default=None, ge=0)
    dead: bool = False

    @field_validator("macs", "params", "memory", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        if isinstance(value, bool):  # else true would be 1.0
            raise ValueError("give the share to keep, 0.5 for example")
        return value

    @model_validator(mode="after")
    def _one(self) -> Target:
        given = [k for k in type(self).model_fields if getattr(self, k) is not None and getattr(self, k) is not False]
        if len(given) != 1:
            known = ", ".join(type(self).model_fields)
            raise ValueError(f"a target is exactly one of {known}, not {' and '.join(given) or 'none'}")
        return self

    @property
    def cost(self) -> tuple[str, float]:
        """The kind of cost and the share of it to keep."""
        for kind in ("macs", "params", "memory"):
            share = getattr(self, kind)
            if share is not None:
                return kind, share
        return "macs", 1.0

    @property
    def clocked(self) -> bool:
        """Whether the target is a time on the clock."""
        return self.speedup is not None or self.latency_ms is not None


class Recipe(BaseModel):
    """All settings of a compilation.

    Attributes:
        target: what to reach.
        criterion: name of a criterion, or {"name": ..., option: value}; "auto" is obs with calibration data and
            magnitude without.
        allocation: name of an allocator, or {"name": ..., option: value}; "auto" is knapsack with calibration data and
            uniform without.
        round_to: widths are multiples of it where they are large enough; None takes what the backend runs fast.
        keep: patterns of what stays whole: globs of module or parameter names ("head", "layer1.*"), classes
            ("type:LayerNorm"), kinds ("kind:residual"), one dimension ("fc.weight.0") or the name of a group. A kept
            layer keeps its inputs, too.
        groups: kinds of groups that may be cut; None is all. "ffn" is the inner width of an MLP, "residual" what skip
            connections carry; "not residual" excludes.
        ratios: pattern -> the share that the groups of it keep, or {"min": share, "max": share}; the allocation spreads
            the rest of the budget over all others.
        blocks: whether whole branches of residual networks go as well: "none", "influence" or "greedy" (on calibration
            data, see `fxprune.passes.depth`), or {"name": ..., "remove": how many}. Without a number blocks go as long
            as the target is not overshot, and widths make up the rest.
        floor: no group keeps a smaller share of its units than this, unless `ratios` say so.
        backend: what the model will run on: a name, or {"name": ..., option: value}.
        threads: of the backend, for targets on the clock; None takes torch's number.
        reconstruction: "auto" (least_squares with calibration data, none without), "none", "bias", "least_squares", or
            {"name": ..., option: value}: see `fxprune.passes.reconstruct`.
        sparsity: zeros inside what stays: "2:4" or any n:m along the inputs, "32x32" or any blocks, "unstructured", or
            {"pattern": ..., "density": share that stays, "method": ..., "refit": ..., "permute": ..., "when": "faster",
            "max_drop": ...}: see `fxprune.passes.patterns`. With it alone, no target is needed.
        quantization: "int8", an ONNX file in 8 bits behind it all, taken where it is measured to be faster, or
            {"dtype": "int8", "when": "always", "max_drop": ..., ...}: see `fxprune.quantization`. With it alone, no
            target is needed.
        basis: "auto" (principal with calibration data), "principal" (attention's queries, keys and values are turned
            into principal components first, `fxprune.passes.basis`) or "none".
        max_memory: bytes that calibration statistics may take at a time.
        keep_class: return the original class with smaller parameters, and cut only what that class can express.
        proof: "full" (float64, randomised weights too) or "quick" (float32, one small input).
        seed: of everything random.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Target
    criterion: str | dict[str, Any] = "auto"
    allocation: str | dict[str, Any] = "auto"
    round_to: int | None = Field(default=None, ge=1)
    keep: tuple[str, ...] = ()
    groups: tuple[str, ...] | None = None
    ratios: dict[str, float | Range] = Field(default_factory=dict)
    blocks: str | dict[str, Any] = "none"
    floor: float = Field(default=0.05, ge=0, lt=1)
    backend: str | dict[str, Any] = "onnxruntime"
    threads: int | None = Field(default=None, ge=1)
    reconstruction: str | dict[str, Any] = "auto"
    sparsity: str | dict[str, Any] | None = None
    quantization: str | dict[str, Any] | None = None
    basis: Literal["auto", "principal", "none"] = "auto"
    max_memory: float = Field(default=2 * 2**30, gt=0)
    keep_class: bool = False
    proof: Literal["full", "quick"] = "full"
    seed: int = 0

    @property
    def removes(self) -> bool:
        """Whether units are to be removed at all: a sparsity or a quantization alone leaves every width as it is."""
        target = self.target
        wanted = target.cost[1] < 1 or target.clocked or target.max_drop is not None or target.dead
        return wanted or bool(self.ratios) or self.blocks != "none"

    @field_validator("keep", "groups", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("groups")
    @classmethod
    def _kinds(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        known = list(get_args(Kind))
        for kind in value or ():
            if kind.removeprefix("not ") not in known:
                hint = nearest(kind.removeprefix("not "), known) or "."
                raise ValueError(f"there is no kind '{kind}'{hint} Known: {', '.join(known)}; each also after 'not '")
        return value

    @field_validator("ratios", mode="before")
    @classmethod
    def _shares(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {pattern: _share_or_range(pattern, share) for pattern, share in value.items()}

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        given = {"name": self.blocks} if isinstance(self.blocks, str) else self.blocks
        number = given.get("remove", 1)
        if not isinstance(given.get("name"), str) or given.keys() - {"name", "remove"}:
            raise ValueError('blocks is a name or {"name": ..., "remove": how many}')
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"blocks: remove is a number of blocks, not {number!r}")
        if given["name"] != "none" and (self.keep_class or self.target.dead):
            raise ValueError("blocks go neither with keep_class, since a class calls all of its modules, nor with dead")
        if self.target.dead and self.ratios:
            raise ValueError("dead removes what is dead and nothing else, so that `ratios` cannot be met with it")
        return self


def read_recipe(source: Mapping[str, Any] | str | Path | Recipe | None = None, **overrides: Any) -> Recipe:
    """Return a checked recipe from a dict or a YAML file, with single keys overridden.

    Raises:
        RecipeError: the file cannot be read, a key is unknown, or a value is out of range; the text says which.

    >>> read_recipe({"target": {"macs": 0.5}, "criterion": "random"}).criterion
    'random'
    >>> read_recipe({"target": {"macs": 0.5}, "criterium": "random"})
    Traceback (most recent call last):
        ...
    fxprune.errors.RecipeError: recipe: there is no key 'criterium'; did you mean 'criterion'?
    """
    if isinstance(source, Recipe):
        data: Any = source.model_dump(exclude_unset=True)
    elif isinstance(source, str | Path):
        data = _read_yaml(Path(source))
    else:
        data = {} if source is None else source
    if not isinstance(data, Mapping):
        raise RecipeError(f"a recipe is a mapping of keys to values, not {type(data).__name__}")
    data = {**data, **{k: v for k, v in overrides.items() if v is not None}}
    if "target" not in data and (data.get("sparsity") or data.get("quantization")):
        data["target"] = {"params": 1.0}
    if "target" not in data:
        raise RecipeError('the recipe has no target; say for example {"target": {"macs": 0.5}}')
    try:
        return Recipe.model_validate(data)
    except pydantic.ValidationError as error:
        raise RecipeError("recipe: " + "; ".join(_sentence(e) for e in error.errors())) from None


def as_yaml(recipe: Mapping[str, Any]) -> str:
    """Return a recipe's JSON values as YAML, without the keys that say nothing.

    >>> recipe = read_recipe({"target": {"macs": 0.5}, "keep": "head"})
    >>> print(as_yaml(recipe.model_dump(mode="json", exclude_unset=True)))
    target:
      macs: 0.5
    keep:
    - head
    <BLANKLINE>
    """
    said = {key: value for key, value in recipe.items() if value is not None and value != []}
    said["target"] = {key: value for key, value in recipe["target"].items() if value is not None and value is not False}
    return yaml.safe_dump(said, sort_keys=False)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} is not YAML: {error}") from error


def _sentence(error: Any) -> str:
    where = [str(p) for p in error["loc"] if p not in ("str", "dict[str,any]")]
    if error["type"] == "extra_forbidden":
        known = list((Target if where[:-1] else Recipe).model_fields)
        return f"there is no key '{'.'.join(where)}'" + (nearest(where[-1], known) or f". Known: {', '.join(known)}")
    if error["type"] == "model_type":
        return f"target: say for example {{'macs': 0.5}} (given: {error['input']!r})"
    message = error["msg"].removeprefix("Value error, ")
    return f"{'.'.join(where) or 'target'}: {message} (given: {error['input']!r})"
