"""Lines, planes and trajectories against closed forms and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dememo_jax import data as sets
from dememo_jax import losses, models, nets, sharpness, sources
from dememo_jax.errors import BadInput, NonFinite

KEY = jax.random.key(0)
PARAMS = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2)}
WAYS = {"a": jnp.stack([jnp.ones((2, 3)), jnp.zeros((2, 3))]), "b": jnp.stack([jnp.zeros(2), jnp.asarray([1.0, -1.0])])}


def metric(params, data):
    return jnp.stack([(params["a"] ** 2).sum() + data, params["b"][0] - params["b"][1]])


@pytest.mark.parametrize(("width", "every"), [(1, None), (4, None), (2, 5), (100, 100)])
def test_plane_against_the_closed_form(width, every):
    x, y, told = np.linspace(-1, 1, 4), np.linspace(0, 2, 3), []
    found = sharpness.plane(metric, PARAMS, 1.5, WAYS, x, y, width=width, every=every, after=lambda *a: told.append(a))
    assert found.values.shape == (3, 4, 2)
    a = np.arange(6.0)
    np.testing.assert_allclose(found.values[..., 0], np.tile([((a + t) ** 2).sum() + 1.5 for t in x], (3, 1)), rtol=1e-5)
    np.testing.assert_allclose(found.values[..., 1], np.tile(2 * y[:, None], (1, 4)), atol=1e-6)
    assert told[-1] == (12, 12)
    assert len(told) == (3 if every == 5 else 1)


def test_line_takes_the_first_direction_and_a_single_number():
    found = sharpness.line(lambda p, d: p["a"].sum(), PARAMS, None, WAYS, [0.0, 2.0])
    np.testing.assert_allclose(found.values, [[15.0], [27.0]])
    assert found.y is None


@pytest.mark.slow
def test_loss_and_accuracy_of_a_network():
    full, _ = sources.load("digits")
    part = sets.take(full, jnp.arange(50))
    apply, params = models.freeze(model := models.from_linen(nets.cnn(10, (4,))), model.init(KEY, part.x[:1]))
    ways = sharpness.random_directions(KEY, params)
    found = sharpness.plane(sharpness.loss_and_accuracy(apply, batch=16), params, part, ways, [0.0, 0.5], [0.0], width=2)
    for i, x in enumerate((0.0, 0.5)):
        logits = apply(jax.tree.map(lambda leaf, way, x=x: leaf + x * way[0], params, ways), part.x)
        truth = [losses.cross_entropy(logits, part.y).mean(), losses.correct(logits, part.y).mean()]
        np.testing.assert_allclose(found.values[0, i], truth, rtol=1e-4)


@pytest.mark.slow
def test_random_directions_have_the_lengths_of_the_weights():
    params = {"conv": jax.random.normal(KEY, (3, 3, 2, 4)) * jnp.arange(1.0, 5), "bias": jnp.ones(4)}
    by_filter = sharpness.random_directions(KEY, params, count=3)
    assert by_filter["conv"].shape == (3, 3, 3, 2, 4)

    def lengths(kernel):
        return np.linalg.norm(np.asarray(kernel).reshape(-1, 4), axis=0)

    for one in by_filter["conv"]:
        np.testing.assert_allclose(lengths(one), lengths(params["conv"]), rtol=1e-5)
    np.testing.assert_array_equal(by_filter["bias"], 0)
    by_layer = sharpness.random_directions(KEY, params, normalise="layer")
    np.testing.assert_allclose(jnp.linalg.norm(by_layer["conv"][1]), jnp.linalg.norm(params["conv"]), rtol=1e-5)
    plain = sharpness.random_directions(KEY, params, normalise="none", count=500)
    assert np.std(plain["conv"]) == pytest.approx(1, abs=0.02)
    assert np.std(plain["bias"]) == pytest.approx(1, abs=0.1)


def test_trajectory_is_the_principal_plane():
    random = np.random.default_rng(0)
    steps = random.normal(size=(7, 8)) * np.array([5, 3, 1, 1, 1, 1, 1, 1])
    points = [{"a": jnp.asarray(row[:6].reshape(2, 3), jnp.float32), "b": jnp.asarray(row[6:], jnp.float32)} for row in steps]
    found = sharpness.trajectory(points)
    gaps = steps - steps[-1]
    _, sizes, axes = np.linalg.svd(gaps[:-1], full_matrices=False)
    for i in range(2):
        way = np.concatenate([np.ravel(leaf[i]) for leaf in jax.tree.leaves(found.directions)])
        np.testing.assert_allclose(abs(way @ axes[i]), 1, rtol=1e-5)
        np.testing.assert_allclose(found.points[:, i], gaps @ way, atol=1e-4)
    np.testing.assert_allclose(found.explained, sizes[:2] ** 2 / (sizes**2).sum(), rtol=1e-5)
    np.testing.assert_array_equal(found.points[-1], 0)


def test_bad_input():
    with pytest.raises(BadInput, match="at least three points"):
        sharpness.trajectory([PARAMS, PARAMS])
    with pytest.raises(BadInput, match="on one line"):
        sharpness.trajectory([jax.tree.map(lambda p, k=k: k * p, PARAMS) for k in (1.0, 2.0, 3.0)])
    with pytest.raises(BadInput, match="structure"):
        sharpness.trajectory([{"a": jnp.ones(2)}, PARAMS, PARAMS])
    with pytest.raises(BadInput, match=r"expected 2 direction\(s\), got 1"):
        sharpness.plane(metric, PARAMS, 0.0, jax.tree.map(lambda w: w[:1], WAYS), [0.0], [0.0])
    with pytest.raises(BadInput, match="at least one finite coordinate"):
        sharpness.plane(metric, PARAMS, 0.0, WAYS, [], [0.0])
    with pytest.raises(BadInput, match="'filter', 'layer' or 'none'"):
        sharpness.random_directions(KEY, PARAMS, normalise="weight")
    with pytest.raises(NonFinite, match=r"metric at \(2.0, 0.5\)"):
        sharpness.plane(lambda p, d: jnp.log(21.5 - p["a"].sum()), PARAMS, None, WAYS, [0.0, 2.0], [0.5])
