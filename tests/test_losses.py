"""Losses against numpy and scipy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax, softmax

from dememo_jax import losses

RANDOM = np.random.default_rng(0)
LOGITS = (3 * RANDOM.normal(size=(8, 5))).astype(np.float32)
LABELS = np.arange(8, dtype=np.int32) % 5
ROWS = np.arange(8)


def test_values():
    log_p = log_softmax(LOGITS.astype(np.float64), axis=-1)
    p = np.exp(log_p)
    own = p[ROWS, LABELS]
    np.testing.assert_allclose(losses.cross_entropy(LOGITS, LABELS), -log_p[ROWS, LABELS], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses.margin(LOGITS, LABELS), np.log(own) - np.log1p(-own), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(losses.entropy(LOGITS), -(p * log_p).sum(axis=-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(losses.entropy(LOGITS, LABELS), losses.entropy(LOGITS))
    np.testing.assert_array_equal(losses.correct(LOGITS, LABELS), LOGITS.argmax(axis=-1) == LABELS)


def test_uniform_logits():
    flat = np.zeros((8, 5), np.float32)
    np.testing.assert_allclose(losses.cross_entropy(flat, LABELS), np.log(5), rtol=1e-6)
    np.testing.assert_allclose(losses.entropy(flat), np.log(5), rtol=1e-6)
    np.testing.assert_allclose(losses.margin(flat, LABELS), -np.log(4), rtol=1e-6)


def test_extreme_logits_stay_finite():
    logits = jnp.array([[1e4, 0.0, -1e4], [1e4, 0.0, -1e4]])
    labels = jnp.array([0, 2])
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), [0.0, 2e4])
    np.testing.assert_allclose(losses.margin(logits, labels), [1e4, -2e4])  # log p - log(1 - p) would be inf
    np.testing.assert_allclose(losses.entropy(logits), 0.0, atol=1e-6)


def test_correct_breaks_ties_and_refuses_nan():
    nan = np.nan
    logits = jnp.array([[1.0, 1.0], [1.0, 1.0], [nan, 1.0], [nan, 1.0], [0.0, 2.0]])
    np.testing.assert_array_equal(losses.correct(logits, jnp.array([0, 1, 0, 1, 1])), [1, 0, 0, 0, 1])
    one = jnp.array([[3.0], [jnp.nan]])  # a single class
    np.testing.assert_array_equal(losses.correct(one, jnp.array([0, 0])), [1, 0])


def test_correct_does_not_hang_on_a_logit_being_equal_to_itself(monkeypatch):
    """As where a compiled program rounds the label's logit otherwise than the logits that it stands among."""
    own = losses._of_label
    monkeypatch.setattr(losses, "_of_label", lambda values, labels: own(values, labels) - 1e-6)
    np.testing.assert_array_equal(losses.correct(LOGITS, LABELS), LOGITS.argmax(axis=-1) == LABELS)


def test_gradients():
    grad = jax.jit(jax.grad(lambda z: losses.cross_entropy(z, LABELS).sum()))(LOGITS)
    p, one_hot = softmax(LOGITS.astype(np.float64), axis=-1), np.eye(5)[LABELS]
    np.testing.assert_allclose(grad, p - one_hot, atol=1e-6)
    grad = jax.jit(jax.grad(lambda z: losses.margin(z, LABELS).sum()))(LOGITS)
    others = p * (1 - one_hot)
    np.testing.assert_allclose(grad, one_hot - others / others.sum(axis=-1, keepdims=True), atol=1e-6)


def test_modified_entropy():
    flat = np.zeros((8, 5), np.float32)
    found = jax.jit(jax.vmap(losses.modified_entropy, in_axes=(0, None)))(np.stack([LOGITS, flat]), LABELS)
    p = softmax(LOGITS.astype(np.float64), axis=-1)
    terms = np.where(np.eye(5, dtype=bool)[LABELS], (1 - p) * np.log(p), p * np.log1p(-p))
    np.testing.assert_allclose(found[0], -terms.sum(axis=-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], -(0.8 * np.log(0.2) + 4 * 0.2 * np.log(0.8)), rtol=1e-6)


def test_modified_entropy_of_sure_answers():
    logits = np.array([[1e4, 0, -1e4]] * 3 + [[-1e4, -1e4, 1e4], [30, 0, 0]] + [[20, 0, 1]] * 3)
    found = jax.jit(losses.modified_entropy)(logits.astype(np.float32), np.array([0, 1, 2, 2, 0, 0, 1, 2]))
    # Where it was right, 0; else -log p of the label and -log(1 - p) of the wrong class that it was sure of.
    np.testing.assert_allclose(found[:5], [0.0, 2e4, 3e4, 0.0, 0.0], rtol=1e-6, atol=1e-10)
    # A lead of 20, where 1 - p would be 0 in float32.
    p, others = softmax(logits[5], axis=-1), np.exp(-20.0) * (1 + np.e)
    log_not = np.array([np.log(others * p[0]), *np.log1p(-p[1:])])
    terms = np.where(np.eye(3, dtype=bool), np.exp(log_not) * np.log(p), p * log_not)
    np.testing.assert_allclose(found[5:], -terms.sum(axis=-1), rtol=1e-5, atol=1e-12)
