"""2:4 weights: the pattern, the rows that layers see, and the choice, with kernels and times made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from fxprune.backends.sparse import LayerChoice, choose, count_rows, holds_pattern
from fxprune.backends.timing import Comparison, Latency


def halved(layer: nn.Linear) -> nn.Linear:
    """Keep the two largest of every four weights, in half precision."""
    groups = layer.weight.detach().unflatten(1, (-1, 4))
    keep = torch.zeros_like(groups).scatter_(2, groups.abs().topk(2, dim=2).indices, 1.0)
    layer.weight = nn.Parameter((groups * keep).flatten(1))
    return layer.half()


def times(**seconds: float) -> Callable[[Mapping[str, Callable[[], object]]], Comparison]:
    """Return a timer that finds these times, whatever it is given."""

    def timer(calls: Mapping[str, Callable[[], object]]) -> Comparison:
        return Comparison("dense", {name: Latency((seconds[name],) * 6, 1) for name in calls}, 1)

    return timer


def marked(weight: Tensor, kernel: str, rows: int) -> Tensor:
    """Stand in for a compressed weight: one that can be told from the dense one."""
    return weight.clone()


def refusing(weight: Tensor, kernel: str, rows: int) -> Tensor:
    if kernel == "cusparselt":
        raise RuntimeError("cuSPARSELt not supported on your machine.\nat some line")
    return weight.clone()


@pytest.mark.parametrize(
    ("weight", "holds"),
    [
        (torch.tensor([[1.0, 2, 0, 0, 0, 3, 0, 4]]), True),
        (torch.tensor([[0.0, 1, 2, 0], [1, 1, 1, 0]]), False),  # one row is enough to break it
        (torch.tensor([[0.0, 0, 1, 1, 1, 0, 0, 0]]), True),  # three in a row, but in two groups
        (torch.zeros(2, 6), False),  # groups would not end where the row does
        (torch.zeros(4), False),
        (torch.zeros(3, 8, 3, 3), True),
    ],
)
def test_the_pattern_is_in_groups_of_four_along_the_inputs(weight: Tensor, holds: bool) -> None:
    assert holds_pattern(weight) == holds


def test_the_pattern_of_a_convolution_runs_along_its_channels() -> None:
    weight = torch.zeros(2, 8, 3, 3)
    weight[:, :2] = 1
    assert holds_pattern(weight)
    weight[0, 3, 1, 1] = 1
    assert not holds_pattern(weight)


def test_other_patterns() -> None:
    weight = torch.tensor([[1.0, 0, 0, 0, 0, 0, 1, 0]])
    assert holds_pattern(weight, 1, 4) and holds_pattern(weight, 2, 8)
    assert not holds_pattern(weight, 1, 8)


def test_rows_are_the_most_that_a_layer_sees_and_the_hooks_are_gone() -> None:
    layer = nn.Linear(4, 4)

    def run() -> None:
        layer(torch.zeros(2, 4))
        layer(torch.zeros(3, 5, 4))

    assert count_rows(layer, run) == {"": 15}
    assert not layer._forward_hooks


def test_a_layer_becomes_sparse_only_where_that_is_faster() -> None:
    net = nn.Sequential(halved(nn.Linear(8, 4)), nn.Linear(4, 4).half(), halved(nn.Linear(8, 4)))
    dense = net[0].weight
    fast = times(dense=2.0, cusparselt=1.5, cutlass=1.0)
    chosen = choose(net, {"0": 64, "1": 64, "2": 64}, False, fast, marked)
    assert [(c.layer, c.kernel, c.shape, c.rows) for c in chosen] == [
        ("0", "cutlass", (4, 8), 64),
        ("2", "cutlass", (4, 8), 64),
    ]
    assert chosen[0].speedup == (2.0, 2.0, 2.0)
    assert net[0].weight is not dense and not net[0].weight.requires_grad
    slow = choose(net, {"0": 64}, False, times(dense=1.0, cusparselt=1.1, cutlass=1.0), marked)
    assert [(c.kernel, c.reason) for c in slow] == [(None, "cutlass is not faster")]
    assert json.loads(json.dumps(slow[0].to_json()))["shape"] == [4, 8]


def test_the_times_are_those_of_one_run_of_the_layer() -> None:
    net = nn.Sequential(halved(nn.Linear(8, 4)))
    (found,) = choose(net, {"0": 1}, False, times(dense=2e-2, cusparselt=1e-2, cutlass=3e-2), marked)
    assert (found.dense_ms, found.sparse_ms) == (pytest.approx(2.0), pytest.approx(1.0))  # ten runs in one call


def test_a_kernel_that_does_not_run_is_left_out_and_says_why() -> None:
    net = nn.Sequential(halved(nn.Linear(8, 4)))
    (found,) = choose(net, {"0": 1}, False, times(dense=2.0, cutlass=1.0), refusing)
    assert found.kernel == "cutlass"

    def none(weight: Tensor, kernel: str, rows: int) -> Tensor:
        raise RuntimeError(f"no {kernel} here\nand more")

    weight = net[0].weight
    (found,) = choose(net, {"0": 1}, False, times(), none)
    assert found == LayerChoice(
        "0", (4, 8), 1, reason="cusparselt: RuntimeError: no cusparselt here; cutlass: RuntimeError: no cutlass here"
    )
    assert net[0].weight is weight


def test_a_layer_that_cannot_be_timed_stays_dense() -> None:
    def broken(calls: Mapping[str, Callable[[], object]]) -> Comparison:
        raise RuntimeError("operation not permitted when stream is capturing")

    net = nn.Sequential(halved(nn.Linear(8, 4)))
    (found,) = choose(net, {"0": 1}, True, broken, marked)
    assert found.kernel is None
    assert found.reason == "cannot be timed: RuntimeError: operation not permitted when stream is capturing"


def test_float32_and_layers_that_never_ran_are_not_candidates() -> None:
    net = nn.Sequential(halved(nn.Linear(8, 4)).float(), halved(nn.Linear(8, 4)))
    assert choose(net, {"0": 1}, False, times(), marked) == []
