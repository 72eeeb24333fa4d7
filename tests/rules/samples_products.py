"""Samples for products of vectors and of many matrices, distances, and what takes whole matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rules import Net, Sample, aten, sample


def _h(net: Net, x: Tensor, out: int = 8) -> Tensor:
    return net.linear(x, out).tanh()


def _square(net: Net, x: Tensor, target: Any, *args: Any) -> Tensor:
    """(N, 8, 8), the products of one set of features with themselves."""
    h = _h(net, x) * 0.4
    return net.linear(target(h.unsqueeze(-1) * h.sin().unsqueeze(-2), *args), 3).sum(1)


def _definite(net: Net, x: Tensor) -> Tensor:
    """(N, 4, 4), far from singular, of four features that six others describe."""
    y = net.linear(_h(net, x, 6), 4)
    return y.transpose(1, 2) @ y + torch.eye(4) * 4


def _whole(target: Any, *more: Any, note: str = "") -> Sample:
    """What comes of a matrix is added up; functions in `more` give further operands from the matrix."""

    def function(net: Net, x: Tensor) -> Tensor:
        matrix = _definite(net, x)
        result = target(matrix, *(m(matrix) if callable(m) else m for m in more))
        parts = result if isinstance(result, tuple) else [result]
        total: Any = sum(p.flatten(1).sum(1) if p.dim() > 1 else p for p in parts if p.is_floating_point())
        return total  # type: ignore[no-any-return]

    return sample(target, function, 4, 5, groups=[6], note=note)


def _near(net: Net, x: Tensor, target: Any, *args: Any) -> Tensor:
    return target(_h(net, x), _h(net, x).cos(), *args)  # type: ignore[no-any-return]


SAMPLES = [
    sample(
        aten.inner.default,
        lambda net, x: aten.inner.default(_h(net, x), net.parameter(6, 8)).sin() @ net.parameter(6, 3),
        groups=[8, 6],
    ),
    sample(
        aten.inner.default,
        lambda net, x: net.linear(aten.inner.default(_h(net, x), net.parameter()), 3),
        groups=[8],
        note="with a number",
    ),
    sample(
        aten.vdot.default,
        lambda net, x: net.linear(x, 3) * aten.vdot.default(net.parameter(8), net.parameter(8)),
        groups=[8],
    ),
    sample(
        aten.linalg_vecdot.default,
        lambda net, x: net.linear(x, 3) * aten.linalg_vecdot.default(_h(net, x), _h(net, x)).unsqueeze(-1),
        groups=[8],
    ),
    sample(
        aten.linalg_vecdot.default,
        lambda net, x: net.linear(aten.linalg_vecdot.default(_h(net, x), _h(net, x), dim=1), 3),
        *(4, 5),
        groups=[8],
        note="rows",
    ),
    sample(
        aten.ger.default,
        lambda net, x: (x @ aten.ger.default(net.parameter(5), net.parameter(8))).sin() @ net.parameter(8, 3),
        groups=[8],
    ),
    sample(
        aten.addr.default,
        lambda net, x: (
            _h(net, x)
            @ aten.addr.default(net.parameter(8, 6), net.parameter(8), net.parameter(6)).sin()
            @ net.parameter(6, 3)
        ),
        groups=[8, 6],
    ),
    *[
        sample(
            t,
            lambda net, x, t=t: t([x, net.parameter(5, 8), net.parameter(8, 6), net.parameter(6, 3)]),
            groups=[8, 6],
        )
        for t in (aten.linalg_multi_dot.default, aten.chain_matmul.default)
    ],
    sample(
        aten.linalg_matmul.default,
        lambda net, x: aten.linalg_matmul.default(_h(net, x), net.parameter(8, 6)).sin() @ net.parameter(6, 3),
        groups=[8, 6],
    ),
    sample(
        aten.einsum.default,
        lambda net, x: aten.einsum.default("bi,ij,jk->bk", [x, net.parameter(5, 8), net.parameter(8, 3)]),
        groups=[8],
        note="two weights",
    ),
    sample(
        aten.addmm.default,
        lambda net, x: (
            aten.addmm.default(net.linear(x, 3).sum(0), net.parameter(4, 8), net.parameter(8, 3)) + 0 * x.sum()
        ),
        groups=[8],
        note="two weights",
    ),
    *[
        sample(t, lambda net, x, t=t, n=n: _square(net, x, t, n), groups=[8], note=str(n))
        for t in (aten.linalg_matrix_power.default, aten.matrix_power.default)
        for n in (1, 3)
    ],
    sample(
        aten.matrix_power.default,
        lambda net, x: aten.matrix_power.default(_definite(net, x), -2).sum(2),
        *(4, 5),
        groups=[6],
        note="inverse",
    ),
    *[
        sample(t, lambda net, x, t=t: _square(net, x, t), groups=[8])
        for t in (aten.matrix_exp.default, aten.linalg_matrix_exp.default)
    ],
    sample(
        aten.tensordot.default,
        lambda net, x: net.linear(
            aten.tensordot.default(net.linear(x, 24).view(-1, 3, 8), net.parameter(8, 3, 6), [2, 1], [0, 1]).sin(), 3
        ),
        groups=[8, 3, 6],
    ),
    sample(
        aten.tensordot.default,
        lambda net, x: net.linear(aten.tensordot.default(_h(net, x), net.parameter(1, 6), [1], [0]).sin(), 3),
        groups=[6],
        note="stretched",
    ),
    sample(
        aten.kron.default,
        lambda net, x: (
            net.linear(x, 12) @ aten.kron.default(net.parameter(4, 2), net.parameter(3, 5)).sin() @ net.parameter(10, 3)
        ),
        groups=[4, 3, 2, 5],
    ),
    sample(
        aten.bilinear.default,
        lambda net, x: net.linear(net.layer(lambda: torch.nn.Bilinear(8, 6, 7))(_h(net, x), _h(net, x, 6)).sin(), 3),
        groups=[8, 6, 7],
    ),
    sample(
        aten.conv_tbc.default,
        lambda net, x: net.linear(
            aten.conv_tbc.default(_h(net, x.transpose(0, 1)), net.parameter(3, 8, 6), net.parameter(6), 1).sin(), 3
        ).transpose(0, 1),
        *(4, 5),
        groups=[8, 6],
    ),
    # ------------------------------------------------------------------ distances
    *[
        sample(
            aten.cdist.default,
            lambda net, x, p=p: net.linear(aten.cdist.default(_h(net, x), net.parameter(6, 8), p), 3),
            *(4, 5),
            groups=[8, 6],
            note=str(p),
        )
        for p in (1.0, 2.0)
    ],
    sample(
        aten.cosine_similarity.default,
        lambda net, x: net.linear(x, 3) * _near(net, x, aten.cosine_similarity.default, -1, 1e-3).unsqueeze(-1),
        groups=[8],
    ),
    sample(
        aten.cosine_similarity.default,
        lambda net, x: (
            net.linear(x, 3) * aten.cosine_similarity.default(_h(net, x), net.parameter(8), -1).unsqueeze(-1)
        ),
        groups=[8],
        note="with a weight",
    ),
    sample(
        aten.cosine_similarity.default,
        lambda net, x: net.linear(_near(net, x, aten.cosine_similarity.default), 3),
        *(4, 5),
        groups=[8],
        note="rows",
    ),
    sample(
        aten.pairwise_distance.default,
        lambda net, x: net.linear(x, 3) * _near(net, x, aten.pairwise_distance.default, 2, 0.3, True),
        groups=[8],
    ),
    sample(
        aten.pairwise_distance.default,
        lambda net, x: net.linear(x, 3) * aten.pairwise_distance.default(_h(net, x), x[:, :1], 1, 0.3, True),
        groups=[],
        note="stretched",
    ),
    sample(
        aten.dist.default,
        lambda net, x: net.linear(x, 3) * aten.dist.default(net.parameter(8), net.parameter(8), 3),
        groups=[8],
    ),
    sample(
        aten.dist.default,
        lambda net, x: net.linear(x, 3) * aten.dist.default(net.parameter(8), net.parameter(8), -1),
        groups=[],
        note="negative order",
    ),
    # ------------------------------------------------------------------ whole matrices
    *[
        _whole(t)
        for t in (
            *(aten.linalg_inv.default, aten.inverse.default, aten.pinverse.default, aten.linalg_det.default),
            *(aten.det.default, aten.linalg_slogdet.default, aten.logdet.default, aten.linalg_cholesky.default),
            *(aten.cholesky.default, aten.linalg_svdvals.default, aten.linalg_eigvalsh.default),
            *(aten.cholesky_inverse.default, aten.linalg_lu_factor.default),
        )
    ],
    _whole(aten.linalg_pinv.default, 1e-6),
    sample(
        aten.linalg_qr.default,
        lambda net, x: aten.linalg_qr.default(_definite(net, x))[1].abs().sum(2),
        *(4, 5),
        groups=[6],
    ),
    *[
        sample(t, lambda net, x, t=t: t(_definite(net, x))[1], 4, 5, groups=[6])
        for t in (aten.linalg_svd.default, aten.svd.default)
    ],
    sample(aten.linalg_eigh.default, lambda net, x: aten.linalg_eigh.default(_definite(net, x))[0], 4, 5, groups=[6]),
    _whole(aten.linalg_solve.default, lambda m: m.sin()),
    _whole(aten.cholesky_solve.default, lambda m: m + torch.eye(4)),
    sample(
        aten.linalg_solve_triangular.default,
        lambda net, x: aten.linalg_solve_triangular.default(_definite(net, x), x[:, :, :2], upper=True).sum(2),
        *(4, 5),
        groups=[6],
    ),
]
