"""Shards and slices of a data set: who belongs where, what each stage of SISA trains on, and what a deletion costs.

Bourtoule et al. 2021; the training is in `sharded`.
"""

import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from dememo_jax.errors import require
from dememo_jax.types import Key


class Plan(NamedTuple):
    """Which shard and slice every example belongs to, for the life of an ensemble; deletions are a mask [N] beside it."""

    shard: np.ndarray  # [N] int32 in 0..shards-1
    slice: np.ndarray  # [N] int32 in 0..slices-1
    shards: int
    slices: int


def deal(key: Key, count: int, *, shards: int, slices: int) -> Plan:
    """A uniformly random plan for `count` examples: shards of equal size up to one, and so their slices."""
    require(shards >= 1 and slices >= 1, f"need at least one shard and one slice, got {shards} and {slices}")
    require(shards * slices <= count, f"{shards} shards of {slices} slices need {shards * slices} examples, there are {count}")
    order, place = np.asarray(jax.random.permutation(key, count)), np.arange(count)
    shard, part = np.empty(count, np.int32), np.empty(count, np.int32)
    shard[order], part[order] = place % shards, place // shards % slices
    return Plan(shard, part, shards, slices)


def given(shard: Any, part: Any) -> Plan:
    """The plan of a given assignment: shard and slice of every example, [N] integers from 0.

    For owners who know what is likely to be deleted: examples that go together belong into one shard and a late slice.
    BadInput when a shard, or a slice of all shards, has no example.
    """
    shard, part = np.asarray(shard), np.asarray(part)
    for name, numbers in (("shard", shard), ("slice", part)):
        require(np.issubdtype(numbers.dtype, np.integer), f"{name} numbers must be integers, got {numbers.dtype}")
        require(numbers.ndim == 1 and len(numbers) == len(shard) > 0, f"{name} needs one number an example, [N]")
        missing = sorted(set(range(int(numbers.max()) + 1)) ^ set(np.unique(numbers).tolist()))
        require(not missing, f"{name} numbers must run from 0 without a gap; look at {missing[:5]}")
    return Plan(shard.astype(np.int32), part.astype(np.int32), int(shard.max()) + 1, int(part.max()) + 1)


def budget(epochs: int, slices: int) -> tuple[int, ...]:
    """Epochs of every stage, [R]: floor((r + 1) a) - floor(r a) with a = 2 epochs / (R + 1).

    About as many example passes as `epochs` over the whole shard. A stage may have none.
    """
    require(epochs >= 1 and slices >= 1, f"need at least one epoch and one slice, got {epochs} and {slices}")
    ends = [2 * epochs * r // (slices + 1) for r in range(slices + 1)]
    return tuple(b - a for a, b in itertools.pairwise(ends))


def check_deleted(deleted: Any, count: int) -> np.ndarray:
    """The deletions as a mask, bool [count], none for None; BadInput when it covers everything or has another shape."""
    if deleted is None:
        return np.zeros(count, bool)
    deleted = np.asarray(deleted)
    require(deleted.shape == (count,), f"a deletion mask must have one entry an example, [{count}]; got {deleted.shape}")
    require(deleted.dtype == bool, f"a deletion mask must be boolean, got {deleted.dtype}")
    require(not deleted.all(), "the deletions cover all data: nothing would be left to train on")
    return deleted


def remaining(plan: Plan, deleted: np.ndarray, shard: int, stage: int) -> np.ndarray:
    """Sorted indices of what a stage trains on: the examples of slices 0..stage of its shard that are not deleted."""
    return np.flatnonzero((plan.shard == shard) & (plan.slice <= stage) & ~deleted).astype(np.int32)


def capacity(plan: Plan) -> int:
    """The size of the largest shard: of the plan alone, so that deletions change no shape and no draw."""
    return int(np.bincount(plan.shard).max())


def passes(plan: Plan, epochs: int, deleted: Any = None) -> np.ndarray:
    """Example passes of every stage, [S, R]: epochs times remaining examples of slices 0..r, none when slice r has none."""
    deleted = check_deleted(deleted, len(plan.shard))
    counts = np.zeros((plan.shards, plan.slices), np.int64)
    np.add.at(counts, (plan.shard[~deleted], plan.slice[~deleted]), 1)
    return np.where(counts > 0, counts.cumsum(axis=1) * np.asarray(budget(epochs, plan.slices)), 0)


def check_left(plan: Plan, epochs: int, deleted: Any = None) -> np.ndarray:
    """The deletions as a mask, as `check_deleted`; BadInput also where rounding leaves no network an example pass."""
    deleted = check_deleted(deleted, len(plan.shard))
    few = f"{(~deleted).sum():,} examples left in {plan.shards} shards of {plan.slices} slices, {epochs} epoch(s)"
    require(passes(plan, epochs, deleted).any(), f"no network would be trained ({few}): raise epochs, or take fewer slices")
    return deleted


def expected_cost(shards: int, slices: int, epochs: int | None = None) -> float:
    """Expected cost of one uniform request as a share of the example passes of full training, for equal slices.

    (1 / S) (2 R + 1) / (3 R) when the stages have equally many epochs: slices save a third at most. With `epochs`, of the
    budget as it is rounded. The deleted example itself, a share 1 / N, is not taken off.
    """
    require(shards >= 1 and slices >= 1, f"need at least one shard and one slice, got {shards} and {slices}")
    if epochs is None:
        return (2 * slices + 1) / (3 * slices * shards)
    stages = [each * (r + 1) for r, each in enumerate(budget(epochs, slices))]
    return sum(sum(stages[r:]) for r in range(slices)) / (slices * shards * sum(stages))
