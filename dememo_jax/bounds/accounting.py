"""Gaussian differential privacy of noisy iterations: what certified unlearning costs in noise, exactly.

A run is `x_{t+1} = psi_t(x_t) + N(0, sigma_t^2 I)`. Two such runs, of different starts or different data, are mu-Gaussian
DP when their starts are at most `start` apart and `|psi_t(x) - psi'_t(x')| <= contraction_t |x - x'| + shift_t`
(shifted interpolation: Bok, Su and Altschuler 2024). No smoothness or convexity is asked for.
"""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from dememo_jax.errors import require


def check_privacy(epsilon: float, delta: float) -> None:
    """BadInput unless 0 < epsilon < inf and 0 < delta < 1."""
    require(epsilon > 0 and math.isfinite(epsilon), f"epsilon must be positive and finite, got {epsilon}")
    require(0 < delta < 1, f"delta must lie in (0, 1), got {delta}")


def gdp_delta(mu: float, epsilon: float) -> float:
    """The least delta at which mu-Gaussian DP gives (epsilon, delta): Balle and Wang 2018, Dong et al. 2022."""
    require(mu >= 0 and epsilon >= 0 and math.isfinite(epsilon), f"mu and epsilon must not be negative, got {mu} and {epsilon}")
    if mu == 0:
        return 0.0
    # e^epsilon Phi(-epsilon/mu - mu/2) by logarithms: the factors alone overflow and underflow.
    above = math.exp(epsilon + special.log_ndtr(-mu / 2 - epsilon / mu))
    return max(0.0, float(special.ndtr(mu / 2 - epsilon / mu)) - above)


def gdp_epsilon(mu: float, delta: float) -> float:
    """The least epsilon at which mu-Gaussian DP gives (epsilon, delta)."""
    from dp_accounting import get_epsilon_gaussian

    require(mu >= 0 and math.isfinite(mu), f"mu must be a number >= 0, got {mu}")
    require(0 < delta < 1, f"delta must lie in (0, 1), got {delta}")
    with np.errstate(divide="ignore"):  # its search touches delta = 0 on the way
        return 0.0 if mu == 0 else float(get_epsilon_gaussian(1 / mu, delta))


def gdp_mu(epsilon: float, delta: float) -> float:
    """The largest mu whose Gaussian DP gives (epsilon, delta): 0.26805 at (1, 1e-5)."""
    from dp_accounting import get_sigma_gaussian

    check_privacy(epsilon, delta)
    with np.errstate(divide="ignore"):
        return 1 / float(get_sigma_gaussian(epsilon, delta))


def compose_gdp(mus: list[float] | tuple[float, ...]) -> float:
    """mu of the joint release of models, each mu_i-Gaussian DP given those before it: sqrt(sum mu_i^2), Dong et al. 2022."""
    require(len(mus) > 0 and all(mu >= 0 for mu in mus), f"give one or more mu >= 0, got {list(mus)}")
    return math.sqrt(math.fsum(mu * mu for mu in mus))


def noisy_iteration_mu(start: float, contraction: ArrayLike, shift: ArrayLike, sigma: ArrayLike) -> float:
    """The least mu that shifted interpolation proves for a noisy iteration of T steps.

    start: largest distance of the two starts. contraction [T] in [0, 1], shift [T] >= 0, sigma [T] >= 0 (not all zero).
    What is still apart after a step is at most what was, contracted, plus the shift, less what that step's noise is made
    to hide. Seen from the end, the hidden parts b_t cost sum (b_t / (w_t sigma_t))^2 with w_t the product of later
    contractions, and their running sums stay below the supply: the cheapest path is the lower convex hull of the supply.
    At constant contraction c this is `(c^T start + shift sum c^k) / (sigma sqrt(sum c^2k))`. Returns inf where noise comes
    too early to hide what follows. Raises BadInput for lengths that differ or values out of range.
    """
    c, s, noise = (np.asarray(values, np.float64) for values in (contraction, shift, sigma))
    require(c.ndim == 1 and c.shape == s.shape == noise.shape and c.size, "contraction, shift and sigma need one value a step")
    require(((c >= 0) & (c <= 1)).all(), "an iteration must not expand: contractions must lie in [0, 1]")
    require(start >= 0 and (s >= 0).all() and (noise >= 0).all(), "start, shift and sigma must not be negative")
    require(all(np.isfinite(values).all() for values in (c, s, noise, start)), "start, shift and sigma must be finite")
    later = np.append(np.cumprod(c[::-1])[::-1], 1.0)  # product of contractions from step t on
    # Pieces of the path: (supply, time) of each step, the start before all of them, pooled until the slopes rise.
    pieces: list[tuple[float, float]] = []
    for rise, run in [(later[0] * start, 0.0), *zip(later[1:] * s, np.square(later[1:] * noise))]:
        piece = (float(rise), float(run))
        while pieces and _slope(pieces[-1]) >= _slope(piece):
            last = pieces.pop()
            piece = (last[0] + piece[0], last[1] + piece[1])
        pieces.append(piece)
    return math.sqrt(math.fsum(_slope(piece) * piece[0] for piece in pieces if piece[0] > 0))


def _slope(piece: tuple[float, float]) -> float:
    rise, run = piece
    return rise / run if run > 0 else math.inf if rise > 0 else 0.0


# --- the SoK's constant ------------------------------------------------------------------------------------------


def published_sigma(epsilon: float, delta: float, *, steps: int, lr: float, clip_init: float, clip_grad: float) -> float:
    """The SoK's equation (15), `3 sqrt(log(1/delta)) (clip_init + lr clip_grad T) / (epsilon sqrt(T))`, where it holds.

    It amounts to mu = 2 epsilon / (3 sqrt(log(1/delta))) against the same procedure from another start, and is stated for
    epsilon < 3 log(1/delta); there it is up to 1.7 times too large, and beyond epsilon = 10.98 (at delta = 1e-5) it gives
    less than it promises. Raises BadInput there, with the delta that it would deliver.
    """
    check_privacy(epsilon, delta)
    check_run(steps, clip_init)
    finite = math.isfinite(lr) and math.isfinite(clip_grad)
    require(finite and lr > 0 and clip_grad >= 0, f"lr must be positive and clip_grad not negative, got {lr} and {clip_grad}")
    mu = 2 * epsilon / (3 * math.sqrt(math.log(1 / delta)))
    delivered = gdp_delta(mu, epsilon)
    require(
        delivered <= delta,
        f"the published constant does not hold at epsilon {epsilon:g}, delta {delta:g}: a run that attains its bound delivers "
        f"delta {delivered:.3g}. Use calibrate, which is exact at every epsilon",
    )
    reach = clip_init + lr * clip_grad * steps
    return 3 * math.sqrt(math.log(1 / delta)) * reach / (epsilon * math.sqrt(steps))


def check_run(steps: int, clip_init: float) -> None:
    """BadInput unless the run has a step and its start a finite, non-negative radius."""
    require(steps >= 1, f"steps must be at least 1, got {steps}")
    require(clip_init >= 0 and math.isfinite(clip_init), f"clip_init must be a number >= 0, got {clip_init}")


# --- model clipping ----------------------------------------------------------------------------------------------


def model_clipping_delta(
    epsilon: float, *, steps: int, diameter: float, sigma: float, start: float = 0.0, sigma_init: float = 0.0
) -> float:
    """delta at which two runs of noise added to points of one set of `diameter` agree after `steps`: Koloskova et al. 2025.

    Each step contracts what is left: `delta_{t+1} = delta_t E` with E = `gdp_delta(diameter / sigma, eps~)`, the
    contraction of Gaussian noise (Balle et al. 2019), and `eps~ = log(1 + (e^epsilon - 1) / delta_t)`.
    start, sigma_init: how far apart the starts are, and the noise on them; without noise delta_0 is 1.
    """
    require(epsilon >= 0 and math.isfinite(epsilon), f"epsilon must be a number >= 0, got {epsilon}")
    lengths = (sigma, diameter, start, sigma_init)
    require(
        all(math.isfinite(v) and v >= 0 for v in lengths) and sigma > 0 and steps >= 0,
        "sigma must be positive; diameter, start, sigma_init and steps must not be negative",
    )
    delta = gdp_delta(start / sigma_init, epsilon) if sigma_init > 0 else 1.0
    for _ in range(steps):
        if delta <= 0:
            return 0.0
        # log(1 + (e^epsilon - 1) / delta) without overflow
        tilted = np.logaddexp(0.0, math.log(-math.expm1(-epsilon)) + epsilon - math.log(delta)) if epsilon > 0 else 0.0
        delta *= gdp_delta(diameter / sigma, float(tilted))
    return delta
