"""Further products: of vectors, of many matrices, tensor and Kronecker products, bilinear layers, distances."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from fxprune.axes import ONE, Fixed, product, size_of
from fxprune.rules.contraction import matmul, outer
from fxprune.rules.core import Dims, Site, aten, positive, register_rule, rule


@rule(aten.inner.default)
def inner(site: Site, a: Dims, b: Dims) -> Dims:
    """The last dimensions are contracted; a number multiplies."""
    if not a or not b:
        return (*a, *b)
    site.unify(a[-1], b[-1])
    site.multiply(*a, *b[:-1])
    return (*a[:-1], *b[:-1])


@rule(aten.vdot.default, aten.linalg_vecdot.default)
def vecdot(site: Site, a: Dims, b: Dims, *, dim: int = -1) -> Dims:
    """Products are summed along one dimension."""
    common = site.broadcast(a, b)
    site.multiply(*common)
    at = positive(dim, len(common))
    return (*common[:at], *common[at + 1 :])


@rule(aten.ger.default)
def ger(site: Site, a: Dims, b: Dims) -> Any:
    return outer(site, a, b)


@rule(aten.addr.default)
def addr(site: Site, x: Dims, a: Dims, b: Dims, **_: Any) -> Dims:
    """X + the outer product of a and b."""
    return site.broadcast(x, (*a, *b))


@rule(aten.linalg_multi_dot.default, aten.chain_matmul.default)
def multi_dot(site: Site, matrices: Sequence[Dims]) -> Any:
    """A product of matrices; the first and the last may be vectors."""
    result = matrices[0]
    for matrix in matrices[1:]:
        result = matmul(site, result, matrix)
    return result


@rule(aten.linalg_matmul.default)
def linalg_matmul(site: Site, a: Dims, b: Dims) -> Any:
    return matmul(site, a, b)


@rule(aten.linalg_matrix_power.default, aten.matrix_power.default)
def matrix_power(site: Site, x: Dims, n: int) -> Dims:
    """A square matrix with itself; its inverse depends on all entries."""
    site.unify(x[-2], x[-1])
    if n < 1:
        for d in x:
            site.freeze(d, "a matrix is inverted")
    else:
        site.multiply(Fixed(max(n - 1, 1)), *x, x[-1])
    return tuple(site.axes.resolve(d) for d in x)


@rule(aten.matrix_exp.default, aten.linalg_matrix_exp.default)
def matrix_exp(site: Site, x: Dims) -> Dims:
    """The series of a square matrix: what is removed from rows and columns alike takes no part in it."""
    site.unify(x[-2], x[-1])
    return tuple(site.axes.resolve(d) for d in x)


@rule(aten.tensordot.default)
def tensordot(site: Site, a: Dims, b: Dims, of_a: Sequence[int], of_b: Sequence[int]) -> Dims:
    """The dimensions named in pairs are contracted."""
    pairs = [(positive(i, len(a)), positive(j, len(b))) for i, j in zip(of_a, of_b, strict=True)]
    for i, j in pairs:
        if size_of(a[i]) == size_of(b[j]):
            site.unify(a[i], b[j])
        else:  # of size 1, stretched
            site.freeze(a[i], "it is summed against a dimension of size 1")
            site.freeze(b[j], "it is summed against a dimension of size 1")
    rest = [d for j, d in enumerate(b) if j not in {j for _, j in pairs}]
    site.multiply(*a, *rest)
    return (*(d for i, d in enumerate(a) if i not in {i for i, _ in pairs}), *rest)


@rule(aten.kron.default)
def kron(site: Site, a: Dims, b: Dims) -> Dims:
    """Each dimension is the row-major product of both operands', aligned from the right."""
    rank = max(len(a), len(b))
    left, right = (ONE,) * (rank - len(a)) + a, (ONE,) * (rank - len(b)) + b
    return tuple(product(pair) for pair in zip(left, right, strict=True))


@rule(aten.bilinear.default)
def bilinear(site: Site, x: Dims, y: Dims, weight: Dims, bias: Dims | None = None) -> Dims:
    """x (..., n), y (..., m), weight (out, n, m), bias (out) -> (..., out)."""
    site.unify(x[-1], weight[1])
    site.unify(y[-1], weight[2])
    if bias is not None:
        site.unify(bias[0], weight[0])
    rest = site.broadcast(x[:-1], y[:-1])
    site.multiply(*rest, *weight)
    return (*rest, weight[0])


@rule(aten.conv_tbc.default)
def conv_tbc(site: Site, x: Dims, weight: Dims, bias: Dims, *_: Any) -> Dims:
    """x (T, N, in), weight (kernel, in, out), bias (out) -> (T, N, out)."""
    site.freeze(x[0], "it is a sequence of positions")
    site.freeze(weight[0], "it is a kernel dimension")
    site.unify(x[2], weight[1])
    site.unify(bias[0], weight[2])
    steps = Fixed(site.shape[0], "positions")
    site.multiply(steps, x[1], *weight)
    return steps, x[1], site.axes.resolve(weight[2])


# ---------------------------------------------------------------------- distances
@rule(aten.cdist.default)
def cdist(site: Site, a: Dims, b: Dims, *_: Any) -> Dims:
    """a (..., P, M), b (..., R, M) -> (..., P, R): a coordinate that is zero in both adds nothing."""
    site.unify(a[-1], b[-1])
    batch = site.broadcast(a[:-2], b[:-2])
    site.multiply(*batch, a[-2], b[-2], a[-1])
    return (*batch, a[-2], b[-2])


@rule(aten.cosine_similarity.default)
def cosine_similarity(site: Site, a: Dims, b: Dims, dim: int = 1, *_: Any) -> Dims:
    """Products and squares are summed along one dimension."""
    common = site.broadcast(a, b)
    at = positive(dim, len(common))
    return (*common[:at], *common[at + 1 :])


@rule(aten.pairwise_distance.default)
def pairwise_distance(site: Site, a: Dims, b: Dims, p: Any = 2, eps: Any = 1e-6, keepdim: bool = False) -> Dims:
    """A norm of the differences along the last dimension; a small number is added to each, so that each counts."""
    if not a or not b or size_of(a[-1]) != size_of(b[-1]):
        for d in (*a, *b):
            site.freeze(d, "distances of stretched vectors are taken")
    common = site.broadcast(a, b)
    return (*common[:-1], ONE) if keepdim else common[:-1]


@rule(aten.dist.default)
def dist(site: Site, a: Dims, b: Dims, p: Any = 2) -> Dims:
    """A norm of all differences."""
    site.broadcast(a, b)
    if p < 0:
        for d in (*a, *b):
            site.freeze(d, "the smallest of the differences counts")
    return ()


# ---------------------------------------------------------------------- what takes whole matrices
MATRICES = """
linalg_inv inverse linalg_pinv.default pinverse linalg_det det linalg_slogdet logdet linalg_cholesky cholesky
linalg_qr linalg_svd linalg_svdvals svd linalg_eigh linalg_eigvalsh linalg_solve linalg_solve_triangular
cholesky_solve cholesky_inverse linalg_lu_factor
"""


def whole_matrices(site: Site, *args: Any, **kwargs: Any) -> Any:
    """Every entry of a decomposed or inverted matrix depends on every other one."""
    for dims in (*args, *kwargs.values()):
        for d in dims if isinstance(dims, tuple) else ():
            if not isinstance(d, int):
                site.freeze(d, "a matrix of it is inverted or decomposed")
    return site.outputs("of a decomposed matrix")


for _name in MATRICES.split():
    register_rule(operator.attrgetter(_name)(aten), whole_matrices)
