"""The proof: the pruned module computes what the masked dense model computes.

The reference is the captured dense graph, run with every removed index masked out of its consumers and of every
reduction (`fxprune.masked`); both run in float64 and must agree to 1e-9 of the reference's largest magnitude.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.func import functional_call

from fxprune.analyse import Analysis
from fxprune.axes import Concat, Dim, Fixed, Product, concat, product
from fxprune.capture import Captured, Varying
from fxprune.costs import Costs
from fxprune.errors import ProofError
from fxprune.few_rows import FewRows, on_rows, sampled_operand
from fxprune.groups import describe
from fxprune.kept import Kept
from fxprune.masked import EXACT, MASKED, PREPARED, zeroed
from fxprune.model_state import ModelState, eval_with
from fxprune.proof_inputs import Level, cases, first_row
from fxprune.rewrite import Rewritten

#: Allowed error relative to the largest magnitude of the reference, by precision.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}

#: Models of more multiply-accumulates have one run instead of two.
HEAVY = 1e11
_LOW = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Proof:
    """What was compared and how closely it agreed.

    Attributes:
        level: "full": float64, the model's own weights and randomised ones, example and random inputs;
            "quick": the model's own weights on a random input of batch 1 (a small image where the graph takes one), in
            float32. Linear layers and attention, which treat every row alike, run on a few rows at either level.
            Models of more than 100 billion multiply-accumulates have one full run, on the first row of the example with
            randomised vectors; their own vectors are compared as they are.
        error: largest difference, relative to the largest magnitude of the reference.
        tolerance: what would have been too much.
        runs: how many pairs of forward passes were compared.
        capture_error: largest relative difference between the captured graph and the model itself on the example
            inputs, in the model's own precision; None where it was not compared (quick, or a model without values).
        lossless: the reference was the dense model itself, nothing masked.
    """

    level: Level
    error: float
    tolerance: float
    runs: int
    capture_error: float | None = None
    lossless: bool = False


def prove(
    analysis: Analysis,
    kept: Kept,
    pruned: Rewritten,
    model: nn.Module | None = None,
    level: Level = "full",
    seed: int = 0,
    lossless: bool = False,
) -> Proof:
    """Compare the pruned module with the masked reference.

    Args:
        model: the original, to compare the captured graph with on the example inputs (full proof only).
        lossless: what is removed must change nothing: the reference is the dense graph without masks, and the weights
            are not randomised, because what is dead depends on them.

    Raises:
        ProofError: they differ; the text names the first node whose value does.
    """
    dtype = torch.float64 if level == "full" else torch.float32
    tolerance, worst, runs = TOLERANCE[dtype], 0.0, 0
    masks = Kept({}) if lossless else kept
    capture_error, first = None, analysis.captured.inputs
    heavy = level == "full" and not lossless and Costs(analysis).macs({}) > HEAVY
    if level == "full" and model is not None:
        capture_error, first = _capture_error(analysis, model, heavy)
    runs_to_do = cases(analysis.captured, first, level, seed)
    if heavy:
        _check_vectors(analysis, kept, pruned)
        runs_to_do = [(runs_to_do[0][0], True)]
    for candidates, randomise in runs_to_do:
        weights = dense_weights(analysis.captured, randomise and not lossless, seed)
        error = math.nan
        for inputs in candidates:
            try:
                with torch.no_grad():
                    error = _lockstep(analysis, kept, masks, pruned, weights, inputs, dtype)
            except (RuntimeError, IndexError) as failure:  # not every graph takes every batch, nor every number
                if inputs is candidates[-1] and math.isnan(error):
                    raise ProofError(
                        f"the dense model does not run on its example inputs in {dtype}, so that nothing can be "
                        f"compared: {failure}"
                    ) from failure
            if not math.isnan(error):
                break
        if math.isnan(error):
            raise ProofError(
                "an output of the dense model holds not one finite number on inputs like the example's, so that "
                "nothing can be compared: give the model weights and inputs that it computes with."
            )
        if not error <= tolerance:
            where = _first_difference(analysis, kept, pruned, weights, inputs, dtype, tolerance)
            raise ProofError(
                f"the pruned module differs from the masked dense model by {error:.2e} of its largest output "
                f"(allowed: {tolerance:.0e}).\n  {where}\n  Nothing is returned, because this is a defect of a rule in "
                "fxprune/rules: report the operator; to go on, name its module under `keep` in the recipe."
            )
        worst, runs = max(worst, error), runs + 1
    return Proof(level, worst, tolerance, runs, capture_error, lossless)


def _check_vectors(analysis: Analysis, kept: Kept, pruned: Rewritten) -> None:
    """The vectors of the pruned module, of which a randomised run shows nothing, are the kept part of the model's."""
    state = {**dict(pruned.module.named_parameters()), **dict(pruned.module.named_buffers())}
    for name, dense in pruned.names.items():
        own, whole = state.get(name), analysis.captured.tensors[dense]
        if own is None or own.is_meta or own.dim() > 1 or dense in pruned.biases or dense in pruned.factors:
            continue
        if not torch.equal(own, kept.select(whole.detach(), analysis.tensors[dense])):
            raise ProofError(f"'{name}' of the pruned module is not what is kept of '{dense}': a defect of fxprune.")


def _capture_error(analysis: Analysis, model: nn.Module, heavy: bool) -> tuple[float | None, list[Any]]:
    """The captured graph against the model's own forward, both in eval mode, in the model's own precision.

    Heavy models are compared with linear layers and attention on a few rows; if that shows a difference, on all. With
    it come the inputs that were used: the example's first row, if the model takes it, says as much as all of it.
    """
    captured = analysis.captured
    if any(t.is_meta for t in [*captured.tensors.values(), *captured.inputs] if isinstance(t, Tensor)):
        return None, captured.inputs
    with torch.no_grad(), eval_with(ModelState(model), {}):
        for inputs in [*first_row(captured, captured.inputs), captured.inputs]:
            args, kwargs = pytree.tree_unflatten(inputs, captured.in_spec)
            try:
                with FewRows(captured) if heavy else contextlib.nullcontext():
                    expected = pytree.tree_leaves(model(*args, **kwargs))
                break
            except Exception:  # not every model takes a batch of one
                if inputs is captured.inputs:
                    raise
        sampled = {n for n in captured.graph.nodes if heavy and sampled_operand(analysis, Kept({}), n) is not None}
        actual = _SampledReference(analysis, Kept({}), dense_weights(captured), None, nodes=sampled).run(inputs)
    error = difference([e if isinstance(a, Tensor) else None for e, a in zip(expected, actual, strict=True)], actual)
    if heavy and not error <= 1e-3:
        return _capture_error(analysis, model, False)
    half = any(isinstance(t, Tensor) and t.dtype in (torch.float16, torch.bfloat16) for t in expected)
    if not error <= (5e-2 if half else 1e-3):
        raise ProofError(
            f"the captured graph differs from {type(model).__name__} itself by {error:.2e} of its largest output on "
            "the example inputs: the forward pass depends on values, on random numbers or on state outside its "
            "weights. Make it deterministic in eval mode."
        )
    return error, inputs


def dense_weights(captured: Captured, randomise: bool = False, seed: int = 0) -> Callable[[str], Tensor]:
    """The dense value of a tensor by name; randomised: of vectors (biases, norms, statistics) that start as 0 or 1."""

    def value(name: str) -> Tensor:
        tensor = captured.tensors[name].detach()
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        if tensor.is_meta:
            if not tensor.is_floating_point():
                return torch.zeros(tensor.shape, dtype=tensor.dtype)
            scale = max(tensor.numel() // max(tensor.shape[0], 1), 1) ** -0.5 if tensor.dim() > 1 else 1.0
            return torch.rand(tensor.shape, generator=generator).add_(0.1).mul_(scale).to(tensor.dtype)
        if not randomise or not tensor.is_floating_point() or name in captured.constants:
            return tensor
        if name.endswith("running_var"):
            noise = torch.rand(tensor.shape, generator=generator) + 0.5
        elif (isinstance(captured.tensors[name], nn.Parameter) and tensor.dim() <= 1) or name.endswith("running_mean"):
            noise = torch.randn(tensor.shape, generator=generator) * 0.3 + (1.0 if name.endswith("weight") else 0.0)
        else:
            return tensor
        return noise.to(dtype=tensor.dtype, device=tensor.device)

    return value


def difference(expected: list[Any], actual: list[Any]) -> float:
    """Return the largest difference of two lists of results, relative to the largest magnitude of each expected one.

    Infinite where shapes or the places of infinities differ, NaN where nothing is finite; only tensors are compared.
    """
    worst = 0.0
    for a, b in zip(expected, actual, strict=True):
        if isinstance(a, Tensor):
            if a.shape != b.shape:
                return float("inf")
            if not a.numel():
                continue
            finite = torch.isfinite(a) if a.is_floating_point() else torch.ones_like(a, dtype=torch.bool)
            if not finite.any():
                return float("nan")  # nothing of it can be compared
            if a.is_floating_point() and not torch.equal(finite, torch.isfinite(b)):
                return float("inf")
            a, b = a[finite].double(), b[finite].double()
            if a.numel():
                worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    return worst


class _Double(fx.Interpreter):
    """Runs a graph with every floating-point value in one precision (None: as they come), upcast only while used."""

    def __init__(self, module: nn.Module, graph: fx.Graph, dtype: torch.dtype | None) -> None:
        super().__init__(module, garbage_collect_values=True, graph=graph)
        self.dtype = dtype
        self.extra_traceback = False

    def up(self, value: Any) -> Any:
        if self.dtype is not None and isinstance(value, Tensor) and value.dtype in _LOW:
            return value.to(self.dtype)
        return value

    def run(self, inputs: list[Any], **_: Any) -> list[Any]:  # type: ignore[override]
        """Return the flat outputs for flat inputs."""
        result: list[Any] = super().run(*map(self.up, inputs), enable_io_processing=False)
        return result

    def call(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator, with the dtypes among its arguments replaced as well."""
        if not any(isinstance(v, torch.dtype) for v in [*args, *kwargs.values()]):
            if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
                target = EXACT.get(target, target)
            result = target(*args, **kwargs)
        else:
            swap = lambda v: self.dtype or v if isinstance(v, torch.dtype) and v in _LOW else v  # noqa: E731
            result = target(*pytree.tree_map(swap, tuple(args)), **pytree.tree_map(swap, dict(kwargs)))
        # what is made from numbers alone is float32
        return self.up(result) if isinstance(result, Tensor) else pytree.tree_map(self.up, result)


class Reference(_Double):
    """The dense graph with every removed index masked out of its consumers and of every reduction."""

    def __init__(
        self, analysis: Analysis, kept: Kept, weights: Callable[[str], Tensor], dtype: torch.dtype | None
    ) -> None:
        super().__init__(nn.Module(), analysis.captured.graph, dtype)
        self.analysis, self.kept, self.weights = analysis, kept, weights
        names = [s.name for s in analysis.captured.symbols]
        self._sizes: dict[str, int] = dict.fromkeys(names, 0)
        self._places = [n.target for n in self.graph.nodes if n.op == "placeholder"]
        self._varying = {n for n in self.graph.nodes if names and _varies((n.args, n.kwargs))}

    def run(self, inputs: list[Any], **_: Any) -> list[Any]:  # type: ignore[override]
        """Return the flat outputs for flat inputs, of any dynamic sizes."""
        self.sized(inputs)
        return super().run(inputs)

    def sized(self, inputs: list[Any]) -> None:
        """Read the dynamic sizes off inputs."""
        for symbol in self.analysis.captured.symbols:
            name, dim = symbol.places[0]
            self._sizes[symbol.name] = int(inputs[self._places.index(name)].shape[dim])

    def _literal(self, value: Any) -> Any:
        """A size that depends on the inputs, computed for these inputs."""
        if isinstance(value, Varying):
            total = 0
            for term, factor in self.analysis.captured.affine(value.values).items():
                for name in term:
                    factor *= self._sizes[name]
                total += factor
            return total
        return value

    def concrete(self, dim: Dim) -> Dim:
        """The dimension with its sizes for these inputs: torch's attention merges batch and heads into one."""
        if isinstance(dim, Fixed):
            return Fixed(self._literal(Varying(dim.size))) if isinstance(dim.size, tuple) else dim
        if isinstance(dim, Product):
            return product(map(self.concrete, dim.factors))
        return concat(map(self.concrete, dim.parts)) if isinstance(dim, Concat) else dim

    def mask(self, node: fx.Node, value: Tensor) -> Tensor | None:
        """A tensor broadcastable to the value, True where it is kept; None where all of it is."""
        dims = self.analysis.dims[node]
        if isinstance(dims, list):
            return None
        result: Tensor | None = None
        for i, dim in enumerate(dims):
            flags = self.kept.mask(self.concrete(dim)) if self.kept.cut(dim) else None
            if flags is None:
                continue
            shape = [1] * value.dim()
            shape[i] = -1
            part = torch.from_numpy(flags).to(value.device).reshape(shape)
            result = part if result is None else result & part
        return result

    def run_node(self, n: fx.Node) -> Any:
        """Return the node's value, zero where removed."""
        if n.op == "get_attr":
            return self.up(self.weights(str(n.target)))
        if n.op != "call_function":
            return super().run_node(n)
        if n in self.kept.removed:
            return self.env[self.kept.removed[n]]
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n in self._varying:
            args, kwargs = pytree.tree_map(self._literal, (args, kwargs), is_leaf=lambda v: isinstance(v, Varying))
        target, first = n.target, n.args[0] if n.args else None
        weights_only = all(a.op == "get_attr" for a in n.all_input_nodes)  # these are not masked yet
        prepare = PREPARED.get(target) or PREPARED.get(str(target)) or (zeroed if weights_only else None)
        if prepare is not None:
            args = prepare(args, fx.node.map_arg(n.args, lambda a: self.mask(a, self.env[a])))
        if target in MASKED and isinstance(first, fx.Node) and isinstance(args[0], Tensor):
            mask = self.mask(first, args[0])
            if mask is not None:
                target, args = MASKED[target], (args[0], mask, *args[1:])
        return self._masked(n, self.call(target, args, kwargs))

    def _masked(self, node: fx.Node, result: Any) -> Any:
        """Zero where removed, so that no consumer sees it."""
        mask = self.mask(node, result) if isinstance(result, Tensor) else None
        if mask is None:
            return result
        storage = result.untyped_storage().data_ptr()
        operands = [(n, self.env[n]) for n in node.all_input_nodes]
        if all(isinstance(value, Tensor) for _, value in operands):  # a list's entries are views, not masked yet
            shared = [n for n, value in operands if value.untyped_storage().data_ptr() == storage]
            if any(n.op == "call_function" for n in shared):
                return result  # a view of what is masked
            if not shared and 0 not in result.stride():
                return result.masked_fill_(~mask, 0)
        return torch.where(mask, result, torch.zeros((), dtype=result.dtype, device=result.device))


def _varies(tree: Any) -> bool:
    return any(isinstance(leaf, Varying) for leaf in pytree.tree_leaves(tree))


class _SampledReference(Reference):
    """A reference that runs some nodes on a few rows."""

    def __init__(self, *args: Any, nodes: set[fx.Node]) -> None:
        super().__init__(*args)
        self.sampled = nodes

    def run_node(self, n: fx.Node) -> Any:
        run = super().run_node
        return on_rows(self, n, run) if n in self.sampled else run(n)


def _lockstep(
    analysis: Analysis,
    kept: Kept,
    masks: Kept,
    pruned: Rewritten,
    weights: Callable[[str], Tensor],
    inputs: list[Any],
    dtype: torch.dtype,
) -> float:
    """The largest difference of any output; infinite where only the pruned module fails."""
    dense = {n for n in pruned.nodes if sampled_operand(analysis, kept, n) is not None}
    sampled = {pruned.nodes[n] for n in dense}

    class Sampled(_Upcast):
        def run_node(self, n: fx.Node) -> Any:
            run = super().run_node
            return on_rows(self, n, run) if n in sampled else run(n)

    small = Sampled(pruned, analysis, kept, weights, dtype)
    try:
        actual = small.run(inputs)
    except Exception:  # described when the first differing node is looked for
        Reference(analysis, masks, weights, dtype).run(inputs)  # if this fails too, the inputs are to blame
        return float("inf")
    return difference(_SampledReference(analysis, masks, weights, dtype, nodes=dense).run(inputs), actual)


class _Upcast(_Double):
    """The pruned module in the same precision, on the same dense weights where these are randomised."""

    def __init__(
        self, pruned: Rewritten, analysis: Analysis, kept: Kept, weights: Callable[[str], Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__(pruned.module, pruned.module.graph, dtype)
        self.names, self.analysis, self.kept, self.weights = pruned.names, analysis, kept, weights
        self.biases, self.factors = pruned.biases, pruned.factors

    def _value(self, name: str, own: Tensor) -> Tensor:
        dense = self.names.get(name)
        folded, factor = self.biases.get(name if dense is None else dense), self.factors.get(dense or "")
        if folded is not None or factor is not None:  # compared before it was rounded to the model's precision
            base = self.kept.select(self.weights(dense), self.analysis.tensors[dense]) if dense is not None else 0
            base = self.up(base) if factor is None else self.up(base) * self.up(factor(self.weights))
            return base if folded is None else base + self.up(folded)  # type: ignore[no-any-return]
        if dense is not None:
            value = self.weights(dense)
            if value.data_ptr() != self.analysis.captured.tensors[dense].data_ptr() or own.is_meta:
                return self.up(self.kept.select(value, self.analysis.tensors[dense]))  # type: ignore[no-any-return]
        return self.up(own)  # type: ignore[no-any-return]

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            return self._value(str(n.target), super().run_node(n))
        if n.op == "call_module":
            layer = self.fetch_attr(str(n.target))
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            own = [*layer._parameters.items(), *layer._buffers.items()]
            state = {k: self._value(f"{n.target}.{k}", v) for k, v in own if v is not None}
            training = layer.training
            layer.training = False
            try:
                if all(state[k] is v for k, v in own if v is not None):
                    return layer.forward(*args, **kwargs)
                if isinstance(layer, nn.RNNBase):
                    return _recur(layer, state, args)
                return functional_call(layer, state, args, kwargs)
            finally:
                layer.training = training
        if n.op == "call_function":
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self.call(n.target, args, kwargs)
        return super().run_node(n)


def _recur(layer: nn.RNNBase, state: dict[str, Tensor], args: Any) -> Any:
    """Call a recurrent layer on other weights: it keeps a list of them, which `functional_call` does not see."""
    own = layer._flat_weights
    layer._flat_weights = [state[name] for name in layer._flat_weights_names]
    try:
        return layer(*args)
    finally:
        layer._flat_weights = own


def _first_difference(
    analysis: Analysis,
    kept: Kept,
    pruned: Rewritten,
    weights: Callable[[str], Tensor],
    inputs: list[Any],
    dtype: torch.dtype,
    tolerance: float,
) -> str:
    """Run both again, keeping every value, and describe the first node whose kept part differs."""
    values: dict[fx.Node, Any] = {}

    class Keep(Reference):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    class KeepPruned(_Upcast):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        reference = Keep(analysis, kept, weights, dtype)
        reference.run(inputs)
        failure = ""
        try:
            KeepPruned(pruned, analysis, kept, weights, dtype).run(inputs)
        except Exception as error:  # the pruned graph may not even run: the node before it is the answer
            failure = f" Then the pruned module fails: {type(error).__name__}: {error}"
    for dense, small in pruned.nodes.items():
        if dense.op != "call_function" or not isinstance(values.get(dense), Tensor) or small not in values:
            continue
        if dense in analysis.counted:  # what is left of an axis is numbered anew
            continue
        expected = kept.select(values[dense], tuple(map(reference.concrete, analysis.dims[dense])))
        actual = values[small]
        if difference([expected], [actual]) > tolerance:
            return f"The first node that differs is {describe(dense)}.{failure}"
    return f"No single node differs by itself.{failure}"
