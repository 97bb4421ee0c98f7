"""Langevin unlearning for linear heads: noisy gradient descent that learns, and forgets by going on (Chien et al. 2024).

A logistic head W [F, K] on frozen features with rows at most 1 long and an l2 penalty is strongly convex: noise of every
step hides what earlier steps did, and a few more steps without the forgotten examples are as good as learning anew.
What is released is the last W of a run, once. Nothing of its path may be seen, nor its keys: draw a fresh one for
learning and for every request from the operating system's entropy (see `unlearn.noisy`).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import bounds, keys, noise, tree
from dememo_jax.errors import require
from dememo_jax.types import Array, CertifiedMethod, Dataset, Guarantee, Info, Key
from dememo_jax.unlearn.guarantees import ONCE, ROUNDING, check_params

SLACK = 1e-5  # how much longer than 1 a row may be, for rounding; it is accounted for
LOSSES = ("softmax", "ovr")
MEANING = (
    "the comparator is the same noisy descent, learning and unlearning steps together, on the retained data from the same start"
)
ASSUMPTIONS = (
    "the head was learned by this method from a start that does not depend on the data, for as many steps as stated",
    "n, forget, classes, rates, noise, radius and the numbers of steps were chosen without looking at the forget set",
    ONCE,
    "the features of an example do not depend on the forgotten examples: rows are shortened one by one (`clip_rows`)",
    "only the last weights are released, once: who also sees earlier ones, or the state on the way, sees more",
    "keys are secret, drawn afresh and used once, and the generator's numbers pass for independent Gaussians",
    ROUNDING,
)


class LangevinState(NamedTuple):
    params: Array  # W [F, K]
    forget: Array  # [N] bool
    step: Array


def langevin_head(
    *,
    classes: int,
    n: int,
    forget: int,
    learning_steps: float,
    lr: float,
    sigma: float,
    weight_decay: float,
    radius: float = math.inf,
    loss: str = "softmax",
    relation: str = "removal",
    delta: float = 1e-5,
    accountant: str = "gdp",
) -> CertifiedMethod:
    """`W <- Pi_radius(W - lr grad f(W) + sqrt(2 lr sigma^2) Z)`, f the mean loss over n rows plus weight_decay / 2 |W|^2.

    One step takes the full batch: run it by `loop.scan` or `loop.run` with batch=None and the data set of features, x [N, F].
    Learn with `init(key, None, data)`, which starts from zero (or from given weights that do not depend on the data), for
    `learning_steps`; then forget with `init(key, learned.params, data, mask)`. A head is `state.params`, used by `linear`.
    loss: "softmax" over the classes, or "ovr", the sum of one logistic loss a class. radius: of the Frobenius ball.
    n: rows in learning, those to be forgotten included. forget: the most that are ever forgotten, over all requests.
    relation: "removal" leaves the rows in the mask out and still divides by n; "replacement" expects data in which they
    have been replaced. Rows that are left out may hold anything.

    guarantee(steps): after so many unlearning steps. accountant "gdp": exact shifts, `bounds.langevin_mu`; "renyi": the
    published bound, for learning_steps=math.inf (read: learned until stationary). `smooth` gives the constants, and
    `bounds.langevin_steps(epsilon, delta, ...)` the least number of steps.
    Info: mean `loss` of the rows that are left, `gradient_norm`, `norm` of W after the step.
    Raises BadInput for values out of range; init, outside jit, for rows longer than 1, labels out of range, data that are not
    finite or not n rows, and masks that mark more than `forget` rows or leave none.
    """
    constants = smooth(classes=classes, loss=loss, weight_decay=weight_decay)
    run: dict[str, Any] = {"n": n, "forget": forget, "lr": lr, "sigma": sigma, "learning_steps": learning_steps, **constants}
    run |= {"radius": radius, "relation": relation}
    epsilon_after = bounds.langevin_account(accountant, delta, **run)

    def init(key: Key, params: Any, data: Dataset, forgotten: Any = None) -> LangevinState:
        _check(data, forgotten, n, classes, forget, relation)
        params = _start(params, (data.x.shape[1], classes), data.x.dtype)
        mask = jnp.zeros(n, bool) if forgotten is None else jnp.asarray(forgotten)
        return LangevinState(_project(params, radius), mask, jnp.zeros((), jnp.int32))

    def step(key: Key, state: LangevinState, data: Dataset) -> tuple[LangevinState, Info]:
        keep = ~state.forget if relation == "removal" else jnp.ones_like(state.forget)
        value, gradient = _mean_loss(loss, state.params, data, keep, n)
        gradient += weight_decay * state.params
        # By the number forgotten as well, so that one key for learning and unlearning does not repeat its noise.
        to_noise = keys.at(keys.named(key, "noise"), state.forget.sum())
        params = _project(noise.add(to_noise, state.params - lr * gradient, math.sqrt(2 * lr) * sigma), radius)
        info = {"loss": value, "gradient_norm": tree.norm(gradient), "norm": tree.norm(params)}
        return state._replace(params=params, step=state.step + 1), info

    def guarantee(steps: int) -> Guarantee:
        mu = bounds.langevin_mu(steps, **run) if accountant == "gdp" else None
        return Guarantee(epsilon_after(steps), delta, mu, "retraining", (MEANING, *ASSUMPTIONS, *_said(accountant)))

    return CertifiedMethod(init, step, guarantee)


def smooth(*, classes: int, loss: str, weight_decay: float) -> dict[str, float]:
    """gradient_bound, convexity and smoothness of the head's objective, for `bounds.langevin_steps` and its like.

    For rows x at most 1 long: softmax, |p - e_y| < sqrt(2) and a Hessian of at most 1/2; one against the rest, sqrt(K)
    and 1/4. weight_decay comes on top of the Hessian, and is the convexity.
    """
    require(classes >= 2, f"classes must be at least 2, got {classes}")
    require(loss in LOSSES, f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    require(weight_decay > 0 and math.isfinite(weight_decay), f"weight_decay must be positive and finite, got {weight_decay}")
    longest = 1 + SLACK
    length, bend = (math.sqrt(2), 0.5) if loss == "softmax" else (math.sqrt(classes), 0.25)
    return {
        "gradient_bound": length * longest,
        "convexity": weight_decay,
        "smoothness": bend * longest**2 + weight_decay,
    }


def clip_rows(x: Array, longest: float) -> Array:
    """x / longest, with rows that are still over 1 shortened to 1: each row by itself, so that none tells of another.

    longest is a choice, not a maximum over the data. Zero rows stay zero.
    """
    require(longest > 0 and math.isfinite(longest), f"longest must be positive and finite, got {longest}")
    x = jnp.asarray(x)
    require(x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.floating), "features must be [N, F] of floating point")
    lengths = jnp.linalg.norm(x, axis=1, keepdims=True)
    return x / (jnp.maximum(lengths, longest) * (1 + 8 * jnp.finfo(x.dtype).eps))


def _start(params: Any, shape: tuple[int, int], dtype: Any) -> Array:
    params = jnp.zeros(shape, dtype) if params is None else jnp.asarray(params)
    require(params.shape == shape, f"weights must be [F, K] = {list(shape)}, got {list(params.shape)}")
    check_params(params, "weights")
    return params


def _mean_loss(loss: str, params: Array, data: Dataset, keep: Array, n: int) -> tuple[Array, Array]:
    """Mean loss of the rows kept, and its gradient times their share of n."""
    x = jnp.where(keep[:, None], data.x, 0.0).astype(params.dtype)
    with jax.default_matmul_precision("highest"):
        logits = x @ params
        own = data.y[:, None] == jnp.arange(params.shape[1])
        if loss == "softmax":
            each = jax.nn.logsumexp(logits, axis=1) - jnp.where(own, logits, 0.0).sum(axis=1)
            p = jax.nn.softmax(logits, axis=1)
        else:
            each = jax.nn.softplus(jnp.where(own, -logits, logits)).sum(axis=1)
            p = jax.nn.sigmoid(logits)
        gradient = x.T @ (p - own) / n
    return jnp.where(keep, each, 0.0).sum() / keep.sum(), gradient


def _project(params: Array, radius: float) -> Array:
    return params if math.isinf(radius) else tree.project_ball(params, jnp.zeros_like(params), radius)


def _said(accountant: str) -> tuple[str, ...]:
    if accountant == "gdp":
        return ()
    return ("learning went on until it was stationary (Chien et al. 2024): their bound does not count its steps",)


def _check(data: Dataset, mask: Any, n: int, classes: int, most: int, relation: str) -> None:
    """Of concrete arrays; nothing is known under jit."""
    if isinstance(data.x, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
        return
    keep, x = np.ones(n, bool), data.x
    if mask is not None:
        mask = np.asarray(mask)
        good = mask.shape == (n,) and mask.dtype == bool
        require(good, f"the mask must be boolean [{n}], got {mask.dtype} {list(mask.shape)}")
        require(mask.sum() <= most, f"{mask.sum()} examples are marked, and the guarantee is for {most}: make it with forget=")
        keep = ~mask if relation == "removal" else keep
    require(keep.any(), "every example would be removed: nothing would be left")
    require(x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.floating), f"features must be floating [N, F], got {x.dtype} {x.shape}")
    require(len(x) == n == len(data.y), f"expected the n = {n} rows of learning, got {len(x)} and {len(data.y)} labels")
    y = np.asarray(data.y)[keep]
    require(y.min() >= 0 and y.max() < classes, f"labels must lie in 0..{classes - 1}, got {y.min()}..{y.max()}")
    lengths = np.sqrt(np.square(np.asarray(x, np.float64)).sum(axis=1))
    bad = np.flatnonzero(keep & ~np.isfinite(lengths))
    require(not bad.size, f"features must be finite: row {bad[:1]} holds NaN or infinity")
    longest = lengths[keep].max()
    require(longest <= 1 + SLACK, f"rows must be at most 1 long, got {longest:.6g}: use clip_rows(x, longest)")
