"""Bounds around one model's weights: what a Gaussian cloud of draws says about every cloud moved by up to eta."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dememo_jax import bounds, evaluate
from dememo_jax.certify.draws import Draws, cloud, draw, limits, measured, number, subset
from dememo_jax.certify.planning import check, demands, plan, radii, reaches, shares
from dememo_jax.types import Apply, Dataset, Key, Params

ASSUMPTIONS = (
    "local and parametric: about Gaussian clouds centred within eta of these weights, not other training runs",
    "a quantile over the noise: a single network in the ball, attacked or not, may lie beyond the bound",
    "running statistics such as batch norm's are no part of the ball: they are held fixed, or recomputed from the weights",
    "sigma, q, eta, the groups, the evaluation data and the number of draws were fixed before the draws were seen",
)


@dataclass(frozen=True)
class Row:
    """One statement: for every move v of the weights with ||v|| <= eta, under the noise,

    Pr[score <= upper] >= q, and Pr[score >= lower] >= q (in the published form 1 - q); each with its own confidence
    1 - alpha over the draws. None where the draws support no bound: it abstains.
    """

    group: str
    q: float
    eta: float
    shift: float  # eta in standard deviations of the noise
    upper: float | None
    lower: float | None
    level: float  # quantile level of the draws that pays for the move
    lower_level: float  # the same for the lower bound; another in the published form
    alpha: float  # chance that this bound fails, that of a limit from a subset of the images included
    draws: int
    draws_needed: int | None  # fewest with which both bounds exist; None where no float64 count would do
    quantile: float  # of the draws at q, and at 1 - q: of the cloud as it is, estimated without confidence
    lower_quantile: float
    reason: str | None  # why it abstained
    sigma: float | None = None  # of the noise; None where leaves have scales of their own
    fingerprint: tuple[tuple[str, str], ...] = ()  # of the noise, the data and the metric


@dataclass(frozen=True)
class DepthCertificate:
    """Dememorization depth (SoK Theorem 1) for every group, q and eta, together at confidence 1 - alpha over the draws.

    It bounds a quantile over Gaussian weight noise, not the accuracy of one attacked network.
    """

    rows: tuple[Row, ...]
    side: str  # "both", "upper" or "lower": which bounds were asked for
    form: str  # "corrected", or "published": the paper's lower level
    lower_holds_with: tuple[float, ...]  # the probability over the noise that lower bounds hold with, for each q
    alpha: float  # of all statements together
    statements: int  # how many bounds share alpha
    simultaneous: bool
    draws: int
    start: int
    sigma: float | None
    radius: str  # what eta measures
    noise_norm: float | None
    scales: tuple[tuple[str, float], ...]
    largest_eta: tuple[float | None, ...]  # that so many draws can certify, for each q
    precision: str
    images: tuple[tuple[int, int], ...] | None  # (evaluated, all) of each group
    image_alpha: float  # part of alpha that pays for evaluating a subset of the images
    fingerprint: Mapping[str, str]
    assumptions: tuple[str, ...] = ASSUMPTIONS

    def __str__(self) -> str:
        noise = "scales of their own" if self.sigma is None else f"sigma {self.sigma:g}"
        head = (
            f"Depth under noise of {noise}: {self.draws:,} draws, {self.statements} bounds at confidence {1 - self.alpha:.4g}"
        )
        rows = [
            f"  {row.group}: q {row.q:g}, eta {row.eta:g}: score from {_told(row.lower)} to {_told(row.upper)}"
            + (f" ({row.reason})" if row.reason else "")
            for row in self.rows
        ]
        return "\n".join([head, *rows])


def _told(value: float | None) -> str:
    return "no bound" if value is None else f"{value:.4g}"


def bound(
    draws: Draws,
    *,
    eta: Sequence[float],
    q: float | Sequence[float] = 0.9,
    alpha: float = 0.01,
    side: str = "both",
    form: str = "corrected",
    simultaneous: bool = True,
) -> DepthCertificate:
    """The certificate that draws already made support.

    eta: radii, in l2 over the noised leaves; where leaves have scales of their own, lengths of Sigma^(-1/2) v.
    side: "both" states upper and lower bounds, each at q: both at once hold with probability 2 q - 1.
    form: the paper's lower bound holds with probability 1 - q only ("published"); the default is the corrected one.
    simultaneous: alpha is split over all bounds (Bonferroni), so that they hold together. The published code spends all
        of it on each of its 26 rows: `simultaneous=False`.
    A bound that the draws cannot support is None, and `draws_needed` says how many would do.
    Raises BadInput for parameters out of range or draws that are none.
    """
    qs = shares(q)
    check(sigma=draws.sigma, eta=eta, q=qs, alpha=alpha, draws=len(draws.scores), side=side, form=form)
    asked = demands(sigma=draws.sigma, eta=eta, q=qs, alpha=alpha, groups=len(draws.groups), side=side, form=form,
                    simultaneous=simultaneous, subset=subset(draws))  # fmt: skip
    count = len(draws.scores)
    image_alpha = alpha / 2 if subset(draws) else 0.0
    # All limits hold together but for a chance of image_alpha; then order statistics of the high ones lie at or above
    # those of the true scores.
    beta = alpha / 2 / (draws.scores.size * (2 if side == "both" else 1))
    columns = limits(draws, beta)
    paid = beta * count if subset(draws) else 0.0

    def row(group: str, low: np.ndarray, high: np.ndarray, d) -> Row:
        upper, lower = side != "lower", side != "upper"
        enough = d.needed is not None and count >= d.needed
        do = "no count" if d.needed is None else f"{d.needed}"
        return Row(
            group=group, q=d.q, eta=d.eta, shift=d.shift,
            upper=bounds.quantile_upper(high, d.level, d.alpha, tail=d.tail) if upper else None,
            lower=bounds.quantile_lower(low, d.lower_level, d.alpha, tail=d.lower_tail) if lower else None,
            level=d.level, lower_level=d.lower_level, alpha=d.alpha + paid, draws=count, draws_needed=d.needed,
            quantile=bounds.empirical_quantile(high, d.q), lower_quantile=-bounds.empirical_quantile(-low, d.q),
            reason=None if enough else f"{count} draws, {do} would do at eta / sigma = {d.shift:.3g}",
            sigma=draws.sigma, fingerprint=measured(draws),
        )  # fmt: skip

    reach = reaches(count, qs, asked[0].alpha, side, form)
    return DepthCertificate(
        rows=tuple(row(g, low, high, d) for g, (low, high) in zip(draws.groups, columns) for d in asked),
        side=side, form=form, lower_holds_with=tuple(1 - v if form == "published" else v for v in qs),
        alpha=alpha, statements=len(asked) * len(draws.groups) * (2 if side == "both" else 1), simultaneous=simultaneous,
        draws=count, start=draws.start, sigma=draws.sigma, radius=radii(draws.sigma), noise_norm=draws.noise_norm,
        scales=draws.scales, largest_eta=tuple(None if r is None else r * (draws.sigma or 1.0) for r in reach),
        precision=draws.precision, images=draws.images, image_alpha=image_alpha, fingerprint=dict(draws.fingerprint),
    )  # fmt: skip


def depth(
    apply: Apply,
    params: Params,
    data: Dataset,
    key: Key,
    *,
    sigma: float | Params,
    eta: Sequence[float],
    q: float | Sequence[float] = 0.9,
    draws: int = 1000,
    alpha: float = 0.01,
    groups: Mapping[str, np.ndarray] | None = None,
    side: str = "both",
    form: str = "corrected",
    simultaneous: bool = True,
    only: str | None = None,
    prepare: Callable[[Params], Any] | None = None,
    precision: str = "float32",
    images: int | None = None,
    batch: int | None = None,
    **engine: Any,
) -> DepthCertificate:
    """Dememorization depth (SoK Theorem 1, after Wang et al. 2025): how much the neighbourhood of these weights can know.

    For every v with ||v||_2 <= eta, accuracy under `params + v + kappa`, kappa ~ N(0, sigma^2 I), stays at or below each
    row's `upper` with probability q over kappa, and at or above its `lower` with probability q; with confidence
    1 - alpha over the draws for all rows together. One pass over the draws serves every group, q, eta and side.

    It bounds a quantile over the noise, not the accuracy of any one network in the ball: compare it with the smoothed
    quantile of an attacked network, never with its accuracy. At a sigma that destroys any network it says little, so
    certify a clean-trained control the same way beside it.

    sigma, groups, only, prepare, precision, images, batch: see `cloud`; eta, q, alpha, side, form, simultaneous: see
    `bound`; engine (start, prior, after, strategy, width, every, over, memory): see `draw`. Raises BadInput for sigma or
    eta not positive, q or alpha outside (0, 1), an unusable group, and for draws that could certify no row at all, before
    the first is made.
    """
    qs = shares(q)
    names, _ = evaluate.stack_groups(groups, len(data.y))
    asked: dict[str, Any] = {"eta": eta, "alpha": alpha, "side": side, "form": form, "simultaneous": simultaneous}
    count = draws - engine.get("start", 0)
    what: dict[str, Any] = {"only": only, "prepare": prepare, "precision": precision, "batch": batch}
    plan(sigma=number(sigma), q=qs, groups=len(names), draws=count, subset=images is not None, refuse=True, **asked)
    source = cloud(apply, params, data, key, sigma=sigma, groups=groups, images=images, **what)
    return bound(draw(source, draws=draws, **engine), q=qs, **asked)
