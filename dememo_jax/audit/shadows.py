"""Shadow models: many networks of one recipe on many masks of one data set, in one program.

Model m is a function of `(key, m, its mask)` alone: fresh weights from `keys.named(keys.at(key, m), "init")`, batches and
steps from `"train"`. So models can be trained in any order, on any number of devices, in parts, and more of them later.

How many go into one vmap (`width`) decides the speed. A vmap over weights turns dense layers into batched matrix products,
and a small network's hundred little operations a step are paid once for all. It turns convolutions into grouped
convolutions, which XLA's CPU backend runs several times slower than one network after another. On accelerators a vmap
fills the device. `usual_width` knows this, `calibrate` times it; the choice changes results only as far as sums are
rounded otherwise.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import callbacks, evaluate, keys, loop, losses, models, montecarlo, tree
from dememo_jax import data as sets
from dememo_jax import mesh as meshes
from dememo_jax.audit.lanes import each, lowered, usual_lanes
from dememo_jax.audit.splits import check_masks, groups
from dememo_jax.errors import NonFinite, require
from dememo_jax.types import Array, Dataset, Key, Loss, Method, Model, Weights

WIDTHS = (8, 32)  # networks in one vmap that `calibrate` tries
TRIAL = 4  # steps of one of its trials
# Unlearning of one network: (key, weights, the examples it was trained on, which of them to forget [n]) -> weights.
Then = Callable[[Key, Weights, Dataset, Array], Weights]
Advance = Callable[[int, int], Any]  # models finished, of how many


class Group(NamedTuple):
    """Networks that were trained together."""

    rows: np.ndarray  # [W] which models
    weights: Weights  # every leaf [W, ...]


# --- training ----------------------------------------------------------------------------------------------------


def train_shadows(
    key: Key,
    model: Model,
    method: Method,
    data: Dataset,
    masks: Any,
    *,
    passes: int,
    batch: int,
    width: int | None = None,
    over: jax.sharding.Mesh | None = None,
    skip: Sequence[int] = (),
) -> Iterator[Group]:
    """Train model m on the examples of `masks[m]`, m = 0..M-1, and yield the finished ones group by group.

    method: what steps, over a `train.TrainState`, such as `train.sgd(model, tx)`; the same object every time shares
        compiled programs. passes: shuffled passes over a model's own examples, in batches of `batch`.
    width: networks in one vmap; None is `usual_width`. Groups have `width` times the number of devices of `over`
        rows, of models with equally many examples; the last of them may be shorter.
    skip: rows that are not wanted, such as those that an earlier process finished. Groups do not depend on it, so what
        is resumed equals what was not interrupted.
    A model equals `loop.scan(method, keys.named(keys.at(key, m), "train"), method.init(keys.named(keys.at(key, m), "init"),
    data.x[:1]), data, mask=masks[m], ...)`, up to rounding where the width is not 1.
    Raises BadInput for masks that do not fit, NonFinite naming the model whose loss became infinite or NaN.
    """
    masks = check_masks(masks, len(data.y))
    require(passes >= 1 and batch >= 1, f"need at least one pass and one example a batch, got {passes} and {batch}")
    require(width is None or width >= 1, f"width must be at least 1, got {width}")
    if width is None:
        width = usual_width(key, model, method, data, masks, batch=batch, over=over)
    return _trained(key, method, data, masks, passes, batch, width, over, frozenset(skip))


def _trained(key, method, data, masks, passes, batch, width, over, skip) -> Iterator[Group]:
    for rows in groups(masks, width * (1 if over is None else over.size)):
        if skip.issuperset(rows.tolist()):
            continue
        per_pass = sets.steps(int(masks[rows[0]].sum()), batch, 1)
        state, losses_ = _run(key, method, data, masks, rows, passes, batch, per_pass, width, over)
        bad = ~np.isfinite(losses_)
        if bad.any():
            worst = int(np.flatnonzero(bad.any(axis=1))[0])
            at = int(np.argmax(bad[worst]))
            raise NonFinite(f"the loss of shadow model {rows[worst]} became {losses_[worst, at]} in pass {at}; lower the rate")
        yield Group(rows, _first(state.weights, len(rows)))


def _run(key, method, data, masks, rows, passes, batch, per_pass, width, over) -> tuple[Any, np.ndarray]:
    """States [W', ...] and losses [W, passes] of one group; rows are repeated up to a whole number of vmaps."""
    filled = meshes.padded(rows, min(len(rows), width) * (1 if over is None else over.size))
    how: dict[str, Any] = {"method": method, "passes": passes, "batch": batch, "per_pass": per_pass}
    state, found = each(partial(_learn, **how), (key, data), (filled, masks[filled]), width=width, over=over, gather=False)
    return state, np.asarray(found)[: len(rows)]


def _learn(shared, lane, *, method, passes, batch, per_pass):
    (key, data), (row, mask) = shared, lane
    own = keys.at(key, row)
    state = method.init(keys.named(own, "init"), data.x[:1])
    how = {"passes": passes, "batch": batch, "per_pass": per_pass, "mask": mask}
    state, info = loop.passes(method, keys.named(own, "train"), state, data, **how)
    return state, info["loss"].mean(axis=1)


def usual_width(
    key: Key, model: Model, method: Method, data: Dataset, masks: Any, *, batch: int, over: jax.sharding.Mesh | None = None
) -> int:
    """Networks in one vmap when nobody says: one by one for convolutions on CPU, else as many as fit in memory, at most 32."""
    masks = check_masks(masks, len(data.y))
    params = jax.eval_shape(model.init, key, data.x[:1]).params
    if jax.default_backend() == "cpu":
        copies = montecarlo.scratch() // (4 * 4 * tree.size(params))  # weights, gradients, two of an optimiser
        return max(1, min(usual_lanes(params, WIDTHS[-1]), copies))
    trial = _Trial(key, method, data, masks, batch, over)
    fitting = (width for width in (*reversed(WIDTHS), 1) if width == 1 or trial.scratch(width) <= montecarlo.scratch())
    return int(meshes.agreed(next(fitting), over))


def calibrate(
    key: Key, model: Model, method: Method, data: Dataset, masks: Any, *, batch: int, over: jax.sharding.Mesh | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[int, tuple[tuple[int, float], ...]]:  # fmt: skip
    """The fastest width, and (width, seconds for a step of one network) of those tried: wider and wider while that is faster.

    Compiles a program for each, so it is worth its time for long trainings only. A width is not tried when its program would
    need more scratch memory than a device has to spare.
    """
    trial = _Trial(key, method, data, check_masks(masks, len(data.y)), batch, over)
    tried: list[tuple[int, float]] = []
    for width in (1, *WIDTHS):
        if width > 1 and trial.scratch(width) > montecarlo.scratch():
            break
        tried.append((width, meshes.agreed(trial.seconds(width, clock), over)))
        if len(tried) > 1 and tried[-1][1] > tried[-2][1]:
            break
    return min(tried, key=lambda pair: pair[1])[0], tuple(tried)


class _Trial(NamedTuple):
    """A few steps of as many networks as `width` asks for."""

    key: Key
    method: Method
    data: Dataset
    masks: np.ndarray
    batch: int
    over: jax.sharding.Mesh | None

    def arguments(self, width: int) -> tuple[tuple, dict[str, Any]]:
        rows = np.arange(width * (1 if self.over is None else self.over.size)) % len(self.masks)
        fn = partial(_learn, method=self.method, passes=1, batch=self.batch, per_pass=TRIAL)
        return (fn, (self.key, self.data), (rows, self.masks[rows])), {"width": width, "over": self.over, "gather": False}

    def scratch(self, width: int) -> int:
        arguments, how = self.arguments(width)
        analysis = lowered(*arguments, **how).compile().memory_analysis()
        return 0 if analysis is None else analysis.temp_size_in_bytes

    def seconds(self, width: int, clock: Callable[[], float]) -> float:
        arguments, how = self.arguments(width)
        jax.block_until_ready(each(*arguments, **how))  # compiles outside the clock
        took = float("inf")
        for _ in range(3):
            begun = clock()
            jax.block_until_ready(each(*arguments, **how))
            took = min(took, clock() - begun)
        return took / len(arguments[2][0]) / TRIAL


# --- unlearning --------------------------------------------------------------------------------------------------


def then_unlearn(
    key: Key, group: Group, then: Then, data: Dataset, masks: Any, forget: Any, *, width: int = 1,
    over: jax.sharding.Mesh | None = None,
) -> Group:  # fmt: skip
    """The networks of a group after each has unlearned its own `forget[m]`.

    Each gets the examples it was trained on, and no others: (its key, its weights, its data [n], forget [n]). All masks of a
    group have one size, so that it is one program. `then` is any pure function; `descended` makes one of an unlearning method.
    forget: [N] for all, or [M, N]. Raises BadInput for a model that has nothing to forget or nothing to retain.
    """
    masks = check_masks(masks, len(data.y))
    forget = np.asarray(forget)
    require(forget.dtype == bool, f"forget must be boolean, got {forget.dtype}")
    fits = forget.shape in (masks.shape, masks.shape[1:])
    require(fits, f"forget must be a mask [{masks.shape[1]}], or {list(masks.shape)} with a row a model; got {forget.shape}")
    forget = np.broadcast_to(forget, masks.shape)
    own, kept = (masks & forget)[group.rows].sum(axis=1), (masks & ~forget)[group.rows].sum(axis=1)
    for row, gone, left in zip(group.rows, own, kept):
        require(gone and left, f"model {row} was trained on {gone} examples to forget and {left} others; it needs some of both")
    require(len(set(own.tolist())) == 1 and len(set(kept.tolist())) == 1, "the models of a group must forget equally many")
    rows = meshes.padded(np.arange(len(group.rows)), 1 if over is None else over.size)
    at = group.rows[rows]
    lanes = (at, jax.tree.map(lambda leaf: np.asarray(leaf)[rows] if over is not None else leaf[rows], group.weights))
    fn = partial(_forget, then=then, count=int(own[0] + kept[0]))
    weights = each(fn, (key, data), (*lanes, masks[at], forget[at]), width=width, over=over, gather=False)
    return Group(group.rows, _first(weights, len(group.rows)))


def _first(weights: Weights, count: int) -> Weights:
    return jax.tree.map(lambda leaf: leaf[:count], weights)


def _forget(shared, lane, *, then, count):
    (key, data), (row, weights, mask, forget) = shared, lane
    at = jnp.nonzero(mask, size=count)[0]
    return then(keys.named(keys.at(key, row), "unlearn"), weights, sets.take(data, at), forget[at])


def descended(method: Any, steps: int) -> Then:
    """`then` of an unlearning method over the whole set, run for so many steps, and finished where it has a `finish`."""

    def then(key: Key, weights: Weights, data: Dataset, forget: Array) -> Weights:
        state = method.init(keys.named(key, "init"), weights, data, forget)
        state, _ = loop.scan(method, keys.named(key, "steps"), state, data, steps=steps)
        return state.weights if getattr(method, "finish", None) is None else method.finish(state)

    return then


# --- scores ------------------------------------------------------------------------------------------------------


def score(
    model: Model, weights: Weights, data: Dataset, *, loss: Loss = losses.margin, width: int = 1,
    over: jax.sharding.Mesh | None = None,
) -> np.ndarray:  # fmt: skip
    """Scores [W, N] of stacked networks on every example: by default log p_y - log(1 - p_y), without overflow.

    Raises NonFinite, naming the network's place, for scores that are NaN or infinite.
    """
    count = len(jax.tree.leaves(weights)[0])
    rows = meshes.padded(np.arange(count), 1 if over is None else over.size)
    lanes = weights if len(rows) == count else jax.tree.map(lambda leaf: np.asarray(leaf)[rows], weights)
    found = np.asarray(each(partial(_score, model=model, loss=loss), data, lanes, width=width, over=over))[:count]
    bad = ~np.isfinite(found).all(axis=1)
    if bad.any():
        raise NonFinite(
            f"network {int(np.argmax(bad))} of {count} has scores that are NaN or infinite; lower the learning rate"
        )
    return found


def _score(data, weights, *, model, loss):
    return loss(evaluate.logits(*models.freeze(model, weights), data.x), data.y)


def shadow_scores(
    key: Key, model: Model, method: Method, data: Dataset, masks: Any, evaluation: Dataset | None = None, *,
    loss: Loss = losses.margin, width: int | None = None, after: Advance | None = None, **how: Any,
) -> np.ndarray:  # fmt: skip
    """Scores [M, N'] of shadow models on `evaluation`, by default the data itself; other arguments as `train_shadows`.

    `after(done, of)` is told when a group ends.
    """
    masks = check_masks(masks, len(data.y))
    evaluation = data if evaluation is None else evaluation
    over = how.get("over")
    if width is None:
        width = usual_width(key, model, method, data, masks, batch=how["batch"], over=over)
    found = np.full((len(masks), len(evaluation.y)), np.nan, np.float32)
    done = 0
    for group in train_shadows(key, model, method, data, masks, width=width, **how):
        found[group.rows] = score(model, group.weights, evaluation, loss=loss, width=width, over=over)
        done += len(group.rows)
        if after is not None:
            callbacks.reports(after(done, len(masks)))
    return found
