"""`train`: a training recipe from its first stage to its last."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.api import compile as compile_model
from fxprune.capture import example
from fxprune.copies import copied
from fxprune.errors import RecipeError
from fxprune.making import measured
from fxprune.modes import evaluating
from fxprune.passes.training.distill import distillation
from fxprune.passes.training.stage import Stage, stages
from fxprune.pruned import Pruned
from fxprune.report import Pair, Step
from fxprune.training.batches import Feed
from fxprune.training.compose import composed
from fxprune.training.distill import Distiller
from fxprune.training.finish import filled
from fxprune.training.fit import Fit, Taken
from fxprune.training.optimizers import optimizer as optimizer_of
from fxprune.training.optimizers import rate
from fxprune.training.pruner import Pruner
from fxprune.training.recipe import TrainRecipe, TrainStage, read_train_recipe
from fxprune.training.run_folder import RunFolder
from fxprune.training.show import State, Table, showing

#: What a step shows of the last update.
_SHOWN = ("sparsity", "target", "macs", "predicted", "measured")
#: Rows of `training.csv` in a run, beside those of updates.
_ROWS = 500


def train(
    model: nn.Module,
    example_inputs: Any,
    recipe: Mapping[str, Any] | str | os.PathLike[str] | TrainRecipe,
    *,
    batches: Any,
    loss: Callable[[Any, Any], Tensor],
    metric: Callable[[nn.Module], float] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | bool | None = None,
    calibration: Any = None,
    teacher: nn.Module | None = None,
    log: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int | None = None,
    resume: bool = False,
    progress: Callable[[str], None] | None = None,
    **overrides: Any,
) -> Pruned:
    """Prune a model while it is trained, in the stages of a recipe, and return the smaller model, proved.

    Args:
        model: any module; it is left as it was, a copy is trained.
        example_inputs: as `fxprune.compile` takes them, and so `kwargs` and `dynamic_shapes`.
        recipe: a dict, a YAML file or a `TrainRecipe`: see `fxprune.training.recipe.TrainRecipe` for the keys.
        batches: what is trained on: a DataLoader or a list, which is gone through again in every epoch; a Dataset; or
            a function epoch -> iterable. A batch is (inputs, labels), (input, ..., labels), or a dict whose entries
            that are not inputs of the model are labels.
        loss: (the model's output, a batch's labels) -> a scalar.
        metric: model -> number, higher is better: reported of the model as it was and of the result.
        calibration: batches, for a stage that quantizes.
        teacher: for the recipe's `distillation`, in every stage that trains; by default a copy of the model.
        log: a folder for `training.csv`, and for each stage's `pruning.csv`; None for none.
        checkpoint: a folder that the run is kept in, at the end of every epoch and of every stage; None for none.
        every: steps after which it is kept, too.
        resume: go on from the checkpoint; the same `batches`, in the same order, give the same result to the bit as a
            run that was never stopped.
        progress: called with the name of each stage as it begins, and with a line at every update.
        overrides: keys of the recipe, `seed=1`.

    Raises:
        RecipeError: a key is unknown, parts contradict each other, or the run is shorter than its schedules.
        InputError: the batches, the loss or the checkpoint are not what they should be.
        NonFiniteError: the loss or a gradient is NaN or infinite.
        TargetError, ProofError, BackendError: see `fxprune.compile`.

    >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> data = [(torch.randn(16, 8), torch.randint(0, 4, (16,))) for _ in range(5)]
    >>> recipe = {"stages": [{"prune": {"pattern": "channel", "target": 0.5}, "epochs": 2}, {"tune": {}, "epochs": 1}]}
    >>> pruned = train(net, torch.randn(2, 8), recipe, batches=data, loss=nn.functional.cross_entropy)
    >>> pruned.module
    Sequential(
      (0): Linear(in_features=8, out_features=32, bias=True)
      (2): Linear(in_features=32, out_features=4, bias=True)
    )
    """
    source = Path(recipe) if isinstance(recipe, os.PathLike) else recipe
    settings = read_train_recipe(source, **overrides)
    args, keywords = example(example_inputs, kwargs)
    feed = Feed.of(batches, args, keywords, settings.batch, settings.seed)
    run = _Run(
        model,
        args,
        keywords,
        dynamic_shapes,
        settings,
        settings.lengths(feed.per_epoch()),
        feed,
        loss,
        metric,
        calibration,
        teacher,
        None if log is None else Path(log),
        RunFolder(checkpoint),
        every,
        progress or (lambda text: None),
    )
    if settings.batch is not None and not run.makes_batches(batches):
        run.notes.append(f"the recipe's batch, {settings.batch}, says nothing: the batches came as they are")
    cuda = range(torch.cuda.device_count()) if any(p.is_cuda for p in model.parameters()) else ()
    with torch.random.fork_rng(devices=cuda), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(settings.seed)
        return run.all(resume)


@dataclass
class _Run:
    """A run between its stages.

    Attributes:
        lengths: steps of each stage.
        now: the model as it is: a copy of the user's, then what a stage has left.
        result: of the last stage that gave one.
        sayable: whether the result's plan is one of the user's model.
        step, epoch: done, in the whole run.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic: Any
    recipe: TrainRecipe
    lengths: list[int]
    feed: Feed
    loss: Callable[[Any, Any], Tensor]
    metric: Callable[[nn.Module], float] | None
    calibration: Any
    teacher: nn.Module | None
    log: Path | None
    checkpoint: RunFolder
    every: int | None
    say: Callable[[str], None]
    notes: list[str] = field(default_factory=list)
    now: nn.Module = field(init=False)
    result: Pruned | None = None
    sayable: bool = True
    step: int = 0
    epoch: int = 0
    dense_metric: float | None = None
    steps: list[Step] = field(default_factory=list)
    _table: Any = None
    _bar: Any = None
    _state: dict[str, Any] | None = None

    @staticmethod
    def makes_batches(batches: Any) -> bool:
        """Whether batches are made here or by a task, of as many rows as the recipe says."""
        return isinstance(batches, torch.utils.data.Dataset) or (callable(batches) and not hasattr(batches, "__iter__"))

    # ------------------------------------------------------------------ stages
    def all(self, resume: bool) -> Pruned:
        """Go through all stages."""
        self.check()
        self.now = copied(self.model)
        if self.recipe.distillation is not None and self.teacher is None:
            self.teacher = copied(self.model)
        first = self.restore() if resume else 0
        if not resume and self.metric is not None:
            self.dense_metric = self.score(self.now)
        self._table = Table(self.log, self.step)
        with showing(sum(self.lengths)) as self._bar:
            for number in range(first, len(self.recipe.stages)):
                stage, steps = self.recipe.stages[number], self.lengths[number]
                self.say(f"stage {number + 1} of {len(self.recipe.stages)}: {stage.said}")
                before = self.step - self.done_in_stage()
                self.one(number, stage, steps)
                self.step = before + steps
                self.ended(number, stage)
        return self.finished()

    def check(self) -> None:
        """Refuse at once what would fail after hours."""
        for number, (stage, steps) in enumerate(zip(self.recipe.stages, self.lengths, strict=True), 1):
            for one in stage.prune or ():
                try:
                    one.schedule.schedule(steps, self.feed.per_epoch())
                except RecipeError as error:
                    raise RecipeError(f"training recipe: stage {number}: {error}") from None
        if self.recipe.distillation is not None:
            distillation(self.recipe.distillation)
        elif self.teacher is not None:
            raise RecipeError("there is a teacher, and the recipe has no `distillation`")

    def one(self, number: int, stage: TrainStage, steps: int) -> None:
        """Do one stage."""
        if stage.quantize is not None:
            self.quantize(stage.quantize)
            return
        masks = {} if self.result is None else dict(self.result.plan.masks)
        if stage.tune is not None and stage.tune.fill is not None:
            if not masks:
                raise RecipeError(f"training recipe: stage {number + 1}: there are no zeros to fill")
            assert self.result is not None
            filled(self.result, stage.tune.fill, self.recipe.seed)
            masks = {}
        prunings = list(stage.prune or ())
        if stage.lock is not None and (not masks or stage.lock.model_fields_set):
            if not any(bool((p == 0).any()) for p in self.now.parameters() if p.dim() > 1):
                raise RecipeError(f"training recipe: stage {number + 1}: no weight has zeros that could be locked")
            prunings = stages({"method": "pattern_lock", "schedule": {"ramp": "oneshot"}} | stage.lock.model_dump())
        if not prunings:
            self.tune(number, steps)
            return
        if masks:  # those that are there stay beside what comes
            held = {"method": "pattern_lock", "include": tuple(masks), "schedule": {"ramp": "oneshot"}}
            prunings += stages(held)
        self.prune(number, steps, prunings)

    def prune(self, number: int, steps: int, prunings: list[Stage]) -> None:
        """Train with masks, and make the model smaller."""
        first = self.result is None
        self.now.train()
        log = None if self.log is None else self.log / f"stage-{number + 1}"
        if log is not None and self._state is None:
            (log / "pruning.csv").unlink(missing_ok=True)  # of a run before this one
        pruner = Pruner(
            self.now,
            self.args,
            prunings,
            kwargs=self.kwargs,
            dynamic_shapes=self.dynamic if first else self.result.plan.dynamic or False,  # type: ignore[union-attr]
            steps=steps,
            steps_per_epoch=self.feed.per_epoch(),
            backend=self.recipe.backend,
            threads=self.recipe.threads,
            seed=self.recipe.seed,
            log=log,
            progress=self.say,
        )
        self.fit(number, steps, self.now, pruner)
        self.say("finish")
        self.now.eval()
        made = pruner.finish(proof=self.recipe.proof)
        made.dense = self.model
        if not first and self.sayable:
            assert self.result is not None
            self.sayable = composed(self.model, self.result.plan, pruner._subject.analysis, made)
            if not self.sayable:
                self.notes.append(
                    f"from stage {number + 1} on the plan is one of the model that the stage began with: what it "
                    "removes cannot be said of the first model"
                )
        if not self.sayable:
            made.dense = None if self.result is None else self.result.graph_module()
        self.result, self.now = made, made.module

    def tune(self, number: int, steps: int) -> None:
        """Train without any pruning; zeros that stages have made stay."""
        held = self.result is not None and bool(self.result.plan.masks)
        if held:
            assert self.result is not None
            self.result.lock()
        try:
            self.fit(number, steps, self.now, None)
        finally:
            if held:
                assert self.result is not None
                self.result.unlock()
        self.now.eval()

    def quantize(self, wanted: str | dict[str, Any]) -> None:
        """Make a file in 8 bits of the result."""
        self.now.eval()
        given = {"target": {"params": 1.0}, "reconstruction": "none", "basis": "none", "quantization": wanted}
        made = self.compiled(given, calibration=self.calibration, metric=self.metric)
        if self.result is None:
            self.result, self.now = made, made.module
            return
        self.result.quantized = made.quantized
        self.result.report.recipe["quantization"] = made.report.recipe["quantization"]
        self.steps += made.report.steps
        if made.report.samples:
            self.result.report.samples, self.result.report.random = made.report.samples, made.report.random

    def compiled(self, given: dict[str, Any], **more: Any) -> Pruned:
        """Compile the model as it is, by which nothing is removed."""
        recipe = self.recipe
        dynamic = self.dynamic if self.result is None else self.result.plan.dynamic or False
        return compile_model(
            self.now,
            self.args,
            given | {"backend": recipe.backend, "threads": recipe.threads, "proof": recipe.proof, "seed": recipe.seed},
            kwargs=self.kwargs,
            dynamic_shapes=dynamic,
            progress=self.say,
            **more,
        )

    def ended(self, number: int, stage: TrainStage) -> None:
        """Write down what a stage has left."""
        if stage.quantize is None:
            score = None if self.metric is None else self.score(self.now)
            before = next((s.metric[1] for s in reversed(self.steps) if s.metric is not None), self.dense_metric)
            pair = None if score is None or before is None else (before, score)
            why = f"{self.lengths[number]} steps"
            self.steps.append(Step(f"stage {number + 1}, {stage.said}", True, metric=pair, why=why))
        if self.result is not None:
            self.checkpoint.keep(number + 1, self.result)
        self.save(number + 1, {})
        self.checkpoint.tidy(number + 1)

    def finished(self) -> Pruned:
        """Return the result with what the report says of the whole run."""
        if self.result is None:
            self.result = self.compiled({"target": {"params": 1.0}, "reconstruction": "none", "basis": "none"})
            self.result.dense = self.model
        result, report = self.result, self.result.report
        report.model = type(self.model).__name__
        small = [s for s in self.steps if s.name.startswith("quantization")]
        report.steps = [
            *(s for s in self.steps if s not in small),
            *(s for s in report.steps if s not in small),
            *small,
        ]
        report.notes += self.notes
        result.module.train(self.model.training)
        if self.metric is not None and self.dense_metric is not None:
            report.metric = Pair(self.dense_metric, self.score(result.module))
        return result

    def score(self, module: nn.Module) -> float:
        """Return the user's metric, taken in eval mode."""
        assert self.metric is not None
        with evaluating(module):
            return measured(self.metric, module)

    # ------------------------------------------------------------------ steps
    def fit(self, number: int, steps: int, module: nn.Module, pruner: Pruner | None) -> None:
        """Train a module for the steps of a stage, or for those that are left of it."""
        stage = self.recipe.stages[number]
        keys = self.recipe.optimizer_of(stage)
        # In the order of their names, which is the same for a module that was saved and read again.
        optimizer = optimizer_of(keys, [p for _, p in sorted(module.named_parameters())])
        start = sum(self.lengths[:number])
        offset, whole = (0, steps) if stage.optimizer is not None else (start, sum(self.lengths))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: rate(keys, offset + k, whole))
        module.train()
        kept = self.checkpoint.folder
        hint = "" if kept is None else f"; the last state is in {kept}: lower the rate, and `resume` from there"
        with self.taught(module) as distiller:
            parts = (optimizer, scheduler, keys.clip, pruner, distiller)
            fit = Fit(module, steps, self.feed, self.loss, *parts, first=start, hint=hint)
            if self._state is not None:
                fit.load(self._state["inside"], self._state["random"])
                self._state = None
            if pruner is not None:
                pruner._optimizers = [optimizer]
                pruner.on_step_begin()
            while fit.done < steps:
                for taken in fit.epoch(self.epoch):
                    self.tell(number, taken, fit.done == steps)
                    if self.every is not None and self.step % self.every == 0 and fit.done < steps:
                        self.save(number, fit.state())
                self.epoch += 1
                if fit.done < steps:
                    self.save(number, fit.state())

    def taught(self, module: nn.Module) -> AbstractContextManager[Distiller | None]:
        """Let a module learn from the teacher, if there is one."""
        if self.recipe.distillation is None:
            return nullcontext()
        assert self.teacher is not None
        return Distiller(module, self.teacher, **self.recipe.distillation)

    def tell(self, number: int, taken: Taken, last: bool) -> None:
        """Show a step that was made, and count it."""
        row, stage = taken.row, self.recipe.stages[number]
        shown = {} if row is None else {name: getattr(row, name) for name in _SHOWN}
        state = State(self.step, number + 1, stage.kind, self.epoch, taken.loss, taken.rate, **shown)
        self._bar.show(state)
        if self.step % max(1, sum(self.lengths) // _ROWS) == 0 or last or taken.updated:
            self._table.add(state)
        self.step += 1

    # ------------------------------------------------------------------ checkpoints
    def save(self, number: int, inside: dict[str, Any]) -> None:
        """Write where the run is; between stages the model, too, where no stage has left a result yet."""
        if self.checkpoint.folder is None:
            return
        if not inside and self.result is None:
            inside = {"model": self.now.state_dict()}
        self.checkpoint.save(
            {
                "recipe": self.recipe.model_dump(mode="json"),
                "stage": number,
                "step": self.step,
                "epoch": self.epoch,
                "sayable": self.sayable,
                "metric": self.dense_metric,
                "steps": [(s.name, s.metric, s.why) for s in self.steps],
                "notes": self.notes,
                "random": torch.get_rng_state(),
                "inside": inside,
            }
        )

    def restore(self) -> int:
        """Go on where a checkpoint is; return the number of the stage."""
        state = self.checkpoint.load(self.recipe.model_dump(mode="json"))
        number: int = state["stage"]
        self.step, self.epoch, self.sayable = state["step"], state["epoch"], state["sayable"]
        self.dense_metric, self.notes = state["metric"], list(state["notes"])
        self.steps = [Step(n, True, metric=None if m is None else (m[0], m[1]), why=w) for n, m, w in state["steps"]]
        if number and any(s.kind != "tune" for s in self.recipe.stages[:number]):
            self.result = self.checkpoint.before(number)
            self.result.args, self.result.kwargs, self.result.dense = self.args, self.kwargs, self.model
            self.now = self.result.module
        if "done" in state["inside"]:
            self._state = state
        else:
            if "model" in state["inside"]:
                self.now.load_state_dict(state["inside"]["model"])
            torch.set_rng_state(state["random"])
        return number

    def done_in_stage(self) -> int:
        """How many steps of the stage that begins were made before the run was stopped."""
        return 0 if self._state is None else int(self._state["inside"]["done"])
