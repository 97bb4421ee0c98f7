"""SISA, exact unlearning by sharded, isolated, sliced training: Bourtoule et al. 2021.

The examples are dealt into S shards, each with a network of its own, and a shard into R slices. Stage r (from 0) trains
the network of stage r - 1 on slices 0..r together, with a fresh optimiser; the networks vote. To delete an example is to
train one shard anew from its slice on; what comes out equals, bit for bit, what training from nothing on the remaining
examples with the same plan gives. For that everything that a stage does is a function of (key, shard, stage, remaining
indices of slices 0..r): fresh weights, data order, augmentation, batch-norm statistics, which are those of the stage's
own training.

What is not promised. Deletion is exact for requests that do not depend on the models released before: who chooses what
to delete after seeing them can tell (Gupta et al. 2021). Weights of earlier stages that saw the deleted examples are
still data about them until their names (`stale`) are purged from the store and from every copy. The bits are those of
one compiled program: between versions and devices, and on GPUs that choose algorithms by timing them, networks agree only
as far as arithmetic does. What is forgotten does not depend on it.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dememo_jax import data as sets
from dememo_jax import keys, train, tree
from dememo_jax.errors import NonFinite, require
from dememo_jax.types import Array, Dataset, Key, Method, Model, Weights
from dememo_jax.unlearn.shards import Plan, budget, capacity, check_deleted, check_left, passes, remaining


class Store(NamedTuple):
    """Where the weights of finished stages are kept, by name."""

    load: Callable[[str], Weights | None]  # None: not there, to be trained
    save: Callable[[str, Weights], None]


@dataclass(frozen=True)
class Ensemble:
    """The trained networks of all shards that have examples left."""

    weights: Weights  # every leaf stacked [S']
    shards: tuple[int, ...]  # [S'] the shard of each
    sizes: tuple[int, ...]  # [S'] remaining examples of each
    lost: tuple[int, ...]  # shards without examples, or whose networks would take no step: they have no network and no vote
    trained: tuple[tuple[int, int], ...]  # (shard, stage) that were trained now; all others came from the store


Names = dict[int, tuple[str, ...]]  # shard -> the name of each stage's weights, for the shards that are trained


# --- names -------------------------------------------------------------------------------------------------------


def names(key: Key, plan: Plan, *, epochs: int, batch: int, tag: str, deleted: Any = None, width: int = 1) -> Names:
    """The names of the stage weights that `fit` with these arguments makes or finds.

    Each is a digest of the key, the shard, the stage, the remaining indices of slices 0..stage, the name of the stage
    before (so of every shorter prefix), and all arguments that change the bits; `tag` stands for model, optimiser,
    method and data. A deletion leaves the names of the stages before its slice as they were.
    """
    deleted = check_deleted(deleted, len(plan.shard))
    width, each = _width(plan, width), budget(epochs, plan.slices)
    settings = f"{jax.random.key_impl(key)} {jax.random.key_data(key).tolist()} {batch} {width} {capacity(plan)} {tag}"
    work, found = passes(plan, epochs, deleted).sum(axis=1), Names()
    for shard in range(plan.shards):
        chain: list[str] = []
        for stage in range(plan.slices):
            at = remaining(plan, deleted, shard, stage)
            what = f"{chain[-1] if chain else settings} {shard} {stage} {each[stage]} {len(at)} "
            chain.append(hashlib.blake2b(what.encode() + at.astype("<i4").tobytes(), digest_size=16).hexdigest())
        if work[shard]:
            found[shard] = tuple(chain)
    return found


def stale(before: Names, after: Names) -> tuple[str, ...]:
    """Names that are of no more use after a deletion: weights that saw what was deleted, to be purged everywhere."""
    kept = {name for chain in after.values() for name in chain}
    return tuple(name for chain in before.values() for name in chain if name not in kept)


def memory_store(kept: dict[str, Weights] | None = None) -> Store:
    """A store in a dictionary, the caller's if given."""
    kept = {} if kept is None else kept
    return Store(kept.get, kept.__setitem__)


# --- training ----------------------------------------------------------------------------------------------------


def fit(
    key: Key, plan: Plan, data: Dataset, model: Model, tx: optax.GradientTransformation, *, epochs: int, batch: int,
    tag: str, deleted: Any = None, store: Store | None = None, width: int = 1, method: Method | None = None,
) -> Ensemble:  # fmt: skip
    """Train whatever stages the store does not hold; the rest is loaded. So is unlearning: the same call with a new mask.

    data: all N examples, deleted ones too; those are never read by a stage. tx: a fixed transform, begun anew at every
    stage (a schedule counts the steps of a stage). method: what steps, over a `train.TrainState`; `train.sgd(model, tx)`
    by default. Give the same object every time, and programs are shared.
    tag: names model, optimiser, method and data in the names of stored weights (`names`); two ensembles in one store
    that differ in any of them need different tags.
    width: how many shards train at once in one vmap. 1, one after another, is faster for convolutions on CPU. Shard s
    always has place s % width of its group; places whose stage is stored, or beyond the last shard, repeat another's
    data for no step, so that one shard alone goes through the same program to the same bits. Another width is another
    program, other bits, and other names.
    A stage whose slice has no example left takes no step; a shard that takes none at all has no network (`Ensemble.lost`):
    fresh weights would vote.
    BadInput for arguments that do not fit, NonFinite (keeping the stage before) when weights become infinite or NaN.
    """
    require(len(data.y) == len(plan.shard), f"the plan is for {len(plan.shard)} examples, the data has {len(data.y)}")
    require(batch >= 1, f"batch must be at least 1, got {batch}")
    deleted, width = check_left(plan, epochs, deleted), _width(plan, width)
    store = memory_store() if store is None else store
    wanted = names(key, plan, epochs=epochs, batch=batch, tag=tag, deleted=deleted, width=width)
    run = functools.partial(_stage, _sgd(model, tx) if method is None else method, tx, batch, data)
    current: dict[int, Weights] = {}
    trained: list[tuple[int, int]] = []
    for first in range(0, plan.shards, width):
        places = range(first, first + width)
        done = {shard: _newest(store, wanted[shard]) for shard in places if shard in wanted}
        for shard, (weights, stages) in done.items():
            current[shard] = weights if stages else _fresh(model, keys.at(keys.named(key, "init"), shard), data.x[:1])
        for stage, each in enumerate(budget(epochs, plan.slices)):
            due = [shard for shard, (_, stages) in done.items() if stages <= stage]
            if not due:
                continue
            lanes = [shard if shard in due else due[0] for shard in places]
            jobs = [_job(key, plan, deleted, s, stage, each if s == place else 0, batch) for s, place in zip(lanes, places)]
            after = run(_stack([current[shard] for shard in lanes]), _stack(jobs))
            for shard in due:
                made = jax.tree.map(lambda leaf, place=shard - first: leaf[place], after)
                current[shard] = _finite(made, current[shard], shard, stage)
                store.save(wanted[shard][stage], made)
                trained.append((shard, stage))
    sizes = tuple(len(remaining(plan, deleted, shard, plan.slices)) for shard in current)
    lost = tuple(shard for shard in range(plan.shards) if shard not in current)
    return Ensemble(_stack(list(current.values())), tuple(current), sizes, lost, tuple(trained))


class _Job(NamedTuple):
    """One stage of one shard."""

    key: Key
    at: Array  # [C] int32, what it trains on, filled up to the capacity
    size: Array  # how many they are
    steps: Array


def _job(key: Key, plan: Plan, deleted: np.ndarray, shard: int, stage: int, epochs: int, batch: int) -> _Job:
    at = remaining(plan, deleted, shard, stage)
    steps = sets.steps(len(at), batch, epochs) if (plan.slice[at] == stage).any() else 0
    padded = np.zeros(capacity(plan), np.int32)
    padded[: len(at)] = at
    own = keys.at(keys.at(keys.named(key, "stage"), shard), stage)
    return _Job(own, jnp.asarray(padded), jnp.asarray(len(at), jnp.int32), jnp.asarray(steps, jnp.int32))


@functools.partial(jax.jit, static_argnames=("method", "tx", "batch"))
def _stage(method: Method, tx: optax.GradientTransformation, batch: int, data: Dataset, begun: Weights, jobs: _Job) -> Weights:
    """One stage of as many shards as `jobs` has places; weights stacked in the same order."""

    def one(weights: Weights, job: _Job) -> Weights:
        to_draw, to_step = keys.named(job.key, "draw"), keys.named(job.key, "step")
        places = Dataset(job.at, job.at, job.at)
        there = jnp.arange(len(job.at)) < jnp.maximum(job.size, 1)

        def body(t, state):
            at = sets.shuffled(to_draw, t, places, batch, there).index
            return method.step(keys.at(to_step, t), state, sets.take(data, at))[0]

        return jax.lax.fori_loop(0, job.steps, body, train.start(tx, weights)).weights

    if len(jobs.size) > 1:
        return jax.vmap(one)(begun, jobs)
    return jax.tree.map(lambda leaf: leaf[None], one(*jax.tree.map(lambda leaf: leaf[0], (begun, jobs))))


@functools.partial(jax.jit, static_argnames="model")
def _fresh(model: Model, key: Key, x: Array) -> Weights:
    return model.init(key, jnp.zeros_like(x))  # the shape of the images only, lest an example stays in fresh weights


@functools.lru_cache(maxsize=64)
def _sgd(model: Model, tx: optax.GradientTransformation) -> Method:
    # One object for the same arguments, so that ensembles share compiled programs.
    return train.sgd(model, tx)


def _newest(store: Store, chain: tuple[str, ...]) -> tuple[Any, int]:
    """The weights of the last stage that the store holds, and how many stages they stand for."""
    for stage in reversed(range(len(chain))):
        weights = store.load(chain[stage])
        if weights is not None:
            return weights, stage + 1
    return None, 0


def _finite(made: Weights, before: Weights, shard: int, stage: int) -> Weights:
    if tree.finite(made):
        return made
    sentence = f"the weights of shard {shard} became infinite or NaN in stage {stage}"
    raise NonFinite(f"{sentence}; lower the learning rate or clip gradients", kept=before)


def _width(plan: Plan, width: int) -> int:
    require(width >= 1, f"width must be at least 1, got {width}")
    return min(width, plan.shards)


def _stack(trees: list) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
