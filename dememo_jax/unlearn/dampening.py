"""Selective synaptic dampening: shrink the parameters that matter more to the forget set than to all data, Foster et al. 2024.

No training and no retained data: importances of all data can be computed once, when the model is released, and stored.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import curvature, keys, losses, models, tree
from dememo_jax import data as sets
from dememo_jax.errors import NonFinite, require
from dememo_jax.types import Apply, Array, Dataset, Key, Loss, Params


@dataclass(frozen=True)
class Dampening:
    """The dampened weights, and how much of the network was touched."""

    params: Params
    share: float  # of the parameters that were selected
    length: float  # l2 length of the step over all parameters
    relative: float  # the same divided by |theta|


def importance(
    apply: Apply,
    params: Params,
    data: Dataset,
    mask: Array | None = None,
    *,
    batch: int = 128,
    per: str = "batch",
    loss: Loss = losses.cross_entropy,
    key: Key | None = None,
) -> Params:
    """How much every parameter matters to the examples where `mask` [N]: a tree like `params`, never negative.

    per="batch", as published: the mean over batches of the squared gradient of the batch's mean loss, in evaluation mode,
    in order or shuffled by `key`; the last batch may be smaller. That is not the diagonal of the Fisher matrix: gradients
    cancel within a batch before they are squared, so the value falls with the batch, by up to its size, and grows where a
    small forget set makes one small batch. per="example" squares first (`curvature.fisher_diagonal`), storing `batch`
    gradients at a time, and does not depend on the batch. Compare importances of one kind and one batch only.
    May be called under jit, with a traced mask.
    """
    require(per in ("batch", "example"), f"per must be 'batch' or 'example', got {per!r}")
    apply = models.as_apply(apply)
    if key is not None:
        order = jax.random.permutation(keys.named(key, "importance"), len(data.y))
        data, mask = sets.take(data, order), None if mask is None else jnp.asarray(mask)[order]
    if per == "example":
        return curvature.fisher_diagonal(apply, params, data, mask=mask, loss=loss, batch=batch)

    def of_block(block, real):
        def mean(p):
            return jnp.where(real, loss(apply(p, block.x), block.y), 0.0).sum() / real.sum()

        return jax.tree.map(jnp.square, jax.grad(mean)(params))

    sums = curvature.total(of_block, data, mask=mask, batch=batch)
    members = len(data.y) if mask is None else jnp.asarray(mask).sum()
    batches = -(-members // min(batch, len(data.y)))
    return jax.tree.map(lambda leaf: leaf / batches, sums)


def dampen(
    params: Params, of_forget: Params, of_all: Params, *, alpha: float = 10.0, strength: float = 1.0
) -> tuple[Params, Params]:
    """Multiply by min(1, strength I_all / I_forget) where I_forget > alpha I_all; also the selection, a tree of bools.

    alpha and lambda (`strength`) of the paper. A parameter that neither set needs, both importances 0, stays.
    May be called under jit.
    """
    selected = jax.tree.map(lambda f, a: f > alpha * a, of_forget, of_all)

    def shrink(p, f, a, chosen):
        factor = jnp.minimum(1.0, strength * a / jnp.where(chosen, f, 1.0))
        return jnp.where(chosen, p * factor, p).astype(p.dtype)

    return jax.tree.map(shrink, params, of_forget, of_all, selected), selected


def ssd(
    apply: Apply,
    params: Params,
    data: Dataset,
    forget: Any,
    *,
    alpha: float = 10.0,
    strength: float = 1.0,
    stored: Params | None = None,
    batch: int = 128,
    per: str = "batch",
    loss: Loss = losses.cross_entropy,
    key: Key | None = None,
) -> Dampening:
    """Forget the examples where `forget` [N] by dampening: alpha 10 and strength 1 were published for ResNet-18.

    stored: importances of all data, forget set included, as `importance` gave them with the same `per`, `batch` and `loss`;
    the data outside the mask are then never looked at, and `data` may hold the forget set alone. The result depends
    strongly on alpha: search for it with this function, which is cheap, and look at `share`.
    Raises BadInput for unusable arguments; NonFinite where an importance is not finite.
    """
    require(math.isfinite(alpha) and alpha > 0, f"alpha must be finite and positive, got {alpha}")
    require(math.isfinite(strength) and strength >= 0, f"strength must be finite and not negative, got {strength}")
    tree.check_floating(params, "params")
    forget = _check_members(forget, len(data.y), alone=stored is not None)
    measure = partial(_importance, models.as_apply(apply), params, data, batch=batch, per=per, loss=loss, key=key)
    of_forget = measure(jnp.asarray(forget))
    of_all = measure() if stored is None else stored
    require(
        _shapes(of_all) == _shapes(params),
        "stored importances must have the structure and shapes of params: make them with `importance`",
    )
    for name, values in (("forget set", of_forget), ("data", of_all)):
        if not tree.finite(values):
            raise NonFinite(f"an importance of the {name} is not finite: look for NaN in the data or overflow in the loss")
    new, selected = dampen(params, of_forget, of_all, alpha=alpha, strength=strength)
    share = sum(int(leaf.sum()) for leaf in jax.tree.leaves(selected)) / tree.size(params)
    length, whole = float(tree.distance(new, params)), float(tree.norm(params))
    return Dampening(new, share, length, length / whole if whole > 0 else 0.0)


def _check_members(forget: Any, count: int, *, alone: bool) -> np.ndarray:
    forget = np.asarray(forget)
    everything = alone and forget.shape == (count,) and forget.dtype == bool and count > 0 and forget.all()
    return forget if everything else sets.check_forget(forget, count)


def _shapes(values: Params) -> list:
    return [(name, np.shape(leaf)) for name, leaf in zip(tree.names(values), jax.tree.leaves(values))]


_importance = jax.jit(importance, static_argnames=("batch", "per", "loss"))
