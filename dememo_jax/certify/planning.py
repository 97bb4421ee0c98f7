"""What a certificate costs before it is drawn: draws, reach, seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dememo_jax import bounds
from dememo_jax.errors import distinct, require

SIDES = ("both", "upper", "lower")
FORMS = ("corrected", "published")
LOUDEST = 1e18  # standard deviation of noise whose squared length float32 still holds


class Demand(NamedTuple):
    """What one (q, eta) asks of the draws, for each group."""

    q: float
    eta: float
    shift: float
    level: float
    tail: float
    lower_level: float
    lower_tail: float
    alpha: float  # of each bound
    needed: int | None  # draws


@dataclass(frozen=True)
class Plan:
    """The draws that a certificate needs, and what a number of draws can reach."""

    rows: tuple[Demand, ...]  # for each q and eta
    draws_needed: int | None  # for all rows; None where no float64 count would do
    draws: int | None  # the budget asked about
    certified: int | None  # how many of the rows it can certify
    largest_eta: tuple[float | None, ...]  # that it can certify, for each q; None: not even eta = 0
    radius: str  # what eta measures
    seconds_needed: float | None  # for all rows, where the time of a draw is known
    seconds: float | None  # for the budget


def radii(sigma: float | None) -> str:
    return "l2 over the noised leaves" if sigma is not None else "length of Sigma^(-1/2) v"


def shares(q: float | Sequence[float]) -> tuple[float, ...]:
    """q as given, one or several."""
    return tuple(q) if isinstance(q, Sequence | np.ndarray) else (float(q),)


def check(
    *,
    sigma: float | None,
    eta: Sequence[float],
    q: Sequence[float],
    alpha: float,
    draws: int,
    side: str = "both",
    form: str = "corrected",
    tau: float = 0.0,
) -> None:
    """Raise BadInput unless the numbers of a certificate make sense; cheap, for before the long work."""
    require(sigma is None or (np.isfinite(sigma) and sigma > 0), f"sigma must be positive, got {sigma}")
    require(
        sigma is None or sigma <= LOUDEST, f"sigma must be at most {LOUDEST:g}, got {sigma}: float32 cannot hold such noise"
    )
    require(np.isfinite(tau), f"tau must be a finite number, got {tau}")
    require(side in SIDES, f"side must be one of {', '.join(SIDES)}, got {side!r}")
    require(form in FORMS, f"form must be one of {', '.join(FORMS)}, got {form!r}")
    require(np.ndim(eta) == 1 and len(eta) > 0, f"eta must be a sequence of at least one radius, got {eta!r}")
    for value in eta:
        far = np.isfinite(value) and np.isfinite(value / (1.0 if sigma is None else sigma))
        require(far and value > 0, f"eta must be positive and finite, as must eta / sigma; got {value}")
    require(np.ndim(q) == 1 and len(q) > 0, f"q must be one or more numbers, got {q!r}")
    for value in q:
        require(0 < value < 1, f"q must lie strictly between 0 and 1, got {value}")
    distinct(eta=eta, q=q)
    require(0 < alpha < 1, f"alpha must lie strictly between 0 and 1, got {alpha}")
    require(draws >= 1, f"draws must be at least 1, got {draws}")


def demands(
    *,
    sigma: float | None,
    eta: Sequence[float],
    q: Sequence[float],
    alpha: float,
    groups: int = 1,
    side: str = "both",
    form: str = "corrected",
    simultaneous: bool = True,
    subset: bool = False,
) -> tuple[Demand, ...]:
    """Every (q, eta) with its levels, its share of alpha and the draws that its bounds need."""
    statements = len(eta) * len(q) * groups * (2 if side == "both" else 1) if simultaneous else 1
    each = (alpha / 2 if subset else alpha) / statements

    def demand(share: float, radius: float) -> Demand:
        shift = radius / (1.0 if sigma is None else sigma)
        level, tail = bounds.shifted_level(share, shift), bounds.shifted_tail(share, shift)
        covered = 1 - share if form == "published" else share
        low = (bounds.shifted_level(covered, shift), bounds.shifted_tail(covered, shift)) if side != "upper" else (level, tail)
        pairs = [(level, tail)] * (side != "lower") + [low] * (side != "upper")
        counts = [bounds.min_draws(*pair[:1], each, tail=pair[1]) for pair in pairs]
        needed = None if None in counts else max(n for n in counts if n is not None)
        return Demand(share, float(radius), shift, level, tail, *low, each, needed)

    return tuple(demand(share, radius) for share in q for radius in eta)


def reaches(draws: int, q: Sequence[float], alpha: float, side: str, form: str) -> list[float | None]:
    """The largest shift that so many draws certify, for each q."""
    published = side == "lower" and form == "published"
    return [bounds.max_shift(draws, 1 - share if published else share, alpha) for share in q]


def plan(
    *,
    sigma: float | None,
    eta: Sequence[float],
    q: float | Sequence[float] = 0.9,
    alpha: float = 0.01,
    draws: int | None = None,
    groups: int = 1,
    side: str = "both",
    form: str = "corrected",
    simultaneous: bool = True,
    subset: bool = False,
    seconds_per_draw: float | None = None,
    refuse: bool = False,
) -> Plan:
    """What the wanted rows need, what a budget of draws reaches, and how long both take.

    sigma: None for noise with scales of its own, eta then being a length of Sigma^(-1/2) v. groups: how many share
    alpha. subset: accuracies come from a subset of the images, which costs half of alpha. seconds_per_draw: from
    `montecarlo.calibrate(...).seconds`. refuse: raise BadInput, saying how many draws would do, when the budget can
    certify no row at all. The fewest draws are a floor of any method: see `bounds.min_draws`.
    """
    qs = shares(q)
    check(sigma=sigma, eta=eta, q=qs, alpha=alpha, draws=1 if draws is None else draws, side=side, form=form)
    rows = demands(sigma=sigma, eta=eta, q=qs, alpha=alpha, groups=groups, side=side, form=form,
                   simultaneous=simultaneous, subset=subset)  # fmt: skip
    known = [row.needed for row in rows if row.needed is not None]
    if refuse and draws is not None:
        least = f"{min(known):,} would do for the smallest" if known else "no count would do in float64"
        enough = any(draws >= count for count in known)
        require(enough, f"{draws:,} draws can certify none of the rows asked for; {least}. Lower eta or q, or draw more")
    needed = max(known) if len(known) == len(rows) else None
    reach = [] if draws is None else reaches(draws, qs, rows[0].alpha, side, form)
    return Plan(
        rows=rows,
        draws_needed=needed,
        draws=draws,
        certified=None if draws is None else sum(draws >= count for count in known),
        largest_eta=tuple(None if shift is None else shift * (sigma or 1.0) for shift in reach),
        radius=radii(sigma),
        seconds_needed=None if seconds_per_draw is None or needed is None else needed * seconds_per_draw,
        seconds=None if seconds_per_draw is None or draws is None else draws * seconds_per_draw,
    )
