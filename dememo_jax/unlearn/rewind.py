"""Keep the weights of every epoch of an unlearning run, and go back to the one that forgot no more than it should."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import evaluate, models
from dememo_jax.errors import require
from dememo_jax.types import Array, Dataset, Info, Key, Model, Weights
from dememo_jax.unlearn.descent import Unlearner


class KeptState(NamedTuple):
    inner: Any
    kept: Weights  # of the end of each epoch, stacked [epochs, ...]


class Rewound(NamedTuple):
    epoch: int  # counted from 1
    weights: Weights
    forget_errors: tuple[float, ...]  # of each epoch
    held_out_error: float  # of the last


def keeping(method: Unlearner, epochs: int) -> Unlearner:
    """`method`, with its weights at the end of each of `epochs` in the state: so many times the memory of the network.

    The last place holds the end of the run, however many epochs follow.
    """
    require(epochs >= 1, f"epochs must be at least 1, got {epochs}")

    def init(key: Key, weights: Weights, data: Dataset, forget: Array) -> KeptState:
        inner = method.init(key, weights, data, forget)
        return KeptState(inner, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (epochs, *leaf.shape)), inner.weights))

    def step(key: Key, state: KeptState, data: Dataset) -> tuple[KeptState, Info]:
        inner, info = method.step(key, state.inner, data)
        at = jnp.minimum(state.inner.round, epochs - 1)
        kept = jax.tree.map(lambda all_, new: all_.at[at].set(new), state.kept, inner.weights)
        return KeptState(inner, kept), info

    def finish(state: KeptState) -> Weights:
        return method.finish(state.inner)

    def check(state: Any, data: Dataset) -> None:
        if method.check is not None:
            method.check(state.inner, data)

    return Unlearner(init, step, method.steps, finish, check)


def rewind(model: Model, method: Unlearner, state: KeptState, forgotten: Dataset, held_out: Dataset) -> Rewound:
    """SCRUB+R, Kurmanji et al. 2023: the epoch whose error on the forgotten examples is nearest to what it should be.

    That is the last epoch's error on `held_out` examples of the same kind, such as test images of the forgotten class:
    a network that errs more on the forgotten than on unseen ones stands out as much as one that errs less.
    method: the one made by `keeping`, whose state it is.
    """
    count = int(state.inner.round)
    require(count >= 1, "no epoch has ended yet: nothing to go back to")
    rows = range(min(count, len(jax.tree.leaves(state.kept)[0])))
    ends = [jax.tree.map(lambda leaf, i=i: leaf[i], state.kept) for i in rows]
    each = [method.finish(state._replace(inner=state.inner._replace(weights=weights))) for weights in ends]

    def error(weights: Weights, data: Dataset) -> float:
        return 1 - float(evaluate.accuracy(*models.freeze(model, weights), data))

    errors, wanted = [error(weights, forgotten) for weights in each], error(each[-1], held_out)
    at = int(np.argmin(np.abs(np.asarray(errors) - wanted)))
    return Rewound(at + 1, each[at], tuple(errors), wanted)
