"""Running the captured dense graph on calibration batches, and looking at values on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxprune.analyse import Analysis
from fxprune.errors import NonFiniteError
from fxprune.groups import describe
from fxprune.kept import Kept
from fxprune.passes.calibration import Batch, Calibration, apply_loss
from fxprune.prove import Reference, dense_weights

#: Called with a value.
Look = Callable[[Tensor], None]
#: A node, and one of its operands as it alone reads it: a tensor of its own, whose gradient is that of this use.
Use = tuple[fx.Node, fx.Node]


class Observer(Reference):
    """Runs the dense graph as it is, in the model's own precision, and shows some values.

    Raises NonFiniteError where one of these is NaN or infinite.
    """

    def __init__(
        self,
        analysis: Analysis,
        looks: Mapping[fx.Node, Look],
        weights: Callable[[str], Tensor] | None = None,
        uses: Mapping[Use, Look] | None = None,
    ) -> None:
        super().__init__(analysis, Kept({}), weights or dense_weights(analysis.captured), None)
        self.looks = dict(looks)
        self.uses: dict[fx.Node, list[tuple[fx.Node, Look]]] = {}
        for (node, operand), look in (uses or {}).items():
            self.uses.setdefault(node, []).append((operand, look))

    def run_node(self, n: fx.Node) -> Any:
        """Return the node's value, and show it and its operands where they are to be looked at."""
        shared = {operand: self.env[operand] for operand, _ in self.uses.get(n, ())}
        for operand, look in self.uses.get(n, ()):
            self.env[operand] = shared[operand].view_as(shared[operand])
            _show(operand, look, self.env[operand])
        value = super().run_node(n)
        self.env.update(shared)
        if n in self.looks:
            _show(n, self.looks[n], value)
        return value


def _show(node: fx.Node, look: Look, value: Any) -> None:
    if not isinstance(value, Tensor):
        return
    if value.is_floating_point() and not bool(torch.isfinite(value.detach().sum(dtype=torch.float64))):
        raise NonFiniteError(f"calibration: {describe(node)} holds NaN or infinite values")
    look(value)


def observe(analysis: Analysis, batches: list[Batch], looks: Mapping[fx.Node, Look]) -> None:
    """Show the values of some nodes, batch after batch; no gradients."""
    observer = Observer(analysis, looks)
    with torch.no_grad():
        for batch in batches:
            observer.run(batch.inputs)


def output_of(analysis: Analysis, outputs: list[Any]) -> Any:
    """The model's output from the graph's flat ones."""
    return pytree.tree_unflatten(outputs, analysis.captured.out_spec)


def objective(analysis: Analysis, calibration: Calibration, batch: Batch, outputs: list[Any], seed: int) -> Tensor:
    """Return the scalar whose gradients say what matters, summed over the batch's samples.

    It is the user's loss (a mean over the batch, as losses are, times the number of samples). Without one it is the
    output's projection on random directions, one for each of its numbers: the expected square of the gradient is then
    the Gauss-Newton curvature of the squared error to the dense model's output, whose own gradient is zero.

    Raises:
        InputError: the loss fails, is no scalar, or does not depend on the output.
        NonFiniteError: the loss is NaN or infinite.
    """
    if calibration.loss is not None:
        outputs = [_reachable(output) for output in outputs]
        return apply_loss(calibration.loss, output_of(analysis, outputs), batch.labels) * batch.size
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for output in outputs:
        if isinstance(output, Tensor) and output.is_floating_point() and output.requires_grad:
            noise = torch.randn(output.shape, generator=generator) / (output.numel() / batch.size) ** 0.5
            total = total + (output.float() * noise.to(output.device)).sum()
    return total


def _reachable(output: Any) -> Any:
    """An output that gradients reach, so that a loss can be seen to depend on it."""
    if not isinstance(output, Tensor) or output.requires_grad or not output.is_floating_point():
        return output
    return output.detach().requires_grad_()
