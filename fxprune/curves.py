"""`sensitivity`: what the whole model loses when one group alone is pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.admit import admit
from fxprune.analyse import analyse
from fxprune.capture import capture, example
from fxprune.costs import Costs
from fxprune.errors import InputError, RecipeError
from fxprune.groups import find_groups
from fxprune.recipe import read_recipe


def sensitivity(
    model: nn.Module,
    example_inputs: Any,
    *,
    calibration: Any,
    points: int = 4,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | bool | None = None,
    loss: Callable[..., Tensor] | None = None,
    **overrides: Any,
) -> dict[str, list[tuple[int, float]]]:
    """Return the sensitivity curve of each group: {group name: [(units kept, error of the whole model), ...]}.

    Each group is pruned alone, its worst units first, to a few widths from all its units down to its floor. The layers
    that read it are refitted on calibration data, and the model is run: the error is the squared difference of its
    outputs from the dense model's, relative to their variance (0: the same; 1: no better than a constant). Fewer units
    never count as less error. Draw the curves with `fxprune.plot_sensitivity`.

    Args:
        model: left exactly as it was.
        example_inputs: as for `fxprune.compile`.
        calibration: batches of what the model takes, or a number of random samples: see `fxprune.compile`.
        points: widths tried for each group beside its full one.
        kwargs: keyword inputs beside positional ones.
        dynamic_shapes: as for `fxprune.compile`.
        loss: (output, labels) -> scalar, for criteria that use gradients.
        overrides: keys of the recipe that say which groups are looked at and which units go first: `criterion`,
            `groups`, `keep`, `ratios`, `floor`, `round_to`, `backend`, `max_memory`, `seed`.

    Raises:
        RecipeError: a key is unknown, or is about what `sensitivity` does not do.
        InputError, CaptureError, NonFiniteError: see `fxprune.errors`.

    >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> curves = sensitivity(net, torch.randn(2, 8), calibration=[torch.randn(64, 8)], points=2, round_to=8)
    >>> {name: [units for units, _ in curve] for name, curve in curves.items()}
    {'0.weight.0': [64, 40, 8], '2.weight.0': [32, 24, 8]}
    >>> curves["0.weight.0"][0]
    (64, 0.0)
    """
    from fxprune.passes.allocate.sensitivity import curves
    from fxprune.passes.calibration import calibration as batches
    from fxprune.passes.choose import chooser, preferred

    others = sorted({"target", "allocation", "reconstruction", "keep_class", "proof", "threads"} & set(overrides))
    if others:
        raise RecipeError(f"sensitivity looks at each group alone and has no use for {', '.join(others)}")
    if points < 1:
        raise InputError(f"points is {points}; a curve needs one beside the whole group at least")
    settings = read_recipe({"target": {"macs": 1.0}}, **overrides)
    admitted = admit(model)
    args, keywords = example(example_inputs, kwargs)
    with torch.inference_mode(False):
        captured = capture(admitted.model, args, keywords, dynamic_shapes)
        analysis = analyse(captured)
        data = batches(calibration, captured, loss, settings.seed)
        groups, multiple = find_groups(analysis), preferred(settings)
        scored = chooser(analysis, groups, settings, Costs(analysis), multiple, None, data, admitted.model)
        return curves(scored.eligible, scored.budget("macs", 1.0), points)
