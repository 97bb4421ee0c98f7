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


def test_gradients():
    grad = jax.jit(jax.grad(lambda z: losses.cross_entropy(z, LABELS).sum()))(LOGITS)
    p, one_hot = softmax(LOGITS.astype(np.float64), axis=-1), np.eye(5)[LABELS]
    np.testing.assert_allclose(grad, p - one_hot, atol=1e-6)
    grad = jax.jit(jax.grad(lambda z: losses.margin(z, LABELS).sum()))(LOGITS)
    others = p * (1 - one_hot)
    np.testing.assert_allclose(grad, one_hot - others / others.sum(axis=-1, keepdims=True), atol=1e-6)
