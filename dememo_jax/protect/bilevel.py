"""One engine for perturbations that are learned against a network: alternate a learner and a perturbation pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dememo_jax import data as sets
from dememo_jax import keys, losses
from dememo_jax.types import Array, Dataset, Key, Method, Model, Perturbation, Weights

Refine = Callable[[Key, Weights, Dataset, Array], Array]  # key, weights, clean batch, noise [B, ...] -> noise [B, ...]


class BilevelState(NamedTuple):
    learner: Any  # its state has `weights`
    perturbation: Perturbation
    order: Key
    step: Array


def blank(data: Dataset, mask: Array | None, *, granularity: str, classes: int) -> Perturbation:
    """No noise yet: one row an example (`"sample"`) or one a class (`"class"`)."""
    sets.check_whole(data, classes)
    sample = granularity == "sample"
    rows = len(data.y) if sample else classes
    return Perturbation(
        delta=jnp.zeros((rows, *data.x.shape[1:]), data.x.dtype),
        row=jnp.arange(rows, dtype=jnp.int32) if sample else data.y,
        mask=jnp.ones(len(data.y), bool) if mask is None else jnp.asarray(mask, bool),
    )


def alternate(
    model: Model, learner: Method, refine: Refine, *, granularity: str, classes: int, learner_steps: int, batch: int
) -> Method:
    """Step: `learner_steps` batches of the learner on protected data, then one pass of `refine` over all data.

    The step gets the whole set. `init(key, data, mask=None)`: examples outside the mask are learned from as they are
    and get no noise. Sample-wise, a refined batch replaces its rows; class-wise, each row becomes the mean over the
    class's examples in the batch, batch after batch. Info: mean learner `loss`, and the `error` of the learner in
    evaluation mode on the protected data after the pass (the published stop test is error <= 0.01).
    """
    merge = _replace if granularity == "sample" else _average

    def init(key: Key, data: Dataset, mask: Array | None = None) -> BilevelState:
        start = learner.init(keys.named(key, "learner"), data.x[:1])
        noise = blank(data, mask, granularity=granularity, classes=classes)
        return BilevelState(start, noise, keys.named(key, "order"), jnp.zeros((), jnp.int32))

    def step(key: Key, state: BilevelState, data: Dataset) -> tuple[BilevelState, dict[str, Array]]:
        to_learn, to_refine = jax.random.split(key)

        def learn(current, t):
            t = state.step * learner_steps + t
            drawn = sets.perturb(sets.shuffled(state.order, t, data, batch), state.perturbation)
            return learner.step(keys.at(to_learn, t), current, drawn)

        trained, info = jax.lax.scan(learn, state.learner, jnp.arange(learner_steps))

        def improve(perturbation, job):
            number, at, real = job
            rows = jnp.where(perturbation.mask[at] & real, perturbation.row[at], len(perturbation.delta))  # beyond: dropped
            old = perturbation.delta[perturbation.row[at]]
            new = refine(keys.at(to_refine, number), trained.weights, sets.take(data, at), old)
            return perturbation._replace(delta=merge(perturbation.delta, rows, new)), None

        at, real = sets.blocks(len(data.y), batch)
        jobs = (jnp.arange(len(at)), jnp.asarray(at), jnp.asarray(real))
        perturbation = jax.lax.scan(improve, state.perturbation, jobs)[0]
        error = _error(model, trained.weights, data, perturbation, jnp.asarray(at))
        new = BilevelState(trained, perturbation, state.order, state.step + 1)
        return new, {"loss": info["loss"].mean(), "error": error}

    return Method(init, step)


def _replace(delta: Array, rows: Array, new: Array) -> Array:
    return delta.at[rows].set(new, mode="drop")


def _average(delta: Array, rows: Array, new: Array) -> Array:
    """The noise table with every row that `rows` names replaced by the mean of its new noise."""
    count = jnp.zeros((len(delta), *[1] * (delta.ndim - 1))).at[rows].add(1.0, mode="drop")
    total = jnp.zeros_like(delta).at[rows].add(new, mode="drop")
    return jnp.where(count > 0, total / jnp.maximum(count, 1), delta)


def _error(model: Model, weights: Weights, data: Dataset, perturbation: Perturbation, blocks: Array) -> Array:
    def wrong(at):
        examples = sets.perturb(sets.take(data, at), perturbation)
        return 1.0 - losses.correct(model.apply(weights, examples.x), examples.y)

    return jax.lax.map(wrong, blocks).ravel()[: len(data.y)].mean()
