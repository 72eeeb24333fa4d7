"""Samples for recurrent layers and cells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rules import Net, Sample, aten, sample

LSTM, GRU, RNN, RELU = aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input


def _layer(target: Any, make: Any, groups: list[int], note: str, *, last: bool = False) -> Sample:
    """A linear layer into a recurrent one of 6 hidden units; its output, or its last states, into another."""

    def function(net: Net, x: Tensor) -> Tensor:
        y, state = net.layer(lambda: make(7))(net.linear(x, 7).tanh())
        if last:
            y = torch.cat([s.transpose(0, 1).flatten(1) for s in (state if isinstance(state, tuple) else (state,))], 1)
        return net.linear(y, 3)

    return sample(target, function, 4, 5, groups=groups, note=note)


def _given(net: Net, x: Tensor) -> Tensor:
    """The first state comes from a layer of its own."""
    start = net.linear(x.mean(1), 6).unsqueeze(0)
    y, _ = net.layer(lambda: nn.GRU(5, 6, batch_first=True))(x, start)
    return net.linear(y, 3)


def _cell(make: Any, *, two: bool = False) -> Any:
    """Three steps of a cell, written out."""

    def function(net: Net, x: Tensor) -> Tensor:
        cell = net.layer(lambda: make(5, 6))
        state: Any = (net.linear(x[:, 0], 6), net.linear(x[:, 1], 6)) if two else net.linear(x[:, 0], 6)
        for step in range(3):
            state = cell(x[:, step], state)
        return net.linear(state[0] if two else state, 3)

    return function


def _options(**options: Any) -> Any:
    return lambda width: nn.LSTM(width, 6, batch_first=True, **options)


SAMPLES = [
    _layer(LSTM, _options(), [7, 6], "one layer"),
    _layer(LSTM, _options(num_layers=2, bidirectional=True), [7, 6], "two layers, both directions"),
    _layer(LSTM, _options(num_layers=2, bias=False), [7, 6], "without biases"),
    _layer(LSTM, _options(num_layers=2, proj_size=4, bidirectional=True), [7, 6, 4], "projected"),
    _layer(LSTM, _options(num_layers=2), [7, 6], "last states", last=True),
    _layer(GRU, lambda width: nn.GRU(width, 6, batch_first=True, bidirectional=True), [7, 6], "both directions"),
    _layer(GRU, lambda width: nn.GRU(width, 6, num_layers=2, batch_first=True), [7, 6], "last state", last=True),
    sample(GRU, _given, 4, 5, groups=[6], note="first state given"),
    _layer(RNN, lambda width: nn.RNN(width, 6, batch_first=True), [7, 6], "one layer"),
    _layer(RELU, lambda width: nn.RNN(width, 6, batch_first=True, nonlinearity="relu"), [7, 6], "one layer"),
    sample(aten.lstm_cell.default, _cell(nn.LSTMCell, two=True), 4, 5, groups=[6]),
    sample(aten.gru_cell.default, _cell(nn.GRUCell), 4, 5, groups=[6]),
    sample(aten.rnn_tanh_cell.default, _cell(nn.RNNCell), 4, 5, groups=[6]),
    sample(aten.rnn_relu_cell.default, _cell(lambda i, o: nn.RNNCell(i, o, nonlinearity="relu")), 4, 5, groups=[6]),
]
