"""Attacks on single examples by models that did and did not see them: LiRA, RMIA, U-LiRA, and the population attack.

Scores are log-odds of the right class, `log p_y - log(1 - p_y)` (`losses.margin`), `[M, N]` of M models on N examples, with
`members [M, N]` saying which model was trained on what. Every attack returns `[T, N]`, larger claiming membership. Without
`targets`, every model is attacked in its turn by all the others, which is how shadow models are evaluated. Host arithmetic
in float64; an attack on `[256, 50,000]` scores takes seconds.
"""

from typing import Any, NamedTuple

import numpy as np

from dememo_jax.bounds import auc
from dememo_jax.errors import require

FEW = 64  # models below which one variance is shared by all examples, as Carlini et al. do
GRID = tuple(round(0.1 * i, 1) for i in range(11))


class _Fit(NamedTuple):
    """Gaussians of every example's score, as whoever attacks a target knows them: mean [T or 1, N], variance likewise."""

    mean: np.ndarray
    variance: np.ndarray


def lira(scores, members, *, targets=None, outside=None, form: str = "online", variance: str = "auto") -> np.ndarray:
    """Likelihood-ratio attack, Carlini et al. 2022.

    Online: `log N(s; mean_in, var_in) - log N(s; mean_out, var_out)` of each example's own Gaussians. Offline: the share of
    N(mean_out, var_out) below s, as a standard score, from models without the example only (one-sided).
    scores, members: [M, N]; or scores [M, N, Q] of Q views of each example, whose log-ratios are averaged.
    targets: scores [T, N(, Q)] of models to attack; without, each row in turn by the others, less one of the other side, so
        that both sides have lost a model and nothing looks nearer for being more. Limits of `bounds.auc` hold for these
        where each model has members and non-members; where whole models are of one side, see `u_lira`.
    outside: which cells count as not trained on, by default all that are not members; cells in neither are not used.
    variance: "example", each example's own; "shared", pooled over all examples (for few models); "auto" shares
        below 64 models of either side. (The published code shares the variance of all scores together, differences between
        examples included, and takes medians for means.)
    Raises BadInput for shapes that do not fit, scores that are not finite or all equal, and names the first example that has
    fewer than two models on either side (three, where its models are attacked in turn).
    """
    scores, inside, outside = _check(scores, members, outside)
    require(form in ("online", "offline"), f"form must be 'online' or 'offline', got {form!r}")
    require(variance in ("auto", "shared", "example"), f"variance must be 'auto', 'shared' or 'example', got {variance!r}")
    turns = targets is None
    targets = scores if turns else _targets(targets, scores)
    sides = (inside, outside) if form == "online" else (outside,)
    least = min(int(_enough(side, turns, name).min()) for side, name in zip(sides, ("with", "without")[-len(sides) :]))
    shared = variance == "shared" or (variance == "auto" and least < FEW)
    pairs = ((inside, outside), (outside, inside))[-len(sides) :]
    fits = [_gaussians(scores, side, other, turns, shared) for side, other in pairs]
    if form == "offline":
        return _mean_views((targets - fits[0].mean) / np.sqrt(fits[0].variance))
    densities = [-0.5 * ((targets - fit.mean) ** 2 / fit.variance + np.log(fit.variance)) for fit in fits]
    return _mean_views(densities[0] - densities[1])


def u_lira(unlearned, retrained, *, fit: str = "half", variance: str = "auto") -> tuple[np.ndarray, np.ndarray]:
    """U-LiRA, Hayes et al. 2024: was this model trained on x and unlearned it, or never trained on x?

    `bounds.auc` of the log-ratios against the kinds tells how far unlearning can be noticed, example by example. Its limits
    need `fit="half"`: models attacked by each other are not independent. Leaving a model's own scores out of the fit moves
    the fit away from them, so where the scores of a model share a part the area of two samples of one distribution falls
    below 0.5, and its interval misses 0.5 several times as often as it says. `fit="others"` is for
    `bounds.permutation_test`, which fits again for every relabelling.

    Args:
        unlearned: log-odds [M, N] of the forgotten examples under models that unlearned them.
        retrained: log-odds [M', N] of the same examples under models that never saw them.
        fit: "half", every second model of a kind (rows 0, 2, ...) fits the Gaussians and the others are attacked;
            "others", every model is attacked by all the others.
        variance: as `lira`.

    Returns:
        Log-ratios of the attacked models of either kind: [M // 2, N] and [M' // 2, N], or [M, N] and [M', N].

    Raises:
        BadInput: as `lira`, and for fewer than four models of a kind (three with "others").

    Example:
        >>> one, other = np.random.default_rng(0).normal(size=(2, 8, 50))
        >>> [part.shape for part in u_lira(one, other)]
        [(4, 50), (4, 50)]
    """
    unlearned, retrained = _pair(unlearned, retrained)
    require(fit in ("half", "others"), f"fit must be 'half' or 'others', got {fit!r}")
    few = min(len(unlearned), len(retrained))
    require(fit == "others" or few >= 4, f"one half of the models attacks the other: four of a kind are needed, got {few}")
    kinds = np.repeat([True, False], [len(unlearned), len(retrained)])
    scores, members = np.concatenate([unlearned, retrained]), np.tile(kinds[:, None], unlearned.shape[1])
    if fit == "others":
        ratios = lira(scores, members, variance=variance)
        return ratios[kinds], ratios[~kinds]
    fitted = np.concatenate([np.arange(len(part)) % 2 == 0 for part in (unlearned, retrained)])
    ratios = lira(scores[fitted], members[fitted], targets=scores[~fitted], variance=variance)
    return ratios[kinds[~fitted]], ratios[~kinds[~fitted]]


def rmia(
    scores, members, population, *, targets=None, target_population=None, interpolation: float = 0.3, gamma: float = 1.0,
    form: str = "offline",
) -> np.ndarray:  # fmt: skip
    """Robust membership inference, Zarifzadeh et al. 2024: how many strangers z does x beat, by what is usual for either?

    The share of z with `(p(x) / usual(x)) > gamma p(z) / usual(z)`, where p is the target's probability of the right class and
    usual the mean over reference models. Offline uses models without x only, and estimates the rest:
    `((1 + a) p_out + (1 - a)) / 2` with a the `interpolation`; online is `(p_in + p_out) / 2` for x, while strangers, which
    nobody is trained on, keep the estimate. Works with very few models.
    population: log-odds [M, Z] of examples that no model was trained on; target_population: [T, Z] with `targets`. Results are
    multiples of 1 / Z: with few strangers many examples tie at 1, and small false-positive rates cannot be told apart.
    Raises BadInput as `lira`; one model on a side is enough (two, where models are attacked in turn).
    """
    scores, inside, outside = _check(scores, members, None)
    population = np.asarray(population, np.float64)
    shape = (len(scores), population.shape[-1])
    require(scores.ndim == 2 and population.shape == shape, f"expected scores [M, N] and population [M, Z] of the same models, "
            f"got {scores.shape} and {population.shape}")  # fmt: skip
    require(population.shape[1] and np.isfinite(population).all(), "the population needs examples, and finite scores")
    require(0 <= interpolation <= 1 and gamma > 0, f"need interpolation in [0, 1], gamma > 0; got {interpolation}, {gamma}")
    require(form in ("online", "offline"), f"form must be 'online' or 'offline', got {form!r}")
    turns = targets is None
    require(turns == (target_population is None), "targets and target_population go together")
    targets = scores if turns else _targets(targets, scores)
    strangers = population if turns else np.asarray(target_population, np.float64)
    require(strangers.shape == (len(targets), shape[1]), f"expected target_population {(len(targets), shape[1])}")
    log_p, log_z = _log_p(targets), _log_p(strangers)
    for side, name in ((outside, "without"), (inside, "with"))[: 2 if form == "online" else 1]:
        _enough(side, turns, name, least=1)
    usual_x = _usual(np.exp(_log_p(scores)), inside, outside, turns, interpolation, form)
    nobody = np.zeros(population.shape, bool)
    usual_z = _usual(np.exp(_log_p(population)), nobody, ~nobody, turns, interpolation, "offline")
    ratio_x, ratio_z = log_p - np.log(usual_x) - np.log(gamma), log_z - np.log(usual_z)
    return np.stack([np.searchsorted(np.sort(z), x, side="left") for x, z in zip(ratio_x, ratio_z)]) / shape[1]


def rmia_interpolation(scores, members, population, *, row: int = 0) -> float:
    """The interpolation in 0, 0.1, ..., 1 by which the other models attack model `row` best; for use on other targets then."""
    scores, members, population = np.asarray(scores), np.asarray(members), np.asarray(population)
    others = np.arange(len(scores)) != row
    how: dict[str, Any] = {"targets": scores[[row]], "target_population": population[[row]]}
    known = scores[others], members[others], population[others]

    def area(a: float) -> float:
        made = rmia(*known, interpolation=a, **how)[0]
        return auc(made, members[row]).value if np.ptp(made) > 0 else 0.5

    return max(GRID, key=area)


def population_attack(targets, population) -> np.ndarray:
    """The share of strangers that score below each example, [T, N], Ye et al. 2022; from the attacked model alone.

    targets: scores [T, N]; population: [T, Z] of examples that the model was not trained on. Near 1 it claims membership.
    """
    targets, population = np.asarray(targets, np.float64), np.asarray(population, np.float64)
    fits = targets.ndim == population.ndim == 2 and len(targets) == len(population) and population.shape[1]
    require(fits, f"expected targets [T, N] and population [T, Z] of the same models, got {targets.shape}, {population.shape}")
    require(np.isfinite(targets).all() and np.isfinite(population).all(), "scores must be finite")
    return np.stack([np.searchsorted(np.sort(z), x, side="left") for x, z in zip(targets, population)]) / population.shape[1]


# --- pieces --------------------------------------------------------------------------------------------------------


def _check(scores, members, outside) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, inside = np.asarray(scores, np.float64), np.asarray(members)
    require(scores.ndim in (2, 3), f"expected scores [M, N] or [M, N, Q], got {scores.shape}")
    require(scores.size, f"scores need at least one model and one example, got {scores.shape}")
    sides = {"members": inside} | ({} if outside is None else {"outside": np.asarray(outside)})
    for name, mask in sides.items():
        require(
            mask.shape == scores.shape[:2], f"scores {scores.shape} and {name} {mask.shape} are of other models or examples"
        )
        require(mask.dtype == bool, f"{name} must be boolean, got {mask.dtype}")
    outside = sides.get("outside", ~inside)
    require(not (inside & outside).any(), "a cell cannot be both trained on and not")
    require(np.isfinite(scores).all(), "scores must be finite")
    require(np.ptp(scores) > 0, f"all scores are {scores.flat[0]:g}: constant scores tell nobody apart")
    return scores, inside, outside


def _targets(targets, scores: np.ndarray) -> np.ndarray:
    targets = np.asarray(targets, np.float64)
    require(targets.ndim == scores.ndim and targets.shape[1:] == scores.shape[1:],
            f"targets {targets.shape} must have the examples of scores {scores.shape}")  # fmt: skip
    require(np.isfinite(targets).all(), "the targets' scores must be finite")
    return targets


def _pair(unlearned, retrained) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of models on the same examples, [M, N] and [M', N]."""
    unlearned, retrained = np.asarray(unlearned, np.float64), np.asarray(retrained, np.float64)
    fits = unlearned.ndim == retrained.ndim == 2 and unlearned.shape[1] == retrained.shape[1] and unlearned.shape[1] > 0
    require(
        fits, f"expected unlearned [M, N] and retrained [M', N] of the same examples, got {unlearned.shape}, {retrained.shape}"
    )
    require(len(unlearned) and len(retrained), f"need models of either kind, got {len(unlearned)} and {len(retrained)} models")
    require(np.isfinite(unlearned).all() and np.isfinite(retrained).all(), "scores must be finite")
    both = np.concatenate([unlearned, retrained])
    require(np.ptp(both) > 0, f"all scores are {both.flat[0]:g}: constant scores tell nobody apart")
    return unlearned, retrained


def _enough(side: np.ndarray, turns: bool, name: str, least: int = 2) -> np.ndarray:
    """Models of a side for each example; BadInput naming the first example that has too few."""
    counts, least = side.sum(axis=0), least + turns
    few = np.flatnonzero(counts < least)
    require(not len(few), f"example {few[:1].tolist()} has {counts[few[:1]].tolist()} models {name} it; {least} are needed")
    return counts


def _sums(values: np.ndarray, side: np.ndarray, other: np.ndarray, turns: bool) -> tuple[np.ndarray, np.ndarray]:
    """Count and sum over the models of a side, [1, N(, Q)]; or for each model in turn, [M, N(, Q)], without its own.

    Whose own lies on the other side goes without another of this side: a side with one model more would look a little nearer
    to everybody, and an attack on nothing would seem to do worse than chance.
    """
    own = np.where(_wide(side, values), values, 0.0)
    count, total = side.sum(axis=0, keepdims=True), own.sum(axis=0, keepdims=True)
    if not turns:
        return _wide(count, values), total
    place = np.cumsum(other, axis=0) - 1  # among the models of the other side
    mates = np.argsort(~side, axis=0, kind="stable")  # the models of this side stand first
    mate = np.take_along_axis(mates, place % np.maximum(count, 1), axis=0)
    missing = own + np.where(_wide(other, values), np.take_along_axis(own, _wide(mate, values), axis=0), 0.0)
    return _wide(count - (side | other), values), total - missing


def _wide(cells: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[M, N] with the axes of views that the values have."""
    return cells.reshape(*cells.shape, *[1] * (values.ndim - 2))


def _gaussians(scores: np.ndarray, side: np.ndarray, other: np.ndarray, turns: bool, shared: bool) -> _Fit:
    middle = scores.mean(axis=0, keepdims=True)  # sums of squares of what is centred lose no digits
    count, first = _sums(scores - middle, side, other, turns)
    _, second = _sums((scores - middle) ** 2, side, other, turns)
    mean = first / count
    spread = np.maximum(second - count * mean**2, 0.0)
    pooled = spread.sum(axis=1, keepdims=True) / (count - 1).sum(axis=1, keepdims=True)
    require((pooled > 0).all(), "every example has one and the same score under all models of a side: there is nothing to fit")
    # An example whose models agree to the last digit keeps a millionth of the usual variance.
    variance = pooled if shared else np.maximum(spread / (count - 1), 1e-6 * pooled)
    return _Fit(mean + middle, np.broadcast_to(variance, mean.shape))


def _usual(p: np.ndarray, inside, outside, turns: bool, a: float, form: str) -> np.ndarray:
    """The usual probability of every example, [T or 1, N], never 0."""
    count, total = _sums(p, outside, inside, turns)
    out = np.maximum(total / np.maximum(count, 1), 1e-300)
    if form == "offline":
        return ((1 + a) * out + (1 - a)) / 2
    count, total = _sums(p, inside, outside, turns)
    return (out + total / np.maximum(count, 1)) / 2


def _log_p(odds: np.ndarray) -> np.ndarray:
    """log p of log-odds."""
    return -np.logaddexp(0.0, -odds)


def _mean_views(ratios: np.ndarray) -> np.ndarray:
    return ratios if ratios.ndim == 2 else ratios.mean(axis=2)
