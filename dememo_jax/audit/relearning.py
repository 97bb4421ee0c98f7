"""Beside the recovery attack: random search on its sphere, relearning without a ball, what a certificate is compared with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from dememo_jax import bounds, callbacks, evaluate, keys, loop, losses, models, montecarlo, train, tree
from dememo_jax.audit.recovery import default_tx, hint_mask
from dememo_jax.errors import require
from dememo_jax.types import Apply, Array, Dataset, Key, Loss, Model, Params, Weights


@dataclass(frozen=True)
class RandomSearch:
    """The best of random points at one distance from the weights: what an attack must beat to have learned anything."""

    radius: float
    draws: int
    before: float  # accuracy on the evaluation set at the weights themselves
    chosen: float  # of the point that does best on the hints; ties go to the first
    oracle: float  # the best of all points, chosen on the evaluation set itself: the published number


def random_search(
    model: Model, weights: Weights, data: Dataset, evaluation: Dataset, key: Key, *, radius: float, hints: Array | None = None,
    draws: int = 1000, only: str | None = None, **how: Any,
) -> RandomSearch:  # fmt: skip
    """Uniform points on the l2 sphere around the weights, evaluated; the baseline of the published recovery code.

    Arguments as `recover`; `how` goes to `montecarlo.scores` (strategy, over, after). Raises BadInput as they do.
    """
    require(0 < radius < float("inf"), f"the radius must be positive and finite, got {radius}")
    require(len(evaluation.y), "there are no examples to measure a point on")
    held = np.asarray(hint_mask(hints, len(data.y)))
    apply, params = models.freeze(model, weights._replace(params=tree.widened(weights.params)))
    hinted = Dataset(*(part[np.flatnonzero(held)] for part in data))
    metric = Partial(_on_sphere, apply, params, jnp.asarray(radius, jnp.float32))
    sigma = tree.scales(params, 1.0, only=only)
    found = montecarlo.scores(metric, params, (hinted, evaluation), keys.named(key, "random"), sigma=sigma, stop=draws, **how)
    before = float(evaluate.accuracy(apply, params, evaluation))
    share = found / np.array([len(hinted.y), len(evaluation.y)])
    return RandomSearch(radius, len(found), before, float(share[found[:, 0].argmax(), 1]), float(share[:, 1].max()))


def _on_sphere(apply, centre, radius, params, data) -> Array:
    params = tree.project_sphere(params, centre, radius)
    return jnp.stack([evaluate.correct(apply, params, part).sum() for part in data])


@dataclass(frozen=True)
class Relearning:
    """How soon training brings an accuracy back."""

    goal: float
    steps: int | None  # the first look at which the goal was reached; None: not within the steps that were taken
    looks: tuple[int, ...]  # after how many steps
    accuracy: tuple[float, ...]  # on the evaluation set, at each look
    hints: int


def relearn(
    model: Model, weights: Weights, data: Dataset, evaluation: Dataset, key: Key, *, goal: float, hints: Array | None = None,
    most: int = 1000, every: int = 10, batch: int = 128, tx: optax.GradientTransformation | None = None,
    statistics: str = "frozen", loss: Loss = losses.cross_entropy, after: Callable[[int, float], None] | None = None,
) -> Relearning:  # fmt: skip
    """Train on the hints without any ball until `evaluation` is answered with accuracy `goal`, looking every so many steps.

    The number means something beside that of a retrained model under the same attack: one that forgot is not faster.
    Other arguments as `recover`. Raises BadInput for a goal outside (0, 1], no hints, or no steps.
    """
    require(0 < goal <= 1, f"the goal is an accuracy in (0, 1], got {goal}")
    require(most >= every >= 1, f"need most >= every >= 1, got {most} and {every}")
    require(len(evaluation.y), "there are no examples to measure relearning on")
    held = hint_mask(hints, len(data.y))
    tx = default_tx() if tx is None else tx
    weights = weights._replace(params=tree.widened(weights.params))  # half precision would swallow small steps

    def measure(weights: Weights) -> float:  # a count over their number: a share in float32 may fall short of the goal
        return int(evaluate.correct(*models.freeze(model, weights), evaluation).sum()) / len(evaluation.y)

    looks, accuracy = [0], [measure(weights)]

    def look(done: int, state: Any, info: Any) -> callbacks.Answer:
        looks.append(done)
        accuracy.append(measure(state.weights))
        if after is not None:
            callbacks.reports(after(done, accuracy[-1]))
        return loop.STOP if accuracy[-1] >= goal else None

    if accuracy[0] < goal:
        method = train.sgd(model, tx, loss=loss, mode=statistics)
        start = train.start(tx, weights)
        loop.run(method, keys.named(key, "relearn"), start, data, steps=most, every=every, after=look, batch=batch, mask=held)
    reached = looks[-1] if accuracy[-1] >= goal else None
    return Relearning(goal, reached, tuple(looks), tuple(accuracy), int(held.sum()))


@dataclass(frozen=True)
class Smoothed:
    """The accuracy of a model's Gaussian neighbours: what a certificate speaks about, at another centre."""

    sigma: float
    draws: int
    q: float
    quantile: float  # empirical
    low: float | None  # limits of the q-quantile; None: the draws do not support one
    high: float | None
    below: float | None  # share of neighbours at or below the bound that was given
    below_low: float | None  # lower and upper limits of that share
    below_high: float | None
    confidence: float  # of each pair of limits


def smoothed(
    apply: Apply, params: Params, evaluation: Dataset, key: Key, *, sigma: float, q: float = 0.9, bound: float | None = None,
    draws: int = 1000, alpha: float = 0.01, **how: Any,
) -> Smoothed:  # fmt: skip
    """The q-quantile of accuracy over N(params, sigma^2 I), params being where an attack ended.

    This is what SoK Theorem 1 bounds: a certificate of upper bound U at radius eta says that for every centre within eta at
    least a share q of the neighbours stays at or below U. The attacked model's own accuracy may lie above U without any
    contradiction.
    bound: such a U; `below` is then the share of neighbours that keep to it, and `below_high < q` would refute the certificate.
    Raises BadInput as `montecarlo.scores`.
    """
    right = montecarlo.scores(Partial(_count, models.as_apply(apply)), params, evaluation, key, sigma=sigma, stop=draws, **how)
    scores = right[:, 0] / len(evaluation.y)
    low, high = bounds.quantile_lower(scores, 1 - q, alpha / 2), bounds.quantile_upper(scores, q, alpha / 2)
    share: float | None = None
    limits: tuple[float | None, float | None] = (None, None)
    if bound is not None:
        count = int((scores <= bound).sum())
        share, limits = count / len(scores), bounds.clopper_pearson(count, len(scores), alpha)
    return Smoothed(sigma, len(scores), q, bounds.empirical_quantile(scores, q), low, high, share, *limits, 1 - alpha)


def _count(apply, params, data) -> Array:
    return evaluate.correct(apply, params, data).sum()[None]
