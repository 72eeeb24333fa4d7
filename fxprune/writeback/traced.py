"""Numbers in the attributes of modules, followed through Python arithmetic into the arguments of operators."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

#: Where a number is: the module's path, the attribute, then positions inside a container or object.
Key = tuple[Any, ...]

_OWN = set(vars(nn.Module())) | {"training"}
_DEPTH = 3


# ---------------------------------------------------------------------- expressions
@dataclass(frozen=True, slots=True)
class Attribute:
    """A number in an attribute."""

    key: Key

    def value(self, numbers: Mapping[Key, int]) -> int:
        """Return the number, as `numbers` has it."""
        return numbers[self.key]

    def attributes(self) -> set[Key]:
        """Return the attributes it depends on."""
        return {self.key}


@dataclass(frozen=True, slots=True)
class Computed:
    """A number computed from others; plain ints stand for themselves."""

    function: Callable[[int, int], int]
    left: Expression
    right: Expression

    def value(self, numbers: Mapping[Key, int]) -> int:
        """Return the number under other values of the attributes."""
        left = self.left if isinstance(self.left, int) else self.left.value(numbers)
        right = self.right if isinstance(self.right, int) else self.right.value(numbers)
        return self.function(left, right)

    def attributes(self) -> set[Key]:
        """Return the attributes it depends on."""
        return {k for side in (self.left, self.right) if not isinstance(side, int) for k in side.attributes()}


Expression = Attribute | Computed | int


class Traced(int):
    """An int that remembers how it came from attributes.

    >>> heads = Traced(12, Attribute(("attn", "num_heads")))
    >>> width = heads * 64
    >>> width, width.expression.value({("attn", "num_heads"): 6})
    (768, 384)
    """

    expression: Expression

    def __new__(cls, value: int, expression: Expression | None = None) -> Traced:
        """Make one; without an expression (a copy of one) it is a plain number."""
        self = super().__new__(cls, value)
        self.expression = int(value) if expression is None else expression
        return self

    def __neg__(self) -> Traced:
        """Return the negative number."""
        return Traced(-int(self), Computed(operator.sub, 0, self.expression))


def _expression(value: int) -> Expression:
    return value.expression if isinstance(value, Traced) else int(value)


def _define(name: str, function: Callable[[int, int], int]) -> None:
    plain, reflected = f"__{name}__", f"__r{name}__"

    def forward(self: Traced, other: Any) -> Any:
        if not isinstance(other, int):
            return getattr(int, plain)(self, other)
        return Traced(function(int(self), int(other)), Computed(function, self.expression, _expression(other)))

    def backward(self: Traced, other: Any) -> Any:
        if not isinstance(other, int):
            return getattr(int, reflected)(self, other)
        return Traced(function(int(other), int(self)), Computed(function, _expression(other), self.expression))

    setattr(Traced, plain, forward)
    setattr(Traced, reflected, backward)


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    _define(_name, getattr(operator, _name))


# ---------------------------------------------------------------------- attributes
def _plain_object(value: Any) -> bool:
    """Whether it is an object like a configuration: data in attributes, no code of its own to run."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, nn.Module | Tensor | type | torch.dtype | torch.device)
        and not callable(value)
        and type(value).__module__ not in ("builtins", "types")
    )


def _follow(value: Any, key: Key, numbers: dict[Key, int], depth: int = 0) -> Any:
    """The value with every number in it traced and noted; itself where there is none."""
    if type(value) is int:
        numbers[key] = value
        return Traced(value, Attribute(key))
    if depth == _DEPTH:
        return value
    if type(value) in (tuple, list):
        items = [_follow(v, (*key, i), numbers, depth + 1) for i, v in enumerate(value)]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
    if type(value) is dict:
        table = {k: _follow(v, (*key, k), numbers, depth + 1) for k, v in value.items()}
        return value if all(table[k] is v for k, v in value.items()) else table
    if _plain_object(value):
        changed = {k: _follow(v, (*key, k), numbers, depth + 1) for k, v in vars(value).items()}
        if all(changed[k] is v for k, v in vars(value).items()):
            return value
        twin = copy.copy(value)
        twin.__dict__.update(changed)
        return twin
    return value


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module that are its own data."""
    for name, value in vars(module).items():
        if name not in _OWN and not isinstance(value, nn.Module | Tensor):
            yield name, value


def trace_attributes(modules: Mapping[str, nn.Module]) -> dict[Key, int]:
    """Replace the numbers in the attributes of every module by traced ones, in place; return what they were."""
    numbers: dict[Key, int] = {}
    seen: set[int] = set()
    for path, module in modules.items():
        if id(module) in seen:
            continue  # a shared module goes by its first name
        seen.add(id(module))
        for name, value in list(attributes(module)):
            module.__dict__[name] = _follow(value, (path, name), numbers)
    return numbers


def assign(value: Any, where: Key, number: int) -> Any:
    """Return a container or object with one number in it replaced; what it shares with others is copied."""
    if not where:
        return number
    first, rest = where[0], where[1:]
    if isinstance(value, tuple | list):
        return type(value)(assign(v, rest, number) if i == first else v for i, v in enumerate(value))
    if isinstance(value, dict):
        return {k: assign(v, rest, number) if k == first else v for k, v in value.items()}
    twin = copy.copy(value)
    twin.__dict__[first] = assign(twin.__dict__[first], rest, number)
    return twin


# ---------------------------------------------------------------------- calls
@dataclass(frozen=True, slots=True)
class Call:
    """A torch function called with traced numbers: all ints among its arguments in order, and the nodes it made."""

    numbers: list[int]
    nodes: list[fx.Node]


class Calls(TorchFunctionMode):
    """Notes every torch function that is called with a traced number."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and note it."""
        kwargs = kwargs or {}
        numbers = list(ints((args, kwargs)))
        if not any(isinstance(n, Traced) for n in numbers):
            return func(*args, **kwargs)
        last = next(iter(reversed(self.graph.nodes)), None)
        result = func(*args, **kwargs)
        made: list[fx.Node] = []
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            made.append(node)
        self.calls.append(Call(numbers, made[::-1]))
        return result


def ints(tree: Any) -> Iterator[int]:
    """Yield every int (no bools) in nested arguments, in order."""
    if isinstance(tree, int):
        if not isinstance(tree, bool):
            yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from ints(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from ints(item)
    elif isinstance(tree, slice):
        yield from ints((tree.start, tree.stop, tree.step))
