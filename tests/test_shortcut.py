"""Perturbations without gradients: one pixel, linear patches, autoregressive noise and class-wise filters."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from sklearn.linear_model import RidgeClassifier

from dememo_jax import data as sets
from dememo_jax.errors import BadInput
from dememo_jax.protect import patterns, shortcut

KEY = jax.random.key(0)
DRAWN = {
    "patches": patterns.linear_patches,
    "processes": partial(patterns.autoregressive, separation=3.0),  # few tries
    "filters": patterns.convolution_filters,
}


def images(count=24, shape=(16, 12, 3), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return sets.make(rng.uniform(0.1, 0.9, size=(count, *shape)), np.arange(count) % classes)


def floats(noise):
    return np.asarray(noise.delta, np.float64)


# --- one pixel ---------------------------------------------------------------------------------------------------


def score(gap, objective):
    """The objectives, from |x - v| [members, C] in float64."""
    if objective == "code":
        return gap.mean() / gap.std()
    if objective == "paper":
        return gap.sum(axis=1).mean() / gap.sum(axis=1).var()
    return gap.mean() - gap.mean(axis=1).var()


def naive(x, y, mask, *, classes, pixels, objective, distinct):
    """Rows [K, H, W, C] by trying every position and colour, and how many picks each class made."""
    rows, taken = np.zeros((classes, *x.shape[1:])), set()
    for label in range(classes):
        members = x[mask & (y == label)].astype(np.float64)
        if not len(members):
            continue
        pairs = itertools.product(*map(range, x.shape[1:3]), itertools.product((0, 1), repeat=x.shape[3]))
        scores = {(i, j, v): score(np.abs(members[:, i, j] - v), objective) for i, j, v in pairs}
        places, picked = set(), []
        for i, j, v in sorted(scores, key=scores.__getitem__, reverse=True):
            if len(picked) < pixels and (i, j, v) not in taken and not (distinct and (i, j) in places):
                places.add((i, j))
                picked.append((i, j, v))
                rows[label, i, j] = 2 * np.array(v) - 1
        taken |= set(picked)
    return rows


def crowded(channels=3, seed=3):
    """Images whose classes want the same few pixels; the channels move together, so that the objectives disagree."""
    rng = np.random.default_rng(seed)
    share = rng.uniform(size=(1, 4, 3, 1))
    common, own = rng.uniform(size=(60, 4, 3, 1)), rng.uniform(size=(60, 4, 3, channels))
    x = rng.uniform(0.3, 1.0, size=(1, 4, 3, channels)) * (share * common + (1 - share) * own) ** 2
    return x.astype(np.float32), rng.integers(0, 4, 60), rng.uniform(size=60) < 0.7


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("objective", shortcut.OBJECTIVES)
def test_one_pixel_equals_a_brute_force_search(objective, channels, distinct):
    x, y, mask = crowded(channels)
    mask &= y != 2  # a class without masked examples
    how = {"classes": 4, "pixels": 2, "objective": objective, "distinct": distinct}
    noise = shortcut.one_pixel(sets.make(x, y), mask, **how)
    np.testing.assert_array_equal(noise.delta, naive(x, y, mask, **how))
    others = set(shortcut.OBJECTIVES) - {objective}
    if channels == 3:
        assert any((naive(x, y, mask, **how | {"objective": other}) != noise.delta).any() for other in others)


def test_published_picks_share_a_position_and_the_later_colour_wins():
    x = np.random.default_rng(0).uniform(0.3, 0.7, size=(20, 2, 2, 1)).astype(np.float32)
    x[:, 1, 0] = 0.4  # constant: white there is the best pair, black the second
    data = sets.make(x, np.zeros(20))
    published = np.asarray(shortcut.one_pixel(data, classes=1, pixels=2, distinct=False).delta)
    assert np.argwhere(published).tolist() == [[0, 1, 0, 0]]  # two pixels asked for, one changed
    assert published[0, 1, 0, 0] == -1.0
    ours = np.asarray(shortcut.one_pixel(data, classes=1, pixels=2).delta)
    assert ours[0, 1, 0, 0] == 1.0
    assert np.count_nonzero(ours) == 2


def test_published_picks_need_fewer_positions():
    data = sets.make(np.random.default_rng(0).uniform(size=(9, 1, 2, 1)), np.arange(9) % 2)
    assert np.count_nonzero(shortcut.one_pixel(data, classes=2, pixels=2, distinct=False).delta)  # all 4 pairs
    for how in ({"classes": 3, "pixels": 2, "distinct": False}, {"classes": 2, "objective": "mean"}):
        with pytest.raises(BadInput):
            shortcut.one_pixel(data, **how)


# --- linear patches ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_patches_are_linearly_separable():
    data = images(400, (16, 16, 3), classes=5)
    noise = floats(patterns.linear_patches(KEY, data, classes=5)).reshape(400, -1)
    half = np.arange(400) < 200
    fit = RidgeClassifier(1e-3).fit(noise[half], data.y[half])
    assert fit.score(noise[~half], data.y[~half]) == 1.0
    assert fit.score(noise[~half], np.roll(data.y[~half], 1)) == 0.0  # and not by luck
    centred = noise - np.stack([noise[np.asarray(data.y) == label].mean(axis=0) for label in range(5)])[data.y]
    assert np.linalg.norm(centred) > 0.1 * np.linalg.norm(noise)  # examples of a class differ


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "patch"), [((16, 12, 3), 4), ((9, 7, 1), 4), ((8, 8, 3), 8)])
def test_patches_are_constant_squares_of_the_given_norm(shape, patch):
    data = images(shape=shape)
    for radius, expected in ((None, 6 / 255 * math.sqrt(math.prod(shape))), (0.5, 0.5)):
        noise = floats(patterns.linear_patches(KEY, data, classes=3, patch=patch, radius=radius))
        sizes = np.linalg.norm(noise.reshape(24, -1), axis=1)
        np.testing.assert_allclose(sizes, expected, rtol=1e-3)
        assert (sizes <= expected).all()  # half precision does not break the budget
    corners = noise[:, ::patch, ::patch]
    np.testing.assert_array_equal(corners.repeat(patch, 1).repeat(patch, 2)[:, : shape[0], : shape[1]], noise)
    assert len(np.unique(corners[0])) == corners[0].size  # neighbours do not share a value


def test_every_class_has_its_own_vertex():
    vertices = np.asarray(patterns._vertices(KEY, 8, 3))
    assert sorted(map(tuple, vertices)) == sorted(itertools.product((-1.0, 1.0), repeat=3))
    many = np.asarray(patterns._vertices(KEY, 100, 48))
    assert len(np.unique(many, axis=0)) == 100
    assert abs(many.mean()) < 0.1  # sd 0.014
    assert (np.abs(many.mean(axis=0)) < 0.5).all()  # no feature is shared by all classes


# --- autoregressive ----------------------------------------------------------------------------------------------


def response(noise, weights):
    """Sum over positions of the positive response of a class's filter, mean over images, in double precision."""
    filters = np.array(weights, np.float64)
    filters[2, 2] = -1.0
    windows = np.lib.stride_tricks.sliding_window_view(noise, (3, 3), axis=(1, 2))
    return np.maximum(np.einsum("nhwcij,ijc->nhw", windows, filters), 0).sum(axis=(1, 2)).mean()


@pytest.mark.slow
def test_a_class_filter_is_blind_to_its_own_noise_only():
    classes = 6
    weights = patterns.coefficients(jax.random.key(4), classes)
    assert weights.shape == (classes, 3, 3, 3)
    np.testing.assert_array_equal(weights[:, 2, 2], 0.0)
    np.testing.assert_allclose(weights.sum(axis=(1, 2)), 1.0, atol=1e-5)
    data = images(60, (32, 32, 3), classes)
    noise = floats(patterns.autoregressive(KEY, data, classes=classes, processes=weights))
    assert np.isfinite(noise).all()
    y = np.asarray(data.y)
    table = np.array([[response(noise[y == i], weights[j]) for j in range(classes)] for i in range(classes)])
    assert (np.diag(table) < 0.05).all()  # rounding to half precision
    assert (table[~np.eye(classes, dtype=bool)] > 0.5).all()
    assert (table[np.tril_indices(classes, -1)] > 5.0).all()  # later classes were chosen by this; 10 on one run each


@pytest.mark.slow
def test_raster_scan_equals_two_loops():
    weights = np.array(patterns.coefficients(jax.random.key(5), 1, 2))[0]
    top, left = (np.array(part) for part in patterns._edges(jax.random.key(6), (7, 5), 2))
    field = np.zeros((11, 9, 2))
    field[:2], field[2:, :2] = top, left
    for i in range(2, 11):
        for j in range(2, 9):
            field[i, j] = (field[i - 2 : i + 1, j - 2 : j + 1] * weights).sum(axis=(0, 1))  # the last weight is 0
    np.testing.assert_allclose(patterns._raster(jnp.array(top), jnp.array(left), jnp.array(weights)), field, atol=1e-4)

    key = jax.random.fold_in(patterns.keys.named(KEY, "examples"), 1)
    data = images(3, (7, 5, 2), 1)
    noise = floats(patterns.autoregressive(KEY, data, classes=1, processes=weights[None], radius=0.7))
    run = np.asarray(patterns._raster(*patterns._edges(key, (7, 5), 2), weights))[4:, 4:]
    np.testing.assert_allclose(noise[1], 0.7 * run / np.linalg.norm(run), rtol=2e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "radius"), [("l2", None), ("l2", 0.3), ("linf", None), ("linf", 0.1)])
def test_autoregressive_noise_has_the_given_norm(norm, radius):
    noise = floats(DRAWN["processes"](KEY, images(), classes=3, norm=norm, radius=radius)).reshape(24, -1)
    expected = radius or {"l2": math.sqrt(576 / 3072), "linf": 8 / 255}[norm]
    sizes = np.linalg.norm(noise, ord={"l2": 2, "linf": np.inf}[norm], axis=1)
    np.testing.assert_allclose(sizes, expected, rtol=1e-3)
    assert (sizes <= expected).all()


@pytest.mark.slow
def test_the_search_ends():
    with pytest.raises(BadInput, match="of 4 processes"):
        patterns.coefficients(KEY, 4, separation=1e6, tries=6472)


def field(rng, weights, size):
    """A run [H, W, C] of N(0, 1) edges, pixel by pixel in double precision, without the first four rows and columns."""
    run = rng.normal(size=(size[0] + 4, size[1] + 4, weights.shape[2]))
    for i, j in np.ndindex(size[0] + 2, size[1] + 2):
        run[i + 2, j + 2] = (run[i : i + 3, j : j + 3] * weights).sum(axis=(0, 1))  # the last weight is 0
    return run[4:, 4:]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "channels"), [((8, 8), 3), ((8, 8), 1)])
def test_the_search_keeps_what_the_published_rule_keeps(size, channels):
    """Triples drawn jointly, each kept when three runs of all channels have a norm of at most 50, scaled to the size: the
    share of such triples, and how large their runs are, are those of the search, which leaves channels out one by one."""
    found = [np.asarray(part) for part in patterns._candidates(KEY, batch=9_000, size=size)]
    weights, runs = patterns._stable(*found, channels=channels)
    most = 50 * math.sqrt(size[0] * size[1] * channels / (32 * 32 * 3))
    norms = np.linalg.norm(runs.reshape(len(runs), -1), axis=1)
    assert norms.max() <= most * (1 + 1e-5)
    assert norms.max() > 0.8 * most
    alone = (found[2] <= most**2).all(axis=1).mean()  # every channel of a triple must pass alone: the shares multiply
    share = alone**channels * len(weights) / (alone * 9_000 / channels)
    with np.errstate(all="ignore"):
        groups = found[2][: 9_000 // channels * channels].reshape(-1, channels, patterns.RUNS)
        direct = (groups.sum(axis=1) <= most**2).all(axis=1).mean()
    assert share == pytest.approx(direct, abs=5 * math.sqrt(direct / len(groups)))
    for group, run in zip(weights[:20], runs[:20]):  # the recorded run is a run of these weights
        grown = run.copy()
        for c in range(channels):
            inner = [(run[c, i - 2 : i + 1, j - 2 : j + 1] * group[c]).sum() for i in range(2, 8) for j in range(2, 8)]
            np.testing.assert_allclose(grown[c, 2:8, 2:8].ravel(), inner, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_fresh_runs_of_accepted_processes_rarely_exceed_the_norm():
    """Three runs passed; the chance of one more is high, though not one. By a loop in double precision."""
    rng, size = np.random.default_rng(3), (8, 8)
    weights = np.asarray(patterns.coefficients(KEY, 4, size=size, separation=1.0, tries=9_000), np.float64)
    most = 50 * math.sqrt(8 * 8 * 3 / (32 * 32 * 3))
    norms = [np.linalg.norm(field(rng, each, size)) for each in weights for _ in range(10)]
    assert np.mean(np.asarray(norms) <= most) > 0.6


# --- filters -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "side"), [((16, 12, 3), 3), ((9, 7, 1), 5), ((5, 5, 3), 1)])
def test_filters_equal_a_naive_convolution(shape, side):
    data = images(shape=shape)
    x = np.array(data.x)
    x[4] = 0.0
    noise = patterns.convolution_filters(KEY, data._replace(x=jnp.array(x)), classes=3, side=side)
    filters = np.asarray(patterns._filters(patterns.keys.named(KEY, "classes"), 0.3, classes=3, side=side))
    got = x + floats(noise)
    for image, label, found in zip(x, np.asarray(data.y), got):
        blurred = np.stack([ndimage.correlate(part, filters[label], mode="constant") for part in np.moveaxis(image, -1, 0)], -1)
        np.testing.assert_allclose(found, blurred / max(blurred.max(), 1e-9), atol=3e-4)
    assert not got[4].any()  # black, not 0 / 0
    np.testing.assert_allclose(np.delete(got, 4, axis=0).reshape(23, -1).max(axis=1), 1.0, atol=3e-4)


def test_a_filter_has_one_large_weight():
    filters = np.asarray(patterns._filters(KEY, 0.3, classes=200, side=3)).reshape(200, 9)
    assert ((filters == 1.0).sum(axis=1) == 1).all()
    assert set(np.argmax(filters, axis=1)) == set(range(9))
    rest = filters[filters < 1]
    assert 0 <= rest.min() < 0.01
    assert 0.29 < rest.max() < 0.3
    assert abs(rest.mean() - 0.15) < 0.01  # U(0, 0.3): sd of the mean 0.002


# --- all of them -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_noise_belongs_to_the_key_and_the_example(name):
    data, make = images(), DRAWN[name]
    mask = np.arange(24) % 4 != 1
    noise = make(KEY, data, mask, classes=3)
    assert noise.delta.dtype == jnp.float16
    assert noise.delta.shape == data.x.shape
    np.testing.assert_array_equal(noise.row, np.arange(24))
    np.testing.assert_array_equal(noise.mask, mask)
    np.testing.assert_array_equal(np.asarray(noise.delta).any(axis=(1, 2, 3)), mask)
    whole = make(KEY, data, classes=3)
    np.testing.assert_array_equal(noise.delta[mask], whole.delta[mask])  # the mask moves nobody's draw
    other = floats(make(KEY, data, classes=3, chunk=7))
    np.testing.assert_allclose(other, floats(whole), rtol=2e-3, atol=1e-6)  # one step of half precision
    np.testing.assert_array_equal(make(KEY, data, classes=3).delta, whole.delta)
    assert (floats(make(jax.random.key(1), data, classes=3)) != floats(whole)).mean() > 0.9
    protected = np.asarray(sets.perturb(data, noise).x)
    assert protected.dtype == np.float32
    np.testing.assert_array_equal(protected[~mask], np.asarray(data.x)[~mask])
    np.testing.assert_allclose(protected, np.clip(data.x + floats(noise), 0, 1), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["patches", "processes"])
def test_two_examples_of_a_class_get_two_draws(name):
    data = images()
    same = data._replace(x=jnp.zeros_like(data.x), y=jnp.zeros_like(data.y))
    noise = floats(DRAWN[name](KEY, same, classes=3)).reshape(24, -1)
    assert len(np.unique(noise, axis=0)) == 24


BAD = [
    ("patches", {"radius": 0.0}),
    ("patches", {"patch": 13}),
    ("patches", {"patch": 0}),
    ("patches", {"class_sep": -1.0}),
    ("processes", {"radius": -1.0}),
    ("processes", {"norm": "l1"}),
    ("processes", {"processes": np.zeros((2, 3, 3, 3), np.float32)}),
    ("filters", {"side": 2}),
    ("filters", {"side": 13}),
    ("filters", {"side": -1}),
    ("filters", {"blur": 0.0}),
    *[(name, {"chunk": 0}) for name in DRAWN],
    *[(name, {"classes": 2}) for name in DRAWN],
    *[(name, {"mask": mask}) for name in DRAWN for mask in (np.zeros(24, bool), np.ones(23, bool), np.ones(24, np.int32))],
]


@pytest.mark.parametrize(("name", "wrong"), BAD)
def test_bad_arguments_are_refused(name, wrong):
    with pytest.raises(BadInput):
        DRAWN[name](KEY, images(), **{"classes": 3} | wrong)


def test_too_many_classes_and_bad_masks_are_refused():
    data = images(shape=(8, 8, 1))
    with pytest.raises(BadInput, match="too few vertices"):  # one feature has two
        patterns.linear_patches(KEY, data, classes=3)
    for mask in (np.zeros(24, bool), np.ones(23, bool), np.ones(24)):
        with pytest.raises(BadInput):
            shortcut.one_pixel(data, mask, classes=3)
    for make in DRAWN.values():
        with pytest.raises(BadInput, match="H, W, C"):
            make(KEY, sets.make(np.zeros((4, 6)), np.zeros(4)), classes=1)
        with pytest.raises(BadInput, match="whole set"):
            make(KEY, sets.take(data, jnp.array([3, 4])), classes=3)
