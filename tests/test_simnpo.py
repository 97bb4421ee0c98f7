"""SimNPO against a loop over answers and tokens, in float64; what it becomes for small beta."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit, log_softmax, softmax

from dememo_jax import losses, models, unlearn
from dememo_jax.errors import BadInput
from dememo_jax.types import Dataset, Weights

N, T, K, RATE, KEY = 24, 5, 3, 0.3, jax.random.key(0)
RANDOM = np.random.default_rng(6)
GIVEN = RANDOM.normal(size=(4, K)).astype(np.float32)
FORGET = np.arange(N) % 4 == 1  # 6 of 24: a batch of 18 is all of the retain set, or the whole forget set three times
X, Y = RANDOM.normal(size=(N, T, 4)).astype(np.float32), RANDOM.integers(0, K, (N, T))
COUNTS = np.arange(N) * 7 % (T + 1)  # tokens that count, from none to all
REAL = np.arange(T) < COUNTS[:, None]
SEQUENCES = Dataset(jnp.asarray(np.where(REAL[..., None], X, 1e3)), jnp.asarray(np.where(REAL, Y, -1)), jnp.arange(N))
SINGLE = Dataset(jnp.asarray(X[:, 0]), jnp.asarray(Y[:, 0]), jnp.arange(N))
MODEL = models.from_apply(lambda key, x: {"w": jnp.asarray(GIVEN)}, lambda p, x: x @ p["w"])


def run(recipe, data, steps=1, **how):
    """Weights and losses after some steps, operation by operation."""
    method = recipe(MODEL, optax.sgd(RATE), batch=18, **how)
    with jax.disable_jit():
        state = method.init(KEY, Weights({"w": jnp.asarray(GIVEN)}, ()), data, FORGET)
        for t in range(steps):
            state, info = method.step(jax.random.fold_in(KEY, t), state, data)
    return np.asarray(state.weights.params["w"]), {name: float(value) for name, value in info.items()}


def by_hand(answers, beta, gamma, forget, retain):
    """Weights and losses after a step on answers (nll per token, its gradient), one by one."""
    total, values = 0.0, {"forget_loss": [], "retain_loss": []}
    for hidden, (mean, slope) in zip(FORGET, answers):
        if hidden:
            values["forget_loss"].append(-2 / beta * np.log(expit(beta * mean - gamma)))
            total -= forget * 2 * expit(gamma - beta * mean) * slope / 6
        else:
            values["retain_loss"].append(mean)
            total += retain * slope / 18
    return GIVEN - RATE * total, {name: np.mean(each) for name, each in values.items()}


@pytest.mark.slow
def test_sequences():
    """Tokens that do not count change nothing, and a long answer weighs as much as a short one."""
    how = {"beta": 1.3, "gamma": 0.2, "forget": 0.6, "retain": 0.5}
    answers = []
    for x, y, count in zip(X.astype(np.float64), Y, COUNTS):
        mean, slope = 0.0, np.zeros((4, K))
        for token, label in zip(x[:count], y):
            logits = token @ GIVEN.astype(np.float64)
            mean -= log_softmax(logits)[label] / count
            slope += np.outer(token, softmax(logits) - np.eye(K)[label]) / count
        answers.append((mean, slope))
    weights, said = run(unlearn.simnpo, SEQUENCES, nll=losses.sequence_nll, **how)
    wanted, told = by_hand(answers, **how)
    np.testing.assert_allclose(weights, wanted, rtol=2e-5, atol=1e-5)
    assert said == pytest.approx(told, rel=1e-4)
    assert set(COUNTS[FORGET]) > {1, 3}
    assert set(COUNTS) == set(range(T + 1))


def test_lengths_of_labels():
    """Of a model that answers with labels, whose logits are log-likelihoods already."""
    how, lengths = {"beta": 0.9, "gamma": 0.0, "forget": 0.6, "retain": 0.8}, (1, 4, 2)
    answers = []
    for x, label in zip(X[:, 0].astype(np.float64), Y[:, 0]):
        share = 1 / lengths[label]
        answers.append((-(x @ GIVEN)[label] * share, -np.outer(x, np.eye(K)[label]) * share))
    weights, said = run(unlearn.simnpo, SINGLE, nll=losses.label_nll, lengths=lengths, **how)
    wanted, told = by_hand(answers, **how)
    np.testing.assert_allclose(weights, wanted, rtol=2e-5, atol=1e-5)
    assert said == pytest.approx(told, rel=1e-4)


def test_small_beta_is_gradient_ascent():
    mild, said = run(unlearn.simnpo, SINGLE, steps=3, beta=1e-3, forget=1.0, retain=0)
    ascent, told = run(unlearn.gradient_ascent, SINGLE, steps=3)
    assert np.abs(ascent - GIVEN).max() > 0.1
    np.testing.assert_allclose(mild, ascent, rtol=5e-3, atol=5e-3)
    assert said["forget_loss"] - 2e3 * np.log(2) == pytest.approx(-told["forget_loss"], rel=1e-2, abs=5e-3)


def test_a_large_beta_leaves_what_is_unlikely_already():
    """The gradient of an answer is that of ascent times 2 sigmoid(gamma - beta nll)."""
    far = SINGLE._replace(x=SINGLE.x + 0.0, y=jnp.asarray((np.asarray(X[:, 0] @ GIVEN)).argmin(axis=1)))
    weights, _ = run(unlearn.simnpo, far, beta=200.0, forget=1.0, retain=0)
    np.testing.assert_allclose(weights, GIVEN, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "says"),
    [({"beta": 0.0}, "beta and forget must be positive"), ({"forget": 0.0}, "beta and forget must be positive"),
     ({"retain": -1.0}, "retain not negative"), ({"lengths": (1, 0)}, "a token at least"), ({"lengths": ()}, "token at least")],
)  # fmt: skip
def test_refused(how, says):
    with pytest.raises(BadInput, match=says):
        unlearn.simnpo(MODEL, **how)


def test_lengths_are_refused_where_labels_are_sequences():
    with pytest.raises(BadInput, match=r"lengths belong to labels \[B\], got labels of shape \[2, 5\]"):
        losses.per_token(losses.sequence_nll, (1, 2, 3))(jnp.zeros((2, T, K)), jnp.zeros((2, T), int))
