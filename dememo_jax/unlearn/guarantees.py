"""What a certified run promises, and the noise that a promise needs: exact accounting, against a named comparator."""

import math
from collections.abc import Callable

import numpy as np

from dememo_jax import bounds, tree
from dememo_jax.errors import BadInput, require
from dememo_jax.types import Array, Guarantee, Heuristic, Params

Schedule = float | Callable[[Array | int], Array | float]  # a number, or a function of the step such as optax's schedules

# How far apart the two starts and the two steps can be, in units of clip_init and lr * clip_grad (or of clip_model).
COMPARATORS = {"same_procedure": (2, 2), "from_centre": (1, 2), "data_independent": (1, 1)}
MEANING = {
    "same_procedure": "the same noisy procedure on the retain set, started from any weights that never saw the forget set, "
    "such as retrained ones, clipped alike",
    "from_centre": "the same noisy procedure on the retain set, started from the centre",
    "data_independent": "a random walk of the same noise from the centre, which sees no data at all",
}
ROUNDING = (
    "real arithmetic: rounding is not accounted for, beyond noise with fine tails and a release on a grid that sigma alone "
    "decides, so that the digits of a weight do not tell what the noise was added to"
)
INDEPENDENT = (
    "the retained examples do not depend on the forgotten ones; where they do, as under protective noise made on the whole "
    "set, the comparator sees the same retained examples, and is not training without the forgotten ones"
)
ONCE = "a run is made once: none is stopped, repeated or thrown away for how its noise came out"
ASSUMPTIONS = (
    INDEPENDENT,
    "steps, rates, clips, noise and centre were chosen without looking at the given weights or the forget set",
    "the noise key is secret, drawn afresh and used once, and the generator's numbers pass for independent Gaussians",
    ONCE,
    "all that is released is computed from the final weights and the retain set: statistics by `released`, later training",
    ROUNDING,
)


def calibrate(
    epsilon: float,
    delta: float,
    *,
    steps: int,
    lr: Schedule,
    clip_init: float,
    clip_grad: Schedule,
    weight_decay: float = 0.0,
    comparator: str = "same_procedure",
) -> float:
    """The least `sigma` at which `noisy_descent` of so many steps is (epsilon, delta)-certified, by exact Gaussian DP.

    Without weight decay at constant rates it is `2 (clip_init + lr clip_grad T) / (sqrt(T) mu)`, with mu = 0.26805 at
    (1, 1e-5): 7.461 (clip_init + lr clip_grad T) / sqrt(T). Schedules are functions of the step. Raises BadInput for
    parameters out of range, an unknown comparator, or a run in which nothing could differ and no noise is called for.
    """
    bounds.check_privacy(epsilon, delta)
    mu = descent_mu(steps, lr, clip_init, clip_grad, 1.0, weight_decay, comparator)
    require(mu > 0, "nothing to calibrate: with clip_init and lr * clip_grad zero the two runs are the same without noise")
    return mu / bounds.gdp_mu(epsilon, delta)


def calibrate_model_clipping(
    epsilon: float, delta: float, *, steps: int, clip_model: float, comparator: str = "same_procedure"
) -> float:
    """The least `sigma` at which `noisy_model_clipping` of so many steps, without initial noise, is (epsilon, delta)-certified.

    By bisection on Koloskova et al.'s recursion, to six digits. Errors as `calibrate`.
    """
    bounds.check_privacy(epsilon, delta)
    require(steps >= 1, f"steps must be at least 1, got {steps}")
    require(clip_model > 0 and math.isfinite(clip_model), f"clip_model must be positive and finite, got {clip_model}")
    diameter = contracted(comparator)[1] * clip_model

    def delivered(sigma):
        return bounds.model_clipping_delta(epsilon, steps=steps, diameter=diameter, sigma=sigma)

    low, high = 0.0, diameter / bounds.gdp_mu(epsilon, delta)  # one step alone would do
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if delivered(middle) <= delta else (middle, high)
    return high


def check_params(params: Params, what: str) -> None:
    """BadInput unless noise of a certified method can fall on these: floating, finite, and float32 at least.

    A guarantee counts how far two runs can be apart in real numbers; half precision rounds moves by up to a factor of two.
    """
    tree.check_floating(params, what)
    low = ", ".join(tree.half(params))
    require(
        not low,
        f"{what} must be float32 at least, got {low}: its rounding is larger than what a guarantee counts; raise them by "
        "tree.widened, and train them on so",
    )


def in_words(guarantee: Guarantee | Heuristic) -> str:
    """One sentence: what cannot be told from what, and how well; of a heuristic, that nothing is promised and why."""
    g = guarantee
    meaning = MEANING.get(g.comparator, "a model trained anew without the forgotten examples, by the same randomised procedure")
    if isinstance(g, Heuristic):
        return (
            f"Heuristic, no guarantee: the published claim is epsilon = {g.epsilon:.4g} and delta = {g.delta:.3g} against "
            f"{meaning}, and it is not proved: {g.reason}."
        )
    exact = "" if g.mu is None else f" (mu = {g.mu:.4g} of Gaussian differential privacy)"
    return (
        f"Whatever is computed from the released model comes out with a probability within a factor e^{g.epsilon:.4g} and a "
        f"remainder of {g.delta:.3g} of what it would be for {meaning}{exact}."
    )


def compose(guarantees: list[Guarantee] | tuple[Guarantee, ...], *, delta: float | None = None) -> Guarantee:
    """What several releases promise together, each made by a certified run of its own with a fresh key.

    Each run's guarantee holds whatever the others put out, so their mu add in squares (adaptive composition). For an example
    forgotten in one request only, later models made from *its* released model are post-processing and cost nothing:
    compose the runs that started from weights which still knew the example.
    A guarantee of `certified_head` already covers all releases made from one fit: take the last.
    delta: of the result; the largest of them by default. Without mu (model clipping) epsilons and deltas are added, and
    delta cannot be chosen. Raises BadInput for none, a `Heuristic`, or different comparators.
    """
    require(guarantees, "give at least one guarantee")
    other = [type(g).__name__ for g in guarantees if not isinstance(g, Guarantee)]
    require(not other, f"only a Guarantee composes, got {', '.join(other)}: a claim that is not proved promises nothing")
    comparators = {g.comparator for g in guarantees}
    require(len(comparators) == 1, f"guarantees against different comparators do not compose: {sorted(comparators)}")
    said = tuple(dict.fromkeys(line for g in guarantees for line in g.assumptions))
    mus = [g.mu for g in guarantees if g.mu is not None]
    if len(mus) < len(guarantees):
        require(delta is None, "without mu the deltas add up, and delta cannot be chosen")
        total = math.fsum(g.delta for g in guarantees)
        require(total < 1, f"the deltas add up to {total:g}: nothing is promised")
        return Guarantee(math.fsum(g.epsilon for g in guarantees), total, None, comparators.pop(), said)
    mu = bounds.compose_gdp(mus)
    delta = max(g.delta for g in guarantees) if delta is None else delta
    return Guarantee(bounds.gdp_epsilon(mu, delta), delta, mu, comparators.pop(), said)


def at_step(schedule: Schedule, step):
    """The value of a number, or of a function of the step."""
    return schedule(step) if callable(schedule) else schedule


def factors(comparator: str) -> tuple[int, int]:
    """How far apart starts and steps can be; BadInput for an unknown comparator."""
    if comparator not in COMPARATORS:
        raise BadInput(f"comparator must be one of {', '.join(COMPARATORS)}, got {comparator!r}")
    return COMPARATORS[comparator]


def contracted(comparator: str) -> tuple[int, int]:
    """`factors` for model clipping, whose accounting contracts two runs of one and the same step."""
    require(
        comparator != "data_independent",
        "model clipping has no guarantee against data_independent: its steps differ from those of a walk without data. Use "
        "same_procedure or from_centre",
    )
    return factors(comparator)


def descent_mu(
    steps: int, lr: Schedule, clip_init: float, clip_grad: Schedule, sigma: Schedule, weight_decay: float, comparator: str
) -> float:
    """mu of a run of `noisy_descent`, its schedules taken step by step."""
    apart, each = factors(comparator)
    bounds.check_run(steps, clip_init)
    require(weight_decay >= 0, f"weight_decay must not be negative, got {weight_decay}")
    rates, clips, noise = (np.asarray([float(at_step(s, t)) for t in range(steps)]) for s in (lr, clip_grad, sigma))
    for name, values in (("lr", rates), ("clip_grad", clips), ("sigma", noise)):
        require(np.isfinite(values).all() and (values >= 0).all(), f"{name} must be finite and not negative at every step")
    require((rates * weight_decay < 1).all(), f"lr * weight_decay must stay below 1, got {(rates * weight_decay).max():g}")
    return bounds.noisy_iteration_mu(apart * clip_init, 1 - rates * weight_decay, each * rates * clips, noise)


def stated(mu: float, delta: float, comparator: str) -> Guarantee:
    return Guarantee(bounds.gdp_epsilon(mu, delta), delta, mu, comparator, ASSUMPTIONS)
