"""Checkpoints: exact round trips, and falling back over every kind of damage."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dememo_jax import checkpoint, tree
from dememo_jax.errors import BadInput


class State(NamedTuple):
    params: Any
    stats: Any
    opt: Any
    forget: Any
    order: Any
    step: Any


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
META = {"rate": 0.1 + 0.2, "tiny": 5e-324, "third": 1 / 3, "big": 1e300, "name": "é", "none": None, "list": [1, 2.5, True]}


def make(seed):
    rng = np.random.default_rng(seed)
    params = {"dense": {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}, "half": jnp.ones(2, jnp.bfloat16) * seed}
    mask = jnp.asarray(rng.uniform(size=5) < 0.5)
    return State(params, (), TX.init(params), mask, jax.random.key(seed), jnp.asarray(seed, jnp.int32))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)  # NamedTuples and empty tuples survive as such
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def two(tmp_path):
    """A folder with checkpoints 10 and 20."""
    for step in (10, 20):
        checkpoint.save(tmp_path / "run", step, make(step), {"loss": step / 7})
    return tmp_path / "run"


def test_round_trip_and_the_two_newest(tmp_path):
    like = jax.eval_shape(lambda: make(0))
    assert checkpoint.newest(tmp_path / "none", like) == (None, ())
    for step in (3, 20, 100):
        checkpoint.save(tmp_path, step, make(step), {**META, "at": step})
    assert checkpoint.steps(tmp_path) == [100, 20]  # by number, not by name
    got, passed_over = checkpoint.newest(tmp_path, like)
    assert got.step == 100
    assert got.meta == {**META, "at": 100}  # floats to the last bit
    assert passed_over == ()
    assert_same(got.state, make(100))
    one = checkpoint.restore(tmp_path, 20, make(0))  # a tree of arrays serves as a template too
    assert_same(one.state, make(20))
    assert one.meta["at"] == 20
    # The key still makes the same numbers.
    assert float(jax.random.normal(got.state.order)) == float(jax.random.normal(jax.random.key(100)))


def damage(folder: Path, kind: str):
    """Spoil one checkpoint as a crash or a bad disk would."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "sums.json")
    largest = max(files, key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    if kind == "truncated":
        largest.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        middle = len(content) // 2
        largest.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif kind == "deleted":
        largest.unlink()
    elif kind == "unfinished":
        (folder / "sums.json").unlink()
    elif kind == "half sums":
        sums = (folder / "sums.json").read_text()
        (folder / "sums.json").write_text(sums[: len(sums) // 2])


KINDS = ["truncated", "flipped", "deleted", "unfinished", "half sums"]


@pytest.mark.parametrize("kind", KINDS)
def test_falls_back_over_damage(two, kind):
    damage(two / "20", kind)
    got, passed_over = checkpoint.newest(two, make(0))
    assert got.step == 10
    assert got.meta == {"loss": 10 / 7}
    assert_same(got.state, make(10))
    assert len(passed_over) == 1
    assert "checkpoint 20" in passed_over[0]
    assert ("never finished" if kind in ("unfinished", "half sums") else "damaged") in passed_over[0]
    assert checkpoint.steps(two) == [10]
    # The run goes on from 10 and comes by step 20 again.
    checkpoint.save(two, 20, make(21), {"loss": 0.25})
    got, passed_over = checkpoint.newest(two, make(0))
    assert (got.step, got.meta, passed_over) == (20, {"loss": 0.25}, ())
    assert_same(got.state, make(21))


def test_every_byte_counts(two):
    """A flip in any file of a checkpoint is seen, not only one in the arrays."""
    files = sorted(path for path in (two / "20").rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) > 3
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
        assert checkpoint._fault(two / "20") is not None, path.name
        path.write_bytes(content)
    assert checkpoint._fault(two / "20") is None


def test_nothing_whole_is_none(two):
    damage(two / "10", "flipped")
    damage(two / "20", "unfinished")
    got, passed_over = checkpoint.newest(two, make(0))
    assert got is None
    assert [said.split()[:2] for said in passed_over] == [["checkpoint", "20"], ["checkpoint", "10"]]
    assert checkpoint.steps(two) == []
    checkpoint.save(two, 10, make(10))  # and the run starts again
    assert checkpoint.newest(two, make(0))[0].step == 10


@pytest.mark.parametrize("name", ["runs [v2]", "a\\b", "[", "plain"])
def test_folders_of_any_name_keep_what_is_written(name, tmp_path):
    folder = tmp_path / name / "checkpoints"
    for step in (10, 20):
        checkpoint.save(folder, step, make(step), {"loss": step / 7})
    got, passed_over = checkpoint.newest(folder, make(0))
    assert (got.step, passed_over) == (20, ())
    assert_same(got.state, make(20))
    (tmp_path / name).rename(tmp_path / "moved")
    assert_same(checkpoint.restore(tmp_path / "moved" / "checkpoints", 10, make(0)).state, make(10))


def test_what_cannot_be_read_back_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PATTERN", set())  # as if the reason were not known
    with pytest.raises(OSError, match="cannot be read back"):
        checkpoint.save(tmp_path / "[x]", 3, make(3))
    assert checkpoint.whole(tmp_path / "[x]")[0] is None


def test_the_digest_is_that_of_the_values(two):
    got = checkpoint.restore(two, 20, make(0))
    assert got.digest == checkpoint.digest(two, 20) == tree.digest(make(20))
    assert checkpoint.digest(two, 10) != got.digest


def test_reading_moves_nothing(two):
    damage(two / "20", "flipped")
    before = sorted(two.parent.rglob("*"))
    step, faults = checkpoint.whole(two)
    assert (step, len(faults)) == (10, 1)
    assert sorted(two.parent.rglob("*")) == before


def test_another_tree_is_refused(two):
    state = make(20)
    others = {
        "shape": state._replace(step=jnp.zeros(3, jnp.int32)),
        "leaf": state._replace(stats={"mean": jnp.ones(2)}),
        "type": state._replace(params={**state.params, "half": jnp.ones(2, jnp.float32)}),
    }
    for other in others.values():
        with pytest.raises(BadInput, match="checkpoint 20"):
            checkpoint.restore(two, 20, other)


def test_what_a_kill_left_is_cleared_away(two):
    (two / "30.orbax-checkpoint-tmp").mkdir()
    checkpoint.save(two, 30, make(30))
    assert sorted(path.name for path in two.iterdir()) == ["20", "30"]


def test_the_logger_of_the_process_is_left_as_it_was(tmp_path):
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.INFO)
    try:
        checkpoint.save(tmp_path, 0, {"w": jnp.ones(2)})
        checkpoint.restore(tmp_path, 0, {"w": jnp.ones(2)})
        assert log.level == logging.INFO
    finally:
        log.setLevel(before)
