"""Batches counted by hand, perturbations against a loop over examples, masks against their names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dememo_jax import data as sets
from dememo_jax.errors import BadInput
from dememo_jax.types import Perturbation

KEY = jax.random.key(3)
N = 10
RANDOM = np.random.default_rng(0)
LABELS = np.arange(N) % 3
DATA = sets.make(RANDOM.random((N, 4, 3, 2)), LABELS)


def test_make_scales_bytes_and_numbers_examples():
    made = sets.make(np.array([[0, 51, 255]], np.uint8), [2])
    np.testing.assert_allclose(made.x, [[0.0, 0.2, 1.0]], rtol=1e-6)
    np.testing.assert_array_equal(made.index, [0])
    floats = np.array([[0.0, 0.25, 1.0]])
    np.testing.assert_array_equal(sets.make(floats, [2]).x, floats)
    assert (DATA.x.dtype, DATA.y.dtype, DATA.index.dtype) == (np.float32, np.int32, np.int32)


def test_take_and_select():
    at = np.array([7, 2, 2])
    for found, whole in zip(sets.take(DATA, at), DATA):
        np.testing.assert_array_equal(found, np.asarray(whole)[at])
    np.testing.assert_array_equal(sets.select(DATA, LABELS == 1).index, [1, 4, 7])


# --- batches -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shuffled():
    """Indices [steps, 3] of the first batches of size 3, for any mask: one compiled program."""
    batches = jax.jit(lambda key, mask, steps: jax.vmap(lambda step: sets.shuffled(key, step, DATA, 3, mask).index)(steps))
    return lambda mask: np.asarray(batches(KEY, np.asarray(mask), np.arange(12)))


@pytest.mark.parametrize("members", [[0, 2, 3, 5, 6, 8, 9], [1, 3, 4, 6, 7, 9], list(range(N))])
def test_a_shuffled_pass_meets_every_member_once(shuffled, members):
    per_pass = -(-len(members) // 3)
    batches = shuffled(np.isin(np.arange(N), members))
    passes = batches[: 12 // per_pass * per_pass].reshape(-1, per_pass * 3)
    for order in passes:
        assert sorted(order[: len(members)]) == members
        np.testing.assert_array_equal(order[len(members) :], order[: per_pass * 3 - len(members)])  # filled from its start
    assert len({tuple(order) for order in passes}) == len(passes)  # each pass has an order of its own


def test_a_set_smaller_than_a_batch_repeats_within_it(shuffled):
    batches = shuffled(np.isin(np.arange(N), [4, 8]))
    assert all(set(row) == {4, 8} and row[0] == row[2] for row in batches)
    assert {row[0] for row in batches} == {4, 8}


def test_shuffled_without_a_mask_is_shuffled_over_all(shuffled):
    whole = [sets.shuffled(KEY, step, DATA, 3) for step in range(2)]
    np.testing.assert_array_equal([batch.index for batch in whole], shuffled(np.ones(N, bool))[:2])
    np.testing.assert_array_equal(whole[0].y, LABELS[whole[0].index])  # a batch keeps examples and labels together


def test_uniform_draws_evenly_from_the_mask():
    mask = np.isin(np.arange(N), [1, 4, 5, 9])

    @jax.jit
    @jax.vmap
    def draw(step):
        return sets.uniform(KEY, step, DATA, 8, mask).index, sets.uniform(KEY, step, DATA, 8).index

    drawn, whole = (np.asarray(part) for part in draw(np.arange(500)))
    counts = np.bincount(drawn.ravel(), minlength=N)
    assert not counts[~mask].any()
    assert stats.chisquare(counts[mask]).pvalue > 1e-3
    assert any(len(set(row)) < 4 for row in drawn)  # with replacement
    assert stats.chisquare(np.bincount(whole.ravel(), minlength=N)).pvalue > 1e-3
    assert not np.array_equal(whole[0], whole[1])


def test_steps_and_blocks():
    assert [sets.steps(count, 4, 3) for count in (8, 9, 1)] == [6, 9, 3]
    at, real = sets.blocks(7, 3)
    np.testing.assert_array_equal(at, [[0, 1, 2], [3, 4, 5], [6, 6, 6]])
    np.testing.assert_array_equal(real, [[True] * 3, [True] * 3, [True, False, False]])
    np.testing.assert_array_equal(sets.blocks(6, 3)[0], [[0, 1, 2], [3, 4, 5]])
    assert sets.blocks(6, 3)[1].all()


# --- perturbations -----------------------------------------------------------------------------------------------


def loop_perturb(x, index, delta, row, mask):
    return [np.clip(image + delta[row[i]], 0, 1) if mask[i] else image for image, i in zip(x, index)]


@pytest.mark.parametrize("rows", ["sample", "class"])
def test_perturb_on_a_batch_drawn_out_of_order(rows):
    row = RANDOM.permutation(N) if rows == "sample" else LABELS
    delta = RANDOM.uniform(-0.5, 0.5, (N, 4, 3, 2)).astype(np.float32)
    mask = np.arange(N) % 4 != 1
    at = np.array([9, 1, 4, 1, 0, 7])
    batch = sets.take(DATA, at)
    found = jax.jit(sets.perturb)(batch, Perturbation(delta, row, mask))
    expected = np.array(loop_perturb(np.asarray(DATA.x)[at], at, delta, row, mask))
    np.testing.assert_array_equal(found.x, expected)
    assert (expected < batch.x).any()  # both signs act, both ends clip
    assert {0.0, 1.0} <= set(expected.ravel())
    np.testing.assert_array_equal(found.index, at)
    np.testing.assert_array_equal(found.y, LABELS[at])


def test_perturb_without_a_perturbation():
    assert sets.perturb(DATA, None) is DATA


TOKENS = sets.rows(RANDOM.integers(1, 900, (N, 7)), LABELS)


def test_perturb_on_tokens_adds_whole_numbers_and_clips_nothing():
    changed = RANDOM.integers(0, 900, (N, 7)).astype(np.int32)
    mask, at = np.arange(N) % 3 != 1, np.array([8, 1, 1, 0, 6])
    noise = Perturbation(changed - np.asarray(TOKENS.x), np.arange(N), mask)
    found = jax.jit(sets.perturb)(sets.take(TOKENS, at), noise)
    np.testing.assert_array_equal(found.x, np.where(mask[:, None], changed, TOKENS.x)[at])
    assert found.x.dtype == np.int32
    np.testing.assert_array_equal(found.index, at)


def test_perturb_refuses_noise_of_another_type_or_width():
    row, mask = jnp.arange(N), jnp.ones(N, bool)
    with pytest.raises(BadInput, match="float32 does not fit data of type int32"):
        sets.perturb(TOKENS, Perturbation(jnp.zeros((N, 7)), row, mask))
    with pytest.raises(BadInput, match="int32 does not fit data of type float32"):
        sets.perturb(DATA, Perturbation(jnp.zeros((N, 4, 3, 2), jnp.int32), row, mask))
    for width in (1, 8):  # one token for all places is no gray
        with pytest.raises(BadInput, match="does not fit tokens"):
            sets.perturb(TOKENS, Perturbation(jnp.zeros((N, width), jnp.int32), row, mask))


def test_joined_sets_are_numbered_anew():
    two = sets.joined(sets.select(TOKENS, LABELS == 1), TOKENS)
    assert two.x.dtype == np.int32
    np.testing.assert_array_equal(two.index, np.arange(3 + N))
    np.testing.assert_array_equal(two.y, [1, 1, 1, *LABELS])
    np.testing.assert_array_equal(two.x[3:], TOKENS.x)


# --- masks -------------------------------------------------------------------------------------------------------


def test_of_classes():
    np.testing.assert_array_equal(sets.of_classes(LABELS, [0, 2]), [label in (0, 2) for label in LABELS])
    np.testing.assert_array_equal(sets.of_classes(DATA.y, (np.int64(1),)), LABELS == 1)
    with pytest.raises(BadInput, match="class 7 does not exist"):
        sets.of_classes(LABELS, [1, 7])


def test_share_of_takes_a_share_of_every_class():
    labels = np.repeat([0, 1, 2], [20, 10, 30])
    mask = np.arange(60) % 30 < 25  # 20, 5 and 25 members
    chosen = sets.share_of(KEY, mask, labels, 0.4)
    assert not chosen[~mask].any()
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [8, 2, 10])
    np.testing.assert_array_equal(chosen, sets.share_of(KEY, mask, labels, 0.4))
    assert not np.array_equal(chosen, sets.share_of(jax.random.key(4), mask, labels, 0.4))
    np.testing.assert_array_equal(sets.share_of(KEY, mask, labels, 1.0), mask)
    for share in (0.0, -0.5, 1.1, float("nan")):
        with pytest.raises(BadInput, match="share"):
            sets.share_of(KEY, mask, labels, share)


def test_share_of_chooses_evenly():
    labels = np.zeros(6, int)
    draws = [sets.share_of(jax.random.key(i), np.ones(6, bool), labels, 0.5) for i in range(200)]
    assert (np.abs(np.sum(draws, axis=0) - 100) < 30).all()  # four standard deviations


def test_check_forget():
    mask = np.array([True, False, False])
    np.testing.assert_array_equal(sets.check_forget(list(mask), 3), mask)
    bad = {
        "one entry an example": mask[:2],
        "boolean": np.array([1, 0, 0]),
        "empty": np.zeros(3, bool),
        "covers all": np.ones(3, bool),
    }
    for message, mask in bad.items():
        with pytest.raises(BadInput, match=message):
            sets.check_forget(mask, 3)


def test_noise_of_a_smaller_set_is_refused():
    # a clamped index would hand the last row of noise to every example beyond it
    noise = Perturbation(*map(jax.numpy.asarray, (np.zeros((4, 2, 2, 1)), np.arange(4), np.ones(4, bool))))
    with pytest.raises(BadInput, match="example 4 has no noise"):
        sets.perturb(sets.make(np.zeros((5, 2, 2, 1), np.float32), np.zeros(5, int)), noise)


def test_noise_of_another_image_shape_is_refused():
    data = sets.make(np.zeros((4, 4, 4, 3)), np.zeros(4))
    mask = jnp.ones(4, bool)
    for shape in ((1, 4, 3), (6, 6, 3), (4, 4, 2), (4, 4)):
        with pytest.raises(BadInput, match="does not fit images"):
            sets.perturb(data, Perturbation(jnp.zeros((4, *shape)), jnp.arange(4), mask))
    gray = Perturbation(jnp.full((4, 4, 4, 1), 0.5), jnp.arange(4), mask)
    assert (np.asarray(sets.perturb(data, gray).x) == 0.5).all()  # one channel of noise is worn by all


def test_masks_are_checked():
    assert np.asarray(sets.check_mask(None, 3)).tolist() == [True] * 3
    assert np.asarray(sets.check_mask([True, False, True], 3)).tolist() == [True, False, True]
    for wrong in ([True], [1, 0, 1], [False] * 3):
        with pytest.raises(BadInput, match="mask"):
            sets.check_mask(wrong, 3)


def test_test_examples_that_were_trained_on_are_found():
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (40, 9, 9, 3)).astype(np.float32) / 255
    shown = np.concatenate([x[[3, 3, 17]], 1 - x[:4], x[5:6] * np.float32(0.5)])
    near = x[8:9].copy()
    near[0, 4, 4, 1] += 1 / 255  # one value of one pixel
    shown = np.concatenate([shown, near])
    train, test = (sets.Dataset(part, np.zeros(len(part), int), np.arange(len(part))) for part in (x, shown))
    naive = [any(np.array_equal(one, other) for other in x) for one in shown]
    assert sum(naive) == 3
    assert sets.repeated(train, test).tolist() == naive
    blank = sets.Dataset(np.zeros((5, 9, 9, 3), np.float32), np.zeros(5, int), np.arange(5))
    assert sets.repeated(blank, blank).all()
    tokens = sets.rows(np.arange(12).reshape(3, 4), [0, 1, 0])
    assert sets.repeated(tokens, sets.take(tokens, jnp.array([1]))).tolist() == [True]
