"""One question, asked while the draws come in: does the bound lie below tau?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dememo_jax import bounds
from dememo_jax.certify.draws import Cloud, Draws, draw, limits, subset
from dememo_jax.certify.planning import check, demands, shares
from dememo_jax.errors import require


@dataclass(frozen=True)
class Answer:
    """What the draws so far say about one row: "for every ||v|| <= eta, Pr[score <= tau] >= q under the noise"."""

    group: str
    q: float
    eta: float
    tau: float
    verdict: str  # "below": the statement holds; "above": these draws refute that the bound lies below tau; "undecided"
    stopped: int | None  # the draw at which the verdict fell
    draws: int
    exceedances: int
    draws_needed: int | None  # fewest for "below", when no draw exceeds tau
    alpha: float  # chance that this verdict is wrong, that of a limit from a subset of the images included


def answers(
    draws: Draws,
    *,
    tau: float,
    eta: Sequence[float],
    q: float | Sequence[float] = 0.9,
    alpha: float = 0.01,
    most: int | None = None,
    simultaneous: bool = True,
    spare: float = 0.0,
) -> tuple[Answer, ...]:
    """The verdicts for every group, q and eta; valid whenever and however often one looks at growing draws.

    Each is an anytime-valid test (`bounds.quantile_test`): without an exceedance it falls at exactly the fewest draws
    that any certificate needs. alpha is split over all rows. spare: share of alpha kept for runs with exceedances.
    most: where the draws evaluated a subset of the images, the number of draws planned; half of alpha pays for their
        limits, and "above" may mean no more than that the images are too few.
    Do not also quote fixed-size bounds (`bound`) from draws that were stopped here: their number depends on the scores.
    """
    qs = shares(q)
    check(sigma=draws.sigma, eta=eta, q=qs, alpha=alpha, draws=len(draws.scores))
    require(np.isfinite(tau), f"tau must be a number, got {tau}")
    require(np.isfinite(draws.scores).all(), "scores must be finite")
    part = subset(draws)
    require(not part or most is not None, "draws from a subset of the images need `most`, the number of draws planned")
    require(most is None or len(draws.scores) <= most, f"there are {len(draws.scores)} draws, more than the {most} planned")
    asked = demands(sigma=draws.sigma, eta=eta, q=qs, alpha=alpha, groups=len(draws.groups), side="upper",
                    simultaneous=simultaneous, subset=part)  # fmt: skip
    found = []
    beta = alpha / 2 / ((most or len(draws.scores)) * len(draws.groups))
    paid = alpha / 2 / len(draws.groups) if part else 0.0
    for group, (_, scores) in zip(draws.groups, limits(draws, beta)):
        for d in asked:
            test = bounds.quantile_test(scores > tau, d.level, d.alpha, tail=d.tail, spare=spare)
            found.append(
                Answer(group, d.q, d.eta, float(tau), test.verdict, test.stopped, test.draws, test.exceedances,
                       test.draws_needed, d.alpha + paid)
            )  # fmt: skip
    return tuple(found)


def ask(
    source: Cloud,
    *,
    tau: float,
    eta: Sequence[float],
    q: float | Sequence[float] = 0.9,
    alpha: float = 0.01,
    most: int = 10_000,
    simultaneous: bool = True,
    spare: float = 0.0,
    prior: Draws | None = None,
    after: Callable[[Draws], bool | None] | None = None,
    every: int = 25,
    **engine: Any,
) -> tuple[tuple[Answer, ...], Draws]:
    """Draw from a cloud until every row is decided, at most `most` times; looks after every `every` draws.

    Returns the answers and the draws. prior, after, engine: see `draw`. Raises BadInput for parameters out of range,
    before the first draw.
    """
    qs = shares(q)
    check(sigma=source.blank.sigma, eta=eta, q=qs, alpha=alpha, draws=most)
    asked: dict[str, Any] = {"tau": tau, "eta": eta, "q": qs, "alpha": alpha, "most": most}
    asked |= {"simultaneous": simultaneous, "spare": spare}

    def decided(made: Draws) -> bool:
        stop = after is not None and after(made)
        return stop or all(answer.verdict != "undecided" for answer in answers(made, **asked))

    if prior is not None and (len(prior.scores) >= most or decided(prior)):
        return answers(prior, **asked), prior
    made = draw(source, draws=most, prior=prior, after=decided, every=every, **engine)
    return answers(made, **asked), made
