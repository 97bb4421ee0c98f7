"""An anytime-valid test of a quantile: look after every draw, stop as soon as the answer is known."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from dememo_jax.bounds.quantiles import TIE, min_draws, probability, tail_of
from dememo_jax.errors import require


@dataclass(frozen=True)
class QuantileTest:
    """What draws so far say about `P[score <= tau] >= level`."""

    verdict: str  # "below": it holds, "above": it does not, "undecided"
    stopped: int | None  # the draw at which the verdict fell; what came later does not change it
    draws: int
    exceedances: int  # scores above tau among all draws
    draws_needed: int | None  # to say "below" when nothing exceeds; at spare=0 no test can say it with fewer
    log_evidence: float  # for "below", the largest so far; the verdict falls at log(1 / alpha)


def quantile_test(exceeds, level: float, alpha: float, *, tail: float | None = None, spare: float = 0.0) -> QuantileTest:
    """Sequential test from `exceeds` [S], in the order of the draws: whether each score was above tau.

    "below" (the level-quantile is at most tau) and "above" (it is not) are each wrong with probability at most alpha,
    however often and whenever one looks: both are the first crossing of 1 / alpha by a product of likelihood ratios
    (Ville's inequality), mixed over the alternatives. Without an exceedance "below" falls at exactly
    `min_draws(level, alpha)`, the fewest possible. That spends nearly all of alpha on the path without exceedances: what
    rounding leaves buys the rest, at the price of more draws once something exceeds. `spare` keeps that share of alpha
    for runs with exceedances; the fewest draws are then at most `min_draws(level, alpha * (1 - spare))`.

    tail: `1 - level` where it is known to more digits. Raises BadInput for level or alpha outside (0, 1), spare outside [0, 1).
    """
    exceeds = np.asarray(exceeds, bool).ravel()
    probability(alpha, "alpha")
    require(0 <= spare < 1, f"spare must lie in [0, 1), got {spare}")
    tail = tail_of(level, tail)
    needed = min_draws(level, alpha * (1 - spare), tail=tail)
    n, k = np.arange(1, len(exceeds) + 1), np.cumsum(exceeds)
    if needed is None:
        return QuantileTest("undecided", None, len(exceeds), int(exceeds.sum()), None, -math.inf)
    goal = -math.log(alpha) * TIE
    weight = _weight(needed, tail, goal)
    below = _evidence(n, k, tail, weight)
    if spare > 0:  # the mixture alone may get there sooner
        sooner = np.arange(1, needed + 1)
        needed = 1 + int(np.searchsorted(_evidence(sooner, np.zeros_like(sooner), tail, weight), goal))
    above = _mixture(n, k, tail, below=False)
    at_below, at_above = _first(below >= goal), _first(above >= goal)
    verdict = "undecided" if at_below == at_above == math.inf else "below" if at_below < at_above else "above"
    stopped = None if verdict == "undecided" else int(min(at_below, at_above)) + 1
    best = float(below.max(initial=-math.inf))
    return QuantileTest(verdict, stopped, len(exceeds), int(exceeds.sum()), needed, best)


def _evidence(n: np.ndarray, k: np.ndarray, tail: float, weight: float) -> np.ndarray:
    """Log evidence for "below" after n draws with k exceedances; rising in n at k = 0."""
    with np.errstate(divide="ignore"):
        certain = np.where(k == 0, np.log(weight) - n * math.log1p(-tail), -np.inf)
        return np.logaddexp(certain, _mixture(n, k, tail, below=True) + np.log1p(-weight))


def _weight(needed: int, tail: float, goal: float) -> float:
    """The least weight of "nothing ever exceeds" with which `needed` draws without an exceedance reach the goal."""
    certain, mixed = -needed * math.log1p(-tail), float(_mixture(np.array([needed]), np.array([0]), tail, below=True)[0])
    scale = max(certain, goal)
    numerator = math.exp(goal - scale) - math.exp(mixed - scale)
    return min(1.0, max(0.0, numerator / (math.exp(certain - scale) - math.exp(mixed - scale)) * (2 - TIE)))


def _mixture(n: np.ndarray, k: np.ndarray, tail: float, *, below: bool) -> np.ndarray:
    """Log likelihood ratio against `P[exceeds] = tail`, averaged over chances uniform on (0, tail), or on (tail, 1)."""
    part = stats.beta.logcdf if below else stats.beta.logsf
    width = math.log(tail) if below else math.log1p(-tail)
    average = special.betaln(k + 1, n - k + 1) + part(tail, k + 1, n - k + 1) - width
    return average - k * math.log(tail) - (n - k) * math.log1p(-tail)


def _first(crossed: np.ndarray) -> float:
    return float(np.argmax(crossed)) if crossed.any() else math.inf
