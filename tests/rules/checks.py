"""What must hold for any model: what is emitted equals the masked model, groups are neither too small nor too large."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.analyse import Analysis, analyse
from fxprune.axes import Axis, Concat, Dim, Product, atoms, size_of
from fxprune.capture import capture
from fxprune.groups import Group, find_groups, positions
from fxprune.kept import Kept
from fxprune.prove import Reference, prove
from fxprune.rewrite import rewrite

Order = npt.NDArray[np.int64]
Inputs = Sequence[Any]
Place = tuple[str, int, Order]
#: Of a group with more occurrences than this, not every part is permuted.
MANY = 6


def analysed(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Analysis, list[Group]]:
    """Capture and analyse; nothing that was analysed may lack a rule by accident."""
    analysis = analyse(capture(model, inputs, {}))
    return analysis, find_groups(analysis)


# ---------------------------------------------------------------------- what is kept
def selections(groups: list[Group], seed: int) -> Iterator[Kept]:
    """Yield what may be kept: of each group alone, and of all together, a random part, the fewest, all but one."""
    rng = np.random.default_rng(seed)

    def pick(size: int, count: int) -> Order:
        return np.sort(rng.choice(size, count, replace=False))

    def some(group: Group) -> Order:
        return pick(group.size, int(rng.integers(group.least, group.size)))

    for which in [[g] for g in groups] + ([groups] if len(groups) > 1 else []):
        yield Kept({g.axis: some(g) for g in which})
        yield Kept({g.axis: pick(g.size, g.least) for g in which})
        yield Kept({g.axis: pick(g.size, g.size - 1) for g in which})


def random_kept(groups: list[Group], seed: int) -> Kept:
    """Return a random part of every group."""
    rng = np.random.default_rng(seed)
    return Kept({g.axis: np.sort(rng.choice(g.size, rng.integers(g.least, g.size + 1), replace=False)) for g in groups})


# ---------------------------------------------------------------------- the emitted module
def close(expected: Sequence[Any], actual: Sequence[Any], tolerance: float) -> bool:
    """Whether two lists of results agree to `tolerance` of the largest magnitude."""
    for a, b in zip(expected, actual, strict=True):
        if not isinstance(a, Tensor):
            assert a == b
            continue
        finite = torch.isfinite(a)
        if a.shape != b.shape or not torch.equal(finite, torch.isfinite(b)):
            return False
        a, b = a[finite].double(), b[finite].double()
        if a.numel() and float((a - b).abs().max()) > tolerance * max(float(a.abs().max()), 1e-30):
            return False
    return True


def own_weights(analysis: Analysis) -> Callable[[str], Tensor]:
    """Return the model's own tensors by name."""
    return lambda name: analysis.captured.tensors[name].detach()


def dense(
    analysis: Analysis, inputs: Inputs, weights: Callable[[str], Tensor] | None = None, dtype: Any = torch.float64
) -> list[Any]:
    """Run the captured graph with nothing removed."""
    with torch.no_grad():
        return Reference(analysis, Kept({}), weights or own_weights(analysis), dtype).run(list(inputs))


def check_captured(model: nn.Module, analysis: Analysis, inputs: tuple[Any, ...]) -> None:
    """Check that the captured graph computes what the model computes."""
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*inputs))
    actual = dense(analysis, inputs, dtype=torch.float32)
    assert close(expected, actual, 1e-4), "the captured graph does not compute what the model computes"


def check_emitted(
    model: nn.Module, analysis: Analysis, kept: Kept, other: tuple[Any, ...], tolerance: float = 1e-3
) -> None:
    """Check that what is emitted is proved, and that it runs as it is on inputs of another batch size."""
    pruned = rewrite(analysis, kept, model)
    prove(analysis, kept, pruned, level="full")
    with torch.no_grad():
        actual = pytree.tree_leaves(pruned.module(*other))
        expected = Reference(analysis, kept, own_weights(analysis), torch.float32).run(list(other))
    assert close(expected, actual, tolerance), "on another batch size the emitted module differs from the masked model"


# ---------------------------------------------------------------------- permutations
def arranged(dim: Dim, axis: Axis, order: Order) -> Order:
    """Return the positions of a dimension in the order they come in when the indices of `axis` come in `order`."""
    size = size_of(dim)
    assert isinstance(size, int)
    if dim is axis:
        return order
    if isinstance(dim, Product):
        result = np.zeros(1, dtype=np.int64)
        for factor in dim.factors:
            inner = size_of(factor)
            result = (result[:, None] * inner + arranged(factor, axis, order)[None, :]).reshape(-1)
        return result
    if isinstance(dim, Concat):
        parts = [arranged(p, axis, order) for p in dim.parts]
        offsets = np.cumsum([0] + [len(p) for p in parts[:-1]])
        return np.concatenate([p + o for p, o in zip(parts, offsets, strict=True)])
    return np.arange(size)


def derangement(size: int, seed: int) -> Order:
    """Return an order in which no index stays where it is, and which is no mere rotation where there is another one."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(size)
        steps = (order - np.arange(size)) % size
        if (steps != 0).all() and (size < 4 or len(set(steps)) > 1):
            return order


def check_permutation(analysis: Analysis, groups: list[Group], inputs: Inputs, seed: int) -> None:
    """Permuting a group everywhere changes nothing: then it holds all that must be cut together."""
    before = dense(analysis, inputs)
    for group in groups:
        order = derangement(group.size, seed)

        def permuted(name: str, axis: Axis = group.axis, order: Order = order) -> Tensor:
            tensor = analysis.captured.tensors[name].detach()
            for i, dim in enumerate(analysis.tensors[name]):
                if axis in atoms(dim):
                    tensor = tensor.index_select(i, torch.from_numpy(arranged(dim, axis, order)))
            return tensor

        after = dense(analysis, inputs, permuted)
        assert close(before, after, 1e-9), f"permuting the group {group.name} everywhere changes the outputs"


def check_members(analysis: Analysis, groups: list[Group], inputs: Inputs, seed: int) -> None:
    """Permuting a part of a group's occurrences changes the outputs: then all of it has to be cut together.

    An occurrence is one place of the group in one dimension of one tensor. Those whose values do not matter at all
    (other random values leave the outputs as they are) are left out, for then their order does not matter either.
    """
    before = dense(analysis, inputs)
    rng = np.random.default_rng(seed)
    for group in groups:
        order = derangement(group.size, seed)
        places = [
            (name, dim, where)
            for name, dim in group.members
            for where in positions(analysis.tensors[name][dim], group.axis)
            if analysis.captured.tensors[name].is_floating_point()
        ]
        places = [p for p in places if not close(before, _changed(analysis, inputs, [p], None, rng), 1e-9)]
        for part in _parts(places):
            assert not close(before, _changed(analysis, inputs, part, order, rng), 1e-9), (
                f"permuting {', '.join(f'{n}.{d}' for n, d, _ in part)} alone does not change the outputs: "
                f"the group {group.name} need not hold it together with the rest"
            )


def _parts(places: list[Place]) -> Iterator[list[Place]]:
    """Yield the parts of a group to permute, one of each pair of complements: all of them, or single ones of many."""
    if len(places) > MANY:
        yield from ([p] for p in places)
        return
    for chosen in range(1, 2 ** (len(places) - 1) if places else 0):
        yield [p for i, p in enumerate(places) if chosen >> i & 1]


def _changed(
    analysis: Analysis, inputs: Inputs, part: list[Place], order: Order | None, rng: np.random.Generator
) -> list[Any]:
    """Run with other values at some occurrences of a group: in another order, or with noise where there is no order."""
    changed: dict[str, Tensor] = {}
    own = own_weights(analysis)
    for name, dim, where in part:
        tensor = changed.get(name, own(name)).double()
        held = np.flatnonzero(where >= 0)
        if order is None:
            shape = [1] * dim + [-1] + [1] * (tensor.dim() - dim - 1)
            tensor = tensor + torch.from_numpy((where >= 0).reshape(shape) * rng.uniform(0.1, 1, tuple(tensor.shape)))
        else:
            index = np.arange(len(where))
            index[held] = _reordered(where[held], held, order)
            tensor = tensor.index_select(dim, torch.from_numpy(index))
        changed[name] = tensor
    return dense(analysis, inputs, lambda name: changed.get(name, own(name)))


def _reordered(units: Order, places: Order, order: Order) -> Order:
    """Return, for each place, the place whose entry comes there when unit u is replaced by unit order[u].

    The entries of one unit are met in the same order in every unit.
    """
    by_unit = [places[units == u] for u in range(len(order))]
    result = np.empty_like(places)
    for u, source in enumerate(order):
        result[units == u] = by_unit[source]
    return result
