"""One question, asked while the draws come in: does the bound lie below tau?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dememo_jax import bounds, callbacks
from dememo_jax.certify.draws import Cloud, Draws, draw, limits, measured, subset
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
    sigma: float | None = None  # of the noise; None where leaves have scales of their own
    fingerprint: tuple[tuple[str, str], ...] = ()  # of the noise, the data and the metric


def answers(
    draws: Draws,
    *,
    tau: float,
    eta: Sequence[float],
    q: float | Sequence[float] = 0.9,
    alpha: float = 0.01,
    simultaneous: bool = True,
    spare: float = 0.0,
) -> tuple[Answer, ...]:
    """The verdicts for every group, q and eta; valid whenever and however often one looks at growing draws.

    Each is an anytime-valid test (`bounds.quantile_test`): without an exceedance it falls at exactly the fewest draws
    that any certificate needs. alpha is split over all rows. spare: share of alpha kept for runs with exceedances.
    Where the draws evaluated a subset of the images, half of alpha pays for the limits of all draws that may ever be
    made (`_image_betas`), and "above" may mean no more than that the images are too few.
    Do not also quote fixed-size bounds (`bound`) from draws that were stopped here: their number depends on the scores.
    Raises BadInput for parameters out of range, or scores that are not finite.
    """
    qs = shares(q)
    check(sigma=draws.sigma, eta=eta, q=qs, alpha=alpha, draws=len(draws.scores), tau=tau)
    require(np.isfinite(draws.scores).all(), "scores must be finite")
    part = subset(draws)
    asked = demands(sigma=draws.sigma, eta=eta, q=qs, alpha=alpha, groups=len(draws.groups), side="upper",
                    simultaneous=simultaneous, subset=part)  # fmt: skip
    found = []
    paid = alpha / 2 / len(draws.groups) if part else 0.0
    for group, (_, scores) in zip(draws.groups, limits(draws, paid * _image_betas(draws) if part else alpha)):
        for d in asked:
            test = bounds.quantile_test(scores > tau, d.level, d.alpha, tail=d.tail, spare=spare)
            found.append(
                Answer(group, d.q, d.eta, float(tau), test.verdict, test.stopped, test.draws, test.exceedances,
                       test.draws_needed, d.alpha + paid, draws.sigma, measured(draws))
            )  # fmt: skip
    return tuple(found)


def _image_betas(draws: Draws) -> np.ndarray:
    """Shares [S] of the chance that the limit of one draw's accuracy may fail; over all draws 0, 1, 2, ... they sum to 1.

    Draws 2^k - 1 .. 2^(k+1) - 2 get 1 / ((k + 1)(k + 2)) together. A share depends on the number of its draw alone, so a
    limit never changes when more draws are made, and one failure probability covers every look.
    """
    octave = np.floor(np.log2(np.arange(len(draws.scores)) + draws.start + 1.5)).astype(int)
    return 1.0 / ((octave + 1.0) * (octave + 2.0) * 2.0**octave)


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
    after: Callable[[Draws], callbacks.Answer] | None = None,
    every: int = 25,
    **engine: Any,
) -> tuple[tuple[Answer, ...], Draws]:
    """Draw from a cloud until every row is decided, at most `most` times; looks after every `every` draws.

    Returns the answers and the draws. Once every row is decided, both end at the draw that decided the last of them, so
    that `every`, interruptions and the speed of the machine change nothing; `after` may have seen more. prior, after,
    engine: see `draw`. Raises BadInput for parameters out of range, before the first draw.
    """
    qs = shares(q)
    check(sigma=source.blank.sigma, eta=eta, q=qs, alpha=alpha, draws=most, tau=tau)
    require(0 <= spare < 1, f"spare must lie in [0, 1), got {spare}")
    asked: dict[str, Any] = {"tau": tau, "eta": eta, "q": qs, "alpha": alpha, "simultaneous": simultaneous, "spare": spare}

    def decided(made: Draws) -> callbacks.Answer:
        stop = after is not None and callbacks.stops(after(made))
        return callbacks.STOP if stop or all(answer.verdict != "undecided" for answer in answers(made, **asked)) else None

    made = prior
    if made is None or not (len(made.scores) >= most or decided(made)):
        made = draw(source, draws=most, prior=prior, after=decided, every=every, **engine)
    made = replace(made, scores=made.scores[:most])
    stopped = [answer.stopped for answer in answers(made, **asked)]
    if None not in stopped:
        made = replace(made, scores=made.scores[: max(n for n in stopped if n is not None)])
    return answers(made, **asked), made
