"""The two drivers against a Python loop and against each other, to the bit where they promise it."""

import zlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dememo_jax import callbacks, loop
from dememo_jax import data as sets
from dememo_jax.errors import BadInput, NonFinite
from dememo_jax.types import Array, Dataset, Method, Perturbation

KEY = jax.random.key(11)
N, STEPS = 12, 20
DATA = sets.make(np.random.default_rng(0).random((N, 4)), np.arange(N) % 3)


class State(NamedTuple):
    w: Array
    done: Array


def step(key, state, batch):
    """Chaotic enough that any other order of batches or keys shows."""
    w = 0.9 * state.w + jnp.sin(batch.x.mean(axis=0) + state.w) + 0.1 * jax.random.normal(key, state.w.shape)
    info = {"loss": jnp.sum(w**2), "index": batch.index.astype(jnp.float32), "mean": batch.x.mean()}
    return State(w, state.done + 1), info


METHOD = Method(lambda: State(jnp.zeros(4), jnp.zeros((), jnp.int32)), step)
START = METHOD.init()
scan = jax.jit(loop.scan, static_argnames=("method", "steps", "batch", "draw"))
passes = jax.jit(loop.passes, static_argnames=("method", "passes", "batch", "per_pass"))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def silent(steps, state, info):
    return None


@pytest.fixture(scope="module")
def straight():
    return scan(METHOD, KEY, START, DATA, steps=STEPS, batch=5)  # start is 0


@pytest.fixture(scope="module")
def chunked():
    """Every call of `after` in a run of 20 steps with a report every 5, and its last state."""
    calls = []
    state = loop.run(METHOD, KEY, START, DATA, steps=STEPS, every=5, batch=5, after=lambda *call: calls.append(call))
    return state, calls


def test_scan_is_the_loop(straight):
    to_draw, to_step = (jax.random.fold_in(KEY, zlib.crc32(name)) for name in (b"draw", b"step"))
    x, w = np.asarray(DATA.x, np.float64), np.zeros(4)
    for t in range(7):
        members = np.asarray(sets.shuffled(to_draw, t, DATA, 5).index)
        np.testing.assert_array_equal(straight[1]["index"][t], members)
        noise = np.asarray(jax.random.normal(jax.random.fold_in(to_step, t), (4,)))
        w = 0.9 * w + np.sin(x[members].mean(axis=0) + w) + 0.1 * noise
        assert straight[1]["loss"][t] == pytest.approx((w**2).sum(), rel=1e-4)
    assert straight[0].done == STEPS
    assert straight[1]["loss"].shape == (STEPS,)


def test_ten_and_ten_are_twenty(straight):
    half, first = scan(METHOD, KEY, START, DATA, steps=10, batch=5, start=0)
    whole, second = scan(METHOD, KEY, half, DATA, steps=10, batch=5, start=10)
    same(whole, straight[0])
    same(jax.tree.map(lambda *parts: np.concatenate(parts), first, second), straight[1])


def test_run_is_scan(straight, chunked):
    state, calls = chunked
    same(state, straight[0])
    assert [done for done, _, _ in calls] == [5, 10, 15, 20]
    same(jax.tree.map(lambda *parts: np.concatenate(parts), *[info for _, _, info in calls]), straight[1])
    assert all(isinstance(value, np.ndarray) for value in calls[0][2].values())
    same(calls[-1][1], state)


def test_run_stops_when_told_and_resumes_to_the_bit(chunked):
    stopped = loop.run(
        METHOD, KEY, START, DATA, steps=STEPS, every=5, batch=5, after=lambda done, *_: loop.STOP if done == 10 else None
    )
    assert stopped.done == 10
    seen = []
    resumed = loop.run(
        METHOD, KEY, stopped, DATA, steps=STEPS, every=5, batch=5, start=10, after=lambda done, *_: seen.append(done)
    )
    assert seen == [15, 20]
    same(resumed, chunked[0])


@pytest.mark.parametrize("drive", ["run", "stream"])
@pytest.mark.parametrize("answer", [True, 1, "saved", np.True_])
def test_only_stop_stops(drive, answer):
    """`CheckpointManager.save` returns True: as a callback it must not end a run in silence."""
    how = {"steps": STEPS, "every": 5, "after": lambda *_: answer}
    drives = {
        "run": partial(loop.run, METHOD, KEY, START, DATA, batch=5),
        "stream": partial(loop.stream, METHOD, KEY, START, drawn),
    }
    with pytest.raises(BadInput, match=r"loop\.STOP"):
        drives[drive](**how)


def test_none_and_false_go_on(chunked):
    for answer in (None, False):
        same(loop.run(METHOD, KEY, START, DATA, steps=STEPS, every=5, batch=5, after=lambda *_, a=answer: a), chunked[0])


def test_a_callback_that_only_reports_cannot_stop():
    callbacks.reports(True)  # what it returns is not used
    with pytest.raises(BadInput, match="watch"):
        callbacks.reports(loop.STOP, "watch")


def test_last_chunk_is_what_is_left():
    seen = []
    state = loop.run(
        METHOD, KEY, START, DATA, steps=7, every=5, batch=5, after=lambda done, _, info: seen.append((done, len(info["loss"])))
    )
    assert seen == [(5, 5), (7, 2)]
    assert state.done == 7
    for start in (7, 10):  # nothing left to do
        assert loop.run(METHOD, KEY, state, DATA, steps=7, every=5, batch=5, start=start, after=seen.append) is state


def test_scan_vmaps_over_keys(straight):
    keys = jnp.stack([KEY, jax.random.key(12)])
    many = jax.jit(jax.vmap(lambda key: loop.scan(METHOD, key, START, DATA, steps=STEPS, batch=5)))(keys)
    np.testing.assert_array_equal(many[1]["index"][0], straight[1]["index"])
    np.testing.assert_allclose(many[1]["loss"][0], straight[1]["loss"], rtol=1e-4)
    assert not np.allclose(many[1]["loss"][1], straight[1]["loss"], rtol=1e-2)


MASK = np.isin(np.arange(N), [0, 1, 3, 4, 6, 7, 10])
SHIFT = Perturbation(np.full((3, 4), 0.5, np.float32), np.asarray(DATA.y), np.arange(N) < 7)


def flat(info):
    return jax.tree.map(lambda values: np.asarray(values).reshape(-1, *values.shape[2:]), info)


@pytest.mark.slow
@pytest.mark.parametrize(("per_pass", "how"), [(3, {}), (2, {"mask": MASK, "perturbation": SHIFT})])
def test_passes_are_the_steps_of_scan(per_pass, how):
    for first in (0, 2):  # 12 or 7 in batches of 5: the last is filled up
        state, info = passes(METHOD, KEY, START, DATA, passes=2, batch=5, per_pass=per_pass, start=first, **how)
        straight = scan(METHOD, KEY, START, DATA, steps=2 * per_pass, batch=5, start=first * per_pass, **how)
        assert info["loss"].shape == (2, per_pass)
        np.testing.assert_array_equal(flat(info)["index"], straight[1]["index"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), (state, flat(info)), straight)


def test_passes_vmap_over_masks():
    masks = np.stack([MASK, MASK[::-1]])  # equally many
    many = jax.jit(jax.vmap(lambda m: loop.passes(METHOD, KEY, START, DATA, passes=2, batch=5, per_pass=2, mask=m)[1]["index"]))
    for found, mask in zip(many(masks), masks):
        alone = scan(METHOD, KEY, START, DATA, steps=4, batch=5, mask=mask)[1]["index"]
        np.testing.assert_array_equal(found.reshape(4, 5), alone)


@pytest.fixture
def used(monkeypatch):
    """The passes that `run` begins to go through whole."""
    starts, real = [], loop._passes
    monkeypatch.setattr(loop, "_passes", lambda *given, **how: starts.append(int(how["start"])) or real(*given, **how))
    return starts


@pytest.mark.slow
@pytest.mark.parametrize(("every", "how", "starts"), [(6, {}, [0, 2]), (4, {"mask": MASK, "perturbation": SHIFT}, [0, 2, 4])])
def test_run_over_whole_passes_is_scan(used, every, how, starts):
    calls = []
    state = loop.run(METHOD, KEY, START, DATA, steps=14, every=every, batch=5, after=lambda *call: calls.append(call), **how)
    straight = scan(METHOD, KEY, START, DATA, steps=14, batch=5, **how)
    assert [done for done, _, _ in calls] == [*range(every, 14, every), 14]
    infos = jax.tree.map(lambda *parts: np.concatenate(parts), *[info for _, _, info in calls])
    np.testing.assert_array_equal(infos["index"], straight[1]["index"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), (state, infos), straight)
    assert used[: len(starts)] == starts
    assert len(used) == (2 if every == 6 else 4)  # what is left of 14 is two thirds of a pass, or a whole one


def test_other_draws_and_parts_of_passes_step_as_scan_does(used):
    for how in ({"batch": 5, "draw": sets.uniform}, {"batch": 5, "every": 5}, {}):
        loop.run(METHOD, KEY, START, DATA, after=silent, **{"steps": 6, "every": 6, **how})
    assert used == []


def test_runs_of_whole_passes_resume_to_the_bit():
    how = {"steps": 9, "every": 3, "batch": 5}
    states = {}
    whole = loop.run(METHOD, KEY, START, DATA, after=lambda done, state, _: states.update({done: state}), **how)
    same(loop.run(METHOD, KEY, states[3], DATA, start=3, after=silent, **how), whole)


def test_passes_refuse_what_scan_refuses():
    with pytest.raises(BadInput, match="no example"):
        loop.passes(METHOD, KEY, START, DATA, passes=1, batch=5, per_pass=1, mask=np.zeros(N, bool))
    small = Perturbation(SHIFT.delta, SHIFT.row[:6], SHIFT.mask[:6])
    with pytest.raises(BadInput, match="no noise"):
        loop.passes(METHOD, KEY, START, DATA, passes=1, batch=5, per_pass=3, perturbation=small)


def test_mask_and_perturbation_are_honoured():
    mask = np.isin(np.arange(N), [1, 4, 6, 7, 10])
    shift = Perturbation(np.full((3, 4), 0.5, np.float32), np.asarray(DATA.y), np.arange(N) < 7)
    how = {"steps": 6, "batch": 5, "mask": mask, "perturbation": shift}
    scanned, ran = scan(METHOD, KEY, START, DATA, **how, draw=sets.uniform)[1], []
    loop.run(METHOD, KEY, START, DATA, every=6, after=lambda *call: ran.append(call[2]), **how)
    x = np.where(shift.mask[:, None], np.clip(DATA.x + np.float32(0.5), 0, 1), DATA.x)
    for info, replaced in ((scanned, True), (ran[0], False)):
        index = np.asarray(info["index"]).astype(int)
        assert set(index.ravel()) == {1, 4, 6, 7, 10}
        assert any(len(set(row)) < 5 for row in index) == replaced  # a shuffled pass over five has no repeats
        np.testing.assert_allclose(info["mean"], x[index].mean(axis=(1, 2)), rtol=1e-5)


def test_without_a_batch_every_step_gets_the_whole_set():
    shift = Perturbation(np.full((3, 4), 1.0, np.float32), np.asarray(DATA.y), np.ones(N, bool))
    _, info = scan(METHOD, KEY, START, DATA, steps=3, perturbation=shift)
    np.testing.assert_array_equal(info["index"], np.tile(np.arange(N), (3, 1)))
    np.testing.assert_array_equal(info["mean"], 1.0)  # noise of one saturates every pixel


@pytest.mark.parametrize(("bad", "value"), [("loss", "nan"), ("gap", "inf")])
def test_what_is_not_finite_is_named_before_anyone_sees_the_state(bad, value):
    def breaking(key, state, batch):
        spoilt = jnp.where(state.done >= 7, float(value), 1.0)
        loss, gap = (spoilt, 1.0) if bad == "loss" else (1.0, spoilt)
        return State(state.w, state.done + 1), {"loss": jnp.asarray(loss), "gap": jnp.stack([1.0, gap])}

    seen, method = [], Method(METHOD.init, breaking)
    with pytest.raises(NonFinite, match=f"{bad} became .*{value}.* at step 7"):
        loop.run(method, KEY, START, DATA, steps=20, every=5, batch=5, after=lambda done, *_: seen.append(done))
    assert seen == [5]


def test_a_mask_without_examples_is_refused():
    for drive in (loop.scan, lambda *given, **how: loop.run(*given, every=5, after=silent, **how)):
        with pytest.raises(BadInput, match="no example"):
            drive(METHOD, KEY, START, DATA, steps=5, batch=5, mask=np.zeros(N, bool))


def test_runs_off_the_grid_are_refused():
    for how, message in (
        ({"steps": 20, "every": 5, "start": 3}, "grid of 5"),
        ({"steps": -1, "every": 5}, "steps >= 0"),
        ({"steps": 5, "every": 0}, "every >= 1"),
    ):
        with pytest.raises(BadInput, match=message):
            loop.run(METHOD, KEY, START, DATA, batch=5, after=silent, **how)


# --- batches from the host ---------------------------------------------------------------------------------------


def drawn(start):
    """The batches of `scan`, on the host."""
    to_draw = jax.random.fold_in(KEY, zlib.crc32(b"draw"))
    return (jax.tree.map(np.asarray, sets.shuffled(to_draw, t, DATA, 5)) for t in range(start, STEPS))


def streamed(state=START, every=5, steps=STEPS, batches=drawn, **how):
    calls = []
    after = lambda *call: calls.append(call)  # noqa: E731
    return loop.stream(METHOD, KEY, state, batches, steps=steps, every=every, after=after, **how), calls


def test_stream_is_scan(straight):
    state, calls = streamed()
    same(state, straight[0])
    assert [done for done, _, _ in calls] == [5, 10, 15, 20]
    same(jax.tree.map(lambda *parts: np.concatenate(parts), *[info for _, _, info in calls]), straight[1])
    same(calls[-1][1], state)
    same(streamed(every=8)[0], state)  # whatever the grid: each step is a program of its own


def test_stream_joins_the_noise():
    _, info = scan(METHOD, KEY, START, DATA, steps=6, batch=5, perturbation=SHIFT)
    _, calls = streamed(steps=6, every=6, perturbation=SHIFT)
    same(calls[0][2]["mean"], info["mean"])
    small = Perturbation(SHIFT.delta, SHIFT.row[:6], SHIFT.mask[:6])
    with pytest.raises(BadInput, match="no noise"):
        streamed(perturbation=small)


def test_stream_resumes_to_the_bit(straight):
    stopped = loop.stream(
        METHOD, KEY, START, drawn, steps=STEPS, every=5, after=lambda done, *_: loop.STOP if done == 10 else None
    )
    assert stopped.done == 10
    state, calls = streamed(stopped, start=10)
    assert [done for done, _, _ in calls] == [15, 20]
    same(state, straight[0])
    assert streamed(state, start=STEPS, batches=None)[0] is state  # nothing left to do, nothing is read


def test_bytes_become_floats_on_the_device():
    x = np.random.default_rng(3).integers(0, 256, (5, 4), np.uint8)
    y, index = np.zeros(5, np.int32), np.arange(5, dtype=np.int32)
    both = [[Dataset(x, y, index)], [Dataset(np.asarray(sets.floats(x)), y, index)]]
    of_bytes, of_floats = (streamed(steps=1, every=1, batches=lambda _, given=given: given)[1][0][2] for given in both)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), of_bytes, of_floats)  # fused: other rounding


def test_stream_names_what_is_not_finite():
    def breaking(key, state, batch):
        return State(state.w, state.done + 1), {"loss": jnp.where(state.done >= 7, jnp.nan, 1.0)}

    seen, method = [], Method(METHOD.init, breaking)
    with pytest.raises(NonFinite, match="loss became nan at step 7") as error:
        loop.stream(method, KEY, START, drawn, steps=20, every=5, after=lambda done, *_: seen.append(done))
    assert seen == [5]
    assert error.value.kept.done == 5


def test_what_a_stream_refuses():
    for how, message in (
        ({"start": 3}, "grid of 5"),
        ({"every": 0}, "every >= 1"),
        ({"steps": STEPS + 1}, "end before step 20, of 21"),
    ):
        with pytest.raises(BadInput, match=message):
            streamed(**how)


@pytest.mark.parametrize("drive", ["run", "stream"])
def test_what_the_last_step_leaves_is_looked_at(drive):
    """A step reports the loss before it moves: the last move of all is seen in the state alone."""

    def step(key, state, batch):
        worse = jnp.where(state["done"] >= 3, jnp.inf, 1.0)
        return {"w": state["w"] * worse, "done": state["done"] + 1, "best": state["best"]}, {"loss": state["w"].sum()}

    method = Method(lambda: None, step)
    start = {"w": jnp.ones(2), "done": jnp.zeros((), jnp.int32), "best": jnp.zeros(())}
    data = sets.make(np.zeros((4, 1), np.float32), np.zeros(4, np.int32))

    def go(state):
        how = {"steps": 4, "every": 2, "after": lambda *_: None}
        if drive == "run":
            return loop.run(method, jax.random.key(0), state, data, batch=2, **how)
        return loop.stream(method, jax.random.key(0), state, lambda first: iter([data] * (4 - first)), **how)

    with pytest.raises(NonFinite, match="w became infinite or NaN after step 2") as error:
        go(start)
    assert error.value.kept["done"] == 2
    assert go({**start, "best": jnp.asarray(jnp.inf)})["done"] == 4  # an infinity of its own
