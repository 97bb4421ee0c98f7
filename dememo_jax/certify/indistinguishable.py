"""What a certificate of a reference says about every model that certified unlearning makes indistinguishable from it.

The SoK's Theorem 2, corrected: its radius must hold the distance to the reference's centre *and* the attack's, and its
probability must use the complement of the event too (without it, it never exceeds e^-epsilon). Three probabilities nest
here and are reported apart: over the noise (q), over unlearning runs (probability), over the samples that estimated both
(confidence). Whoever holds the unlearned model itself does better to certify that (`depth`); transfer pays when many
unlearned models share one reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dememo_jax import bounds
from dememo_jax.certify.draws import Draws
from dememo_jax.certify.neighbourhood import DepthCertificate, Row, bound
from dememo_jax.certify.question import Answer
from dememo_jax.errors import require

ASSUMPTIONS = (
    "the unlearning algorithm has the stated guarantee with respect to the reference algorithm, for these two data sets",
    "that reference is the certifying algorithm run without the forget set, which need not be ordinary retraining",
    "the reference models are independent runs of it, and independent of the unlearned model and of the centre",
)


@dataclass(frozen=True)
class Transfer:
    """One statement about an unlearned model: `statement` holds with `probability` over the run that made it."""

    form: str  # "ball", "event", "gdp", "attack", or "published"
    statement: str
    probability: float  # at least; in the form "attack", at most
    confidence: float  # over the reference models and their noise draws
    successes: int  # reference models of which the event was seen
    references: int
    reference_probability: float  # its Clopper-Pearson limit, at alpha_reference
    alpha_reference: float
    epsilon: float | None
    zeta: float | None
    mu: float | None
    uniform: float | None  # the draw that randomized the limit
    certificate: DepthCertificate | None  # what holds around such a model; eta is the attack's, shift and level the whole's
    assumptions: tuple[str, ...] = ASSUMPTIONS


def transfer_ball(
    draws: Draws,
    distances: Sequence[float],
    *,
    radius: float | None = None,
    eta: Sequence[float],
    epsilon: float,
    zeta: float,
    q: float | Sequence[float] = 0.9,
    alpha: float = 0.01,
    alpha_reference: float = 0.01,
    side: str = "both",
    form: str = "corrected",
    uniform: float | None = None,
) -> Transfer:
    """The event "within `radius` of the certified centre": around such a model every bound holds at radius + eta.

    draws: around a centre that was fixed independently of the models. distances [M]: of independent reference models from
    that centre, in the units of eta (`coverage`). uniform: see `bounds.clopper_pearson`.
    form="published" is the paper's Theorem 2: the ball has radius eta (give one eta, and no radius), the bounds are those
    at eta, though such a model's attacks reach 2 eta, and the probability is e^-epsilon (p - zeta). Its bounds fail for
    attacks that leave the centre: for comparison only.
    Raises BadInput for parameters out of range or no distances.
    """
    published = form == "published"
    etas = tuple(eta)
    require(published or (radius is not None and radius > 0), f"radius must be positive, got {radius}")
    require(not published or (radius is None and len(etas) == 1), "the published form takes one eta, and no radius but that")
    require(all(value > 0 for value in etas), f"eta must be positive, got {etas}")
    require(alpha + alpha_reference < 1, "no confidence is left: alpha and alpha_reference must sum to less than 1")
    lengths = np.asarray(distances, np.float64).ravel()
    require(lengths.size and not np.isnan(lengths).any() and (lengths >= 0).all(), "distances must be one or more lengths")
    reach = etas[0] if published or radius is None else radius
    inside = int((lengths <= reach).sum())
    p = _least(inside, lengths.size, alpha_reference, uniform)
    widened = etas if published else tuple(reach + value for value in etas)
    certificate = bound(draws, eta=widened, q=q, alpha=alpha, side=side, form=form)
    attack = dict(zip(widened, etas))
    certificate = replace(
        certificate,
        rows=tuple(replace(row, eta=attack[row.eta]) for row in certificate.rows),
        largest_eta=tuple(
            value if value is None or published else value - reach if value >= reach else None
            for value in certificate.largest_eta
        ),
    )
    corrected = bounds.indistinguishable_event_bounds(p, epsilon, zeta)[0]
    return Transfer(
        form="published" if published else "ball",
        statement=f"the unlearned model lies within {reach:g} of the certified centre, and every row holds around it",
        probability=max(0.0, float(np.exp(-epsilon)) * (p - zeta)) if published else corrected,
        confidence=1 - alpha - alpha_reference, successes=inside, references=lengths.size, reference_probability=p,
        alpha_reference=alpha_reference, epsilon=epsilon, zeta=zeta, mu=None, uniform=uniform,
        certificate=certificate,
    )  # fmt: skip


def transfer_event(
    rows: Sequence[Row | Answer],
    *,
    tau: float,
    epsilon: float,
    zeta: float,
    alpha_reference: float = 0.01,
    uniform: float | None = None,
) -> Transfer:
    """The event "this model's bound lies at or below tau": no ball, no radius to pay for.

    rows: one for each of M independent reference models, each certified around itself: a `Row` (its upper bound) or an
    `Answer` (verdict "below") for one and the same group, q, eta and sigma, of one noise, data set and metric as far as
    their fingerprints tell; noise in proportion to each model's own weights is another noise for each. Abstentions count
    against. Every row's own alpha is taken from the confidence. Raises BadInput for rows of different statements.
    """
    p, common = _certified(rows, tau, alpha_reference, uniform)
    probability = bounds.indistinguishable_event_bounds(p, epsilon, zeta)[0]
    return Transfer(form="event", probability=probability, epsilon=epsilon, zeta=zeta, mu=None, **common)


def transfer_gdp(
    rows: Sequence[Row | Answer], *, tau: float, mu: float, alpha_reference: float = 0.01, uniform: float | None = None
) -> Transfer:
    """`transfer_event` under mu-Gaussian differential privacy: Phi(Phi^-1(p) - mu), tighter than any one (epsilon, zeta)."""
    p, common = _certified(rows, tau, alpha_reference, uniform)
    return Transfer(form="gdp", probability=bounds.gdp_event_bounds(p, mu)[0], epsilon=None, zeta=None, mu=mu, **common)


def transfer_attack(
    scores: Sequence[float],
    *,
    threshold: float,
    epsilon: float,
    zeta: float,
    alpha: float = 0.01,
    uniform: float | None = None,
) -> Transfer:
    """Post-processing: no attack, of any radius and with any fixed hints, gains more from the unlearned model than this.

    scores [M]: what the attack reached from each of M independent reference models. The result bounds, from above, the
    probability that the same attack exceeds `threshold` from an unlearned one. Raises BadInput for scores that are none.
    """
    values = np.asarray(scores, np.float64).ravel()
    require(values.size and np.isfinite(values).all(), "scores must be one or more finite numbers")
    require(np.isfinite(threshold), f"threshold must be a number, got {threshold}")
    above = int((values > threshold).sum())
    p = bounds.clopper_pearson(above, values.size, alpha, side="upper", uniform=uniform)[1]
    return Transfer(
        form="attack",
        statement=f"the attack reaches more than {threshold:g} from the unlearned model",
        probability=bounds.indistinguishable_event_bounds(p, epsilon, zeta)[1],
        confidence=1 - alpha, successes=above, references=values.size, reference_probability=p,
        alpha_reference=alpha, epsilon=epsilon, zeta=zeta, mu=None, uniform=uniform,
        certificate=None,
        assumptions=(*ASSUMPTIONS, "the attack and its hints are fixed, and use nothing of the forget set but those hints"),
    )  # fmt: skip


def _least(successes: int, trials: int, alpha: float, uniform: float | None) -> float:
    return bounds.clopper_pearson(successes, trials, alpha, side="lower", uniform=uniform)[0]


def _certified(rows: Sequence[Row | Answer], tau: float, alpha: float, uniform: float | None) -> tuple[float, dict]:
    """The least reference probability of the event, and what both of its forms say."""
    require(rows, "give the row of at least one reference model")
    require(np.isfinite(tau), f"tau must be a number, got {tau}")
    same = {(row.group, row.q, row.eta) for row in rows}
    require(len(same) == 1, f"the rows must be of one group, q and eta; got {sorted(same)}")
    noises = {row.sigma for row in rows}
    require(len(noises) == 1, f"the rows must be of one noise; got sigma = {', '.join(sorted(map(str, noises)))}")
    prints = [dict(row.fingerprint) for row in rows]
    for name in ("sigma", "data", "metric"):
        require(len({known.get(name) for known in prints}) == 1, f"the rows must be of one {name}: their fingerprints differ")
    below = [
        row.upper is not None and row.upper <= tau if isinstance(row, Row) else row.verdict == "below" and row.tau <= tau
        for row in rows
    ]
    confidence = 1 - alpha - sum(row.alpha for row in rows)
    require(confidence > 0, "no confidence is left: certify each reference model at a smaller alpha")
    p, row = _least(sum(below), len(below), alpha, uniform), rows[0]
    statement = (
        f"for every move of the unlearned model's weights by at most {row.eta:g}, {row.group} stays at or below {tau:g} "
        f"with probability {row.q:g} under {_noise(row.sigma)}"
    )
    return p, {
        "statement": statement, "confidence": confidence, "successes": sum(below), "references": len(below),
        "reference_probability": p, "alpha_reference": alpha, "uniform": uniform, "certificate": None,
    }  # fmt: skip


def _noise(sigma: float | None) -> str:
    if sigma is not None:
        return f"Gaussian noise of standard deviation {sigma:g} on the weights"
    return "Gaussian noise with scales of their own on the weights, in whose standard deviations the move is measured"
