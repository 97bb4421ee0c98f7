"""Are unlearned models distributed as retrained ones? Tests on log-odds `[M, N]` of M models on N forgotten examples.

All compare samples of *models*: `unlearned [M, N]` saw the examples and unlearned them, `retrained [M', N]` never did.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dememo_jax import bounds
from dememo_jax.audit.likelihood import _pair, u_lira
from dememo_jax.errors import require

CLIP, FLOOR = 100.0, 1e-5  # of KLoM
MOST = 50.0  # epsilon-hat is capped there
CELLS = 2**24  # of an intermediate array at once


# --- KL divergence of margins ------------------------------------------------------------------------------------


def klom(unlearned, retrained, *, bins: int = 20) -> np.ndarray:
    """KL divergence of margins (KLoM), Georgiev et al. 2025: KL(unlearned | retrained) of each example's histogram, [N] nats.

    As published, but for one thing: scores clipped to +-100, `bins` equal bins over the joint range of the example, retrained
    probabilities at least 1e-5. The largest score of an example counts in the last bin; the published code loses it (which
    changed the mean over examples by 1.6 %, and single examples by up to 0.34, with 100 models of one distribution).

    Two samples of one law do not give 0 but a bias that grows with the bins over the number of models:
    `bounds.permutation_test` of its mean says what chance alone shows. Raises BadInput for shapes that do not fit.
    """
    unlearned, retrained = _pair(unlearned, retrained)
    require(bins >= 2, f"a histogram needs at least two bins, got {bins}")
    both = np.clip(np.concatenate([unlearned, retrained]), -CLIP, CLIP)
    low, span = both.min(axis=0), np.ptp(both, axis=0)
    place = np.minimum(bins * (both - low) / np.where(span > 0, span, 1.0), bins - 1).astype(np.int64)
    counts = [
        np.stack([(part == i).sum(axis=0) for i in range(bins)]) / len(part)
        for part in (place[: len(unlearned)], place[len(unlearned) :])
    ]
    p, q = counts[0], np.maximum(counts[1], FLOOR)
    return np.where(p > 0, p * (np.log(np.where(p > 0, p, 1.0)) - np.log(q)), 0.0).sum(axis=0)


# --- epsilon-hat -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpsilonHat:
    """The NeurIPS 2023 unlearning metric, and what can be said with confidence beside it."""

    examples: tuple[float, ...]  # [N] point estimates, capped at 50; maximised over rules, so biased upwards
    low: tuple[float, ...]  # [N] lower limits of each example's epsilon
    high: tuple[float | None, ...]  # [N] upper limits of what the chosen rules could show; None: unbounded
    score: float  # forgetting quality: mean of 2^-bucket, buckets of 0.5; 1 is best
    largest_low: float  # lower limit of the largest epsilon of any example, over all N together
    delta: float
    confidence: float  # of each example's limits, and of largest_low


def epsilon_hat(unlearned, retrained, *, delta: float = 1e-5, alpha: float = 0.05) -> EpsilonHat:
    """For each forgotten example, the epsilon that the best decision rule shows between the two kinds of models.

    Points by the published rules: a threshold or an interval; those with exactly one of the two error rates at zero are left
    out, perfect separation counts as infinite and is capped at 50, as is a pair of samples whose ranges differ by a factor of
    100. All cuts are tried, and either side as the positive one, of which the published grid is a part. So points are at
    least the published ones and F is at most the published F, much lower where nothing can be told apart: 0.08 against 0.19
    with 24 models of one distribution and 10 examples. Compare F with F by chance under the same rules, never with
    a published F.
    Limits: half of the models choose a threshold, the other half judges it (`bounds.distinguish`).
    Raises BadInput for fewer than four models of a kind, shapes that do not fit, constant scores.
    """
    unlearned, retrained = _pair(unlearned, retrained)
    points = epsilon_points(unlearned, retrained, delta=delta)
    columns = range(unlearned.shape[1])
    judged = [_judged(unlearned[:, i], retrained[:, i], delta, alpha) for i in columns]
    together = max(_judged(unlearned[:, i], retrained[:, i], delta, alpha / len(columns))[0] for i in columns)
    few = min(len(unlearned), len(retrained))
    return EpsilonHat(
        tuple(points.tolist()), tuple(low for low, _ in judged), tuple(high for _, high in judged),
        forgetting_quality(points, few), together, delta, 1 - alpha,
    )  # fmt: skip


def _judged(one: np.ndarray, other: np.ndarray, delta: float, alpha: float) -> tuple[float, float | None]:
    if np.ptp(np.concatenate([one, other])) == 0:
        return 0.0, 0.0  # the same score under every model
    found = bounds.distinguish(one, other, delta=delta, alpha=alpha)
    return found.epsilon_low, found.epsilon_high


def epsilon_points(unlearned, retrained, *, delta: float = 1e-5) -> np.ndarray:
    """The published point estimates [N]; see `epsilon_hat`."""
    unlearned, retrained = _pair(unlearned, retrained)
    values = np.sort(np.concatenate([unlearned, retrained]), axis=0)  # [M + M', N]
    block = max(1, CELLS // len(values) ** 2)
    shown = _table(len(unlearned), len(retrained), delta)
    found = [
        _best(shown, unlearned[:, i : i + block], retrained[:, i : i + block], values[:, i : i + block])
        for i in range(0, values.shape[1], block)
    ]
    ranges = np.ptp(unlearned, axis=0), np.ptp(retrained, axis=0)
    apart = np.minimum(*ranges) < 0.01 * np.maximum(*ranges)
    return np.where(apart, MOST, np.minimum(np.concatenate(found), MOST))


def _best(shown: np.ndarray, one: np.ndarray, other: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The largest epsilon over all intervals and what lies outside them, thresholds among these, example by example."""
    # How many of either sample lie below every cut; a cut lies just under a value, the last above all.
    below = [
        np.stack([np.append(np.searchsorted(np.sort(part[:, i]), values[:, i]), len(part)) for i in range(part.shape[1])], 1)
        for part in (one, other)
    ]
    inside = [np.maximum(part[None] - part[:, None], 0) for part in below]  # between two cuts; none where they are reversed
    return shown[inside[0], inside[1]].max(axis=(0, 1))


def _table(n: int, m: int, delta: float) -> np.ndarray:
    """Epsilon by how many of either sample a set holds, [n + 1, m + 1], whichever side it claims or spares.

    0 where one of the error rates alone is 0, as published.
    """
    claimed = np.meshgrid(np.arange(n + 1) / n, np.arange(m + 1) / m, indexing="ij")
    found = np.zeros((n + 1, m + 1))
    for first, second in (claimed, claimed[::-1]):
        for tpr, fpr in ((first, second), (1 - first, 1 - second)):
            lopsided = (fpr == 0) != (tpr == 1)
            found = np.maximum(found, np.where(lopsided, 0.0, bounds.rates_epsilon(tpr, fpr, delta)))
    return found


def forgetting_quality(points, models: int) -> float:
    """The published F: mean of 2^-bucket over the examples, buckets of 0.5 in epsilon; 0 from ceil(log(models - 1)) on."""
    require(models >= 2, f"the score needs at least two models of a kind, got {models}")
    points = np.asarray(points)
    bucket = np.floor(points / 0.5)
    return float(np.where(points < math.ceil(math.log(models - 1)), 2.0**-bucket, 0.0).mean())


# --- both sides, and all examples together ------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoSided:
    """Under-unlearning (forgotten examples look too familiar) and over-unlearning (too strange), both."""

    under: float  # share of examples that unlearned models score higher, at a false-discovery rate of alpha
    over: float  # share that they score lower
    area: bounds.Estimate  # mean P(unlearned > retrained) over the examples; 0.5 is right, above is under-unlearning


def two_sided(unlearned, retrained, *, alpha: float = 0.05) -> TwoSided:
    """Which forgotten examples give an unlearned model away, and in which direction.

    Mann-Whitney tests of every example, controlled for their number (Benjamini-Hochberg), and the mean area with limits that
    take models, not examples, for independent (a jackknife over both kinds). Raises BadInput as `klom`.
    """
    unlearned, retrained = _pair(unlearned, retrained)
    require(min(len(unlearned), len(retrained)) >= 2, "need two models or more of either kind")
    _, above, below = bounds.column_tests(unlearned, retrained)
    under, over = bounds.discoveries(above, alpha), bounds.discoveries(below, alpha)
    return TwoSided(float(under.mean()), float(over.mean()), bounds.mean_area(unlearned, retrained, alpha=alpha))


def joint_epsilon(unlearned, retrained, *, delta: float = 1e-5, alpha: float = 0.05) -> bounds.Distinguished:
    """The strongest single test of a guarantee: one number a model, made of all its scores.

    Of every four models of a kind, one fits Gaussians with a variance that both kinds share, one and a half choose a threshold
    for the sum of a model's log-ratios over the examples, and one and a half are judged by it: so the limits of
    `bounds.distinguish` hold, for any guarantee about whole models. Raises BadInput for fewer than eight models of a kind.
    """
    unlearned, retrained = _pair(unlearned, retrained)
    require(min(len(unlearned), len(retrained)) >= 8, "need eight models or more of either kind")
    first = [np.arange(len(part)) % 4 == 0 for part in (unlearned, retrained)]
    fit, rest = ([part[use] for part, use in zip((unlearned, retrained), uses)] for uses in (first, [~use for use in first]))
    middle = [part.mean(axis=0) for part in fit]
    spread = np.concatenate([part - mean for part, mean in zip(fit, middle)])
    variance = np.maximum(np.square(spread).mean(axis=0), 1e-12)

    def ratio(scores: np.ndarray) -> np.ndarray:
        return ((np.square(scores - middle[1]) - np.square(scores - middle[0])) / variance).mean(axis=1)

    ratios = [ratio(part) for part in rest]
    if np.ptp(np.concatenate(ratios)) == 0:  # the fits are equal, and nothing is told apart
        ratios = [np.arange(len(part)) % 2.0 for part in rest]
    return bounds.distinguish(*ratios, delta=delta, alpha=alpha)


# --- everything --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What every test says about one unlearning method."""

    models: tuple[int, int]
    examples: int
    two_sided: TwoSided
    u_lira: bounds.Estimate  # area over all examples, half of the models attacking the other half
    u_lira_tpr: tuple[bounds.Operating, ...]  # of the same attack
    u_lira_all: bounds.Permutation  # of the area where every model is attacked by all the others
    klom: bounds.Permutation  # of the mean
    klom_95: float  # 95th percentile over the examples
    epsilon: EpsilonHat
    quality: bounds.Permutation  # of 1 - score
    joint: bounds.Distinguished
    relative: bounds.Relative | None  # nearer to retrained (first) than to the original (second)?


def compare(
    unlearned, retrained, original=None, *, delta: float = 1e-5, alpha: float = 0.05, fprs: tuple[float, ...] = (0.01, 0.001),
    draws: int = 199, seed: int = 0,
) -> Verdict:  # fmt: skip
    """All tests of this module on one method. original: log-odds [M'', N] of models before unlearning, for the relative test.

    Honest retraining in the place of `unlearned` is the null: its p-values are uniform (that of the quality, which has many
    ties, conservative), its lower limits of epsilon are 0, and each of its intervals of an area misses 0.5 with probability
    of about alpha at most. In simulations of 8, 16 and 64 models of a kind, up to 95 % of whose variance was common to all
    examples of a model, 95 % intervals of U-LiRA's area missed 0.5 in 0 to 5 %.
    """
    unlearned, retrained = _pair(unlearned, retrained)
    scores, members = _with_kinds(*u_lira(unlearned, retrained))
    how: dict[str, Any] = {"draws": draws, "seed": seed}

    def missing(one, other):
        return 1 - forgetting_quality(epsilon_points(one, other, delta=delta), min(len(one), len(other)))

    def noticed(one, other):
        scores, members = _with_kinds(*u_lira(one, other, fit="others"))
        return bounds.auc(scores, members).value if np.ptp(scores) > 0 else 0.5

    return Verdict(
        models=(len(unlearned), len(retrained)), examples=unlearned.shape[1],
        two_sided=two_sided(unlearned, retrained, alpha=alpha),
        u_lira=bounds.auc(scores, members, alpha=alpha) if np.ptp(scores) > 0 else bounds.Estimate(0.5, 0.0, 1.0),
        u_lira_tpr=tuple(bounds.tpr_at(scores, members, fpr, alpha=alpha) for fpr in fprs) if np.ptp(scores) > 0 else (),
        u_lira_all=bounds.permutation_test(noticed, unlearned, retrained, **how),
        klom=bounds.permutation_test(lambda one, other: klom(one, other).mean(), unlearned, retrained, **how),
        klom_95=float(np.percentile(klom(unlearned, retrained), 95)),
        epsilon=epsilon_hat(unlearned, retrained, delta=delta, alpha=alpha),
        quality=bounds.permutation_test(missing, unlearned, retrained, **how),
        joint=joint_epsilon(unlearned, retrained, delta=delta, alpha=alpha),
        relative=None if original is None else bounds.relative_distance(unlearned, retrained, original),
    )  # fmt: skip


def _with_kinds(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores of both kinds of models [M + M', N], and which of them are of the first kind."""
    scores = np.concatenate([one, other])
    return scores, np.broadcast_to((np.arange(len(scores)) < len(one))[:, None], scores.shape)
