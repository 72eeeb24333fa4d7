"""What the model's output loses at given widths: the pruned model is put together and run on a few calibration samples.

Every layer that reads a cut group gets the weights that fit the dense layer's results best on the dense model's inputs
(a closed form in second moments that were gathered once; solutions are kept, because searches come back to the same
widths). Compare "stitched" models in Frantar and Alistarh, "SPDY" (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.analyse import Analysis
from fxprune.kept import Kept
from fxprune.passes.calibration import Calibration
from fxprune.passes.consumers import Contraction
from fxprune.passes.gather import pieces, portions
from fxprune.passes.obs import refit
from fxprune.passes.outputs import Outputs
from fxprune.passes.statistics import Statistics
from fxprune.rewrite import Rewritten, rewrite

#: So many samples are looked at, from all over the data in pieces of so many.
SAMPLES = 64
_PIECE = 16


def some_samples(analysis: Analysis, data: Calibration, count: int = SAMPLES) -> Calibration:
    """Return about so many samples, or all: evenly from the whole of the data, whose loader may have sorted them."""
    if data.samples <= count:
        return data
    every = [piece for batch in data.batches for piece in pieces(analysis.captured, batch, _PIECE)]
    number = max(1, round(count * len(every) / data.samples))
    places = np.unique(np.linspace(0, len(every) - 1, number).round().astype(int))
    return Calibration([every[i] for i in places], data.loss, data.random)


@dataclass
class Trial:
    """Called with what is kept, returns the squared error of the outputs relative to their variance."""

    analysis: Analysis
    model: nn.Module
    data: Calibration
    max_memory: float
    _solved: dict[tuple[str, bytes], Tensor] = field(default_factory=dict)
    _known: dict[bytes, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.statistics = Statistics(self.analysis, 0, some_samples(self.analysis, self.data), self.max_memory)
        assert self.statistics.data is not None
        self.outputs = Outputs(self.analysis, list(portions(self.statistics, self.statistics.data)))
        self.moments = self._moments()

    def _moments(self) -> dict[Contraction, Tensor]:
        """Second moments of as many contractions as fit into the memory, in the order of the graph."""
        from fxprune.passes import gather

        chosen, total = [], 0.0
        for c in self.statistics.contractions:
            total += self.statistics.moment_bytes(c)
            if total <= self.max_memory:
                chosen.append(c)
        whole = Statistics(self.analysis, 0, self.data, self.max_memory)
        return gather.collect(whole, self.data, chosen, [], {"moments"}).moments

    def __call__(self, kept: Kept) -> float:
        """Return the error of the pruned model; infinity where it gives something that is not finite."""
        key = b"".join(ix.tobytes() + b"|" for _, ix in kept.items())
        key += b"|".join(sorted(node.name.encode() for node in kept.removed))
        if key not in self._known:
            self._known[key] = self._error(kept)
        return self._known[key]

    def _error(self, kept: Kept) -> float:
        rewritten = rewrite(self.analysis, kept, self.model)
        self._stitch(kept, rewritten)
        interpreter = fx.Interpreter(rewritten.module.eval())
        return self.outputs(lambda inputs: interpreter.run(*inputs, enable_io_processing=False))

    def _stitch(self, kept: Kept, rewritten: Rewritten) -> None:
        names = {dense: small for small, dense in rewritten.names.items()}
        for c, moment in self.moments.items():
            into = self.analysis.dims[c.operand][c.channel]
            name = names.get(c.weight)
            if not kept.cut(into) or name is None or c.node not in rewritten.nodes or c.groups != 1:
                continue
            weight = self._fitted(c, moment, kept)
            out = self.analysis.dims[c.node][c.channel]
            rows = torch.from_numpy(kept.index(out)) if kept.cut(out) else slice(None)
            parameter = rewritten.module.get_parameter(name)
            has_bias = c.bias is not None and c.bias in names
            matrix = weight[rows]
            columns = matrix[:, :-1] if c.bias is not None else matrix
            parameter.data = c.tensor(columns.unsqueeze(0), parameter.shape).to(parameter.dtype).contiguous()
            if has_bias:
                bias = rewritten.module.get_parameter(names[str(c.bias)])
                bias.data = matrix[:, -1].to(bias.dtype).contiguous()

    def _fitted(self, c: Contraction, moment: Tensor, kept: Kept) -> Tensor:
        """The weights on the kept inputs that give the dense results best, (out, kept inputs and bias)."""
        into = self.analysis.dims[c.operand][c.channel]
        kernel = self.statistics.kernel(c)
        index = kept.index(into)
        key = (c.weight, index.tobytes())
        if key not in self._solved:
            each = 1
            for k in kernel:
                each *= k
            columns = (torch.from_numpy(index)[:, None] * each + torch.arange(each)).reshape(-1)
            weight = c.matrix(self.statistics.weight(c.weight))[0].double()
            if c.bias is not None:
                weight = torch.cat([weight, self.statistics.weight(c.bias).double().unsqueeze(1)], 1)
                columns = torch.cat([columns, torch.tensor([weight.shape[1] - 1])])
            h = moment[0]
            self._solved[key] = refit(weight[:, columns], h[columns][:, columns], weight @ h[:, columns])
        return self._solved[key]


def trial(analysis: Analysis, model: nn.Module, data: Calibration, max_memory: float) -> Callable[[Kept], float]:
    """Return the function that says what the outputs lose."""
    return Trial(analysis, model, data, max_memory)
