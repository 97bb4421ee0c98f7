"""Removal from convex models on the host: distances from a minimiser, and the published budget of a noisy objective.

`minimiser_distance` is a theorem, and what certified heads rest on. `removal_budget` is Guo et al. 2020, Theorem 3: the
minimiser of `L(w) + B.w`, B ~ N(0, sigma^2), is to hide a remaining gradient U of that objective as a shift of B by U. That
is heuristic: U depends on B, so the law of B - U(B) is no mixture of shifts. Here L is the one-vs-rest logistic loss with a
ridge, and U is measured over all classes at once.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from dememo_jax.bounds.accounting import check_privacy, gdp_delta, gdp_mu
from dememo_jax.errors import require

BUDGETS = ("published", "gaussian")
THIRD = 1 / (6 * math.sqrt(3))  # the largest third derivative of log(1 + e^z)


def minimiser_distance(gradient: float, convexity: float) -> float:
    """How far weights are from the minimiser of a strongly convex function, at most: `gradient / convexity`.

    Args:
        gradient: at least the norm of the gradient at the weights.
        convexity: the function is so strongly convex; lam n for a ridge lam n / 2 |w|^2.

    Returns:
        The quotient, rounded upwards. From `convexity |w - w*|^2 <= <grad L(w), w - w*>`.

    Raises:
        BadInput: for a negative gradient or a convexity that is not positive.

    Example:
        minimiser_distance(0.3, 1e-2 * 600)  # 0.05
    """
    require(gradient >= 0, f"the gradient's norm must not be negative, got {gradient}")
    require(convexity > 0 and math.isfinite(convexity), f"convexity must be positive and finite, got {convexity}")
    return math.nextafter(gradient / convexity, math.inf)


def removal_budget(epsilon: float, delta: float, sigma: float, budget: str = "published") -> float:
    """The |U| that noise of scale `sigma` on the objective is said to hide at (epsilon, delta): 2.280 at (1, 1e-4) and 10.

    It is published for removal and heuristic there: with |U| below the budget for every B the true delta can be larger (0.044
    for 0.01 in one dimension; tests/test_objective_perturbation.py). It would hold for a U that does not depend on B.

    "published": sigma epsilon / sqrt(2 log(1.5 / delta)), Guo et al. 2020, Theorem 3. It rests on a tail bound meant for
    small epsilon and promises too much beyond epsilon = 8.37 at delta = 1e-4; there BadInput names the delta it delivers.
    "gaussian": sigma mu, with the exact trade-off of two Gaussians: right at every epsilon, 3.139 for the numbers above.
    """
    check_privacy(epsilon, delta)
    require(sigma > 0 and math.isfinite(sigma), f"sigma must be positive and finite, got {sigma}")
    require(budget in BUDGETS, f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    if budget == "gaussian":
        return sigma * gdp_mu(epsilon, delta)
    mu = epsilon / math.sqrt(2 * math.log(1.5 / delta))
    delivered = gdp_delta(mu, epsilon)
    require(
        delivered <= delta,
        f"the published budget does not hold at epsilon {epsilon:g}, delta {delta:g}: it delivers delta {delivered:.3g}. "
        "Use budget='gaussian', which is exact at every epsilon",
    )
    return sigma * mu


def newton_residual(spectral: float, moved: ArrayLike) -> np.ndarray:
    """What a step D leaves of the gradient beyond its linear part, at most, per class: `THIRD / 2 |X|_2 |(XD)^2|_2`.

    spectral: at least |X|_2. moved [N, K]: XD, how far the step moves each logit. By Taylor's theorem the remainder is
    X'v with |v_i| <= THIRD / 2 (x_i.D)^2, for rows of any length. Guo et al.'s Corollary 1 is `published_residual`.
    """
    return THIRD / 2 * spectral * np.sqrt(np.sum(np.square(np.square(np.asarray(moved, np.float64))), axis=0))


def published_residual(spectral: float, moved: ArrayLike, lengths: ArrayLike, longest: float) -> np.ndarray:
    """`1/4 |X|_2 |D| |XD|` per class: Guo et al. 2020, Corollary 1, times the longest row, which they take to be 1.

    moved [N, K]: XD. lengths [K]: |D|. Never less than `newton_residual`, by a factor of 5.2 or more.
    """
    moved = np.asarray(moved, np.float64)
    return 0.25 * spectral * longest * np.asarray(lengths, np.float64) * np.linalg.norm(moved, axis=0)


def spectral_above(gram: ArrayLike, rows: int) -> float:
    """An upper bound of |X|_2 from X'X [F, F] summed over so many rows: the largest eigenvalue, with the rounding added.

    Power iterations, as in the published code, would stop below it.
    """
    gram = np.asarray(gram, np.float64)
    rounding = 4 * np.finfo(np.float64).eps * (rows + 10 * len(gram)) * np.trace(gram)
    return math.sqrt(max(0.0, float(np.linalg.eigvalsh(gram)[-1])) + rounding)
