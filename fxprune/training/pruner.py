"""`Pruner`: masks that close while a model trains, in an ordinary training loop, and a smaller model at the end."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.admit import admit
from fxprune.analyse import analyse
from fxprune.capture import capture, example
from fxprune.copies import copied
from fxprune.costs import Costs
from fxprune.errors import InputError, NonFiniteError
from fxprune.groups import find_groups
from fxprune.pruned import Pruned
from fxprune.recipe import read_recipe
from fxprune.training import checkpoint as files
from fxprune.training.distill import Distiller
from fxprune.training.finish import finished, refuse_open
from fxprune.training.finite import infinite, infinite_weight
from fxprune.training.log import Log, Row
from fxprune.training.masking import Masking
from fxprune.training.rewind import Rewinding
from fxprune.training.steps import follow
from fxprune.training.wrapped import inner as unwrapped

#: What a checkpoint says that it is.
_FORMAT = 4
#: What "hybrid-filled" puts in the place of zeros: so many standard deviations of the weight.
_FILL = 0.1


class Pruner:
    """Prunes a model while it is trained.

    The model's weights get masks, as parametrisations of its modules (`torch.nn.utils.parametrize`): the optimizer, its
    state, mixed precision, gradient accumulation and clipping, DistributedDataParallel and torch.compile work as
    before. Make the Pruner before the model is sharded (`fully_shard`) or wrapped in DistributedDataParallel; one in
    torch.compile may be given as it is. As a context manager it takes its masks off a model that it has not finished.

    Three ways to drive it, which are one: `attach(optimizer)` and nothing else; the hooks `on_step_begin`,
    `on_before_optimizer_step`, `on_step_end` in the loop, with `on_epoch_begin` and `on_epoch_end` around it; or
    callbacks (`fxprune.training.callbacks`). A step is a step of the optimizer.

    Args:
        model: that is trained; its modules are parametrised in place, until `finish`.
        example_inputs: as `fxprune.compile` takes them, and so `kwargs` and `dynamic_shapes`.
        kwargs: keyword inputs beside positional ones.
        dynamic_shapes: which sizes differ from batch to batch.
        pruning: one pruning, or a list of several on different layers: see `fxprune.passes.training.Stage`.
        steps: of the whole run, where known: schedules without an end need it, and one that ends later is refused.
        steps_per_epoch: for schedules in epochs.
        backend: that a target on the clock is measured on.
        threads: of the backend.
        seed: of what methods draw.
        distillation: the model learns from a teacher, too: see `fxprune.passes.training.distill.Distillation`. Call
            `loss = pruner.distill(loss)` before the backward pass; of models whose output has a `.loss`
            (transformers, called with labels) that is blended by itself.
        teacher: by default a copy of the model as it is now: to go on from a checkpoint, pass the dense model again.
        log: a folder for `pruning.csv`, and TensorBoard's events where that is installed; None for none.
        checkpoint: a file that `save` writes to by default, and that non-finite scores leave behind.
        progress: called with a line at every update; of methods that choose anew in each step, at every tenth.

    Raises:
        RecipeError: a key, a method, a pattern or a glob is unknown, or parts contradict each other.
        TargetError: a target that the bounds or the smallest widths do not allow; said before anything is trained.
        InputError, CaptureError: see `fxprune.compile`.

    >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
    >>> pruner = Pruner(net, torch.randn(2, 8), {"pattern": "channel", "target": 0.5, "schedule": {"end": 3}})
    >>> pruner = pruner.attach(optimizer)
    >>> for _ in range(5):
    ...     optimizer.zero_grad()
    ...     net(torch.randn(16, 8)).square().mean().backward()
    ...     optimizer.step()
    >>> pruner.finish().module
    Sequential(
      (0): Linear(in_features=8, out_features=32, bias=True)
      (2): Linear(in_features=32, out_features=4, bias=True)
    )
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        pruning: Any,
        *,
        kwargs: Mapping[str, Any] | None = None,
        dynamic_shapes: Mapping[str, Mapping[int, Any]] | bool | None = None,
        steps: int | None = None,
        steps_per_epoch: int | None = None,
        backend: str | Mapping[str, Any] = "onnxruntime",
        threads: int | None = None,
        seed: int = 0,
        distillation: Mapping[str, Any] | None = None,
        teacher: nn.Module | None = None,
        log: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        from fxprune.passes import training
        from fxprune.passes.training.masked import Weights
        from fxprune.passes.training.pruning import Pruning, Subject

        training.load()
        told = training.stages(pruning)
        args, keywords = example(example_inputs, kwargs)
        inner = unwrapped(model)
        reference = admit(copied(inner)).model
        if distillation is not None and teacher is None:
            teacher = copied(inner)
        captured = capture(reference, args, keywords, dynamic_shapes)
        analysis = analyse(captured)
        recipe = read_recipe({"target": {"params": 1.0}, "backend": backend, "threads": threads, "seed": seed})
        self.model = inner
        self.step, self.steps = 0, steps
        self._subject = Subject(
            analysis,
            find_groups(analysis),
            Costs(analysis),
            reference,
            Weights(inner, captured.aliases),
            args,
            keywords,
            recipe,
            progress or (lambda text: None),
        )
        self._prunings = [
            Pruning.of(stage, self._subject, stage.schedule.schedule(steps, steps_per_epoch), seed + i, steps)
            for i, stage in enumerate(told)
        ]
        self._masking = Masking(self._subject, self._prunings)
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._log = Log(None if log is None else Path(log))
        self._begun: int | None = None
        self._hooks: list[Any] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._loss: float | None = None
        self._rewinding = Rewinding(inner, self._prunings)
        self._done = False
        try:
            for one in self._prunings:
                one.method.start(one)
                self._masking.put_on(one)
        except BaseException:
            self._subject.weights.remove(zeros=False)
            raise
        self._distiller = None if teacher is None else Distiller(inner, teacher, **(distillation or {}))
        self._rewinding.keep(self.step)

    def __enter__(self) -> Pruner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done:
            self.abort()

    # ------------------------------------------------------------------ driving it
    def attach(self, optimizer: torch.optim.Optimizer) -> Pruner:
        """Follow an optimizer: before and after each of its steps this does what is to be done. Returns itself.

        Steps that a `GradScaler` skips do not count. A closure that is passed to `step` is called as ever, and what
        looks at gradients runs after it.

        Raises:
            InputError: one is followed already, it holds none of the model's parameters, or it is one (LBFGS) that
                calls its closure several times a step.
        """
        self._live()
        if self._hooks:
            raise InputError("an optimizer is attached already; `detach` it first")
        inner = getattr(optimizer, "optimizer", None)  # what accelerate's wrapper holds
        optimizer = inner if isinstance(inner, torch.optim.Optimizer) else optimizer
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        mine = {id(p) for p in self.model.parameters()}
        if not held & mine:
            raise InputError("the optimizer holds no parameter of the model that is pruned")
        self._hooks = follow(optimizer, self.on_before_optimizer_step, self._next)
        self._optimizers = [optimizer]
        self.on_step_begin()
        return self

    def detach(self) -> None:
        """Follow the optimizer no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizers = [], []

    def fit(self, train: Callable[..., Any]) -> Pruned:
        """Call a function that trains the model and calls the hooks (or attaches), then finish.

        Args:
            train: takes the model.
        """
        self.on_train_begin()
        train(self.model)
        self.on_train_end()
        return self.finish()

    def on_train_begin(self) -> None:
        """Begin. The first `on_step_begin` does the same."""
        self.on_step_begin()

    def on_epoch_begin(self, epoch: int = 0) -> None:
        """An epoch begins. Schedules count steps, so that this is for what looks at epochs by itself."""

    def on_step_begin(self, step: int | None = None) -> None:
        """Before the forward pass: what goes now goes, and gates are drawn.

        Args:
            step: is counted by the Pruner itself, in steps of the optimizer; what is passed is not looked at.
        """
        self._live()
        if self._begun == self.step:
            return
        changed = self._update()
        self._begun = self.step
        for one in self._prunings:
            one.method.before_forward(one)
        if any(changed) or self.step == 0:
            self._masking.set_masks()
            updated = [p for p, new in zip(self._prunings, changed, strict=True) if new]
            self._rewinding.back(updated, self._optimizers)
            self._write(any(p.done for p in updated))
        self._masking.set_gates()

    def distill(self, loss: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss blended with what the model loses against its teacher in the last forward pass.

        Args:
            loss: of the labels, of a forward pass in training mode.
            mask: (batch, positions): 0 where a row does not count; by default the model's input `attention_mask`.

        Raises:
            InputError: the Pruner was made without `distillation`; or see `Distiller.distill`.
        """
        self._live()
        return self.distiller.distill(loss, mask)

    @property
    def distiller(self) -> Distiller:
        """What blends losses: which layers are compared, and the parts of the last loss.

        Raises:
            InputError: the Pruner was made without `distillation`.
        """
        if self._distiller is None:
            raise InputError("this Pruner has no teacher: pass distillation={...} when you make it")
        return self._distiller

    def on_before_optimizer_step(self, loss: Tensor | float | None = None) -> None:
        """After the backward pass: gradients are looked at, and changed where the method says so.

        Gradients are unscaled and clipped by then. Under a `GradScaler` use `attach`, which knows skipped steps.

        Args:
            loss: of the step, for the log.

        Raises:
            NonFiniteError: loss or gradients are NaN or infinite; the state is saved where there is a checkpoint file.
        """
        self._live()
        if loss is not None:
            self._loss = float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
        if self._distiller is not None and not self._distiller.used:
            raise InputError(
                "distillation was asked for, and no loss was blended before the first step of the optimizer: call "
                "`loss = pruner.distill(loss)` behind each forward pass, before `loss.backward()`"
            )
        self._check_finite()
        with torch.no_grad():
            for one in self._prunings:
                one.step = self.step
                with torch.enable_grad():
                    one.method.before_step(one)
                one.fresh()
            self._masking.mask_gradients()

    def on_after_optimizer_step(self) -> None:
        """After the optimizer's step: the same as `on_step_end`, and only one of the two counts."""
        self.on_step_end()

    def on_step_end(self) -> None:
        """After the optimizer's step: the step is counted."""
        self._live()
        if self._begun != self.step:
            return
        for one in self._prunings:
            one.method.after_step(one)
        self.step += 1
        self._rewinding.keep(self.step)

    def on_epoch_end(self) -> None:
        """An epoch ends."""

    def on_before_eval(self) -> None:
        """Before an evaluation: nothing has to be done, in eval mode what counts is what would stay."""

    def on_after_eval(self) -> None:
        """After an evaluation."""

    def on_train_end(self) -> None:
        """The run ends: the last update is made if the schedule ends here."""
        self.on_step_begin()

    def _next(self) -> None:
        self.on_step_end()
        self.on_step_begin()

    # ------------------------------------------------------------------ what is said about it
    @property
    def prunings(self) -> list[Any]:
        """What runs: `fxprune.passes.training.pruning.Pruning`, with units, masks and what is left alone."""
        return self._prunings

    @property
    def rows(self) -> list[Row]:
        """What was written down at every update."""
        return self._log.rows

    def sparsity(self) -> float:
        """Return the share of the masked weights' entries that is zero now."""
        return self._masking.sparsity()

    def unfit(self) -> dict[str, str]:
        """Return layers and groups that are not pruned, and why."""
        return {name: why for one in self._prunings for name, why in one.found.unfit.items()}

    # ------------------------------------------------------------------ the end
    def finish(
        self,
        *,
        calibration: Any = None,
        metric: Callable[[nn.Module], float] | None = None,
        fill: float | None = None,
        **overrides: Any,
    ) -> Pruned:
        """Return the smaller model, proved, as `fxprune.compile` does; the model is plain again, with its zeros.

        Units of axes that are gone are removed. Inside weights zeros stay, and what they have emptied (rows, columns,
        heads, whole layers) is removed, too. Of a model that is sharded (`fully_shard`) a whole copy is made smaller,
        the same on each process, which all call this; the sharded model keeps its masks.

        Args:
            calibration: batches, for `quantization`.
            metric: model -> number, for the report.
            fill: zeros inside what stays become small random numbers instead, as far as patterns of blocks go: so many
                times the standard deviation of the weight. Then it can be trained on as a dense model. By default not,
                and 0.1 with the pattern "hybrid-filled".
            overrides: keys of `fxprune.recipe.Recipe`: `quantization="int8"`, `proof="quick"`, `keep_class=True`.

        Raises:
            TargetError: the schedule is not at its end.
            ProofError, WriteBackError: see `fxprune.compile`.
        """
        self._live()
        self.on_step_begin()
        refuse_open(self)
        if self._distiller is not None:
            self._distiller.close()
        if fill is None and any("hybrid-filled" in one.stage.patterns for one in self._prunings):
            fill = _FILL
        result = finished(self, calibration, metric, fill, overrides)
        self._end()
        return result

    def abort(self, *, zeros: bool = True) -> None:
        """End without a smaller model: the masks are taken off, and the model is an ordinary one again.

        Args:
            zeros: what is masked is zero then; else it is what it was when it was masked.

        Raises:
            InputError: this Pruner has finished, or the model is sharded: its masks stay.
        """
        self._live()
        self._subject.weights.remove(zeros=zeros)
        if self._distiller is not None:
            self._distiller.close()
        self._end()

    def mask_again(self) -> None:
        """Put the masks back onto weights that they were taken off."""
        for one in self._prunings:
            self._masking.put_on(one)
        self._masking.set_masks()
        self._masking.set_gates()

    def _end(self) -> None:
        self.detach()
        self._done = True
        self._log.close()

    # ------------------------------------------------------------------ checkpoints
    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on: beside the model's and the optimizer's own. It is a copy."""
        return copy.deepcopy(
            {
                "format": _FORMAT,
                "stages": self._told(),
                "step": self.step,
                "begun": self._begun,
                "prunings": [one.state() for one in self._prunings],
                "snapshot": self._rewinding.snapshot,
                "distiller": None if self._distiller is None else self._distiller.state_dict(),
                "rows": [asdict(row) for row in self.rows],
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Where it is refused nothing has changed.

        Raises:
            InputError: it is of another model, of other stages or of another run length.
        """
        self._live()
        self._check_state(state)
        state = copy.deepcopy(dict(state))
        for one, own in zip(self._prunings, state["prunings"], strict=True):
            one.load(own)
            one.step = state["step"]
        self.step, self._begun, self._rewinding.snapshot = state["step"], state["begun"], state["snapshot"]
        if self._distiller is not None:
            self._distiller.load_state_dict(state["distiller"])
        self._log.restore([Row(**row) for row in state["rows"]])
        self._masking.set_masks()
        self._masking.set_gates()

    def save(self, file: str | os.PathLike[str] | None = None, **more: Any) -> Path:
        """Write the Pruner's state, the model's and the attached optimizer's into one file, all or nothing.

        Of several processes the first one writes. Random numbers go on where they were, torch's own alone.

        Args:
            file: by default the Pruner's `checkpoint`.
            more: what else the run needs, plain values and tensors: the epoch, a scheduler's state.

        Raises:
            InputError: there is no file to write to, something in `more` is not plain, or the model is sharded.
        """
        path = Path(file) if file is not None else self._checkpoint
        if path is None:
            raise InputError("say where: `save(file)`, or pass `checkpoint` to the Pruner")
        if self._subject.weights.sharded():
            raise InputError(
                "the model is sharded: write it and its optimizer with torch.distributed.checkpoint, "
                "and `state_dict()` of the Pruner beside"
            )
        content = {
            "pruner": self.state_dict(),
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self._optimizers],
            "random": files.random_state(),
            "more": more,
        }
        files.write(content, path)
        return path

    def load(self, file: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """Go on from what `save` wrote; returns what was passed to it beside. Where it is refused nothing has changed.

        An optimizer that was attached when it was saved is attached before it is loaded.

        Raises:
            InputError: there is no such file or it is damaged, it is of another model or of other stages, or the
                optimizer is missing or another one.
        """
        self._live()
        path = Path(file) if file is not None else self._checkpoint
        if path is None or not path.exists():
            raise InputError(f"there is no checkpoint {path}")
        content = files.read(path)
        self._check_state(content["pruner"])
        files.check_model(self.model, content["model"], path)
        files.load_optimizers(self._optimizers, content["optimizers"], path)
        self.model.load_state_dict(content["model"])
        files.set_random_state(content["random"])
        self.load_state_dict(content["pruner"])
        more: dict[str, Any] = content["more"]
        return more

    def _told(self) -> list[Any]:
        """The stages and their schedules, in plain values."""
        return [[one.stage.model_dump(mode="json"), asdict(one.schedule)] for one in self._prunings]

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state.get("format") != _FORMAT:
            raise InputError("this is no state of a Pruner of this version")
        files.check_stages(self._told(), state["stages"])
        for one, own in zip(self._prunings, state["prunings"], strict=True):
            one.check(own)
        if (state["distiller"] is None) != (self._distiller is None):
            there, here = ("with", "without") if self._distiller is None else ("without", "with")
            raise InputError(f"the state is of a run {there} a teacher, and this Pruner was made {here} one")

    # ------------------------------------------------------------------ inside
    def _update(self) -> list[bool]:
        """Let all prunings choose what stays, or none of them.

        Raises:
            NonFiniteError: a score is NaN or infinite; the state before is saved where there is a checkpoint file.
        """
        if not any(one.schedule.updates(self.step) for one in self._prunings):
            return [one.update(self.step) for one in self._prunings]
        before = [one.state() for one in self._prunings]
        try:
            return [one.update(self.step) for one in self._prunings]
        except NonFiniteError as error:
            for one, state in zip(self._prunings, before, strict=True):
                one.load(state)
            raise NonFiniteError(f"{error}{self._left_behind()}") from None

    def _left_behind(self) -> str:
        """Save the state where there is a file for it and going on from it is of use; return a sentence about it."""
        if self._checkpoint is None or self._subject.weights.sharded():
            return ""
        name = infinite_weight(self.model)
        if name is not None:
            return f"; '{name}' is so already, and {self._checkpoint} is as it was: go on from there"
        return f"; the state before this step is in {self.save()}"

    def _live(self) -> None:
        if self._done:
            raise InputError("this Pruner has finished; make another one for another run")

    def _check_finite(self) -> None:
        """Stop where nothing that follows would mean anything.

        Raises:
            NonFiniteError: and the state is saved where there is a checkpoint file.
        """
        bad = infinite(self.model, self._loss, self._subject.weights.sharded())
        if bad is not None:
            raise NonFiniteError(
                f"step {self.step}: {bad} is NaN or infinite{self._left_behind()}. Under a GradScaler use `attach`, "
                "which knows the steps that it skips; else lower the learning rate or clip gradients"
            )

    def _write(self, ends: bool) -> None:
        """Write an update down.

        Args:
            ends: it is the last one.
        """
        aimed = [one for one in self._prunings if not one.method.targetless] or self._prunings
        gone = max(one.gone for one in aimed)
        if not ends and not self._log.due(self.step, gone):
            return
        row = Row(
            step=self.step,
            sparsity=self.sparsity(),
            gone=gone,
            target=max(one.target for one in aimed),
            macs=self._masking.macs(),
            loss=self._loss,
            predicted=self._masking.predicted(),
            measured=next((c.measured for one in aimed if (c := one.clocked) is not None), None),
        )
        self._log.add(row)
        self._subject.say(row.line())
