"""How well scores tell members from non-members: ROC, its area, the true-positive rate at a small false-positive rate.

Larger scores claim membership. Scores are `[n]`, independent, or `[M, N]`, M models on N examples: cells of one row
share a model and cells of one column an example, so they are not independent, and the limits allow for both (two-way
clusters, Cameron, Gelbach and Miller 2011; for the area as Obuchowski 1997). What they cannot see is that an attack was fitted
on the other rows: where whole rows are members or not, fit it on rows that are not attacked (`audit.u_lira`).
"""

import bisect
import math
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from dememo_jax.bounds.quantiles import probability
from dememo_jax.errors import require


@dataclass(frozen=True)
class Estimate:
    """A number and its two-sided confidence limits."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Operating:
    """The true-positive rate at a false-positive rate; None where the non-members are too few to tell."""

    fpr: float
    tpr: float | None
    low: float
    high: float
    nonmembers: int
    needed: int  # how many non-members a point estimate needs, 1 / fpr


def roc(scores, members) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False-positive rates, true-positive rates and thresholds, a point for every distinct score, from (0, 0) to (1, 1).

    A point counts the scores at or above its threshold; the first threshold is infinite. Raises BadInput as `auc`.
    """
    scores, members, kept = check_scores(scores, members)
    flat, inside = scores[kept], members[kept]
    order = np.argsort(-flat, kind="stable")
    flat, inside = flat[order], inside[order]
    last = np.append(np.flatnonzero(np.diff(flat)), len(flat) - 1)  # of each run of equal scores
    hits, alarms = np.cumsum(inside)[last], np.cumsum(~inside)[last]
    false, true = (np.append(0.0, counts / counts[-1]) for counts in (alarms, hits))
    return false, true, np.append(np.inf, flat[last])


def auc(scores, members, *, alpha: float = 0.05, counted=None) -> Estimate:
    """The area under the ROC, P(member > non-member) + P(equal) / 2, with limits at confidence 1 - alpha.

    Limits: DeLong et al. 1988 on the logit scale with Student's quantiles, a little wider for unequal numbers; two-way clusters
    for `[M, N]`. At an area of 0 or 1
    they are Clopper and Pearson's of as many disjoint pairs (of clusters) as there are. counted: which cells take part.
    Raises BadInput for shapes that differ, scores that are not finite or all equal, or without a member or a non-member.
    """
    scores, members, kept = check_scores(scores, members, counted)
    probability(alpha, "alpha")
    inside, outside = members & kept, ~members & kept
    n, m = int(inside.sum()), int(outside.sum())
    placed = np.zeros(scores.shape)
    ranks = stats.rankdata(scores[kept])
    own = members[kept]
    ranks_in, ranks_out = stats.rankdata(scores[inside]), stats.rankdata(scores[outside])
    placed[inside] = (ranks[own] - ranks_in) / m
    placed[outside] = 1 - (ranks[~own] - ranks_out) / n
    value = float(placed[inside].mean())
    moved = np.where(inside, (placed - value) / n, 0.0) + np.where(outside, (placed - value) / m, 0.0)
    variance, clusters = _variance(moved, (inside, outside))
    return logit_limits(value, variance, clusters, alpha)


def rank_correlation(x, y) -> tuple[float | None, float | None]:
    """Spearman's rank correlation of two lists, and its two-sided p-value by Student's t (rough below ten pairs).

    (None, None) for fewer than three pairs, or where all of one list are equal: there is no such number.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    require(x.shape == y.shape and x.ndim == 1, f"expected two lists of one length, got {x.shape} and {y.shape}")
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None, None
    found = stats.spearmanr(x, y)
    return float(found.statistic), float(found.pvalue)


def logit_limits(value: float, variance: float, independent: int, alpha: float, freedom: float | None = None) -> Estimate:
    """Limits of a share in [0, 1] from its variance; at 0 or 1, those of so many independent cases that all fell alike.

    freedom: degrees of freedom of the variance, `independent - 1` if not given.
    """
    if variance <= 0 or value in (0.0, 1.0):
        least = float(stats.beta.ppf(alpha / 2, independent, 1))
        return Estimate(value, least if value > 0.5 else 0.0, 1.0 if value >= 0.5 else 1 - least)
    freedom = independent - 1 if freedom is None else freedom
    reach = stats.t.ppf(1 - alpha / 2, max(1, freedom)) * math.sqrt(variance) / (value * (1 - value))
    low, high = special.expit(special.logit(value) + np.array([-reach, reach]))
    return Estimate(value, float(low), float(high))


def tpr_at(scores, members, fpr: float, *, alpha: float = 0.05, counted=None) -> Operating:
    """The true-positive rate at the lowest threshold whose false-positive rate is at most `fpr`, with limits.

    The limits hold for the law that the scores come from, not for the threshold that happened: a higher threshold whose true
    false-positive rate is at most `fpr` bounds it from below, a lower one from above, each of the four binomial statements
    taking alpha / 4 (Clopper and Pearson; in `[M, N]` with the effective counts of Korn and Graubard 1998). Without enough
    non-members, 0 and 1. `tpr` is None below 1 / fpr non-members. Raises BadInput as `auc`, and for fpr outside (0, 1).
    """
    scores, members, kept = check_scores(scores, members, counted)
    require(0 < fpr < 1, f"a false-positive rate lies strictly between 0 and 1, got {fpr}")
    each = probability(alpha, "alpha") / 4
    inside, outside = members & kept, ~members & kept
    descending = -np.sort(-scores[outside])
    m = len(descending)
    allowed = min(math.floor(fpr * m + 1e-9), m - 1)
    threshold = descending[allowed]
    hits = scores > threshold
    value = float(hits[inside].mean())
    n_in, n_out = _effective(hits, inside, each), _effective(hits, outside, each)
    # Limits grow with the count, so that a search finds the counts whose limits keep to `fpr`.
    low, high = 0.0, 1.0
    surely_below = bisect.bisect_right(range(m + 1), fpr, key=lambda count: _most(count / m, n_out, each))
    if surely_below:
        strict = descending[surely_below - 1]  # fewer non-members than that lie above it
        low = _least(float((scores[inside] > strict).mean()), n_in, each)
    surely_above = bisect.bisect_left(range(m + 1), fpr, key=lambda count: _least(count / m, n_out, each))
    if surely_above <= m:
        high = _most(float((scores[inside] >= descending[surely_above - 1]).mean()), n_in, each)
    needed = math.ceil((1 - 1e-9) / fpr)
    return Operating(fpr, value if m >= needed else None, low, high, m, needed)


def _least(share: float, n: float, tail: float) -> float:
    """Clopper and Pearson's lower limit of a share of n trials, not necessarily a whole number."""
    return float(stats.beta.ppf(tail, share * n, (1 - share) * n + 1)) if share > 0 else 0.0


def _most(share: float, n: float, tail: float) -> float:
    return float(stats.beta.ppf(1 - tail, share * n + 1, (1 - share) * n)) if share < 1 else 1.0


def check_scores(scores, members, counted=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, members and counted as arrays of one shape; BadInput for what cannot be a membership attack's result."""
    scores, members = np.asarray(scores, np.float64), np.asarray(members)
    require(scores.ndim in (1, 2), f"scores must be [n], or [M, N] of models and examples; got {scores.shape}")
    kept = np.ones(scores.shape, bool) if counted is None else np.asarray(counted)
    for name, mask in (("members", members), ("counted", kept)):
        require(mask.shape == scores.shape, f"scores {scores.shape} and {name} {mask.shape} must have one shape")
        require(mask.dtype == bool, f"{name} must be boolean, got {mask.dtype}")
    require(np.isfinite(scores[kept]).all(), "scores must be finite")
    require((members & kept).any() and (~members & kept).any(), "need the score of at least one member and one non-member")
    first = scores[kept][0]
    require((scores[kept] != first).any(), f"all scores are {first:g}: constant scores tell nobody apart")
    return scores, members, kept


def _variance(moved: np.ndarray, kinds: tuple[np.ndarray, ...]) -> tuple[float, int]:
    """Of the sum of all influences, and how many independent units of the rarest kind of cell stand behind it."""
    independent = min(int(kind.sum()) for kind in kinds)
    cells = float((moved**2).sum()) * independent / max(1, independent - 1)
    if moved.ndim == 1 or 1 in moved.shape:
        return cells, independent
    total, kept = -float((moved**2).sum()), np.any(kinds, axis=0)
    for axis in (0, 1):
        groups = int(kept.any(axis=axis).sum())
        total += float((moved.sum(axis=axis) ** 2).sum()) * groups / max(1, groups - 1)
        independent = min(independent, *(int(kind.any(axis=axis).sum()) for kind in kinds))
    return max(total, cells), independent


def _effective(hits: np.ndarray, among: np.ndarray, alpha: float) -> float:
    """How many independent trials the cells `among` are worth for the share of hits (Korn and Graubard 1998)."""
    count, rate = int(among.sum()), float(hits[among].mean())
    if among.ndim == 1 or 1 in among.shape:
        return float(count)
    variance, clusters = _variance(np.where(among, hits - rate, 0.0) / count, (among,))
    if rate in (0.0, 1.0) or variance <= 0:
        return float(clusters)
    # Few clusters know their own variance badly; Student's quantile pays for that.
    student = stats.t.ppf(1 - alpha, max(1, count - 1)) / stats.t.ppf(1 - alpha, max(1, clusters - 1))
    return float(min(count, rate * (1 - rate) / variance) * student**2)
