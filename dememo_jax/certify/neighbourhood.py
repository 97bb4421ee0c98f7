"""Bounds around one model's weights: what a Gaussian cloud of draws says about every cloud moved by up to eta."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import bounds, evaluate, models, montecarlo, tree
from dememo_jax.errors import require
from dememo_jax.types import Apply, Dataset, Key, Params

SIDES = ("upper", "lower", "lower_published")
ASSUMPTIONS = (
    "local and parametric: about Gaussian clouds centred within eta (l2, all params) of these weights, not other training runs",
    "a quantile over the noise: a single network in the ball may lie beyond the bound",
    "batch-norm and other running statistics are held fixed; the metric is the function as computed, in its precision",
    "the evaluation data, sigma, q and eta were fixed before the draws were seen",
)


@dataclass(frozen=True)
class Bound:
    """One row: with probability >= q over the noise, `group` accuracy stays on the bound's side for all ||v|| <= eta."""

    group: str
    eta: float
    bound: float | None  # None: abstained
    level: float  # quantile level that pays for the shift eta / sigma
    draws_needed: int | None  # fewest draws for which a bound exists; None where no float64 count would do
    reason: str | None  # why it abstained


@dataclass(frozen=True)
class Certificate:
    """Theorem 1 of the SoK for every group and eta, at confidence 1 - alpha over the draws."""

    side: str
    q: float
    sigma: float
    alpha: float  # of the whole family of rows
    rows: int  # how many statements share alpha
    draws: int
    largest_eta: float | None  # what so many draws can certify at most
    noise_norm: float  # expected length of the noise, sigma * sqrt(params)
    bounds: tuple[Bound, ...]
    assumptions: tuple[str, ...] = ASSUMPTIONS


def check(*, sigma: float, eta: Sequence[float], q: float, alpha: float, draws: int, side: str = "upper") -> None:
    """Raise BadInput unless the numbers of a certificate make sense; cheap, for before the long work."""
    require(np.isfinite(sigma) and sigma > 0, f"sigma must be positive, got {sigma}")
    require(side in SIDES, f"side must be one of {', '.join(SIDES)}, got {side!r}")
    require(np.ndim(eta) == 1 and len(eta) > 0, f"eta must be a sequence of at least one radius, got {eta!r}")
    for value in eta:
        require(np.isfinite(value) and value > 0, f"eta must be positive, got {value}")
    require(0 < q < 1, f"q must lie strictly between 0 and 1, got {q}")
    require(0 < alpha < 1, f"alpha must lie strictly between 0 and 1, got {alpha}")
    require(draws >= 1, f"draws must be at least 1, got {draws}")


def from_scores(
    scores: np.ndarray,
    groups: Sequence[str],
    *,
    sigma: float,
    eta: Sequence[float],
    params: int,
    q: float = 0.9,
    alpha: float = 0.01,
    side: str = "upper",
    simultaneous: bool = True,
) -> Certificate:
    """The certificate that draws already made support: scores [S, G], one column a group.

    side: "upper" bounds the metric from above, "lower" from below (with the corrected level: the theorem as printed
        holds with probability 1 - q only, and is kept as "lower_published").
    simultaneous: split alpha over all rows (Bonferroni), so that they hold together. The published code spends the
        whole alpha on each of its 26 rows: `simultaneous=False`.
    """
    scores = np.asarray(scores, np.float64)
    require(scores.ndim == 2 and scores.shape[1] == len(groups), f"scores must be [draws, {len(groups)}], got {scores.shape}")
    require(np.isfinite(scores).all(), "scores must be finite")
    draws = len(scores)
    check(sigma=sigma, eta=eta, q=q, alpha=alpha, draws=draws, side=side)
    rows = len(groups) * len(eta) if simultaneous else 1
    covered = 1.0 - q if side == "lower_published" else q
    quantile = bounds.quantile_upper if side == "upper" else bounds.quantile_lower

    def row(column: int, group: str, radius: float) -> Bound:
        shift = radius / sigma
        level, tail = bounds.shifted_level(covered, shift), bounds.shifted_tail(covered, shift)
        needed = bounds.min_draws(level, alpha / rows, tail=tail)
        enough = needed is not None and draws >= needed
        value = quantile(scores[:, column], level, alpha / rows, tail=tail) if enough else None
        reason = (
            None
            if enough
            else f"{draws} draws, {'no count' if needed is None else needed} would do at eta / sigma = {shift:.3g}"
        )
        return Bound(group, float(radius), value, level, needed, reason)

    reach = bounds.max_shift(draws, covered, alpha / rows)
    return Certificate(
        side=side,
        q=q,
        sigma=float(sigma),
        alpha=alpha,
        rows=rows,
        draws=draws,
        largest_eta=None if reach is None else reach * sigma,
        noise_norm=float(sigma * np.sqrt(params)),
        bounds=tuple(row(j, group, radius) for j, group in enumerate(groups) for radius in eta),
    )


def draw_scores(
    apply: Apply,
    params: Params,
    data: Dataset,
    key: Key,
    *,
    sigma: float,
    draws: int,
    groups: Mapping[str, np.ndarray] | None = None,
    start: int = 0,
    batch: int = evaluate.BATCH,
    width: int = 1,
    every: int | None = None,
    over: jax.sharding.Mesh | None = None,
    after: Callable[[int, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Group accuracies [draws - start, G] of the network under N(0, sigma^2) weight noise; see `montecarlo.scores`."""
    _, masks = evaluate.stack_groups(groups, len(data.y))
    metric = jax.tree_util.Partial(_batched(batch), models.as_apply(apply))
    return montecarlo.scores(
        metric,
        params,
        (data, jnp.asarray(masks)),
        key,
        sigma=sigma,
        start=start,
        stop=draws,
        width=width,
        every=every,
        over=over,
        after=after,
    )


@functools.lru_cache
def _batched(batch: int) -> Callable:
    # One function object a batch size, so that jit recognises the next certificate.
    return functools.partial(evaluate.group_accuracy, batch=batch)


def depth(
    apply: Apply,
    params: Params,
    data: Dataset,
    key: Key,
    *,
    sigma: float,
    eta: Sequence[float],
    q: float = 0.9,
    draws: int = 1000,
    alpha: float = 0.01,
    groups: Mapping[str, np.ndarray] | None = None,
    side: str = "upper",
    simultaneous: bool = True,
    batch: int = evaluate.BATCH,
    width: int = 1,
    over: jax.sharding.Mesh | None = None,
) -> Certificate:
    """Dememorization depth (SoK Theorem 1, after Wang et al. 2025): how much accuracy the neighbourhood can hold.

    For every v with ||v||_2 <= eta, `Pr_kappa[accuracy(params + v + kappa) <= bound] >= q`, kappa ~ N(0, sigma^2 I),
    with confidence 1 - alpha over the draws, for all rows together. All groups and all eta share the draws. A row that
    the draws cannot support abstains: its bound is None and `draws_needed` says how many would do.

    apply: `(params, x [B, ...]) -> logits [B, K]` in evaluation mode. groups: name -> mask [N]; default one group "all".
    Raises BadInput for sigma or eta not positive, q or alpha outside (0, 1), draws < 1, an empty group.
    """
    check(sigma=sigma, eta=eta, q=q, alpha=alpha, draws=draws, side=side)
    names, _ = evaluate.stack_groups(groups, len(data.y))
    scores = draw_scores(apply, params, data, key, sigma=sigma, draws=draws, groups=groups, batch=batch, width=width, over=over)
    size = tree.size(params)
    return from_scores(scores, names, sigma=sigma, eta=eta, params=size, q=q, alpha=alpha, side=side, simultaneous=simultaneous)
