"""Samples: small models that use an operator on dimensions that come from parameters, so that they can be cut.

A sample is one line of a table, a function of a `Net` (which makes layers as they are asked for) and of inputs:

    sample(aten.glu.default, lambda net, x: net.linear(aten.glu.default(net.linear(x, 12)), 3), groups=[6])

It says which operators it is for, and the sizes of the groups that must be found, so that a rule that gives up too
early fails as surely as one that claims too much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten
FAMILIES = (
    *("attention", "contraction", "creation", "indexing", "movement", "normalisation", "pointwise", "reduction"),
    *("experts", "recurrent", "spatial", "stacking", "products", "spectral", "sampling", "ordering", "losses"),
)


class _Held(nn.Module):
    """One parameter by itself."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(shape) * 0.5)


class Net(nn.Module):
    """A model that is grown by its first forward pass: layers are made when `function` first asks for them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList()
        self.next = 0

    def forward(self, *inputs: Any) -> Any:
        self.next = 0
        return self.function(self, *inputs)

    def layer(self, make: Callable[[], nn.Module]) -> Any:
        """Return the layer that stands here, made at the first pass."""
        if self.next == len(self.layers):
            self.layers.append(make())
        self.next += 1
        return self.layers[self.next - 1]

    def linear(self, x: Tensor, out: int, bias: bool = True) -> Tensor:
        """A linear layer with `out` features."""
        return self.layer(lambda: nn.Linear(x.shape[-1], out, bias))(x)  # type: ignore[no-any-return]

    def conv(self, x: Tensor, out: int, kernel: int = 1, **options: Any) -> Tensor:
        """A convolution of the input's rank with `out` channels."""
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[x.dim() - 3]
        return self.layer(lambda: kind(x.shape[1], out, kernel, **options))(x)  # type: ignore[no-any-return]

    def parameter(self, *shape: int) -> Tensor:
        """A parameter of its own."""
        return self.layer(lambda: _Held(*shape)).value  # type: ignore[no-any-return]


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter and statistic a random value: none may be 0 or 1 by accident, or equal to its neighbours."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", "running_mean")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)
            elif tensor.is_floating_point() and (tensor.dim() <= 1 or tensor.min() == tensor.max()):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


@dataclass(frozen=True, slots=True)
class Sample:
    """A model that uses some operators.

    Attributes:
        targets: the operators it is for; all of them occur in the captured graph.
        function: (net, *inputs) -> outputs.
        inputs: batch size -> the inputs.
        groups: the sizes of the groups that must be found, in any order; None where that is not certain.
        dynamic: whether the batch size can be dynamic.
        xfail: why it fails as things are; empty where it does not.
        name: what it is called in test reports.
    """

    targets: tuple[Any, ...]
    function: Callable[..., Any]
    inputs: Callable[[int], tuple[Tensor, ...]]
    groups: tuple[int, ...] | None
    dynamic: bool
    xfail: str
    name: str

    def build(self) -> nn.Module:
        """Return the model, in eval mode, the same each time."""
        torch.manual_seed(0)
        model = Net(self.function)
        with torch.no_grad():
            model(*self.inputs(3))
        randomise(model)
        return model.eval()


def sample(
    targets: Any,
    function: Callable[..., Any],
    *shape: int,
    inputs: Callable[[int], tuple[Tensor, ...]] | None = None,
    groups: Sequence[int] | None = None,
    dynamic: bool = True,
    note: str = "",
    xfail: str = "",
) -> Sample:
    """Return a sample for one operator or several; its input is normal, with `shape` behind the batch, (5,) if none."""
    targets = tuple(targets) if isinstance(targets, list) else (targets,)
    name = "+".join(str(t).removeprefix("aten.") for t in targets) + (f"-{note}" if note else "")

    def normal(batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, *(shape or (5,)), generator=torch.Generator().manual_seed(batch)),)

    sizes = None if groups is None else tuple(sorted(groups))
    return Sample(targets, function, inputs or normal, sizes, dynamic, xfail, name)


def all_samples() -> list[Sample]:
    """Return the samples of every family."""
    import importlib

    found: list[Sample] = []
    for family in FAMILIES:
        found += importlib.import_module(f"rules.samples_{family}").SAMPLES
    return found
