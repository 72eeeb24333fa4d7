"""A family of ever faster models from one run: prune to a speed-up, train on, prune the result to the next one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxprune.admit import admit
from fxprune.analyse import analyse
from fxprune.api import compile
from fxprune.capture import capture
from fxprune.copies import copied
from fxprune.errors import RecipeError, SavedModelError
from fxprune.making import measured
from fxprune.modes import evaluating
from fxprune.pruned import Pruned
from fxprune.report import Pair
from fxprune.saved import load_pruned
from fxprune.training.compose import composed

#: A rung is at least so many times as fast as the one before, which may have ended ahead of what it was asked for.
_LEAST = 1.01
#: (module, teacher, number of the rung) -> anything; trains the module in place.
Tune = Callable[[nn.Module, nn.Module, int], Any]


def ladder(
    model: nn.Module,
    example_inputs: Any,
    speedups: Sequence[float],
    tune: Tune,
    *,
    calibration: Any,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | bool | None = None,
    loss: Callable[..., Tensor] | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    directory: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    **recipe: Any,
) -> list[Pruned]:
    """Return one pruned and tuned model for each speed-up, each made from the one before.

    A rung is `fxprune.compile` to what is missing to the speed-up, measured, and `tune`, which trains the result in
    place. Nothing is masked meanwhile: the smaller model itself is trained, which takes a fraction of the dense model's
    time. Kurtic et al., "ZipLM" (2023), section 3.3, whose teacher is the dense model, too: a `Distiller` in `tune`
    does that. Plans and reports say what is left of the dense model, so that every rung has a `module_like` and can be
    loaded onto the original class; where its couplings cannot say it, a note in the report does.

    Args:
        model: a trained one; it is left as it was.
        speedups: over the dense model, ascending.
        tune: trains a module; gets the dense model as a teacher, in eval mode, and the number of the rung.
        example_inputs: as `fxprune.compile` takes them, and so what follows up to `loss`.
        calibration: batches that each rung is pruned with.
        kwargs: keyword inputs beside positional ones.
        dynamic_shapes: which sizes differ from batch to batch.
        loss: (output, labels) -> scalar, for criteria that use gradients.
        metric: model -> number, higher is better; reported of the dense model and of each rung after tuning.
        directory: each rung is saved there under its speed-up, and one that is there already is loaded instead of
            made: an interrupted run goes on with the rung that it was at.
        recipe: keys of `fxprune.recipe.Recipe` but for the target.

    Raises:
        RecipeError: the speed-ups do not ascend from above 1, or the recipe has a target.
        TargetError, BackendError: see `fxprune.compile`.

    A tune function with distillation::

        def tune(module, teacher, rung):
            optimizer = torch.optim.AdamW(module.parameters(), 5e-5)
            for x, y in loader:
                optimizer.zero_grad()
                logits = module(x)
                soft = F.kl_div(logits.log_softmax(-1), teacher(x).log_softmax(-1), log_target=True)
                (0.1 * F.cross_entropy(logits, y) + 0.9 * soft).backward()
                optimizer.step()

        half, third = fxprune.ladder(model, example, [2.0, 3.0], tune, calibration=batches)
    """
    if "target" in recipe:
        raise RecipeError("ladder: its targets are the speed-ups; leave `target` out")
    if not speedups or speedups[0] <= 1 or any(a >= b for a, b in pairwise(speedups)):
        raise RecipeError(
            f"ladder: speed-ups ascend from above 1, {', '.join(f'{s:g}' for s in speedups) or 'none'} do not"
        )
    teacher = copied(model).requires_grad_(False)
    first = None if metric is None else measured(metric, model)
    say = progress or (lambda text: None)
    family: list[Pruned] = []
    before: nn.Module = model
    reached = 1.0
    for rung, speedup in enumerate(speedups):
        folder = None if directory is None else Path(directory) / f"{speedup:g}x"
        pruned = _found(folder)
        if pruned is None:
            say(f"rung {rung + 1} of {len(speedups)}: {speedup:g} x")
            pruned = compile(
                before,
                example_inputs,
                kwargs=kwargs,
                dynamic_shapes=dynamic_shapes,
                calibration=calibration,
                loss=loss,
                progress=progress,
                target={"speedup": max(speedup / reached, _LEAST)},
                **recipe,
            )
            if family:
                _said_of(model, family, before, reached, pruned)
            with evaluating(teacher):
                tune(pruned.module, teacher, rung)
            pruned.measure(against=model, threads=recipe.get("threads"))
            if metric is not None and first is not None:
                pruned.report.metric = Pair(first, measured(metric, pruned.module))
            if folder is not None:
                pruned.save(folder, overwrite=True)
        if _whole(pruned) == _whole(family[0] if family else pruned):
            pruned.dense = model
        family.append(pruned)
        before, reached = pruned.module, pruned.report.latency[-1].speedup
    return family


def _said_of(model: nn.Module, family: list[Pruned], before: nn.Module, reached: float, pruned: Pruned) -> None:
    """Say in a rung's plan and report what is left of the dense model."""
    small = analyse(capture(admit(before).model, pruned.args, pruned.kwargs, pruned.plan.dynamic or False))
    last = family[-1].plan
    report = pruned.report
    report.model = type(model).__name__
    report.notes.append(f"pruned from the rung before, {reached:.2f} x as fast as the dense model")
    basis = last.basis or pruned.plan.basis
    if _whole(family[-1]) == _whole(family[0]) and composed(model, last, small, pruned):
        pruned.plan.basis = basis
    else:
        report.notes.append("the plan is one of the rung before: what it removes cannot be said of the dense model")


def _whole(pruned: Pruned) -> int:
    """The parameters of the model that a plan is of."""
    return pruned.plan.costs["params"][0]


def _found(folder: Path | None) -> Pruned | None:
    """The rung that an earlier run saved; None where there is none, or only a part of one."""
    try:
        return None if folder is None else load_pruned(folder)
    except SavedModelError:
        return None
