"""Which weights may move while a network forgets: the salient ones, or those of the last layers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import curvature, models, tree
from dememo_jax.errors import require
from dememo_jax.types import Array, Dataset, Key, Model, Params, Weights

Trainable = Callable[[Key, Weights, Dataset, Array], Params]


def salient(model: Model, share: float, *, batch: int = 256) -> Trainable:
    """The `share` of all weights with the largest |sum of gradients over the forget set|: booleans in the shape of the leaves.

    In evaluation mode, absolute values taken of the sum, one ranking for the whole network; of equals the first in tree
    order count. Fan et al. 2024. All examples weigh alike; the published code adds up the means of its batches, so that those
    of a short last batch weigh more (32 + 8 images chose 3 % of the weights otherwise), and cuts `share` times the number of
    weights down where this rounds.
    """
    require(0 < share <= 1, f"share is the part of the weights that may move, in (0, 1]; got {share}")

    def trainable(key: Key, weights: Weights, data: Dataset, forget: Array) -> Params:
        apply, params = models.freeze(model, weights)
        grads = curvature.mean_gradient(apply, params, data, mask=forget, batch=batch)
        leaves, treedef = jax.tree.flatten(grads)
        size = jnp.concatenate([jnp.abs(leaf).ravel() for leaf in leaves])
        count = max(1, round(share * len(size)))
        chosen = jnp.zeros(len(size), bool).at[jnp.argsort(-size, stable=True)[:count]].set(True)
        cuts = jnp.split(chosen, np.cumsum([leaf.size for leaf in leaves])[:-1])
        return jax.tree.unflatten(treedef, [part.reshape(leaf.shape) for part, leaf in zip(cuts, leaves)])

    return trainable


def last_layers(model: Model, count: int) -> Trainable:
    """The weights of the last `count` layers in the order of use (`models.layers`): one boolean a leaf."""
    require(count >= 1, f"at least the last layer must be free to move, got {count}")

    def trainable(key: Key, weights: Weights, data: Dataset, forget: Array) -> Params:
        found = models.layers(*models.freeze(model, weights), data.x[:1])
        require(count <= len(found), f"the network has {len(found)} layers, so the last {count} cannot move alone")
        free = {name for group in found[-count:] for name in group}
        treedef = jax.tree.structure(weights.params)
        return jax.tree.unflatten(treedef, [jnp.asarray(name in free) for name in tree.names(weights.params)])

    return trainable
