"""What noise descends, against double loops, closed forms and finite differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dememo_jax import data as sets
from dememo_jax import models, protect
from dememo_jax.protect import frozen, objectives
from dememo_jax.protect.refine import Seen
from dememo_jax.types import Weights

RNG = np.random.default_rng(0)
CLASSES, SIZE = 4, 6
W = RNG.normal(size=(SIZE, CLASSES)).astype(np.float32)
X = RNG.uniform(size=(9, SIZE)).astype(np.float32)
NOISE = RNG.normal(size=(9, SIZE)).astype(np.float32)
Y = np.array([0, 1, 2, 0, 1, 2, 0, 1, 0])  # no example of class 3
ACTIVE = np.array([True] * 7 + [False] * 2)
WEIGHTS = Weights({"w": jnp.asarray(W)}, ())
MODEL = models.from_apply(lambda key, x: WEIGHTS.params, lambda p, x: x.reshape(len(x), -1) @ p["w"])


def see(x=X, y=Y, noise=NOISE, active=ACTIVE, context=()):
    return Seen(jnp.asarray(x), jnp.asarray(y), jnp.asarray(noise), jnp.asarray(active), context)


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def slope(fn, at, h=1e-5):
    """Central differences of a scalar function of an array, in float64."""
    at, found = at.astype(np.float64), np.zeros(at.shape)
    for place in np.ndindex(at.shape):
        step = np.zeros(at.shape)
        step[place] = h
        found[place] = (fn(at + step) - fn(at - step)) / (2 * h)
    return found


# --- separation ----------------------------------------------------------------------------------------------------


def scatters(noise, y, active):
    """Of each class that is present: its centre, and the mean distance to it."""
    found = {}
    for label in sorted(set(y[active].tolist())):
        own = noise[active & (y == label)].astype(np.float64)
        centre = own.mean(axis=0)
        found[label] = centre, np.mean([np.sqrt(((row - centre) ** 2).sum()) for row in own])
    return found


def davies_bouldin(noise, y, active, held=None):
    found = scatters(noise, y, active)
    ratios = []
    for k, (centre, scatter) in found.items():
        for other, (there, far) in found.items():
            if k != other:
                s, r = (scatter, far) if held is None else (held[k][1], held[other][1])
                ratios.append((s + r + 1e-5) / (np.sqrt(((centre - there) ** 2).sum()) + 1e-5))
    return np.mean(ratios) if ratios else 0.0


CASES = {
    "missing class, inactive": (Y, ACTIVE),
    "one class alone": (np.zeros(9, int), np.ones(9, bool)),
    "other classes inactive": (Y, Y == 1),
    "none active": (Y, np.zeros(9, bool)),
    "all classes": (np.arange(9) % CLASSES, np.ones(9, bool)),
    "singletons": (Y, np.array([True, True] + [False] * 7)),
}


@pytest.mark.parametrize("detached", [True, False])
def test_separation_is_the_double_loop_over_class_pairs(detached):
    objective = objectives.separation(CLASSES, detached=detached)
    both = jax.jit(jax.value_and_grad(lambda noise, y, active: objective(WEIGHTS, see(y=y, noise=noise, active=active))))
    for name, (y, active) in CASES.items():
        value, grad = both(NOISE, y, active)
        held = scatters(NOISE, y, active) if detached else None
        np.testing.assert_allclose(value, davies_bouldin(NOISE, y, active), rtol=1e-5, err_msg=name)
        assert np.isfinite(grad).all(), name
        assert (np.asarray(grad)[~active] == 0).all(), name
        if name != "singletons" or detached:  # at a scatter of zero the loop has a kink
            expected = slope(lambda noise, y=y, a=active, held=held: davies_bouldin(noise, y, a, held), NOISE)
            np.testing.assert_allclose(grad, expected, atol=2e-5, err_msg=name)
        if len(set(y[active].tolist())) < 2:
            assert float(value) == 0, name
            assert (np.asarray(grad) == 0).all(), name
    wild = np.where(ACTIVE[:, None], NOISE, 100 * NOISE)
    assert float(both(wild, Y, ACTIVE)[0]) == float(both(NOISE, Y, ACTIVE)[0])  # inactive noise is not looked at
    if detached:  # and every example of a class goes the same way
        np.testing.assert_allclose(both(NOISE, Y, ACTIVE)[1][0], both(NOISE, Y, ACTIVE)[1][3], rtol=1e-4)


def test_published_tue_becomes_a_pattern_of_signs_a_class():
    rng = np.random.default_rng(5)
    y = rng.integers(0, 4, 200)
    data = sets.make(rng.uniform(0.2, 0.8, size=(200, 6, 6, 3)), y)  # away from the box, which is another's business
    radius, first = 0.1, {}
    recipe = protect.transferable(radius=radius, classes=4, batch=256)
    assert recipe.steps == 10

    def watch(done, state, info):
        first.setdefault("delta", np.asarray(state.perturbation.delta, np.float64))

    delta = np.asarray(protect.generate(recipe, jax.random.key(0), data, watch=watch).delta, np.float64)
    pattern = np.stack([np.sign(delta[y == k].mean(axis=0)) for k in range(4)])

    def agreement(noise):
        return (np.sign(noise) == pattern[y]).mean()

    assert agreement(delta) > 0.95
    assert (np.abs(delta) > 0.98 * radius).mean() > 0.9
    assert np.abs(delta).max() <= radius
    assert agreement(first["delta"]) <= agreement(delta)
    assert all((pattern[k] != pattern[j]).mean() > 0.1 for k in range(4) for j in range(k))  # the classes' patterns differ


# --- contrast ------------------------------------------------------------------------------------------------------


def contrast(found, y, active, temperature, pull):
    """MI-UE's objective of each example, a loop over pairs."""
    found, out = found.astype(np.float64), np.zeros(len(found))
    for i in range(len(y)):
        same = other = spread = 0.0
        for j in range(len(y)):
            if active[i] and active[j] and i != j:
                alike = np.exp(found[i] @ found[j] / np.linalg.norm(found[i]) / np.linalg.norm(found[j]) / temperature)
                if y[i] == y[j]:
                    same, spread = same + alike, spread + np.linalg.norm(found[i] - found[j])
                else:
                    other += alike
        if same and other:
            out[i] = -np.log(same / other) + pull * np.log(1 + spread)
    return out


def test_same_class_contrast_is_the_loop_over_pairs():
    features = lambda weights, x: x @ weights.params["w"]  # noqa: E731
    objective = objectives.same_class_contrast(features, 0.3, 0.7)
    value = jax.jit(lambda x, y, active: objective(WEIGHTS, see(x, y, active=active)))
    grad = jax.jit(jax.grad(lambda x, y, active: objective(WEIGHTS, see(x, y, active=active)).sum()))
    w = W.astype(np.float64)
    for name, (y, active) in CASES.items():
        np.testing.assert_allclose(value(X, y, active), contrast(X @ w, y, active, 0.3, 0.7), atol=2e-5, err_msg=name)
        assert np.isfinite(grad(X, y, active)).all(), name
    expected = slope(lambda x: contrast(x @ w, Y, ACTIVE, 0.3, 0.7).sum(), X)
    np.testing.assert_allclose(grad(X, Y, ACTIVE), expected, rtol=2e-3, atol=2e-3)
    twins = np.concatenate([X[:1], X[:1], X[2:]])  # two images alike, of one class: no NaN from the root
    assert np.isfinite(grad(twins, np.array([0, 0, *Y[2:]]), ACTIVE)).all()


def test_nt_xent_is_the_loop_over_pairs():
    z = RNG.normal(size=(8, 3)).astype(np.float32)

    def loop(z, temperature=0.5):
        unit = z / np.linalg.norm(z, axis=1, keepdims=True)
        out = []
        for i in range(8):
            others = [np.exp(unit[i] @ unit[j] / temperature) for j in range(8) if j != i]
            out.append(-np.log(np.exp(unit[i] @ unit[(i + 4) % 8] / temperature) / sum(others)))
        return np.array(out)

    found = jax.jit(lambda z: objectives.nt_xent(z, 0.5))
    np.testing.assert_allclose(found(z), loop(z.astype(np.float64)), rtol=1e-5)
    grad = jax.jit(jax.grad(lambda z: found(z).mean()))(z)
    np.testing.assert_allclose(grad, slope(lambda z: loop(z).mean(), z), atol=2e-5)


def test_push_and_pull():
    features = lambda weights, x: x @ weights.params["w"]  # noqa: E731
    centroids = np.array([[0, 0, 0, 0], [3, 0, 0, 0], [0, 1, 0, 0], [9, 9, 9, 9]], np.float32)
    found = X.astype(np.float64) @ W
    nearest = {0: 2, 1: 0, 2: 0, 3: 1}
    assert nearest == {  # what the table says, by a search
        k: min((j for j in range(4) if j != k), key=lambda j, k=k: ((centroids[k] - centroids[j]) ** 2).sum()) for k in range(4)
    }
    y = np.arange(9) % 4
    away = objectives.push(features)(WEIGHTS, see(y=y, context=jnp.asarray(centroids)))
    near = objectives.pull(features)(WEIGHTS, see(y=y, context=jnp.asarray(centroids)))
    np.testing.assert_allclose(away, [-((f - centroids[k]) ** 2).mean() for f, k in zip(found, y)], rtol=1e-5)
    np.testing.assert_allclose(near, [((f - centroids[nearest[k]]) ** 2).mean() for f, k in zip(found, y)], rtol=1e-5)


def test_pull_never_goes_to_a_class_without_examples():
    # Four images of two classes, told that there are three: the third has no centroid to be pulled to.
    x = np.float32([1.0, 0.9, 0.1, 0.2]).reshape(4, 1, 1, 1)
    data = sets.make(x, [0, 0, 1, 1])
    seen = {}

    def spy(descent):
        def made(objective, *args, **how):
            seen["objective"] = objective
            return descent(objective, *args, **how)

        return made

    model = models.from_apply(lambda key, x: {"w": jnp.ones((1, 3))}, lambda p, x: x.reshape(len(x), -1) @ p["w"])
    features = lambda weights, x: 10 * x.reshape(len(x), -1) - 5  # centroids 4.5 and -3.5, zero lies between  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen.refine, "descent", spy(frozen.refine.descent))
        contexts = {}
        patch.setattr(frozen, "alternate", lambda *args, **how: contexts.update(how))
        frozen.entangled_features(model, features, form="pull", classes=3)
    state = type("S", (), {"weights": Weights({}, ())})
    context = contexts["context"](state, data)
    value = seen["objective"](state.weights, see(x, np.array([0, 0, 1, 1]), x, np.ones(4, bool), context))
    np.testing.assert_allclose(value, [(5 + 3.5) ** 2, (4 + 3.5) ** 2, (-4 - 4.5) ** 2, (-3 - 4.5) ** 2], rtol=1e-4)


# --- losses of a classifier ----------------------------------------------------------------------------------------


def test_losses_on_true_and_other_labels():
    logp = log_softmax(X.astype(np.float64) @ W)
    rows = np.arange(9)
    np.testing.assert_allclose(objectives.minimizing(MODEL)(WEIGHTS, see()), -logp[rows, Y], rtol=1e-5)
    np.testing.assert_allclose(objectives.maximizing(MODEL)(WEIGHTS, see()), logp[rows, Y], rtol=1e-5)
    y = np.arange(9) % 4  # with the last class, which wraps around
    for offset in (0, 1, 3, -1):
        found = objectives.targeted(MODEL, CLASSES, offset)(WEIGHTS, see(y=y))
        np.testing.assert_allclose(found, [-logp[i, (y[i] + offset) % 4] for i in rows], rtol=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradient_norm_and_its_second_order_gradient(sign):
    def norm(x):
        chance = np.exp(log_softmax(x @ W.astype(np.float64)))
        total = sum(np.outer(x[i], chance[i] - np.eye(CLASSES)[Y[i]]) for i in range(9) if ACTIVE[i])
        return sign * np.sqrt((total**2).sum())

    objective = objectives.gradient_norm(MODEL, sign)
    both = jax.jit(jax.value_and_grad(lambda x, active: objective(WEIGHTS, see(x, active=active))))
    value, grad = both(X, ACTIVE)
    np.testing.assert_allclose(value, norm(X.astype(np.float64)), rtol=1e-5)
    np.testing.assert_allclose(grad, slope(norm, X), atol=2e-5)
    assert (np.asarray(grad)[~ACTIVE] == 0).all()
    value, grad = both(X, np.zeros(9, bool))  # a gradient that vanished: no NaN from the root
    assert float(value) == 0
    assert (np.asarray(grad) == 0).all()


def test_the_linear_surrogate_s_objective(monkeypatch):
    seen = {}
    descent = frozen.refine.descent

    def spy(objective, ball, **how):
        seen.update(objective=objective, ball=ball, **how)
        return descent(objective, ball, **how)

    monkeypatch.setattr(frozen.refine, "descent", spy)
    recipe = protect.linear_surrogate(classes=CLASSES, radius=0.1, weight=0.8)
    weights = jax.jit(lambda key, x: recipe.init(key, sets.make(x, np.zeros(9)), None).learner.weights)(jax.random.key(1), X)
    first, second = (np.asarray(weights.params[name], np.float64) for name in ("first", "second"))
    assert first.shape == (SIZE, CLASSES)
    assert second.shape == (CLASSES, CLASSES)
    taken, left = (log_softmax(part.astype(np.float64) @ first @ second) for part in (-NOISE, X))
    divergence = [sum(np.exp(p) * (p - np.log(1 / CLASSES)) for p in row) for row in left]  # KL(softmax || uniform)
    expected = [0.8 * -taken[i, Y[i]] + 0.2 * divergence[i] for i in range(9)]
    np.testing.assert_allclose(seen["objective"](weights, see()), expected, rtol=1e-5)
    assert seen["steps"] == 30
    assert seen["start"] == "random"
    assert seen["stride"] == pytest.approx(0.01)
