"""Distillation: what a student loses against a teacher, in outputs and in hidden states. No model runs here.

The loss of a training step becomes

    (1 - alpha) L + alpha (D_out + hidden_weight mean_b w_b D_b)                                                     (1)

D_out of logits is T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over rows: Hinton, Vinyals and Dean,
"Distilling the Knowledge in a Neural Network" (2015). D_b is the mean squared difference between the outputs of a layer
b of both: Romero et al., "FitNets" (2014); of all layers, with maps where widths differ: Xia et al., "Structured
Pruning Learns Compact and Accurate Models" (2022), CoFi.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pydantic
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from fxprune.errors import InputError, RecipeError
from fxprune.registry import nearest

#: What other tools call a key -> what it is called here.
ELSEWHERE = {
    "hard_weight": "alpha (of the teacher; the label's is 1 - alpha)",
    "kd_alpha": "alpha",
    "distil_temperature": "temperature",
    "temp": "temperature",
    "T": "temperature",
    "loss_types": "outputs",
    "loss_weights": "alpha",
    "layer_mappings": "hidden: {student path: teacher path}",
    "hidden_states": "hidden",
}


class Distillation(BaseModel):
    """How a student learns from a teacher. Unknown keys are refused.

    Attributes:
        alpha: weight of the teacher in equation 1; at 1 the loss of the labels does not count.
        temperature: that logits are divided by.
        outputs: "logits"; or of embeddings and regressions "mse" or "cosine"; or "none".
        classes: the dimension of logits that is classes; -1 the last.
        fields: names (of a mapping or an output object) or numbers (of a tuple) of the outputs that count. By default
            those named `logits`, `..._logits`, `prediction_...`; without such names the first of real numbers.
        hidden: "none"; {path of a student's module: path of a teacher's}; or "blocks": the modules that repeat in
            lists of modules, of one class, at the same path in both.
        hidden_weight: of hidden states against outputs.
        hidden_loss: "mse" or "cosine".
        weights: path of a student's module -> its own factor w_b; 1 where nothing is said.
        mask: the input of the model, by its name, that is 1 where a row counts and 0 at padding. The name that is there
            by default may be missing; one that is given must be there.
        maps: where the widths of two hidden states differ, a linear map between them is learned beside, with an Adam of
            its own; else different widths are refused.
        maps_lr: its learning rate.
        automatic: of a model whose output has a `.loss`, that becomes equation 1 by itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: float = Field(default=0.9, gt=0, le=1)
    temperature: float = Field(default=2.0, gt=0)
    outputs: Literal["logits", "mse", "cosine", "none"] = "logits"
    classes: int = -1
    fields: tuple[str | int, ...] = ()
    hidden: Literal["none", "blocks"] | dict[str, str] = "none"
    hidden_weight: float = Field(default=1.0, gt=0)
    hidden_loss: Literal["mse", "cosine"] = "mse"
    weights: dict[str, float] = {}
    mask: str | None = "attention_mask"
    maps: bool = False
    maps_lr: float = Field(default=1e-3, gt=0)
    automatic: bool = True

    @pydantic.model_validator(mode="after")
    def _something(self) -> Distillation:
        if self.outputs == "none" and self.hidden in ("none", {}):
            raise ValueError("outputs and hidden are both none: there is nothing to learn from the teacher")
        if self.weights and self.hidden == "none":
            raise ValueError("weights are those of hidden states; say which with `hidden`")
        if any(w < 0 for w in self.weights.values()):
            raise ValueError("weights are not below 0")
        return self


def distillation(given: Any) -> Distillation:
    """Return what a user says.

    Raises:
        RecipeError: a key is unknown, or a value out of range; the text says which.

    >>> distillation({"alpha": 0.5}).temperature
    2.0
    >>> distillation({"temprature": 4})
    Traceback (most recent call last):
        ...
    fxprune.errors.RecipeError: distillation: there is no key 'temprature'; did you mean 'temperature'?
    """
    if isinstance(given, Distillation):
        return given
    if not isinstance(given, Mapping):
        raise RecipeError(f"distillation: a mapping of keys to values, not {type(given).__name__}")
    try:
        return Distillation.model_validate(dict(given))
    except pydantic.ValidationError as error:
        raise RecipeError("distillation: " + "; ".join(dict.fromkeys(_sentence(e) for e in error.errors()))) from None


def _sentence(error: Any) -> str:
    key = ".".join(str(p) for p in error["loc"][:1])
    if error["type"] == "extra_forbidden":
        known = list(Distillation.model_fields)
        if key in ELSEWHERE:
            return f"there is no key '{key}'; here it is called {ELSEWHERE[key]}"
        return f"there is no key '{key}'" + (nearest(key, known) or f". Known: {', '.join(known)}")
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (given: {error['input']!r})" if key else message


# ---------------------------------------------------------------------- losses
def of_logits(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None, dim: int = -1
) -> Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over rows that count.

    Args:
        student, teacher: logits of the same shape, of any floating type; the loss is computed in float32 at least.
        mask: of the shape without the classes, not 0 where a row counts; None: everywhere.
        dim: that is classes.

    >>> one, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> round(float(of_logits(one, other, 2.0)), 4), float(of_logits(other, other, 2.0))
    (0.4438, 0.0)
    """
    ours = functional.log_softmax(_wide(student) / temperature, dim)
    theirs = functional.log_softmax(_wide(teacher) / temperature, dim)
    rows = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim)
    return _mean(rows, mask) * temperature**2


def of_values(student: Tensor, teacher: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared difference ("mse"), or 1 - cosine over the last dimension ("cosine"), where a row counts.

    Args:
        student, teacher: of the same shape.
        mask: of the shape without the last dimension.

    >>> float(of_values(torch.ones(2, 3), torch.zeros(2, 3), "mse", torch.tensor([1, 0])))
    1.0
    """
    ours, theirs = _wide(student), _wide(teacher)
    if kind == "cosine":
        return _mean(1 - functional.cosine_similarity(ours, theirs, dim=-1), mask)
    squares = (ours - theirs).square()
    return _mean(squares.mean(-1) if squares.dim() else squares, mask)


def _wide(tensor: Tensor) -> Tensor:
    """In half precision sums over many classes or entries overflow or lose what counts."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return rows.mean()
    weight = (mask != 0).to(rows.dtype)
    # A row that does not count may hold anything, infinity too, and zero times infinity is no zero.
    return rows.masked_fill(weight == 0, 0).sum() / weight.sum().clamp_min(1)


# ---------------------------------------------------------------------- outputs
def output_tensors(output: Any, fields: tuple[str | int, ...]) -> dict[str, Tensor]:
    """Return the outputs that count, by name or number.

    Raises:
        InputError: there is none of real numbers, or not the one that `fields` names.

    >>> list(output_tensors({"loss": torch.tensor(1.0), "logits": torch.ones(2, 3)}, ()))
    ['logits']
    """
    named = _named(output)
    real = {n: t for n, t in named.items() if isinstance(t, Tensor) and t.is_floating_point()}
    if fields:
        for name in fields:
            if str(name) not in real:
                raise InputError(
                    f"distillation: fields: the model returns no tensor of real numbers '{name}'. "
                    f"There are: {', '.join(real) or 'none'}"
                )
        return {str(name): real[str(name)] for name in fields}
    said = {n: t for n, t in real.items() if n.endswith("logits") or n.startswith("prediction_")}
    if said:
        return said
    first = next((n for n, t in real.items() if t.dim() and n != "loss"), None)
    if first is None:
        raise InputError("distillation: the model returns no tensor of real numbers to compare; set outputs to 'none'")
    return {first: real[first]}


def _named(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return {str(n): v for n, v in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return dict(zip(output._fields, output, strict=True))
    if isinstance(output, list | tuple):
        return {str(i): v for i, v in enumerate(output)}
    return {"0": output} if isinstance(output, Tensor) else dict(vars(output)) if hasattr(output, "__dict__") else {}


def first_tensor(output: Any) -> Tensor | None:
    """Return what a layer passes on: the first tensor of real numbers in what it returns."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return next((found for v in values if (found := first_tensor(v)) is not None), None)


# ---------------------------------------------------------------------- layers
def repeated_blocks(model: nn.Module) -> list[str]:
    """Return the paths of modules that repeat: of one class, with modules of their own, in lists of modules.

    Only the outermost ones: a list inside a block does not count.

    >>> block = lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> repeated_blocks(nn.Sequential(nn.Linear(3, 8), nn.ModuleList([block(), block()])))
    ['1.0', '1.1']
    """
    found = list(_in_lists(model, ""))
    counts = Counter(type(m) for _, m in found)
    return [path for path, m in found if counts[type(m)] > 1]


def _is_list(module: nn.Module) -> bool:
    # A subclass of Sequential is what somebody has given a name: a block.
    return isinstance(module, nn.ModuleList | nn.ModuleDict) or type(module) is nn.Sequential


def _in_lists(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        inner = f"{path}.{name}".lstrip(".")
        if _is_list(module) and not _is_list(child) and any(True for _ in child.children()):
            yield inner, child
        else:
            yield from _in_lists(child, inner)
