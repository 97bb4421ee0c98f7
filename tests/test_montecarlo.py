"""Scores of noisy weights against a Python loop over draws, the law of a linear metric, and a clock that is a script."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dememo_jax import loop, mesh, montecarlo
from dememo_jax.errors import BadInput, NonFinite

KEY = jax.random.key(9)
PARAMS = {"a": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array([[0.3], [0.7]])}
DATA = np.float32([2.0, 1.0, -1.0])


def metric(params, data):
    a, b = params["a"] * data, params["b"]
    return jnp.stack([jnp.sum(jnp.tanh(a)), jnp.sum(a) * jnp.sum(b)])


def looped(sigma, draws):
    """The same metric in numpy, one draw after another."""
    rows = []
    for i in draws:
        noise = np.asarray(jax.random.normal(jax.random.fold_in(KEY, i), (5,)), np.float64)  # one draw for both leaves
        a = np.asarray(PARAMS["a"], np.float64) + sigma["a"] * noise[:3]
        b = np.asarray(PARAMS["b"], np.float64) + sigma["b"] * noise[3:, None]
        rows.append([np.tanh(a * DATA).sum(), (a * DATA).sum() * b.sum()])
    return np.array(rows)


def scores(**how):
    return montecarlo.scores(metric, PARAMS, DATA, KEY, **{"sigma": 0.4, "stop": 12, **how})


@pytest.fixture(scope="module")
def plain():
    return scores()


def test_scores_are_those_of_a_loop_over_draws(plain):
    assert plain.shape == (12, 2)
    assert isinstance(plain, np.ndarray)
    np.testing.assert_allclose(plain, looped({"a": 0.4, "b": 0.4}, range(12)), rtol=1e-4, atol=1e-5)


WAYS = [
    {"strategy": "map"},
    {"every": 5},
    {"strategy": "map", "width": 4, "every": 1},
    {"strategy": "vmap"},
    {"strategy": "vmap", "width": 1},
    {"strategy": "vmap", "width": 5, "every": 7},
    {"strategy": "vmap", "width": 50, "every": 50},
]


@pytest.mark.parametrize("how", WAYS)
def test_strategies_chunks_and_widths_do_not_change_a_score(plain, how):
    np.testing.assert_allclose(scores(**how), plain, rtol=1e-5, atol=1e-6)


def counts(params, data):
    """How many of 64 numbers lie below each of two weights: whole numbers, far from any rounding."""
    return jnp.stack([jnp.sum(data < params["a"][0]), jnp.sum(data < params["b"][1, 0])]).astype(jnp.float32)


@pytest.fixture(scope="module")
def counted():
    grid = np.linspace(-1, 2, 64, dtype=np.float32)
    found = {}

    def of(**how):
        how = {"sigma": 0.4, "stop": 45, **how}
        key = tuple(how.items())
        found[key] = found[key] if key in found else montecarlo.scores(counts, PARAMS, grid, KEY, **how)
        return found[key]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("how", [*WAYS[-2:], {"strategy": "auto", "every": 13}, {"strategy": "auto", "width": 8}])
def test_counts_are_equal_to_the_bit_however_they_are_made(counted, how):
    one_by_one = counted(strategy="map")
    assert one_by_one.std(axis=0).min() > 1  # else equality says little
    np.testing.assert_array_equal(counted(**how), one_by_one)
    np.testing.assert_array_equal(counted(start=17, **how), one_by_one[17:])


def test_a_run_split_in_parts_is_the_whole(plain):
    parts = [scores(start=start, stop=stop) for start, stop in ((0, 4), (4, 8), (8, 12))]
    np.testing.assert_allclose(np.concatenate(parts), plain, rtol=1e-5, atol=1e-6)


def test_a_mesh_of_one_device_changes_nothing(plain):
    one = mesh.mesh(devices=jax.devices()[:1])
    np.testing.assert_allclose(scores(over=one, every=12), plain, rtol=1e-5, atol=1e-6)


def test_after_hears_of_every_chunk(plain):
    calls = []
    found = scores(start=2, stop=12, every=4, after=lambda *call: calls.append(call))
    assert [done for done, _ in calls] == [6, 10, 12]
    np.testing.assert_array_equal(np.concatenate([part for _, part in calls]), found)
    np.testing.assert_allclose(found, plain[2:], rtol=1e-5, atol=1e-6)


def test_after_may_stop(plain):
    calls = []
    found = scores(
        start=2, every=3, after=lambda done, part: calls.append((done, len(part))) or (loop.STOP if done >= 8 else None)
    )
    assert calls == [(5, 3), (8, 3)]
    np.testing.assert_allclose(found, plain[2:8], rtol=1e-5, atol=1e-6)


def test_each_leaf_may_have_its_own_sigma():
    sigma = {"a": 1.5, "b": 0.0}
    np.testing.assert_allclose(scores(sigma=sigma), looped(sigma, range(12)), rtol=1e-4, atol=1e-5)
    untouched = montecarlo.scores(lambda params, _: params["b"].ravel(), PARAMS, None, KEY, sigma=sigma, stop=3)
    np.testing.assert_array_equal(untouched, np.tile(PARAMS["b"].ravel(), (3, 1)))  # to the bit


def test_law_of_a_linear_metric():
    weights, sigma, draws = np.float32([3.0, -1.0, 2.0]), 0.25, 20_000

    def linear(params, data):
        return jnp.stack([params["a"] @ data, jnp.sum(params["b"])])

    how = {"sigma": sigma, "stop": draws, "strategy": "vmap", "width": 1_000}
    found = montecarlo.scores(linear, PARAMS, weights, KEY, **how).astype(np.float64)
    means = float(PARAMS["a"] @ weights), float(PARAMS["b"].sum())
    for column, mean, length in zip(found.T, means, (np.linalg.norm(weights), np.sqrt(2))):
        std = sigma * length
        assert stats.kstest((column - mean) / std, "norm").pvalue > 1e-3
        for wrong in (1.1, 1 / 1.1):
            assert stats.kstest((column - mean) / (wrong * std), "norm").pvalue < 1e-4
        assert abs(np.corrcoef(column[1:], column[:-1])[0, 1]) < 0.03  # one draw says nothing of the next
    assert abs(np.corrcoef(found.T)[0, 1]) < 0.03  # nor one leaf of another
    assert len(np.unique(found[:, 0])) > 0.99 * draws


@pytest.mark.parametrize("sigma", [0.0, -0.1, float("nan"), float("inf"), {"a": 1.0, "b": -1.0}, {"a": 0.0, "b": 0.0}])
def test_sigma_that_is_no_scale(sigma):
    with pytest.raises(BadInput, match="sigma must be positive"):
        scores(sigma=sigma)


@pytest.mark.parametrize("sigma", [{"a": 1.0}, {"a": 1.0, "c": 1.0}, [0.0, 1.0]])
def test_sigma_of_another_tree_is_not_stretched_over_the_params(sigma):
    params = (jnp.zeros((3, 2)), jnp.zeros(2))
    with pytest.raises(BadInput, match="sigma"):
        montecarlo.scores(lambda noisy, _: noisy[0].ravel(), params, None, KEY, sigma=sigma, stop=2)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"stop": 0}, "ask for at least one"),
        ({"start": 12}, "ask for at least one"),
        ({"start": -1}, "ask for at least one"),
        ({"width": 0}, "at least 1"),
        ({"every": 0}, "at least 1"),
        ({"strategy": "pmap"}, "strategy must be 'auto', 'map' or 'vmap', got 'pmap'"),
    ],
)
def test_no_way_to_draw(how, message):
    with pytest.raises(BadInput, match=message):
        scores(**how)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"net": {"kernel": jnp.ones(2), "steps": jnp.arange(3)}}, "params must be floating; net/steps is int32"),
        ({"a": jnp.ones(2), "b": [jnp.ones(1), jnp.array([1.0, jnp.nan])]}, "params must be finite; b/1 holds NaN"),
        ({"a": jnp.array([-jnp.inf])}, "params must be finite; a holds"),
        ({}, "no arrays"),
    ],
)
def test_params_that_noise_cannot_fall_on(params, message):
    for refuse in (
        lambda: montecarlo.scores(metric, params, DATA, KEY, sigma=0.4, stop=2),
        lambda: montecarlo.check(params, KEY, 0.4),
    ):
        with pytest.raises(BadInput, match=message):
            refuse()


@pytest.mark.parametrize("make", [jax.random.PRNGKey, lambda seed: jax.random.key(seed, impl="rbg"), lambda seed: seed])
def test_keys_of_another_kind(make):
    with pytest.raises(BadInput, match="threefry2x32"):
        montecarlo.scores(metric, PARAMS, DATA, make(0), sigma=0.4, stop=2)
    montecarlo.check(PARAMS, jax.random.key(0, impl="threefry2x32"), 0.4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_metric_that_is_not_finite_is_named_by_its_draw(value):
    exact = np.asarray(looped({"a": 0.4, "b": 0.4}, range(12)))[:, 1]
    worst = int(np.argmax(exact[5:])) + 5  # the one draw from 5 on that the metric below spoils
    limit = (np.sort(exact[5:])[-1] + np.sort(exact[5:])[-2]) / 2

    def spoilt(params, data):
        found = metric(params, data)
        return jnp.where(found[1] > limit, value, found)

    seen = []
    with pytest.raises(NonFinite, match=f"draw {worst} is not finite"):
        montecarlo.scores(
            spoilt, PARAMS, DATA, KEY, sigma=0.4, start=5, stop=12, every=3, after=lambda done, _: seen.append(done)
        )
    assert seen == [done for done in (8, 11, 12) if done <= worst]  # nobody hears of the bad chunk


# --- calibration, on a clock that is a script ----------------------------------------------------------------------


@pytest.fixture
def tuned(monkeypatch):
    """The constants that the scripts below are written for."""
    monkeypatch.setattr(montecarlo, "WIDTHS", (8, 32, 128))
    monkeypatch.setattr(montecarlo, "TRIAL", 5.0)


def clocked(*seconds, metric=metric, **how):
    """The calibration when its timed runs take `seconds`, one after another; and how many of them it timed."""
    ticks = iter(np.cumsum([step for second in seconds for step in (10.0, second)]))  # time passes between the runs too
    read = []
    clock = lambda: read.append(0) or float(next(ticks))  # noqa: E731
    found = montecarlo.calibrate(metric, PARAMS, DATA, KEY, sigma=0.4, clock=clock, **how)
    assert len(read) % 2 == 0
    return found, len(read) // 2


@pytest.mark.slow
@pytest.mark.usefixtures("tuned")
def test_calibration_keeps_the_fastest_width():
    # one draw, 128 of them one by one (the best of three), 8 at once, 32 at once; 128 at once could take 10 seconds
    first, eight, many = (1.28, 9.0, 2.0), (0.64, 0.64, 7.0), (5.0, 0.32, 5.0)
    found, runs = clocked(0.01, *first, *eight, *many, *first, *many)
    assert (found.width, runs) == (32, 16)
    assert found.seconds == pytest.approx(0.0025)
    assert [width for width, _ in found.tried] == [1, 8, 32, 1, 32]
    np.testing.assert_allclose([each for _, each in found.tried], [0.01, 0.005, 0.0025, 0.01, 0.0025])


@pytest.mark.usefixtures("tuned")
def test_calibration_stops_at_the_first_width_that_is_no_faster():
    found, runs = clocked(0.001, *[0.128] * 3, *[0.64] * 3)
    assert (found.width, runs) == (1, 7)
    assert [width for width, _ in found.tried] == [1, 8]


@pytest.mark.usefixtures("tuned")
def test_calibration_believes_one_by_one_after_a_second_look():
    busy, calm, vmapped = [0.128] * 3, [0.0128] * 3, [0.064] * 3
    found, runs = clocked(0.001, *busy, *vmapped, *vmapped, *calm, *vmapped)
    assert (found.width, runs) == (1, 16)
    assert found.seconds == pytest.approx(0.0001)


@pytest.mark.usefixtures("tuned")
def test_calibration_tries_no_wider_than_told():
    found, runs = clocked(0.001, *[0.128] * 3, *[0.0128] * 9, width=20)
    assert (found.width, runs) == (8, 13)
    assert clocked(0.001, *[0.128] * 3, width=7) == ((1, pytest.approx(0.001), ((1, pytest.approx(0.001)),)), 4)


@pytest.mark.usefixtures("tuned")
def test_calibration_does_not_risk_a_vmap_of_long_draws():
    found, runs = clocked(0.1)
    assert (found.width, found.seconds, runs) == (1, pytest.approx(0.1), 1)


def heavy(params, data):  # 5,000 numbers to hold, 20 KB
    return jnp.sort(jnp.sin(params["a"][0] * jnp.arange(5_000.0)))[:1]


@pytest.mark.slow
@pytest.mark.usefixtures("tuned")
def test_calibration_keeps_to_its_memory():
    found, runs = clocked(0.001, *[0.128] * 3, metric=heavy, memory=0)
    assert (found.width, runs) == (1, 4)
    enough = clocked(0.001, *[0.128] * 3, *[0.0128] * 3, *[0.0128] * 9, metric=heavy, memory=400_000)[0]
    assert [width for width, _ in enough.tried] == [1, 8, 1, 8]  # 8 x 20 KB fit, 32 x 20 KB do not


def test_the_fastest_width_is_the_one_that_is_used(monkeypatch):
    used = []
    monkeypatch.setattr(montecarlo, "calibrate", lambda *_, **__: montecarlo.Speed(8, 1.0, ()))
    true = montecarlo._evaluate
    monkeypatch.setattr(montecarlo, "_evaluate", lambda *given: used.append(given[2]) or true(*given))
    scores(stop=40)
    scores(stop=12)  # too few to be worth a calibration
    scores(strategy="vmap")
    assert used == [8, 1, 32]


def test_a_draw_is_a_pure_function_of_its_number(plain):
    """What `scores` evaluates, in a program of one's own."""
    one = jax.jit(lambda i: metric(montecarlo.noisy(PARAMS, KEY, i, 0.4), DATA))
    np.testing.assert_allclose([one(i) for i in range(3)], plain[:3], rtol=1e-5, atol=1e-6)
