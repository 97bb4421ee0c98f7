"""The engine of learned noise: phases, passes and descent against spies, naive loops and closed forms."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dememo_jax import checkpoint, keys, loop, models, projected, protect, train
from dememo_jax import data as sets
from dememo_jax.errors import BadInput, NonFinite
from dememo_jax.protect import bilevel, lock, objectives, refine
from dememo_jax.types import Array, Method, Weights

COUNT, CLASSES, RATE, RADIUS, STRIDE = 20, 3, 0.5, 0.1, 0.03
W0 = np.random.default_rng(0).normal(size=(12, CLASSES)).astype(np.float32)
MASK = np.arange(COUNT) % 4 != 1
KEY = jax.random.key(7)
LINEAR = models.from_apply(lambda key, x: {"w": jnp.asarray(W0)}, lambda p, x: x.reshape(len(x), -1) @ p["w"])
FROZEN = optax.set_to_zero()
PLAIN = projected.Ball(lambda noise: noise, lambda gradient: gradient, lambda key, shape: jnp.zeros(shape), "l2", 1.0)


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(1)
    x = rng.uniform(size=(COUNT, 3, 4, 1)).astype(np.float32)
    x[:4] = np.round(x[:4])  # pixels at 0 and 1, where the box is tight
    return sets.make(x, np.arange(COUNT) % CLASSES)


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def flat(x):
    return np.asarray(x, np.float64).reshape(len(x), -1)


def ce(x, y, w=W0):
    return -np.log(softmax(flat(x) @ np.asarray(w, np.float64))[np.arange(len(x)), y])


def ce_slope(x, y, w=W0):
    """Gradient of each image's cross-entropy in the image, [N, D]."""
    w = np.asarray(w, np.float64)
    return (softmax(flat(x) @ w) - np.eye(CLASSES)[y]) @ w.T


# --- spies ---------------------------------------------------------------------------------------------------------


class Log(NamedTuple):
    weights: Weights
    x: Array  # [T, B, ...] what was seen
    index: Array  # [T, B], -1 where nothing was


def recorder(told, batch, most=40):
    """A factory of learners that only write down what they see; `told` gets the numbers of steps handed to it."""

    def factory(steps):
        told.append(steps)

        def init(key, x):
            return Log(
                Weights({"t": jnp.zeros(())}, ()), jnp.zeros((most, batch, *x.shape[1:])), -jnp.ones((most, batch), jnp.int32)
            )

        def step(key, state, drawn):
            t = state.weights.params["t"].astype(int)
            log = Log(Weights({"t": t + 1.0}, ()), state.x.at[t].set(drawn.x), state.index.at[t].set(drawn.index))
            return log, {}

        return Method(init, step)

    return factory


def counting(key, weights, context, examples, noise, active):
    """Refinement that counts itself, in steps of 1/64; what is not to have noise gets garbage."""
    return jnp.where(active.reshape(-1, 1, 1, 1), noise + 1 / 64, 9.0)


def states(recipe, data, mask=None, key=KEY):
    found = []
    noise = protect.generate(recipe, key, data, mask, watch=lambda done, state, info: found.append((done, state, info)))
    return noise, found


# --- phases --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("parts", "sweep_batch"), [(3, 6), (5, 7)])  # blocks: 4 and 3
def test_phases_passes_and_parts(toy, parts, sweep_batch):
    told = []
    phases = (
        protect.Phase(2, epochs=0.5, sees="clean", sweep=False),  # two batches of 5 each
        protect.Phase(parts, batches=1, parts=parts),
        protect.Phase(1, batches=4, sweep=False),
        protect.Phase(1),
    )
    recipe = protect.alternate(
        None, recorder(told, 5), counting, phases=phases, batch=5, sweep_batch=sweep_batch, classes=CLASSES, store=jnp.float32
    )
    assert recipe.steps == 4 + parts
    noise, found = states(recipe, toy, MASK)
    assert set(told) == {2 * 2 + parts + 4}
    assert [done for done, *_ in found] == list(range(1, 5 + parts))

    blocks = [range(b, min(b + sweep_batch, COUNT)) for b in range(0, COUNT, sweep_batch)]
    counts = np.zeros(COUNT)
    learned = 0
    for done, state, info in found:
        log, number = state.learner, done - 1
        if number < 2:
            batches, clean = 2, True
        elif number < 2 + parts:
            batches, clean = 1, False
        else:
            batches, clean = (4, False) if number == 2 + parts else (0, False)
        for t in range(learned, learned + batches):
            at = np.asarray(log.index[t])
            worn = np.where(MASK & (not clean), counts, 0)[at] / 64
            expected = np.clip(np.asarray(toy.x)[at] + worn.reshape(-1, 1, 1, 1), 0, 1)
            np.testing.assert_allclose(log.x[t], expected, atol=1e-6)
            if (~MASK[at]).any():  # learned from as they are, to the bit
                np.testing.assert_array_equal(np.asarray(log.x[t])[~MASK[at]], np.asarray(toy.x)[at][~MASK[at]])
        learned += batches
        assert (np.asarray(log.index[learned:]) == -1).all()
        if 2 <= number < 2 + parts:
            part = number - 2
            for block in blocks[part * len(blocks) // parts : (part + 1) * len(blocks) // parts]:
                counts[list(block)] += 1
        elif number == 3 + parts:
            counts += 1
        table = np.asarray(state.perturbation.delta)
        expected = np.where(MASK, counts / 64, 0).reshape(-1, 1, 1, 1)
        np.testing.assert_allclose(table, np.broadcast_to(expected, table.shape), atol=1e-7)
        assert info["noise"] == pytest.approx(np.abs(table).mean(), rel=1e-5)
    np.testing.assert_array_equal(counts, 2)  # over all parts each example once, and once in the last pass
    seen = np.asarray(found[-1][1].learner.index[: learned // 4 * 4])
    for begin in range(0, len(seen), 4):  # batches go on through the phases: four of them are a pass over the data
        np.testing.assert_array_equal(np.sort(seen[begin : begin + 4].ravel()), np.arange(COUNT))
    np.testing.assert_array_equal(noise.delta, found[-1][1].perturbation.delta)
    np.testing.assert_array_equal(noise.mask, MASK)


def test_batches_refined_first_then_learned_equal_a_naive_loop(toy):
    # Full batches: the order does not matter. Two iterations of two batches, then the pass over all.
    improve = refine.descent(objectives.minimizing(LINEAR), projected.linf(RADIUS), stride=STRIDE, steps=2)
    told = []

    def learner(steps):
        told.append(steps)
        return train.sgd(LINEAR, train.optimiser(lambda steps: optax.sgd(optax.linear_schedule(RATE, 0.0, steps)), steps))

    recipe = protect.alternate(
        LINEAR, learner, improve, phases=protect.minimizing.online(4, 2), batch=COUNT, classes=CLASSES, store=jnp.float32
    )
    noise, found = states(recipe, toy, MASK)
    x, y, w = flat(toy.x), np.asarray(toy.y), W0.astype(np.float64)
    delta = np.zeros_like(x)

    def refined(delta):
        for _ in range(2):
            moved = np.clip(delta - STRIDE * np.sign(ce_slope(np.clip(x + delta, 0, 1), y, w)), -RADIUS, RADIUS)
            delta = np.clip(x + moved, 0, 1) - x
        return np.where(MASK[:, None], delta, 0)

    for t in range(4):
        delta = refined(delta)
        images = np.clip(x + delta, 0, 1)
        w = w - RATE * (1 - t / 4) * images.T @ (softmax(images @ w) - np.eye(CLASSES)[y]) / COUNT
    images = np.clip(x + refined(delta), 0, 1)
    np.testing.assert_allclose(found[-1][1].learner.weights.params["w"], w, atol=1e-5)
    np.testing.assert_allclose(noise.delta.reshape(COUNT, -1), refined(delta), atol=1e-5)
    assert found[-1][2]["loss"] == pytest.approx(ce(images, y, w).mean(), rel=1e-4)
    assert found[-1][2]["error"] == pytest.approx(((images @ w).argmax(axis=1) != y).mean(), abs=1e-6)
    assert set(told) == {4}  # the rate fell over the four steps that there are


@pytest.mark.parametrize(("learner_steps", "iterations"), [(7, 3), (3, 5), (6, 3)])
def test_iterations_only_say_how_often_the_state_is_seen(learner_steps, iterations):
    phases = protect.minimizing.online(learner_steps, iterations)
    assert sum(phase.iterations * phase.batches for phase in phases) == learner_steps


@pytest.mark.slow
def test_portion_and_shuffle(toy):
    def companions(key, weights, context, examples, noise, active):  # who is refined together with whom
        together = jnp.where(active, examples.index + 1.0, 0).sum() / 4096
        return noise.at[:, 0, 0].add(1 / 64).at[:, 1, 0].set(together)

    def make(**how):
        return protect.alternate(
            None, recorder([], 4), companions, phases=(protect.Phase(3, batches=2),), batch=4, classes=CLASSES,
            store=jnp.float32, **how,
        )  # fmt: skip

    def run(recipe, key=KEY):
        return [state for _, state, _ in states(recipe, toy, key=key)[1]]

    share = make(portion=0.4)
    part = run(share)
    counts = np.asarray(part[-1].perturbation.delta)[:, 0, 0, 0] * 64
    assert sorted(counts.tolist()) == [0] * 12 + [3] * 8  # eight examples, the same each time
    seen = np.asarray(part[-1].learner.index[:6])
    for begin in (0, 2, 4):
        np.testing.assert_array_equal(np.sort(seen[begin : begin + 2].ravel()), np.flatnonzero(counts))
    other = np.asarray(run(share, jax.random.key(8))[-1].perturbation.delta)[:, 0, 0, 0] * 64
    assert (counts != other).any()

    mixed = run(make(shuffle=True))
    np.testing.assert_array_equal(np.asarray(mixed[-1].perturbation.delta)[:, 0, 0, 0] * 64, 3)
    partners = [np.repeat([10, 26, 42, 58, 74], 4), *(np.asarray(m.perturbation.delta)[:, 1, 0, 0] * 4096 for m in mixed)]
    assert all((one != other).any() for one, other in itertools.combinations(partners, 2))
    assert all(sum(set(sums.tolist())) <= 210 == sums.sum() / 4 for sums in partners)  # five batches of four


# --- the run -------------------------------------------------------------------------------------------------------


def test_stop_ceiling_and_watch(toy):
    recipe = protect.error_minimizing(
        LINEAR, optax.sgd(0.02), radius=0.3, classes=CLASSES, learner_steps=1, inner_steps=1, batch=COUNT, passes=12, stop=None
    )
    stopping = recipe._replace(stop=0.1)
    assert protect.error_minimizing(LINEAR, stop=0.1).stop == 0.1
    free = states(recipe, toy)[1]
    assert [done for done, *_ in free] == list(range(1, 13))
    errors = [info["error"] for *_, info in free]
    assert errors[0] > 0.1 > errors[-1]  # else there is nothing to stop
    noise, short = states(stopping, toy)
    assert [info["error"] for *_, info in short] == errors[: next(i for i, e in enumerate(errors) if e <= 0.1) + 1]
    np.testing.assert_array_equal(noise.delta, short[-1][1].perturbation.delta)
    assert not protect.finished(recipe, {"error": 0.0})
    assert protect.finished(stopping, {"error": 0.1})


def test_non_finite_names_the_iteration_and_keeps_the_noise_before(toy):
    def breaking(key, weights, context, examples, noise, active):
        return noise + jnp.where(weights.params["t"] >= 3, jnp.nan, 1 / 64)

    recipe = protect.alternate(
        None, recorder([], 4), breaking, phases=(protect.Phase(5, batches=1),), batch=4, classes=CLASSES, store=jnp.float32
    )
    seen = []
    with pytest.raises(NonFinite, match="noise became nan at outer iteration 2") as caught:
        protect.generate(recipe, KEY, toy, MASK, watch=lambda done, state, info: seen.append(done))
    assert seen == [1, 2]
    np.testing.assert_allclose(caught.value.kept.delta[MASK], 2 / 64, rtol=1e-6)
    np.testing.assert_array_equal(caught.value.kept.mask, MASK)


def test_watch_may_stop_a_recipe_and_nothing_else_does(toy):
    recipe = protect.alternate(
        None, recorder([], 4), counting, phases=(protect.Phase(5, batches=1),), batch=4, classes=CLASSES, store=jnp.float32
    )
    seen = []
    protect.generate(recipe, KEY, toy, MASK, watch=lambda done, *_: seen.append(done) or (loop.STOP if done == 2 else None))
    assert seen == [1, 2]
    with pytest.raises(BadInput, match="watch returned True"):
        protect.generate(recipe, KEY, toy, MASK, watch=lambda *_: True)


def test_check_refuses_what_does_not_fit_and_computes_nothing(toy):
    def init(key, x):
        calls.append(x)
        return {"w": jnp.asarray(W0)}

    calls = []
    watched = models.from_apply(init, lambda p, x: x.reshape(len(x), -1) @ p["w"])
    recipe = protect.error_minimizing(watched, classes=CLASSES)
    classwise = protect.error_minimizing(LINEAR, classes=CLASSES, granularity="class")
    for good in (None, MASK):
        protect.check(recipe, toy, good)
        protect.check(classwise, toy, good)
    assert all(isinstance(x, jax.core.Tracer) for x in calls)

    wide = sets.make(np.zeros((6, 5, 5, 1)), np.arange(6) % CLASSES)
    few = models.from_apply(lambda key, x: {"w": jnp.zeros((12, 2))}, lambda p, x: x.reshape(len(x), -1) @ p["w"])
    flatter = models.from_apply(lambda key, x: {}, lambda p, x: x.reshape(len(x), -1).sum(axis=-1))
    cases = [
        ("surrogate", recipe, wide, None),
        ("logits", protect.error_minimizing(few, classes=CLASSES), toy, None),
        ("logits", protect.error_minimizing(flatter, classes=CLASSES), toy, None),
        ("labels", recipe, toy._replace(y=None), None),
        ("labels", recipe, toy._replace(y=toy.y.at[3].set(-1)), None),
        ("classes=9", recipe, toy._replace(y=toy.y.at[3].set(8)), None),
        ("whole", recipe, sets.take(toy, jnp.arange(3, 9)), None),
        ("empty", recipe, toy, np.zeros(COUNT, bool)),
        ("boolean", recipe, toy, np.ones(COUNT, int)),
        ("one entry", recipe, toy, np.ones(COUNT - 1, bool)),
        ("class", classwise, toy._replace(y=jnp.where(toy.y == 1, 2, toy.y)), None),
    ]
    for match, asked, data, mask in cases:
        for act in (protect.check, lambda asked, data, mask: protect.generate(asked, KEY, data, mask)):
            with pytest.raises(BadInput, match=match):
                act(asked, data, mask)


@pytest.mark.parametrize(
    "wrong",
    [
        {"phases": ()},
        {"phases": (protect.Phase(0),)},
        {"batch": 0},
        {"sweep_batch": 0},
        {"portion": 0.0},
        {"portion": 1.1},
        {"granularity": "pixel"},
    ],
)
def test_alternate_refuses(wrong):
    with pytest.raises(BadInput):
        protect.alternate(None, lambda steps: bilevel.still(), counting, **{"phases": (protect.Phase(1),), "batch": 4, **wrong})


@pytest.mark.parametrize(
    "wrong",
    [
        {"stride": 0.0},
        {"stride": float("nan")},
        {"steps": 0},
        {"draws": 0},
        {"restarts": 0},
        {"restarts": 2},
        {"start": "warm"},
        {"sharpness": -1.0},
    ],
)
def test_descent_refuses(wrong):
    with pytest.raises(BadInput):
        refine.descent(objectives.minimizing(LINEAR), PLAIN, **{"stride": 0.1, "steps": 1, **wrong})


def test_resumed_from_a_checkpoint_in_every_phase_equals_the_straight_run_bit_for_bit(toy, tmp_path):
    improve = refine.descent(
        objectives.minimizing(LINEAR), projected.linf(RADIUS), stride=STRIDE, steps=2, start="random", shift=refine.ramp((0.1,))
    )
    phases = (
        protect.Phase(2, batches=2, sees="clean", sweep=False),
        protect.Phase(2, batches=2, sees="refined", sweep=False),
        protect.Phase(3, batches=1, parts=2),
    )
    recipe = protect.alternate(
        LINEAR, lambda steps: train.sgd(LINEAR, optax.sgd(optax.linear_schedule(RATE, 0, steps), 0.9)), improve,
        phases=phases, batch=8, classes=CLASSES, portion=0.8, shuffle=True,
    )  # fmt: skip
    method = Method(recipe.init, recipe.step)
    begun = jax.device_put(jax.jit(recipe.init)(KEY, toy, MASK), jax.devices()[0])
    kept = [begun]
    run = functools.partial(loop.run, method, data=toy, steps=7, every=1)
    straight = run(KEY, begun, after=lambda done, state, info: kept.append(state))
    deltas = [np.asarray(state.perturbation.delta) for state in kept]
    assert all((one != other).any() for one, other in itertools.pairwise(deltas[2:]))  # there is something to lose
    moved = [np.asarray(state.learner.weights.params["w"]) for state in kept]
    assert all((one != other).any() for one, other in itertools.pairwise(moved))

    def raw(tree):
        keyed = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
        return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if keyed(leaf) else leaf), tree)

    for done in (1, 3, 6):
        checkpoint.save(tmp_path / str(done), done, kept[done])
        restored = checkpoint.restore(tmp_path / str(done), done, jax.eval_shape(recipe.init, KEY, toy, MASK)).state
        resumed = run(KEY, restored, start=done, after=lambda *_: None)
        jax.tree.map(np.testing.assert_array_equal, raw(resumed), raw(straight))

    again, other = (run(key, begun, after=lambda *_: None) for key in (KEY, jax.random.key(8)))
    jax.tree.map(np.testing.assert_array_equal, raw(again), raw(straight))
    assert (deltas[-1] != other.perturbation.delta).mean() > 0.2


# --- descent -------------------------------------------------------------------------------------------------------


def refined(improve, toy, noise=None, weights=W0, context=(), active=None, key=KEY, w="w"):
    noise = np.zeros(toy.x.shape, np.float32) if noise is None else noise
    active = np.ones(len(toy.y), bool) if active is None else active
    return np.asarray(jax.jit(improve)(key, Weights({w: jnp.asarray(weights)}, ()), context, toy, noise, active))


def starting(toy, scale=0.05, seed=3):
    return np.random.default_rng(seed).uniform(-scale, scale, size=toy.x.shape).astype(np.float32)


def test_a_gradient_is_the_mean_over_draws(toy):
    # Draw s of step t looks through weights that a function of both moves; no sign hides the sizes.
    def shift(key, t, s, weights, context):
        return weights._replace(params={"w": weights.params["w"] * (1.0 + s) - 0.5 * t})

    improve = refine.descent(objectives.minimizing(LINEAR), PLAIN, stride=0.1, steps=2, draws=3, shift=shift)
    noise = flat(starting(toy))
    expected, x, y = noise, flat(toy.x), np.asarray(toy.y)
    for t in range(2):
        seen = np.clip(x + expected, 0, 1)
        moved = expected - 0.1 * np.mean([ce_slope(seen, y, W0 * (1.0 + s) - 0.5 * t) for s in range(3)], axis=0)
        expected = np.clip(x + moved, 0, 1) - x
    np.testing.assert_allclose(flat(refined(improve, toy, starting(toy))), expected, atol=1e-5)


def test_draws_of_a_view_are_independent_and_averaged(toy):
    # The gradient of |x + e|^2 / 2 is x + e: what is left of e after k draws shows in the noise.
    def view(key, weights, batch):
        return batch.x + jax.random.normal(key, batch.x.shape)

    def objective(weights, seen):
        return 0.5 * jnp.square(seen.x).sum(axis=(1, 2, 3))

    grey = sets.make(np.full((20, 10, 10, 1), 0.5), np.zeros(20))
    improve = refine.descent(objective, PLAIN, stride=1e-4, steps=4, draws=9, view=view, box=False)
    left = -refined(improve, grey) / 1e-4 / 4 - 0.5  # the mean of e over draws and steps
    assert left.std() == pytest.approx(1 / 6, rel=0.06)
    assert abs(left.mean()) < 0.02


def test_member_looks_through_every_checkpoint(toy):
    stack = np.random.default_rng(4).normal(size=(3, 12, CLASSES)).astype(np.float32)
    improve = refine.descent(objectives.minimizing(LINEAR), PLAIN, stride=0.2, steps=1, draws=3, shift=refine.member, box=False)
    found = refined(improve, toy, context=Weights({"w": jnp.asarray(stack)}, ()))
    mean = np.mean([ce_slope(toy.x, np.asarray(toy.y), w) for w in stack], axis=0)
    np.testing.assert_allclose(flat(found), -0.2 * mean, atol=1e-6)


def test_checkpoints_are_equally_spaced():
    def step(key, state, batch):
        return state._replace(weights=Weights({"w": state.weights.params["w"] + 1}, ()), step=state.step + 1), {}

    plain = Method(lambda key, x: train.start(FROZEN, Weights({"w": jnp.zeros(())}, ())), step)
    method = protect.frozen.checkpoints(plain, 3, 4)
    state = method.init(KEY, None)
    for _ in range(14):
        state, _ = method.step(KEY, state, None)
    np.testing.assert_array_equal(state.stack.params["w"], [4, 8, 12])
    assert float(state.weights.params["w"]) == 14
    for _ in range(2):
        state, _ = method.step(KEY, state, None)
    np.testing.assert_array_equal(state.stack.params["w"], [16, 8, 12])  # over the oldest


def test_the_ramp_goes_through_its_scales_step_by_step():
    # The gradient of x . w is w itself: three steps leave -(3 w + the noises) behind.
    grey, w = sets.make(np.zeros((1, 60, 60, 1)), np.zeros(1)), np.full((60, 60, 1), 3.0, np.float32)
    ramp = jax.jit(refine.ramp((0.0, 0.5, 2.0)))
    keyed = [ramp(jax.random.key(t), t, 0, Weights({"w": w}, ()), ()).params["w"] - w for t in range(5)]
    np.testing.assert_allclose([np.std(e) for e in keyed], [0.0, 0.5, 2.0, 0.0, 0.5], rtol=0.05)
    improve = refine.descent(
        lambda weights, seen: (seen.x * weights.params["w"]).sum(axis=(1, 2, 3)),
        PLAIN, stride=1.0, steps=3, shift=refine.ramp((0.0, 0.5, 2.0)), box=False,
    )  # fmt: skip
    total = -refined(improve, grey, weights=w) - 9.0
    assert total.std() == pytest.approx((0.5**2 + 2.0**2) ** 0.5, rel=0.03)
    assert abs(total.mean()) < 0.15


def sharp(toy, noise, active, rho, stride):
    """SAPA's step on a linear softmax: first the weights climb, over the examples that are to have noise."""
    x, y = np.clip(flat(toy.x) + flat(noise), 0, 1), np.asarray(toy.y)
    climb = x[active].T @ (softmax(x[active] @ W0.astype(np.float64)) - np.eye(CLASSES)[y[active]])
    return flat(noise) - stride * ce_slope(x, y, W0 + rho * climb / np.linalg.norm(climb))


def test_sharpness_is_the_gradient_at_worse_weights(toy):
    improve = refine.descent(objectives.minimizing(LINEAR), PLAIN, stride=0.1, steps=1, sharpness=2.0, box=False)
    noise = starting(toy)
    found = refined(improve, toy, noise)
    np.testing.assert_allclose(flat(found), sharp(toy, noise, np.ones(COUNT, bool), 2.0, 0.1), atol=1e-5)
    assert np.abs(flat(found) - sharp(toy, noise, np.ones(COUNT, bool), 0.0, 0.1)).max() > 0.01  # it does matter


def test_sharpness_does_not_look_at_padding_and_at_what_stays_clean(toy):
    improve = refine.descent(objectives.minimizing(LINEAR), PLAIN, stride=0.1, steps=1, sharpness=2.0, box=False)
    noise = starting(toy)
    found = refined(improve, toy, noise, active=MASK)
    np.testing.assert_allclose(flat(found)[MASK], sharp(toy, noise, MASK, 2.0, 0.1)[MASK], atol=1e-5)


def test_what_stays_clean_is_seen_clean(toy):
    # An objective that looks across the batch, as a contrastive loss does, must not meet noise that will never be worn.
    def objective(weights, seen):
        stray = jnp.where(seen.active, 0, jnp.abs(seen.noise).sum(axis=(1, 2, 3))).sum()
        return seen.x.sum() * (1 + jax.lax.stop_gradient(stray))

    improve = refine.descent(objective, PLAIN, stride=0.01, steps=3, box=False)
    np.testing.assert_allclose(refined(improve, toy, active=MASK)[MASK], -0.03, rtol=1e-5)


def test_restarts_keep_the_best_of_each_image(toy):
    def wavy(weights, seen):  # many valleys
        return jnp.cos(40 * seen.x).sum(axis=(1, 2, 3))

    how = {"stride": 0.01, "steps": 3, "start": "random"}
    best = refined(refine.descent(wavy, projected.linf(0.3), restarts=4, **how), toy)
    once = refine.descent(wavy, projected.linf(0.3), **how)
    tries = np.stack([refined(once, toy, key=keys.at(KEY, r)) for r in range(4)])
    values = np.cos(40 * np.clip(np.asarray(toy.x, np.float64) + tries, 0, 1)).sum(axis=(2, 3, 4))
    chosen = values.argmin(axis=0)
    assert len(set(chosen.tolist())) == 4  # each try is somebody's best
    np.testing.assert_allclose(best, tries[chosen, np.arange(COUNT)], atol=1e-6)


def test_the_gradient_passes_the_clip_and_the_box_holds(toy):
    def half_square(weights, seen):
        return 0.5 * jnp.square(seen.x - 2.0).sum(axis=(1, 2, 3))  # to 2, beyond the box

    noise = starting(toy, 0.4)
    x = np.asarray(toy.x, np.float64)
    free = refined(refine.descent(half_square, PLAIN, stride=0.5, steps=1, box=False), toy, noise)
    np.testing.assert_allclose(free, noise - 0.5 * (np.clip(x + noise, 0, 1) - 2), atol=1e-6)  # saturated pixels too
    boxed = refined(refine.descent(half_square, PLAIN, stride=0.5, steps=1), toy, noise)
    np.testing.assert_allclose(x + boxed, np.clip(x + free, 0, 1), atol=1e-6)


def test_starts(toy):
    noise, step = starting(toy, 0.02), STRIDE * np.sign(ce_slope(toy.x, np.asarray(toy.y))).reshape(toy.x.shape)
    ball = projected.linf(RADIUS)

    def make(start, objective=None):
        return refine.descent(objective or objectives.minimizing(LINEAR), ball, stride=STRIDE, steps=1, start=start, box=False)

    np.testing.assert_allclose(refined(make("zero"), toy, noise), -step, atol=1e-6)
    seen = np.clip(np.asarray(toy.x) + noise, 0, 1)
    kept = noise - STRIDE * np.sign(ce_slope(seen, np.asarray(toy.y))).reshape(toy.x.shape)
    np.testing.assert_allclose(refined(make("kept"), toy, noise), kept, atol=1e-6)
    still = make("random", lambda weights, seen: 0.0 * seen.x.sum(axis=(1, 2, 3)))  # no gradient: the start stays
    one, same, other = refined(still, toy, noise), refined(still, toy, 0 * noise), refined(still, toy, key=jax.random.key(1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).mean() > 0.9
    assert 0.9 * RADIUS < np.abs(one).max() <= RADIUS
    assert one.std() == pytest.approx(RADIUS / 3**0.5, rel=0.15)  # uniform


def test_l2_and_l0_go_to_the_far_end_of_their_balls(toy):
    slope = np.random.default_rng(6).normal(size=toy.x.shape[1:]).astype(np.float32)

    def descent(ball, stride, steps):
        objective = lambda weights, seen: (seen.x * weights.params["w"]).sum(axis=(1, 2, 3))  # noqa: E731
        return refined(refine.descent(objective, ball, stride=stride, steps=steps, box=False), toy, weights=slope)

    unit = slope / np.linalg.norm(slope)
    np.testing.assert_allclose(descent(projected.l2(0.5), 0.2, 1), np.broadcast_to(-0.2 * unit, toy.x.shape), atol=1e-6)
    np.testing.assert_allclose(descent(projected.l2(0.5), 0.2, 4), np.broadcast_to(-0.5 * unit, toy.x.shape), atol=1e-6)
    few = descent(projected.l0(2), 0.2, 2)
    largest = np.abs(slope) >= np.sort(np.abs(slope).ravel())[-2]
    np.testing.assert_array_equal(few != 0, np.broadcast_to(largest, few.shape))
    np.testing.assert_allclose(few[0], np.where(largest, -0.4 * slope / np.abs(slope).max(), 0), atol=1e-6)


# --- storage -------------------------------------------------------------------------------------------------------


def stored(values, passes=1, **how):
    """What is stored of noise that a pass makes to be `values` [N, ...], and later passes leave as it is."""

    def given(key, weights, context, examples, noise, active):
        return jnp.where(context == 0, jnp.asarray(values)[examples.index], noise)

    class Counter(NamedTuple):
        weights: Weights
        passes: Array

    learner = Method(
        lambda key, x: Counter(Weights((), ()), jnp.zeros((), int) - 1),
        lambda key, state, batch: (state._replace(passes=state.passes + 1), {}),
    )
    data = sets.make(np.full(values.shape, 0.5), np.arange(len(values)) % 2)
    recipe = protect.alternate(
        None, lambda steps: learner, given, phases=(protect.Phase(passes, 1),), batch=len(values), classes=2,
        context=lambda state, data: state.passes, **how,
    )  # fmt: skip
    return protect.generate(recipe, KEY, data).delta


def test_half_precision_never_leaves_a_ball():
    rng = np.random.default_rng(8)
    radii = np.array([2 / 255, 8 / 255, 16 / 255, 0.1, 0.3, 1 / 3, 1.0]).reshape(-1, 1, 1, 1)
    corner = radii * rng.choice([-1, 1], size=(7, 5, 5, 3))
    wide = rng.normal(size=(7, 5, 5, 3))
    wide *= radii * (1 - 1e-6) / np.sqrt((wide**2).sum(axis=(1, 2, 3), keepdims=True))
    values = np.float32(np.concatenate([corner, wide, radii * rng.uniform(-1, 1, size=(7, 5, 5, 3))]))
    kept = stored(values)
    assert kept.dtype == jnp.float16
    kept = np.asarray(kept, np.float64)
    assert (np.abs(kept) <= np.float32(np.tile(radii, (3, 1, 1, 1)))).all()
    assert (np.sqrt((kept[7:14] ** 2).sum(axis=(1, 2, 3))) <= radii.ravel()).all()
    assert (np.abs(kept - values) <= np.abs(values) * 2.0**-10 + 2.0**-24).all()


def test_half_precision_rounds_small_entries_towards_zero_too():
    values = np.geomspace(1e-8, 1e-3, 400).astype(np.float32).reshape(4, 10, 10, 1)
    kept = np.asarray(stored(values), np.float64)
    assert (kept <= values).all()
    assert stored(values, granularity="class").dtype == jnp.float32  # class-wise noise is kept as it is


def test_noise_that_a_pass_leaves_alone_does_not_fade():
    values = np.random.default_rng(9).uniform(-0.1, 0.1, size=(4, 5, 5, 3)).astype(np.float32)
    np.testing.assert_array_equal(stored(values, passes=6), stored(values))


# --- recipes -------------------------------------------------------------------------------------------------------


def test_gray_noise_is_one_channel_and_a_numpy_step():
    rng = np.random.default_rng(2)
    data = sets.make(rng.uniform(size=(6, 2, 2, 3)), np.arange(6) % CLASSES)
    recipe = protect.error_minimizing(
        LINEAR, FROZEN, radius=RADIUS, classes=CLASSES, gray=True, inner_steps=2, learner_steps=1, passes=1, batch=6, stop=None
    )
    delta = protect.generate(recipe, KEY, data).delta
    assert delta.shape == (6, 2, 2, 1)
    x, y, noise = np.asarray(data.x, np.float64), np.asarray(data.y), np.zeros((6, 2, 2, 1))
    for _ in range(2):  # of a stride of 0.3 radius
        luma = np.clip(x + noise, 0, 1) @ np.array([0.299, 0.587, 0.114])
        grad = ce_slope(np.repeat(luma[..., None], 3, axis=-1), y).reshape(6, 2, 2, 3).sum(axis=-1, keepdims=True)
        noise = np.clip(noise - 0.3 * RADIUS * np.sign(grad), -RADIUS, RADIUS)
    np.testing.assert_allclose(np.asarray(delta, np.float32), noise, atol=1e-4)


def test_the_lock_opens(toy):
    radius = 0.3  # the nearest number of half precision lies beyond it
    bright = toy._replace(x=jnp.maximum(toy.x, 0.35))  # with pixels at 1, where the lock does most
    recipe = protect.learnability_lock(
        LINEAR, optax.sgd(RATE), radius=radius, classes=CLASSES, learner_steps=1, inner_steps=12, batch=COUNT, passes=2,
        stop=None,
    )  # fmt: skip
    noise, found = states(recipe, bright, MASK)
    table = found[-1][1].perturbation.delta
    assert table.shape == (CLASSES, 2, 3, 4, 1)
    assert table.dtype == jnp.float32
    assert 0.9 * radius / 2 < np.abs(table).max() <= radius / 2 + 1e-7
    x, y, own = np.asarray(bright.x, np.float64), np.asarray(bright.y), np.asarray(table, np.float64)[np.asarray(bright.y)]
    locked = x * (1 + own[:, 0]) + own[:, 1]
    np.testing.assert_allclose(lock.affine(bright.x, table[bright.y]), locked, atol=1e-6)
    np.testing.assert_allclose(protect.unlock(lock.affine(bright.x, table[bright.y]), bright.y, table), x, atol=1e-6)
    np.testing.assert_allclose(protect.unlock(locked.astype(np.float32), y, table), x, atol=1e-6)
    expected = np.where(MASK.reshape(-1, 1, 1, 1), np.clip(locked, 0, 1) - x, 0)
    np.testing.assert_allclose(noise.delta, expected, atol=radius * 2**-10 + 1e-6)
    np.testing.assert_array_equal(noise.row, np.arange(COUNT))
    np.testing.assert_array_equal(noise.mask, MASK)
    assert np.abs(np.asarray(noise.delta, np.float64)).max() > 0.9 * radius
    assert np.abs(np.asarray(noise.delta, np.float64)).max() <= np.float32(radius)


@pytest.mark.slow
def test_the_switch_to_noisy_weights(toy):
    counted = optax.chain(optax.sgd(0.1), optax.scale_by_schedule(lambda count: 1.0))  # counts the optimiser's steps

    recipe = protect.provable(
        LINEAR, counted, radius=0.2, classes=CLASSES, sigmas=(0.0, 0.1, 0.2), learner_draws=2, noise_draws=2,
        learner_steps=2, batch=COUNT, passes=8, stop=None, switch=0.3, portion=1.0,
    )  # fmt: skip
    found = states(recipe, toy)[1]
    errors = [info["error"] for *_, info in found]
    assert errors[0] >= 0.3 > min(errors)  # else nothing is switched
    robust, count = False, 0
    for (_, state, _), error in zip(found, errors):
        count += 2 * (3 if robust else 1)
        assert int(state.learner.inner.opt[1].count) == count
        robust |= error < 0.3
        assert bool(state.learner.robust) == robust
        assert state.learner.weights is not None
        np.testing.assert_array_equal(state.learner.weights.params["w"], state.learner.inner.weights.params["w"])
    assert count > 16
    delta = np.asarray(found[-1][1].perturbation.delta)
    assert delta.shape == (CLASSES, 3, 4, 1)
    assert delta.dtype == np.float32
    assert 0 < np.abs(delta).max() <= 0.2 + 1e-6


@pytest.mark.slow
def test_targeted_poison_carries_the_next_class(toy):
    how = {"radius": 0.2, "classes": CLASSES, "inner_steps": 20, "epochs": 1, "parts": 2, "shift": 0.5}
    noise = protect.generate(protect.adversarial(LINEAR, FROZEN, restarts=2, **how), KEY, toy, MASK)
    y = np.asarray(toy.y)
    before, after = np.asarray(toy.x), np.asarray(sets.perturb(toy, noise).x)
    np.testing.assert_array_equal(after[~MASK], before[~MASK])
    assert np.abs(np.asarray(noise.delta, np.float64)).max() <= 0.2
    aim, wrong = (y + 1) % CLASSES, (y + 2) % CLASSES
    assert (ce(after, aim)[MASK] < ce(before, aim)[MASK]).mean() > 0.9
    assert ce(after, aim)[MASK].mean() < 0.8 * ce(before, aim)[MASK].mean()
    assert ce(after, aim)[MASK].mean() < ce(after, wrong)[MASK].mean()
    for same in (0, CLASSES):
        with pytest.raises(BadInput, match="another class"):
            protect.adversarial(LINEAR, offset=same, classes=CLASSES)


def test_hypocritical_noise_is_a_numpy_loop_in_an_l2_ball(toy):
    recipe = protect.hypocritical(LINEAR, FROZEN, radius=0.5, classes=CLASSES, inner_steps=8, epochs=1, parts=3)
    delta = np.asarray(protect.generate(recipe, KEY, toy, MASK).delta, np.float64)
    x, y = flat(toy.x), np.asarray(toy.y)
    noise = np.zeros_like(x)
    for _ in range(8):
        grad = ce_slope(np.clip(x + noise, 0, 1), y)
        noise = noise - 0.1 * grad / np.linalg.norm(grad, axis=1, keepdims=True)
        noise *= np.minimum(1, 0.5 / np.linalg.norm(noise, axis=1, keepdims=True))
        noise = np.clip(x + noise, 0, 1) - x
    np.testing.assert_allclose(delta[MASK].reshape(MASK.sum(), -1), noise[MASK], atol=1e-3)
    assert (delta[~MASK] == 0).all()
    length = np.linalg.norm(delta.reshape(COUNT, -1), axis=1)
    assert length.max() <= 0.5
    assert length.max() > 0.49
    assert ce(x + noise, y)[MASK].mean() < 0.7 * ce(x, y)[MASK].mean()


def test_frozen_noise_from_zero_does_not_depend_on_the_batches(toy):
    improve = refine.descent(objectives.targeted(LINEAR, CLASSES, 1), projected.l2(0.5), stride=0.1, steps=5, start="zero")

    def run(sweep_batch, parts):
        phases = (protect.Phase(1, 1, sees="clean", sweep=False), protect.Phase(parts, parts=parts))
        recipe = protect.alternate(
            None, lambda steps: train.sgd(LINEAR, FROZEN), improve, phases=phases, batch=5, sweep_batch=sweep_batch,
            classes=CLASSES, store=jnp.float32,
        )  # fmt: skip
        return protect.generate(recipe, KEY, toy, MASK).delta

    whole = run(COUNT, 1)
    for sweep_batch, parts in ((3, 9),):
        np.testing.assert_allclose(run(sweep_batch, parts), whole, atol=1e-6)


def test_a_surrogate_of_the_recipe_trains_on_clean_images(toy):
    # Nothing random in the warm-up on full batches: three steps of numpy, then frozen.
    recipe = protect.frozen.pretrained(
        LINEAR, optax.sgd(RATE), counting, epochs=3, parts=1, classes=CLASSES, batch=COUNT, augment=None
    )
    found = states(recipe, toy)[1]
    x, y, w = flat(toy.x), np.asarray(toy.y), W0.astype(np.float64)
    for done in range(3):
        w = w - RATE * x.T @ (softmax(x @ w) - np.eye(CLASSES)[y]) / COUNT
        np.testing.assert_allclose(found[done][1].learner.weights.params["w"], w, atol=1e-5)
        assert (np.asarray(found[done][1].perturbation.delta) == 0).all()
    np.testing.assert_array_equal(found[3][1].learner.weights.params["w"], found[2][1].learner.weights.params["w"])
    assert (np.asarray(found[3][1].perturbation.delta) > 0).all()


def test_a_mask_may_be_any_list_of_booleans_or_is_refused(toy):
    phases = (protect.Phase(1),)
    recipe = protect.alternate(None, lambda steps: bilevel.still(), counting, phases=phases, batch=4, classes=CLASSES)
    try:
        protect.check(recipe, toy, MASK.tolist())
    except BadInput:
        return  # to refuse is right too
    np.testing.assert_array_equal(protect.generate(recipe, KEY, toy, MASK.tolist()).mask, MASK)
