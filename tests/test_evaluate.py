"""Evaluation in image batches against numpy on everything at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dememo_jax import data as sets
from dememo_jax import evaluate
from dememo_jax.errors import BadInput, NonFinite
from dememo_jax.types import Dataset

RANDOM = np.random.default_rng(0)
N = 11
X = RANDOM.normal(size=(N, 2, 2, 1)).astype(np.float32)
PARAMS = {"w": RANDOM.normal(size=(4, 3)).astype(np.float32)}
EXPECTED = X.reshape(N, 4) @ PARAMS["w"]
LABELS = np.where(np.arange(N) % 3 == 0, 2, EXPECTED.argmax(axis=1))  # some right, some wrong
DATA = sets.make(X, LABELS, box=None)
RIGHT = EXPECTED.argmax(axis=1) == LABELS


def network(params, x):
    return x.reshape(len(x), -1) @ params["w"]


@pytest.mark.parametrize("batch", [1, 4, N, 100])
def test_any_batch_gives_the_logits_of_all_at_once(batch):
    seen = []

    def watched(params, x):
        seen.append(len(x))
        return network(params, x)

    np.testing.assert_allclose(evaluate.logits(watched, PARAMS, X, batch=batch), EXPECTED, rtol=1e-5, atol=1e-5)
    assert max(seen) <= batch
    assert set(seen) == {1: {1}, 4: {4, 3}, N: {N}, 100: {N}}[batch]


@pytest.mark.parametrize(
    ("shape", "cpu", "other"),
    [
        ((50_000, 32, 32, 3), 100, 2048),
        ((50_000, 28, 28, 1), 391, 8024),
        ((70, 32, 32, 3), 70, 70),
        ((5, 1000, 1000, 3), 1, 2),
        ((5,), 5, 5),
    ],
)
def test_batch_size_by_device(monkeypatch, shape, cpu, other):
    x = np.broadcast_to(np.float32(0), shape)
    for backend, expected in (("cpu", cpu), ("gpu", other), ("tpu", other)):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert evaluate.batch_size(x) == expected


def test_without_a_batch_the_device_decides(monkeypatch):
    monkeypatch.setattr(evaluate, "CPU", 5 * 4)
    seen = []
    evaluate.logits(lambda params, x: seen.append(len(x)) or network(params, x), PARAMS, X)
    assert set(seen) == {5, 1}


def test_correct_and_accuracy():
    assert 0 < RIGHT.sum() < N
    np.testing.assert_array_equal(evaluate.correct(network, PARAMS, DATA, batch=4), RIGHT)
    assert evaluate.accuracy(network, PARAMS, DATA, batch=4) == pytest.approx(RIGHT.mean(), rel=1e-6)


def test_group_correct_counts_over_each_mask():
    masks = np.stack([np.ones(N, bool), np.arange(N) < 4, np.arange(N) == 3])
    found = jax.jit(lambda params, data: evaluate.group_correct(network, params, data, batch=4))(PARAMS, (DATA, masks))
    np.testing.assert_array_equal(found, [RIGHT[mask].sum() for mask in masks])


def test_stack_groups():
    names, masks = evaluate.stack_groups({"even": np.arange(4) % 2 == 0, "last": [False, False, False, True]}, 4)
    assert names == ("even", "last")
    np.testing.assert_array_equal(masks, [[1, 0, 1, 0], [0, 0, 0, 1]])
    assert masks.dtype == bool
    names, masks = evaluate.stack_groups(None, 3)
    assert names == ("all",)
    np.testing.assert_array_equal(masks, np.ones((1, 3), bool))


def test_unusable_groups_are_named():
    with pytest.raises(BadInput, match="'short' must be a mask \\[4\\]"):
        evaluate.stack_groups({"short": np.ones(3, bool)}, 4)
    with pytest.raises(BadInput, match="'none' has no examples"):
        evaluate.stack_groups({"fine": np.ones(4, bool), "none": np.zeros(4, bool)}, 4)


def test_a_network_without_answers_is_no_network_that_forgot():
    def apply(params, x):
        return jnp.stack([x[:, 0], jnp.where(x[:, 0] > 2, params, -jnp.inf)], axis=-1)

    data = Dataset(jnp.arange(4.0)[:, None], jnp.zeros(4, jnp.int32), jnp.arange(4))
    assert evaluate.accuracy(apply, 0.0, data) == 1.0  # -infinity is what masks a class
    for bad in (jnp.nan, jnp.inf):
        with pytest.raises(NonFinite, match="1 of 4"):
            evaluate.accuracy(apply, bad, data)
        assert np.isnan(jax.jit(lambda bad: evaluate.accuracy(apply, bad, data))(bad))  # under jit nothing can be raised


ROWS = {  # logits of three classes, and whether the second is the answer; None: there is none
    "masked": ((-np.inf, 1.0, 0.0), True),
    "masked label": ((0.0, -np.inf, 1.0), False),
    "NaN of the label": ((0.0, np.nan, 1.0), None),
    "NaN of another": ((0.0, 2.0, np.nan), None),
    "infinite label": ((0.0, np.inf, 1.0), None),
    "infinite other": ((0.0, 1.0, np.inf), None),
    "all masked": ((-np.inf,) * 3, None),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_that_name_no_class_are_neither_right_nor_wrong(dtype):
    rows, right = zip(*ROWS.values())
    data = Dataset(jnp.zeros((len(rows), 1)), jnp.ones(len(rows), jnp.int32), jnp.arange(len(rows)))
    masks = np.concatenate([np.eye(len(rows), dtype=bool), np.ones((1, len(rows)), bool), [[True, True, *[False] * 5]]])
    counts = jax.jit(lambda rows: evaluate.group_correct(lambda rows, x: rows, rows, (data, masks)))(jnp.asarray(rows, dtype))
    np.testing.assert_array_equal(counts, [*(np.nan if r is None else r for r in right), np.nan, 1])


def test_no_examples_have_no_accuracy():
    with pytest.raises(BadInput, match="no examples"):
        evaluate.accuracy(network, PARAMS, jax.tree.map(lambda part: part[:0], DATA))
