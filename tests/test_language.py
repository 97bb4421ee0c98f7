"""The decoder against a slow one in NumPy, and what it must not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import some

from dememo_jax import adapters, models, nets, tree
from dememo_jax.errors import BadInput
from dememo_jax.nets import language

KEY = jax.random.key(0)
SMALL = {"vocab": 17, "width": 12, "depth": 2, "heads": 6, "key_heads": 2, "hidden": 20}
TOKENS = np.random.default_rng(0).integers(1, 17, (3, 9)).astype(np.int32)
KINDS = {
    "plain": {},
    "tied, window": {"tied": True, "window": 3},
    "wide heads": {"head": 4, "key_heads": 6},
    "remat": {"remat": True},
}


def made(**how):
    model = models.from_linen(nets.Decoder(**SMALL | how))
    weights = model.init(KEY, jnp.asarray(TOKENS))
    # larger than at the start, so that attention and gates are far from uniform
    return model, weights._replace(params=jax.tree.map(lambda leaf: leaf * (12 if leaf.ndim > 1 else 1), weights.params))


def slow(params, tokens, heads, key_heads, window, tied, head):
    """One row without padding, token by token, head by head; each query reads its own list of keys."""

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2) + 1e-5) * scale

    def turn(x, position):
        half = len(x) // 2
        pairs = [(x[i] + 1j * x[i + half]) * np.exp(1j * position * 10_000.0 ** (-2 * i / len(x))) for i in range(half)]
        return np.array([pair.real for pair in pairs] + [pair.imag for pair in pairs])

    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    states = [p["embed"]["embedding"][token] for token in tokens]
    for number in range(2):
        b = p[f"block_{number}"]
        ys = [norm(x, b["attention_norm"]["scale"]) for x in states]
        parts = {n: [(y @ b[n]["kernel"]).reshape(-1, head) for y in ys] for n in ("query", "key", "value")}
        after = []
        for i, x in enumerate(states):
            mixed = []
            for h in range(heads):
                group = h // (heads // key_heads)
                reach = range(0 if window is None else max(0, i - window + 1), i + 1)
                query = turn(parts["query"][i][h], i)
                scores = np.array([query @ turn(parts["key"][j][group], j) for j in reach]) / np.sqrt(head)
                share = np.exp(scores - scores.max())
                mixed.append(sum(s * parts["value"][j][group] for s, j in zip(share / share.sum(), reach)))
            x = x + np.concatenate(mixed) @ b["out"]["kernel"]
            y = norm(x, b["gated_norm"]["scale"])
            gate = y @ b["gate"]["kernel"]
            after.append(x + (gate / (1 + np.exp(-gate)) * (y @ b["up"]["kernel"])) @ b["down"]["kernel"])
        states = after
    last = p["embed"]["embedding"].T if tied else p["head"]["kernel"]
    return np.stack([norm(x, p["norm"]["scale"]) @ last for x in states])


@pytest.mark.parametrize("kind", some(KINDS, ("remat",)))
def test_logits_are_those_of_a_slow_decoder(kind):
    how = KINDS[kind]
    model, weights = made(**how)
    found = jax.jit(model.apply)(weights, TOKENS)
    assert found.dtype == jnp.float32
    shape = {"heads": 6, "key_heads": how.get("key_heads", 2), "window": how.get("window"), "tied": how.get("tied", False)}
    for row, tokens in zip(found, TOKENS):
        expected = slow(weights.params, tokens, **shape, head=how.get("head", 2))
        np.testing.assert_allclose(row, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


def test_no_token_sees_the_future_or_beyond_the_windows():
    """Two layers with a window of 3 reach 4 tokens back."""
    model, weights = made(window=3)

    def shifted(weights, delta):  # each place has a row of its own in the embedding
        table = weights.params["embed"]["embedding"].at[1:10].set(delta)
        return weights._replace(params=weights.params | {"embed": {"embedding": table}})

    tokens = np.arange(1, 10, dtype=np.int32)[None]
    rows = jnp.asarray(weights.params["embed"]["embedding"][1:10])
    gradient = jax.jacobian(lambda delta: model.apply(shifted(weights, delta), tokens)[0, :, 0])
    reach = np.abs(np.asarray(jax.jit(gradient)(rows))).max(axis=-1) > 0  # [9, 9]
    expected = [[0 <= i - j <= 4 for j in range(9)] for i in range(9)]
    np.testing.assert_array_equal(reach, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "tied, window"])
def test_padding_on_either_side_changes_nothing(kind):
    model, weights = made(**KINDS[kind])
    apply = jax.jit(model.apply)
    alone = np.asarray(apply(weights, TOKENS))
    left, right = (np.pad(TOKENS, ((0, 0), sides)) for sides in ((4, 0), (0, 4)))
    np.testing.assert_allclose(apply(weights, left)[:, 4:], alone, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(apply(weights, right)[:, :9], alone, rtol=1e-4, atol=1e-4)
    slopes = jax.jit(jax.grad(lambda w: model.apply(w, left)[:, 4:].sum()))(weights)
    assert tree.finite(slopes)


def test_rotation_depends_on_distance_alone():
    random = np.random.default_rng(1)
    query, key = (jnp.asarray(random.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(i, j):
        at = [language.rotation(jnp.array([[place]]), 8, 10_000.0) for place in (i, j)]
        return float((language.turned(query, at[0]) * language.turned(key, at[1])).sum())

    assert score(7, 4) == pytest.approx(score(103, 100), rel=1e-4)
    assert score(7, 4) != pytest.approx(score(7, 5), rel=1e-2)


@pytest.mark.slow
def test_bfloat16_keeps_float32_parameters():
    model, weights = made(dtype=jnp.bfloat16)
    exact, _ = made()
    assert {leaf.dtype for leaf in jax.tree.leaves(weights.params)} == {jnp.dtype("float32")}
    found, expected = model.apply(weights, TOKENS), exact.apply(weights, TOKENS)
    assert found.dtype == jnp.float32
    assert np.corrcoef(np.ravel(found), np.ravel(expected))[0, 1] > 0.99


def test_an_adapter_with_zero_init_leaves_logits_unchanged():
    model, weights = made()
    adapter = adapters.lora(model, weights, rank=2, only="query|value")
    begun = adapter.init(KEY, TOKENS[:1])
    assert len(begun.params) == 4
    np.testing.assert_array_equal(adapter.apply(begun, TOKENS), model.apply(weights, TOKENS))


@pytest.mark.parametrize(
    ("how", "tokens", "says"),
    [({"key_heads": 4}, TOKENS, "evenly"), ({"head": 3}, TOKENS, "even head width"), ({}, TOKENS[0], r"tokens \[B, L\]"),
     ({}, TOKENS.astype(np.float32), "whole numbers"), ({"longest": 8}, TOKENS, "9 tokens are longer than the 8")],
)  # fmt: skip
def test_refused(how, tokens, says):
    with pytest.raises(BadInput, match=says):
        models.from_linen(nets.Decoder(**SMALL | how)).init(KEY, jnp.asarray(tokens))
