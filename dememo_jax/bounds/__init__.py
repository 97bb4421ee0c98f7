"""Theorems on the host, in float64: quantiles, proportions, sequential tests, privacy. No JAX here."""

from dememo_jax.bounds.privacy import gdp_event_bounds, indistinguishable_event_bounds
from dememo_jax.bounds.proportions import clopper_pearson, hypergeometric_limits
from dememo_jax.bounds.quantiles import (
    empirical_quantile,
    max_shift,
    min_draws,
    published_lower_level,
    quantile_lower,
    quantile_upper,
    shifted_level,
    shifted_tail,
)
from dememo_jax.bounds.sequential import QuantileTest, quantile_test

__all__ = [
    "QuantileTest",
    "clopper_pearson",
    "empirical_quantile",
    "gdp_event_bounds",
    "hypergeometric_limits",
    "indistinguishable_event_bounds",
    "max_shift",
    "min_draws",
    "published_lower_level",
    "quantile_lower",
    "quantile_test",
    "quantile_upper",
    "shifted_level",
    "shifted_tail",
]
