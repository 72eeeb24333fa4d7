"""Recurrent layers as one operator: LSTM, GRU and plain RNNs of any depth and direction, and their single cells.

The gates lie one behind the other in the rows of each weight, `gates` rows for each hidden unit. All layers of one
operator take their states from one tensor, so that they share one hidden size, and one axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fxprune.axes import Dim, Fixed, concat, product, size_of
from fxprune.rules.core import Dims, Site, aten, rule

#: Operator -> how many gates it has.
GATES: dict[Any, int] = {
    aten.lstm.input: 4,
    aten.gru.input: 3,
    aten.rnn_tanh.input: 1,
    aten.rnn_relu.input: 1,
    aten.lstm_cell.default: 4,
    aten.gru_cell.default: 3,
    aten.rnn_tanh_cell.default: 1,
    aten.rnn_relu_cell.default: 1,
}


def weights(params: Sequence[Any], has_biases: bool, cells: int) -> Iterator[tuple[Any, Any, list[Any], Any]]:
    """Yield (w_ih, w_hh, biases, projection or None) of every layer and direction from the flat list of an operator."""
    each = len(params) // cells
    for i in range(cells):
        w_ih, w_hh, *rest = params[i * each : (i + 1) * each]
        biases = rest[:2] if has_biases else []
        projection = rest[len(biases) :]
        yield w_ih, w_hh, biases, projection[0] if projection else None


def _cell(site: Site, x: Dim, w_ih: Dims, w_hh: Dims, biases: Sequence[Dims], hidden: Dim, state: Dim) -> None:
    """x (in), w_ih (gates * hidden, in), w_hh (gates * hidden, state), biases (gates * hidden)."""
    site.unify(w_ih[1], x)
    site.unify(w_hh[1], state)
    gates = GATES[site.node.target]
    for rows in (w_ih[0], w_hh[0], *(b[0] for b in biases)):
        site.unify(rows, product([Fixed(gates, "gates of a recurrent layer"), hidden]))


def _layers(
    site: Site,
    x: Dims,
    states: Sequence[Dims],
    params: Sequence[Dims],
    has_biases: bool,
    layers: int,
    bidirectional: bool,
) -> list[Dims]:
    """x (L, N, in) or (N, L, in), states (layers * directions, N, hidden) -> the output and the last states."""
    for d in x[:-1]:
        site.freeze(d, "it is a batch or a sequence of steps")
    for s in states:
        for d in s[:-1]:
            site.freeze(d, "it is a layer, or a batch")
    state, hidden = states[0][-1], states[-1][-1]  # they differ in size where there is a projection
    directions = 2 if bidirectional else 1
    cells = list(weights(params, has_biases, layers * directions))
    width = size_of(state)
    if cells[0][3] is None:
        site.unify(state, hidden)
    elif isinstance(width, int):
        site.at_least(hidden, width + 1)  # the operator takes two states of one size for no projection
    into, steps = x[-1], x[:-1]
    for i in range(layers):
        for w_ih, w_hh, biases, projection in cells[i * directions : (i + 1) * directions]:
            _cell(site, into, w_ih, w_hh, biases, hidden, state)
            site.multiply(*steps, *w_ih)
            site.multiply(*steps, *w_hh)
            if projection is not None:  # (state, hidden)
                site.unify(projection[0], state)
                site.unify(projection[1], hidden)
                site.multiply(*steps, *projection)
        into = concat([state] * directions)
    return [(*steps, into), *states]


@rule(aten.lstm.input)
def lstm(
    site: Site,
    x: Dims,
    states: Sequence[Dims],
    params: Sequence[Dims],
    has_biases: bool,
    layers: int,
    _dropout: float,
    _train: bool,
    bidirectional: bool,
    *_: Any,
) -> list[Dims]:
    """The states are (layers * directions, N, projection or hidden) and (layers * directions, N, hidden)."""
    return _layers(site, x, states, params, has_biases, layers, bidirectional)


@rule(aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def gru(
    site: Site,
    x: Dims,
    state: Dims,
    params: Sequence[Dims],
    has_biases: bool,
    layers: int,
    _dropout: float,
    _train: bool,
    bidirectional: bool,
    *_: Any,
) -> list[Dims]:
    """One state (layers * directions, N, hidden)."""
    return _layers(site, x, [state], params, has_biases, layers, bidirectional)


@rule(aten.lstm_cell.default)
def lstm_cell(
    site: Site,
    x: Dims,
    states: Sequence[Dims],
    w_ih: Dims,
    w_hh: Dims,
    b_ih: Dims | None = None,
    b_hh: Dims | None = None,
) -> list[Dims]:
    """x (N, in), states (N, hidden) twice -> the same twice."""
    hidden = site.unify(states[0][-1], states[1][-1])
    _cell(site, x[-1], w_ih, w_hh, [b for b in (b_ih, b_hh) if b is not None], hidden, hidden)
    site.multiply(*x[:-1], *w_ih)
    site.multiply(*x[:-1], *w_hh)
    return [(*x[:-1], hidden)] * 2


@rule(aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
def gru_cell(
    site: Site, x: Dims, state: Dims, w_ih: Dims, w_hh: Dims, b_ih: Dims | None = None, b_hh: Dims | None = None
) -> Dims:
    """x (N, in), state (N, hidden) -> (N, hidden)."""
    hidden = state[-1]
    _cell(site, x[-1], w_ih, w_hh, [b for b in (b_ih, b_hh) if b is not None], hidden, hidden)
    site.multiply(*x[:-1], *w_ih)
    site.multiply(*x[:-1], *w_hh)
    return (*x[:-1], hidden)
