"""Attacks on single examples against slow loops that delete rows, and against the Neyman-Pearson test of known Gaussians."""

import math

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from dememo_jax import audit, bounds
from dememo_jax.errors import BadInput

GRID = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def drawn(seed, models=12, examples=6, views=()):
    """Scores with offsets of examples, and members, non-members and unused cells, at least three of a side."""
    rng = np.random.default_rng(seed)
    kinds = np.stack([rng.permutation(np.arange(models) % 5) for _ in range(examples)], axis=1)
    members, unused = kinds < 2, kinds == 4
    offsets, widths = rng.normal(size=examples) * 3, rng.uniform(0.5, 2, size=examples)
    lifted = (offsets + members).reshape(models, examples, *[1] * len(views))
    return lifted + widths.reshape(-1, *[1] * len(views)) * rng.normal(size=(models, examples, *views)), members, unused


def attackers(row, turns, side, other):
    """Rows of a side for one example, when model `row` is attacked in its turn: without it, or without a mate of it."""
    rows = [m for m in range(len(side)) if side[m]]
    if turns and side[row]:
        rows.remove(row)
    if turns and other[row]:
        place = sum(other[:row])
        rows.pop(place % len(rows))
    return rows


# --- LiRA ---------------------------------------------------------------------------------------------------------


def slow_lira(scores, members, targets, outside, form, shared):
    """One model after another, one example after another, by scipy's densities; [M, N] only."""
    turns = targets is None
    attacked = scores if turns else targets
    ratios = np.empty(attacked.shape)
    for t in range(len(attacked)):
        columns = [
            [scores[attackers(t, turns, side[:, i], other[:, i]), i] for i in range(scores.shape[1])]
            for side, other in ((members, outside), (outside, members))
        ]
        spreads = [np.array([column.var(ddof=1) for column in of]) for of in columns]
        free = [np.array([len(column) - 1 for column in of]) for of in columns]
        if shared:
            spreads = [np.full(len(each), (each * weight).sum() / weight.sum()) for each, weight in zip(spreads, free)]
        for i, x in enumerate(attacked[t]):
            (mean_in, sd_in), (mean_out, sd_out) = [(of[i].mean(), np.sqrt(s[i])) for of, s in zip(columns, spreads)]
            if form == "online":
                ratios[t, i] = norm.logpdf(x, mean_in, sd_in) - norm.logpdf(x, mean_out, sd_out)
            else:
                ratios[t, i] = (x - mean_out) / sd_out
    return ratios


@pytest.mark.parametrize("variance", ["shared", "example"])
@pytest.mark.parametrize("form", ["online", "offline"])
@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("spared", [True, False])
@pytest.mark.parametrize("views", [(), (3,)])
def test_lira_equals_loops_that_delete_the_row(variance, form, turns, spared, views):
    scores, members, unused = drawn(0, views=views)
    outside = ~members & ~unused if spared else ~members
    targets = None if turns else drawn(1, models=3, views=views)[0]
    got = audit.lira(scores, members, targets=targets, outside=outside if spared else None, form=form, variance=variance)
    slices = [np.s_[..., q] for q in range(3)] if views else [np.s_[...]]
    each = [slow_lira(scores[q], members, None if turns else targets[q], outside, form, variance == "shared") for q in slices]
    np.testing.assert_allclose(got, np.mean(each, axis=0), rtol=1e-9, atol=1e-9)


def test_lira_does_not_look_at_what_is_in_neither():
    scores, members, unused = drawn(2)
    changed = np.where(unused, 1e3, scores)
    how = {"outside": ~members & ~unused, "variance": "example"}
    before, after = audit.lira(scores, members, **how), audit.lira(changed, members, **how)
    np.testing.assert_allclose(after[~unused], before[~unused], rtol=1e-6)
    assert not np.allclose(audit.lira(changed, members)[~unused], audit.lira(scores, members)[~unused], rtol=0.1)


@pytest.mark.parametrize("turns", [True, False])
def test_lira_shares_the_variance_below_64_models_of_a_side(turns):
    rng = np.random.default_rng(3)
    members = np.stack([rng.permutation(np.arange(128) < 64) for _ in range(4)], axis=1)
    scores, targets = rng.normal(size=(128, 4)) * [1, 1, 1, 3], None if turns else rng.normal(size=(5, 4))

    def ratios(form, variance):
        return audit.lira(scores, members, targets=targets, form=form, variance=variance)

    for form in ("online", "offline"):
        np.testing.assert_array_equal(ratios(form, "auto"), ratios(form, "example"))
        assert not np.allclose(ratios(form, "auto"), ratios(form, "shared"))
    members[np.flatnonzero(members[:, 2])[0], 2] = False  # 63 with it, 65 without
    np.testing.assert_array_equal(ratios("online", "auto"), ratios("online", "shared"))
    np.testing.assert_array_equal(ratios("offline", "auto"), ratios("offline", "example"))


def test_lira_of_an_example_that_all_models_agree_on():
    scores, members, _ = drawn(4)
    scores[:, 1] = np.where(members[:, 1], 5.0, 2.0)
    for turns in (True, False):
        ratios = audit.lira(scores, members, targets=None if turns else scores, variance="example")
        assert np.isfinite(ratios).all()
        assert ratios[members[:, 1], 1].min() > 1e3 > -1e3 > ratios[~members[:, 1], 1].max()


def known(seed, models, d, width_in=1.0, examples=150):
    """Members lie d above non-members, of standard deviation 1, in examples as far apart as examples are."""
    rng = np.random.default_rng(seed)
    members = rng.uniform(size=(models, examples)) < 0.5
    offsets = 5 * np.random.default_rng(99).normal(size=examples)
    return offsets + d * members + np.where(members, width_in, 1.0) * rng.normal(size=(models, examples)), members


@pytest.mark.parametrize("variance", ["shared", "example"])
@pytest.mark.parametrize("form", ["online", "offline"])
@pytest.mark.parametrize("turns", [True, False])
def test_lira_comes_up_to_neyman_and_pearson(variance, form, turns):
    d = 2.0
    scores, members = known(5, 192, d)
    targets, truth = (None, members) if turns else known(6, 64, d)
    ratios = audit.lira(scores, members, targets=targets, form=form, variance=variance)
    area, best = bounds.auc(ratios, truth), norm.cdf(d / math.sqrt(2))
    assert area.low - 0.003 < best < area.high + 0.003  # what estimated Gaussians lose
    assert abs(area.value - best) < 0.008
    point = bounds.tpr_at(ratios, truth, 0.01)
    assert point.low < norm.cdf(d - norm.isf(0.01)) < point.high
    assert abs(point.tpr - norm.cdf(d - norm.isf(0.01))) < 0.05
    assert bounds.auc(scores if turns else targets, truth).value < 0.67  # one threshold for all examples


@pytest.mark.parametrize("variance", ["shared", "example"])
def test_lira_sees_a_narrower_law_with_the_same_mean(variance):
    scores, members = known(7, 192, 0.0, width_in=0.5)
    online, offline = (bounds.auc(audit.lira(scores, members, form=form, variance=variance), members)
                       for form in ("online", "offline"))  # fmt: skip
    assert online.value == pytest.approx(2 / math.pi * math.atan(2), abs=0.012)  # P(|X / 2| < |Y|) of normal X, Y
    assert offline.value == pytest.approx(0.5, abs=0.015)


def test_lira_of_no_signal_finds_none():
    areas = []
    for seed in range(40):
        scores, members = known(100 + seed, 64, 0.0, examples=40)
        areas.append(bounds.auc(audit.lira(scores, members), members))
    assert sum(area.low <= 0.5 <= area.high for area in areas) >= 35
    assert np.mean([area.value for area in areas]) == pytest.approx(0.5, abs=0.006)
    assert np.mean([area.high - area.low for area in areas]) < 0.08


# --- U-LiRA -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["shared", "example"])
def test_u_lira_equals_loops_that_delete_the_row(variance):
    rng = np.random.default_rng(8)
    unlearned, retrained = rng.normal(size=(9, 5)) + 0.5, rng.normal(size=(6, 5)) * 2
    got = audit.u_lira(unlearned, retrained, fit="others", variance=variance)
    assert [part.shape for part in got] == [(9, 5), (6, 5)]
    kinds = np.repeat([True, False], [9, 6])[:, None] & np.ones((1, 5), bool)
    slow = slow_lira(np.concatenate([unlearned, retrained]), kinds, None, ~kinds, "online", variance == "shared")
    np.testing.assert_allclose(np.concatenate(got), slow, rtol=1e-9, atol=1e-9)


def area_of(unlearned, retrained, **how):
    ratios = audit.u_lira(unlearned, retrained, **how)
    kinds = np.repeat([True, False], [len(part) for part in ratios])[:, None]
    return bounds.auc(np.concatenate(ratios), np.broadcast_to(kinds, (len(kinds), unlearned.shape[1])))


@pytest.mark.parametrize("variance", ["shared", "example"])
def test_u_lira_of_half_attacks_the_models_that_it_has_not_seen(variance):
    rng = np.random.default_rng(8)
    unlearned, retrained = rng.normal(size=(9, 5)) + 0.5, rng.normal(size=(6, 5)) * 2
    got = audit.u_lira(unlearned, retrained, variance=variance)
    assert [part.shape for part in got] == [(4, 5), (3, 5)]
    means, variances = zip(*((part[::2].mean(axis=0), part[::2].var(axis=0, ddof=1)) for part in (unlearned, retrained)))
    if variance == "shared":
        variances = [np.full(5, each.mean()) for each in variances]
    for part, ratios in zip((unlearned, retrained), got):
        logs = [norm.logpdf(part[1::2], mean, np.sqrt(each)) for mean, each in zip(means, variances)]
        np.testing.assert_allclose(ratios, logs[0] - logs[1], rtol=1e-9, atol=1e-9)


def test_intervals_of_u_lira_hold_half_where_the_scores_of_a_model_share_a_part():
    def misses(fit, runs=150):
        found = []
        for seed in range(runs):
            rng = np.random.default_rng([300, seed])
            both = rng.normal(size=(32, 1)) * math.sqrt(0.6) + rng.normal(size=(32, 60)) * math.sqrt(0.4)
            found.append(area_of(both[:16], both[16:], fit=fit))
        return sum(not area.low <= 0.5 <= area.high for area in found) / runs

    assert misses("half") <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)
    assert misses("others") > 0.12  # the interval that "others" does not promise


@pytest.mark.parametrize(("m", "n"), [(24, 40), (40, 24), (8, 8), (8, 24)])
def test_u_lira_of_honest_retraining_finds_nothing(m, n):
    areas = []
    for seed in range(40):
        rng = np.random.default_rng(200 + seed)
        offsets = 5 * rng.normal(size=30)
        areas.append(area_of(offsets + rng.normal(size=(m, 30)), offsets + rng.normal(size=(n, 30))))
    assert sum(area.low <= 0.5 <= area.high for area in areas) >= 35
    assert np.mean([area.value for area in areas]) == pytest.approx(0.5, abs=0.008)


@pytest.mark.parametrize("shift", [1.5, -1.5])
def test_u_lira_sees_either_direction(shift):
    rng = np.random.default_rng(9)
    offsets = 5 * rng.normal(size=100)
    area = area_of(offsets + shift + rng.normal(size=(80, 100)), offsets + rng.normal(size=(60, 100)))
    assert area.value == pytest.approx(norm.cdf(1.5 / math.sqrt(2)), abs=0.012)


# --- RMIA and the population --------------------------------------------------------------------------------------


def slow_rmia(scores, members, population, a, gamma, form, targets=None, target_population=None):
    """One model, one example, one stranger after another."""
    turns = targets is None
    attacked, asked = (scores, population) if turns else (targets, target_population)
    beaten = np.zeros(attacked.shape)
    for t in range(len(attacked)):
        strange = np.delete(population, t, axis=0) if turns else population
        for i, x in enumerate(attacked[t]):
            ins = members[:, i]
            out = np.mean(expit(scores[attackers(t, turns, ~ins, ins), i]))
            if form == "online":
                usual = (out + np.mean(expit(scores[attackers(t, turns, ins, ~ins), i]))) / 2
            else:
                usual = (1 + a) / 2 * out + (1 - a) / 2
            for j, z in enumerate(asked[t]):
                stranger = (1 + a) / 2 * np.mean([expit(row[j]) for row in strange]) + (1 - a) / 2
                beaten[t, i] += expit(x) / usual > gamma * expit(z) / stranger
    return beaten / population.shape[1]


@pytest.mark.parametrize("form", ["offline", "online"])
@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize(("a", "gamma"), [(0.3, 1.0), (0.0, 1.0), (1.0, 0.9), (0.6, 1.1)])
def test_rmia_equals_loops(form, turns, a, gamma):
    scores, members, _ = drawn(10, models=7, examples=5)
    rng = np.random.default_rng(11)
    population, asked = rng.normal(size=(7, 20)) * 2, rng.normal(size=(2, 20)) * 2
    aim = {} if turns else {"targets": drawn(12, models=2, examples=5)[0], "target_population": asked}
    got = audit.rmia(scores, members, population, interpolation=a, gamma=gamma, form=form, **aim)
    np.testing.assert_allclose(got, slow_rmia(scores, members, population, a, gamma, form, **aim), atol=1e-12)
    assert len(np.unique(got)) > 3
    if (a, gamma, form) == (0.3, 1.0, "offline"):
        np.testing.assert_array_equal(audit.rmia(scores, members, population, **aim), got)


def test_rmia_needs_one_model_only():
    """By what is usual for an example, one reference model tells more than the target's score alone."""
    scores, members = known(13, 3, 3.0, examples=400)
    population = known(13, 3, 0.0, examples=400)[0] + 5 * np.random.default_rng(14).normal(size=400)
    never = members[1] & False
    got = audit.rmia(scores[1:2], never[None], population[1:2], interpolation=1.0, targets=scores[:1],
                     target_population=population[:1])  # fmt: skip
    alone = audit.population_attack(scores[:1], population[:1])
    assert bounds.auc(got, members[:1]).value > bounds.auc(alone, members[:1]).value + 0.1


def test_rmia_of_saturated_scores():
    scores, members, _ = drawn(15)
    population = np.random.default_rng(16).normal(size=(12, 9))
    scores[:, 0], scores[:, 1], population[:, 2] = 1e4, -1e4, -1e4
    for form in ("offline", "online"):
        for a in (0.0, 1.0):
            with np.errstate(divide="raise", invalid="raise"):
                got = audit.rmia(scores, members, population, interpolation=a, form=form)
            assert np.isfinite(got).all()
            assert got.min() >= 0
            assert got.max() <= 1


def slow_area(scores, members):
    pairs = [(x > z) + (x == z) / 2 for x in scores[members] for z in scores[~members]]
    return np.mean(pairs)


def test_rmia_interpolation_is_the_best_of_the_grid():
    found = []
    for seed in range(4):
        scores, members, _ = drawn(20 + seed, models=6, examples=24)
        population = 2 * np.random.default_rng(30 + seed).normal(size=(6, 15))
        row = seed % 3
        rest = [np.delete(array, row, axis=0) for array in (scores, members, population)]
        areas = [slow_area(slow_rmia(*rest, a, 1.0, "offline", scores[[row]], population[[row]])[0], members[row])
                 for a in GRID]  # fmt: skip
        found.append(audit.rmia_interpolation(scores, members, population, row=row))
        assert found[-1] in GRID
        assert areas[GRID.index(found[-1])] == pytest.approx(max(areas), abs=1e-12)
        assert min(areas) < max(areas) - 0.01
    assert len(set(found)) > 1


def test_population_attack_counts_the_strangers_below():
    rng = np.random.default_rng(17)
    targets, population = rng.integers(0, 8, size=(3, 10)), rng.integers(0, 8, size=(3, 13))  # with ties
    slow = [[sum(z < x for z in population[t]) / 13 for x in targets[t]] for t in range(3)]
    np.testing.assert_allclose(audit.population_attack(targets, population), slow)


# --- bad input ----------------------------------------------------------------------------------------------------

SCORES, MEMBERS, UNUSED = drawn(18)
STRANGERS = np.random.default_rng(19).normal(size=(12, 8))


def with_value(array, place, value):
    array = np.array(array)
    array[place] = value
    return array


def only(count, side, example=3):
    """Members of which so many models are on a side of one example."""
    members = MEMBERS.copy()
    members[:, example] = (np.arange(12) < count) == side
    return members


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"members": MEMBERS[:, :-1]}, "other models or examples"),
        ({"members": MEMBERS.astype(int)}, "members must be boolean"),
        ({"members": MEMBERS.astype(float)}, "members must be boolean"),
        ({"outside": ~MEMBERS[:-1]}, "outside"),
        ({"outside": (~MEMBERS).astype(int)}, "outside must be boolean"),
        ({"outside": with_value(~MEMBERS, (int(np.flatnonzero(MEMBERS[:, 0])[0]), 0), True)}, "both trained on and not"),
        ({"scores": SCORES[0]}, r"\[M, N\]"),
        ({"scores": np.full_like(SCORES, 7.0)}, "all scores are 7"),
        ({"scores": np.broadcast_to(SCORES[0], SCORES.shape)}, "one and the same score"),
        ({"scores": with_value(SCORES, (4, 2), np.nan)}, "finite"),
        ({"scores": with_value(SCORES, (4, 2), np.inf)}, "finite"),
        ({"targets": SCORES[:2, :-1]}, "targets"),
        ({"targets": SCORES[0]}, "targets"),
        ({"targets": with_value(SCORES[:2], (0, 0), np.nan)}, "finite"),
        ({"form": "sideways"}, "form must be"),
        ({"variance": "own"}, "variance must be"),
        ({"members": only(2, True)}, r"example \[3\] has \[2\] models with it; 3 are needed"),
        ({"members": only(1, True), "targets": SCORES}, r"example \[3\] has \[1\] models with it; 2 are needed"),
        ({"members": only(2, False)}, r"example \[3\] has \[2\] models without it; 3 are needed"),
        ({"members": only(2, False), "form": "offline"}, r"example \[3\] has \[2\] models without it; 3 are needed"),
    ],
)
def test_lira_refuses(change, match):
    with pytest.raises(BadInput, match=match):
        audit.lira(**{"scores": SCORES, "members": MEMBERS} | change)


def test_enough_models_are_enough():
    audit.lira(SCORES, only(3, True))
    audit.lira(SCORES, only(2, True), targets=SCORES)
    audit.lira(SCORES, only(0, True), form="offline")
    audit.rmia(SCORES, only(2, False), STRANGERS)
    audit.rmia(SCORES, only(1, False), STRANGERS, targets=SCORES, target_population=STRANGERS)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"population": STRANGERS[:-1]}, "of the same models"),
        ({"population": STRANGERS[:, :0]}, "population needs examples"),
        ({"population": with_value(STRANGERS, (0, 0), np.nan)}, "finite"),
        ({"scores": SCORES[..., None]}, r"\[M, N\]"),
        ({"scores": np.zeros_like(SCORES)}, "all scores are 0"),
        ({"scores": with_value(SCORES, (0, 0), np.nan)}, "finite"),
        ({"members": MEMBERS[:, 1:]}, "other models or examples"),
        ({"interpolation": 1.01}, "interpolation"),
        ({"interpolation": -0.01}, "interpolation"),
        ({"gamma": 0.0}, "gamma"),
        ({"form": "sideways"}, "form must be"),
        ({"targets": SCORES[:1]}, "go together"),
        ({"target_population": STRANGERS[:1]}, "go together"),
        ({"targets": SCORES[:1], "target_population": STRANGERS[:2]}, "target_population"),
        ({"targets": SCORES[:1], "target_population": STRANGERS[:1, 1:]}, "target_population"),
        ({"members": only(1, False)}, r"example \[3\] has \[1\] models without it; 2 are needed"),
        ({"members": only(1, True), "form": "online"}, r"example \[3\] has \[1\] models with it; 2 are needed"),
        ({"members": only(0, False), "targets": SCORES[:1], "target_population": STRANGERS[:1]}, r"\[3\].*without it; 1 are"),
    ],
)
def test_rmia_refuses(change, match):
    with pytest.raises(BadInput, match=match):
        audit.rmia(**{"scores": SCORES, "members": MEMBERS, "population": STRANGERS} | change)


@pytest.mark.parametrize(
    ("targets", "population", "match"),
    [
        (SCORES, STRANGERS[1:], "same models"),
        (SCORES, STRANGERS[:, :0], "same models"),
        (SCORES[0], STRANGERS[0], "same models"),
        (with_value(SCORES, (1, 1), np.nan), STRANGERS, "finite"),
        (SCORES, with_value(STRANGERS, (1, 1), -np.inf), "finite"),
    ],
)
def test_population_attack_refuses(targets, population, match):
    with pytest.raises(BadInput, match=match):
        audit.population_attack(targets, population)


@pytest.mark.parametrize(
    ("unlearned", "retrained", "match"),
    [
        (SCORES, SCORES[:, 1:], "same examples"),
        (SCORES[0], SCORES, "same examples"),
        (SCORES[:, :0], SCORES[:, :0], "same examples"),
        (with_value(SCORES, (1, 1), np.nan), SCORES, "finite"),
        (np.ones((4, 2)), np.ones((5, 2)), "all scores are 1"),
        (SCORES[:2], SCORES, r"example \[0\] has \[2\] models with it"),
        (SCORES, SCORES[:2], r"example \[0\] has \[2\] models without it"),
    ],
)
def test_u_lira_refuses(unlearned, retrained, match):
    with pytest.raises(BadInput, match=match):
        audit.u_lira(unlearned, retrained, fit="others")
    with pytest.raises(BadInput, match="four" if r"example \[" in match else match):
        audit.u_lira(unlearned, retrained)
    with pytest.raises(BadInput, match="fit"):
        audit.u_lira(SCORES, SCORES, fit="all")
