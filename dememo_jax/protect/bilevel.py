"""One engine for perturbations that are learned against a network: alternate a learner and a perturbation pass.

What the published methods differ in is injected: the learner (any Method whose state has `weights`), how a batch of
noise is refined (`refine.descent`), what belongs to an example or to a class, and the order of the work (`Phase`).
Data and noise stay on the device, and an outer iteration is one compiled program.
"""

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import data as sets
from dememo_jax import keys, losses
from dememo_jax.errors import BadInput, require
from dememo_jax.types import Array, Dataset, Info, Key, Method, Model, Perturbation, Weights

Granularity = Literal["sample", "class"]
# key, weights, context, clean batch, noise [B, ...], which examples are to have noise [B] -> noise [B, ...]
Refine = Callable[[Key, Weights, Any, Dataset, Array, Array], Array]
Join = Callable[[Array, Array], Array]  # images, noise -> protected images, before they are clipped to [0, 1]


class BilevelState(NamedTuple):
    learner: Any  # its state has `weights`
    perturbation: Perturbation
    order: Key
    step: Array


class Phase(NamedTuple):
    """So many outer iterations of one kind: the learner's batches first, then a pass that refines the noise."""

    iterations: int
    batches: int = 0  # of the learner in each iteration,
    epochs: float = 0.0  # or its passes over the data
    sees: Literal["clean", "protected", "refined"] = "protected"  # refined: each batch's noise is refined, then learned
    sweep: bool = True  # whether a pass refines the noise
    parts: int = 1  # an iteration's pass goes over one of so many parts of the data, in turn


class Recipe(NamedTuple):
    """A Method that makes a perturbation, and when it is done: after `steps` outer iterations, or at `error <= stop`.

    `init(key, data, mask=None)`; `step(key, state, data)` takes the whole set; `finish(state, data)` gives the noise.
    """

    init: Callable[..., Any]
    step: Callable[[Key, Any, Dataset], tuple[Any, Info]]
    steps: int
    stop: float | None
    finish: Callable[[Any, Dataset], Perturbation]


def blank(
    data: Dataset,
    mask: Array | None,
    *,
    granularity: Granularity,
    classes: int,
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple,
    dtype: Any = None,
) -> Perturbation:
    """No noise yet: one row an example (`"sample"`) or a class (`"class"`), of the shape that `shape` makes of an image's."""
    sets.check_whole(data, classes)
    sample = granularity == "sample"
    if not sample and not isinstance(data.y, jax.core.Tracer):
        absent = sorted(set(range(classes)) - set(np.unique(data.y).tolist()))
        require(not absent, f"class-wise noise needs examples of every class: none is of class {absent[:1]}; renumber them")
    rows = len(data.y) if sample else classes
    return Perturbation(
        delta=jnp.zeros((rows, *shape(data.x.shape[1:])), dtype or data.x.dtype),
        row=jnp.arange(rows, dtype=jnp.int32) if sample else data.y,
        mask=sets.check_mask(mask, len(data.y)),
    )


def still() -> Method:
    """A learner without a network, for noise that no network sees."""
    from_nothing = _Still(Weights((), ()))
    return Method(lambda key, x: from_nothing, lambda key, state, batch: (state, {}))


class _Still(NamedTuple):
    weights: Weights


def alternate(
    model: Model | None,
    learner: Callable[[int], Method],
    refine: Refine,
    *,
    phases: tuple[Phase, ...],
    batch: int,
    sweep_batch: int | None = None,
    granularity: Granularity = "sample",
    classes: int = 10,
    stop: float | None = None,
    portion: float = 1.0,
    shuffle: bool = False,
    begin: Callable[[Key, tuple[int, ...]], Array] | None = None,
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple,
    store: Any = jnp.float16,
    join: Join = operator.add,
    context: Callable[[Any, Dataset], Any] = lambda state, data: (),
    notice: Callable[[Any, Array], Any] = lambda state, error: state,
) -> Recipe:
    """The perturbation that `phases` of learning and refining make, from `begin(key, shape)` or from zeros.

    learner: from the number of steps that it will take in all to a Method, so that its rate can fall over the run.
    refine: new noise for a batch. Sample-wise it replaces the batch's rows; class-wise each row becomes the mean over the
    class's examples in the batch, batch after batch. Examples outside the mask are learned from as they are.
    context(learner_state, data): what `refine` needs to know of the whole set, made once before each pass.
    portion: work with a random share of the data only; a class that it misses gets no noise.
    shuffle: go over the data in another order in each pass.
    shape: of a row of noise, made of an image's.
    store: type of the sample-wise noise between passes, rounded towards zero; half precision is 0.004 grey levels fine
    at a budget of 8/255, and halves the memory. Class-wise noise is kept as it is.
    notice(learner_state, error): what the learner makes of the error after an iteration.

    Info, unless `model` is None: mean cross-entropy `loss` and `error` of the learner in evaluation mode on the protected
    data after the iteration. Always: `noise`, the mean absolute entry of the table.
    """
    require(phases and all(p.iterations >= 1 for p in phases), "name at least one phase, of at least one iteration each")
    require(batch >= 1 and (sweep_batch is None or sweep_batch >= 1), f"batches must have examples, got {batch}, {sweep_batch}")
    require(0 < portion <= 1, f"portion must lie in (0, 1], got {portion}")
    require(granularity in ("sample", "class"), f"granularity must be 'sample' or 'class', got {granularity!r}")
    require(model is not None or stop is None, "without a model no error is measured that could stop the run")
    plan = Plan(
        model, learner, refine, phases, batch, sweep_batch or batch, granularity, classes, portion, shuffle, begin, shape,
        store, join, context, notice,
    )  # fmt: skip
    steps = sum(phase.iterations for phase in phases)

    def init(key: Key, data: Dataset, mask: Array | None = None) -> BilevelState:
        return _init(plan, key, data, mask)

    def step(key: Key, state: BilevelState, data: Dataset) -> tuple[BilevelState, Info]:
        return _step(plan, key, state, data)

    return Recipe(init, step, steps, stop, lambda state, data: state.perturbation)


class Plan(NamedTuple):
    """What `alternate` was asked, in its order."""

    model: Model | None
    learner: Callable[[int], Method]
    refine: Refine
    phases: tuple[Phase, ...]
    batch: int
    sweep_batch: int
    granularity: Granularity
    classes: int
    portion: float
    shuffle: bool
    begin: Callable[[Key, tuple[int, ...]], Array] | None
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    store: Any
    join: Join
    context: Callable[[Any, Dataset], Any]
    notice: Callable[[Any, Array], Any]


def _method(plan: Plan, data: Dataset) -> Method:
    return plan.learner(sum(p.iterations * _batches(p, data, plan.batch) for p in plan.phases))


def _batches(phase: Phase, data: Dataset, batch: int) -> int:
    return phase.batches + math.ceil(phase.epochs * len(data.y) / batch)


def _init(plan: Plan, key: Key, data: Dataset, mask: Array | None = None) -> BilevelState:
    kind = plan.store if plan.granularity == "sample" else None
    table = blank(data, mask, granularity=plan.granularity, classes=plan.classes, shape=plan.shape, dtype=kind)
    if plan.begin is not None:
        drawn = stored(plan.begin(keys.named(key, "noise"), table.delta.shape), table.delta.dtype)
        worn = jnp.zeros(len(drawn), bool).at[table.row].max(table.mask)  # rows that some protected example has
        table = table._replace(delta=jnp.where(worn.reshape(-1, *[1] * (drawn.ndim - 1)), drawn, 0))
    start = _method(plan, data).init(keys.named(key, "learner"), data.x[:1])
    if plan.model is not None:
        _check_fits(plan.model, start.weights, data.x, plan.classes)
    return BilevelState(start, table, keys.named(key, "order"), jnp.zeros((), jnp.int32))


def _step(plan: Plan, key: Key, state: BilevelState, data: Dataset) -> tuple[BilevelState, Info]:
    to_learn, to_refine = jax.random.split(key)
    begun = learned_before = 0
    branches = []
    for phase in plan.phases:
        branches.append(partial(_iteration, plan, phase, begun, learned_before, to_learn, to_refine, data))
        begun += phase.iterations
        learned_before += phase.iterations * _batches(phase, data, plan.batch)
    ends = np.cumsum([phase.iterations for phase in plan.phases])[:-1]
    place = jnp.sum(state.step >= jnp.asarray(ends)) if len(ends) else 0
    learned, table = jax.lax.switch(place, branches, state)
    info = {"noise": jnp.abs(table.delta.astype(jnp.float32)).mean()}
    if plan.model is not None:
        loss, error = _measure(plan, learned.weights, data, table)
        info, learned = {**info, "loss": loss, "error": error}, plan.notice(learned, error)
    return BilevelState(learned, table, state.order, state.step + 1), info


def _iteration(plan, phase, begun, learned_before, to_learn, to_refine, data, state) -> tuple[Any, Perturbation]:
    """The learner and the noise after one iteration of a phase."""
    number = state.step - begun
    first = learned_before + number * _batches(phase, data, plan.batch)
    learned, table = _learn(plan, phase, to_learn, state, data, first)
    return learned, _sweep(plan, phase, to_refine, state.order, learned, table, data, number) if phase.sweep else table


def _learn(plan: Plan, phase: Phase, key: Key, state: BilevelState, data: Dataset, first: Array) -> tuple[Any, Perturbation]:
    """The learner's batches number `first` and on, and the noise, which changes where batches are refined as they come."""
    count = _batches(phase, data, plan.batch)
    if not count:
        return state.learner, state.perturbation
    method, within = _method(plan, data), None
    fresh = jnp.arange(plan.batch) < max(1, round(plan.portion * len(data.y)))  # a small set repeats within a batch
    if plan.portion < 1:
        within = jnp.zeros(len(data.y), bool).at[_chosen(plan, state.order, data)].set(True)

    def one(carry, t):
        learned, table = carry
        drawn = sets.shuffled(state.order, first + t, data, plan.batch, within)
        if phase.sees == "refined":
            to_refine, known = keys.named(keys.at(key, first + t), "refine"), plan.context(learned, data)
            table = _refined(plan, to_refine, learned, known, table, data, drawn.index, fresh)
        seen = drawn if phase.sees == "clean" else sets.perturb(drawn, table, plan.join)
        return (method.step(keys.at(key, first + t), learned, seen)[0], table), None

    return jax.lax.scan(one, (state.learner, state.perturbation), jnp.arange(count))[0]


def _sweep(plan, phase, key, order, learned, table, data, number) -> Perturbation:
    """The noise after a pass over one of the phase's parts of the data."""
    among = _chosen(plan, order, data)
    if plan.shuffle:
        among = jax.random.permutation(keys.at(keys.named(order, "sweep"), number // phase.parts), among)
    at, real = map(jnp.asarray, sets.blocks(len(among), plan.sweep_batch))
    known = plan.context(learned, data)

    def improve(block, table):
        return _refined(plan, keys.at(key, block), learned, known, table, data, among[at[block]], real[block])

    part = number % phase.parts if phase.parts > 1 else 0
    return jax.lax.fori_loop(part * len(at) // phase.parts, (part + 1) * len(at) // phase.parts, improve, table)


def _refined(plan, key, learned, known, table, data, at, real) -> Perturbation:
    """The noise after one batch, the examples at `at` that are `real`."""
    active = table.mask[at] & real
    rows = jnp.where(active, table.row[at], len(table.delta))  # beyond: dropped
    old = table.delta[table.row[at]].astype(data.x.dtype)
    new = plan.refine(key, learned.weights, known, sets.take(data, at), old, active)
    merge = _replace if plan.granularity == "sample" else _average
    return table._replace(delta=merge(table.delta, rows, new))


def _chosen(plan: Plan, order: Key, data: Dataset) -> Array:
    """Positions of the random share of the data that is worked with, the same throughout a run."""
    count = len(data.y)
    if plan.portion == 1:
        return jnp.arange(count)
    return jnp.sort(jax.random.permutation(keys.named(order, "portion"), count)[: max(1, round(plan.portion * count))])


def _check_fits(model: Model, weights: Weights, x: Array, classes: int) -> None:
    """BadInput unless the surrogate makes logits of the images, one a class at least."""
    image = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    try:
        logits = jax.eval_shape(model.apply, weights, image).shape
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"the surrogate does not take images of shape {list(x.shape[1:])}: {reason}") from error
    fits = len(logits) == 2 and logits[0] == 1 and logits[1] >= classes
    require(fits, f"the surrogate must give [B, {classes}] logits, one a class; for one image it gave {list(logits)}")


def stored(noise: Array, dtype: Any) -> Array:
    """Noise in the type of a table, rounded towards zero: rounding to half precision must not leave the ball."""
    rounded = noise.astype(dtype)
    if dtype != jnp.float16:
        return rounded
    beyond = jnp.abs(rounded.astype(noise.dtype)) > jnp.abs(noise)
    bits = jax.lax.bitcast_convert_type(rounded, jnp.uint16) - beyond.astype(jnp.uint16)  # one step nearer to zero
    return jax.lax.bitcast_convert_type(bits, jnp.float16)


def _replace(delta: Array, rows: Array, new: Array) -> Array:
    return delta.at[rows].set(stored(new, delta.dtype), mode="drop")


def _average(delta: Array, rows: Array, new: Array) -> Array:
    """The noise table with every row that `rows` names replaced by the mean of its new noise."""
    count = jnp.zeros((len(delta), *[1] * (delta.ndim - 1))).at[rows].add(1.0, mode="drop")
    total = jnp.zeros_like(delta).at[rows].add(new, mode="drop")
    return jnp.where(count > 0, total / jnp.maximum(count, 1), delta)


def _measure(plan: Plan, weights: Weights, data: Dataset, table: Perturbation) -> tuple[Array, Array]:
    """Mean cross-entropy and error on the protected data, in evaluation mode."""
    model = plan.model
    assert model is not None

    def measure(at):
        examples = sets.perturb(sets.take(data, at), table, plan.join)
        logits = model.apply(weights, examples.x)
        return losses.cross_entropy(logits, examples.y), 1.0 - losses.correct(logits, examples.y)

    each = jax.lax.map(measure, jnp.asarray(sets.blocks(len(data.y), plan.sweep_batch)[0]))
    loss, error = (values.ravel()[: len(data.y)].mean() for values in each)
    return loss, error
