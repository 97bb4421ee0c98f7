"""Perturbations against naive numpy loops: error-minimizing noise and the one-pixel shortcut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dememo_jax import data as sets
from dememo_jax import loop, models, nets, protect, sources, train
from dememo_jax.errors import BadInput
from dememo_jax.types import Perturbation

RADIUS, STRIDE, RATE, CLASSES = 0.1, 0.03, 0.5, 3
W0 = np.random.default_rng(0).normal(size=(12, CLASSES)).astype(np.float32)


def linear():
    return models.from_apply(lambda key, x: {"w": jnp.asarray(W0)}, lambda p, x: x.reshape(len(x), -1) @ p["w"])


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(1)
    x = rng.uniform(size=(20, 3, 4, 1)).astype(np.float32)
    x[:4] = np.round(x[:4])  # pixels at 0 and 1, where the box is tight
    return sets.make(x, rng.integers(0, CLASSES, 20))


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def naive(data, mask, *, granularity, inner, batch, rounds, learner_steps, rate, radius=RADIUS):
    """The published alternation on a linear softmax, one image at a time; the learner sees the full batch."""
    x = np.asarray(data.x, np.float64).reshape(len(data.y), -1)
    y = np.asarray(data.y)
    w, onehot = W0.astype(np.float64), np.eye(CLASSES)[y]
    sample = granularity == "sample"
    delta, row = (np.zeros_like(x), np.arange(len(y))) if sample else (np.zeros((CLASSES, x.shape[1])), y)
    losses = []  # on the protected data, after each round

    def joined():
        return np.where(mask[:, None], np.clip(x + delta[row], 0, 1), x)

    for _ in range(rounds):
        for _ in range(learner_steps):
            w = w - rate * joined().T @ (softmax(joined() @ w) - onehot) / len(y)
        for begin in range(0, len(y), batch):
            moved = {}
            for i in range(begin, min(begin + batch, len(y))):
                if mask[i]:
                    d = delta[row[i]].copy()
                    for _ in range(inner):
                        d -= STRIDE * np.sign(w @ (softmax(np.clip(x[i] + d, 0, 1) @ w) - onehot[i]))
                        d = np.clip(d, -radius, radius)
                        d = np.clip(x[i] + d, 0, 1) - x[i] if sample else d
                    moved.setdefault(row[i], []).append(d)
            for r, new in moved.items():
                delta[r] = np.mean(new, axis=0)
        losses.append(-np.log(softmax(joined() @ w)[np.arange(len(y)), y]).mean())
    error = (np.argmax(joined() @ w, axis=1) != y).mean()
    return delta.reshape(-1, *data.x.shape[1:]), w, np.array(losses), error


def alternate(data, mask, tx, *, steps, **how):
    method = protect.error_minimizing(linear(), tx, radius=RADIUS, stride=STRIDE, classes=CLASSES, **how)
    start = jax.jit(method.init)(jax.random.key(0), data, mask)
    return jax.jit(functools.partial(loop.scan, method, steps=steps))(jax.random.key(1), start, data)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["sample", "class"])
def test_two_rounds_equal_a_naive_loop_over_images(toy, granularity):
    # Full batches, so that the learner's shuffling does not matter; the published inner steps are 20 and 1.
    mask = np.asarray(toy.y != 1) & (np.arange(20) % 5 != 0)
    state, info = alternate(toy, mask, optax.sgd(RATE), steps=2, granularity=granularity, learner_steps=2, batch=20)
    inner = {"sample": 20, "class": 1}[granularity]
    delta, w, losses, error = naive(
        toy, mask, granularity=granularity, inner=inner, batch=20, rounds=2, learner_steps=2, rate=RATE
    )
    np.testing.assert_allclose(state.perturbation.delta, delta, atol=1e-5 if granularity == "class" else 2e-4)
    np.testing.assert_allclose(state.learner.weights.params["w"], w, atol=1e-4)
    np.testing.assert_allclose(info["loss"], losses, rtol=1e-4)
    assert float(info["error"][-1]) == pytest.approx(error, abs=1e-6)
    assert float(info["error"][-1]) > 0  # else the comparison would be empty


@pytest.mark.slow
@pytest.mark.parametrize(("granularity", "batch"), [("sample", 8), ("class", 10), ("class", 8)])
def test_batches_of_the_pass_at_frozen_weights(toy, granularity, batch):
    # 8 does not divide 20: the last, short batch must weigh its own examples only.
    mask = np.ones(20, bool)
    how = {"granularity": granularity, "batch": batch}
    state, _ = alternate(toy, mask, optax.set_to_zero(), steps=2, learner_steps=1, inner_steps=3, **how)
    delta, *_ = naive(toy, mask, inner=3, rounds=2, learner_steps=1, rate=0.0, **how)
    np.testing.assert_allclose(state.perturbation.delta, delta, atol=1e-5 if granularity == "class" else 2e-4)


@pytest.mark.parametrize("granularity", ["sample", "class"])
def test_budget_box_and_mask(toy, granularity):
    mask = np.asarray(toy.y != 1)
    method = protect.error_minimizing(
        linear(), optax.sgd(RATE), radius=RADIUS, stride=STRIDE, classes=CLASSES, granularity=granularity, batch=8
    )

    def run(key):
        return loop.scan(method, key, method.init(key, toy, jnp.asarray(mask)), toy, steps=3)[0].perturbation

    many = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 2))  # compiles and maps over runs
    for delta in np.asarray(many.delta):
        assert np.abs(delta).max() == pytest.approx(RADIUS, abs=1e-6)  # the budget binds and holds
        if granularity == "sample":
            x = np.asarray(toy.x, np.float64) + delta
            assert x.min() >= -1e-6
            assert x.max() <= 1 + 1e-6
            assert (delta[~mask] == 0).all()
            assert (np.abs(delta[mask]).max(axis=(1, 2, 3)) > 0).all()
        else:
            assert (delta[1] == 0).all()  # no masked example has class 1
            assert (np.abs(delta[[0, 2]]).max(axis=(1, 2, 3)) > 0).all()
    assert (np.asarray(many.mask) == mask).all()


def test_noise_makes_digits_unlearnable():
    train_set, test_set = sources.load("digits")
    model = models.from_apply(lambda key, x: {"w": jnp.zeros((64, 10))}, lambda p, x: x.reshape(len(x), -1) @ p["w"])
    method = protect.error_minimizing(
        model, optax.sgd(0.5), radius=0.5, stride=0.05, granularity="class", learner_steps=5, inner_steps=2, batch=449
    )
    victim = train.sgd(model, optax.sgd(0.5))

    @jax.jit
    def protected(key):
        return loop.scan(method, key, method.init(key, train_set), train_set, steps=8)[0]

    @jax.jit
    def trained(key, noise):
        start = victim.init(key, train_set.x[:1])
        return loop.scan(victim, key, start, train_set, steps=200, batch=128, perturbation=noise)[0].weights

    def loss_and_accuracy(weights, x, y):
        chance = softmax(np.asarray(x).reshape(len(y), -1) @ np.asarray(weights.params["w"]))
        return -np.log(chance[np.arange(len(y)), y]).mean(), (chance.argmax(axis=1) == y).mean()

    state = protected(jax.random.key(0))
    noise, (x, y, _) = state.perturbation, map(np.asarray, train_set)
    assert np.abs(noise.delta).max() <= 0.5 + 1e-6
    joined = np.clip(x + np.asarray(noise.delta)[y], 0, 1)
    assert loss_and_accuracy(state.learner.weights, joined, y)[0] < 0.5 * loss_and_accuracy(state.learner.weights, x, y)[0]
    blank = Perturbation(jnp.zeros_like(noise.delta), noise.row, noise.mask)
    clean, harmed = (
        loss_and_accuracy(trained(jax.random.key(5), delta), test_set.x, np.asarray(test_set.y))[1] for delta in (blank, noise)
    )
    assert clean > 0.9
    assert harmed < clean - 0.08


@pytest.mark.parametrize(
    "wrong", [{"radius": 0.0}, {"radius": -0.1}, {"stride": 0.0}, {"radius": float("nan")}, {"granularity": "pixel"}]
)
def test_error_minimizing_refuses(wrong):
    with pytest.raises(BadInput):
        protect.error_minimizing(linear(), optax.sgd(0.1), **{"radius": 0.1, "stride": 0.01, **wrong})


# --- one pixel -----------------------------------------------------------------------------------------------------


def naive_one_pixel(x, y, mask, classes, pixels):
    """Class by class, the best (position, colour) pairs by mean over std; [(class, i, j, colour), ...]."""
    used, chosen = set(), []
    colours = [tuple(map(int, np.binary_repr(v, x.shape[-1]))) for v in range(2 ** x.shape[-1])]
    for label in range(classes):
        members = x[mask & (y == label)].astype(np.float64)
        if not len(members):
            continue
        scores = {}
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                for v in colours:
                    gap = np.abs(members[:, i, j] - np.array(v))
                    scores[i, j, v] = gap.mean() / gap.std()
        places = set()
        for i, j, v in sorted(scores, key=scores.get, reverse=True):
            if (i, j, v) not in used and (i, j) not in places and len(places) < pixels:
                places.add((i, j))
                chosen.append((label, i, j, v))
        used |= {(i, j, v) for label_, i, j, v in chosen if label_ == label}
    return chosen


@pytest.mark.parametrize(("channels", "pixels", "masked"), [(1, 1, False), (1, 3, True), (3, 2, False), (3, 2, True)])
def test_one_pixel_equals_a_naive_search(channels, pixels, masked):
    rng = np.random.default_rng(channels)
    # All classes share one law, so the best pairs coincide and the rule about used pairs bites.
    x = rng.beta(0.5 + rng.uniform(size=(1, 4, 3, channels)), 1.0, size=(60, 4, 3, channels)).astype(np.float32)
    y = rng.integers(0, 4, 60)
    mask = rng.uniform(size=60) < 0.6 if masked else np.ones(60, bool)
    mask &= y != 2  # a class without masked examples
    noise = protect.one_pixel(sets.make(x, y), mask, classes=4, pixels=pixels)
    expected = np.zeros((4, 4, 3, channels))
    chosen = naive_one_pixel(x, y, mask, 4, pixels)
    for label, i, j, colour in chosen:
        expected[label, i, j] = 2 * np.array(colour) - 1
    np.testing.assert_array_equal(noise.delta, expected)
    np.testing.assert_array_equal(noise.mask, mask)
    best = {label: naive_one_pixel(x, y, mask & (y == label), 4, pixels) for label in (0, 1, 3)}
    assert set(chosen) != set().union(*best.values())  # the rule did bite

    got = np.asarray(sets.perturb(sets.make(x, y), noise).x)
    touched = np.zeros(got.shape, bool)
    for label, i, j, colour in chosen:
        members = mask & (y == label)
        assert (got[members, i, j] == np.array(colour)).all()  # exactly the colour, whatever stood there
        touched[members, i, j] = True
    np.testing.assert_array_equal(got[~touched], x[~touched])


def test_constant_pixels_are_the_best_place():
    x = np.random.default_rng(0).uniform(size=(12, 3, 3, 1)).astype(np.float32)
    x[:, 0, 0] = 0.0  # a spread of zero: turning it white is the perfect shortcut
    # Class 0 has no examples: it gets no pixel, and takes none away from class 1.
    delta = np.asarray(protect.one_pixel(sets.make(x, np.ones(12)), classes=2).delta)
    assert np.isfinite(delta).all()
    assert np.argwhere(delta).tolist() == [[1, 0, 0, 0]]
    assert delta[1, 0, 0, 0] == 1.0
    grey = sets.make(np.full((12, 3, 3, 1), 0.5), np.arange(12) % 2)
    assert np.isfinite(protect.one_pixel(grey, classes=2, pixels=2).delta).all()


@pytest.mark.parametrize(("classes", "pixels"), [(2, 0), (2, 5), (9, 1), (5, 2)])
def test_one_pixel_refuses_impossible_counts(classes, pixels):
    with pytest.raises(BadInput):  # 2 x 2 positions, two colours: 8 pairs
        protect.one_pixel(sets.make(np.zeros((10, 2, 2, 1)), np.arange(10)), classes=classes, pixels=pixels)


def test_one_pixel_never_shares_a_pair():
    # Three positions x two colours are six pairs. Classes 0 and 1 use up the two grey positions, which leaves class 2
    # a single position for two pixels: it must not be given a pair that is taken.
    x = np.full((6, 1, 3, 1), 0.5, np.float32)
    x[:, 0, 2, 0] = np.linspace(0, 1, 6)[[0, 3, 1, 4, 2, 5]]
    try:
        delta = np.asarray(protect.one_pixel(sets.make(x, np.arange(6) % 3), classes=3, pixels=2).delta)
    except BadInput:
        return  # to refuse is right too
    pairs = [(*place, delta[label][tuple(place)]) for label in range(3) for place in np.argwhere(delta[label]).tolist()]
    assert len(pairs) == len(set(pairs)) == 6


@pytest.mark.parametrize("granularity", ["sample", "class"])
def test_labels_and_numbers_beyond_the_set_are_refused(granularity):
    # indexing would clamp them in silence, and class 4 would wear the noise of class 2
    examples = sets.make(np.zeros((5, 4, 4, 1), np.float32), np.arange(5))
    method = protect.error_minimizing(
        models.from_linen(nets.mlp(5, (4,))), optax.sgd(0.1), radius=0.1, stride=0.01, classes=3, granularity=granularity
    )
    with pytest.raises(BadInput, match="pass classes=5"):
        method.init(jax.random.key(0), examples)
    with pytest.raises(BadInput, match="pass classes=5"):
        protect.one_pixel(examples, classes=3)
    part = sets.take(examples, jnp.array([1, 2]))  # still numbered 1 and 2: its noise would be looked up elsewhere
    for make in (lambda: method.init(jax.random.key(0), part), lambda: protect.one_pixel(part, classes=3)):
        with pytest.raises(BadInput, match="whole set"):
            make()
