"""Selective synaptic dampening against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dememo_jax import data as sets
from dememo_jax import unlearn
from dememo_jax.errors import BadInput, NonFinite

N, D, K, BATCH = 30, 4, 3, 8
FORGET = np.arange(N) % 4 == 1  # 8 examples, one batch; 30 are four, of which the last has 6


def linear(params, x):
    return x @ params["w"] + params["unused"] * 0.0


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(0)
    data = sets.make(rng.uniform(size=(N, D)).astype(np.float32), rng.integers(0, K, N))
    return data, {"w": jnp.asarray(rng.normal(size=(D, K)), jnp.float32), "unused": jnp.full(K, 0.5)}


def gradients(data, params):
    """Of every example, in float64: [N, D, K]."""
    x, y, w = (np.asarray(part, np.float64) for part in (data.x, data.y, params["w"]))
    z = x @ w
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    return np.einsum("nd,nk->ndk", x, p - np.eye(K)[y.astype(int)])


def by_batches(rows, batch):
    """Mean over batches, in order, of the squared mean gradient of each."""
    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    return np.mean([np.square(part.mean(axis=0)) for part in parts], axis=0)


def poisoned(data, mask):
    return data._replace(x=jnp.where(mask[:, None], jnp.nan, data.x))


measure = jax.jit(
    lambda params, data, mask, key=None, batch=BATCH, per="batch": unlearn.importance(
        linear, params, data, mask, key=key, batch=batch, per=per
    ),
    static_argnames=("batch", "per"),
)


@pytest.mark.parametrize("batch", [1, 8, 30, 100])
def test_importance_of_batches(toy, batch):
    data, params = toy
    found = measure(params, data, None, batch=batch)
    np.testing.assert_allclose(found["w"], by_batches(gradients(data, params), batch), rtol=1e-4, atol=1e-8)
    np.testing.assert_array_equal(found["unused"], 0)


@pytest.mark.parametrize("members", [FORGET, ~FORGET])
def test_importance_sees_only_the_mask(toy, members):
    data, params = toy
    rows = gradients(data, params)[members]
    mask = jnp.asarray(members)
    found = measure(params, poisoned(data, ~members), mask)
    np.testing.assert_allclose(found["w"], by_batches(rows, BATCH), rtol=1e-4, atol=1e-8)
    found = measure(params, poisoned(data, ~members), mask, per="example")
    np.testing.assert_allclose(found["w"], np.square(rows).mean(axis=0), rtol=1e-4, atol=1e-8)


def test_shuffling_changes_the_batches_and_not_the_examples(toy):
    data, params = toy
    mask = jnp.asarray(FORGET)
    broken = poisoned(data, ~FORGET)
    one_batch = by_batches(gradients(data, params)[FORGET], BATCH)
    np.testing.assert_allclose(measure(params, broken, mask, jax.random.key(0))["w"], one_batch, rtol=1e-4, atol=1e-8)
    first, again, other = (measure(params, data, None, jax.random.key(seed))["w"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first / other - 1).max() > 0.01
    singles = measure(params, data, None, jax.random.key(0), batch=1)["w"]
    np.testing.assert_allclose(singles, np.square(gradients(data, params)).mean(axis=0), rtol=1e-4)


def test_dampen_entry_by_entry():
    # Not selected; on the border; selected; selected but never enlarged; selected with nothing to keep; needed by neither.
    params = jnp.asarray([1.0, -2.0, 3.0, 4.0, -5.0, 6.0])
    of_forget = jnp.asarray([1.0, 2.0, 8.0, 2.5, 1.0, 0.0])
    of_all = jnp.asarray([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    new, selected = jax.jit(unlearn.dampen)({"a": params}, {"a": of_forget}, {"a": of_all}, alpha=2.0, strength=3.0)
    np.testing.assert_array_equal(selected["a"], [False, False, True, True, True, False])
    np.testing.assert_allclose(new["a"], [1.0, -2.0, 3.0 * 3 / 8, 4.0, 0.0, 6.0], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("per", ["batch", "example"])
def test_ssd_by_hand(toy, per):
    data, params = toy
    rows, w = gradients(data, params), np.asarray(params["w"], np.float64)
    values = by_batches if per == "batch" else lambda part, batch: np.square(part).mean(axis=0)
    of_forget, of_all = values(rows[FORGET], BATCH), values(rows, BATCH)
    chosen = of_forget > 0.9 * of_all
    expected = np.where(chosen, w * np.minimum(1, 0.8 * of_all / of_forget), w)
    assert 0 < chosen.sum() < chosen.size
    result = unlearn.ssd(linear, params, data, FORGET, alpha=0.9, strength=0.8, batch=BATCH, per=per)
    np.testing.assert_allclose(result.params["w"], expected, rtol=1e-4)
    np.testing.assert_array_equal(result.params["unused"], params["unused"])
    assert result.share == pytest.approx(chosen.sum() / (D * K + K))
    assert result.length == pytest.approx(np.linalg.norm(expected - w), rel=1e-4)
    whole = np.sqrt(np.square(w).sum() + 0.25 * K)
    assert result.relative == pytest.approx(np.linalg.norm(expected - w) / whole, rel=1e-4)


def test_stored_importances_replace_the_retained_data(toy):
    data, params = toy
    how = {"alpha": 0.9, "strength": 0.8, "batch": BATCH}
    whole = unlearn.ssd(linear, params, data, FORGET, **how)
    stored = measure(params, data, None)
    without = unlearn.ssd(linear, params, poisoned(data, ~FORGET), FORGET, stored=stored, **how)
    np.testing.assert_allclose(without.params["w"], whole.params["w"], rtol=1e-5)
    part = sets.select(data, FORGET)
    alone = unlearn.ssd(linear, params, part, np.ones(len(part.y), bool), stored=stored, **how)
    np.testing.assert_allclose(alone.params["w"], whole.params["w"], rtol=1e-5)
    assert alone.share == without.share == whole.share > 0


def test_a_high_threshold_leaves_the_network_as_it_is(toy):
    data, params = toy
    result = unlearn.ssd(linear, params, data, FORGET, alpha=1e6, batch=BATCH)
    np.testing.assert_array_equal(result.params["w"], params["w"])
    assert (result.share, result.length, result.relative) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("forget", "how", "message"),
    [
        (np.zeros(N, bool), {}, "forget set is empty"),
        (np.ones(N, bool), {}, "covers all data"),
        (FORGET[:-1], {}, "one entry an example"),
        (FORGET, {"alpha": np.inf}, "alpha must be finite"),
        (FORGET, {"alpha": 0.0}, "alpha must be finite and positive"),
        (FORGET, {"strength": -1.0}, "strength must be"),
        (FORGET, {"per": "epoch"}, "per must be"),
        (FORGET, {"batch": 0}, "at least one example"),
        (FORGET, {"stored": {"w": jnp.ones((D, K))}}, "structure and shapes"),
        (FORGET, {"stored": {"w": jnp.ones((K, D)), "unused": jnp.ones(K)}}, "structure and shapes"),
        (np.zeros(N, bool), {"stored": {"w": jnp.ones((D, K)), "unused": jnp.ones(K)}}, "forget set is empty"),
    ],
)
def test_bad_input(toy, forget, how, message):
    data, params = toy
    with pytest.raises(BadInput, match=message):
        unlearn.ssd(linear, params, data, forget, **{"batch": BATCH} | how)


def test_importances_that_are_not_finite_are_refused(toy):
    data, params = toy
    with pytest.raises(NonFinite, match="importance of the data"):
        unlearn.ssd(linear, params, poisoned(data, ~FORGET), FORGET, batch=BATCH)
    with pytest.raises(NonFinite, match="importance of the forget set"):
        unlearn.ssd(linear, params, poisoned(data, FORGET), FORGET, batch=BATCH)
