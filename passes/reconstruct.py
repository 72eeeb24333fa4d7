"""Reconstruction: what is left is refitted on calibration data, so that it does what the dense model did.

Layer after layer in the order of the graph, the pruned model's own inputs (with all that earlier layers lost) are
mapped to the dense model's targets by exact least squares:

    W = T X^T (X X^T)^-1,   b with a constant 1 in x                                                                 (1)

Where a layer's result is only added to something else (a residual stream), the target is the dense sum less the pruned
model's other operand, so that the layer also makes good what the stream has lost before. Batch norm's means are
measured again on the way. Meng et al., "OSSCAR" (2024); He et al., "Channel Pruning" (2017), equation 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from fxprune.analyse import Analysis
from fxprune.errors import NonFiniteError, RecipeError
from fxprune.groups import describe
from fxprune.kept import Kept
from fxprune.modes import evaluating
from fxprune.passes import tune as tuning
from fxprune.passes.calibration import Batch, Calibration
from fxprune.passes.consumers import Contraction, contractions
from fxprune.passes.gather import portions, relevance, summed
from fxprune.passes.obs import DAMPING, refit
from fxprune.passes.patterns.sparsify import Sparsifier
from fxprune.passes.statistics import Statistics
from fxprune.prove import Reference, dense_weights
from fxprune.recipe import Recipe
from fxprune.report import Refitted
from fxprune.rewrite import Rewritten

aten = torch.ops.aten
Method = Literal["none", "bias", "least_squares"]
#: One row in so many is held out to choose the damping among these by.
_HELD_OUT = 8
_DAMPINGS = (DAMPING, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
_OPTIONS = ("damping", "residual", "batch_norm", "tune", "rate")


class _Steps:
    """Runs a graph node by node over all batches, keeping what later nodes need."""

    def __init__(self, interpreter: fx.Interpreter, batches: Sequence[Batch]) -> None:
        self.interpreter, self.batches = interpreter, batches
        self.envs: list[dict[fx.Node, Any]] = [{} for _ in batches]
        self.nodes = list(interpreter.graph.nodes)
        self.place = {n: i for i, n in enumerate(self.nodes)}
        self.next = 0
        self.pinned: dict[fx.Node, int] = {}
        self.before: Callable[[fx.Node], None] = lambda node: None
        self._stale: list[fx.Node] = []

    def advance(self, node: fx.Node, inclusive: bool) -> None:
        """Compute everything before a node, or the node as well."""
        end = self.place[node] + inclusive
        while self.next < end:
            self._step(self.nodes[self.next])
            self.next += 1

    def _step(self, node: fx.Node) -> None:
        if node.op == "output":
            return
        self.before(node)
        for env, batch in zip(self.envs, self.batches, strict=True):
            if node.op == "placeholder":
                env[node] = batch.inputs[[n for n in self.nodes if n.op == "placeholder"].index(node)]
                continue
            self.interpreter.env = env
            self.prepare(batch)
            env[node] = self.interpreter.run_node(node)
        self._stale += self.interpreter.user_to_last_uses.get(node, [])
        self.sweep()

    def prepare(self, batch: Batch) -> None:
        """Tell a reference the dynamic sizes of a batch."""
        if isinstance(self.interpreter, Reference):
            self.interpreter.sized(batch.inputs)

    def pin(self, node: fx.Node) -> None:
        """Keep a node's value until `unpin`."""
        self.pinned[node] = self.pinned.get(node, 0) + 1

    def unpin(self, node: fx.Node) -> None:
        """Let go of a node's value, if nothing else needs it."""
        self.pinned[node] -= 1
        self.sweep()

    def sweep(self) -> None:
        """Delete what no later node needs."""
        waiting = []
        for node in self._stale:
            if self.pinned.get(node, 0):
                waiting.append(node)
                continue
            for env in self.envs:
                env.pop(node, None)
        self._stale = waiting


@dataclass(slots=True)
class _Moments:
    """Sums over rows of pruned inputs and targets, float64.

    Attributes:
        moment: of x x^T, (groups, in, in).
        cross: of t x^T, (groups, out, in).
        target: of t and of t^2, (2, groups, out).
    """

    moment: Tensor
    cross: Tensor
    target: Tensor
    count: float

    @classmethod
    def of(cls, x: Tensor, t: Tensor) -> _Moments:
        """x (groups, rows, in), t (groups, rows, out): products in their own precision."""
        moment, cross = (x.transpose(1, 2) @ x).double(), (t.transpose(1, 2) @ x).double()
        return cls(moment, cross, torch.stack([t.double().sum(1), t.double().square().sum(1)]), x.shape[1])

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(
            self.moment + other.moment, self.cross + other.cross, self.target + other.target, self.count + other.count
        )

    def mean(self) -> _Moments:
        """Per row."""
        return _Moments(self.moment / self.count, self.cross / self.count, self.target / self.count, 1.0)

    def shared(self) -> _Moments:
        """Added up over all processes."""
        count = float(summed(torch.tensor(self.count, dtype=torch.float64)))
        return _Moments(summed(self.moment), summed(self.cross), summed(self.target), count)

    def error(self, matrix: Tensor) -> float:
        """Return the sum of |t - W x|^2 for W (groups, out, in)."""
        fit = (matrix @ self.moment * matrix).sum() - 2 * (matrix * self.cross).sum()
        return float(fit + self.target[1].sum())

    def group(self, g: int) -> _Moments:
        """One group alone."""
        part = slice(g, g + 1)
        return _Moments(self.moment[part], self.cross[part], self.target[:, part], self.count)


@dataclass(slots=True)
class _Sums:
    """The moments that weights are fitted to, and those of rows held out to see how strongly to damp the fit."""

    fit: _Moments | None = None
    held: _Moments | None = None

    def add(self, x: Tensor, t: Tensor) -> None:
        """The last rows of every portion, samples of their own, are held out."""
        cut = x.shape[1] - x.shape[1] // _HELD_OUT
        fit, held = _Moments.of(x[:, :cut], t[:, :cut]), _Moments.of(x[:, cut:], t[:, cut:])
        self.fit, self.held = (
            (fit, held) if self.fit is None or self.held is None else (self.fit + fit, self.held + held)
        )

    def share(self) -> None:
        """Add up over all processes."""
        if self.fit is not None and self.held is not None:
            self.fit, self.held = self.fit.shared(), self.held.shared()


@dataclass
class _Reconstruction:
    analysis: Analysis
    kept: Kept
    pruned: Rewritten
    data: Calibration
    statistics: Statistics
    method: Method
    damping: float | None
    residual: bool
    statistics_of_norms: str
    sparse: Sparsifier | None = None
    result: list[Refitted] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)

    def run(self) -> list[Refitted]:
        self.batches = list(portions(self.statistics, self.data))
        chosen = [c for c in contractions(self.analysis) if c.node in self.pruned.nodes]
        dense = _Steps(Reference(self.analysis, Kept({}), dense_weights(self.analysis.captured), None), self.batches)
        small = _Steps(fx.Interpreter(self.pruned.module), self.batches)
        small.before = lambda node: self._recalibrate(small, node)
        rows = relevance(self.statistics, self.data)
        with evaluating(self.pruned.module), torch.no_grad():
            for number, contraction in enumerate(chosen):
                self.statistics.say(f"reconstruct: {number} of {len(chosen)} layers")
                self._layer(dense, small, contraction, rows.get(contraction.node))
            small.advance(small.nodes[-1], True)  # batch norms behind the last layer
        return self.result

    # ------------------------------------------------------------------ one layer
    def _layer(self, dense: _Steps, small: _Steps, c: Contraction, rows: list[Tensor] | None) -> None:
        node = self.pruned.nodes[c.node]
        weight_name, bias_name = self._own(c.weight), self._own(c.bias)
        dims = self.analysis.dims[c.node]
        touched = any(self.kept.shrinks(d) for d in (*dims, *self.analysis.dims[c.operand])) or bool(self.result)
        if not (touched or self._patterned(c)) or (weight_name is None and bias_name is None):
            return
        total, other = self._sum(c) if self.residual else (None, None)
        operand = node.args[0] if node.op == "call_module" else self._operand(node, c)
        if not isinstance(operand, fx.Node):
            return
        small.pin(operand)
        if other is not None:
            small.pin(self.pruned.nodes[other])
        small.advance(node, False)
        if other is not None and any(self.pruned.nodes[other] not in env for env in small.envs):
            small.unpin(self.pruned.nodes[other])
            total, other = None, None
        target = total or c.node
        dense.pin(target)
        dense.advance(target, True) if dense.place[target] >= dense.next else None
        if any(target not in env for env in dense.envs):  # it was computed and dropped before
            raise AssertionError(f"{describe(target)} is no longer there")
        weight = self._parameter(weight_name, c.weight)
        bias = None if c.bias is None else self._parameter(bias_name, c.bias)
        groups = self._groups(node, c)
        sums = _Sums()
        out = self.kept.index(dims[c.channel]) if self.kept.cut(dims[c.channel]) else None
        for number in range(len(self.batches)):
            x = _single(c.rows(small.envs[number][operand], tuple(weight.shape[2:]) if c.rank else (), groups))
            t = dense.envs[number][target]
            t = self._kept_rows(t, c, out)
            if other is not None:
                t = t - small.envs[number][self.pruned.nodes[other]]
            t = _single(c.results(t, groups))
            if rows is not None and len(rows[number]) == x.shape[1]:
                x, t = x[:, rows[number]], t[:, rows[number]]
            if c.bias is not None:
                x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
            sums.add(x, t)
        sums.share()
        self._solve(c, weight, bias, bias_name, weight_name, groups, sums)
        small.unpin(operand)
        if other is not None:
            small.unpin(self.pruned.nodes[other])
        dense.unpin(target)

    def _kept_rows(self, t: Tensor, c: Contraction, out: Any) -> Tensor:
        """The target's kept channels, and the kept indices of every other dimension that is cut."""
        return self.kept.select(t, self.analysis.dims[c.node])

    def _solve(
        self,
        c: Contraction,
        weight: Tensor,
        bias: Tensor | None,
        bias_name: str | None,
        weight_name: str | None,
        groups: int,
        sums: _Sums,
    ) -> None:
        assert sums.fit is not None and sums.held is not None
        everything = sums.fit + sums.held
        if not everything.count:
            return
        everything = everything.mean()
        if not all(bool(torch.isfinite(t).all()) for t in (everything.moment, everything.cross)):
            raise NonFiniteError(f"calibration: what {describe(c.node)} reads holds NaN or infinite values")
        matrix = c.matrix(weight, groups).double()
        if bias is not None:
            matrix = torch.cat([matrix, bias.double().reshape(groups, -1, 1)], 2)
        new = matrix.clone()
        for g in range(groups):
            moment, cross = everything.moment[g], everything.cross[g]
            if self.method == "least_squares" and weight_name is not None:
                damping = self._damping(matrix[g], sums.fit.group(g), sums.held.group(g))
                new[g] = refit(matrix[g], moment, cross, damping)
            elif bias is not None and bias_name is not None:
                new[g, :, -1] += cross[:, -1] - matrix[g] @ moment[-1]
        before, after = everything.error(matrix), everything.error(new)
        if not after <= before:  # nothing was won
            new, after = matrix, before
        variance = float((everything.target[1] - everything.target[0].square()).sum())
        patterned = weight_name is not None and self._patterned(c)
        if patterned:
            assert self.sparse is not None and weight_name is not None
            damping = self._damping(matrix[0], sums.fit, sums.held)
            new[0] = self.sparse.fit(c, weight_name, weight.shape, new[0], everything.moment[0], damping)
            after = everything.error(new)
        self.result.append(Refitted(c.weight, before / max(variance, 1e-300), after / max(variance, 1e-300)))
        if bias is not None and bias_name is not None:
            self._set(bias_name, new[:, :, -1].reshape(-1))
        if weight_name is not None and (patterned or self.method == "least_squares"):
            self._set(weight_name, c.tensor(new[:, :, :-1] if bias is not None else new, weight.shape))

    def _patterned(self, c: Contraction) -> bool:
        """Whether a layer gets a pattern."""
        return self.sparse is not None and c in self.sparse

    def _damping(self, matrix: Tensor, fit: _Moments, held: _Moments) -> float:
        """The damping that was asked for, or that with which weights fitted to some rows do best on the others."""
        if self.damping is not None:
            return self.damping
        if not fit.count or not held.count:
            return DAMPING
        mean = fit.mean()
        return min(_DAMPINGS, key=lambda d: held.error(refit(matrix, mean.moment[0], mean.cross[0], d)[None]))

    def _groups(self, node: fx.Node, c: Contraction) -> int:
        if node.op == "call_module":
            return int(getattr(self.pruned.module.get_submodule(str(node.target)), "groups", 1))
        return c.groups if c.groups == 1 else int(node.kwargs.get("groups", node.args[-1]))  # type: ignore[arg-type]

    def _operand(self, node: fx.Node, c: Contraction) -> Any:
        return node.args[1] if node.target is aten.addmm.default else node.args[0]

    def _sum(self, c: Contraction) -> tuple[fx.Node | None, fx.Node | None]:
        """The addition that a contraction's result goes into and nothing else, and the other operand."""
        node = c.node
        users = list(node.users)
        while len(users) == 1 and users[0].target is aten.dropout.default:
            node, users = users[0], list(users[0].users)
        if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0].kwargs:
            return None, None
        total = users[0]
        other = total.args[1] if total.args[0] is node else total.args[0]
        if not isinstance(other, fx.Node) or other is node or other.op == "get_attr" or other not in self.pruned.nodes:
            return None, None
        same = other.meta.get("shape") == c.node.meta.get("shape") == total.meta.get("shape")
        return (total, other) if same else (None, None)

    # ------------------------------------------------------------------ tensors of the pruned module
    def _own(self, name: str | None) -> str | None:
        """The pruned module's name of a tensor that one operator alone uses."""
        if name is None or name in self.pruned.factors:
            return None
        users = [n for n in self.analysis.captured.graph.nodes if n.op == "get_attr" and n.target == name]
        emitted = [small for small, dense in self.pruned.names.items() if dense == name]
        alone = len(users) == 1 and len(users[0].users) == 1 and len(emitted) == 1
        tensor = self.analysis.captured.tensors[name]
        return emitted[0] if alone and isinstance(tensor, nn.Parameter) else None

    def _parameter(self, name: str | None, dense: str) -> Tensor:
        if name is None:
            return self.kept.select(self.analysis.captured.tensors[dense].detach(), self.analysis.tensors[dense])
        return self.pruned.module.get_parameter(name).detach()

    def _set(self, name: str, value: Tensor) -> None:
        parameter = self.pruned.module.get_parameter(name)
        parameter.data = value.reshape(parameter.shape).to(parameter.dtype).contiguous()

    # ------------------------------------------------------------------ batch norm
    def _recalibrate(self, small: _Steps, node: fx.Node) -> None:
        """Running means become those of the pruned model's own activations; variances too, if asked for.

        A refitted layer gives the best estimate of what the dense one gave, which varies less than that: dividing by
        its own spread would blow up what it cannot know.
        """
        if node.op != "call_module" or self.statistics_of_norms == "none":
            return
        layer = self.pruned.module.get_submodule(str(node.target))
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or layer.running_mean is None or not self.result:
            return
        assert isinstance(node.args[0], fx.Node)
        sums, count = torch.zeros(2, len(layer.running_mean), dtype=torch.float64), 0.0
        for env in small.envs:
            flat = env[node.args[0]].double().movedim(1, 0).flatten(1)
            sums, count = sums + torch.stack([flat.sum(1), flat.square().sum(1)]), count + flat.shape[1]
        total, square = summed(sums)
        count = float(summed(torch.tensor(count, dtype=torch.float64)))
        if count > 1:
            mean = total / count
            assert layer.running_var is not None
            layer.running_mean = mean.to(layer.running_mean.dtype)
            if self.statistics_of_norms == "all":
                variance = (square / count - mean.square()) * count / (count - 1)
                layer.running_var = variance.to(layer.running_var.dtype)


def _single(x: Tensor) -> Tensor:
    """At least single precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def reconstruct(
    analysis: Analysis,
    kept: Kept,
    pruned: Rewritten,
    data: Calibration,
    method: Method = "least_squares",
    *,
    statistics: Statistics | None = None,
    damping: float | None = None,
    residual: bool = True,
    batch_norm: str = "mean",
    tune: int = 0,
    rate: float = 0.01,
    sparse: Sparsifier | None = None,
) -> tuple[list[Refitted], Refitted | None]:
    """Refit the pruned module in place, layer after layer.

    Args:
        method: "none", "bias" (only the mean of what is missing) or "least_squares".
        statistics: where it is known already which rows are padding.
        damping: how strongly weights are drawn to what they were, as a share of the inputs' mean energy. None chooses
            it for each layer by an eighth of the rows: few data say little about many weights.
        batch_norm: which running statistics are measured again: "none", "mean" or "all".
        residual: layers that add to a stream also make good what it has lost.
        tune: afterwards, passes over the data in which biases, scales and shifts learn the dense model's outputs
            (`fxprune.passes.tune`); an eighth of the data is then kept from the fit too, and decides.
        rate: of these, relative to the size of each vector.
        sparse: gives layers a pattern as they are refitted, so that later ones make good what earlier ones lose.

    Returns:
        How closely each layer gives what the dense one gave, and, where there was tuning, the outputs.
    """
    if method == "none" and sparse is None:
        return [], None
    known = statistics or Statistics(analysis, data=data)
    rest, held = tuning.split(data, known) if tune else (data, None)
    result = _Reconstruction(analysis, kept, pruned, rest, known, method, damping, residual, batch_norm, sparse).run()
    if held is None:
        return result, None
    with evaluating(pruned.module):
        return result, Refitted("outputs", *tuning.tune(analysis, pruned, rest, held, known, tune, rate))


def settings(recipe: Recipe, data: bool) -> tuple[Method, dict[str, Any]]:
    """Return the method that a recipe names, and its options.

    Raises:
        RecipeError: there is no such method or option, or it needs calibration data and there are none.
    """
    given = recipe.reconstruction
    name = given if isinstance(given, str) else given.get("name", "auto")
    options = {} if isinstance(given, str) else {k: v for k, v in given.items() if k != "name"}
    if name == "auto":
        name = "least_squares" if data else "none"
    if name not in get_args(Method):
        raise RecipeError(f"there is no reconstruction '{name}'; known: auto, {', '.join(get_args(Method))}")
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise RecipeError(f"reconstruction '{name}' has no option '{unknown[0]}'; known: {', '.join(_OPTIONS)}")
    if name != "none" and not data:
        raise RecipeError(
            f"reconstruction '{name}' takes calibration data: pass `calibration`, or reconstruction='none'"
        )
    return name, options  # type: ignore[return-value]
