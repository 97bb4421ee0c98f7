"""Order-statistic bounds of quantiles, and what a move of the Gaussian costs them.

Notation: `q` the share of noise draws a statement covers, `shift = eta / sigma` the move of the Gaussian's mean
in standard deviations, `level` the quantile level that pays for that move, `alpha` the chance that the draws
mislead. A bound that the draws cannot support is `None`, never the largest draw.
"""

import math

import numpy as np
from scipy import stats

from dememo_jax.errors import require

TIE = 1 - 1e-14  # a few units in the last place are allowed, so that exact ties such as 0.5**3 <= 0.125 count as such


def probability(value: float, name: str) -> float:
    """`value` as a float, or BadInput unless it lies strictly between 0 and 1."""
    require(0.0 < value < 1.0, f"{name} must lie strictly between 0 and 1, got {value}")
    return float(value)


def tail_of(level: float, tail: float | None) -> float:
    """`1 - level`, or the more exact `tail` where it is given."""
    tail = 1.0 - probability(level, "level") if tail is None else tail
    require(0.0 <= tail < 1.0, f"tail must lie in [0, 1), got {tail}")
    return tail


def shifted_level(q: float, shift: float) -> float:
    """`Phi(Phi^-1(q) + shift)`: the level whose quantile under the centred Gaussian covers `q` after the move.

    By Neyman and Pearson, an event of probability `level` under N(m, sigma^2 I) keeps probability >= q under
    N(m + v, sigma^2 I) for every ||v|| <= eta = shift * sigma (SoK Theorem 1). Raises BadInput outside q in
    (0, 1) or for a negative or NaN shift. Rounds to 1.0 for shifts beyond about 8: see `shifted_tail`.
    """
    return float(stats.norm.cdf(_shifted(q, shift)))


def shifted_tail(q: float, shift: float) -> float:
    """`1 - shifted_level(q, shift)`, kept exact where the level rounds to 1."""
    return float(stats.norm.sf(_shifted(q, shift)))


def _shifted(q: float, shift: float) -> float:
    require(shift >= 0, f"shift = eta / sigma must be a number >= 0, got {shift}")
    return float(stats.norm.ppf(probability(q, "q"))) + shift


def published_lower_level(q: float, shift: float) -> float:
    """The level that the SoK's printed lower bound amounts to in `quantile_lower`: `shifted_level(1 - q, shift)`.

    The paper takes `L = sup{t : P(A <= t) <= Phi(Phi^-1(q) - shift)}`. That guarantees `A >= L` with probability
    `1 - q` only, not `q`: for comparison with the paper. Use `shifted_level(q, shift)` for a bound that holds.
    """
    return shifted_level(1.0 - q, shift)


def min_draws(level: float, alpha: float, *, tail: float | None = None) -> int | None:
    """The fewest draws for which an upper bound at `level` exists: the least n with `level**n <= alpha`.

    At that n the bound is the sample maximum. `tail = 1 - level` may be given where it is known to more digits
    than the level carries. None when the tail is zero in float64: no number of draws would do.
    """
    tail = tail_of(level, tail)
    probability(alpha, "alpha")
    if tail == 0.0:
        return None
    n = max(1, math.ceil(math.log(alpha) * TIE / math.log1p(-tail)))
    if n > 1 and _exists(n - 1, tail, alpha):  # the quotient may round past a whole number
        return n - 1
    return n if _exists(n, tail, alpha) else n + 1


def _exists(n: int, tail: float, alpha: float) -> bool:
    return n * math.log1p(-tail) <= math.log(alpha) * TIE


def max_shift(draws: int, q: float, alpha: float) -> float | None:
    """The largest `eta / sigma` that so many draws can certify; None when they cannot certify eta = 0.

    `Phi^-1(alpha**(1/draws)) - Phi^-1(q)`, the inverse of `min_draws(shifted_level(q, shift), alpha)`.
    """
    require(draws >= 1, f"draws must be at least 1, got {draws}")
    tail = -math.expm1(math.log(probability(alpha, "alpha")) / draws)
    shift = float(stats.norm.isf(tail) - stats.norm.ppf(probability(q, "q")))
    return shift if shift >= 0 else None


def quantile_upper(scores, level: float, alpha: float, *, tail: float | None = None) -> float | None:
    """The smallest order statistic of `scores` [S] that exceeds the level-quantile with confidence 1 - alpha.

    `A_(k)` with k the least rank such that `P[Bin(S, level) <= k - 1] >= 1 - alpha`; sound for ties and discrete
    scores. None when no rank does: `min_draws` tells how many draws would. Raises BadInput on an empty or
    non-finite sample.
    """
    values = np.sort(np.asarray(scores, dtype=np.float64).ravel())
    require(values.size >= 1 and np.isfinite(values).all(), "scores must be at least one finite number")
    tail = tail_of(level, tail)
    above = _exceedances(values.size, tail, probability(alpha, "alpha"))
    return None if above is None else float(values[values.size - 1 - above])


def _exceedances(n: int, tail: float, alpha: float) -> int | None:
    """The most order statistics that may stand above the bound: the largest m with P[Bin(n, tail) <= m] <= alpha."""
    if tail <= 0.0 or not _exists(n, tail, alpha):
        return None
    m = max(0, int(stats.binom.ppf(alpha, n, tail)))
    while m > 0 and stats.binom.cdf(m, n, tail) > alpha:
        m -= 1
    return m


def quantile_lower(scores, level: float, alpha: float, *, tail: float | None = None) -> float | None:
    """The mirror image of `quantile_upper`: bounds the (1 - level)-quantile of the scores from below.

    With `level = shifted_level(q, shift)` the metric stays at or above the bound with probability q after any
    move of length eta (the corrected lower half of SoK Theorem 1; the paper's own form: `published_lower_level`).
    """
    upper = quantile_upper(-np.asarray(scores, dtype=np.float64), level, alpha, tail=tail)
    return None if upper is None else -upper


def empirical_quantile(scores, level: float) -> float:
    """The least score with at least the share `level` of all scores at or below it: an estimate without confidence."""
    values = np.sort(np.asarray(scores, dtype=np.float64).ravel())
    require(values.size >= 1 and np.isfinite(values).all(), "scores must be at least one finite number")
    return float(values[max(0, math.ceil(probability(level, "level") * values.size * TIE) - 1)])
