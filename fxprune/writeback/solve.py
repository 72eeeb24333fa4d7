"""Which values the attributes of a class must have, so that it calls operators with the rewritten graph's numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxprune.analyse import Analysis
from fxprune.axes import Dim, Size, size_of
from fxprune.capture import Varying
from fxprune.kept import Kept
from fxprune.rules.core import aten, bind, positive, rule_of
from fxprune.writeback.traced import Attribute, Call, Computed, Expression, Key, Traced, ints

#: Numbers larger than so many times the dense one are not looked for.
_LARGEST = 4


@dataclass(frozen=True, slots=True)
class Equation:
    """An expression over attributes, and the numbers that it may come to."""

    expression: Expression
    allowed: frozenset[int]
    node: fx.Node


@dataclass(slots=True)
class Solution:
    """New values of attributes; where two uses of one disagree, the lines of code that do."""

    numbers: dict[Key, int] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Sizes:
    """Answers what recomputing literals asks (`rules.core.Literals`), at the first of the recorded sizes."""

    analysis: Analysis
    kept: Kept

    def size(self, dim: Dim) -> int:
        """The size after pruning."""
        return _first(self.kept.size(dim))

    def cut(self, dim: Dim) -> bool:
        """Whether anything is removed."""
        return self.kept.cut(dim)

    def dims(self, node: fx.Node) -> Any:
        """The dimensions of a node's result."""
        return self.analysis.dims[node]

    def pieces(self, dim: Dim, sizes: Sequence[Size]) -> list[Dim]:
        """The dimension in consecutive pieces."""
        return self.analysis.axes.cut(dim, sizes)

    def split(self, dim: Dim, major: Size) -> tuple[Dim, Dim]:
        """The dimension as (major, minor)."""
        return self.analysis.axes.split(dim, major)


def _first(size: Any) -> int:
    if isinstance(size, Varying):
        return size.values[0]
    return size[0] if isinstance(size, tuple) else int(size)


def literals(sizes: Sizes, node: fx.Node) -> list[tuple[int, int]]:
    """Return (dense, pruned) for every int among a node's arguments, in order; [] where another operator is called."""
    if not hasattr(node.target, "_schema"):
        return []
    positional, keyword = bind(node.target, node.args, dict(node.kwargs))
    named = positional | keyword
    rule = rule_of(node.target)
    changed = rule.literals(sizes, node, named) if rule is not None and rule.literals is not None else {}
    if changed.pop("", None) is not None:
        same = _same_operator(named, changed)
        if same is None:
            return []
        changed = same
    if node.target is aten.slice.Tensor and changed:
        changed = _same_signs(sizes, named, changed)
    pairs: list[tuple[int, int]] = []
    for name, dense in named.items():
        before, after = list(_numbers(dense)), list(_numbers(changed.get(name, dense)))
        if len(before) != len(after):
            return []
        pairs += zip(before, after, strict=True)
    return pairs


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, Varying):
        yield value.values[0]
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    else:
        yield from ints(value)


def _same_operator(named: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments in terms of the operator that the class calls, where it can still give the same pieces."""
    if "shape" in changed and "size" in named:  # a view, emitted as a reshape
        return {"size": changed["shape"]}
    pieces = changed.get("split_sizes")
    if pieces is None:
        return None
    if "split_sizes" in named:
        return {"split_sizes": pieces}
    if "split_size" in named and isinstance(named["split_size"], int) and len({*pieces[:-1]}) == 1:
        return {"split_size": pieces[0]}
    return {} if len(set(pieces)) == 1 else None


def _same_signs(sizes: Sizes, named: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """A bound counted from the end stays counted from the end; one beyond it stays so."""
    dims = sizes.dims(named["self"])
    dim = dims[positive(named["dim"], len(dims))]
    dense, now = _first(size_of(dim)), sizes.size(dim)
    result = dict(changed)
    for name in ("start", "end"):
        before = named[name]
        if isinstance(before, int) and before < 0:
            result[name] = changed[name] - now
        elif before is None or (isinstance(before, int) and before > dense):
            result[name] = before
    return result


def equations(analysis: Analysis, kept: Kept, calls: Iterable[Call]) -> list[Equation]:
    """Return one equation for each traced number that reached an operator of the captured graph."""
    sizes = Sizes(analysis, kept)
    nodes = {n.name: n for n in analysis.captured.graph.nodes}
    found = []
    for call in calls:
        known = [nodes[n.name] for n in call.nodes if n.name in nodes and nodes[n.name].target is n.target]
        tables = [(node, literals(sizes, node)) for node in known]
        exact = [(n, t) for n, t in tables if t and [d for d, _ in t] == [int(v) for v in call.numbers]]
        for i, number in enumerate(call.numbers):
            if not isinstance(number, Traced) or isinstance(number.expression, int):
                continue
            if exact:
                node, table = exact[0]
                found.append(Equation(number.expression, frozenset({table[i][1]}), node))
                continue
            for node, table in tables:
                allowed = frozenset(now for dense, now in table if dense == int(number))
                if allowed:
                    found.append(Equation(number.expression, allowed, node))
    return found


def solve(found: list[Equation], dense: Mapping[Key, int]) -> Solution:
    """Return the attributes' values: first those used as they are, then those used in one product or quotient."""
    solution = Solution()
    options: dict[Key, frozenset[int]] = {}
    lines: dict[Key, fx.Node] = {}
    for equation in found:
        if isinstance(equation.expression, Attribute):
            key = equation.expression.key
            both = options.get(key, equation.allowed) & equation.allowed
            if not both:
                solution.conflicts.append(_conflict(key, lines[key], options[key], equation))
                continue
            options[key], lines[key] = both, equation.node
    for key, allowed in options.items():
        solution.numbers[key] = dense[key] if dense[key] in allowed else min(allowed)
    for equation in found:
        if isinstance(equation.expression, Computed):
            _adjust(equation, solution, dense)
    return solution


def _adjust(equation: Equation, solution: Solution, dense: Mapping[Key, int]) -> None:
    """Choose the one attribute of an expression that nothing else says anything about."""
    assert isinstance(equation.expression, Computed)
    numbers = {k: solution.numbers.get(k, dense[k]) for k in equation.expression.attributes()}
    if _value(equation.expression, numbers) in equation.allowed:
        return
    open_keys = [k for k in numbers if k not in solution.numbers]
    if len(open_keys) != 1:
        return  # sizes read off tensors take part in it: the comparison of outputs decides
    (key,) = open_keys
    for number in range(1, _LARGEST * abs(dense[key]) + 1):  # the smallest: what is left over from a division is zero
        if _value(equation.expression, {**numbers, key: number}) in equation.allowed:
            solution.numbers[key] = number
            return


def _value(expression: Computed, numbers: Mapping[Key, int]) -> int | None:
    try:
        return expression.value(numbers)
    except ArithmeticError:
        return None


def name_of(key: Key) -> str:
    """Return an attribute's name as one would write it."""
    path, name, *rest = key
    tail = "".join(f"[{r}]" if isinstance(r, int) else f".{r}" for r in rest)
    return f"{path}.{name}{tail}" if path else f"{name}{tail}"


def _conflict(key: Key, node: fx.Node, before: frozenset[int], equation: Equation) -> str:
    return (
        f"'{name_of(key)}' would have to be {min(before)} at {node.meta.get('source')} and {min(equation.allowed)} at "
        f"{equation.node.meta.get('source')}"
    )
