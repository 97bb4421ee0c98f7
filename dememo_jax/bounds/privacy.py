"""What indistinguishability does to the probability of an event."""

import math

from scipy import stats

from dememo_jax.errors import require


def indistinguishable_event_bounds(p: float, epsilon: float, zeta: float) -> tuple[float, float]:
    """Least and largest probability of an event under a law (epsilon, zeta)-indistinguishable from one that gives it p.

    Both directions of the definition, applied to the event and to its complement:
    `max(0, e^-eps (p - zeta), 1 - zeta - e^eps (1 - p))` and `min(1, e^eps p + zeta, 1 - e^-eps (1 - p - zeta))`. The
    SoK's Theorem 2 uses the first term alone, which never exceeds e^-eps; near p = 1 the complement's is the useful one.
    Raises BadInput for p outside [0, 1], epsilon negative, zeta outside [0, 1).
    """
    require(0 <= p <= 1, f"p must lie in [0, 1], got {p}")
    require(epsilon >= 0 and math.isfinite(epsilon), f"epsilon must be a number >= 0, got {epsilon}")
    require(0 <= zeta < 1, f"zeta must lie in [0, 1), got {zeta}")
    up, down = math.exp(epsilon), math.exp(-epsilon)
    return max(0.0, down * (p - zeta), 1 - zeta - up * (1 - p)), min(1.0, up * p + zeta, 1 - down * (1 - p - zeta))


def gdp_event_bounds(p: float, mu: float) -> tuple[float, float]:
    """The same for mu-Gaussian differential privacy (Dong et al. 2022): `Phi(Phi^-1(p) -+ mu)`; tighter than any one epsilon.

    Raises BadInput for p outside [0, 1] or mu negative.
    """
    require(0 <= p <= 1, f"p must lie in [0, 1], got {p}")
    require(mu >= 0 and math.isfinite(mu), f"mu must be a number >= 0, got {mu}")
    z = stats.norm.ppf(p)
    return float(stats.norm.cdf(z - mu)), float(stats.norm.cdf(z + mu))
