"""The sums over examples behind linear heads: minimise and solve on the device, measure on the host in float64."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax.types import Array

ROWS = 512  # at a time on the host: sums of sums round less than one long sum
STEPS = 100  # of Newton's method, at most; it takes about ten


class Sums(NamedTuple):
    """Over the rows that are kept, without ridge and noise. All float64."""

    gradient: np.ndarray  # [F, K]
    bent: np.ndarray  # the Hessian times the step, [F, K]
    moved: np.ndarray  # how far the step moves each logit, [n, K]
    gram: np.ndarray  # X'X [F, F]
    longest: float  # row
    rounding: float  # at least the Frobenius norm of the rounding errors in `gradient`, and in `bent`
    rows: int


def over(x: Any, y: Any, keep: np.ndarray, params: Any, *, step: Any = None, gram: bool = False) -> Sums:
    """Gradient of the summed one-vs-rest losses at `params`; with a step [F, K] its curvature, with `gram` X'X."""
    x, y, w = np.asarray(x), np.asarray(y), np.asarray(params, np.float64)
    step = None if step is None else np.asarray(step, np.float64)
    at, shape = np.flatnonzero(keep), w.shape
    gradient, bent, square = np.zeros(shape), np.zeros(shape), np.zeros((shape[0], shape[0]) if gram else (0, 0))
    moved, longest, blocks = [np.zeros((0, shape[1]))], 0.0, math.ceil(len(at) / ROWS)
    size, further = float(np.linalg.norm(w)), 0.0 if step is None else float(np.linalg.norm(step))
    rounding = 0.0
    for begin in range(0, len(at), ROWS):
        rows = x[at[begin : begin + ROWS]].astype(np.float64)
        p = 0.5 * (1 + np.tanh(0.5 * (rows @ w)))
        error = p - (y[at[begin : begin + ROWS], None] == np.arange(shape[1]))
        gradient += rows.T @ error
        lengths = np.linalg.norm(rows, axis=1)
        longest = max(longest, float(lengths.max()))
        summed = np.linalg.norm(error, axis=1)
        if step is not None:
            turned = rows @ step
            bent += rows.T @ (p * (1 - p) * turned)
            moved.append(turned)
            summed += np.linalg.norm(turned, axis=1)
        # A sum of n terms errs by n roundings of the sum of sizes, in any order; a logit by F roundings of |x| |w|, of
        # which a quarter at most is seen in p; p itself by a few roundings.
        each = (ROWS + blocks + 8) * summed + (shape[0] + 8) * lengths * (size + further) + 16 * math.sqrt(shape[1])
        rounding += 2 * float(np.finfo(np.float64).eps) * float((lengths * each).sum())
        if gram:
            square += rows.T @ rows
    return Sums(gradient, bent, np.concatenate(moved), square, longest, rounding, len(at))


class Problem(NamedTuple):
    """The rows to fit: features [N, F], labels [N], which rows are kept [N], and the ridge lam n on the sum of losses."""

    x: Array
    y: Array
    keep: np.ndarray
    ridge: float


class Point(NamedTuple):
    """Weights and the gradient of a problem there, both float64 [F, K]."""

    params: np.ndarray
    gradient: np.ndarray
    residual: float  # at least the Frobenius norm of the gradient in real arithmetic
    steps: int  # of Newton's method that led here


def measured(problem: Problem, params: np.ndarray, steps: int = 0) -> Point:
    """The gradient at `params` in float64, and a bound of its norm that includes all rounding."""
    x, y, keep, ridge = problem
    sums = over(x, y, keep, params)
    gradient = sums.gradient + ridge * params
    eps, length = float(np.finfo(np.float64).eps), float(np.linalg.norm(gradient))
    rounding = sums.rounding + 4 * eps * (ridge * float(np.linalg.norm(params)) + length)
    return Point(params, gradient, (length + rounding) * (1 + 4 * eps * (gradient.size + 8)), steps)


def descend(problem: Problem, start: Point, *, target: float, most: int) -> Point:
    """Full Newton steps while they lower the residual: at least one is tried, at most `most`, until it is at most `target`.

    Gradients are summed in float64 and linear systems solved in the dtype of the features, so that the rounding of the
    device slows the descent and does not limit what it reaches.
    """
    x, keep, here = problem.x, jnp.asarray(problem.keep), start
    for _ in range(most):
        step = np.asarray(solve(x, keep, jnp.asarray(here.params, x.dtype), here.gradient, problem.ridge), np.float64)
        after = measured(problem, here.params - step, here.steps + 1) if np.isfinite(step).all() else None
        if after is None or not after.residual < here.residual:
            break
        here = after
        if here.residual <= target:
            break
    return here


@jax.jit
def minimise(x: Array, y: Array, keep: Array, noise: Array, ridge: Any) -> Array:
    """W [F, K] by damped Newton's method for each class, down to what the dtype resolves.

    The step is log(1 + r) / r of Newton's, r the largest change of a logit: the loss bends no faster than
    |third derivative| <= second, so this lowers the objective always and becomes a full step near the end.
    """
    x = jnp.where(keep[:, None], x, 0.0)
    fine = 10 * jnp.finfo(x.dtype).eps

    def one(problem):
        number, b = problem
        target = (y == number).astype(x.dtype)

        def again(carry):
            _, count, moved, before = carry
            settled = (moved < 1e-2) & (moved > before / 2)  # no longer quadratic: rounding is all that is left
            return (count < STEPS) & (moved > fine) & ~settled

        def newton(carry):
            w, count, moved, _ = carry
            gradient = x.T @ (jax.nn.sigmoid(x @ w) - target) + ridge * w + b
            step = -_inverse(_hessian(x, w, ridge), gradient)
            furthest = jnp.abs(x @ step).max()
            scale = jnp.where(furthest > 0, jnp.log1p(furthest) / jnp.where(furthest > 0, furthest, 1.0), 1.0)
            return w + scale * step, count + 1, furthest, moved

        far = jnp.asarray(jnp.inf, x.dtype)
        return jax.lax.while_loop(again, newton, (jnp.zeros_like(b), 0, far, far))[0]

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(one, (jnp.arange(noise.shape[1]), noise.T)).T


@jax.jit
def solve(x: Array, keep: Array, params: Array, push: Any, ridge: Any) -> Array:
    """H^{-1} push [F, K], H the Hessian of each class at `params` over the rows kept, refined once."""
    x = jnp.where(keep[:, None], x, 0.0)

    def one(problem):
        w, g = problem
        h = _hessian(x, w, ridge)
        step = _inverse(h, g)
        return step + _inverse(h, g - h @ step)

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(one, (params.T, jnp.asarray(push, params.dtype).T)).T


def _hessian(x: Array, w: Array, ridge: Any) -> Array:
    z = x @ w
    return x.T @ ((jax.nn.sigmoid(z) * jax.nn.sigmoid(-z))[:, None] * x) + ridge * jnp.eye(x.shape[1], dtype=x.dtype)


_inverse = partial(jax.scipy.linalg.solve, assume_a="pos")
