"""Certified removal and correction for linear heads on frozen features: Newton steps, and noise on what is released.

Features X [N, F] of a network that stays as it is, K classes, weights W [F, K]. Over the n rows that are left, the head
minimises, one class against the rest with s_ik = +1 for the own class and -1 for others,

    L(W) = sum_i sum_k softplus(-s_ik x_i.w_k) + (lam n / 2) |W|^2.

L is lam n strongly convex, so weights at which its gradient is g long lie within |g| / (lam n) of its only minimiser,
however they were found. Examples are removed, or their features and labels corrected, by Newton steps on L; |g| is measured
on the host in float64 with a bound of its rounding; where the steps leave too much, the head is fitted from nothing. All of
this is a function of the data and the requests and takes no key. `release` then adds N(0, sigma^2) to every weight.

Why the promise holds. Two heads for the same rows, one updated and one fitted, are at most `sigma m` apart, m being fixed
before any data are seen. With fresh noise each is a Gaussian around its weights, so no test tells one release from the other
better than N(0, 1) from N(m, 1): m-Gaussian differential privacy, and (epsilon, delta) by its exact trade-off (Dong, Roth
and Su 2022). What decides between the Newton step and the fit, and every refusal, is computed from data alone and never from
noise or from anything released. Whichever way was taken, the same distance is kept; there is no choice of noise to select by.
Requests may depend on heads released before: given the requests so far, the state is a function of the data, so the
next release is such a Gaussian whatever was seen, and m adds up in squares over releases (adaptive composition).

Sekhari et al. 2021 analyse a Newton step with noise on the output; their bound of the distance is of the worst case, here it
is measured. Guo et al. 2020 perturb the objective instead: `objective_perturbation`, whose claim is heuristic.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dememo_jax import bounds, keys
from dememo_jax.errors import require
from dememo_jax.types import Array, Guarantee, Key
from dememo_jax.unlearn import headrows, headsums, output_noise

FIT = 0.1  # the share of the distance that a fit may use; an update may use the rest
POLISH = 20  # Newton steps at the end of a fit, at most
ASSUMPTIONS = (
    "the comparator is `fit` on the rows that are left, or their exact minimiser, released with fresh noise of the same law",
    "of several releases each is compared with the rows of its time: who saw a head released before a removal still has it",
    "features and labels of an example do not depend on the examples removed: the network of the features never saw these",
    "classes, lam, sigma, epsilon, delta and the number of releases were chosen without looking at the data",
    "keys are secret, drawn afresh for every release and used once; states, updates, refusals and timings stay secret",
    "every release went on from the state that the one before returned, and one that was thrown away for its noise is counted",
    "the generator's numbers pass for independent; each coordinate's noise is a Gaussian rounded to a grid to within 1e-12 in "
    "total variation, which is not added to delta",
)


class HeadState(NamedTuple):
    """The head before its noise, on the host: a secret."""

    params: np.ndarray  # W [F, K] float64
    removed: np.ndarray  # [N] bool
    residual: np.ndarray  # float64, at least the Frobenius norm of the gradient at W over the rows that are left
    releases: np.ndarray  # int32, made so far
    settings: np.ndarray  # [5] float64, of the head that made it


@dataclass(frozen=True)
class Update:
    """What one request did; these numbers tell of the data and are not for publication."""

    path: str  # "newton", "first_order", "refit" where that left too much, "nothing"
    steps: int  # of Newton's method from the weights before; of a refit, those that polish it
    distance: float  # of the weights from the exact minimiser, at most
    allowed: float  # what `distance` may be at most
    tried: float  # the distance that the first path left, `distance` unless there was a refit
    changed: int  # examples
    already: int  # examples asked for that had been removed before
    note: str


@dataclass(frozen=True)
class Released:
    """A head with its noise: all that may be published."""

    params: Array  # [F, K], in the widest dtype that jax is set to
    guarantee: Guarantee  # of this release and all before it together


class Head(NamedTuple):
    """A linear head that forgets with a guarantee, as pure functions; rows x [N, F], labels y [N] whole numbers.

    fit(x, y, removed=None): the state for the rows outside `removed` [N]. It has no noise and takes no key.
    remove(state, x, y, forget): `forget` is a mask [N] or indices. Rows removed earlier are never looked at again.
    correct(state, x, y, x_new, y_new): rows that differ are replaced, by Newton steps; first_order(..., tau=None) by
    -tau G. All three return a state and an `Update`.
    distance(state): at most how far its weights are from the exact minimiser of the rows that are left.
    release(key, state): a `Released` head and the state to go on with. Nothing else carries a guarantee.
    """

    fit: Callable[..., HeadState]
    remove: Callable[..., tuple[HeadState, Update]]
    correct: Callable[..., tuple[HeadState, Update]]
    first_order: Callable[..., tuple[HeadState, Update]]
    distance: Callable[[HeadState], float]
    release: Callable[[Key, HeadState], tuple[Released, HeadState]]


class _Rules(NamedTuple):
    classes: int
    lam: float
    sigma: float
    delta: float
    releases: int
    steps: int
    mu: float  # of each release

    @property
    def apart(self) -> float:
        """How far apart two heads for the same rows may be."""
        return self.sigma * self.mu

    @property
    def settings(self) -> np.ndarray:
        """What a state is bound to: another objective has another minimiser, other releases were told apart otherwise."""
        return np.asarray([self.classes, self.lam, self.sigma, self.mu, self.releases], np.float64)


class _Request(NamedTuple):
    path: str  # the first to be tried
    changed: int
    already: int = 0
    note: str = ""


def certified_head(
    *,
    classes: int,
    lam: float,
    sigma: float,
    epsilon: float = 1.0,
    delta: float = 1e-5,
    releases: int = 1,
    steps: int = 3,
) -> Head:
    """One-vs-rest logistic regression that forgets by Newton steps, released with noise on its weights.

    Args:
        classes: K.
        lam: ridge for each example; the objective is lam n strongly convex.
        sigma: standard deviation of the noise on every released weight. It hides a distance of `sigma mu`, where
            mu = 0.268 at (1, 1e-5) and one release; a fit uses a tenth of it, an update the rest.
        epsilon, delta: what is promised of all releases together.
        releases: how many heads are released at most; each may be told apart by mu / sqrt(releases).
        steps: Newton steps of a request, at most; more are taken while the distance is too large. Where that is still too
            large, the request is met by a fit from nothing on the rows that are left (`Update.path` is "refit").

    Returns:
        A `Head`. Its functions run on concrete arrays, not under jit. There is no intercept: append a column of ones to the
        features, which is then regularised too.

    Raises:
        BadInput: for anything out of range; by the functions for data that are not those of the state, for no rows left, for
            a fit that rounding keeps too far from the minimiser (it says which sigma would do), and for more releases than
            stated.
        NonFinite: by the functions, where a Hessian cannot be inverted.

    Example:
        head = certified_head(classes=10, lam=1e-2, sigma=0.02, epsilon=1.0, delta=1e-5)
        state, update = head.remove(head.fit(x, y), x, y, forget)
        released, state = head.release(secret, state)
        print(in_words(released.guarantee))
    """
    require(classes >= 2, f"classes must be at least 2, got {classes}")
    require(lam > 0 and math.isfinite(lam), f"lam must be positive and finite, got {lam}: without it a minimiser may not exist")
    require(sigma > 0 and math.isfinite(sigma), f"sigma must be positive and finite, got {sigma}")
    whole = isinstance(releases, int) and releases >= 1
    require(whole, f"releases must be a whole number, at least 1; got {releases}")
    require(steps >= 1, f"steps must be at least 1, got {steps}")
    mu = bounds.gdp_mu(epsilon, delta) / math.sqrt(releases)
    rules = _Rules(classes, lam, sigma, delta, releases, steps, mu)
    return Head(
        partial(_fit, rules),
        partial(_remove, rules),
        partial(_correct, rules),
        partial(_first_order, rules),
        partial(_distance, rules),
        partial(_release, rules),
    )


def linear(params: Array, x: Array) -> Array:
    """Logits [B, K] of features [B, F]: an Apply."""
    return x @ params


# --- requests ----------------------------------------------------------------------------------------------------


def _fit(rules: _Rules, x: Any, y: Any, removed: Any = None) -> HeadState:
    x, y = jnp.asarray(x), jnp.asarray(y)
    removed = np.zeros(len(y), bool) if removed is None else headrows.marked(removed, len(y))
    headrows.check_data(x, y, ~removed, rules.classes)
    point = _fitted(rules, _problem(rules, x, y, removed))
    return HeadState(point.params, removed, np.asarray(point.residual), np.asarray(0, np.int32), rules.settings)


def _remove(rules: _Rules, state: HeadState, x: Any, y: Any, forget: Any) -> tuple[HeadState, Update]:
    _check_settings(rules, state)
    x, y, gone = jnp.asarray(x), jnp.asarray(y), np.asarray(state.removed)
    request = headrows.removal(forget, gone)
    headrows.check_shape(x, y, (len(gone), len(state.params)))
    headrows.check_data(x, y, ~gone, rules.classes)
    if not request.forget.any():
        found = _distance(rules, state)
        return state, Update("nothing", 0, found, _allowed(rules), found, 0, request.already, request.note)
    start = headsums.measured(_problem(rules, x, y, request.removed), state.params)
    of_forgotten = headsums.over(x, y, request.forget, state.params)
    forgotten = of_forgotten.gradient + rules.lam * int(request.forget.sum()) * state.params
    _check_own(state, start.gradient + forgotten, start, of_forgotten.rounding)
    asked = _Request("newton", int(request.forget.sum()), request.already, request.note)
    return _settle(rules, state._replace(removed=request.removed), x, y, start, asked)


def _correct(rules: _Rules, state: HeadState, x: Any, y: Any, x_new: Any, y_new: Any) -> tuple[HeadState, Update]:
    rows, start, _ = _corrected(rules, state, x, y, x_new, y_new)
    return _settle(rules, state, rows.x_new, rows.y_new, start, _Request("newton", int(rows.changed.sum())))


def _first_order(
    rules: _Rules, state: HeadState, x: Any, y: Any, x_new: Any, y_new: Any, tau: float | None = None
) -> tuple[HeadState, Update]:
    """-tau G for G = sum grad(new) - sum grad(old); without tau the one that leaves least of the gradient, linearly."""
    require(tau is None or (np.isfinite(tau) and tau > 0), f"tau must be positive and finite, got {tau}")
    rows, _, push = _corrected(rules, state, x, y, x_new, y_new)
    problem = _problem(rules, rows.x_new, rows.y_new, state.removed)
    if tau is None:
        bent = headsums.over(problem.x, problem.y, problem.keep, state.params, step=push).bent + problem.ridge * push
        tau = float((push * bent).sum() / max(np.square(bent).sum(), 1e-300))
    moved = headsums.measured(problem, state.params + tau * push)
    asked = _Request("first_order", int(rows.changed.sum()), note=f"first order, tau = {tau:.4g}")
    return _settle(rules, state, rows.x_new, rows.y_new, moved, asked)


def _corrected(rules: _Rules, state: HeadState, x, y, x_new, y_new) -> tuple[headrows.Correction, headsums.Point, np.ndarray]:
    """The rows, the gradient over the new ones at the state's weights, and -G."""
    _check_settings(rules, state)
    shape = (len(state.removed), len(state.params))
    rows = headrows.correction(shape, rules.classes, np.asarray(state.removed), x, y, x_new, y_new)
    start = headsums.measured(_problem(rules, rows.x_new, rows.y_new, state.removed), state.params)
    old = headsums.over(rows.x, rows.y, rows.changed, state.params)
    new = headsums.over(rows.x_new, rows.y_new, rows.changed, state.params)
    push = old.gradient - new.gradient
    _check_own(state, start.gradient + push, start, old.rounding + new.rounding)
    return rows, start, push


# --- what the requests share -------------------------------------------------------------------------------------


def _problem(rules: _Rules, x: Array, y: Array, removed: np.ndarray) -> headsums.Problem:
    keep = ~np.asarray(removed)
    return headsums.Problem(x, y, keep, rules.lam * int(keep.sum()))


def _settle(
    rules: _Rules, state: HeadState, x: Array, y: Array, start: headsums.Point, asked: _Request
) -> tuple[HeadState, Update]:
    """Newton steps from `start` (the first-order path has taken its own), and a fit from nothing where they leave too much.

    Decided by data alone: no noise has been drawn for these weights.
    """
    problem, allowed = _problem(rules, x, y, state.removed), _allowed(rules)

    def reached(point: headsums.Point) -> float:
        return _from_minimiser(rules, point.params, point.residual, problem.ridge)

    path, point = asked.path, start
    if path == "newton":
        target = problem.ridge * (allowed - _rounded(rules, start.params))
        point = headsums.descend(problem, start, target=target, most=rules.steps)
    tried = reached(point)
    if not tried <= allowed:
        path, point = "refit", _fitted(rules, problem)
    after = state._replace(params=point.params, residual=np.asarray(point.residual))
    return after, Update(path, point.steps, reached(point), allowed, tried, asked.changed, asked.already, asked.note)


def _fitted(rules: _Rules, problem: headsums.Problem) -> headsums.Point:
    """The minimiser from nothing, within a fit's share of the distance."""
    x, y, keep, ridge = problem
    zero = jnp.zeros((x.shape[1], rules.classes), x.dtype)
    params = np.asarray(headsums.minimise(x, y, jnp.asarray(keep), zero, ridge), np.float64)
    headrows.check_finite(params)
    allowed = FIT * rules.apart
    target = ridge * (allowed - _rounded(rules, params))
    point = headsums.measured(problem, params)
    if point.residual > target:
        point = headsums.descend(problem, point, target=target, most=POLISH)
    found = _from_minimiser(rules, point.params, point.residual, ridge)
    require(
        found <= allowed,
        f"the fit stopped within {found:.3g} of the minimiser, and sigma = {rules.sigma:g} asks for {allowed:.3g}: nothing can "
        f"be promised. Use float64 features (jax_enable_x64), a larger lam, shorter rows, or a sigma of "
        f"{rules.sigma * found / allowed:.3g} or more",
    )
    return point


def _allowed(rules: _Rules) -> float:
    """How far an update may be from the minimiser, so that it stays within reach of every fit."""
    return (1 - FIT) * rules.apart


def _rounded(rules: _Rules, params: np.ndarray) -> float:
    """How far the weights are moved, at most, when they are put on the grid of the noise."""
    return bounds.fine_grid(rules.sigma) / 2 * math.sqrt(params.size)


def _from_minimiser(rules: _Rules, params: np.ndarray, residual: float, ridge: float) -> float:
    return bounds.minimiser_distance(residual, ridge) + _rounded(rules, params)


def _check_settings(rules: _Rules, state: HeadState) -> None:
    same = np.array_equal(np.asarray(state.settings), rules.settings)
    require(
        same,
        "the state was made by a head with other settings (classes, lam, sigma, epsilon, delta, releases): fit with this one",
    )


def _check_own(state: HeadState, gradient: np.ndarray, at: headsums.Point, rounding: float) -> None:
    """The gradient over the rows as they were before the request must be what the state says."""
    rounding += at.residual - float(np.linalg.norm(at.gradient))
    headrows.check_same(float(np.linalg.norm(gradient)), float(state.residual), rounding)


# --- releases ----------------------------------------------------------------------------------------------------


def _distance(rules: _Rules, state: HeadState) -> float:
    _check_settings(rules, state)
    ridge = rules.lam * int((~np.asarray(state.removed)).sum())
    return _from_minimiser(rules, np.asarray(state.params), float(state.residual), ridge)


def _release(rules: _Rules, key: Key, state: HeadState) -> tuple[Released, HeadState]:
    made, found, allowed = int(state.releases), _distance(rules, state), _allowed(rules)
    require(
        found <= allowed, f"the state is up to {found:.3g} from its minimiser, {allowed:.3g} is allowed: it was changed by hand"
    )
    require(
        made < rules.releases,
        f"{made} of {rules.releases} releases are made, and the promise covers no more: make the head with a larger `releases`",
    )
    noisy = output_noise.perturbed(keys.at(keys.named(key, "output"), made), state.params, rules.sigma)
    mu = rules.mu * math.sqrt(made + 1)
    guarantee = Guarantee(bounds.gdp_epsilon(mu, rules.delta), rules.delta, mu, "retraining", ASSUMPTIONS)
    return Released(jnp.asarray(noisy), guarantee), state._replace(releases=np.asarray(made + 1, np.int32))
