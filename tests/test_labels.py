"""A language model as a classifier of labels: likelihoods against a slow sum, and the recipes on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dememo_jax import adapters, audit, certify, data, evaluate, likelihood, loop, losses, models, nets, train, tree, unlearn
from dememo_jax.errors import BadInput

KEY = jax.random.key(0)
NET = nets.Decoder(12, 16, 1, 2, 1, 24)
X = np.random.default_rng(0).integers(2, 12, (4, 5)).astype(np.int32)
X[1, :2] = 0
scan = jax.jit(loop.scan, static_argnames=("method", "steps", "batch"))


def made(labels):
    inner = models.from_linen(NET)
    inner = inner._replace(apply=jax.jit(inner.apply))
    model = likelihood.of_labels(inner, labels)
    weights = inner.init(KEY, jnp.asarray(X))
    return inner, model, weights._replace(params=jax.tree.map(lambda leaf: leaf * (9 if leaf.ndim > 1 else 1), weights.params))


@pytest.mark.slow
@pytest.mark.parametrize("labels", [pytest.param(((3,), (7,), (4,)), marks=pytest.mark.slow), ((3, 5), (7,), (3, 4, 2))])
def test_likelihoods_are_sums_over_the_answers_tokens(labels):
    inner, model, weights = made(labels)
    found = jax.jit(model.apply)(weights, X)
    assert found.shape == (4, len(labels))
    for row, text in zip(found, X):
        for value, label in zip(row, labels):
            total, known = 0.0, list(text)
            for token in label:
                total += float(jax.nn.log_softmax(inner.apply(weights, jnp.asarray([known]))[0, -1])[token])
                known.append(token)
            assert value == pytest.approx(total, rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(jax.jit(model.fit)(weights, X, KEY)[0], found, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        losses.label_nll(found, jnp.asarray([0, 1, 2, 0])), -np.asarray(found)[range(4), [0, 1, 2, 0]]
    )


@pytest.mark.slow
def test_likelihoods_of_all_answers_sum_to_one():
    _, model, weights = made([(token,) for token in range(1, 12)])
    inner = models.from_linen(NET)
    rest = jax.nn.log_softmax(inner.apply(weights, X)[:, -1])[:, 0]
    np.testing.assert_allclose(np.exp(model.apply(weights, X)).sum(axis=1) + np.exp(rest), 1, rtol=1e-5)


@pytest.mark.slow
def test_generated():
    labels = ((3, 5), (7,))
    inner, _, weights = made(labels)
    expected = []
    for text in X:
        found = -1
        for number, label in enumerate(labels):
            known, same = list(text), True
            for token in label:
                same &= int(inner.apply(weights, jnp.asarray([known]))[0, -1].argmax()) == token
                known.append(token)
            found = number if same else found
        expected.append(found)
    np.testing.assert_array_equal(likelihood.generated(inner, weights, X, labels), expected)
    # and where it writes the first answer
    first = int(inner.apply(weights, X)[0, -1].argmax())
    assert int(likelihood.generated(inner, weights, X, ((first,), (0, 0)))[0]) == 0


@pytest.fixture(scope="module")
def task():
    """Texts of eight tokens that hold one of three telling tokens; the answer is token 8, 9 or 10."""
    random = np.random.default_rng(1)
    labels = random.integers(0, 3, 240)
    x = random.integers(1, 5, (240, 8))
    x[np.arange(240), random.integers(0, 8, 240)] = 5 + labels
    x[:, -1], x[:50, :2] = 11, 0
    keep = (x[:, :-1] >= 5).sum(axis=1) == 1
    return data.rows(x[keep], labels[keep])


@pytest.mark.slow  # the page on text is run, which does as much
def test_recipes_on_text(task):
    """Training, forgetting, recovery and certificates take it for a classifier; here on an adapter."""
    model = likelihood.of_labels(models.from_linen(NET), ((8,), (9,), (10,)))
    learner = train.sgd(model, optax.adam(0.02), loss=losses.label_nll)
    state, _ = scan(learner, KEY, learner.init(KEY, task.x[:1]), task, steps=150, batch=32)
    victim = state.weights
    assert float(evaluate.accuracy(*models.freeze(model, victim), task)) > 0.95
    assert (likelihood.generated(models.from_linen(NET), victim, task.x, ((8,), (9,), (10,))) == task.y).mean() > 0.95
    adapter = adapters.lora(model, victim, rank=2)
    begun = adapter.init(KEY, task.x[:1])
    forget = np.asarray(task.y) == 1
    own = data.select(task, forget)
    recipe = unlearn.gradient_ascent(adapter, optax.adam(0.03), batch=32, nll=losses.label_nll)
    forgot = scan(recipe, KEY, recipe.init(KEY, begun, task, forget), task, steps=30)[0].weights
    assert float(evaluate.accuracy(*models.freeze(adapter, forgot), own)) < 0.5
    _, [[attacked]] = audit.sweep(adapter, [forgot], task, own, KEY, radii=(1.0,), hints=forget, epochs=2, batch=32)
    assert tree.finite(attacked)
    found = certify.depth(*models.freeze(adapter, forgot), own, KEY, sigma=0.01, eta=(0.001,), draws=60, side="upper")
    assert 0 <= found.rows[0].upper <= 1


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (((3,),), "two labels at least"),
        (((3,), ()), "no tokens"),
        (((3,), (0, 1)), "holds the token 0"),
        (((3,), (3, 4)), "begins with label 0"),
        (((3,), (3,)), "begins with"),
    ],
)
def test_refused(labels, says):
    with pytest.raises(BadInput, match=says):
        likelihood.of_labels(models.from_linen(NET), labels)


@pytest.mark.slow
def test_logits_of_the_last_positions_are_enough():
    inner, model, weights = made(((3, 5), (7,)))
    short = models.from_linen(NET.clone(last=2))
    np.testing.assert_allclose(short.apply(weights, X), inner.apply(weights, jnp.asarray(X))[:, -2:], rtol=1e-5, atol=1e-6)
    few = likelihood.of_labels(short, ((3, 5), (7,)))
    np.testing.assert_allclose(few.apply(weights, X), model.apply(weights, X), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        likelihood.generated(short, weights, X, ((3, 5), (7,))), likelihood.generated(inner, weights, X, ((3, 5), (7,)))
    )
    with pytest.raises(BadInput, match="a label has 2 tokens: raise `last`"):
        likelihood.of_labels(models.from_linen(NET.clone(last=1)), ((3, 5), (7,))).apply(weights, X)
