"""Trees against flat numpy vectors, Gaussian noise against its law, keys against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dememo_jax import keys, tree
from dememo_jax.errors import BadInput

KEY = jax.random.key(7)
RANDOM = np.random.default_rng(0)
TREE = {"a": RANDOM.normal(size=(3, 4)).astype(np.float32), "b": [RANDOM.normal(size=5).astype(np.float32)]}
CENTRE = jax.tree.map(lambda leaf: 0.1 * leaf + np.float32(0.3), TREE)


def flat(t):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(t)])


def test_size_norm_distance_and_add():
    assert tree.size(TREE) == 17
    assert tree.norm(TREE) == pytest.approx(np.linalg.norm(flat(TREE)), rel=1e-6)
    assert tree.distance(TREE, CENTRE) == pytest.approx(np.linalg.norm(flat(TREE) - flat(CENTRE)), rel=1e-6)
    np.testing.assert_allclose(flat(tree.add(TREE, CENTRE)), flat(TREE) + flat(CENTRE), rtol=1e-6)


def test_norm_accumulates_in_float32():
    found = tree.norm(jnp.ones(4_107, jnp.bfloat16))  # a bfloat16 sum would be 4096, and its root 64
    assert found == pytest.approx(np.sqrt(4_107), rel=1e-6)
    assert found.dtype == jnp.float32


def test_norm_of_what_is_not_a_number():
    assert np.isnan(tree.norm(jnp.array([np.nan, 1.0])))  # a distance of zero would pass for weights at the anchor
    assert np.isinf(tree.norm(jnp.array([np.inf, 1.0])))


def test_gradient_of_the_norm():
    grad = jax.jit(jax.grad(tree.norm))
    assert not flat(grad(jax.tree.map(np.zeros_like, TREE))).any()  # zero, not NaN
    np.testing.assert_allclose(flat(grad(TREE)), flat(TREE) / np.linalg.norm(flat(TREE)), rtol=1e-5)


def test_projections_land_at_the_radius_on_the_ray():
    offset = flat(TREE) - flat(CENTRE)
    length = np.linalg.norm(offset)
    ball, sphere = jax.jit(tree.project_ball), jax.jit(tree.project_sphere)
    for radius in (0.0, 0.01, 0.5 * length):  # from outside both go to the same nearest point
        expected = flat(CENTRE) + offset * radius / length
        np.testing.assert_allclose(flat(ball(TREE, CENTRE, radius)), expected, atol=1e-6)
        np.testing.assert_allclose(flat(sphere(TREE, CENTRE, radius)), expected, atol=1e-6)
    for radius in (1.5 * length, 40.0):  # from inside the ball leaves the bits alone, the sphere pushes out
        jax.tree.map(np.testing.assert_array_equal, ball(TREE, CENTRE, radius), TREE)
        expected = flat(CENTRE) + offset * radius / length
        np.testing.assert_allclose(flat(sphere(TREE, CENTRE, radius)), expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, ball(CENTRE, CENTRE, 1.0), CENTRE)
    jax.tree.map(np.testing.assert_array_equal, sphere(CENTRE, CENTRE, 1.0), CENTRE)  # no direction to go


def test_gaussian_like_has_the_law_of_each_leaf():
    like = {"a": jnp.zeros(100_000), "b": jnp.zeros((100, 1_000)), "c": jnp.zeros(5)}
    drawn = jax.jit(tree.gaussian_like)(KEY, like, {"a": 0.3, "b": 2.0, "c": 0.0})
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, like)
    a, b = (np.asarray(drawn[name], np.float64).ravel() for name in "ab")
    for sample, scale in ((a, 0.3), (b, 2.0)):
        assert stats.kstest(sample / scale, "norm").pvalue > 1e-3
        for wrong in (0.95, 1.05):
            assert stats.kstest(sample / (wrong * scale), "norm").pvalue < 1e-6
        assert abs(np.corrcoef(sample[1:], sample[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02  # 0.003 is one standard deviation
    assert not np.any(drawn["c"])


def test_gaussian_like_is_one_draw_cut_into_leaves():
    like = {"b": jnp.zeros((2, 3), jnp.bfloat16), "a": [jnp.zeros(6), jnp.zeros(())]}
    drawn = tree.gaussian_like(KEY, like, {"b": 0.5, "a": [0.25, 2.0]})
    whole = np.asarray(jax.random.normal(KEY, (13,)))
    assert {leaf.dtype for leaf in jax.tree.leaves(drawn)} == {jnp.dtype(jnp.float32)}  # also for a leaf of bfloat16
    np.testing.assert_array_equal(drawn["a"][0], 0.25 * whole[:6])
    np.testing.assert_array_equal(drawn["a"][1], 2.0 * whole[6])
    np.testing.assert_array_equal(drawn["b"], 0.5 * whole[7:].reshape(2, 3))
    assert np.all(drawn["b"] != tree.gaussian_like(jax.random.key(8), like, 0.5)["b"])


def test_gaussian_like_of_half_precision_alone_is_drawn_in_float32():
    drawn = tree.gaussian_like(KEY, jnp.zeros(4, jnp.float16))
    assert drawn.dtype == jnp.float32
    np.testing.assert_array_equal(drawn, jax.random.normal(KEY, (4,)))


def test_gaussian_like_of_a_single_array_and_scales_of_its_shape():
    scale = jnp.arange(4.0)
    np.testing.assert_array_equal(tree.gaussian_like(KEY, jnp.zeros(4), scale), scale * jax.random.normal(KEY, (4,)))


def test_scales_of_another_tree():
    for scale in ([1.0], {"a": 1.0}, {"a": 1.0, "b": 1.0}):
        with pytest.raises(BadInput, match="one number, or a tree of them"):
            tree.gaussian_like(KEY, TREE, scale)
    tree.check_scale({"a": 1.0, "b": [2.0]}, TREE)
    tree.check_scale(1, TREE)


def test_sums_with_half_precision_are_not_rounded_to_it():
    many = jnp.asarray(RANDOM.normal(size=2_000), jnp.bfloat16), jnp.asarray(RANDOM.normal(size=2_000), jnp.float32)
    np.testing.assert_array_equal(tree.add(*many), np.asarray(many[0], np.float32) + np.asarray(many[1]))
    assert tree.add(jnp.ones(2), jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32
    assert tree.half(many) == ["bfloat16"]
    assert tree.half(tree.widened(many)) == []
    whole = {"count": jnp.arange(3), "half": jnp.ones(2, jnp.float16), "own": np.ones(2), "number": 0.5}
    kept = tree.widened(whole)
    assert (kept["count"].dtype, kept["half"].dtype, kept["own"] is whole["own"], kept["number"]) == (
        jnp.int32, jnp.float32, True, 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_distances_and_projections_of_half_precision_are_those_of_its_numbers(dtype):
    a, b = (jnp.asarray(256 + RANDOM.normal(size=500), dtype) for _ in range(2))
    apart = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    assert float(tree.distance(a, b)) == pytest.approx(np.linalg.norm(apart), rel=1e-6)
    for project in (tree.project_ball, tree.project_sphere):
        held = project(a, b, 0.5)  # steps of two in bfloat16: rounded there, it would not be in the ball
        assert held.dtype == jnp.float32
        assert float(tree.distance(held, b)) == pytest.approx(0.5, rel=1e-3)


# --- names, scales, fingerprints -----------------------------------------------------------------------------------

NAMED = {"Dense_0": {"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.zeros(2)}, "tail": (jnp.ones(1), jnp.full(3, -2.0))}


def test_names_follow_the_leaves():
    assert tree.names(NAMED) == ["Dense_0/bias", "Dense_0/kernel", "tail/0", "tail/1"]
    assert tree.names(jnp.ones(1)) == [""]


def test_scales_of_chosen_leaves():
    def scales(*given, **how):
        found = tree.scales(NAMED, *given, **how)
        assert jax.tree.structure(found) == jax.tree.structure(NAMED)
        return jax.tree.leaves(found)

    assert scales(0.5) == [0.5] * 4
    assert scales(0.5, only="kernel|tail/1$") == [0, 0.5, 0, 0.5]
    assert scales(0.5, only="^Dense_0/") == [0.5, 0.5, 0, 0]
    np.testing.assert_allclose(scales(0.5, only="kernel|tail", relative=True), [0, 0.5 * np.sqrt(12.5), 0.5, 1.0], rtol=1e-12)


def test_scales_that_are_none():
    with pytest.raises(BadInput, match="no leaf matches 'head'; the leaves are Dense_0/bias, Dense_0/kernel, tail/0, tail/1"):
        tree.scales(NAMED, 0.5, only="head")
    with pytest.raises(BadInput, match=r"not all zero; leave out Dense_0/bias$"):
        tree.scales(NAMED, 0.5, relative=True)


def test_check_floating_names_the_leaf():
    tree.check_floating({"a": jnp.ones(2, jnp.bfloat16), "b": np.ones(2), "c": 0.5}, "weights")
    for leaf, message in (
        (jnp.arange(2), "weights must be floating; x/1 is int32"),
        (np.array([True]), "weights must be floating; x/1 is bool"),
        (jnp.array([0, jnp.nan]), "weights must be finite; x/1 holds NaN"),
        (jnp.array([-jnp.inf], jnp.bfloat16), "weights must be finite; x/1 holds"),
    ):
        with pytest.raises(BadInput, match=message):
            tree.check_floating({"x": [jnp.ones(1), leaf]}, "weights")
    jax.jit(lambda leaf: tree.check_floating(leaf, "weights"))(jnp.array([jnp.nan]))  # not known under jit
    with pytest.raises(BadInput, match="floating"):
        jax.jit(lambda leaf: tree.check_floating(leaf, "weights"))(jnp.arange(2))


def test_digest_tells_trees_apart():
    trees = [
        {"a": np.zeros(4, np.float32)},
        {"b": np.zeros(4, np.float32)},
        [np.zeros(4, np.float32)],
        {"a": np.zeros((4, 1), np.float32)},
        {"a": np.zeros((2, 2), np.float32)},
        {"a": np.zeros(4, np.int32)},
        {"a": jnp.zeros(8, jnp.bfloat16)},
        {"a": np.zeros(8, np.float16)},
        {"a": np.float32([0, 0, 0, 1e-30])},
        {"a": np.float32([0, 0, 1e-30, 0])},
        {"a": np.zeros(4, np.float32), "b": np.zeros(0, np.float32)},
        {"a": jax.random.key(0)},
        {"a": jax.random.key(1)},
        {"a": jax.random.split(jax.random.key(0))},
    ]
    assert len({tree.digest(each) for each in trees}) == len(trees)


def test_digest_is_of_the_values_alone():
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert tree.digest({"a": grid}) == tree.digest({"a": jnp.asarray(grid)}) == tree.digest({"a": np.asfortranarray(grid)})
    assert tree.digest({"a": grid, "b": 1.0}) == tree.digest({"b": 1.0, "a": grid})
    assert tree.digest(jax.random.key(3)) == tree.digest(jax.random.key_data(jax.random.key(3)))
    assert tree.digest(grid.T) != tree.digest(grid)
    assert len(tree.digest(grid)) == 16


def test_keys_are_fold_ins():
    def same(a, b):
        return np.array_equal(jax.random.key_data(a), jax.random.key_data(b))

    assert same(keys.at(KEY, 5), jax.random.fold_in(KEY, 5))
    assert same(keys.named(KEY, "123456789"), jax.random.fold_in(KEY, 0xCBF43926))  # the check value of CRC-32
    assert not same(keys.named(KEY, "draw"), keys.named(KEY, "step"))


@pytest.mark.parametrize(("value", "is_finite"), [(0.0, True), (np.inf, False), (-np.inf, False), (np.nan, False)])
def test_finite_looks_at_every_leaf_that_can_be_otherwise(value, is_finite):
    values = {"a": jnp.ones(3), "b": [jnp.asarray([1.0, value]), jnp.arange(2)], "key": jax.random.key(0)}
    assert tree.finite(values) == is_finite
