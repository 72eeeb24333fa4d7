"""Operators that work element by element: every dimension of the result is the common one of the operands.

A name in the table is all an operator of this kind needs; it stands for all overloads, `name.overload` for one.
"""

from __future__ import annotations

import operator
from typing import Any

from fxprune.rules.core import Dims, Site, aten, register_rule

POINTWISE = """
abs acos acosh add addcdiv addcmul alias alpha_dropout angle asin asinh atan atan2 atanh bitwise_and bitwise_not
bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift ceil celu clamp clamp_max clamp_min clip clone contiguous
copy copysign cos cosh deg2rad detach digamma div divide dropout elu eq erf erfc erfinv exp exp2 expm1 feature_dropout
fill floor floor_divide fmax fmin fmod frac ge gelu greater gt hardshrink hardsigmoid hardswish hardtanh heaviside
hypot isfinite isinf isnan ldexp le leaky_relu lerp less lgamma lift_fresh lift_fresh_copy log log10 log1p log2
log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt maximum minimum
mish mul multiply nan_to_num ne neg negative nextafter not_equal positive pow real reciprocal relu relu6 remainder
round rrelu rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink special_expit sqrt square
sub subtract tan tanh threshold to true_divide trunc type_as xlogy _to_copy zero
__and__ __or__ __xor__ __lshift__ __rshift__ masked_fill
where.self where.ScalarOther where.ScalarSelf where.Scalar
_conj conj conj_physical _conj_physical _neg_view resolve_conj resolve_neg complex polar.default imag isreal
absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh fix float_power gcd.default i0
igamma igammac isclose isneginf isposinf lcm max.other min.other mvlgamma polygamma
special_entr special_erfcx special_gammaln special_i0e special_i1 special_i1e special_log_ndtr special_ndtr
special_ndtri special_xlog1py special_zeta
exponential geometric uniform normal_functional cauchy log_normal random.default poisson randint_like.default
_prelu_kernel feature_alpha_dropout
zeros_like ones_like full_like empty_like rand_like randn_like bernoulli native_dropout data
"""


def _operands(values: Any) -> list[Dims]:
    return [v for v in values if isinstance(v, tuple) and not (v and isinstance(v[0], int))]


def pointwise(site: Site, *args: Any, **kwargs: Any) -> Any:
    """All tensor operands share their dimensions; operands of size 1 are stretched."""
    dims = site.broadcast(*_operands(args), *_operands(kwargs.values()))
    return [dims] * len(site.shape) if isinstance(site.shape, list) else dims


def type_as(site: Site, x: Dims, *_args: Any, **_kwargs: Any) -> Dims:
    """The result looks like the first operand; the second lends its dtype or device only."""
    return x


for _name in POINTWISE.split():
    if _name not in ("type_as", "to"):
        register_rule(operator.attrgetter(_name)(aten), pointwise)
register_rule(aten.type_as, type_as)
register_rule(aten.to, type_as)
