"""Training as a method."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dememo_jax import losses
from dememo_jax.augment import Augment
from dememo_jax.errors import require
from dememo_jax.types import Array, Dataset, Key, Loss, Method, Model, Weights


class TrainState(NamedTuple):
    weights: Weights
    opt: Any
    step: Array


def forward(model: Model, mode: str, weights: Weights, x: Array, key: Key) -> tuple[Array, Weights]:
    """Logits and the weights with their new statistics: `"fit"` updates them, `"frozen"` evaluates with them as they are."""
    require(mode in ("fit", "frozen"), f"mode must be 'fit' or 'frozen', got {mode!r}")
    return model.fit(weights, x, key) if mode == "fit" else (model.apply(weights, x), weights)


def update(tx: optax.GradientTransformation, grads: Any, opt: Any, weights: Weights) -> tuple[Weights, Any]:
    """One optax step on the params; the statistics stay."""
    updates, opt = tx.update(grads, opt, weights.params)
    return weights._replace(params=optax.apply_updates(weights.params, updates)), opt


@functools.lru_cache(maxsize=256)
def clipped_sgd(
    lr: float, momentum: float, weight_decay: float, cosine_steps: int | None = None
) -> optax.GradientTransformation:
    """The published codes' SGD: gradient clipped at norm 5, weight decay towards zero, momentum.

    At a constant rate, or falling to zero by a cosine. The same arguments give the same object, so that methods made
    of it share compiled programs.
    """
    rate = lr if cosine_steps is None else optax.cosine_decay_schedule(lr, cosine_steps)
    return optax.chain(optax.clip_by_global_norm(5.0), optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum))


def sgd(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    loss: Loss = losses.cross_entropy,
    augment: Augment | None = None,
    mode: str = "fit",
) -> Method:
    """Minibatch descent with any optax transform. `init(key, x)` for fresh weights, `start(tx, weights)` for given ones.

    Info: mean `loss` and `accuracy` of the batch, before the step.
    """

    def init(key: Key, x: Array) -> TrainState:
        return start(tx, model.init(key, x))

    def step(key: Key, state: TrainState, batch: Dataset) -> tuple[TrainState, dict[str, Array]]:
        to_augment, to_fit = jax.random.split(key)
        x = batch.x if augment is None else augment(to_augment, batch.x)

        def objective(params):
            logits, weights = forward(model, mode, state.weights._replace(params=params), x, to_fit)
            return loss(logits, batch.y).mean(), (logits, weights)

        (value, (logits, weights)), grads = jax.value_and_grad(objective, has_aux=True)(state.weights.params)
        weights, opt = update(tx, grads, state.opt, weights._replace(params=state.weights.params))
        info = {"loss": value, "accuracy": losses.correct(logits, batch.y).mean()}
        return TrainState(weights, opt, state.step + 1), info

    return Method(init, step)


def start(tx: optax.GradientTransformation, weights: Weights) -> TrainState:
    """The state that continues from given weights with a fresh optimiser."""
    return TrainState(weights, tx.init(weights.params), jnp.zeros((), jnp.int32))
