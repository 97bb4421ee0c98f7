"""Unlearning in one step of influence functions or of Newton's method, at all parameters of a frozen network.

Theta minimised the mean loss over n examples, plus weight_decay / 2 |theta|^2. Leaving n_f of them out moves the minimum by
about +H^{-1} (1/n) sum_{forget} grad loss: Koh and Liang 2017, Guo et al. 2020. Equation (8) of the SoK prints a minus, which
would train on the forget set once more; its code adds.

A network is taken in evaluation mode, batch norm frozen (`models.freeze`); the statistics still remember what is forgotten.
Nothing here carries a certificate: networks are not convex, are rarely stationary, and the damping is a choice. How far a
step went is part of every result, as a step of no length forgets nothing and one of the length of theta is another network.
All arithmetic runs in full float32 at least, whatever the device would choose and the weights are stored in: the inverses
lose too many digits in less.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dememo_jax import curvature, losses, models, tree
from dememo_jax import data as sets
from dememo_jax.errors import NonFinite, require
from dememo_jax.types import Apply, Array, Dataset, Key, Loss, Params
from dememo_jax.unlearn import inverse
from dememo_jax.unlearn.inverse import Inverse, Solution

DIRECTIONS = ("difference", "forget", "newton")


@dataclass(frozen=True)
class Influence:
    """The weights after one step, and what is to be known of that step."""

    params: Params
    length: float  # l2 length of the step over all parameters
    relative: float  # the same divided by |theta|
    residual: float | None  # of the linear system, relative to its right-hand side; None where none was solved
    inverted: str  # such as "ggn of 450 examples + 0.001 I"
    warning: str | None  # why the step is not to be trusted, where that can be seen


def influence(
    apply: Apply,
    params: Params,
    data: Dataset,
    forget: Any,
    *,
    alpha: float = 1.0,
    variant: str = "fisher",
    damping: float = 1e-3,
    direction: str = "difference",
    weight_decay: float = 0.0,
    samples: int | None = None,
    block: int = 16,
    iterations: int = 100,
    tolerance: float = 1e-4,
    loss: Loss = losses.cross_entropy,
    batch: int = 128,
    key: Key | None = None,
) -> Influence:
    """theta + alpha (C + (damping + weight_decay) I)^{-1} v: forget the examples where `forget` [N], by one step.

    direction: v and the examples that C is of. "difference": grad L_D - grad L_{D_r}, which is the published
        (n_f / n) (g_f - g_r), over the retained: the step that the deletion causes, even where theta is not stationary.
        "forget": (1/n) sum_{forget} grad loss, over all data. "newton": -grad of the retained objective, weight decay
        included, over the retained: a full Newton step, which also trains on. At a stationary theta the first equals the
        last.
    variant: the inverse, as `unlearn.inverse` tells them: "fisher", "ggn", "hessian", "diagonal", "identity" (v itself),
        "published" (no inverse; SoK: alpha 0.3 to 7, a free scale). The last two use neither damping nor weight decay in C.
    damping: in units of the curvature, which shrinks as the loss does. weight_decay: the one theta was trained with.
    samples: how many examples C is taken from, drawn by `key` or spread evenly over the set without one; by default all,
        256 for "fisher", and for "published" N = 1000, the first in order.
    block: single gradients that stand in memory at once, twice over for "fisher"; block >= samples stores all of them.
    iterations, tolerance: where conjugate gradients stop; a residual above ten times the tolerance is a `warning`.
    batch: examples in one pass.
    Raises BadInput for unusable arguments, before any work; NonFinite where gradients or the step are not finite.
    """
    how = Inverse(variant, damping, weight_decay, samples, block, iterations, tolerance, loss, batch, key)
    require(direction in DIRECTIONS, f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    require(math.isfinite(alpha), f"alpha must be finite, got {alpha}")
    forget = sets.check_forget(forget, len(data.y))
    inverse.check(how, int((~forget).sum()) if direction != "forget" else len(forget))
    tree.check_floating(params, "params")
    apply, marked = models.as_apply(apply), jnp.asarray(forget)
    with jax.default_matmul_precision("highest"):
        wide = tree.widened(params)
        v = _direction(apply, wide, data, marked, weight_decay, kind=direction, loss=loss, batch=batch)
        _refuse_non_finite(v)
        over = np.ones_like(forget) if direction == "forget" else ~forget
        return _moved(params, alpha, inverse.solve(apply, wide, data, over, v, how))


def correct(
    apply: Apply,
    params: Params,
    before: Dataset,
    after: Dataset,
    changed: Any,
    *,
    order: int = 1,
    tau: float | None = None,
    variant: str = "ggn",
    damping: float = 1e-3,
    weight_decay: float = 0.0,
    samples: int | None = None,
    block: int = 16,
    iterations: int = 100,
    tolerance: float = 1e-4,
    loss: Loss = losses.cross_entropy,
    batch: int = 128,
    key: Key | None = None,
) -> Influence:
    """Replace features or labels in what was learnt: Warnecke et al. 2023, uncertified for networks.

    before, after: the data as trained on and as they should have been, one example a row in both; `changed` [N] marks the
    rows that differ, the only ones whose gradients are compared. With G = sum_{changed} grad loss(after) - grad loss(before),
    order 1 is theta - tau G, with `tau` their unlearning rate for that sum (2e-5 for 10,000 CIFAR-10 labels, ten steps).
    Order 2 is theta - H^{-1} G / n, with the curvature of the corrected data, all n of them, and the inverses of
    `influence`; it takes no tau. At a stationary point of a quadratic loss, order 2 with its Hessian is the retrained model.
    Raises as `influence`; the mask may cover all data, and must not be empty.
    """
    how = Inverse(variant, damping, weight_decay, samples, block, iterations, tolerance, loss, batch, key)
    changed = np.asarray(changed)
    _check_correction(params, before, after, changed, order, tau)
    inverse.check(how, len(changed))
    apply, marked = models.as_apply(apply), jnp.asarray(changed)
    with jax.default_matmul_precision("highest"):
        wide = tree.widened(params)
        v = _correction(apply, wide, before, after, marked, loss=loss, batch=batch)
        _refuse_non_finite(v)
        if tau is not None:
            return _moved(params, tau * len(changed), Solution(v, None, "identity", None))
        return _moved(params, 1.0, inverse.solve(apply, wide, after, np.ones_like(changed), v, how))


def _check_correction(params, before: Dataset, after: Dataset, changed: np.ndarray, order: int, tau: float | None) -> None:
    require(order in (1, 2), f"order must be 1 or 2, got {order}")
    require((tau is not None and math.isfinite(tau)) or order == 2, f"order 1 needs a finite rate tau, got {tau}")
    require(tau is None or order == 1, "order 2 has no rate: leave tau out")
    same = before.x.shape == after.x.shape and before.y.shape == after.y.shape
    require(same, f"both data sets must have one shape, got {before.x.shape} and {after.x.shape}")
    require(changed.shape == (len(before.y),) and changed.dtype == bool, "changed must be a boolean mask, one entry an example")
    require(changed.any(), "no example is marked as changed: there is nothing to correct")
    tree.check_floating(params, "params")


@partial(jax.jit, static_argnames=("kind", "loss", "batch"))
def _direction(apply, params, data, forget: Array, weight_decay, *, kind: str, loss: Loss, batch: int) -> Params:
    gradient = partial(curvature.mean_gradient, apply, params, data, loss=loss, batch=batch)
    share = forget.mean()
    if kind == "forget":
        return optax.tree.scale(share, gradient(mask=forget))
    retained = gradient(mask=~forget)
    if kind == "newton":
        return jax.tree.map(lambda g, p: -(g + weight_decay * p), retained, params)
    return jax.tree.map(lambda f, r: share * (f - r), gradient(mask=forget), retained)


@partial(jax.jit, static_argnames=("loss", "batch"))
def _correction(apply, params, before, after, changed: Array, *, loss: Loss, batch: int) -> Params:
    """-G / n."""
    old, new = (curvature.mean_gradient(apply, params, part, mask=changed, loss=loss, batch=batch) for part in (before, after))
    share = changed.mean()
    return jax.tree.map(lambda a, b: share * (a - b), old, new)


def _moved(params: Params, scale: float, solution: Solution) -> Influence:
    step = optax.tree.scale(scale, solution.found)
    length, whole = float(tree.norm(step)), float(tree.norm(params))
    if not math.isfinite(length):
        raise NonFinite(f"the step is not finite, with {solution.inverted}: raise damping", kept=params)
    relative = length / whole if whole > 0 else (math.inf if length > 0 else 0.0)
    return Influence(tree.add(params, step), length, relative, solution.residual, solution.inverted, solution.warning)


def _refuse_non_finite(gradient: Params) -> None:
    for name, leaf in zip(tree.names(gradient), jax.tree.leaves(gradient)):
        if not bool(jnp.isfinite(leaf).all()):
            raise NonFinite(f"the gradient at {name} is not finite: look for NaN in the data or overflow in the loss")
