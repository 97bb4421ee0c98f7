"""Certified removal and correction for linear heads on frozen features: Guo et al. 2020, Warnecke et al. 2023.

Features X [N, F] of a network that stays as it is, K classes, weights W [F, K]. The head minimises, one class against
the rest with s_ik = +1 for the own class and -1 for others,

    sum_i softplus(-s_ik x_i.w_k) + (lam n / 2) |w_k|^2 + b_k.w_k,        B = (b_1 .. b_K) ~ N(0, sigma^2)^{F x K},

n being the number of examples that are left. Examples are removed, or their features and labels corrected, by one Newton
step. What a step leaves of the gradient looks like a shift of B, and B hides it while it stays within a budget.

Programs run in the dtype of the features, float32 or float64. The account is kept beside them, on the host in float64:
the gradient norm that the fit stopped at, the linear system's residual, the rounding of the weights and a bound of its own
rounding are all charged. The state holds B: state and key are secrets, and `state.params` alone is released.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import bounds, keys
from dememo_jax.errors import BadInput, NonFinite, require
from dememo_jax.types import Array, Guarantee, Key
from dememo_jax.unlearn import headsums

ACCOUNTS = ("bound", "measured")
ASSUMPTIONS = (
    "the comparator is the exact minimiser of the same objective, with noise of the same law, on the data as they are now",
    "features and labels of an example do not depend on the examples removed: the network of the features never saw these",
    "what is removed is named by index and counted as rows; classes, lam, sigma, epsilon and delta do not depend on it",
    "the key is secret, drawn afresh for every fit and used once; the state, which holds the noise B, is not released",
    "one released head at a time: who sees two heads of one fit sees more than is promised here",
    "Guo et al. 2020, Theorem 3: the gradient left over counts as a shift of B, as if it did not move with B",
    "requests do not depend on released heads (they are not adaptive)",
)


class HeadState(NamedTuple):
    params: Array  # W [F, K]
    noise: Array  # B [F, K], secret
    removed: Array  # [N] bool
    spent: Array  # float32, at least the Frobenius norm of the objective's gradient at W
    spectral: Array  # float32, at least |X|_2 of what is left


@dataclass(frozen=True)
class Update:
    """What one request cost. All but `spent` and `budget` are of this request alone."""

    charged: float  # what it added to the residual, at most
    spent: float  # the residual after it, at most
    budget: float
    measured: float  # the residual after it, summed in float64 with its rounding added
    published: float  # Guo et al.'s bound of the nonlinear part, for comparison
    nonlinear: float  # the sharper bound that was charged
    changed: int  # examples
    already: int  # examples asked for that had been removed before
    note: str


class BudgetSpent(BadInput):
    """The request would leave more of the gradient than the noise hides; nothing was changed."""

    def __init__(self, message: str, needed: float, budget: float):
        super().__init__(message)
        self.needed, self.budget = needed, budget


class Head(NamedTuple):
    """A linear head that forgets with a guarantee, as pure functions; rows x [N, F], labels y [N] whole numbers.

    fit(key, x, y, removed=None): the state for the rows outside `removed` [N]; a refit takes a fresh key.
    remove(state, x, y, forget): `forget` is a mask [N] or indices. Rows removed earlier are never looked at again.
    correct(state, x, y, x_new, y_new): rows that differ are replaced, by a Newton step; first_order(..., tau=None) by
    -tau G. Both return a state and an `Update`.
    """

    fit: Callable[..., HeadState]
    remove: Callable[..., tuple[HeadState, Update]]
    correct: Callable[..., tuple[HeadState, Update]]
    first_order: Callable[..., tuple[HeadState, Update]]
    guarantee: Callable[[HeadState], Guarantee]


class _Rules(NamedTuple):
    classes: int
    lam: float
    sigma: float
    epsilon: float
    delta: float
    budget: float
    account: str


def certified_head(
    *,
    classes: int,
    lam: float,
    sigma: float,
    epsilon: float = 1.0,
    delta: float = 1e-4,
    budget: str = "published",
    account: str = "bound",
) -> Head:
    """One-vs-rest logistic regression whose minimiser is blurred by B, and which forgets by Newton steps.

    lam: ridge for each example, 1e-3 for MNIST 3 against 8 and 2e-4 for SVHN as published. sigma: noise on the sum of the
    losses, 10 as published; `epsilon`, `delta` and sigma fix the budget of the residual (`bounds.removal_budget`: 2.28 for
    (1, 1e-4) and 10).
    account: "bound": bounds of the residuals add up from request to request, as published, though with
    `bounds.newton_residual`, which is sharper by a factor of 5 or more. "measured": the residual is the gradient norm of
    the objective itself, taken anew after every request where that is less; it lasts longer.

    fit charges the gradient norm it stopped at, and raises BudgetSpent where that is over the budget (large sums in
    float32: use x64, or a larger sigma). Requests that would go beyond the budget raise BudgetSpent with the numbers; the
    remedy is to fit again without the examples. BadInput for anything out of range, data that are not those of the state
    (the gradient there is larger than it can be), or no rows left; NonFinite where a Hessian cannot be inverted.
    No intercept: append a column of ones to the features, which is then regularised too. Not for use under jit.
    """
    require(classes >= 2, f"classes must be at least 2, got {classes}")
    require(lam > 0 and np.isfinite(lam), f"lam must be positive and finite, got {lam}: without it a minimiser may not exist")
    require(account in ACCOUNTS, f"account must be one of {', '.join(ACCOUNTS)}, got {account!r}")
    limit = bounds.removal_budget(epsilon, delta, sigma, budget)
    rules = _Rules(classes, lam, sigma, epsilon, delta, limit, account)
    return Head(
        partial(_fit, rules),
        partial(_remove, rules),
        partial(_correct, rules),
        partial(_first_order, rules),
        partial(_guarantee, rules),
    )


def linear(params: Array, x: Array) -> Array:
    """Logits [B, K] of features [B, F]: an Apply."""
    return x @ params


# --- requests ----------------------------------------------------------------------------------------------------


def _fit(rules: _Rules, key: Key, x: Any, y: Any, removed: Any = None) -> HeadState:
    x, y = jnp.asarray(x), jnp.asarray(y)
    removed = np.zeros(len(y), bool) if removed is None else _marked(removed, len(y))
    _check_data(rules, x, y, ~removed)
    noise = rules.sigma * jax.random.normal(keys.named(key, "objective"), (x.shape[1], rules.classes), x.dtype)
    ridge = rules.lam * int((~removed).sum())
    params = headsums.minimise(x, y, jnp.asarray(~removed), noise, ridge)
    _check_finite(params)
    sums = headsums.over(x, y, ~removed, params, gram=True)
    spectral = bounds.spectral_above(sums.gram, sums.rows)
    residual = float(np.linalg.norm(sums.gradient + ridge * _host(params) + _host(noise))) + sums.rounding
    if residual > rules.budget:
        raise BudgetSpent(
            f"the fit stopped at a gradient norm of {residual:.4g}, over the budget of {rules.budget:.4g}: use float64 "
            "(jax_enable_x64), shorter rows or a larger sigma",
            residual,
            rules.budget,
        )
    return HeadState(params, noise, jnp.asarray(removed), _upwards(residual), _upwards(spectral))


def _remove(rules: _Rules, state: HeadState, x: Any, y: Any, forget: Any) -> tuple[HeadState, Update]:
    x, y = jnp.asarray(x), jnp.asarray(y)
    asked, gone = _marked(forget, len(state.removed)), np.asarray(state.removed)
    forget, removed = asked & ~gone, asked | gone
    already = int((asked & gone).sum())
    _check_rows(state, x, y)
    require(not removed.all(), "every example would be removed: nothing would be left to fit")
    _check_data(rules, x, y, ~gone)
    if not forget.any():
        note = f"nothing to do: all {already} were removed before" if already else "nothing to do: no example was named"
        left = float(state.spent)
        return state, Update(0.0, left, rules.budget, left, 0.0, 0.0, 0, already, note)
    of_forgotten = headsums.over(x, y, forget, state.params).gradient
    push = of_forgotten + rules.lam * int(forget.sum()) * _host(state.params)
    kept = state._replace(removed=jnp.asarray(removed))
    step = headsums.solve(x, jnp.asarray(~removed), state.params, push, rules.lam * int((~removed).sum()))
    note = f"{already} of {int(asked.sum())} had been removed before" if already else ""
    return _charge(rules, kept, x, y, push, step, int(forget.sum()), already, note)


def _correct(rules: _Rules, state: HeadState, x: Any, y: Any, x_new: Any, y_new: Any) -> tuple[HeadState, Update]:
    x_new, y_new, push, changed, wider = _difference(rules, state, x, y, x_new, y_new)
    ridge = rules.lam * int((~wider.removed).sum())
    step = headsums.solve(x_new, ~wider.removed, state.params, push, ridge)
    return _charge(rules, wider, x_new, y_new, push, step, changed, 0, "")


def _first_order(
    rules: _Rules, state: HeadState, x: Any, y: Any, x_new: Any, y_new: Any, tau: float | None = None
) -> tuple[HeadState, Update]:
    """-tau G for G = sum grad(new) - sum grad(old); without tau the one that leaves least of the gradient, linearly."""
    x_new, y_new, push, changed, wider = _difference(rules, state, x, y, x_new, y_new)
    require(tau is None or (np.isfinite(tau) and tau > 0), f"tau must be positive and finite, got {tau}")
    if tau is None:
        keep = ~np.asarray(wider.removed)
        bent = headsums.over(x_new, y_new, keep, state.params, step=push).bent + rules.lam * int(keep.sum()) * push
        tau = float((push * bent).sum() / max(np.square(bent).sum(), 1e-300))
    return _charge(rules, wider, x_new, y_new, push, tau * push, changed, 0, f"first order, tau = {tau:.4g}")


def _guarantee(rules: _Rules, state: HeadState) -> Guarantee:
    spent = float(state.spent)
    require(spent <= rules.budget, f"nothing is promised: the residual is up to {spent:.4g}, the budget {rules.budget:.4g}")
    return Guarantee(rules.epsilon, rules.delta, None, "retraining", ASSUMPTIONS)


def _difference(rules: _Rules, state: HeadState, x, y, x_new, y_new) -> tuple[Array, Array, np.ndarray, int, HeadState]:
    """The new rows, -G, how many rows differ, and the state with room in `spectral` for the new rows."""
    x, y, x_new, y_new = (jnp.asarray(part) for part in (x, y, x_new, y_new))
    _check_rows(state, x, y)
    _check_rows(state, x_new, y_new)
    keep = ~np.asarray(state.removed)
    _check_data(rules, x, y, keep)
    _check_data(rules, x_new, y_new, keep)
    changed = keep & (np.asarray(y != y_new) | np.asarray((x != x_new).any(axis=1)))
    require(changed.any(), "no example that is left differs between the old and the new rows: there is nothing to correct")
    old = headsums.over(x, y, changed, state.params)
    new = headsums.over(x_new, y_new, changed, state.params, gram=True)
    added = bounds.spectral_above(new.gram, new.rows)  # X'X grows by no more than the new rows' own
    wider = state._replace(spectral=_upwards(np.hypot(float(state.spectral), added)))
    return x_new, y_new, old.gradient - new.gradient, int(changed.sum()), wider


def _charge(
    rules: _Rules, state: HeadState, x: Array, y: Array, push: np.ndarray, step: Any, changed: int, already: int, note: str
) -> tuple[HeadState, Update]:
    """Take the step if the residual it leaves fits the budget.

    With u the gradient left so far, the new objective has gradient u - push at the old weights. A step D changes it by
    HD and by a remainder, so that |HD - push| and a bound of the remainder are what is charged; D is the difference of the
    weights as they are stored.
    """
    params = jnp.asarray(_host(state.params) + _host(step), state.params.dtype)
    _check_finite(params)
    taken = _host(params) - _host(state.params)
    keep = ~np.asarray(state.removed)
    ridge = rules.lam * int(keep.sum())
    sums = headsums.over(x, y, keep, state.params, step=taken)
    before = float(np.linalg.norm(sums.gradient + ridge * _host(state.params) + _host(state.noise) + push))
    spent = float(state.spent)
    require(
        before <= spent * (1 + 1e-6) + 2 * sums.rounding,
        f"these are not the data that the state was made with: the gradient there is {before:.4g}, and can be {spent:.4g} at "
        "most. Pass rows and labels as they were after the last request",
    )
    spectral = float(state.spectral)
    nonlinear = float(np.linalg.norm(bounds.newton_residual(spectral, sums.moved)))
    lengths = np.linalg.norm(taken, axis=0)
    published = float(np.linalg.norm(bounds.published_residual(spectral, sums.moved, lengths, sums.longest)))
    charged = float(np.linalg.norm(sums.bent + ridge * taken - push)) + nonlinear + sums.rounding
    after = headsums.over(x, y, keep, params)
    measured = float(np.linalg.norm(after.gradient + ridge * _host(params) + _host(state.noise))) + after.rounding
    total = spent + charged if rules.account == "bound" else min(spent + charged, measured)
    left = _upwards(total)
    if float(left) > rules.budget:
        raise BudgetSpent(
            f"the residual would be up to {total:.4g}, {spent:.4g} before and {charged:.4g} for this request, over the budget "
            f"of {rules.budget:.4g}: the noise hides no more. Nothing was changed. Fit again on the data as they are to be, "
            "with a fresh key, or make a smaller request",
            total,
            rules.budget,
        )
    update = Update(charged, float(left), rules.budget, measured, published, nonlinear, changed, already, note)
    return state._replace(params=params, spent=left), update


# --- checks ------------------------------------------------------------------------------------------------------


def _marked(forget: Any, count: int) -> np.ndarray:
    """A mask [count] of a mask or of indices."""
    asked = np.asarray(forget)
    if asked.dtype == bool:
        require(asked.shape == (count,), f"a mask must have one entry an example, [{count}]; got {list(asked.shape)}")
        return asked
    whole = np.issubdtype(asked.dtype, np.integer) or asked.size == 0
    require(whole and asked.ndim <= 1, f"name examples by a boolean mask [{count}] or whole numbers, got {asked.dtype}")
    at = np.atleast_1d(asked).astype(np.int64)
    bad = at[(at < 0) | (at >= count)]
    require(not bad.size, f"example {bad[0] if bad.size else ''} does not exist: there are {count}, numbered from 0")
    mask = np.zeros(count, bool)
    mask[at] = True
    return mask


def _check_rows(state: HeadState, x: Array, y: Array) -> None:
    rows = (len(state.removed), state.params.shape[0])
    require(
        x.shape == rows, f"features must be [N, F] = {list(rows)} as in the fit, removed rows included; got {list(x.shape)}"
    )
    require(y.shape == rows[:1], f"labels must be [{rows[0]}] as in the fit, got {list(y.shape)}")


def _check_data(rules: _Rules, x: Array, y: Array, keep: np.ndarray) -> None:
    """Of the rows in `keep`; the others may hold anything."""
    require(x.ndim == 2 and x.shape[1] >= 1, f"features must be [N, F], got {list(x.shape)}")
    require(jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4, f"features must be float32 or more, got {x.dtype}")
    require(y.shape == (len(x),), f"labels must be one an example, [{len(x)}]; got {list(y.shape)}")
    require(jnp.issubdtype(y.dtype, jnp.integer), f"labels must be whole numbers, got {y.dtype}")
    require(keep.any(), "every example is removed: nothing is left to fit")
    labels = np.asarray(y)[keep]
    within = labels.min() >= 0 and labels.max() < rules.classes
    require(within, f"labels must lie in 0..{rules.classes - 1}, got {labels.min()}..{labels.max()}")
    finite = np.asarray(jnp.isfinite(x).all(axis=1))[keep]
    require(finite.all(), f"features must be finite: row {int(np.flatnonzero(keep)[np.argmin(finite)])} holds NaN or infinity")


def _check_finite(params: Array) -> None:
    if not bool(jnp.isfinite(params).all()):
        raise NonFinite("a Hessian could not be inverted in this precision: raise lam, scale the features, or use float64")


def _upwards(value: float) -> Array:
    """The next float32 above."""
    return jnp.asarray(np.nextafter(np.float32(value), np.float32(np.inf)))


def _host(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64)
