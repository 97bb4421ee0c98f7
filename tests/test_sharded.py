"""SISA: deletion equals training anew to the bit, touches what it must and nothing else, and costs what is said."""

from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dememo_jax import data as sets
from dememo_jax import keys, models, train
from dememo_jax.errors import BadInput, NonFinite
from dememo_jax.types import Weights
from dememo_jax.unlearn import ensemble, sharded, shards

N, K, S, R = 50, 3, 4, 3
KEY = jax.random.key(7)
RATE, MOMENTUM = 0.3, 0.5
TX = optax.sgd(RATE, momentum=MOMENTUM)
HOW = {"epochs": 3, "batch": 5, "tag": "test"}  # epochs of the stages: 1, 2, 1


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(4)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(K)(nn.Dropout(0.2, deterministic=not train)(nn.relu(x)))


def noisy(key, x):
    return x + 0.1 * jax.random.normal(key, x.shape)


LINEAR = models.from_apply(lambda key, x: {"w": jax.random.normal(key, (4, K))}, lambda p, x: x.reshape(len(x), -1) @ p["w"])
NORMED = models.from_linen(Normed())
METHOD = train.sgd(NORMED, TX, augment=noisy)  # statistics, dropout and augmentation: everything that draws
PLAN = shards.deal(keys.named(KEY, "plan"), N, shards=S, slices=R)


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(0)
    return sets.make(rng.uniform(size=(N, 2, 2, 1)).astype(np.float32), rng.integers(0, K, N))


def mask(*indices):
    deleted = np.zeros(N, bool)
    deleted[list(indices)] = True
    return deleted


def member(shard, part, plan=PLAN):
    """An example of that place."""
    return int(np.flatnonzero((plan.shard == shard) & (plan.slice == part))[0])


def fit(data, deleted=None, *, kept=None, plan=PLAN, width=1, key=KEY, **how):
    """The ensemble, and the names in the order in which they were saved."""
    kept, saved = {} if kept is None else kept, []

    def save(name, weights):
        saved.append(name)
        kept[name] = weights

    how = {"model": NORMED, "tx": TX, "method": METHOD, **HOW, **how}
    return sharded.fit(key, plan, data, deleted=deleted, width=width, store=sharded.Store(kept.get, save), **how), saved


def assert_same(a, b):
    for one, other in zip(jax.tree.leaves(a.weights), jax.tree.leaves(b.weights), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (a.shards, a.sizes, a.lost) == (b.shards, b.sizes, b.lost)


def of_shard(found, shard):
    return jax.tree.map(lambda leaf: np.asarray(leaf[found.shards.index(shard)]), found.weights)


def differs(a, b):
    return any((x != y).any() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# --- the plan, and what it costs ---------------------------------------------------------------------------------


def test_a_plan_deals_everyone_out_evenly():
    assert PLAN.shard.dtype == PLAN.slice.dtype == np.int32
    sizes = np.bincount(PLAN.shard, minlength=S)
    assert sizes.sum() == N
    assert sizes.max() - sizes.min() == 1  # 50 = 13 + 13 + 12 + 12
    for shard in range(S):
        parts = np.bincount(PLAN.slice[PLAN.shard == shard], minlength=R)
        assert parts.max() - parts.min() <= 1
    again = shards.deal(keys.named(KEY, "plan"), N, shards=S, slices=R)
    np.testing.assert_array_equal(again.shard, PLAN.shard)
    assert (shards.deal(jax.random.key(1), N, shards=S, slices=R).shard != PLAN.shard).any()


def test_every_place_is_equally_likely():
    drawn = [shards.deal(keys.at(KEY, i), 10, shards=2, slices=2) for i in range(400)]
    places = np.stack([2 * plan.shard + plan.slice for plan in drawn])  # [400, 10]
    shares = np.stack([(places == place).mean(axis=0) for place in range(4)])
    np.testing.assert_allclose(shares, np.tile([[0.3], [0.2], [0.3], [0.2]], 10), atol=0.1)  # 4 standard errors
    assert abs((places[:, 0] // 2 == places[:, 1] // 2).mean() - 4 / 9) < 0.1


@pytest.mark.parametrize("epochs", [1, 2, 7, 20])
@pytest.mark.parametrize("slices", [1, 2, 4, 9])
def test_budget_is_the_rounded_one(epochs, slices):
    a = Fraction(2 * epochs, slices + 1)
    expected = [int((r + 1) * a // 1) - int(r * a // 1) for r in range(slices)]
    assert list(shards.budget(epochs, slices)) == expected
    in_passes = sum(Fraction(each * (r + 1), slices) for r, each in enumerate(expected))
    assert abs(in_passes - epochs) <= 1  # as many example passes as so many epochs, up to rounding


@pytest.mark.parametrize(("epochs", "rounded"), [(10, False), (3, True)])
def test_expected_cost_is_what_the_plan_counts(epochs, rounded):
    plan = shards.deal(KEY, 48, shards=4, slices=3)  # equal slices
    full = shards.passes(plan, epochs)
    by_hand = [full[s, r:].sum() / full.sum() for s, r in zip(plan.shard, plan.slice)]
    assert shards.expected_cost(4, 3, epochs) == pytest.approx(np.mean(by_hand), rel=1e-12)
    formula = (1 / 4) * (2 * 3 + 1) / (3 * 3)
    assert shards.expected_cost(4, 3) == pytest.approx(formula, rel=1e-12)
    assert (shards.expected_cost(4, 3, epochs) == pytest.approx(formula, rel=1e-12)) is not rounded  # 10 epochs: 5, 5, 5
    after = shards.passes(plan, epochs, np.arange(48) == 0)
    count = [(plan.shard == plan.shard[0]) & (plan.slice <= r) for r in range(3)]
    expected = np.array([c.sum() - (plan.slice[0] <= r) for r, c in enumerate(count)]) * shards.budget(epochs, 3)
    np.testing.assert_array_equal(after[plan.shard[0]], expected)


def test_a_given_assignment():
    plan = shards.given([0, 1, 1, 0], np.array([0, 0, 1, 1], np.uint8))
    assert (plan.shards, plan.slices) == (2, 2)
    assert plan.shard.dtype == np.int32
    for wrong in (([0, 2], [0, 0]), ([0, 1], [0, -1]), ([0, 1], [0]), ([0.0, 1.0], [0, 0]), ([], [])):
        with pytest.raises(BadInput, match=r"numbers must|needs one number"):
            shards.given(*wrong)


# --- one stage by hand -------------------------------------------------------------------------------------------


def naive(w, data, at, capacity, key, epochs, batch):
    """SGD with momentum over shuffled passes, a loop in float64."""
    x, y = np.asarray(data.x, np.float64).reshape(N, -1), np.asarray(data.y)
    w, velocity, per_pass = w.astype(np.float64), 0.0, -(-len(at) // batch)
    for epoch in range(epochs):
        noise = np.asarray(jax.random.uniform(keys.at(keys.named(key, "draw"), epoch), (capacity,)))
        order = at[np.argsort(noise[: len(at)], kind="stable")]
        for b in range(per_pass):
            chosen = order[np.arange(b * batch, (b + 1) * batch) % len(at)]
            z = x[chosen] @ w
            p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
            velocity = MOMENTUM * velocity + x[chosen].T @ (p - np.eye(K)[y[chosen]]) / batch
            w = w - RATE * velocity
    return w


def test_stages_by_hand(toy):
    deleted = mask(member(1, 0), member(1, 1), member(2, 2))
    found, _ = fit(toy, deleted, model=LINEAR, method=None)
    for shard in range(S):
        w = np.asarray(jax.random.normal(keys.at(keys.named(KEY, "init"), shard), (4, K)))
        for stage, epochs in enumerate((1, 2, 1)):
            at = np.array([i for i in range(N) if PLAN.shard[i] == shard and PLAN.slice[i] <= stage and not deleted[i]])
            w = naive(w, toy, at, 13, keys.at(keys.at(keys.named(KEY, "stage"), shard), stage), epochs, 5)
        np.testing.assert_allclose(of_shard(found, shard).params["w"], w, rtol=1e-4, atol=1e-5)


# --- deletion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3])  # 3: a group of three and a short one
def test_deletion_equals_training_from_nothing(toy, width):
    kept: dict = {}
    compiled = sharded._stage._cache_size()
    first, saved = fit(toy, kept=kept, width=width)
    before = sharded.names(KEY, PLAN, width=width, **HOW)
    assert saved == list(dict.fromkeys(saved))
    assert sorted(saved) == sorted(name for chain in before.values() for name in chain)
    assert first.trained == tuple(sorted(first.trained, key=lambda place: (place[0] // width, place[1], place[0])))

    deleted = mask(member(1, 1), member(3, 2))
    after = sharded.names(KEY, PLAN, deleted=deleted, width=width, **HOW)
    gone = [(1, 1), (1, 2), (3, 2)]  # from the slice on, in those shards
    assert [(s, r) for s in range(S) for r in range(R) if before[s][r] != after[s][r]] == gone
    assert sharded.stale(before, after) == tuple(before[s][r] for s, r in gone)

    unlearned, saved = fit(toy, deleted, kept=kept, width=width)
    assert list(unlearned.trained) == gone
    assert saved == [after[s][r] for s, r in gone]
    scratch, saved = fit(toy, deleted, width=width)
    assert len(saved) == S * R
    assert_same(unlearned, scratch)
    assert sharded._stage._cache_size() == compiled + 1  # one program for every stage of every shard
    for shard in range(S):
        assert differs(of_shard(first, shard), of_shard(unlearned, shard)) == (shard in (1, 3))

    again, saved = fit(toy, deleted, kept=kept, width=width)
    assert (again.trained, saved) == ((), [])
    assert_same(again, scratch)


def test_history_leaves_no_trace(toy):
    one, two = member(0, 0), member(0, 2)
    kept: dict = {}
    for deleted in (None, mask(one), mask(one, two)):
        forwards, _ = fit(toy, deleted, kept=kept)
    kept = {}
    for deleted in (None, mask(two), mask(one, two)):
        backwards, _ = fit(toy, deleted, kept=kept)
    assert_same(forwards, backwards)


def test_the_deleted_and_the_other_shards_are_never_read(toy):
    deleted = mask(member(1, 1), member(2, 0))
    clean, _ = fit(toy, deleted)
    spoilt = toy._replace(x=jnp.where(deleted[:, None, None, None], jnp.nan, toy.x), y=jnp.where(deleted, 0, toy.y))
    assert_same(fit(spoilt, deleted)[0], clean)
    elsewhere = toy._replace(x=jnp.where((PLAN.shard != 2)[:, None, None, None], 1 - toy.x, toy.x))
    moved, _ = fit(elsewhere, deleted)
    assert [differs(of_shard(moved, s), of_shard(clean, s)) for s in range(S)] == [True, True, False, True]


def test_widths_agree_but_for_rounding(toy):
    narrow, wide = (fit(toy, width=width)[0] for width in (1, 3))
    for a, b in zip(jax.tree.leaves(narrow.weights), jax.tree.leaves(wide.weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    beyond = sharded.names(KEY, PLAN, width=99, **HOW)
    assert beyond == sharded.names(KEY, PLAN, width=S, **HOW)


def test_a_lost_checkpoint_is_made_again(toy):
    kept: dict = {}
    whole, _ = fit(toy, kept=kept)
    chain = sharded.names(KEY, PLAN, **HOW)[2]
    del kept[chain[2]], kept[chain[1]]
    again, saved = fit(toy, kept=kept)
    assert saved == [chain[1], chain[2]]
    assert_same(again, whole)


def test_names_cover_all_that_defines_the_weights():
    known = {sharded.names(KEY, PLAN, **HOW)[0][0]}
    for change in ({"batch": 6}, {"tag": "other"}, {"epochs": 4}, {"width": 2}):
        known.add(sharded.names(KEY, PLAN, **{**HOW, **change})[0][0])
    known.add(sharded.names(jax.random.key(8), PLAN, **HOW)[0][0])
    known.add(sharded.names(KEY, shards.deal(KEY, N, shards=S, slices=R), **HOW)[0][0])
    assert len(known) == 7


# --- edges -------------------------------------------------------------------------------------------------------


def test_empty_slices_take_no_step_and_empty_shards_no_vote(toy):
    everyone = (PLAN.shard == 2) | ((PLAN.shard == 0) & (PLAN.slice == 1)) | ((PLAN.shard == 1) & (PLAN.slice == 0))
    kept: dict = {}
    fit(toy, kept=kept)
    found, _ = fit(toy, everyone, kept=kept)
    assert_same(found, fit(toy, everyone)[0])
    assert (found.shards, found.lost) == ((0, 1, 3), (2,))
    assert found.sizes == tuple(int(((PLAN.shard == s) & ~everyone).sum()) for s in (0, 1, 3))
    names = sharded.names(KEY, PLAN, deleted=everyone, **HOW)
    assert 2 not in names
    for a, b in zip(jax.tree.leaves(kept[names[0][0]]), jax.tree.leaves(kept[names[0][1]]), strict=True):
        np.testing.assert_array_equal(a, b)  # nothing new in slice 1: no step
    work = shards.passes(PLAN, HOW["epochs"], everyone)
    assert (work == 0).tolist() == [[False, True, False], [True, False, False], [True] * 3, [False] * 3]
    assert set(sharded.stale(sharded.names(KEY, PLAN, **HOW), names)) >= set(sharded.names(KEY, PLAN, **HOW)[2])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"deleted": np.ones(N, bool)}, "cover all data"),
        ({"deleted": np.zeros(N - 1, bool)}, r"\[50\]; got \(49,\)"),
        ({"deleted": np.zeros(N, int)}, "boolean"),
        ({"width": 0}, "width"),
        ({"batch": 0}, "batch"),
        ({"epochs": 0}, "epoch"),
        ({"plan": shards.given(np.arange(4), np.zeros(4, int))}, "plan is for 4"),
    ],
)
def test_bad_input(toy, change, sentence):
    with pytest.raises(BadInput, match=sentence):
        fit(toy, change.pop("deleted", None), **change)


def test_networks_that_would_take_no_step_do_not_vote(toy):
    """One epoch over three slices rounds to the stages 0, 1, 0: where the second slice is gone, nothing is trained."""
    how = {"epochs": 1}
    assert shards.budget(1, R) == (0, 1, 0)
    gone = (PLAN.shard == 2) & (PLAN.slice == 1)
    found, _ = fit(toy, gone, **how)
    assert (found.shards, found.lost) == ((0, 1, 3), (2,))
    with pytest.raises(BadInput, match="no network would be trained"):
        fit(toy, PLAN.slice == 1, **how)
    left = shards.check_left(PLAN, 1, gone)
    np.testing.assert_array_equal(left, gone)


def test_bad_plans():
    for count, of, slices in ((10, 0, 1), (10, 1, 0), (10, 4, 3)):
        with pytest.raises(BadInput, match="need"):
            shards.deal(KEY, count, shards=of, slices=slices)


def test_what_diverges_is_not_kept(toy):
    huge = toy._replace(x=toy.x.at[member(1, 1)].set(jnp.inf))
    kept: dict = {}
    with pytest.raises(NonFinite, match=r"shard 1 .* stage 1"):
        fit(huge, kept=kept, model=LINEAR, method=None)
    assert len(kept) == R + 1
    assert all(np.isfinite(leaf).all() for weights in kept.values() for leaf in jax.tree.leaves(weights))


# --- the vote ----------------------------------------------------------------------------------------------------


def stacked(w):
    return Weights({"w": jnp.asarray(w, jnp.float32)}, ())


def test_votes_by_hand():
    rng = np.random.default_rng(1)
    w, x, sizes = rng.normal(size=(5, 4, K)), rng.uniform(size=(40, 2, 2, 1)), np.array([10, 3, 1, 7, 9])
    z = np.einsum("bi,sik->sbk", x.reshape(40, 4), w)
    share = {"votes": np.eye(K)[z.argmax(axis=2)], "mean": np.exp(z) / np.exp(z).sum(axis=2, keepdims=True)}
    for how, each in share.items():
        for weights in (None, sizes):
            p = np.average(each, axis=0, weights=weights)
            apply, params = ensemble.vote(LINEAR, stacked(w), how=how, sizes=weights)
            np.testing.assert_allclose(
                jax.jit(apply)(params, jnp.asarray(x, jnp.float32)), np.log(np.maximum(p, 1e-6)), atol=1e-4
            )
            if how == "votes" and weights is None:
                assert (p == 0).any()  # the floor is met
    assert params["w"].shape == (5, 4, K)


def test_ties_go_to_the_first_class_and_nan_to_nobody():
    one = np.zeros((2, 4, K))
    one[0, :, 2] = one[1, :, 1] = 1.0  # one vote each for the classes 2 and 1
    x = jnp.ones((1, 2, 2, 1))
    apply, params = ensemble.vote(LINEAR, stacked(one))
    assert int(jnp.argmax(apply(params, x))) == 1
    one[0] = np.nan
    assert np.isnan(apply({"w": jnp.asarray(one)}, x)).all()


def test_the_vote_takes_statistics_along(toy):
    found, _ = fit(toy)
    apply, params = ensemble.vote(NORMED, found.weights, how="mean", sizes=found.sizes)
    each = [jax.nn.softmax(NORMED.apply(of_shard(found, s), toy.x)) for s in range(S)]
    expected = np.average(np.stack(each), axis=0, weights=found.sizes)
    np.testing.assert_allclose(apply(params, toy.x), np.log(np.maximum(expected, 1e-6)), atol=1e-4)
    for wrong in ({"how": "best"}, {"sizes": [1, 2]}, {"sizes": [1, 2, 3, 0]}, {"floor": 0.0}):
        with pytest.raises(BadInput):
            ensemble.vote(NORMED, found.weights, **wrong)
