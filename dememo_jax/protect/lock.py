"""Learnability lock: a secret affine map a class that makes images unlearnable, and that its owner can undo."""

import jax.numpy as jnp

from dememo_jax import data as sets
from dememo_jax import projected, train
from dememo_jax.protect import objectives, refine
from dememo_jax.protect.bilevel import BilevelState, Phase, Recipe, alternate, stored
from dememo_jax.train import Optimiser
from dememo_jax.types import Array, Dataset, Model, Perturbation

LOCK_SGD = train.clipped_sgd(0.05, 0.9, 1e-3)


def learnability_lock(
    model: Model,
    tx: Optimiser = LOCK_SGD,
    *,
    radius: float = 8 / 255,
    stride: float | None = None,
    classes: int = 10,
    learner_steps: int = 20,
    inner_steps: int = 1,
    batch: int = 128,
    passes: int = 50,
    stop: float | None = 0.1,
    sharpness: float = 0.0,
) -> Recipe:
    """The linear lock of Peng and Chen 2022: x' = W_y x + B_y, W in 1 +- radius/2 and B in +- radius/2, for every pixel.

    Error-minimizing: `learner_steps` batches of the surrogate, then a pass over the data for the lock, until the error is
    at most `stop`. Published, the lock is learned by SGD 0.1 with momentum; here by sign descent, the mean over a class's
    images in a batch. |x' - x| <= radius. The lock is `state.perturbation.delta` [K, 2, H, W, C], W - 1 and B; `finish`
    gives what it adds to each image, as every recipe does, and `unlock` undoes it. The i-ResNet lock is not built.
    """
    improve = refine.descent(
        objectives.minimizing(model),
        projected.linf(radius / 2),
        stride=radius / 20 if stride is None else stride,
        steps=inner_steps,
        sharpness=sharpness,
        box=False,
        join=affine,
    )
    recipe = alternate(
        model,
        lambda steps: train.sgd(model, train.optimiser(tx, steps)),
        improve,
        phases=(Phase(passes, learner_steps),),
        batch=batch,
        granularity="class",
        classes=classes,
        stop=stop,
        shape=lambda image: (2, *image),
        join=affine,
    )
    return recipe._replace(finish=added)


def affine(x: Array, lock: Array) -> Array:
    """Images [B, ...] through their locks [B, 2, ...]."""
    return x * (1 + lock[:, 0]) + lock[:, 1]


def unlock(x: Array, y: Array, lock: Array) -> Array:
    """The images [B, ...] that the lock [K, 2, ...] was put on: exact where nothing was clipped to [0, 1] or rounded."""
    own = lock[y]
    return (x - own[:, 1]) / (1 + own[:, 0])


def added(state: BilevelState, data: Dataset) -> Perturbation:
    """What the lock adds to each image, sample-wise, in half precision as all sample-wise noise."""
    locked = sets.perturb(data, state.perturbation, affine)
    return Perturbation(
        stored(locked.x - data.x, jnp.float16), jnp.arange(len(data.y), dtype=jnp.int32), state.perturbation.mask
    )
