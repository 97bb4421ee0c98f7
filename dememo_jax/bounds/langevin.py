"""Langevin unlearning of strongly convex losses (Chien et al. 2024), on the host: how far two noisy descents can differ.

    w <- Pi_R(w - lr grad f(w) + sqrt(2 lr sigma^2) Z),    Z ~ N(0, I),

T steps of learning and then K of unlearning, against the same T + K steps on the retained data from the same start.
f is `convexity`-strongly convex with a `smoothness`-Lipschitz gradient, so a step contracts by
c = max(|1 - lr convexity|, |1 - lr smoothness|), the projection onto a ball by no less; the gradient of one example is at
most `gradient_bound` long.

What S examples do to a step, with f = (1/n) sum of losses + convexity / 2 |w|^2:
- "removal": the sum loses S terms and is still divided by the n of the learning set: lr S M / n. (Divided by n - S it would
  be |(S/n)(mean over the forgotten - mean over the retained)| <= 2 S M / n, as much as for replacement.)
- "replacement": S terms become others: 2 lr S M / n.
"""

import math
from collections.abc import Callable

import numpy as np

from dememo_jax.bounds.accounting import check_privacy, gdp_delta, gdp_epsilon
from dememo_jax.errors import require

RELATIONS = {"removal": 1.0, "replacement": 2.0}
ACCOUNTANTS = ("gdp", "renyi")


def langevin_mu(
    steps: int,
    *,
    learning_steps: float,
    n: int,
    forget: int,
    gradient_bound: float,
    convexity: float,
    smoothness: float,
    lr: float,
    sigma: float,
    radius: float = math.inf,
    relation: str = "removal",
) -> float:
    """The least mu that shifted interpolation proves after K = `steps` of unlearning, of the last iterate alone.

    With s what a step differs by, and every step of the run counted,
    `mu = s c^K (1 + .. + c^(T-1)) / (sqrt(2 lr) sigma sqrt(1 + c^2 + .. + c^(2(T+K-1))))`, which is
    `bounds.noisy_iteration_mu` of the T + K steps: it is attained by quadratics. Counting only the last j learning steps from
    two points 2 R apart may be less; the least over j is returned. learning_steps may be infinite.
    Without unlearning steps it is what the learned head promises. Several requests: let T count every step before the last
    of them, S all examples ever forgotten. Raises BadInput for values out of range or a rate at which a step expands.
    """
    _check(steps, learning_steps, n, forget, gradient_bound, convexity, smoothness, lr, sigma, radius, relation)
    c = max(abs(1 - lr * convexity), abs(1 - lr * smoothness))
    shift = RELATIONS[relation] * lr * forget * gradient_bound / n
    scale = math.sqrt(2 * lr) * sigma

    def counted(j, apart):
        reach = c ** (j + steps) * apart + shift * c**steps * _geometric(c, j)
        hidden = np.sqrt(_geometric(c * c, j + steps))
        return np.divide(reach, scale * hidden, out=np.full(np.shape(reach), np.inf), where=hidden > 0)

    whole = float(counted(np.asarray(float(learning_steps)), 0.0))
    if math.isinf(radius):
        return whole
    # Beyond a few thousand memory lengths another learning step changes nothing.
    memory = 40 / -math.log(c) if 0 < c < 1 else 1.0 if c == 0 else 1e6
    last = min(learning_steps, max(memory, 1.0))
    windows = np.unique(np.floor(np.concatenate([[0.0], np.geomspace(1.0, max(last, 1.0), 400)])))
    return min(whole, float(counted(windows[windows <= learning_steps], 2 * radius).min()))


def langevin_renyi_epsilon(
    steps: int,
    delta: float,
    *,
    n: int,
    forget: int,
    gradient_bound: float,
    convexity: float,
    lr: float,
    sigma: float,
) -> float:
    """The published epsilon: min over alpha > 1 of `exp(-K m lr / alpha) 4 alpha S^2 M^2 / (m sigma^2 n^2)` plus the
    conversion `log(1 / delta) / (alpha - 1)`, for a head that was learned to stationarity: Chien et al. 2024.

    For replacement, and so for removal too; it needs lr <= 1 / smoothness. `langevin_mu` is never worse (half of the exponent
    at K = 0, and a decay that does not shrink with alpha). Each order alpha gives a valid epsilon: the grid is safe.
    """
    require(0 < delta < 1, f"delta must lie in (0, 1), got {delta}")
    _check(steps, math.inf, n, forget, gradient_bound, convexity, max(convexity, 1e-300), lr, sigma, math.inf, "replacement")
    if forget == 0:
        return 0.0
    factor = 4 * forget**2 * gradient_bound**2 / (convexity * sigma**2 * n**2)

    def epsilon(above):
        alpha = 1 + above
        return np.exp(-steps * convexity * lr / alpha) * alpha * factor + math.log(1 / delta) / above

    grid = np.geomspace(1e-6, 1e12, 20_000)
    at = int(np.argmin(epsilon(grid)))
    return float(epsilon(np.geomspace(grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)], 1000)).min())


def langevin_epsilon(steps: int, delta: float, *, accountant: str = "gdp", **run) -> float:
    """epsilon at `delta` after `steps` of unlearning; `run` as for `langevin_mu`, of which "renyi" uses its part.

    "renyi" raises BadInput for a finite number of learning steps, lr above 1 / smoothness, or a radius, which it knows not.
    """
    return langevin_account(accountant, delta, **run)(steps)


def langevin_steps(epsilon: float, delta: float, *, accountant: str = "gdp", **run) -> int:
    """The least number of unlearning steps that is (epsilon, delta)-certified; `run` as for `langevin_epsilon`.

    Raises BadInput where a billion steps do not suffice: raise sigma or the convexity, or forget fewer.
    """
    check_privacy(epsilon, delta)
    if accountant == "gdp":

        def enough(steps):
            return gdp_delta(langevin_mu(steps, **run), epsilon) <= delta

    else:
        of = langevin_account(accountant, delta, **run)

        def enough(steps):
            return of(steps) <= epsilon

    if enough(0):
        return 0
    high = 1
    while not enough(high):
        high *= 2
        require(
            high <= 10**9,
            f"epsilon {epsilon:g} at delta {delta:g} is not reached in a billion steps: raise sigma or the convexity, "
            "or forget fewer",
        )
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def langevin_account(accountant: str, delta: float, **run) -> Callable[[int], float]:
    """epsilon as a function of the steps, after all checks; arguments and errors of `langevin_epsilon`."""
    require(0 < delta < 1, f"delta must lie in (0, 1), got {delta}")
    langevin_mu(0, **run)  # checks
    require(accountant in ACCOUNTANTS, f"accountant must be one of {', '.join(ACCOUNTANTS)}, got {accountant!r}")
    if accountant == "gdp":
        return lambda steps: _least(langevin_mu(steps, **run), delta)
    known = {name: run[name] for name in ("n", "forget", "gradient_bound", "convexity", "lr", "sigma")}
    require(math.isinf(run["learning_steps"]), "the published bound is for learning to stationarity: learning_steps=math.inf")
    require(run["lr"] * run["smoothness"] <= 1 + 1e-12, "the published bound needs lr <= 1 / smoothness")
    return lambda steps: langevin_renyi_epsilon(steps, delta, **known)


def _least(mu: float, delta: float) -> float:
    return 0.0 if gdp_delta(mu, 0.0) <= delta else gdp_epsilon(mu, delta)


def _geometric(c: float, terms):
    """1 + c + .. + c^(terms - 1); terms may be infinite."""
    terms = np.asarray(terms, np.float64)
    if c == 1:
        return terms
    if c == 0:
        return np.minimum(terms, 1.0)
    return np.expm1(terms * math.log(c)) / (c - 1)


def _check(steps, learning_steps, n, forget, gradient_bound, convexity, smoothness, lr, sigma, radius, relation) -> None:
    require(steps >= 0 and int(steps) == steps, f"steps must be a whole number >= 0, got {steps}")
    whole = learning_steps == math.inf or int(learning_steps) == learning_steps
    require(learning_steps >= 0 and whole, f"learning_steps must be a whole number >= 0 or infinite, got {learning_steps}")
    require(n >= 1 and 0 <= forget <= n, f"forget must lie in 0..n, got {forget} of {n}")
    require(gradient_bound >= 0, f"gradient_bound must not be negative, got {gradient_bound}")
    require(0 < convexity <= smoothness, f"need 0 < convexity <= smoothness, got {convexity} and {smoothness}")
    require(lr > 0 and math.isfinite(lr), f"lr must be positive and finite, got {lr}")
    require(lr * smoothness < 2, f"lr must stay below 2 / smoothness = {2 / smoothness:.4g}: larger steps expand; got {lr}")
    require(sigma > 0 and math.isfinite(sigma), f"sigma must be positive and finite, got {sigma}")
    require(radius > 0, f"radius must be positive, got {radius}")
    require(relation in RELATIONS, f"relation must be one of {', '.join(RELATIONS)}, got {relation!r}")
