"""Gradients and curvature of the mean loss of a frozen network over a data set, in blocks, and estimates made of them."""

from dememo_jax.curvature.estimates import Estimate, diagonal, layer_blocks, signs, trace
from dememo_jax.curvature.products import (
    Operator,
    example_gradients,
    fisher_diagonal,
    ggn_product,
    hessian_product,
    hvp,
    mean_gradient,
    mean_loss,
    operator,
    restricted,
    slopes,
    total,
    weighted_gradient,
)
from dememo_jax.curvature.spectrum import Eigen, dense, exact_diagonal, exact_layer_blocks, top_eigenpairs

__all__ = [
    "Eigen",
    "Estimate",
    "Operator",
    "dense",
    "diagonal",
    "exact_diagonal",
    "exact_layer_blocks",
    "example_gradients",
    "fisher_diagonal",
    "ggn_product",
    "hessian_product",
    "hvp",
    "layer_blocks",
    "mean_gradient",
    "mean_loss",
    "operator",
    "restricted",
    "signs",
    "slopes",
    "top_eigenpairs",
    "total",
    "trace",
    "weighted_gradient",
]
