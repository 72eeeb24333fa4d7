"""`Distiller`: a student's loss blended with what it loses against a teacher."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import InputError, RecipeError
from fxprune.passes.training import distill as losses
from fxprune.passes.training.distill import Distillation, distillation
from fxprune.registry import nearest
from fxprune.training.taps import Taps, result_of


class Distiller:
    """Lets a student learn from a teacher, in an ordinary training loop.

    Hooks on the student keep inputs and outputs of its last forward pass in training mode. `distill(loss)` runs the
    teacher on the same inputs, without gradients, and returns the blended loss: see `fxprune.passes.training.distill`.
    Where the student's output has a `.loss` (transformers, called with labels), that is replaced by itself.

    The student may be a model that is being pruned (`fxprune.Pruner` makes a Distiller), or the module of a `Pruned`:
    outputs, and hidden states as wide as the residual stream, stay comparable.

    Args:
        student: that is trained; hooks stay on it until `close`.
        teacher: is put into eval mode, runs without gradients, and goes to the device that the student is on.
        options: see `fxprune.passes.training.distill.Distillation`.

    Raises:
        RecipeError: an option is unknown or out of range.
        InputError: there is no such module, or no repeated block, or student and teacher are one module.

    >>> _ = torch.manual_seed(0)
    >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> x, labels = torch.randn(8, 4), torch.randint(3, (8,))
    >>> with Distiller(student, teacher, alpha=0.5) as distiller:
    ...     loss = nn.functional.cross_entropy(student(x), labels)
    ...     blended = distiller.distill(loss)
    >>> blended.requires_grad, sorted(distiller.last)
    (True, ['loss', 'outputs'])
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, **options: Any) -> None:
        self.options: Distillation = distillation(options)
        if teacher is student:
            raise InputError("student and teacher are one module; pass a copy (copy.deepcopy) as the teacher")
        if not isinstance(teacher, nn.Module):
            raise InputError(f"the teacher is a torch.nn.Module, not {type(teacher).__name__}")
        self.student, self.teacher = student, teacher.eval()
        self.skipped: dict[str, str] = {}
        self.pairs = self._paired()
        self.last: dict[str, Tensor] = {}
        self.used = False
        self._maps: dict[tuple[str, int], nn.Parameter] = {}
        self._adam: torch.optim.Adam | None = None
        self._inside = False
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._output: Any = None
        self._automatic: Tensor | None = None
        self._seen: dict[str, list[Tensor]] = {}
        self._shown: dict[str, list[Tensor]] = {}
        self._checked = False
        # Functions, not bound methods: a copy of the student (an average of its weights) shall not copy the teacher.
        self._taps = [
            Taps(student, list(self.pairs), lambda path, tensor: self._see(path, tensor)),
            Taps(teacher, list(dict.fromkeys(self.pairs.values())), lambda path, tensor: self._show(path, tensor)),
        ]
        self._hooks = [
            student.register_forward_pre_hook(
                lambda module, args, kwargs: self._enter(module, args, kwargs), with_kwargs=True
            ),
            student.register_forward_hook(lambda module, args, output: self._leave(module, output)),
        ]

    # ------------------------------------------------------------------ what is called
    def distill(self, loss: Tensor, mask: Tensor | None = None, share: float | Tensor | None = None) -> Tensor:
        """Return the blended loss of the student's last forward pass in training mode.

        Args:
            loss: of the labels, a scalar.
            mask: (batch, positions): 0 where a row does not count; by default the model's input `attention_mask`.
            share: of this pass in its optimizer step, where the losses of several passes are added up and not
                averaged; by default what transformers' Trainer tells the model of it, or 1.

        Raises:
            InputError: there was no such pass since the last call, its `.loss` is blended already, or shapes differ.
        """
        if self._automatic is not None:
            if loss is self._automatic:
                self._forget()
                return loss
            raise InputError(
                "distillation: the output's `.loss` is blended already: use it as it is, without `distill`; to blend "
                "another loss set automatic to False"
            )
        if self._inputs is None:
            raise InputError(
                "distillation: the model made no forward pass in training mode since the last `distill`; call it once "
                "for each forward pass, behind it"
            )
        return self._blended(loss, mask, share)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been learnt beside the student: the maps between widths, and their optimizer's state.

        The maps move by the last backward pass first, as they would before the next forward pass.
        """
        self._step_maps()
        maps = [(path, call, weight.detach().clone()) for (path, call), weight in self._maps.items()]
        return {"maps": maps, "adam": None if self._adam is None else copy.deepcopy(self._adam.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of `state_dict`.

        Raises:
            InputError: it has maps of layers that are not compared here.
        """
        for path, _, _ in state["maps"]:
            if path not in self.pairs:
                raise InputError(f"the state of a distillation maps '{path}', which is not compared here")
        place = next((p.device for p in self.student.parameters()), None)
        self._maps, self._adam = {}, None
        for path, call, weight in state["maps"]:
            self._add_map(path, call, weight.to(place))
        if self._adam is not None:
            self._adam.load_state_dict(state["adam"])

    def close(self) -> None:
        """Take all hooks off the student and the teacher."""
        for hook in self._hooks:
            hook.remove()
        for taps in self._taps:
            taps.remove()
        self._hooks, self._taps = [], []
        self._forget()

    def __enter__(self) -> Distiller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ pairs
    def _paired(self) -> dict[str, str]:
        """Path of a student's layer -> that of the teacher's."""
        hidden = self.options.hidden
        if hidden == "none":
            return {}
        if isinstance(hidden, dict):
            for own, other in hidden.items():
                result_of(self.student, own)
                result_of(self.teacher, other)
            pairs = dict(hidden)
        else:
            pairs = self._blocks()
        for path in self.options.weights:
            if path not in pairs:
                known = list(pairs)
                raise RecipeError(
                    f"distillation: weights: '{path}' is no layer that is compared{nearest(path, known) or '.'} "
                    f"Known: {', '.join(known)}"
                )
        return pairs

    def _blocks(self) -> dict[str, str]:
        pairs = {}
        for path in losses.repeated_blocks(self.teacher):
            try:
                result_of(self.student, path)
            except InputError as error:
                self.skipped[path] = str(error)
            else:
                pairs[path] = path
        if not pairs:
            why = "; ".join(self.skipped.values()) or "no class repeats in its lists of modules"
            raise InputError(
                f"distillation: hidden: the teacher has no blocks that the student has, too ({why}); name layers: "
                "hidden: {student path: teacher path}"
            )
        return pairs

    # ------------------------------------------------------------------ hooks
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside = module is self.student and module.training and torch.is_grad_enabled()
        if not self._inside:
            return
        self._forget()
        self._step_maps()
        self._inputs = args, dict(kwargs)

    def _leave(self, module: nn.Module, output: Any) -> Any:
        if not self._inside or module is not self.student:
            return None
        self._inside = False
        self._output = output
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if self.options.automatic and isinstance(own, Tensor) and own.dim() == 0 and own.requires_grad:
            blended = self._blended(own)
            self._automatic = blended
            return _with_loss(output, blended)
        return None

    def _see(self, path: str, tensor: Tensor) -> None:
        if self._inside:  # not when a checkpointed layer runs again in the backward pass
            self._seen.setdefault(path, []).append(tensor)

    def _show(self, path: str, tensor: Tensor) -> None:
        self._shown.setdefault(path, []).append(tensor)

    def _forget(self) -> None:
        self._inputs = self._output = self._automatic = None
        self._seen.clear()
        self._shown.clear()

    # ------------------------------------------------------------------ the loss
    def _blended(self, loss: Tensor, mask: Tensor | None = None, share: float | Tensor | None = None) -> Tensor:
        assert self._inputs is not None
        args, kwargs = self._inputs
        output = self._taught(args, kwargs)
        found = self._mask(args, kwargs) if mask is None else mask
        parts = self._parts(output, found, mask is not None)
        alpha = self.options.alpha
        share = self._share(kwargs) if share is None else share
        total = alpha * sum(parts.values(), torch.zeros((), device=loss.device)) * share
        self.last = {"loss": loss.detach(), **{n: p.detach() for n, p in parts.items()}}
        self.used = True
        self._forget()
        return (1 - alpha) * loss + total if alpha < 1 else total

    def _taught(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the teacher where the student is."""
        place = next((p.device for p in self.student.parameters()), None)
        own = next((p.device for p in self.teacher.parameters()), None)
        if place is not None and own is not None and place != own:
            self.teacher.to(place)
        self.teacher.eval()  # the student's owner may have called `train` on a module that holds both
        self._shown.clear()
        with torch.no_grad():
            return self.teacher(*args, **kwargs)

    def _parts(self, taught: Any, mask: Tensor | None, demanded: bool) -> dict[str, Tensor]:
        options = self.options
        parts: dict[str, Tensor] = {}
        used = False
        if options.outputs != "none":
            ours = losses.output_tensors(self._output, options.fields)
            theirs = losses.output_tensors(taught, options.fields)
            several = []
            for name, one in ours.items():
                if name not in theirs or theirs[name].shape != one.shape:
                    other = tuple(theirs[name].shape) if name in theirs else "missing"
                    raise InputError(
                        f"distillation: the output '{name}' is {tuple(one.shape)}, the teacher's {other}; say with "
                        "`fields` which outputs count, or take a teacher that has the same"
                    )
                rows = _rows(mask, one, options.classes if options.outputs == "logits" else -1)
                used |= rows is not None
                if options.outputs == "logits":
                    several.append(losses.of_logits(one, theirs[name], options.temperature, rows, options.classes))
                else:
                    several.append(losses.of_values(one, theirs[name], options.outputs, rows))
            parts["outputs"] = torch.stack(several).mean()
        hidden = []
        for own, path in self._comparable():
            for i, (one, there) in enumerate(zip(self._seen[own], self._shown[path], strict=True)):
                one = self._mapped(own, i, one, there)
                rows = _rows(mask, one, -1)
                used |= rows is not None
                hidden.append(
                    self.options.weights.get(own, 1.0) * losses.of_values(one, there, options.hidden_loss, rows)
                )
        if hidden:
            parts["hidden"] = options.hidden_weight * torch.stack(hidden).mean()
        if demanded and mask is not None and not used:
            raise InputError(
                f"distillation: the mask {tuple(mask.shape)} fits the rows of no output and of no hidden state"
            )
        return parts

    def _comparable(self) -> list[tuple[str, str]]:
        """The pairs that are compared; those of "blocks" that cannot be are left out, once and with the reason."""
        if self._checked:
            return list(self.pairs.items())
        for own, other in list(self.pairs.items()):
            ours, theirs = self._seen.get(own, []), self._shown.get(other, [])
            why = None
            if not ours or len(ours) != len(theirs):
                why = f"'{own}' ran {len(ours)} times and the teacher's '{other}' {len(theirs)} times"
            elif any(a.shape != b.shape and not self._mappable(a, b) for a, b in zip(ours, theirs, strict=True)):
                shapes = f"'{own}' returns {tuple(ours[0].shape)}, the teacher's '{other}' {tuple(theirs[0].shape)}"
                why = f"{shapes}; maps: True learns a linear map where one width differs"
            if why is None:
                continue
            if isinstance(self.options.hidden, dict):
                raise InputError(f"distillation: hidden: {why}")
            self.skipped[own] = why
            del self.pairs[own]
        if self.options.hidden != "none" and not self.pairs:
            raise InputError(f"distillation: hidden: no block can be compared: {next(iter(self.skipped.values()))}")
        self._checked = True
        return list(self.pairs.items())

    def _mask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The input that says what is padding."""
        name = self.options.mask
        if name is None:
            return None
        found = kwargs.get(name)
        if found is None and args:
            names = list(inspect.signature(self.student.forward).parameters)
            found = dict(zip(names, args, strict=False)).get(name)
        if found is None and "mask" in self.options.model_fields_set:
            raise InputError(f"distillation: mask: the model was called without an input '{name}'")
        return found if isinstance(found, Tensor) else None

    def _share(self, kwargs: dict[str, Any]) -> float | Tensor:
        """The share of this pass in its optimizer step, where transformers' Trainer has told the model of the others.

        Losses are then sums over `num_items_in_batch`, the labels of all passes that are accumulated.
        """
        items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
        if items is None or not isinstance(labels, Tensor):
            return 1.0
        share: Tensor = (labels != -100).sum() / items
        return share

    # ------------------------------------------------------------------ maps
    def _mappable(self, one: Tensor, there: Tensor) -> bool:
        return self.options.maps and _differing(one, there) is not None

    def _mapped(self, path: str, call: int, one: Tensor, there: Tensor) -> Tensor:
        """A hidden state in the teacher's width, by a linear map that starts as the identity."""
        if one.shape == there.shape:
            return one
        dim = _differing(one, there) if self.options.maps else None
        if dim is None:
            raise InputError(
                f"distillation: hidden: '{path}' returns {tuple(one.shape)}, the teacher's {tuple(there.shape)}; "
                "maps: True learns a linear map where one width differs"
            )
        if (path, call) not in self._maps:
            self._add_map(path, call, torch.eye(there.shape[dim], one.shape[dim], device=one.device))
        return nn.functional.linear(one.movedim(dim, -1).float(), self._maps[path, call]).movedim(-1, dim)

    def _add_map(self, path: str, call: int, weight: Tensor) -> None:
        """Let a map from (teacher's width, student's width) learn."""
        new = self._maps[path, call] = nn.Parameter(weight.clone())
        if self._adam is None:
            self._adam = torch.optim.Adam([new], lr=self.options.maps_lr)
        else:
            self._adam.add_param_group({"params": [new]})

    def _step_maps(self) -> None:
        """What the last backward pass says of the maps: they move before the next forward pass."""
        if self._adam is None:
            return
        grads = [weight.grad for weight in self._maps.values() if weight.grad is not None]
        if grads and all(bool(torch.isfinite(g).all()) for g in grads):  # a loss scale may be too high
            self._adam.step()
        self._adam.zero_grad()


def _rows(mask: Tensor | None, tensor: Tensor, dim: int) -> Tensor | None:
    """The mask where it is one of a tensor's rows: of the shape without one dimension."""
    if mask is None or not tensor.dim():
        return None
    shape = list(tensor.shape)
    del shape[dim]
    return mask.to(tensor.device) if list(mask.shape) == shape else None


def _differing(one: Tensor, other: Tensor) -> int | None:
    """The only dimension in which two shapes differ, if there is one."""
    if one.dim() != other.dim():
        return None
    found = [d for d in range(one.dim()) if one.shape[d] != other.shape[d]]
    return found[0] if len(found) == 1 else None


def _with_loss(output: Any, loss: Tensor) -> Any:
    """The output of a model with another loss in it."""
    if isinstance(output, MutableMapping):
        output["loss"] = loss
    elif isinstance(output, tuple) and hasattr(output, "_replace"):
        return output._replace(loss=loss)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, loss=loss)
    else:
        output.loss = loss
    return output
