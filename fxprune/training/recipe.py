"""Training recipes: stages that a model is pruned and trained in, as a dict or the same thing in YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fxprune.errors import RecipeError
from fxprune.passes import training
from fxprune.passes.training.stage import Stage
from fxprune.registry import nearest
from fxprune.training.optimizers import FALLS, OPTIMIZERS

M = TypeVar("M", bound=BaseModel)
#: What a stage can do.
KINDS = ("prune", "lock", "tune", "quantize")
#: What other tools call a key or a modifier -> what it is called here.
ELSEWHERE = {
    # SparseML's modifiers
    "EpochRangeModifier": "epochs",
    "GMPruningModifier": "a stage - prune: {method: magnitude, schedule: {ramp: cubic, ...}}",
    "GlobalMagnitudePruningModifier": "a stage - prune: {method: magnitude, scope: global}",
    "LayerPruningModifier": "a stage - prune: {pattern: layer}",
    "MagnitudePruningModifier": "a stage - prune: {method: magnitude}",
    "LegacyGMPruningModifier": "a stage - prune: {method: magnitude}",
    "ConstantPruningModifier": "a stage - lock: {}",
    "ACDCPruningModifier": "a stage - prune: {schedule: {dense: ..., sparse: ...}}",
    "MovementPruningModifier": "a stage - prune: {method: movement}",
    "OBSPruningModifier": "fxprune.compile(..., sparsity=...) with calibration data, and then a stage - lock: {}",
    "OBSXPruningModifier": "fxprune.compile(..., sparsity=...) with calibration data, and then a stage - lock: {}",
    "MFACPruningModifier": "fxprune.compile(..., sparsity=...) with calibration data, and then a stage - lock: {}",
    "RigLPruningModifier": "a stage - prune: {method: rigl}",
    "TopKASTPruningModifier": "a stage - prune: {method: soft_mask}",
    "StructuredPruningModifier": "a stage - prune: {pattern: filter}, or channel",
    "LearningRateFunctionModifier": "optimizer: {lr: ..., schedule: ..., final: ...}",
    "LearningRateModifier": "optimizer: {lr: ..., schedule: ...}",
    "SetLearningRateModifier": "optimizer: {lr: ..., schedule: constant}, of the run or of a stage",
    "SetWeightDecayModifier": "optimizer: {weight_decay: ...}, of the run or of a stage",
    "DistillationModifier": "distillation",
    "QuantizationModifier": "a last stage - quantize: int8",
    # keys
    "modifiers": "stages",
    "training_modifiers": "epochs and optimizer",
    "pruning_modifiers": "stages",
    "distillation_modifiers": "distillation",
    "quantization_modifiers": "a last stage - quantize: int8",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "learning_rate": "optimizer: {lr: ...}",
    "lr": "optimizer: {lr: ...}",
    "init_lr": "optimizer: {lr: ...}",
    "final_lr": "optimizer: {final: ...}, a share of lr",
    "lr_func": "optimizer: {schedule: ...}",
    "lr_class": "optimizer: {schedule: ...}",
    "lr_scheduler_type": "optimizer: {schedule: ...}",
    "warmup_ratio": "optimizer: {warmup: ...}",
    "max_grad_norm": "optimizer: {clip: ...}",
    "weight_decay": "optimizer: {weight_decay: ...}",
    "batch_size": "batch",
    "per_device_train_batch_size": "batch",
    "pruning_configs": "stages, each a - prune: [...]",
    "weight_pruning": "stages",
    "pruners": "prune: [...], a list",
    "hardness": "distillation: {alpha: ...}",
    "distill_temperature": "distillation: {temperature: ...}",
}


class OptimizerKeys(BaseModel):
    """How weights are trained.

    Attributes:
        name: adamw, adam, sgd or another one of torch.optim (`fxprune train --list`).
        lr: the full rate.
        weight_decay, momentum, nesterov, betas, eps: handed on to it; None leaves what torch takes.
        schedule: of the rate: linear, cosine or constant. It goes over the whole run; over the stage, where the stage
            has an optimizer of its own.
        warmup: the share of the steps in which the rate rises.
        final: the rate at the end, as a share of the full one.
        clip: gradients longer than this are cut to it; None cuts none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    momentum: float | None = Field(default=None, ge=0, lt=1)
    nesterov: bool | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = Field(default=None, gt=0)
    schedule: str = "linear"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    final: float = Field(default=0.0, ge=0)
    clip: float | None = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _known(self) -> OptimizerKeys:
        OPTIMIZERS[self.name], FALLS[self.schedule]
        return self


class Lock(BaseModel):
    """Zeros stay zeros: those that earlier stages made, or, in a first stage, those that the weights have already.

    Attributes:
        pattern: what is locked where it is all zero, of weights that no stage has masked: single entries, or blocks.
        include, exclude: globs of module or parameter names, or "type:" and a class.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: str = "element"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Tune(BaseModel):
    """The smaller model is trained on, with its zeros.

    Attributes:
        fill: zeros inside what stays become small random numbers, of so many standard deviations of the weight, and
            all weights learn; None leaves them zeros.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fill: float | None = Field(default=None, gt=0)


class TrainStage(BaseModel):
    """One stage: exactly one of prune, lock, tune, quantize, and how long it takes.

    Attributes:
        prune: one pruning or a list of several on different layers (`fxprune.passes.training.Stage`); its schedule
            counts from the stage's start. The stage ends with a smaller model.
        lock: see `Lock`.
        tune: see `Tune`.
        quantize: "int8", or what `fxprune.compile` takes as `quantization`; the last stage, which takes no time.
        epochs, steps: how long; a stage without either takes what the others leave of the run.
        optimizer: keys that differ from the run's; the rate's schedule then goes over the stage.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prune: tuple[Stage, ...] | None = None
    lock: Lock | None = None
    tune: Tune | None = None
    quantize: str | dict[str, Any] | None = None
    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    optimizer: dict[str, Any] | None = None

    @field_validator("prune", mode="before")
    @classmethod
    def _prunings(cls, value: Any) -> Any:
        return None if value is None else tuple(training.stages(value))

    @model_validator(mode="after")
    def _one(self) -> TrainStage:
        given = [k for k in KINDS if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"a stage is exactly one of {', '.join(KINDS)}, not {' and '.join(given) or 'none'}")
        if self.epochs is not None and self.steps is not None:
            raise ValueError("a stage takes epochs or steps, not both")
        if self.quantize is not None and self.model_fields_set - {"quantize"}:
            raise ValueError("a stage that quantizes trains nothing: it has no other key")
        return self

    @property
    def kind(self) -> str:
        """What the stage does."""
        return next(k for k in KINDS if getattr(self, k) is not None)

    @property
    def said(self) -> str:
        """The stage in a few words."""
        if self.prune is None:
            return self.kind
        return "prune " + ", ".join(f"{one.name} {'+'.join(one.patterns)}" for one in self.prune)


class TrainRecipe(BaseModel):
    """A run: stages one after the other, each on what the one before has left.

    Attributes:
        stages: see `TrainStage`.
        epochs, steps: of the whole run; not needed where every stage says its own.
        optimizer: see `OptimizerKeys`.
        batch: rows of a batch, where fxprune makes the batches: of a `torch.utils.data.Dataset`, or of a task on the
            command line.
        distillation: in every stage that trains, {"alpha": 0.9, "temperature": 2}: see
            `fxprune.passes.training.distill.Distillation`. The teacher is the dense model, or the one given to `train`.
        backend, threads: that a target on the clock and the numbers in 8 bits are measured on.
        proof: "full" or "quick", as in a recipe of `fxprune.compile`.
        seed: of everything random.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: tuple[TrainStage, ...]
    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    optimizer: OptimizerKeys = OptimizerKeys()
    batch: int | None = Field(default=None, ge=1)
    distillation: dict[str, Any] | None = None
    backend: str | dict[str, Any] = "onnxruntime"
    threads: int | None = Field(default=None, ge=1)
    proof: Literal["full", "quick"] = "full"
    seed: int = 0

    @field_validator("stages", mode="before")
    @classmethod
    def _numbered(cls, value: Any) -> Any:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError("stages are a list, each with one of prune, lock, tune, quantize")
        return tuple(one if isinstance(one, TrainStage) else _stage(number, one) for number, one in enumerate(value, 1))

    @model_validator(mode="after")
    def _together(self) -> TrainRecipe:
        if not self.stages:
            raise ValueError("there is nothing to do; say for example - prune: {method: magnitude, target: 0.8}")
        if self.epochs is not None and self.steps is not None:
            raise ValueError("a run takes epochs or steps, not both")
        for number, one in enumerate(self.stages[:-1], 1):
            if one.quantize is not None:
                raise ValueError(f"stage {number}: quantize comes last: a file in 8 bits is not trained on")
        for number, one in enumerate(self.stages, 1):
            self.optimizer_of(one, f"stage {number}: ")
        return self

    def optimizer_of(self, stage: TrainStage, where: str = "") -> OptimizerKeys:
        """Return how a stage is trained: the run's keys, and those of its own.

        Raises:
            RecipeError: a key is unknown, or a value out of range.
        """
        if stage.optimizer is None:
            return self.optimizer
        return _checked(OptimizerKeys, self.optimizer.model_dump() | stage.optimizer, f"{where}optimizer: ")

    def lengths(self, per_epoch: int | None) -> list[int]:
        """Return the steps of each stage.

        Args:
            per_epoch: steps of an epoch, where known.

        Raises:
            RecipeError: a length is missing, or they do not add up.

        >>> read_train_recipe({"epochs": 3, "stages": [{"lock": {}, "epochs": 1}, {"tune": {}}]}).lengths(10)
        [10, 20]
        """
        total = _steps(self.steps, self.epochs, per_epoch, "the run")
        own = [_steps(s.steps, s.epochs, per_epoch, f"stage {n}") for n, s in enumerate(self.stages, 1)]
        trains = [s.quantize is None for s in self.stages]
        open_ = [n for n, (steps, trained) in enumerate(zip(own, trains, strict=True)) if trained and steps is None]
        known = sum(steps or 0 for steps in own)
        if total is None:
            if open_:
                raise RecipeError(
                    f"training recipe: stage {open_[0] + 1} does not say how long it takes: give it `epochs` or "
                    "`steps`, or give them to the whole run"
                )
            return [steps or 0 for steps in own]
        if not open_ and known != total:
            raise RecipeError(
                f"training recipe: the stages take {known} steps, and the run {total}: leave one of them open"
            )
        if open_ and total - known < len(open_):
            raise RecipeError(
                f"training recipe: the stages that say their length take {known} of {total} steps: stage "
                f"{open_[0] + 1} is left without any"
            )
        shares = [(total - known) // max(1, len(open_))] * len(open_)
        if open_:
            shares[-1] += total - known - sum(shares)
        left = dict(zip(open_, shares, strict=True))
        return [left.get(n, steps or 0) for n, steps in enumerate(own)]

    def stretched(self, epochs: float) -> TrainRecipe:
        """Return the same run in another number of epochs: stages and schedules keep their shares.

        Raises:
            RecipeError: the recipe counts steps, so that the share is not known.
        """
        own = [s.epochs for s in self.stages if s.quantize is None]
        whole = self.epochs if self.epochs is not None else None if None in own else sum(e or 0.0 for e in own)
        counted = any(s.steps is not None for s in self.stages) or self.steps is not None
        if whole is None or counted:
            raise RecipeError("training recipe: it counts steps, and cannot be stretched to a number of epochs")
        factor = epochs / whole
        changed = []
        for one in self.stages:
            new: dict[str, Any] = {} if one.epochs is None else {"epochs": one.epochs * factor}
            if one.prune is not None:
                new["prune"] = tuple(_stretched(p, factor) for p in one.prune)
            changed.append(one.model_copy(update=new))
        update = {"stages": tuple(changed)} | ({} if self.epochs is None else {"epochs": epochs})
        return self.model_copy(update=update)


def _stretched(pruning: Stage, factor: float) -> Stage:
    when = pruning.schedule
    if when.unit == "step" and (when.end is not None or when.start or when.every is not None):
        raise RecipeError("training recipe: a schedule counts steps: say `unit: epoch` in it to stretch the run")
    times = {
        k: value * factor
        for k in ("start", "end", "every", "dense", "sparse")
        if (value := getattr(when, k)) is not None
    }
    return pruning.model_copy(update={"schedule": when.model_copy(update=times)})


def _steps(steps: int | None, epochs: float | None, per_epoch: int | None, what: str) -> int | None:
    if epochs is None:
        return steps
    if per_epoch is None:
        raise RecipeError(
            f"training recipe: {what} is told in epochs, and the batches do not say how many make one: give `steps`"
        )
    return max(1, round(epochs * per_epoch))


def _stage(number: int, given: Any) -> TrainStage:
    where = f"stage {number}: "
    if not isinstance(given, Mapping):
        raise RecipeError(f"training recipe: {where}a mapping of keys to values, not {type(given).__name__}")
    bare = all(given.get(k) is None for k in KINDS)  # `- lock:` in YAML
    data = {k: {} if bare and k in ("lock", "tune") else v for k, v in given.items()}
    try:
        return _checked(TrainStage, data, f"training recipe: {where}")
    except RecipeError as error:
        text = str(error)
        raise (
            error if text.startswith("training recipe") else RecipeError(f"training recipe: {where}{text}")
        ) from None


def read_train_recipe(source: Mapping[str, Any] | str | Path | TrainRecipe, **overrides: Any) -> TrainRecipe:
    """Return a checked training recipe from a dict or a YAML file, with single keys overridden.

    Raises:
        RecipeError: the file cannot be read, a key is unknown, or a value is out of range; the text says which.

    >>> read_train_recipe({"epochs": 2, "stages": [{"prune": {"pattern": "4x1", "target": 0.8}}]}).stages[0].said
    'prune magnitude 4x1'
    >>> read_train_recipe({"epoch": 2, "stages": [{"lock": {}}]})
    Traceback (most recent call last):
        ...
    fxprune.errors.RecipeError: training recipe: there is no key 'epoch'; did you mean 'epochs'?
    >>> read_train_recipe({"num_epochs": 2, "stages": [{"lock": {}}]})
    Traceback (most recent call last):
        ...
    fxprune.errors.RecipeError: training recipe: there is no key 'num_epochs'; here it is called epochs
    """
    given = {k: v for k, v in overrides.items() if v is not None}
    if isinstance(source, TrainRecipe):
        data: Any = {name: getattr(source, name) for name in source.model_fields_set}
    elif isinstance(source, str | Path):
        data = _read_yaml(Path(source))
    else:
        data = source
    if not isinstance(data, Mapping):
        raise RecipeError(f"a training recipe is a mapping of keys to values, not {type(data).__name__}")
    return _checked(TrainRecipe, {**data, **given}, "training recipe: ")


def _checked(cls: type[M], data: Mapping[str, Any], where: str) -> M:
    try:
        return cls.model_validate(dict(data))
    except pydantic.ValidationError as error:
        raise RecipeError(where + "; ".join(_sentence(e, cls) for e in error.errors())) from None


def _sentence(error: Any, cls: type[BaseModel]) -> str:
    path = [str(p) for p in error["loc"]]
    key = ".".join(path)
    inner: dict[str, type[BaseModel]] = {"lock": Lock, "tune": Tune}
    if cls is TrainRecipe:
        inner = {"optimizer": OptimizerKeys}
    if error["type"] == "extra_forbidden":
        known = list((inner.get(path[0], cls) if path[:-1] else cls).model_fields)
        if path[-1] in ELSEWHERE:
            return f"there is no key '{key}'; here it is called {ELSEWHERE[path[-1]]}"
        return f"there is no key '{key}'" + (nearest(path[-1], known) or f". Known: {', '.join(known)}")
    if error["type"] == "missing":
        return f"there are no {key}; say for example stages: [{{prune: {{method: magnitude, target: 0.8}}}}]"
    message = error["msg"].removeprefix("Value error, ")
    return message if not key else f"{key}: {message} (given: {error['input']!r})"


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"the training recipe {path} cannot be read: {error.strerror}") from error
    except yaml.constructor.ConstructorError as error:
        tag = str(error.problem or "").partition("'!")[2].partition("'")[0]
        if tag:
            known = ELSEWHERE.get(tag)
            told = f"here it is called {known}" if known else "it has no counterpart here"
            raise RecipeError(
                f"the training recipe {path} has a modifier of SparseML, !{tag}; {told}. The page on coming from "
                "other tools has a table of its keys"
            ) from None
        raise RecipeError(f"the training recipe {path} is not YAML: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"the training recipe {path} is not YAML: {error}") from error
