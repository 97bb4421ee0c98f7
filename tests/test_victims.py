"""Victims, what they may do against protected data, and the controls that know nothing."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from dememo_jax import augment, keys, models, nets, projected, protect, train
from dememo_jax import data as sets
from dememo_jax.errors import BadInput, NonFinite
from dememo_jax.protect import countermeasures, victim
from dememo_jax.protect.countermeasures import Countermeasure, combine, countermeasure, once
from dememo_jax.types import Perturbation, Weights

KEY, OTHER = (jax.random.key(seed, impl="rbg") for seed in (2, 9))  # compile faster than the default
RANDOM = np.random.default_rng(0)
K = 3
SET = sets.make(RANDOM.uniform(0.1, 0.9, (12, 16, 16, 3)), np.arange(12) % K)
KERNEL = jnp.asarray(0.1 * RANDOM.normal(size=(16 * 16 * 3, K)), jnp.float32)


def matrix(params, x):
    return x.reshape(len(x), -1) @ params["w"]


LINEAR = models.from_apply(lambda key, x: {"w": KERNEL}, matrix)
START = Weights({"w": KERNEL}, ())

# --- countermeasures ---------------------------------------------------------------------------------------------


@lru_cache
def loss_without():
    return _stepped(None)[1]


def _stepped(against):
    tx = optax.sgd(0.1)
    seen = SET if against is None or against.prepare is None else against.prepare(KEY, SET)
    assert seen.x.shape == SET.x.shape
    np.testing.assert_array_equal(seen.y, SET.y)
    np.testing.assert_array_equal(seen.index, SET.index)
    step = jax.jit(victim.learner(LINEAR, tx, 1, against=against).step)
    state, info = step(KEY, train.start(tx, START), seen)
    return np.asarray(state.weights.params["w"]), float(info["loss"])


@pytest.mark.parametrize("name", countermeasures.NAMES)
def test_every_countermeasure_trains_and_changes_what_is_learned(name):
    kernel, loss = _stepped(countermeasure(name))
    assert np.isfinite(kernel).all()
    assert (kernel != KERNEL).any()
    assert np.isfinite(loss)
    assert abs(loss - loss_without()) > 1e-4
    if name.startswith("at"):
        assert loss > loss_without() + 0.1  # an adversary makes it worse
    assert countermeasure(name) is countermeasure(name)


def test_unknown_countermeasure():
    with pytest.raises(BadInput, match="'vaccine'; expected one of rotation, cutout"):
        countermeasure("vaccine")


def test_scale_is_that_of_the_budgets():
    sizes = {}
    for name, scale, order, budget in (("at", 1.0, np.inf, 8 / 255), ("at", 2.0, np.inf, 8 / 255), ("at-l2", 2.0, 2, 0.5)):
        view = jax.jit(countermeasure(name, scale=scale).adversary(LINEAR))
        moved = np.asarray(view(KEY, START, SET) - SET.x).reshape(12, -1)
        sizes[name, scale] = np.linalg.norm(moved, ord=order, axis=1).max() / budget
    assert list(sizes.values()) == pytest.approx([1, 2, 2], rel=1e-3)
    half = jnp.full((4, 16, 16, 3), 0.5)
    for scale in (1.0, 2.0):
        noise = countermeasure("gaussian", scale=scale).augment(KEY, half) - 0.5
        assert float(noise.std()) == pytest.approx(scale * 8 / 255, rel=0.05)


def test_preparations_are_the_published_ones():
    gray = countermeasure("gray").prepare(KEY, SET).x
    np.testing.assert_allclose(gray, np.repeat(SET.x @ np.float32([[0.299], [0.587], [0.114]]), 3, -1), atol=1e-5)
    assert set(np.unique(np.rint(255 * countermeasure("bdr").prepare(KEY, SET).x))) == {0, 64, 128, 192}
    jpeg = countermeasure("jpeg").prepare(KEY, SET).x
    np.testing.assert_allclose(jpeg, jax.jit(augment.jpeg(10))(KEY, SET.x), atol=1e-6)


def scaled(factor, shift):
    return lambda key, x: factor * x + shift


def keyed(seen):
    return lambda key, data: (seen.append(key), data)[1]


def test_combine_goes_in_order():
    def prepare(factor, shift):
        return lambda key, data: data._replace(x=factor * data.x + shift)

    view, mix = (lambda model: None), augment.mixup()
    first = Countermeasure(prepare(1, 1), scaled(1, 2), view)
    both = combine(first, Countermeasure(prepare(10, 0), scaled(10, 0), None, mix, 4), Countermeasure(copies=2))
    np.testing.assert_allclose(both.prepare(KEY, SET).x, 10 * (SET.x + 1), rtol=1e-6)
    np.testing.assert_allclose(both.augment(KEY, SET.x), 10 * (SET.x + 2), rtol=1e-6)
    assert (both.adversary, both.mix, both.copies) == (view, mix, 4)
    assert combine() == Countermeasure()
    assert combine(first).augment is first.augment
    seen = []
    combine(Countermeasure(keyed(seen)), Countermeasure(keyed(seen))).prepare(KEY, SET)
    assert seen[0] != seen[1]


@pytest.mark.parametrize(("names", "what"), [(("at", "at-l2"), "adversary"), (("mixup", "cutmix"), "mix")])
def test_combine_refuses_two_of_a_kind(names, what):
    with pytest.raises(BadInput, match=f"two countermeasures have an entry for '{what}'"):
        combine(*map(countermeasure, names))


def test_a_learner_augments_for_itself_before_the_countermeasure():
    tx = optax.sgd(0.1)

    def after(**how):
        step = jax.jit(victim.learner(LINEAR, tx, 1, **how).step)
        return float(step(KEY, train.start(tx, START), SET)[1]["loss"])

    expected = after(augment=scaled(10, 20))
    assert after(augment=scaled(1, 2), against=Countermeasure(augment=scaled(10, 0))) == pytest.approx(expected, rel=1e-4)
    assert after(augment=scaled(10, 0), against=Countermeasure(augment=scaled(1, 2))) != pytest.approx(expected, rel=1e-2)
    asked = []
    victim.learner(LINEAR, lambda steps: (asked.append(steps), tx)[1], 7)
    assert asked == [7]


@pytest.mark.parametrize("count", [8, 10])
def test_once_goes_block_by_block(count):
    def noisy(key, x):
        return x + jax.random.normal(key, x.shape)

    data = sets.take(SET, jnp.arange(count))
    found = once(noisy, block=4)(KEY, data)
    noise = np.concatenate([jax.random.normal(keys.at(KEY, b), (4, 16, 16, 3)) for b in range(3)])[:count]
    np.testing.assert_allclose(found.x, data.x + noise, atol=1e-6)
    np.testing.assert_array_equal(found.y, data.y)
    np.testing.assert_array_equal(found.index, data.index)


# --- orthogonal projection ---------------------------------------------------------------------------------------


@lru_cache
def patterned():
    """Images that know of their class by an added pattern alone."""
    rng, count, classes = np.random.default_rng(5), 600, 4
    y = rng.integers(0, classes, count)
    pattern = rng.choice([-0.06, 0.06], size=(classes, 8, 8, 1))
    return sets.make(np.clip(rng.normal(0.5, 0.05, (count, 8, 8, 1)) + pattern[y], 0, 1), y), pattern


def separable(data):
    x, y = np.asarray(data.x).reshape(len(data.y), -1), np.asarray(data.y)
    fit = LogisticRegression(C=10.0, max_iter=300).fit(x[:300], y[:300])
    return fit.score(x[300:], y[300:])


def test_shortcut_directions_span_what_a_linear_classifier_sees():
    data, pattern = patterned()
    found = np.asarray(countermeasures.shortcut_directions(KEY, data, classes=4))
    assert found.shape == (64, 3)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-5)
    between = (pattern - pattern.mean(axis=0)).reshape(4, 64)
    left = between - between @ found @ found.T
    assert np.linalg.norm(left) < 0.3 * np.linalg.norm(between)


def test_projection_makes_linear_noise_useless():
    data, _ = patterned()
    assert separable(data) == 1.0
    projected_data = countermeasures.project_out(KEY, data)
    assert separable(projected_data) < 0.4  # 0.25 by chance
    assert projected_data.x.shape == data.x.shape
    np.testing.assert_array_equal(projected_data.y, data.y)
    assert np.linalg.norm(projected_data.x - data.x) > 0.1


# --- victims -----------------------------------------------------------------------------------------------------


@lru_cache
def digits():
    x, y = load_digits(return_X_y=True)
    x = (x / 16).reshape(-1, 8, 8, 1)
    return sets.make(x[:800], y[:800]), sets.make(x[800:1300], y[800:1300])


MLP = models.from_linen(nets.mlp(10, (32,)))
TX = optax.sgd(0.1, momentum=0.9)
learned = partial(victim.learned, MLP, tx=TX, batch=100)


@lru_cache
def noise(shape="class"):
    return victim.random_noise(KEY, digits()[0], ball=projected.linf(0.5), granularity=shape)


def test_released_is_rounded_to_bytes():
    data, protection = digits()[0], noise()
    delta, row = np.asarray(protection.delta), np.asarray(protection.row)
    mask = np.arange(800) % 3 > 0
    found = np.asarray(victim.released(data, protection._replace(delta=0.3 * delta, mask=jnp.asarray(mask))).x)
    joined = np.clip(np.asarray(data.x) + 0.3 * delta[row], 0, 1)
    joined = np.where(mask[:, None, None, None], joined, data.x)
    np.testing.assert_allclose(255 * found, np.rint(255 * found), atol=1e-3)
    assert np.abs(255 * (found - joined)).max() <= 0.501
    assert np.abs(found - joined).max() > 0.3 / 255
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    whole = sets.make(image, [0])
    np.testing.assert_array_equal(victim.released(whole, None).x, whole.x)  # bytes stay what they were


def test_a_victim_learns_clean_data_and_not_noise():
    data, test = digits()
    said = []
    clean = learned(KEY, data, test, epochs=3, watch=lambda epoch, right: said.append((epoch, right)))
    assert clean.final > 0.8
    assert len(clean.test) == len(clean.train) == 3
    assert said == [(i + 1, {"test": a, "train": b}) for i, (a, b) in enumerate(zip(clean.test, clean.train))]
    assert clean.final == clean.test[-1]
    logits = MLP.apply(clean.weights, test.x)
    assert clean.final == pytest.approx(float((logits.argmax(-1) == test.y).mean()), abs=1e-6)
    poisoned = learned(KEY, data, test, noise(), epochs=3)
    assert poisoned.train[-1] > 0.95  # what it was given it learns
    assert poisoned.final < 0.45
    assert poisoned.peak == max(poisoned.test)
    again = learned(KEY, data, test, noise(), epochs=3)
    assert (again.test, again.train) == (poisoned.test, poisoned.train)
    jax.tree.map(np.testing.assert_array_equal, again.weights, poisoned.weights)


def test_peak_is_not_the_end():
    outcome = victim.Outcome((0.2, 0.7, 0.4), (0.1, 0.2, 0.3), START)
    assert (outcome.peak, outcome.final) == (0.7, 0.4)


def test_a_victim_trains_on_what_was_prepared_from_the_release():
    data, test = digits()
    seen = []
    against = Countermeasure(prepare=lambda key, given: (seen.append((key, given)), given._replace(x=0.0 * given.x))[1])
    outcome = learned(KEY, data, test, noise(), against=against, epochs=1)
    np.testing.assert_array_equal(seen[0][1].x, victim.released(data, noise()).x)
    assert outcome.final < 0.25  # nothing to see in black images


def test_a_victim_refuses():
    data, test = digits()
    with pytest.raises(NonFinite):
        learned(KEY, data, test, epochs=2, tx=optax.sgd(1e30))
    small = sets.take(data, jnp.arange(50))
    with pytest.raises(BadInput, match="has no noise"):
        learned(KEY, data, test, victim.random_noise(KEY, small, ball=projected.linf(0.1)), epochs=1)
    with pytest.raises(BadInput, match="epochs"):
        learned(KEY, data, test, epochs=0)


# --- controls ----------------------------------------------------------------------------------------------------

BALLS = {"linf": projected.linf(0.1), "l2": projected.l2(0.7), "l0": projected.l0(5)}
MASK = (np.arange(12) % 4 != 1) & (np.arange(12) % K != 2)  # no example of class 2


@pytest.mark.parametrize("granularity", ["sample", "class"])
@pytest.mark.parametrize("norm", BALLS)
def test_random_noise_has_the_exact_budget(norm, granularity):
    found = victim.random_noise(KEY, SET, MASK, ball=BALLS[norm], granularity=granularity)
    assert isinstance(found, Perturbation)
    assert len(found.delta) == (12 if granularity == "sample" else K)
    np.testing.assert_array_equal(found.mask, MASK)
    np.testing.assert_array_equal(found.row, np.arange(12) if granularity == "sample" else SET.y)
    delta = np.asarray(found.delta)
    worn = MASK if granularity == "sample" else np.array([True, True, False])
    assert not delta[~worn].any()
    some = delta[worn]
    if norm == "linf":
        np.testing.assert_array_equal(np.abs(some), np.float32(0.1))
        assert abs(np.sign(some).mean()) < 0.1
    elif norm == "l2":
        np.testing.assert_allclose(np.linalg.norm(some.reshape(len(some), -1), axis=1), 0.7, rtol=1e-5)
    else:
        assert (some.any(axis=-1).sum(axis=(1, 2)) == 5).all()
        assert set(np.unique(some)) == {-1.0, 0.0, 1.0}
        np.testing.assert_array_equal((some != 0).all(axis=-1), some.any(axis=-1))  # every channel of a pixel
    assert len(np.unique(some.reshape(len(some), -1), axis=0)) == len(some)  # no two alike
    joined = np.asarray(sets.perturb(SET, found).x)
    np.testing.assert_array_equal(joined[~MASK], np.asarray(SET.x)[~MASK])
    np.testing.assert_allclose(joined, np.where(MASK[:, None, None, None], np.clip(SET.x + delta[found.row], 0, 1), SET.x))
    whole = victim.random_noise(KEY, SET, ball=BALLS[norm], granularity=granularity)
    np.testing.assert_array_equal(whole.delta[worn], some)  # the mask moves nobody's draw
    assert (victim.random_noise(OTHER, SET, MASK, ball=BALLS[norm]).delta[0] != delta[0]).any()


def test_random_noise_refuses():
    with pytest.raises(BadInput, match="granularity"):
        victim.random_noise(KEY, SET, ball=BALLS["linf"], granularity="image")
    for mask in (np.zeros(12, bool), np.ones(11, bool), np.ones(12)):
        with pytest.raises(BadInput):
            victim.random_noise(KEY, SET, mask, ball=BALLS["linf"])
    with pytest.raises(BadInput, match="257 pixels"):
        victim.random_noise(KEY, SET, ball=projected.l0(257))


def test_random_noise_wants_the_whole_set():
    """On a reordered set the noise of one example would be worn by another."""
    data = sets.make(np.full((4, 2, 2, 1), 0.5), np.array([0, 1, 0, 1]))
    moved = sets.take(data, jnp.array([1, 0, 2, 3]))
    for granularity in ("sample", "class"):
        with pytest.raises(BadInput, match="whole set"):
            victim.random_noise(KEY, moved, ball=projected.linf(0.1), granularity=granularity)


def test_random_labels_are_dealt_out():
    data = SET._replace(y=jnp.asarray([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2]))
    found = protect.random_labels(KEY, data)
    np.testing.assert_array_equal(np.bincount(found.y), [6, 4, 2])
    assert (found.y != data.y).any()
    assert found.x is data.x
    np.testing.assert_array_equal(found.index, data.index)
    assert (protect.random_labels(OTHER, data).y != found.y).any()
