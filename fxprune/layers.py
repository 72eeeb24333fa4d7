"""Which operators become which `torch.nn` layers in the emitted module.

An operator becomes a layer where its weights are parameters named `X.weight`, `X.bias`, ... and nothing else: then the
layer `X` is an ordinary torch.nn one, whatever class it was. Everything else stays a call of the operator on
parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Layer:
    """How to build one kind of layer.

    Attributes:
        tensors: operator argument -> name of the parameter or buffer in the layer.
        inputs: operator arguments that stay inputs of the layer.
        build: (tensors by their name in the layer, the other arguments by name) -> the layer on the meta device.
    """

    tensors: dict[str, str]
    inputs: tuple[str, ...]
    build: Callable[[dict[str, Tensor], dict[str, Any]], nn.Module]


def _linear(t: dict[str, Tensor], _: dict[str, Any]) -> nn.Module:
    out, into = t["weight"].shape
    return nn.Linear(into, out, bias="bias" in t, device="meta")


def _convolution(rank: int, transposed: bool = False) -> Callable[[dict[str, Tensor], dict[str, Any]], nn.Module]:
    classes: list[Any] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
    if transposed:
        classes = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]

    def build(t: dict[str, Tensor], a: dict[str, Any]) -> nn.Module:
        weight, groups = t["weight"], a["groups"]
        channels = (
            (weight.shape[0], weight.shape[1] * groups) if transposed else (weight.shape[1] * groups, weight.shape[0])
        )

        def every(value: Any) -> Any:
            """One number for each spatial dimension; operators accept a single one for all."""
            if isinstance(value, str):
                return value
            values = tuple(value) if isinstance(value, list | tuple) else (value,)
            return values * rank if len(values) == 1 else values

        extra = {"output_padding": every(a["output_padding"])} if transposed else {}
        layer: nn.Module = classes[rank - 1](
            *channels,
            tuple(weight.shape[2:]),
            stride=every(a["stride"]),
            padding=every(a["padding"]),
            dilation=every(a["dilation"]),
            groups=groups,
            bias="bias" in t,
            device="meta",
            **extra,
        )
        return layer

    return build


def _batch_norm(t: dict[str, Tensor], a: dict[str, Any]) -> nn.Module:
    classes: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    layer: nn.Module = classes[a["rank"]](
        a["channels"],
        eps=a["eps"],
        momentum=a["momentum"],
        affine="weight" in t,
        track_running_stats="running_mean" in t,
        device="meta",
    )
    return layer


def _instance_norm(t: dict[str, Tensor], a: dict[str, Any]) -> nn.Module:
    classes: dict[int, Any] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
    layer: nn.Module = classes[a["rank"]](
        a["channels"],
        eps=a["eps"],
        momentum=a["momentum"],
        affine="weight" in t,
        track_running_stats="running_mean" in t,
        device="meta",
    )
    return layer


def _layer_norm(t: dict[str, Tensor], a: dict[str, Any]) -> nn.Module:
    shape = a["normalized_shape"]
    return nn.LayerNorm(shape, a["eps"], elementwise_affine="weight" in t, bias="bias" in t, device="meta")


def _rms_norm(t: dict[str, Tensor], a: dict[str, Any]) -> nn.Module:
    return nn.RMSNorm(a["normalized_shape"], a["eps"], elementwise_affine="weight" in t, device="meta")


def _group_norm(t: dict[str, Tensor], a: dict[str, Any]) -> nn.Module:
    return nn.GroupNorm(a["num_groups"], a["channels"], a["eps"], affine="weight" in t, device="meta")


def _embedding(t: dict[str, Tensor], a: dict[str, Any]) -> nn.Module:
    rows, width = t["weight"].shape
    padding = a["padding_idx"] if a["padding_idx"] >= 0 else None
    return nn.Embedding(
        rows, width, padding, scale_grad_by_freq=a["scale_grad_by_freq"], sparse=a["sparse"], device="meta"
    )


def _prelu(t: dict[str, Tensor], _: dict[str, Any]) -> nn.Module:
    return nn.PReLU(t["weight"].numel(), device="meta")


_WEIGHTS = {"weight": "weight", "bias": "bias"}
_NORM = _WEIGHTS | {"running_mean": "running_mean", "running_var": "running_var"}

#: Operator overload -> the layer it becomes.
LAYERS: dict[Any, Layer] = {
    aten.linear.default: Layer(_WEIGHTS, ("input",), _linear),
    aten.batch_norm.default: Layer(_NORM, ("input",), _batch_norm),
    aten.instance_norm.default: Layer(_NORM, ("input",), _instance_norm),
    aten.layer_norm.default: Layer(_WEIGHTS, ("input",), _layer_norm),
    aten.rms_norm.default: Layer({"weight": "weight"}, ("input",), _rms_norm),
    aten.group_norm.default: Layer(_WEIGHTS, ("input",), _group_norm),
    aten.embedding.default: Layer({"weight": "weight"}, ("indices",), _embedding),
    aten.prelu.default: Layer({"weight": "weight"}, ("self",), _prelu),
    aten.conv_transpose1d.default: Layer(_WEIGHTS, ("input",), _convolution(1, transposed=True)),
    aten.conv_transpose2d.input: Layer(_WEIGHTS, ("input",), _convolution(2, transposed=True)),
    aten.conv_transpose3d.input: Layer(_WEIGHTS, ("input",), _convolution(3, transposed=True)),
}
for _rank in (1, 2, 3):
    for _overload in ("default", "padding"):
        LAYERS[getattr(getattr(aten, f"conv{_rank}d"), _overload)] = Layer(_WEIGHTS, ("input",), _convolution(_rank))

#: Operators that are a whole torch.nn module of several weights, and its class. Their states come and go in a tuple.
RECURRENT: dict[Any, Any] = {
    aten.lstm.input: nn.LSTM,
    aten.gru.input: nn.GRU,
    aten.rnn_tanh.input: nn.RNN,
    aten.rnn_relu.input: nn.RNN,
}
_RNN_ARGUMENTS = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")


def recurrent(target: Any, sizes: tuple[int, int, int], a: dict[str, Any], dropout_rate: float) -> nn.RNNBase:
    """Return the recurrent layer of an operator on the meta device; sizes of input, hidden state and projection."""
    extra: dict[str, Any] = {"proj_size": sizes[2]} if target is aten.lstm.input else {}
    if RECURRENT[target] is nn.RNN:
        extra = {"nonlinearity": "relu" if target is aten.rnn_relu.input else "tanh"}
    layer: nn.RNNBase = RECURRENT[target](
        sizes[0],
        sizes[1],
        a["num_layers"],
        bias=a["has_biases"],
        batch_first=a["batch_first"],
        dropout=dropout_rate,
        bidirectional=a["bidirectional"],
        device="meta",
        **extra,
    )
    return layer


def refresh(layer: nn.Module) -> None:
    """Let a recurrent layer, which keeps a second list of its weights, see those that were put into it."""
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()


def constructor_arguments(layer: nn.Module) -> dict[str, Any]:
    """Return the arguments that a torch.nn layer of the same shape is made with.

    >>> constructor_arguments(nn.Linear(3, 4, bias=False))
    {'in_features': 3, 'out_features': 4, 'bias': False}
    """
    if isinstance(layer, nn.PReLU):
        return {"num_parameters": layer.weight.numel()}
    if isinstance(layer, nn.RNNBase):
        own = {nn.LSTM: "proj_size", nn.RNN: "nonlinearity"}.get(type(layer))
        return {name: getattr(layer, name) for name in (*_RNN_ARGUMENTS, *((own,) if own else ()))}
    names = [n for n in inspect.signature(type(layer).__init__).parameters if not n.startswith("_")]
    values = {n: getattr(layer, n) for n in names if n not in ("self", "device", "dtype")}
    return {n: v is not None if n == "bias" else v for n, v in values.items()}


#: Layers without weights that behave differently in training.
DROPOUTS: dict[Any, Any] = {
    aten.dropout.default: nn.Dropout,
    aten.feature_dropout.default: nn.Dropout2d,
    aten.alpha_dropout.default: nn.AlphaDropout,
    aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
}


def dropout(target: Any, rank: int) -> Any:
    """Return the dropout layer for an operator on a tensor of this many dimensions.

    >>> dropout(aten.feature_dropout.default, 3)
    <class 'torch.nn.modules.dropout.Dropout1d'>
    """
    if target is aten.feature_dropout.default:
        return {3: nn.Dropout1d, 5: nn.Dropout3d}.get(rank, nn.Dropout2d)
    return DROPOUTS[target]
