"""Shadow models against networks that were trained, unlearned and evaluated one at a time."""

import os
import subprocess
import sys
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dememo_jax import audit, keys, loop, losses, models, montecarlo, nets, sources, train, tree, unlearn
from dememo_jax import data as sets
from dememo_jax.errors import BadInput, NonFinite
from dememo_jax.types import Weights

N, BATCH, PASSES = 60, 16, 2
KEY = jax.random.key(5)
TX = optax.sgd(0.1, momentum=0.9)
MODEL = models.from_linen(nets.mlp(10, (16,)))
METHOD = train.sgd(MODEL, TX)
DATA = sets.take(sources.load("digits")[0], np.arange(N))
scan = jax.jit(loop.scan, static_argnames=("method", "steps", "batch"))


@partial(jax.jit, static_argnames=("method", "steps"))
def learn(method, own, data, mask, steps):
    """The weights of one model, from the keys that the docstring names."""
    state = method.init(keys.named(own, "init"), data.x[:1])
    return loop.scan(method, keys.named(own, "train"), state, data, steps=steps, batch=BATCH, mask=mask)[0].weights


@partial(jax.jit, static_argnames=("model", "loss"))
def scored(model, loss, weights, data):
    return loss(model.apply(weights, data.x), data.y)


def masks():
    """Seven models; 2 and 5 have twenty examples, the others thirty: width 3 makes groups of 3, 2 and 2."""
    found = audit.halves(jax.random.key(6), 8, N)[:7]
    for row in (2, 5):
        found[row, np.flatnonzero(found[row])[20:]] = False
    return found


MASKS = masks()
GROUPS = [[0, 1, 3], [4, 6], [2, 5]]


def shadows(data=DATA, chosen=MASKS, **how):
    return audit.train_shadows(KEY, MODEL, METHOD, data, chosen, **{"passes": PASSES, "batch": BATCH, "width": 3, **how})


def by_hand(row, method=METHOD, data=DATA, chosen=MASKS):
    return learn(method, keys.at(KEY, row), data, chosen[row], sets.steps(int(chosen[row].sum()), BATCH, PASSES))


def rows(weights, *at):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[list(at)], weights)


def one(weights, at):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[at], weights)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.fixture(scope="module")
def alone():
    return [by_hand(row) for row in range(len(MASKS))]


@pytest.fixture(scope="module")
def trained():
    return list(shadows())


# --- masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, 11])
def test_halves(count):
    found = audit.halves(KEY, 12, count)
    assert found.shape == (12, count)
    assert found.dtype == bool
    for models_ in range(2, 13, 2):  # in half of the models, of whichever even number
        np.testing.assert_array_equal(found[:models_].sum(axis=0), models_ // 2)
    np.testing.assert_array_equal(found[::2], ~found[1::2])
    assert set(found[::2].sum(axis=1)) == {count // 2}
    np.testing.assert_array_equal(audit.halves(KEY, 4, count), found[:4])  # a pair does not see how many there are
    assert len(np.unique(found, axis=0)) == 12
    assert (audit.halves(jax.random.key(7), 12, count) != found).any()


def test_folds():
    found = audit.folds(KEY, 8, 11, 3)
    assert found.shape == (8, 11)
    for turn in (found[:3], found[3:6]):
        np.testing.assert_array_equal((~turn).sum(axis=0), 1)  # each example is left out once a turn
        assert set((~turn).sum(axis=1)) <= {3, 4}
    assert ((~found[6:]).sum(axis=0) <= 1).all()
    np.testing.assert_array_equal(audit.folds(KEY, 6, 11, 3), found[:6])
    np.testing.assert_array_equal(audit.folds(KEY, 8, 11, 2), audit.halves(KEY, 8, 11))


@pytest.mark.parametrize("wrong", [(3, 10), (0, 10), (-2, 10), (2, 1)])
def test_halves_refuses(wrong):
    with pytest.raises(BadInput):
        audit.halves(KEY, *wrong)


@pytest.mark.parametrize("wrong", [(4, 10, 1), (4, 10, 5), (12, 10, 11)])
def test_folds_refuses(wrong):
    with pytest.raises(BadInput):
        audit.folds(KEY, *wrong)


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_groups_are_of_equally_many_examples(trained):
    assert [group.rows.tolist() for group in trained] == GROUPS
    for group in trained:
        assert {len(leaf) for leaf in jax.tree.leaves(group.weights)} == {len(group.rows)}  # no padding, the last too


def test_in_one_vmap_as_one_by_one(trained, alone):
    for group in trained:
        for place, row in enumerate(group.rows):
            close(one(group.weights, place), alone[row])
    assert tree.distance(alone[0].params, alone[1].params) > 1  # else closeness would say little


@pytest.mark.slow
def test_width_one_is_the_scan(alone):
    found = list(shadows(width=1))
    assert [group.rows.tolist() for group in found] == [[0], [1], [3], [4], [6], [2], [5]]
    for group in found:
        close(one(group.weights, 0), alone[group.rows[0]], atol=1e-6)


def test_skipped_groups_change_nothing(trained):
    assert list(shadows(skip=range(7))) == []
    (left,) = shadows(skip=[6, 2, 4, 5])
    assert left.rows.tolist() == GROUPS[0]
    same(left.weights, trained[0].weights)
    partly = list(shadows(skip=[0, 1, 2, 6]))  # a group that is wanted in part is trained whole: its program is the same
    assert [group.rows.tolist() for group in partly] == GROUPS
    for got, before in zip(partly, trained):
        same(got.weights, before.weights)


def test_models_see_their_own_examples_only(trained):
    own = MASKS[1]
    poisoned = DATA._replace(x=jnp.where(own[:, None, None, None], DATA.x, jnp.nan))
    (group,) = shadows(poisoned, np.tile(own, (3, 1)))
    same(one(group.weights, 1), one(trained[0].weights, 1))


def test_a_loss_that_is_no_number_names_its_model():
    chosen = MASKS[[2, 4, 6]]  # groups of 0, which is not wanted, and of 1 and 2
    bad = int(np.flatnonzero(chosen[2] & ~chosen[1])[0])
    poisoned = DATA._replace(x=DATA.x.at[bad].set(jnp.nan))
    with pytest.raises(NonFinite, match=r"shadow model 2 became nan in pass 0"):
        list(shadows(poisoned, chosen, skip=[0]))


@pytest.mark.slow
def test_convolutions_and_their_statistics():
    random = np.random.default_rng(0)
    data = sets.make(random.random((24, 8, 8, 1), np.float32), np.arange(24) % 3)
    model = models.from_linen(nets.cnn(3, (4, 8)))
    method, chosen = train.sgd(model, TX), audit.halves(KEY, 2, 24)
    (pair,) = audit.train_shadows(KEY, model, method, data, chosen, width=2, passes=PASSES, batch=BATCH)
    scores = audit.score(model, pair.weights, data)
    for row in range(2):
        expected = by_hand(row, method, data, chosen)
        close(one(pair.weights, row), expected)
        assert np.abs(jax.tree.leaves(expected.stats)[0]).max() > 0.01
        np.testing.assert_allclose(scores[row], scored(model, losses.margin, expected, data), atol=1e-4)


def test_the_usual_width_where_nobody_says(trained, monkeypatch):
    asked = []
    monkeypatch.setattr(audit.shadows, "usual_width", lambda *given, batch, over: asked.append((batch, over)) or 3)
    same([group.weights for group in shadows(width=None)], [group.weights for group in trained])
    assert asked == [(BATCH, None)]


EMPTY, WHOLE = np.zeros((2, N), bool), np.ones((2, N), bool)


@pytest.mark.parametrize(
    ("chosen", "how"),
    [
        (MASKS[0], {}),
        (MASKS[:, :-1], {}),
        (MASKS.astype(int), {}),
        (MASKS[:0], {}),
        (np.concatenate([MASKS, EMPTY]), {}),
        (WHOLE, {"width": 0}),
        (WHOLE, {"passes": 0}),
        (WHOLE, {"batch": 0}),
    ],
)
def test_train_shadows_refuses(chosen, how):
    with pytest.raises(BadInput):
        shadows(chosen=chosen, **how)  # when called, not when the first group is asked for


# --- unlearning --------------------------------------------------------------------------------------------------

FINETUNE = unlearn.finetune(MODEL, TX, batch=8)
THEN = audit.descended(FINETUNE, 5)


@jax.jit
def fine_tuned(key, weights, data, forget):
    state = FINETUNE.init(keys.named(key, "init"), weights, data, forget)
    return FINETUNE.finish(loop.scan(FINETUNE, keys.named(key, "steps"), state, data, steps=5)[0])


def unlearned_by_hand(row, weights, forget):
    """Model `row` on the examples of its own, gathered."""
    own = np.flatnonzero(MASKS[row])
    return fine_tuned(keys.named(keys.at(KEY, row), "unlearn"), weights, sets.take(DATA, own), forget[own])


def some(count, *at):
    """A mask of the first `count` examples of each of the models."""
    found = np.zeros(N, bool)
    for row in at:
        found[np.flatnonzero(MASKS[row])[:count]] = True
    return found


@pytest.mark.slow
@pytest.mark.parametrize("common", [True, False])
def test_unlearned_together_as_one_by_one(trained, alone, common):
    pair = audit.Group(np.array([0, 1]), rows(trained[0].weights, 0, 1))  # two halves: four examples of each are eight
    of_each = np.stack([some(4, row) for row in range(7)])
    forget = some(4, 0, 1) if common else of_each
    for width in (2, 1):
        found = audit.then_unlearn(KEY, pair, THEN, DATA, MASKS, forget, width=width)
        np.testing.assert_array_equal(found.rows, pair.rows)
        for row in (0, 1):
            before = one(pair.weights, row)
            expected = unlearned_by_hand(row, before, of_each[row])
            close(one(found.weights, row), expected, 1e-5)
            assert tree.distance(expected.params, before.params) > 0.01


def told(key, weights, data, forget):
    return Weights({"key": jax.random.key_data(key), "given": weights.params, "data": data, "forget": forget}, weights.stats)


def test_what_a_function_of_unlearning_is_given(trained):
    group, forget = trained[2], np.stack([some(3, row) for row in range(7)])
    assert group.rows.tolist() == [2, 5]  # the rows are not the places
    forget[2, ~MASKS[2]] = True  # nobody's business
    got = audit.then_unlearn(KEY, group, told, DATA, MASKS, forget)
    for place, row in enumerate(group.rows):
        found, own = one(got.weights, place).params, np.flatnonzero(MASKS[row])
        np.testing.assert_array_equal(found["key"], jax.random.key_data(keys.named(keys.at(KEY, row), "unlearn")))
        np.testing.assert_array_equal(found["data"].index, own)
        np.testing.assert_array_equal(found["data"].x, DATA.x[own])
        np.testing.assert_array_equal(found["forget"], np.arange(20) < 3)
        same(found["given"], one(group.weights, place).params)


class Drift(NamedTuple):
    weights: Weights


@pytest.mark.parametrize("finishes", [True, False])
def test_descended_runs_finishes_and_splits_its_key(finishes):
    class Method(NamedTuple):
        init: Any
        step: Any

    def step(key, state, data):
        return Drift(Weights(0.5 * state.weights.params + jax.random.normal(key) + data.y.sum(), ())), {}

    def init(key, weights, data, forget):
        return Drift(weights._replace(params=jax.random.normal(key) + forget.sum()))

    method = Method(init, step)
    if finishes:
        method = type("Finished", (Method,), {"finish": lambda self, state: 10 * state.weights.params})(*method)
    data, forget = sets.take(DATA, np.arange(8)), np.arange(8) < 2
    found = audit.descended(method, 3)(KEY, Weights(jnp.zeros(()), ()), data, forget)
    expected = jax.random.normal(keys.named(KEY, "init")) + 2
    for t in range(3):  # the whole set in every step
        noise = jax.random.normal(keys.at(keys.named(keys.named(KEY, "steps"), "step"), t))
        expected = 0.5 * expected + noise + data.y.sum()
    np.testing.assert_allclose(found if finishes else found.params, (10 if finishes else 1) * expected, rtol=1e-5)


@pytest.mark.parametrize(
    "forget",
    [
        MASKS[1],  # model 0 has none of them
        np.ones(N, bool),  # nothing would be left
        np.stack([some(5 if row == 3 else 4, row) for row in range(7)]),  # not equally many
        some(4, 0, 1).astype(int),
        np.zeros(N, bool),
        np.zeros(N - 1, bool),
        np.zeros((3, N), bool),  # one row a model of the group, not one a model
    ],
)
def test_then_unlearn_refuses(trained, forget):
    with pytest.raises(BadInput):
        audit.then_unlearn(KEY, trained[0], told, DATA, MASKS, forget)


# --- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "width"), [(losses.margin, 1), (losses.cross_entropy, 2)])
def test_scores_are_those_of_each_network(trained, loss, width):
    weights = trained[0].weights
    how = {} if loss is losses.margin else {"loss": loss}
    found = audit.score(MODEL, weights, DATA, width=width, **how)
    assert found.shape == (3, N)
    for place in range(3):
        expected = scored(MODEL, loss, one(weights, place), DATA)
        np.testing.assert_allclose(found[place], expected, rtol=1e-4, atol=1e-5)


def test_shadow_scores(trained):
    other, seen = sets.take(DATA, np.arange(7)), []
    how = {"passes": PASSES, "batch": BATCH, "width": 3}
    found = audit.shadow_scores(
        KEY, MODEL, METHOD, DATA, MASKS, other, loss=losses.correct, after=lambda *call: seen.append(call), **how
    )
    plain = audit.shadow_scores(KEY, MODEL, METHOD, DATA, MASKS, **how)
    assert seen == [(3, 7), (5, 7), (7, 7)]
    assert found.shape == (7, 7)
    assert plain.shape == (7, N)
    for group in trained:
        np.testing.assert_array_equal(found[group.rows], audit.score(MODEL, group.weights, other, loss=losses.correct))
        np.testing.assert_allclose(plain[group.rows], audit.score(MODEL, group.weights, DATA), rtol=1e-4, atol=1e-5)
    members = [row[mask].mean() - row[~mask].mean() for row, mask in zip(plain, MASKS)]
    assert min(members) > 0  # they know their own examples better


# --- how many at once --------------------------------------------------------------------------------------------


def test_usual_width(monkeypatch):
    random = np.random.default_rng(0)
    images = sets.make(random.random((24, 8, 8, 1), np.float32), np.arange(24) % 3)
    model = models.from_linen(nets.cnn(3, (4, 8)))
    assert audit.usual_width(KEY, model, train.sgd(model, TX), images, audit.halves(KEY, 2, 24), batch=8) == 1

    def dense():
        return audit.usual_width(KEY, MODEL, METHOD, DATA, MASKS, batch=BATCH)

    assert dense() == 32
    size = (64 * 16 + 16) + (16 * 10 + 10)
    monkeypatch.setattr(montecarlo, "scratch", lambda: 5 * 16 * size)  # of five networks, their gradients and optimisers
    assert dense() == 5
    monkeypatch.setattr(montecarlo, "scratch", lambda: 0)
    assert dense() == 1


class Clock:
    """A clock on which trial i takes `took[i]` seconds, the best of three runs, of which others are slower."""

    def __init__(self, *took):
        self.ends = iter([seconds + late for seconds in took for late in (0.5, 0.0, 1.0)])
        self.now, self.calls = 100.0, 0

    def __call__(self):
        self.calls += 1
        if self.calls % 2 == 0:
            self.now += next(self.ends)
        return self.now


@pytest.mark.slow
def test_calibrate_keeps_the_fastest(monkeypatch):
    def found(*seconds):  # of a step of one network
        tried = (1, 8, 32)
        clock = Clock(*[4 * width * each for width, each in zip(tried, seconds)])
        return audit.calibrate(KEY, MODEL, METHOD, DATA, MASKS, batch=BATCH, clock=clock)

    assert found(2.0, 1.0, 0.5) == (32, ((1, 2.0), (8, 1.0), (32, 0.5)))
    assert found(2.0, 1.0, 1.5) == (8, ((1, 2.0), (8, 1.0), (32, 1.5)))
    assert found(2.0, 3.0) == (1, ((1, 2.0), (8, 3.0)))  # wider is not tried any more
    monkeypatch.setattr(montecarlo, "scratch", lambda: 0)
    assert found(2.0) == (1, ((1, 2.0),))


# --- devices -----------------------------------------------------------------------------------------------------

DEVICES = """
import jax, numpy as np
assert jax.device_count() == 4
import test_shadows as t
from dememo_jax import audit, mesh
chosen = t.MASKS[[0, 1, 3, 4, 6]]
forget = chosen & (chosen.cumsum(axis=1) <= 3)

def after_all(over):
    found, before, after = [], np.zeros((5, t.N)), np.zeros((5, t.N))
    for group in t.shadows(chosen=chosen, width=1, over=over):
        found.append(group.rows.tolist())
        before[group.rows] = audit.score(t.MODEL, group.weights, t.DATA, over=over)
        group = audit.then_unlearn(t.KEY, group, t.THEN, t.DATA, chosen, forget, over=over)
        assert {len(leaf) for leaf in jax.tree.leaves(group.weights)} == {len(group.rows)}
        after[group.rows] = audit.score(t.MODEL, group.weights, t.DATA, over=over)
    return found, before, after

found, *four = after_all(mesh.mesh())
assert found == [[0, 1, 2, 3], [4]], found
for many, single in zip(four, after_all(None)[1:]):
    np.testing.assert_allclose(many, single, rtol=1e-4, atol=1e-4)
assert np.abs(four[0] - four[1]).max() > 0.1
print("shadows", flush=True)
add = lambda shared, rows: shared + rows
for gather, rows in ((True, 8), (False, 2)):
    found = jax.jit(mesh.spread(add, mesh.mesh(), gather=gather))(np.float32(1), np.arange(8.0))
    np.testing.assert_array_equal(found, np.arange(1.0, 9.0))
    assert found.sharding.shard_shape(found.shape) == (rows,), gather
print("spread", flush=True)
attacked = [t.MODEL.init(jax.random.key(0), t.DATA.x[:1])]
def sweep(radii, **how):
    return audit.sweep(t.MODEL, attacked, t.DATA, t.DATA, t.KEY, radii=radii, epochs=1, batch=20, tx=t.TX, width=1, **how)[0][0]
for many, radius in zip(sweep([0.02, 0.04, 0.06], over=mesh.mesh()), (0.02, 0.04, 0.06)):
    (single,) = sweep([radius])
    np.testing.assert_allclose(many.accuracy, single.accuracy, atol=1.5 / t.N)
    np.testing.assert_allclose(many.distance, single.distance, rtol=1e-4)
    assert abs(many.distance[1] / radius - 1) < 1e-3, many  # the balls bind
print("sweep")
"""


@pytest.fixture(scope="module")
def on_four():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, env=env, check=False)


@pytest.mark.slow
def test_four_devices_give_the_scores_of_one(on_four):
    assert "shadows" in on_four.stdout.split(), on_four.stderr[-2000:]


def test_what_is_not_gathered_stays_cut(on_four):
    assert "spread" in on_four.stdout.split(), on_four.stderr[-2000:]


def test_a_sweep_need_not_fill_the_devices(on_four):
    assert "sweep" in on_four.stdout.split(), on_four.stderr[-2000:]
