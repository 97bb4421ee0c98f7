"""Scores of noisy weights against a Python loop over draws, and against the law of a linear metric."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dememo_jax import mesh, montecarlo
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
        key = jax.random.fold_in(KEY, i)
        a, b = (
            np.asarray(PARAMS[name], np.float64)
            + sigma[name] * np.asarray(jax.random.normal(jax.random.fold_in(key, j), PARAMS[name].shape))
            for j, name in enumerate("ab")
        )
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


@pytest.mark.parametrize("how", [{"every": 5}, {"width": 4, "every": 6}, {"width": 50}])
def test_chunks_and_widths_do_not_change_a_score(plain, how):
    np.testing.assert_allclose(scores(**how), plain, rtol=1e-5, atol=1e-6)


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


def test_each_leaf_may_have_its_own_sigma():
    sigma = {"a": 1.5, "b": 0.0}
    np.testing.assert_allclose(scores(sigma=sigma), looped(sigma, range(12)), rtol=1e-4, atol=1e-5)
    untouched = montecarlo.scores(lambda params, _: params["b"].ravel(), PARAMS, None, KEY, sigma=sigma, stop=3)
    np.testing.assert_array_equal(untouched, np.tile(PARAMS["b"].ravel(), (3, 1)))  # to the bit


def test_law_of_a_linear_metric():
    weights, sigma, draws = np.float32([3.0, -1.0, 2.0]), 0.25, 20_000

    def linear(params, data):
        return jnp.stack([params["a"] @ data, jnp.sum(params["b"])])

    found = montecarlo.scores(linear, PARAMS, weights, KEY, sigma=sigma, stop=draws, width=1_000).astype(np.float64)
    means = float(PARAMS["a"] @ weights), float(PARAMS["b"].sum())
    for column, mean, length in zip(found.T, means, (np.linalg.norm(weights), np.sqrt(2))):
        std = sigma * length
        assert stats.kstest(column, "norm", (mean, std)).pvalue > 1e-3
        for wrong in (1.1, 1 / 1.1):
            assert stats.kstest(column, "norm", (mean, wrong * std)).pvalue < 1e-4
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
    ],
)
def test_no_draws_to_make(how, message):
    with pytest.raises(BadInput, match=message):
        scores(**how)


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
