"""Network slimming: units whose norm has a small scale go first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import fx

from fxprune.axes import atoms
from fxprune.groups import Group
from fxprune.passes.registries import criterion
from fxprune.passes.scales import normalised
from fxprune.passes.statistics import Scores, Statistics
from fxprune.rules.core import bind

aten = torch.ops.aten
_BATCH = (aten.batch_norm.default,)
_OTHERS = (
    *(aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, aten.instance_norm.default),
    aten.mul.Tensor,
)


@criterion("bn_scale")
def bn_scale(group: Group, statistics: Statistics, *, normalize: str = "mean") -> Scores:
    """The size of the scale that the group's norms give to the unit: the mean of |gamma|.

    The mean is over all batch norms of the group and over all channels of the unit. Where there is no batch norm, it is
    over the scales of other norms, and over vectors that multiply activations. A group without any is ranked by
    magnitude (L2), divided by its mean. Liu et al., "Learning Efficient Convolutional Networks through Network
    Slimming" (2017); the scales tell most after training with an L1 penalty on them.

    Args:
        normalize: what scores are divided by to be comparable across groups: the group's mean, max, or none, as in the
            paper.
    """
    found = scales(group, statistics)
    if not found:
        return normalised(np.sqrt(statistics.weight_power(group, 2)), "mean", "bn_scale")
    total, count = np.zeros(group.size), np.zeros(group.size)
    for name, _ in found:
        dim = statistics.analysis.tensors[name][0]
        gamma = statistics.weight(name).double().abs().cpu().numpy()
        total += statistics.by_unit(group, dim, gamma)
        count += statistics.by_unit(group, dim, np.ones(len(gamma)))
    return normalised(total / count, normalize, "bn_scale")


def scales(group: Group, statistics: Statistics) -> list[tuple[str, str | None]]:
    """Return (scale, shift) by name of the batch norms that a group goes through, or of other norms and scales."""
    for targets in (_BATCH, _OTHERS):
        found = list(dict.fromkeys(_scales(group, statistics, targets)))
        if found:
            return found
    return []


def _scales(group: Group, statistics: Statistics, targets: tuple[object, ...]) -> Iterator[tuple[str, str | None]]:
    vectors = {n for n, _ in statistics.parameters(group) if statistics.weight(n).dim() == 1}
    for node in statistics.analysis.captured.graph.nodes:
        if node.target not in targets:
            continue
        named, _ = bind(node.target, node.args, dict(node.kwargs))
        weights = [named["self"], named["other"]] if node.target is aten.mul.Tensor else [named["weight"]]
        for weight in map(_vector, weights):
            if weight in vectors and any(True for _ in atoms(statistics.analysis.tensors[weight][0])):
                bias = _vector(named.get("bias"))
                yield weight, bias if bias in vectors else None


def _vector(node: object) -> str | None:
    """The name of the tensor that a node holds, as it is or reshaped."""
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None
