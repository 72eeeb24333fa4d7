"""The original class with smaller parameters, accepted only where its outputs are those of the rewritten graph."""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxprune.analyse import Analysis
from fxprune.capture import record
from fxprune.errors import FxpruneError, WriteBackError
from fxprune.kept import Kept
from fxprune.layers import constructor_arguments
from fxprune.model_state import ModelState, eval_with
from fxprune.proof_inputs import random_inputs
from fxprune.prove import difference
from fxprune.writeback.scale import restore_scales
from fxprune.writeback.solve import Solution, equations, solve
from fxprune.writeback.traced import Calls, Key, assign, trace_attributes

#: Allowed difference of outputs, relative to the largest, by precision.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(slots=True)
class Written:
    """What write-back changed.

    Attributes:
        module: of the original class.
        numbers: attribute (`solve.name_of` writes it out) -> (dense, now).
        scales: tensors that took over a dense scale of attention -> what they were multiplied with.
        error: largest difference of an output from the rewritten graph's, relative to the largest output.
    """

    module: nn.Module
    numbers: dict[Key, tuple[int, int]]
    scales: dict[str, Tensor] = field(default_factory=dict)
    error: float = 0.0


def module_like(model: nn.Module, analysis: Analysis, kept: Kept, module: fx.GraphModule, seed: int = 0) -> Written:
    """Return a copy of the model with the emitted module's tensors in its own class.

    Args:
        model: the dense model that was captured, or an equal one.
        module: what `rewrite` emitted, as it was or trained since.

    Raises:
        WriteBackError: the class writes down a number that would have to change, or computes something else with the
            smaller tensors; the text names the line.
    """
    if kept.removed:
        raise WriteBackError("whole blocks are removed, and the class's code still calls them; take the graph module")
    solution, dense = _solved(model, analysis, kept)
    small = _smaller(model, analysis, module)
    numbers = _assign(small, solution, dense)
    _set_metadata(small, module)
    graph = _recorded(small, analysis, solution)
    scales = restore_scales(small, graph, analysis, kept)
    error = _compare(small, analysis, module, solution, seed)
    return Written(small, numbers, scales, error)


# ---------------------------------------------------------------------- attributes
def _solved(model: nn.Module, analysis: Analysis, kept: Kept) -> tuple[Solution, dict[Key, int]]:
    """Run the dense model once more with its attributes traced, and solve for their values."""
    seen: dict[str, Any] = {}

    @contextlib.contextmanager
    def inside(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        seen["numbers"] = trace_attributes(modules)
        seen["calls"] = Calls(graph)
        with seen["calls"]:
            yield

    record(model, analysis.captured, inside)
    return solve(equations(analysis, kept, seen["calls"].calls), seen["numbers"]), seen["numbers"]


def _assign(small: nn.Module, solution: Solution, dense: Mapping[Key, int]) -> dict[Key, tuple[int, int]]:
    """Set what changes, on each module by itself."""
    modules = dict(small.named_modules(remove_duplicate=False))
    changed = {}
    for key, number in solution.numbers.items():
        if number != dense[key]:
            path, name, *rest = key
            attributes = modules[path].__dict__
            attributes[name] = assign(attributes[name], tuple(rest), number)
            changed[key] = (dense[key], number)
    return changed


def _set_metadata(small: nn.Module, module: fx.GraphModule) -> None:
    """Attributes of torch.nn layers that only describe their weights (`in_features`, `num_features`) follow them."""
    modules = dict(small.named_modules(remove_duplicate=False))
    for node in module.graph.nodes:
        own = modules.get(str(node.target)) if node.op == "call_module" else None
        if own is None:
            continue
        emitted = module.get_submodule(str(node.target))
        for name, value in constructor_arguments(emitted).items():
            before = getattr(own, name, None)
            if type(before) is int and type(value) is int and name in vars(own):
                setattr(own, name, value)


# ---------------------------------------------------------------------- tensors
def _smaller(model: nn.Module, analysis: Analysis, module: fx.GraphModule) -> nn.Module:
    """A copy of the model that never copies a dense tensor which the graph uses: the small one takes its place."""
    captured = analysis.captured
    found = tensors_of(module)
    for alias, name in captured.aliases.items():
        if alias in found:
            found.setdefault(name, found[alias])
    memo: dict[int, Any] = {id(t): _like(t, found[name]) for name, t in captured.tensors.items() if name in found}
    try:
        result: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        raise WriteBackError(f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}") from error
    modules = dict(result.named_modules(remove_duplicate=False))
    for name, tensor in found.items():
        path, _, leaf = name.rpartition(".")
        own = modules.get(path)
        if leaf == "bias" and own is not None and getattr(own, "bias", tensor) is None:  # of a layer that had none
            own.register_parameter(leaf, nn.Parameter(tensor.detach().clone()))
    return result


def copy_weights(small: nn.Module, module: fx.GraphModule, scales: Mapping[str, Tensor]) -> None:
    """Copy the weights of the written class into the graph module, dividing by what they were multiplied with."""
    own = tensors_of(small)
    with torch.no_grad():
        for name, tensor in tensors_of(module).items():
            if name in own:
                tensor.copy_(own[name] / scales[name] if name in scales else own[name])


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by every name it has."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _like(dense: Tensor, small: Tensor) -> Tensor:
    """The small tensor with memory of its own, of the dense one's kind."""
    value = small.detach().clone()
    return nn.Parameter(value, requires_grad=dense.requires_grad) if isinstance(dense, nn.Parameter) else value


# ---------------------------------------------------------------------- acceptance
def _recorded(small: nn.Module, analysis: Analysis, solution: Solution) -> fx.Graph:
    """The graph of the smaller model; raises where its code does not run."""
    try:
        return record(small, analysis.captured)
    except FxpruneError as error:
        raise _does_not_run(small, analysis, error.__cause__ or error, solution) from None


def _does_not_run(small: nn.Module, analysis: Analysis, cause: BaseException, solution: Solution) -> WriteBackError:
    package = __file__.rpartition("writeback")[0]
    torch_dir = torch.__file__.rpartition("__init__")[0]
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if not f.filename.startswith((torch_dir, package))]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}: {frames[-1].line}" if frames else ""
    text = [*str(cause).strip().splitlines(), type(cause).__name__][0]
    sources = tuple(f"{f.filename}:{f.lineno} " for f in frames[-1:])
    return WriteBackError(
        f"{type(small).__name__} does not run with the smaller tensors{where}: {text}" + _because(solution),
        nodes=[
            n.name for n in analysis.captured.graph.nodes if str(n.meta.get("source", "")).startswith(sources or "?")
        ],
    )


def _because(solution: Solution) -> str:
    return "".join(f"\n  {text}" for text in solution.conflicts[:3])


def _compare(small: nn.Module, analysis: Analysis, module: fx.GraphModule, solution: Solution, seed: int) -> float:
    """The largest difference from the rewritten graph on fresh inputs of two batch sizes, and on the example's."""
    captured = analysis.captured
    meta = any(t.is_meta for t in [*captured.tensors.values(), *captured.inputs] if isinstance(t, Tensor))
    if meta:
        raise WriteBackError(
            f"{type(small).__name__} has no values (it is on the meta device), so nothing can be compared"
        )
    worst, compared = 0.0, 0
    batches = [random_inputs(captured, seed + 7, batch=2), random_inputs(captured, seed + 8, batch=3)]
    for inputs in [*batches, captured.inputs]:
        args, kwargs = pytree.tree_unflatten(inputs, captured.in_spec)
        with torch.no_grad(), eval_with(ModelState(small), {}), eval_with(ModelState(module), {}):
            try:
                expected = pytree.tree_leaves(module(*args, **kwargs))
            except (RuntimeError, IndexError):  # not every graph takes every batch: indices may count on the example's
                if inputs is captured.inputs and not compared:
                    raise
                continue
            compared += 1
            try:
                actual = pytree.tree_leaves(small(*args, **kwargs))
            except Exception as failure:
                raise _does_not_run(small, analysis, failure, solution) from None
        pairs = [(e, a) for e, a in zip(expected, actual, strict=True) if isinstance(e, Tensor)]
        found = difference([e for e, _ in pairs], [a for _, a in pairs])
        tolerance = max(_TOLERANCE.get(e.dtype, 5e-2) if e.is_floating_point() else 0.0 for e, _ in pairs)
        if not found <= tolerance:
            raise WriteBackError(
                f"{type(small).__name__} computes something else with the smaller tensors: its outputs differ by "
                f"{found:.1e} of the largest from the rewritten graph's" + _because(solution)
            )
        worst = max(worst, found)
    return worst
