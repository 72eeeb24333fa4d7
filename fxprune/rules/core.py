"""What a rule is, what it sees of a node, and the table of all rules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from fxprune.axes import ONE, Axes, Dim, Fixed, Size, size_of
from fxprune.capture import Varying

aten = torch.ops.aten
Dims = tuple[Dim, ...]


def as_size(value: Any) -> Size:
    """Return an integer argument as a size: a `Varying` one becomes the tuple of its values."""
    return value.values if isinstance(value, Varying) else int(value)


@dataclass(frozen=True, slots=True)
class Counted:
    """What the numbers in a tensor say about an axis.

    Attributes:
        kind: "index": each is an index of it; "histogram": how often each index occurs, along the last dimension;
            "offsets": the same, summed up from the first on.
    """

    dim: Dim
    kind: str


@dataclass(slots=True)
class Site:
    """What a rule sees of the node it is applied to.

    Attributes:
        shape: the sizes of the result, or a list of them where there are several results.
        macs: filled by `multiply`: each entry is one contraction, whose multiply-accumulates are the product of the
            sizes.
        least: filled by `at_least`.
        counted: which integer tensors hold indices of an axis, see `fxprune.counted`.
    """

    axes: Axes
    node: fx.Node
    shape: Any
    macs: list[Dims] = field(default_factory=list)
    least: list[tuple[Dim, int]] = field(default_factory=list)
    counted: dict[fx.Node, Counted] = field(default_factory=dict)

    def unify(self, a: Dim, b: Dim) -> Dim:
        """Equate two dimensions; returns the common one."""
        return self.axes.unify(a, b, self.node)

    def freeze(self, dim: Dim, reason: str) -> Dim:
        """Keep the dimension whole."""
        return self.axes.freeze(dim, reason, self.node)

    def fresh(self, size: Size, label: str = "") -> Dim:
        """Return a new axis that this node creates."""
        return self.axes.fresh(size, f"{self.node.name}{label}")

    def multiply(self, *dims: Dim) -> None:
        """Record a contraction: one multiply-accumulate for each index of all these dimensions together."""
        self.macs.append(dims)

    def at_least(self, dim: Dim, count: int) -> None:
        """Say that the operator needs so many indices of a dimension."""
        self.least.append((dim, count))

    def picked(self, dim: Dim, index: Any, why: str) -> None:
        """Entries of `dim` are picked by the integers of `index`: they count along an axis, or `dim` stays whole."""
        counted = self.counted.get(index) if isinstance(index, fx.Node) else None
        if counted is not None and counted.kind == "index":
            self.unify(dim, counted.dim)
        else:
            self.freeze(dim, why)

    def broadcast(self, *operands: Dims) -> Dims:
        """Equate dimensions aligned from the right, as element-wise operators do; size 1 stretches."""
        rank = max(len(o) for o in operands)
        result: list[Dim] = []
        for i in range(-rank, 0):
            dims = [o[i] for o in operands if len(o) >= -i and size_of(o[i]) != 1]
            if not dims:
                result.append(ONE)
                continue
            for other in dims[1:]:
                self.unify(dims[0], other)
            result.append(self.axes.resolve(dims[0]))
        return tuple(result)

    def outputs(self, why: str = "") -> Any:
        """Return fixed dimensions in the shape of the result."""
        if isinstance(self.shape, list):
            return [tuple(Fixed(s, why) for s in shape) for shape in self.shape]
        return tuple(Fixed(s, why) for s in self.shape)


class Literals(Protocol):
    """What recomputing an operator's integer arguments may ask, once it is known what is kept."""

    def size(self, dim: Dim) -> Any:
        """The size of the dimension after pruning: an int, or a node where it is dynamic."""

    def cut(self, dim: Dim) -> bool:
        """Whether anything is removed from the dimension."""

    def dims(self, node: fx.Node) -> Any:
        """The dimensions of a node's result."""

    def pieces(self, dim: Dim, sizes: Sequence[Size]) -> list[Dim]:
        """The dimension in consecutive pieces of the given dense sizes."""

    def split(self, dim: Dim, major: Size) -> tuple[Dim, Dim]:
        """The dimension as (major, minor), the major one of the given dense size."""


Infer = Callable[..., Any]
#: (literals, the node, its arguments by name) -> the arguments that change, by name; the key "" replaces the target.
Recompute = Callable[[Literals, fx.Node, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule: how to infer dimensions, and how to recompute arguments that are sizes (None: there are none)."""

    target: Any
    infer: Infer
    literals: Recompute | None = None


#: Operator overload -> its rule; of operators that a library defines when it is imported, the name of the overload.
RULES: dict[Any, Rule] = {}


def rule_of(target: Any) -> Rule | None:
    """Return the rule of what a node calls, or None."""
    return RULES.get(target) or RULES.get(str(target))


def overloads(packet: Any) -> Iterable[Any]:
    """Yield the functional overloads of an operator packet that make tensors; an overload stands for itself.

    TorchScript's own overloads (on numbers, strings, lists and dictionaries; `to.prim_...`) never occur in a graph.
    """
    if not hasattr(packet, "overloads"):  # an overload, or its name
        yield packet
        return
    for name in packet.overloads():
        overload = getattr(packet, name)
        tensors = any(str(r.type) in ("Tensor", "List[Tensor]") for r in overload._schema.returns)
        if tensors and not overload._schema.is_mutable and not {"out", "prim"} & set(name.split("_")):
            yield overload


def register_rule(target: Any, infer: Infer, literals: Recompute | None = None) -> None:
    """Teach the compiler an operator: yours (from `torch.library`), or one of torch's that has no rule yet.

    Args:
        target: an operator overload such as `torch.ops.mylib.swish.default`, a packet for all its overloads, or, where
            the operator need not exist yet, the overload's name, "mylib.swish.default".
        infer: `infer(site, *arguments) -> dimensions of the result`.
        literals: recomputes arguments that are sizes of prunable dimensions, where the operator has any.

    Raises:
        ValueError: the operator has a rule already.

    >>> import torch
    >>> from fxprune.rules import register_rule
    >>> @torch.library.custom_op("fxprune_doc::double", mutates_args=())
    ... def double(x: torch.Tensor) -> torch.Tensor:
    ...     return x * 2
    >>> register_rule(torch.ops.fxprune_doc.double.default, lambda site, x: x)
    """
    for overload in overloads(target):
        if overload in RULES:
            raise ValueError(f"{overload} has a rule already, {RULES[overload].infer.__name__}")
        RULES[overload] = Rule(overload, infer, literals)


def rule(*targets: Any, literals: Recompute | None = None) -> Callable[[Infer], Infer]:
    """Decorate a rule for one or several operators, see `register_rule`."""

    def decorate(infer: Infer) -> Infer:
        for target in targets:
            register_rule(target, infer, literals)
        return infer

    return decorate


@functools.cache
def _signature(target: Any) -> tuple[tuple[str, bool, bool, Any], ...]:
    return tuple((a.name, a.kwarg_only, a.has_default_value(), a.default_value) for a in target._schema.arguments)


def bind(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (positional, keyword-only) arguments of an operator by name, with the schema's defaults filled in."""
    positional: dict[str, Any] = {}
    keyword: dict[str, Any] = {}
    rest = list(args)
    for name, kwarg_only, has_default, default in _signature(target):
        if kwarg_only:
            if name in kwargs or has_default:
                keyword[name] = kwargs.get(name, default)
        elif rest:
            positional[name] = rest.pop(0)
        elif name in kwargs or has_default:
            positional[name] = kwargs.get(name, default)
    return positional, keyword


def output_shape(argument: str) -> Recompute:
    """Return the recomputation of an argument that is the shape of the result; -1 stays -1."""

    def recompute(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
        dims = rw.dims(node)
        sizes = args[argument]
        if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
            sizes = sizes[0]
        return {
            argument: [s if isinstance(s, int) and s == -1 else rw.size(d) for s, d in zip(sizes, dims, strict=True)]
        }

    return recompute


def positive(dim: int, rank: int) -> int:
    """Return a dimension number counted from the front."""
    return dim % rank if rank else 0


__all__ = [
    *("RULES", "Dims", "Infer", "Literals", "Misfit", "ONE", "Recompute", "Rule", "Site", "as_size", "aten", "bind"),
    *("Counted", "output_shape", "overloads", "positive", "register_rule", "rule", "rule_of"),
]
