"""Lower bounds of epsilon from what a test achieves: whoever tells two laws apart refutes a small epsilon.

Both laws are sampled by running a procedure many times, so the samples are models and few. A bound is a confidence limit over
those runs; a point estimate that is maximised over decision rules is biased upwards and stands beside it, not in its place.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dememo_jax.bounds.accounting import check_privacy, gdp_epsilon
from dememo_jax.bounds.proportions import clopper_pearson
from dememo_jax.bounds.quantiles import probability
from dememo_jax.errors import require


@dataclass(frozen=True)
class Distinguished:
    """What one rule, chosen on half of the samples, achieves on the other half; rates and limits are of that half."""

    tpr: float
    fpr: float
    epsilon: float | None  # point estimate; None: the half holds no error of one kind, and the estimate would be infinite
    epsilon_low: float  # lower limit of the true epsilon
    epsilon_high: float | None  # upper limit of what this rule could show; None: unbounded. No bound of the true epsilon.
    mu_low: float  # lower limit of mu, if the two laws are some mu-GDP pair
    epsilon_low_gdp: float  # the same as an epsilon at delta
    delta: float
    confidence: float
    samples: tuple[int, int]  # in the deciding half, of either law


def rates_epsilon(tpr, fpr, delta: float) -> np.ndarray:
    """The least epsilon at which (epsilon, delta)-indistinguishable laws allow a test with tpr >= fpr; >= 0, may be infinite.

    `max(log((tpr - delta) / fpr), log((1 - delta - fpr) / (1 - tpr)), 0)`, of which the first is -infinity where
    tpr <= delta, and so on. Arrays of one shape.
    """
    tpr, fpr = np.asarray(tpr, np.float64), np.asarray(fpr, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        up = np.log(np.maximum(tpr - delta, 0)) - np.log(fpr)
        down = np.log(np.maximum(1 - delta - fpr, 0)) - np.log1p(-tpr)
    up, down = (np.where(top > 0, ratio, -np.inf) for top, ratio in ((tpr - delta, up), (1 - delta - fpr, down)))
    return np.maximum(np.maximum(up, down), 0.0)


def distinguish(inside, outside, *, delta: float = 1e-5, alpha: float = 0.05) -> Distinguished:
    """How far a scalar statistic tells two laws apart, from independent samples `[n]` and `[m]`; larger claims the first.

    Even places choose the threshold and the side, odd places judge: Clopper-Pearson limits of both rates there, alpha / 2
    each, so that the lower limits hold whatever the first half chose. With `n = m = 64` and alpha 0.05 no limit passes 2.103.
    Raises BadInput for fewer than four samples of a law, constant or non-finite ones, delta or alpha out of range.
    """
    inside, outside = (np.asarray(part, np.float64).ravel() for part in (inside, outside))
    require(
        min(len(inside), len(outside)) >= 4, f"need four models or more of either kind, got {len(inside)} and {len(outside)}"
    )
    both = np.concatenate([inside, outside])
    require(np.isfinite(both).all(), "the statistics must be finite")
    require((both != both[0]).any(), f"all statistics are {both[0]:g}: constant scores tell nobody apart")
    check_privacy(1.0, delta)
    each = probability(alpha, "alpha") / 2
    threshold, sign = _rule(inside[::2], outside[::2], delta, each)
    judged = [int((sign * part[1::2] > sign * threshold).sum()) for part in (inside, outside)]
    n, m = len(inside[1::2]), len(outside[1::2])
    tpr, fpr = judged[0] / n, judged[1] / m
    (tpr_low, tpr_high), (fpr_low, fpr_high) = (clopper_pearson(k, size, 2 * each) for k, size in zip(judged, (n, m)))
    # Each rate spends alpha / 2 on the end that matters; a two-sided limit at twice that has the same end.
    mu = max(0.0, float(stats.norm.ppf(tpr_low) - stats.norm.ppf(fpr_high)))
    point, low, high = (
        float(rates_epsilon(one, other, delta)) for one, other in ((tpr, fpr), (tpr_low, fpr_high), (tpr_high, fpr_low))
    )
    return Distinguished(
        tpr=tpr, fpr=fpr, epsilon=point if math.isfinite(point) else None, epsilon_low=low,
        epsilon_high=high if math.isfinite(high) else None, mu_low=mu, epsilon_low_gdp=gdp_epsilon(mu, delta),
        delta=delta, confidence=1 - alpha, samples=(n, m),
    )  # fmt: skip


def _rule(inside: np.ndarray, outside: np.ndarray, delta: float, alpha: float) -> tuple[float, float]:
    """The threshold and the side with the largest lower limit of epsilon; among equals, with the rates furthest apart."""
    values = np.unique(np.concatenate([inside, outside]))
    cuts = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
    best, rule = (-1.0, -1.0), (float(cuts[0]), 1.0)
    n, m = len(inside), len(outside)
    for sign in (1.0, -1.0):
        hits, alarms = ((sign * part > sign * cuts[:, None]).sum(axis=1) for part in (inside, outside))
        low = np.where(hits > 0, stats.beta.ppf(alpha, np.maximum(hits, 1), n - hits + 1), 0.0)
        high = np.where(alarms < m, stats.beta.ppf(1 - alpha, alarms + 1, np.maximum(m - alarms, 1)), 1.0)
        shown = np.where(low > high, rates_epsilon(low, high, delta), 0.0)
        at = int(np.lexsort((low - high, shown))[-1])
        if (shown[at], (low - high)[at]) > best:
            best, rule = (float(shown[at]), float((low - high)[at])), (float(cuts[at]), sign)
    return rule
