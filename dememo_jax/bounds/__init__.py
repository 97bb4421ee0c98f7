"""Theorems on the host, in float64: quantiles, proportions, sequential tests, privacy. No JAX here."""

from dememo_jax.bounds.accounting import (
    check_privacy,
    check_run,
    compose_gdp,
    gdp_delta,
    gdp_epsilon,
    gdp_mu,
    model_clipping_delta,
    noisy_iteration_mu,
    published_sigma,
)
from dememo_jax.bounds.distinguishing import Distinguished, distinguish, rates_epsilon
from dememo_jax.bounds.grid import fine_grid, normal_multiples
from dememo_jax.bounds.langevin import (
    langevin_account,
    langevin_epsilon,
    langevin_mu,
    langevin_renyi_epsilon,
    langevin_steps,
)
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
from dememo_jax.bounds.ranking import Estimate, Operating, auc, check_scores, rank_correlation, roc, tpr_at
from dememo_jax.bounds.removal import minimiser_distance, newton_residual, published_residual, removal_budget, spectral_above
from dememo_jax.bounds.samples import (
    Permutation,
    Relative,
    column_tests,
    discoveries,
    mean_area,
    permutation_test,
    relative_distance,
)
from dememo_jax.bounds.sequential import QuantileTest, quantile_test

__all__ = [
    "Distinguished",
    "Estimate",
    "Operating",
    "Permutation",
    "QuantileTest",
    "Relative",
    "auc",
    "check_privacy",
    "check_run",
    "check_scores",
    "clopper_pearson",
    "column_tests",
    "compose_gdp",
    "discoveries",
    "distinguish",
    "empirical_quantile",
    "fine_grid",
    "gdp_delta",
    "gdp_epsilon",
    "gdp_event_bounds",
    "gdp_mu",
    "hypergeometric_limits",
    "indistinguishable_event_bounds",
    "langevin_account",
    "langevin_epsilon",
    "langevin_mu",
    "langevin_renyi_epsilon",
    "langevin_steps",
    "max_shift",
    "mean_area",
    "min_draws",
    "minimiser_distance",
    "model_clipping_delta",
    "newton_residual",
    "noisy_iteration_mu",
    "normal_multiples",
    "permutation_test",
    "published_lower_level",
    "published_residual",
    "published_sigma",
    "quantile_lower",
    "quantile_test",
    "quantile_upper",
    "rank_correlation",
    "rates_epsilon",
    "relative_distance",
    "removal_budget",
    "roc",
    "shifted_level",
    "shifted_tail",
    "spectral_above",
    "tpr_at",
]
