"""What is done to a model before it is captured: wrappers off, what cannot be pruned refused, masks and norms folded.

The user's model is never written to. Where something has to change, it changes in a copy that shares all other tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.optim.swa_utils import AveragedModel

from fxprune.copies import copied
from fxprune.errors import InputError


@dataclass(frozen=True, slots=True)
class Admitted:
    """The model to capture: the one that was passed, what it wraps, or a copy; and what the user should know."""

    model: nn.Module
    notes: list[str]


def admit(model: Any) -> Admitted:
    """Return the model that is to be captured.

    Raises:
        InputError: the model is of a kind that cannot be pruned; the text says what to pass instead.

    >>> net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)))
    >>> admitted = admit(nn.DataParallel(net))
    >>> type(admitted.model[0]).__name__, type(net[0]).__name__
    ('Linear', 'ParametrizedLinear')
    >>> len(admitted.notes)
    2
    """
    notes: list[str] = []
    model = _unwrapped(_module(model, notes), "", notes)
    modules = dict(model.named_modules())
    for path, module in modules.items():
        _refuse(path, module)
    if any(_needs_copy(m) for m in modules.values()):
        notes += [
            f"{_at(path)} was compiled in place: compile the result again"
            for path, module in modules.items()
            if module._compiled_call_impl is not None
        ]
        model = _copy(model)
        _without_wrappers(model, notes)
        for path, module in model.named_modules():
            _fold(path, module, notes)
    notes += _hook_notes(model)
    return Admitted(model, notes)


def _module(model: Any, notes: list[str]) -> nn.Module:
    if isinstance(model, torch.export.ExportedProgram):
        try:
            inner: nn.Module = model.module(check_guards=False)
        except Exception as error:
            raise InputError(
                f"the exported program cannot be turned back into a module ({type(error).__name__}: {error}); pass the "
                "torch.nn.Module that it was exported from"
            ) from error
        notes.append("the exported program is taken as the module that it holds; its layers have become operators")
        return inner
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise InputError(
            f"a {type(model).__name__} of torch.jit is compiled code and cannot be recorded; pass the torch.nn.Module "
            "that it was scripted or traced from"
        )
    if not isinstance(model, nn.Module):
        hint = "; a class is not a model yet, make one" if isinstance(model, type) else ""
        if not hint and callable(model):
            hint = "; let the `forward` of a module call it"
        raise InputError(f"the model is a torch.nn.Module, not {type(model).__name__}{hint}")
    return model


# ---------------------------------------------------------------------- wrappers
def _inner(module: nn.Module) -> nn.Module | None:
    """What a wrapper that computes nothing by itself holds."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
        return module.module
    return module._orig_mod if isinstance(module, _known("torch._dynamo.eval_frame", "OptimizedModule")) else None


def _known(name: str, attribute: str) -> Any:
    """A class of a module of torch that is slow to import: without the import there is no object of that class."""
    return getattr(sys.modules.get(name), attribute, ())


def _unwrapped(module: nn.Module, path: str, notes: list[str]) -> nn.Module:
    while (inner := _inner(module)) is not None:
        notes.append(
            f"{_at(path)} is wrapped in {type(module).__name__}: what it wraps is pruned; wrap the result again"
        )
        module = inner
    return module


def _without_wrappers(model: nn.Module, notes: list[str]) -> None:
    for path, module in list(model.named_modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _unwrapped(child, f"{path}.{name}".lstrip("."), notes)
        module._compiled_call_impl = (
            None  # copies of today's torch have none; were one there, it would run the original
        )


# ---------------------------------------------------------------------- refusals
def _refuse(path: str, module: nn.Module) -> None:
    """Raise for a module that cannot be recorded, or whose numbers are not weights."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            f"{_at(path)} is a {kind.__name__} of torch.jit, compiled code that cannot be recorded; put the "
            "torch.nn.Module there that it was scripted or traced from"
        )
    sharded = (
        _known("torch.distributed.fsdp", "FullyShardedDataParallel"),
        _known("torch.distributed.fsdp", "FSDPModule"),
    )
    if any(isinstance(module, s) for s in sharded):
        raise InputError(
            f"{_at(path)} is sharded by FSDP, so that no process has whole weights; prune the model before it is "
            "sharded, or load a full state dict into an unsharded one"
        )
    if kind.__module__.startswith(("torch.ao.nn", "torch.nn")) and ".quantized" in kind.__module__:
        raise InputError(
            f"{_at(path)} is a quantised {kind.__name__}; prune the floating-point model, then quantise the result"
        )
    prepared = (_known("torch.ao.quantization", "FakeQuantizeBase"), _known("torch.ao.quantization", "ObserverBase"))
    if any(isinstance(module, p) for p in prepared):
        raise InputError(
            f"{_at(path)} is a {kind.__name__}, which prepares for quantisation with the dense model's ranges; prune "
            "the floating-point model, then prepare the result"
        )
    for name, tensor in _tensors(module):
        _refuse_tensor(f"{path}.{name}".lstrip("."), tensor)


def refuse_inputs(inputs: Mapping[str, Any]) -> list[str]:
    """Return what the user should know about inputs that are not plain tensors.

    Raises:
        InputError: operators mean something else on an input than on a plain tensor of its shape, or it hides tensors.
    """
    notes, written = [], []
    for name, tensor in inputs.items():
        kind = type(tensor)
        if not isinstance(tensor, Tensor):
            if kind not in _PLAIN and any(isinstance(v, Tensor) for v in _within(tensor)):
                raise InputError(
                    f"the example input '{name}' is a {kind.__name__} that holds tensors, which would become "
                    f"constants; let torch.utils._pytree.register_dataclass({kind.__name__}) say what is in it, "
                    "or pass a dict"
                )
            written.append(f"{name}={tensor!r}" if kind in _PLAIN else f"{name}: a {kind.__name__}")
            continue
        if tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided or _dispatches(kind):
            what = f"is a {kind.__name__}" if _dispatches(kind) else f"has the layout {tensor.layout}"
            if tensor.is_nested or tensor.is_quantized:
                what = f"is {'nested' if tensor.is_nested else 'quantised'}"
            raise InputError(
                f"the example input '{name}' {what}, which has operators of its own; pass a plain dense tensor"
            )
        if "__torch_function__" in _overridden(kind):
            notes.append(f"the input '{name}' is a {kind.__name__}; it is recorded as a plain tensor")
    if written:
        notes.append(
            f"inputs that are no tensors are written into the graph, which ignores others: {', '.join(written)}"
        )
    return notes


_PLAIN = {int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device}


def _within(value: Any, depth: int = 4) -> Iterator[Any]:
    """What an object holds, a few levels deep."""
    held: list[Any] = list(value) if isinstance(value, list | tuple | set) else []
    held += value.values() if isinstance(value, Mapping) else []
    held += [getattr(value, f.name, None) for f in fields(value)] if is_dataclass(value) else []
    held += vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, type) else []
    for item in held:
        yield item
        if depth and not isinstance(item, Tensor) and type(item) not in _PLAIN:
            yield from _within(item, depth - 1)


def _dispatches(kind: type) -> bool:
    return "__torch_dispatch__" in _overridden(kind) and not issubclass(kind, FakeTensor)


def _refuse_tensor(name: str, tensor: Tensor) -> None:
    kind = type(tensor)
    if is_lazy(tensor):
        raise InputError(f"'{name}' has no shape yet (a lazy module); run the model once on an example, then prune it")
    if tensor.is_quantized:
        raise InputError(f"'{name}' is quantised; prune the floating-point model, then quantise the result")
    if tensor.layout is not torch.strided:
        raise InputError(f"'{name}' has the layout {tensor.layout}; make it dense with `.to_dense()`")
    if tensor.is_nested:
        raise InputError(f"'{name}' is a nested tensor; hold its parts in a ParameterList")
    if "__torch_dispatch__" in _overridden(kind) or "__torch_function__" in _overridden(kind):
        what = "sharded" if kind.__name__ == "DTensor" else "quantised or otherwise special"
        raise InputError(
            f"'{name}' is a {kind.__name__}, a {what} tensor with operators of its own; prune the model with plain "
            "tensors, then convert the result"
        )
    if isinstance(tensor, nn.Parameter) and tensor.dim() > 1 and tensor.dtype in (torch.int8, torch.uint8):
        raise InputError(
            f"the parameter '{name}' is {tensor.dtype}: codes of a quantised weight, not numbers to rank; prune the "
            "floating-point model, then quantise the result"
        )


def _overridden(kind: type) -> set[str]:
    """The names that a subclass of tensors defines beyond those of torch's own plain classes."""
    plain = {Tensor, nn.Parameter, nn.Buffer, torch._C.TensorBase, object}
    return {n for base in kind.__mro__ if base not in plain for n in vars(base)} if kind not in plain else set()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for tensors in (module._parameters, module._buffers):
        yield from ((n, t) for n, t in tensors.items() if t is not None)


# ---------------------------------------------------------------------- folding
def _needs_copy(module: nn.Module) -> bool:
    return (
        _inner(module) is not None
        or module._compiled_call_impl is not None
        or any(True for _ in _parametrised(module))
        or any(isinstance(h, BasePruningMethod | SpectralNorm) for h in module._forward_pre_hooks.values())
    )


def _parametrised(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The parametrised tensors that are folded: of weight norm the rules know what it means to cut it."""
    if parametrize.is_parametrized(module):
        found: Any = module.parametrizations
        known = all(len(ps) == 1 and isinstance(ps[0], _WeightNorm) for ps in found.values())
        if not known:  # the class of the module says which are there, so that all of them go or none
            yield from found.items()


def _copy(model: nn.Module) -> nn.Module:
    """Return a copy of the modules with the model's own tensors, except inside parametrisations, which may write."""
    memo: dict[int, Any] = {}
    inside = {id(m) for o in model.modules() if any(True for _ in _parametrised(o)) for m in _subtree(o)}
    for module in model.modules():
        for value in [] if id(module) in inside else [*vars(module).values(), *(t for _, t in _tensors(module))]:
            if isinstance(value, Tensor):
                memo[id(value)] = value
    try:
        return copied(model, memo)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} holds parametrisations, pruning masks or compiled modules to be folded into plain "
            f"weights, and cannot be copied for it ({type(error).__name__}: {error}); remove them first, for example "
            "with torch.nn.utils.parametrize.remove_parametrizations"
        ) from error


def _subtree(module: nn.Module) -> Iterator[nn.Module]:
    parametrisations: Any = module.parametrizations
    yield from parametrisations.modules()


def _fold(path: str, module: nn.Module, notes: list[str]) -> None:
    """Make plain tensors of what is computed from others before each forward pass, with the values of eval mode."""
    values: dict[str, tuple[Tensor, bool, bool]] = {}
    for name, parametrisations in _parametrised(module):
        parametrisations.eval()
        with torch.no_grad():
            value = parametrisations()
        originals = [t for n, t in _tensors(parametrisations) if n.startswith("original")]
        trained = any(isinstance(t, nn.Parameter) for t in originals)
        values[name] = value.detach().clone(), trained, any(t.requires_grad for t in originals)
        kinds = ", ".join(type(p).__name__.lstrip("_") for p in parametrisations)
        notes.append(_folded(path, name, f"the parametrisation {kinds}"))
    if values:
        plain = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        module.__class__ = plain
    hook: Any
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, BasePruningMethod):
            name = hook._tensor_name
            with torch.no_grad():
                value = hook.apply_mask(module)  # type: ignore[no-untyped-call]
            source, what = module._parameters.pop(f"{name}_orig"), "the pruning mask"
            del module._buffers[f"{name}_mask"]
        elif isinstance(hook, SpectralNorm):
            name = hook.name
            with torch.no_grad():
                value = hook.compute_weight(module, do_power_iteration=False)
            source, what = module._parameters.pop(f"{name}_orig"), "spectral norm"
            for buffer in (f"{name}_u", f"{name}_v"):
                module._buffers.pop(buffer, None)
        else:
            continue
        del module._forward_pre_hooks[key]
        module.__dict__.pop(name, None)
        values[name] = value.detach().clone(), True, source is not None and source.requires_grad
        notes.append(_folded(path, name, what))
    for name, (value, trained, gradient) in values.items():
        if trained:
            module.register_parameter(name, nn.Parameter(value, requires_grad=gradient))
        else:
            module.register_buffer(name, value)
        if isinstance(module, nn.RNNBase):
            setattr(module, name, getattr(module, name))  # it keeps a second list of its weights


def _folded(path: str, name: str, what: str) -> str:
    return (
        f"{what} of '{f'{path}.{name}'.lstrip('.')}' is folded into a plain tensor; put it on the result again to train"
    )


# ---------------------------------------------------------------------- hooks
#: Where a module keeps its hooks, and what they are called.
_HOOKS = {
    "_forward_pre_hooks": "forward pre-hooks",
    "_forward_hooks": "forward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
    "_backward_hooks": "backward hooks",
    "_state_dict_pre_hooks": "state_dict pre-hooks",
    "_state_dict_hooks": "state_dict hooks",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hooks",
    "_load_state_dict_post_hooks": "load_state_dict hooks",
}


def _hook_notes(model: nn.Module) -> list[str]:
    """What becomes of hooks: whether one only observes cannot be seen, so that none is put on the result.

    One that changes an output is in the graph, and would be applied twice.
    """
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        for attribute, label in _HOOKS.items():
            if any(not _of_torch(h) for h in getattr(module, attribute).values()):
                found.setdefault(label, []).append(_at(path))
        for name, parameter in module._parameters.items():
            if parameter is not None and (parameter._backward_hooks or parameter._post_accumulate_grad_hooks):
                found.setdefault("gradient hooks", []).append(f"'{f'{path}.{name}'.lstrip('.')}'")
    notes = []
    for label, places in found.items():
        where = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
        ran = (
            "they ran while it was recorded, what they compute is in the graph; they "
            if label.startswith("forward")
            else ""
        )
        notes.append(f"{label} of {where}: {ran}are not on the result; put there what is needed again")
    return notes


def _of_torch(hook: Any) -> bool:
    """Whether a hook is part of a layer of torch's own (attention and parametrised layers have some)."""
    hook = getattr(hook, "hook", hook)  # load_state_dict hooks are wrapped
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return str(module).startswith("torch.")


def _at(path: str) -> str:
    return f"'{path}'" if path else "the model"
