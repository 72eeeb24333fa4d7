"""What a criterion may ask of the model: sums over weights, and what data show of activations and gradients.

A criterion declares what it needs; `gather` makes one pass over the data for exactly that, for as many groups at a time
as the memory allows (`parts`), and `free` lets go of it. Under `torchrun` every process feeds its own data and the sums
are added up over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from fxprune.analyse import Analysis
from fxprune.axes import Dim, atoms
from fxprune.errors import InputError, NonFiniteError
from fxprune.groups import Group, positions
from fxprune.passes import gather
from fxprune.passes.calibration import Batch, Calibration
from fxprune.passes.consumers import Contraction, Read, Units, consumers, contractions, reads
from fxprune.passes.gather import Channels

Scores = npt.NDArray[np.float64]

#: What criteria can ask for, and what it is.
NEEDS = {
    "moments": "data: second moments of what each contraction reads",
    "activations": "data: sums over the activations of each channel",
    "gradients": "data and a loss: its mean gradient of each parameter",
    "sample_gradients": "data: the mean square of each parameter's gradient by sample",
    "mask_gradients": "data: the gradient of a factor on each unit by sample",
}
#: Bytes that statistics may take at a time.
MAX_MEMORY = 2 * 2**30


class Statistics:
    """Numbers about the dense model, computed when first asked for.

    Args:
        analysis: of the captured model.
        seed: for criteria that draw random numbers.
        data: calibration batches, for criteria that need them.
        max_memory: bytes that second moments, the largest of all, may take at a time.
        say: called with how far a pass over the data is.
    """

    def __init__(
        self,
        analysis: Analysis,
        seed: int = 0,
        data: Calibration | None = None,
        max_memory: float = MAX_MEMORY,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.analysis = analysis
        self.seed = seed
        self.data = data
        self.max_memory = max_memory
        self.say = say
        self._sums: dict[tuple[str, int, float], Scores] = {}
        self._reads: dict[Group, list[Read]] = {}
        self._gathered = gather.Gathered()
        #: Which rows of each contraction reach an output (padding does not), by portion of the data.
        self.relevant: dict[fx.Node, dict[int, Tensor]] = {}

    # ------------------------------------------------------------------ what data show
    @cached_property
    def contractions(self) -> list[Contraction]:
        """All products of activations with parameters."""
        return contractions(self.analysis)

    def consumers(self, group: Group) -> list[Contraction]:
        """Return the contractions that sum over a group's units."""
        return consumers(self.analysis, group, self.contractions)

    def reads(self, group: Group) -> list[Read]:
        """Return where a group's units are used up, by contractions or otherwise."""
        if group not in self._reads:
            self._reads[group] = reads(self.analysis, group, self.contractions)
        return self._reads[group]

    def units(self, group: Group, contraction: Contraction) -> Units:
        """Return which unit of a group each input of a contraction's matrices belongs to, or -1: (groups, in)."""
        dim = self.analysis.dims[contraction.operand][contraction.channel]
        return contraction.units(dim, group.axis, self.kernel(contraction))

    def kernel(self, contraction: Contraction) -> tuple[int, ...]:
        """Return the spatial shape of a contraction's weight, () for a linear layer."""
        return tuple(self.weight(contraction.weight).shape[2:]) if contraction.rank else ()

    def weight(self, name: str) -> Tensor:
        """Return a tensor of the model by name.

        Raises:
            InputError: it has no values (it is on the meta device).
        """
        tensor = self.analysis.captured.tensors[name].detach()
        if tensor.is_meta:
            raise InputError(f"'{name}' is on the meta device and has no values to rank; use criterion 'random'")
        return tensor

    def parts(self, groups: Sequence[Group], needs: Collection[str]) -> Iterator[list[Group]]:
        """Yield the groups in runs whose statistics fit into `max_memory` together; one group is always taken."""
        part: list[Group] = []
        counted: set[Contraction] = set()
        total = 0.0
        samples = self.data.samples if self.data is not None and "mask_gradients" in needs else 0
        for group in groups:
            read = set(self.consumers(group)) if "moments" in needs else set()
            rows = 8.0 * samples * group.size
            if part and total + rows + sum(self.moment_bytes(c) for c in read - counted) > self.max_memory:
                yield part
                part, counted, total = [], set(), 0.0
            part.append(group)
            total += rows + sum(self.moment_bytes(c) for c in read - counted)
            counted |= read
        if part:
            yield part

    def moment_bytes(self, contraction: Contraction) -> float:
        """Return the bytes that the second moments of a contraction take."""
        matrix = contraction.matrix(self.weight(contraction.weight))
        return 8.0 * matrix.shape[0] * (matrix.shape[2] + 1) ** 2

    def gather(self, groups: Iterable[Group], needs: Collection[str]) -> None:
        """Make the passes over the data that the needs take.

        Raises:
            InputError: there are needs and no data, or the loss's mean gradient is needed and there is no loss.
            NonFiniteError: an activation or a gradient is NaN or infinite.
        """
        if not needs:
            return
        if self.data is None:
            what = ", ".join(NEEDS[n].partition(": ")[2] for n in sorted(needs))
            raise InputError(
                f"this takes calibration data ({what}): pass `calibration`, a loader of inputs like the example's, or "
                "choose criterion 'magnitude', which needs none"
            )
        if "gradients" in needs and self.data.loss is None:
            raise InputError("the loss's gradients take a loss: pass `loss`, (output, labels) -> scalar")
        chosen = list(groups)
        read = list(dict.fromkeys(c for g in chosen for c in self.consumers(g)))
        self._gathered = gather.collect(self, self.data, read, chosen, needs)

    def free(self) -> None:
        """Let go of what was gathered."""
        self._gathered = gather.Gathered()

    def moment(self, contraction: Contraction) -> Tensor:
        """Return E[x x^T] of what a contraction reads, float64 (groups, in, in).

        Where the contraction has a bias, a constant 1 is the last entry of x.
        """
        return self._gathered.moments[contraction]

    def slope(self, contraction: Contraction) -> Tensor:
        """Return how much the objective depends on each result of a contraction, float64 (groups, out).

        The square of the objective's gradient, summed over a sample's rows, averaged over the samples: half of it times
        the mean squared error of the result is what the objective grows by (the diagonal of the Gauss-Newton matrix).
        """
        return self._gathered.slopes[contraction]

    @cached_property
    def activation_bytes(self) -> float:
        """Bytes of all activations of one sample of the example, which a backward pass keeps."""
        total = 0
        for node in self.analysis.captured.graph.nodes:
            shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
            if node.op == "call_function" and isinstance(shape, tuple) and isinstance(dtype, torch.dtype):
                total += math.prod(s if isinstance(s, int) else max(s) for s in shape) * dtype.itemsize
        return total / max(Batch(self.analysis.captured.inputs).size, 1)

    def activation(self, node: fx.Node, dim: int) -> Channels:
        """Return sums over an activation, by index of one of its dimensions."""
        return self._gathered.channels[node, dim % len(self.analysis.dims[node])]

    def gradient(self, name: str) -> Tensor:
        """Return the loss's gradient of a parameter, averaged over the samples, in the parameter's shape, float64."""
        return self._gathered.gradients[name]

    def squared_gradient(self, name: str) -> Tensor:
        """Return the mean over samples of the squared gradient of a parameter, in its shape, float64."""
        return self._gathered.squared[name]

    def mask_gradient(self, group: Group) -> Scores:
        """Return the objective's gradient with respect to a factor on each unit, where it is read: (samples, units).

        Samples whose objectives can be told apart have a row each; of a model whose batch is fixed, batches have.
        """
        return self._gathered.masks[group.name]

    @property
    def differentiated(self) -> list[str]:
        """The parameters whose gradients were gathered."""
        return list(self._gathered.gradients)

    def once(self, name: str, make: Callable[[], float]) -> float:
        """Return a number that is computed once for what was gathered."""
        if name not in self._gathered.known:
            self._gathered.known[name] = make()
        return self._gathered.known[name]

    def dim(self, node: fx.Node, number: int) -> Dim:
        """Return a dimension of an activation."""
        dim: Dim = self.analysis.dims[node][number]
        return dim

    def places(self, group: Group) -> list[tuple[fx.Node, int]]:
        """Return each (activation, dimension) that a group's units are read from, once."""
        found = [p for r in self.reads(group) for p in ((r.operand, r.dim), r.other) if p is not None]
        return list(dict.fromkeys(found))

    def by_unit(self, group: Group, dim: Dim, values: Scores) -> Scores:
        """Return the sum of values along a dimension over the entries of each unit, (units,)."""
        total = np.zeros(group.size)
        for units in positions(dim, group.axis):
            inside = units >= 0
            total += np.bincount(units[inside], weights=values[inside], minlength=group.size)
        return total

    def parameters(self, group: Group) -> list[tuple[str, int]]:
        """Return (name, dimension) of all parameters that a group cuts."""
        tensors = self.analysis.captured.tensors
        return [(n, d) for n, d in group.members if isinstance(tensors[n], nn.Parameter)]

    def weight_sum(self, group: Group, value: Callable[[str], Tensor]) -> Scores:
        """Return the sum over all weights that each unit cuts of a tensor of the same shape as the parameter, (units,).

        Matrices, kernels and vectors count.
        """
        total = np.zeros(group.size)
        for name, dim in self.parameters(group):
            sums = (moved := value(name).double().movedim(dim, 0)).reshape(len(moved), -1).sum(1).cpu().numpy()
            total += self.by_unit(group, self.analysis.tensors[name][dim], sums)
        return total

    def column_power(self, contraction: Contraction, p: float) -> Scores:
        """Return the sum of |w|^p over all weights that read each channel of a contraction's operand, (channels,)."""
        weight = self.weight(contraction.weight)
        matrix = contraction.matrix(weight).abs().double() ** p
        kernel = max(int(np.prod(self.kernel(contraction))), 1)
        return matrix.sum(1).reshape(-1, kernel).sum(1).cpu().numpy()

    # ------------------------------------------------------------------ weights
    def weight_sums(self, name: str, dim: int, p: float) -> Scores:
        """Return the sum of |w|^p over all other dimensions of a parameter, one number for each index of `dim`.

        `dim` is one that a group cuts.

        Raises:
            NonFiniteError: the parameter holds NaN or infinity.
            InputError: the parameter has no values (it is on the meta device).
        """
        if (name, 0, p) not in self._sums:
            self._sum(name, p)
        return self._sums[name, dim, p]

    def _sum(self, name: str, p: float) -> None:
        """Fill the sums of all dimensions of one parameter: |w|^p is computed once, kernels are summed first."""
        tensor = self.weight(name)
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        power = tensor * tensor if p == 2 else tensor.abs() ** p
        if power.dim() > 3 and not any(True for d in self.analysis.tensors[name][2:] for _ in atoms(d)):
            power = power.flatten(2).sum(2)  # the kernel, which nothing cuts
        for dim in range(power.dim()):
            sums = power.sum([d for d in range(power.dim()) if d != dim]) if power.dim() > 1 else power
            values = sums.double().cpu().numpy()
            if not np.isfinite(values).all():
                raise NonFiniteError(
                    f"'{name}' holds NaN or infinite values (first at index {int(np.argmin(np.isfinite(values)))} of "
                    f"dimension {dim}); mend the weights, or list the module under `keep`"
                )
            self._sums[name, dim, p] = values

    def weight_power(self, group: Group, p: float) -> Scores:
        """Return sum |w|^p over all weights that each unit of the group cuts, shape (units,).

        Matrices and kernels count; vectors (biases, norms) only where the group cuts nothing else.
        """
        tensors = self.analysis.captured.tensors
        members = self.parameters(group)
        matrices = [(n, d) for n, d in members if tensors[n].dim() > 1]
        total = np.zeros(group.size)
        for name, dim in matrices or members:
            total += self.by_unit(group, self.analysis.tensors[name][dim], self.weight_sums(name, dim, p))
        return total

    def weight_count(self, group: Group) -> float:
        """Return how many weights one unit of the group cuts."""
        tensors = self.analysis.captured.tensors
        return sum(tensors[n].numel() / math.prod((group.size,)) for n, _ in group.members if n in tensors)
