"""The rule table: for each ATen operator, how the dimensions of its results follow from those of its operands.

One file for each family:

- `pointwise`      names of operators that work element by element, with broadcasting
- `movement`       reshape, permute, cat, split, slice, pad, expand, roll, repeat, pixel shuffle, scatter of slices
- `contraction`    matmul, linear, einsum, convolutions
- `normalisation`  batch, layer, group, instance and RMS norm
- `attention`      scaled dot product attention
- `reduction`      sum, mean, softmax, max, cumsum, sort, topk
- `indexing`       embedding, select, gather, index, index_put
- `creation`       zeros, full, arange
- `spatial`        pooling and interpolation
- `recurrent`      LSTM, GRU, RNN, and their cells
- `experts`        grouped matrix products of mixtures of experts
- `stacking`       hstack and its like, hsplit and its like, grids, blocks, diagonals
- `products`       inner, tensor and Kronecker products, bilinear layers, distances, decompositions
- `spectral`       complex numbers and Fourier transforms
- `sampling`       grids, regions of interest, deformable convolutions, unpooling
- `ordering`       medians, quantiles, running extremes, places in an order
- `losses`         what compares with a target

A rule is a function `rule(site, *operands and arguments)`: tensor operands arrive as tuples of dimensions, other
arguments as in the operator's schema with its defaults filled in. It equates dimensions through `site` and returns the
dimensions of the result (a list of them where there are several results). An operator without a rule freezes every axis
that enters and leaves it.
"""

from fxprune.rules.core import RULES, Literals, Rule, Site, register_rule, rule

__all__ = ["RULES", "Literals", "Rule", "Site", "load", "register_rule", "rule"]


def load() -> None:
    """Import every family, so that the table is full."""
    from fxprune.rules import (  # noqa: F401  (imported for what they register)
        attention,
        contraction,
        creation,
        experts,
        indexing,
        losses,
        movement,
        normalisation,
        ordering,
        pointwise,
        products,
        recurrent,
        reduction,
        sampling,
        spatial,
        spectral,
        stacking,
    )
