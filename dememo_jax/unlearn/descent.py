"""Unlearning by descent: one engine that minimises a weighted sum of retain and forget losses; recipes inject the rest."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dememo_jax import data as sets
from dememo_jax import keys, losses, train
from dememo_jax.augment import Augment
from dememo_jax.errors import require
from dememo_jax.types import Array, Dataset, Key, Loss, Method, Model, Weights


class Term(NamedTuple):
    """One summand of the objective: `weight` times the mean `loss` of a batch from the retain or the forget set."""

    on: str  # "retain" or "forget"
    weight: float
    loss: Loss = losses.cross_entropy


class DescentState(NamedTuple):
    weights: Weights
    opt: Any
    forget: Array  # [N] bool
    order: Key
    step: Array


def descent(
    model: Model,
    tx: optax.GradientTransformation,
    *terms: Term,
    batch: int = 256,
    mode: str = "fit",
    augment: Augment | None = None,
    fresh: bool = False,
) -> Method:
    """Minimise the sum of `terms`, each on its own shuffled batches: a small forget set is never starved.

    init(key, weights, data, forget): `forget` is a mask [N] over `data`; with `fresh` the given weights only lend
    their place and the run starts from `model.init`. step(key, state, data) gets the whole set. Batch norm is updated
    on the batches (`mode="fit"`, as published) or left as it is (`"frozen"`). Info: one loss a term, unweighted, such as
    `retain_loss`, numbered where two terms share a set.
    Outside jit, init raises BadInput for a forget set that is empty or covers all data.
    """
    sides = [term.on for term in terms]
    require(sides and set(sides) <= {"retain", "forget"}, f"need terms on 'retain' or 'forget', got {sides}")
    names = [f"{side}_loss" + f"_{i}" * (sides.count(side) > 1) for i, side in enumerate(sides)]

    def init(key: Key, weights: Weights, data: Dataset, forget: Array) -> DescentState:
        if not isinstance(forget, jax.core.Tracer):
            sets.check_forget(forget, len(data.y))
        weights = model.init(keys.named(key, "weights"), data.x[:1]) if fresh else weights
        opt = tx.init(weights.params)
        return DescentState(weights, opt, jnp.asarray(forget, bool), keys.named(key, "order"), jnp.zeros((), jnp.int32))

    def step(key: Key, state: DescentState, data: Dataset) -> tuple[DescentState, dict[str, Array]]:
        def objective(params):
            weights, total = state.weights._replace(params=params), jnp.zeros(())
            info: dict[str, Array] = {}
            for i, term in enumerate(terms):
                mask = state.forget if term.on == "forget" else ~state.forget
                examples = sets.shuffled(keys.at(state.order, i), state.step, data, batch, mask)
                to_augment, to_fit = jax.random.split(keys.at(key, i))
                x = examples.x if augment is None else augment(to_augment, examples.x)
                logits, weights = train.forward(model, mode, weights, x, to_fit)
                value = term.loss(logits, examples.y).mean()
                total, info = total + term.weight * value, info | {names[i]: value}
            return total, (weights, info)

        grads, (weights, info) = jax.grad(objective, has_aux=True)(state.weights.params)
        weights, opt = train.update(tx, grads, state.opt, weights._replace(params=state.weights.params))
        return state._replace(weights=weights, opt=opt, step=state.step + 1), info

    return Method(init, step)


def retrain(model: Model, tx: optax.GradientTransformation, *, batch: int = 256, augment: Augment | None = None) -> Method:
    """Exact unlearning: fresh weights, trained on the retain set alone. The reference of every other method."""
    return descent(model, tx, Term("retain", 1.0), batch=batch, augment=augment, fresh=True)


def finetune(
    model: Model, tx: optax.GradientTransformation, *, batch: int = 256, mode: str = "fit", augment: Augment | None = None
) -> Method:
    """Descend on the retain set from the trained weights, with a fresh optimiser.

    Published for CIFAR-10: 10 epochs, SGD at a constant 0.01 (SoK Table 9: 0.015 or 0.03 at class level), momentum
    0.9, weight decay 5e-4, batch 256, batch norm updated, the training augmentation on.
    """
    return descent(model, tx, Term("retain", 1.0), batch=batch, mode=mode, augment=augment)


def gradient_ascent(
    model: Model, tx: optax.GradientTransformation, *, batch: int = 256, mode: str = "fit", augment: Augment | None = None
) -> Method:
    """Climb the loss of the forget set. Nothing holds the rest in place: the learning rate decides everything.

    Published for CIFAR-10: 5 epochs over the forget set, SGD at 1e-5 to 2e-4, momentum 0.9, weight decay 5e-4 (which
    still descends), batch 256, batch norm updated on the forget set, the training augmentation on.
    """
    return descent(model, tx, Term("forget", -1.0), batch=batch, mode=mode, augment=augment)
