"""How a batch of noise is refined: projected descent of an objective, with all that the published methods vary."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from dememo_jax import keys, projected, tree
from dememo_jax.errors import require
from dememo_jax.protect.bilevel import Join, Refine
from dememo_jax.train import Augment, View
from dememo_jax.types import Array, Dataset, Key, Weights


class Seen(NamedTuple):
    """What an objective may look at: a batch as the network meets it, and the noise on its own."""

    x: Array  # the images after the view; a view may give several of each example
    y: Array  # [B]
    noise: Array  # [B, ...]
    active: Array  # [B] bool, whether an example is to have noise: others are padding, or stay clean
    context: Any  # of the whole set, from `alternate(context=)`


Objective = Callable[[Weights, Seen], Array]  # -> what the noise descends: [B], or a scalar when examples depend on others
# key, number of the step, number of the draw, weights, context -> the weights to look through
Shift = Callable[[Key, Array, Array, Weights, Any], Weights]


def descent(
    objective: Objective,
    ball: projected.Ball,
    *,
    stride: float,
    steps: int,
    start: Literal["kept", "zero", "random"] = "kept",
    restarts: int = 1,
    view: View | None = None,
    shift: Shift | None = None,
    draws: int = 1,
    sharpness: float = 0.0,
    box: bool = True,
    join: Join = operator.add,
) -> Refine:
    """`steps` of projected descent of `objective` for the noise of a batch.

    start: from the stored noise, from none, or from a random draw in the ball. restarts: the search is done so many
    times, and each example keeps the noise of least objective (of its plain protected image; the published TAP keeps one
    restart for all images); the objective must then be one of each example.
    view: what happens to an image before the network sees it, differentiable in the image.
    shift: other weights for each draw (noisy ones, or a checkpoint of an ensemble). A gradient is the mean over `draws`
    draws of view and shift.
    sharpness: every gradient is taken at weights moved that far, in l2, along the gradient of the objective (SAPA: He et
    al. 2024).
    box: keep x + noise in [0, 1]; off for noise that belongs to a class. The gradient passes straight through the clip of
    the protected image.

    Raises BadInput for a stride that is not positive or steps, draws or restarts below one.
    """
    require(start in ("kept", "zero", "random"), f"start must be 'kept', 'zero' or 'random', got {start!r}")
    require(0 < stride < float("inf"), f"stride must be positive, got {stride}")
    require(min(steps, draws, restarts) >= 1, f"steps, draws and restarts must be at least 1: {steps}, {draws}, {restarts}")
    require(restarts == 1 or start == "random", "restarts need a random start")
    require(sharpness >= 0, f"sharpness must not be negative, got {sharpness}")

    how = How(objective, ball, stride, steps, start, restarts, view, shift, draws, sharpness, box, join)
    return partial(_refine, how)


class How(NamedTuple):
    """What `descent` was asked, in its order."""

    objective: Objective
    ball: projected.Ball
    stride: float
    steps: int
    start: str
    restarts: int
    view: View | None
    shift: Shift | None
    draws: int
    sharpness: float
    box: bool
    join: Join


class Job(NamedTuple):
    """A batch whose noise is sought."""

    examples: Dataset
    active: Array
    weights: Weights
    context: Any


def _refine(how: How, key: Key, weights: Weights, context: Any, examples: Dataset, noise: Array, active: Array) -> Array:
    if how.ball.norm == "l2":
        projected.check_l2(how.ball.size, noise.shape[1:])
    job = Job(examples, active, weights, context)
    noise = _worn(job, noise)
    if how.restarts == 1:
        return _attempt(how, job, key, noise)

    def better(best, r):
        found = _attempt(how, job, keys.at(key, r), noise)
        value = _meet(how, job, found, weights, None)
        wins = value < best[1]
        return (jnp.where(wins.reshape(-1, *[1] * (found.ndim - 1)), found, best[0]), jnp.where(wins, value, best[1])), None

    worst = (jnp.zeros_like(noise), jnp.full(len(noise), jnp.inf))
    return jax.lax.scan(better, worst, jnp.arange(how.restarts))[0][0]


def _attempt(how: How, job: Job, key: Key, noise: Array) -> Array:
    """One search."""
    x = job.examples.x

    def project(noise):
        noise = how.ball.project(noise)
        return _worn(job, jnp.clip(x + noise, 0.0, 1.0) - x if how.box else noise)

    def gradient(key, t, noise):
        if how.draws == 1:
            return _gradient(how, job, key, t, jnp.zeros((), jnp.int32), noise)

        def add(total, s):
            return total + _gradient(how, job, keys.at(key, s), t, s, noise), None

        return jax.lax.scan(add, jnp.zeros_like(noise), jnp.arange(how.draws))[0] / how.draws

    to_start, to_search = jax.random.split(key)
    if how.start == "random":
        noise = project(how.ball.draw(to_start, noise.shape))
    elif how.start == "zero":
        noise = jnp.zeros_like(noise)
    return projected.search(
        to_search, noise, gradient, stride=how.stride, steps=how.steps, project=project, direction=how.ball.direction
    )


def _gradient(how: How, job: Job, key: Key, t: Array, s: Array, noise: Array) -> Array:
    """Of the objective in the noise, through one draw of view and shift."""
    weights = job.weights if how.shift is None else how.shift(keys.named(key, "shift"), t, s, job.weights, job.context)
    if how.sharpness:
        slope = jax.grad(lambda params: _total(how, job, noise, weights._replace(params=params), key))(weights.params)
        length = how.sharpness / jnp.maximum(tree.norm(slope), 1e-12)
        weights = weights._replace(params=tree.add(weights.params, jax.tree.map(lambda g: length * g, slope)))
    return jax.grad(lambda noise: _total(how, job, noise, weights, key))(noise)


def _worn(job: Job, noise: Array) -> Array:
    """Noise of those that are to have it: others meet the network as they are."""
    return jnp.where(job.active.reshape(-1, *[1] * (noise.ndim - 1)), noise, 0.0)


def _total(how: How, job: Job, noise: Array, weights: Weights, key: Key | None) -> Array:
    each = _meet(how, job, noise, weights, key)
    return jnp.where(job.active, each, 0.0).sum() if each.ndim else each


def _meet(how: How, job: Job, noise: Array, weights: Weights, key: Key | None) -> Array:
    """The objective of noisy images; without a key, of the images as they are, seen through no view."""
    images = how.join(job.examples.x, noise)
    images = images + jax.lax.stop_gradient(jnp.clip(images, 0.0, 1.0) - images)
    seen = images if how.view is None or key is None else how.view(key, weights, job.examples._replace(x=images))
    return how.objective(weights, Seen(seen, job.examples.y, noise, job.active, job.context))


# --- views and shifts --------------------------------------------------------------------------------------------


def augmented(augment: Augment) -> View:
    """Images through an augmentation that is differentiable in them."""
    return lambda key, weights, batch: augment(key, batch.x)


def then(first: View, second: View) -> View:
    """One view after another: the adversary of an augmented image, say."""

    def view(key: Key, weights: Weights, batch: Dataset) -> Array:
        to_first, to_second = jax.random.split(key)
        return second(to_second, weights, batch._replace(x=first(to_first, weights, batch)))

    return view


def twice(augment: Augment) -> View:
    """Two augmented versions of every image, [2B, ...]: first all of one kind, then all of the other."""

    def view(key: Key, weights: Weights, batch: Dataset) -> Array:
        one, other = jax.random.split(key)
        return jnp.concatenate([augment(one, batch.x), augment(other, batch.x)])

    return view


def ramp(sigmas: tuple[float, ...]) -> Shift:
    """Gaussian weight noise whose scale goes through `sigmas` from step to step, over and over."""

    def shift(key: Key, t: Array, s: Array, weights: Weights, context: Any) -> Weights:
        sigma = jnp.asarray(sigmas, jnp.float32)[t % len(sigmas)]
        return weights._replace(params=tree.add(weights.params, tree.gaussian_like(key, weights.params, sigma)))

    return shift


def member(key: Key, t: Array, s: Array, weights: Weights, context: Weights) -> Weights:
    """Draw s looks through checkpoint s of an ensemble, stacked in the context."""
    return jax.tree.map(lambda stack: stack[s], context)
