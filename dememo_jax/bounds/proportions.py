"""Exact limits of a proportion: binomial (independent trials) and hypergeometric (drawn without replacement)."""

import functools

import numpy as np
from scipy import optimize, stats

from dememo_jax.bounds.quantiles import probability
from dememo_jax.errors import require


def clopper_pearson(
    successes: int, trials: int, alpha: float, *, side: str = "two", uniform: float | None = None
) -> tuple[float, float]:
    """Exact confidence limits (low, high) of a binomial proportion at confidence 1 - alpha.

    `side="two"` spends alpha / 2 on each end, "lower" and "upper" all of it on one (the other end is 0 or 1).
    uniform: a number in [0, 1] drawn uniformly *before* the count is seen makes the limits randomized (Stevens 1950):
        each end fails with probability exactly its share of alpha, and neither is wider. "two" uses `1 - uniform` at the
        upper end, so that the ends do not cross. The draw that was used belongs beside the limits.
    Raises BadInput for counts that make no sense, alpha outside (0, 1), uniform outside [0, 1].
    """
    require(trials >= 1 and 0 <= successes <= trials, f"need 0 <= successes <= trials >= 1, got {successes}/{trials}")
    require(side in ("two", "lower", "upper"), f"side must be 'two', 'lower' or 'upper', got {side!r}")
    require(uniform is None or 0 <= uniform <= 1, f"uniform must lie in [0, 1], got {uniform}")
    each = probability(alpha, "alpha") / (2 if side == "two" else 1)
    low = 0.0 if side == "upper" else _least(successes, trials, each, uniform)
    other = 1 - uniform if side == "two" and uniform is not None else uniform
    high = 1.0 if side == "lower" else 1.0 - _least(trials - successes, trials, each, other)
    return float(low), float(high)


def _least(successes: int, trials: int, alpha: float, uniform: float | None) -> float:
    """The p at which so many successes, or more, have probability alpha; randomized, a tie counts `uniform` of a success."""
    plain = 0.0 if successes == 0 else float(stats.beta.ppf(alpha, successes, trials - successes + 1))
    if uniform is None:
        return plain
    above = 1.0 if successes == trials else float(stats.beta.ppf(alpha, successes + 1, trials - successes))

    def excess(p: float) -> float:
        return float(stats.binom.sf(successes, trials, p) + uniform * stats.binom.pmf(successes, trials, p)) - alpha

    # Increasing in p. Without a root the whole of [0, 1] is compatible with the count, on one of its ends.
    if excess(plain) >= 0:
        return plain
    return above if excess(above) <= 0 else float(optimize.brentq(excess, plain, above, xtol=1e-15))


def hypergeometric_limits(correct, sampled: int, total: int, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Limits (low, high) of a share of `total` from counts `correct` [...] in `sampled` drawn without replacement.

    Each limit by itself fails with probability at most `beta`; at `sampled == total` both are the share itself.
    Raises BadInput unless 1 <= sampled <= total and 0 <= correct <= sampled.
    """
    counts = np.asarray(correct)
    require(1 <= sampled <= total, f"need 1 <= sampled <= total, got {sampled} of {total}")
    require(np.array_equal(counts, np.round(counts)), "correct must be whole counts")
    require(counts.min(initial=0) >= 0 and counts.max(initial=0) <= sampled, f"counts must lie in 0..{sampled}")
    probability(beta, "beta")
    low, high = _tables(sampled, total, beta)
    index = counts.astype(np.int64)
    return low[index] / total, high[index] / total


@functools.lru_cache(maxsize=64)
def _tables(sampled: int, total: int, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """The limits for every count 0..sampled."""
    every = np.arange(sampled + 1)
    most = every + total - sampled  # all that was not sampled may be right as well
    # For each count the largest truth under which so few has probability > beta; the tail falls as truth rises.
    high = _bisect(lambda truth: stats.hypergeom.cdf(every, total, truth, sampled) > beta, every, most)
    return total - high[::-1], high  # of wrong answers there are at most so many


def _bisect(holds, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Elementwise the largest integer in least..most at which the falling condition holds; `least` always does."""
    low, high = least.copy(), most.copy()
    while (low < high).any():
        middle = (low + high + 1) // 2
        holding = holds(middle)
        low, high = np.where(holding, middle, low), np.where(holding, high, middle - 1)
    return low
