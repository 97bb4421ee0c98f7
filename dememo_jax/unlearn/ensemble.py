"""One network out of many: how the constituents of an ensemble vote, as an `Apply` that certificates and audits take."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from dememo_jax.errors import require
from dememo_jax.types import Apply, Array, Model, Params, Weights


def vote(
    model: Model, weights: Weights, *, how: str = "votes", sizes: Sequence[int] | None = None, floor: float = 1e-6
) -> tuple[Apply, Params]:
    """`(apply, params)` of the ensemble whose constituents are stacked in `weights`, every leaf [S, ...].

    `apply(params, x)` is the log of the aggregated probabilities, not below log(floor): [B, ...] -> [B, K]. "votes": the
    share of the constituents that put the class first, as Bourtoule et al. 2021 do; its gradient is zero, so an attack
    or a certificate by gradients wants "mean", the mean softmax. Of equal classes the first wins, as everywhere, in a
    constituent and in the vote. A constituent that says NaN makes the whole NaN, which is never right.
    sizes: weigh each constituent by its number of examples (`Ensemble.sizes`); by default all alike.
    params is `weights.params`, to be noised or clipped whole; the statistics are bound in `apply`. Constituents are gone
    through one after another (`jax.lax.map`), which suits convolutions on CPU.
    """
    require(how in ("votes", "mean"), f"how must be 'votes' or 'mean', got {how!r}")
    require(0 < floor < 1, f"floor must lie in (0, 1), got {floor}")
    count = len(jax.tree.leaves(weights.params)[0])
    shares = np.ones(count) if sizes is None else np.asarray(sizes, np.float64)
    require(shares.shape == (count,), f"need one size a constituent, [{count}]; got {shares.shape}")
    require((shares > 0).all(), f"sizes must be positive, got {shares.tolist()}")
    normed = jnp.asarray(shares / shares.sum(), jnp.float32)
    return Partial(_aggregate(model.apply, how, floor), weights.stats, normed), weights.params


@functools.lru_cache(maxsize=256)
def _aggregate(apply: Callable[[Weights, Array], Array], how: str, floor: float) -> Callable:
    # One function object a model, so that jit recognises the next ensemble of the same architecture.
    def says(logits: Array) -> Array:
        if how == "mean":
            return jax.nn.softmax(logits)
        first = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
        return jnp.where(jnp.isnan(logits).any(axis=-1, keepdims=True), jnp.nan, first)

    def aggregate(stats: Params, shares: Array, params: Params, x: Array) -> Array:
        each = jax.lax.map(lambda one: one[1] * says(apply(one[0], x)), (Weights(params, stats), shares))
        return jnp.log(jnp.maximum(each.sum(axis=0), floor))

    return aggregate
