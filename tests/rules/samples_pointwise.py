"""Samples for operators that work element by element: one builder, and tables of what the operators can take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxprune import rules as table
from fxprune.rules import RULES
from fxprune.rules.pointwise import pointwise, type_as
from rules import Net, Sample, aten, sample

table.load()

#: What an operator's tensor operands must be, where any number will not do; or (operator, argument) for one operand.
DOMAINS = {
    **dict.fromkeys(("acos", "asin", "atanh", "erfinv"), "unit"),
    **dict.fromkeys(
        ("digamma", "lgamma", "log", "log10", "log1p", "log2", "pow", "rsqrt", "sqrt", "xlogy"), "positive"
    ),
    **dict.fromkeys(("bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__"), "int"),
    **dict.fromkeys(("bitwise_left_shift", "bitwise_right_shift", "__lshift__", "__rshift__"), "shift"),
    **dict.fromkeys(("div", "divide", "true_divide", "floor_divide", "fmod", "remainder", "reciprocal"), "positive"),
    **dict.fromkeys(("logical_and", "logical_not", "logical_or", "logical_xor"), "bool"),
    "logit": "probability",
    "acosh": "above one",
    ("addcdiv", "tensor2"): "positive",
    ("ldexp", "other"): "shift",
    ("masked_fill", "mask"): "bool",
    ("where", "condition"): "bool",
    "bernoulli": "certain",
    **dict.fromkeys(("arccos", "arcsin", "arctanh"), "unit"),
    "special_ndtri": "probability",
    "arccosh": "above one",
    **dict.fromkeys(
        ("float_power", "igamma", "igammac", "polygamma", "special_entr", "special_gammaln", "special_xlog1py"),
        "positive",
    ),
    **dict.fromkeys(("poisson", "mvlgamma", "special_zeta"), "above one"),
    **dict.fromkeys(("gcd", "lcm"), "int"),
    **dict.fromkeys(
        (
            *("_conj", "conj", "conj_physical", "_conj_physical", "_neg_view", "resolve_conj", "resolve_neg"),
            *("imag", "isreal"),
        ),
        "complex",
    ),
}
#: Values of arguments that are no tensors and have no default, or whose default would show nothing.
VALUES: dict[Any, Any] = {
    "alpha": 2,
    "decimals": 1,
    "device": torch.device("cpu"),
    "dtype": torch.float32,
    "fill_value": 0.7,
    "generator": None,
    "max": 0.4,
    "min": -0.3,
    "p": 0.5,
    "rounding_mode": "floor",
    "threshold": 0.1,
    "train": False,
    ("bernoulli", "p"): 1.0,
    ("clamp", "min"): -0.3,
    "from": -1.0,
    "high": 5,
    "lambd": 1.0,
    "mean": 0.0,
    "median": 0.0,
    "sigma": 1.0,
    "std": 1.0,
    ("mvlgamma", "p"): 2,
    ("polygamma", "n"): 2,
    ("special_zeta", "self"): 2.0,
}
INTEGER = {"int", "shift"}
#: Their values are random or undefined: they may show up with no weight only.
ARBITRARY = {
    *("empty_like", "rand_like", "randn_like", "randint_like", "exponential", "geometric", "uniform"),
    *("normal_functional", "cauchy", "log_normal", "random", "poisson"),
}
#: Their second operand lends its dtype only.
LENDING = {aten.type_as.default, aten.to.other}


def _in_domain(h: Tensor, domain: str | None) -> Tensor:
    if domain == "positive":
        return h.abs() + 0.5
    if domain == "above one":
        return h.abs() + 1.1
    if domain == "unit":
        return h.tanh() * 0.9
    if domain == "probability":
        return h.sigmoid()
    if domain == "certain":
        return (h > 0).to(torch.float32)
    if domain == "bool":
        return h > 0
    if domain == "complex":
        return torch.complex(h, h.cos())
    if domain in INTEGER:
        return (h.abs() * 3 if domain == "shift" else h * 9).to(torch.int32)
    return h


def _arguments(target: Any, net: Net, x: Tensor, broadcast: bool) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of an operator: each tensor has eight channels of its own."""
    name = target.overloadpacket.__name__
    positional, keyword = [], {}
    for number, argument in enumerate(target._schema.arguments):
        domain = DOMAINS.get((name, argument.name), DOMAINS.get(name))
        if "Tensor" in str(argument.type):
            if argument.name == "value":  # masked_fill, fill: a tensor without dimensions
                value = net.parameter()
            elif broadcast and number:
                value = net.parameter(8).to(torch.float32)
            else:
                value = net.linear(x, 8)
            value = _in_domain(value, domain)
        elif (name, argument.name) in VALUES or argument.name in VALUES:
            value = VALUES.get((name, argument.name), VALUES.get(argument.name))
            value = int(value) if str(argument.type) == "number" and domain in INTEGER else value
        elif argument.has_default_value():
            value = argument.default_value
        else:
            value = 2 if domain in INTEGER else 0.6
        if argument.kwarg_only:
            keyword[argument.name] = value
        else:
            positional.append(value)
    return positional, keyword


def _sample(target: Any, broadcast: bool = False) -> Sample:
    name = target.overloadpacket.__name__

    def function(net: Net, x: Tensor) -> Tensor:
        args, kwargs = _arguments(target, net, x, broadcast)
        y = target(*args, **kwargs)
        if isinstance(y, tuple):
            y = y[0] * y[1]
        if name in ARBITRARY:
            y = y.fill_(0.5) if name == "empty_like" else (y * 0).nan_to_num(0.0)
        if name.endswith("_like"):
            y = y + args[0]
        y = y.real + y.imag if y.is_complex() else y.to(torch.float32)
        return net.linear(y * net.linear(x, 8).cos(), 3)  # `y` alone may be the same whatever x is

    groups = [8, 8] if target in LENDING else [8]
    return sample(target, function, groups=groups, note="broadcast" if broadcast else "")


_TARGETS = [t for t, r in RULES.items() if r.infer in (pointwise, type_as)]
SAMPLES = [_sample(t) for t in _TARGETS if t is not aten.feature_dropout.default]
SAMPLES += [
    _sample(t, True)
    for t in (aten.add.Tensor, aten.mul.Tensor, aten.where.self, aten.lerp.Tensor, aten.maximum.default)
]
SAMPLES += [
    sample(
        aten.mul.Tensor,
        lambda net, x: net.linear(net.linear(x, 8).unsqueeze(-1) * net.linear(x, 6).unsqueeze(-2).tanh(), 3),
        groups=[6],
        note="outer",
    ),
    sample(
        aten.add.Tensor,
        lambda net, x: net.linear(net.linear(x, 8) + net.linear(x, 1), 3),
        groups=[8],
        note="stretched",
    ),
    sample(
        aten.add.Tensor,
        lambda net, x: net.linear(aten.add.Tensor(net.linear(x, 5), x), 3),
        groups=[],
        note="input",
    ),
    sample(
        aten.feature_dropout.default,
        lambda net, x: net.conv(net.layer(lambda: nn.Dropout2d(0.5))(net.conv(x, 8).sin()), 3),
        *(2, 4, 4),
        groups=[8],
    ),
]
