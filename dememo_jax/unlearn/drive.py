"""Run an unlearning method to its end."""

from typing import Any

import jax
import numpy as np

from dememo_jax import data as sets
from dememo_jax import keys, loop
from dememo_jax.errors import require
from dememo_jax.types import Array, Dataset, Key, Method, Perturbation, Weights
from dememo_jax.unlearn.descent import Unlearner


def run(
    method: Unlearner,
    key: Key,
    weights: Weights,
    data: Dataset,
    forget: Array,
    *,
    epochs: int,
    perturbation: Perturbation | None = None,
    after: loop.After = lambda *_: None,
) -> Weights:
    """The weights after `epochs` of an unlearning method.

    Args:
        method: One of the recipes, or `descent`. Certified methods and one-step ones have no epochs: the guarantee of the
            first is for a number of steps (`loop.scan`), the second are functions.
        key: Of the whole run.
        weights: The trained weights.
        data: The whole set that they were trained on.
        forget: Mask [N] of the examples to forget.
        epochs: Rounds, as the method counts them: passes over the retain set, or over the forget set where it sees no other.
        perturbation: Noise that is joined to the data.
        after: As in `loop.run`, called after each epoch: `after(steps_done, state, info)`, which may return `loop.STOP`.

    Returns:
        The weights to use, `method.finish` of the last state.

    Raises:
        BadInput: For a method without epochs, no epoch, a mask that is empty, covers everything, or is of another length or
            type, and labels that the network has no outputs for; before any work. NonFinite as `loop.run`.

    Example:
        >>> forgot = unlearn.run(unlearn.finetune(model), key, weights, train, train.y == 3, epochs=3)
    """
    counted = isinstance(method, Unlearner)
    require(counted, f"expected an unlearning method with epochs, such as unlearn.finetune(model), got {type(method).__name__}")
    require(epochs >= 1, f"epochs must be at least 1, got {epochs}")
    mask = sets.check_forget(forget, len(data.y))
    counts = int(np.sum(mask)), int(np.sum(~mask))
    drive: Any = Method(method.init, method.step, method.check)
    state = jax.jit(method.init)(keys.named(key, "init"), weights, data, mask)
    state = loop.run(
        drive, keys.named(key, "steps"), state, data, steps=method.steps(*counts, epochs), every=method.steps(*counts, 1),
        after=after, perturbation=perturbation,
    )  # fmt: skip
    return method.finish(state)
