"""The inverses that one-step unlearning multiplies by: (C + shift I)^{-1} v for a curvature C of a network.

C is the mean over chosen examples of the per-example curvature, at all parameters. With m examples and P parameters:

- "fisher": the empirical Fisher (1/m) G^T G of m single gradients, G [m, P], inverted exactly by Woodbury's identity,
  (1/shift) [v - G^T (m shift I + G G^T)^{-1} G v], Singh and Alistarh 2020. G itself is never stored: the Gram matrix G G^T
  [m, m] is built from blocks of gradients, two blocks in memory at a time, (b^2 + b) / 2 blocks computed for b = m / block;
  G v is one forward-mode pass and G^T w one backward pass.
- "ggn", "hessian": conjugate gradients on curvature products; nothing of size m or P^2 is stored.
- "diagonal": division by the mean squares of single gradients.
- "identity": v itself. "published": v less a multiple of one gradient; see `published`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.linalg import cho_factor, cho_solve

from dememo_jax import curvature, keys, tree
from dememo_jax import data as sets
from dememo_jax.errors import require
from dememo_jax.types import Apply, Array, Dataset, Key, Loss, Params

FISHER, PUBLISHED = 256, 1000  # samples when nobody says; "published" goes on to PUBLISHED + 2
POSITIVE = ("fisher", "diagonal")  # singular without damping
PRODUCTS = {"ggn": curvature.ggn_product, "hessian": curvature.hessian_product}
VARIANTS = ("fisher", "ggn", "hessian", "diagonal", "identity", "published")


class Inverse(NamedTuple):
    """How to invert: the arguments that `influence` and `correct` share; they are described there."""

    variant: str
    damping: float
    decay: float
    samples: int | None
    block: int
    iterations: int
    tolerance: float
    loss: Loss
    batch: int
    key: Key | None


class Solution(NamedTuple):
    found: Params
    residual: float | None  # |A found - v| / |v| as computed; None where nothing was solved
    inverted: str
    warning: str | None


def check(how: Inverse, count: int) -> None:
    """BadInput unless the inverse can be taken over a curvature of `count` examples."""
    require(how.variant in VARIANTS, f"variant must be one of {', '.join(VARIANTS)}, got {how.variant!r}")
    finite = np.isfinite(how.damping) and np.isfinite(how.decay)
    require(finite and how.damping >= 0, f"damping must be finite and not negative, got {how.damping}")
    require(finite and how.decay >= 0, f"weight_decay must be finite and not negative, got {how.decay}")
    singular = how.variant in POSITIVE
    require(not singular or how.damping > 0, f"variant {how.variant!r} needs damping > 0: the curvature alone is singular")
    require(how.samples is None or how.samples >= 1, f"samples must be at least 1, got {how.samples}")
    few = how.samples is None or how.samples <= count
    require(few, f"samples={how.samples} are more than the {count} examples the curvature is of: pass samples={count} or fewer")
    require(how.block >= 1 and how.batch >= 1, f"block and batch must be at least 1, got {how.block} and {how.batch}")
    require(how.iterations >= 1 and how.tolerance > 0, "conjugate gradients need iterations >= 1 and a positive tolerance")


def solve(apply: Apply, params: Params, data: Dataset, mask: np.ndarray, vector: Params, how: Inverse) -> Solution:
    """(C + (damping + decay) I)^{-1} vector, with C over the examples where `mask` [N] or over `samples` of them."""
    shift, kind = how.damping + how.decay, how.variant
    if kind == "identity":
        return Solution(vector, None, "identity", None)
    if kind == "published":
        samples = PUBLISHED if how.samples is None else how.samples
        rows = np.flatnonzero(mask)[: samples + 2]
        found = published(apply, params, sets.take(data, jnp.asarray(rows)), vector, samples, loss=how.loss)
        return Solution(found, None, f"no inverse: the published recursion over {len(rows)} examples", None)
    chosen = _chosen(mask, how)
    said = f"{kind} of {chosen.sum()} examples + {shift:g} I"
    if kind == "diagonal":
        least = min(how.block, int(chosen.sum()))
        squares = curvature.fisher_diagonal(apply, params, data, mask=jnp.asarray(chosen), loss=how.loss, batch=least)
        return Solution(jax.tree.map(lambda v, s: v / (s + shift), vector, squares), None, said, None)
    if kind == "fisher":
        examples, block = sets.select(data, chosen), min(how.block, int(chosen.sum()))
        found, rest = fisher(apply, params, examples, vector, shift, loss=how.loss, batch=how.batch, block=block)
        return Solution(found, float(rest), said, _doubt(float(rest), 1.0, how))
    found, rest, bend = conjugate(
        apply, params, data, jnp.asarray(chosen), vector, shift, how.tolerance, how.iterations,
        kind=kind, loss=how.loss, batch=how.batch,
    )  # fmt: skip
    return Solution(found, float(rest), said, _doubt(float(rest), float(bend), how))


def _chosen(mask: np.ndarray, how: Inverse) -> np.ndarray:
    """The examples of the curvature: `samples` of those in the mask, drawn by the key or evenly spread without one."""
    members = np.flatnonzero(mask)
    samples = min(FISHER, len(members)) if how.samples is None and how.variant == "fisher" else how.samples
    if samples is None:
        return mask
    if how.key is None:
        at = np.arange(samples) * len(members) // samples
    else:
        at = np.asarray(jax.random.permutation(keys.named(how.key, "samples"), len(members)))[:samples]
    chosen = np.zeros_like(mask)
    chosen[members[at]] = True
    return chosen


def _doubt(residual: float, bend: float, how: Inverse) -> str | None:
    """Why a finite solution is not to be trusted, if it is not."""
    if residual > 10 * how.tolerance:
        remedy = "damping" if how.variant == "fisher" else "iterations or damping"
        return f"the linear system is solved to a relative residual of {residual:.2g}, not {how.tolerance:g}: raise {remedy}"
    if bend < 0:
        return "the damped curvature is negative along the step, which leads to a saddle: raise damping"
    return None


@partial(jax.jit, static_argnames=("loss", "batch", "block"))
def fisher(apply, params, examples: Dataset, vector: Params, shift, *, loss: Loss, batch: int, block: int):
    """(F + shift I)^{-1} vector for the empirical Fisher F of m examples, and the relative residual.

    Woodbury's difference loses digits where shift is small beside F; one round of refinement gives them back. Cost beyond
    the Gram matrix: four forward and four backward passes over the m examples.
    """
    count = len(examples.y)
    factor = cho_factor(gram(apply, params, examples, loss=loss, block=block) + count * shift * jnp.eye(count))

    def forward(v):
        return curvature.slopes(apply, params, examples, v, loss=loss, batch=batch)

    def backward(weights):
        return curvature.weighted_gradient(apply, params, examples, weights, loss=loss, batch=batch)

    def refine(_, state):
        found, left = state
        inner = cho_solve(factor, forward(left))
        found = optax.tree.add_scale(found, 1 / shift, optax.tree.sub(left, backward(inner)))
        reached = optax.tree.add_scale(backward(forward(found) / count), shift, found)
        return found, optax.tree.sub(vector, reached)

    found, left = jax.lax.fori_loop(0, 2, refine, (optax.tree.zeros_like(vector), vector))
    return found, _relative(left, vector)


def gram(apply: Apply, params: Params, examples: Dataset, *, loss: Loss, block: int) -> Array:
    """Inner products [m, m] of the gradients of m examples, from at most two blocks of `block` gradients at a time."""
    count = len(examples.y)
    rows, real = map(jnp.asarray, sets.blocks(count, block))

    def gradients(i):
        each = curvature.example_gradients(apply, params, sets.take(examples, rows[i]), loss=loss)
        return [jnp.where(real[i][:, None], leaf.reshape(block, -1), 0) for leaf in jax.tree.leaves(each)]

    def cell(left, right):
        return sum(jnp.matmul(a, b.T, precision="highest") for a, b in zip(left, right))

    def row(i, found):
        left = gradients(i)
        found = jax.lax.dynamic_update_slice(found, cell(left, left), (i * block, i * block))

        def fill(j, found):
            return jax.lax.dynamic_update_slice(found, cell(left, gradients(j)), (i * block, j * block))

        return jax.lax.fori_loop(i + 1, len(rows), fill, found) if len(rows) > 1 else found

    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    upper = jnp.triu(jax.lax.fori_loop(0, len(rows), row, jnp.zeros((rows.size, rows.size), dtype)))
    return (upper + jnp.triu(upper, 1).T)[:count, :count]


@partial(jax.jit, static_argnames=("kind", "loss", "batch"))
def conjugate(apply, params, data, mask, vector: Params, shift, tolerance, iterations, *, kind: str, loss: Loss, batch: int):
    """(C + shift I)^{-1} vector by conjugate gradients; the true relative residual; and found^T (C + shift I) found.

    An indefinite matrix may break the iteration down, or leave it at a saddle: the residual shows the first, a negative
    last value the second.
    """

    def product(v):
        bent = PRODUCTS[kind](apply, params, data, v, mask=mask, loss=loss, batch=batch)
        return optax.tree.add_scale(bent, shift, v)

    def unsolved(state):
        _, _, _, square, i = state
        return (square > goal) & (i < iterations)

    def advance(state):
        found, left, along, square, i = state
        bent = product(along)
        far = square / optax.tree.vdot(along, bent)
        found, left = optax.tree.add_scale(found, far, along), optax.tree.add_scale(left, -far, bent)
        rest = optax.tree.vdot(left, left)
        return found, left, optax.tree.add_scale(left, rest / square, along), rest, i + 1

    # Written out, as the library's begins with the product of a constant zero: a pass too many, and some convolutions'
    # forward derivatives along a constant zero come back as garbage on CPU (jax 0.10.2).
    whole = optax.tree.vdot(vector, vector)
    goal = jnp.square(tolerance) * whole
    found = jax.lax.while_loop(unsolved, advance, (optax.tree.zeros_like(vector), vector, vector, whole, 0))[0]
    reached = product(found)
    return found, _relative(optax.tree.sub(vector, reached), vector), optax.tree.vdot(found, reached)


@partial(jax.jit, static_argnames="loss")
def published(apply: Apply, params: Params, examples: Dataset, vector: Params, samples, *, loss: Loss) -> Params:
    """The recursion that unlearning benchmarks run under the name of WoodFisher, in its own order; it is not an inverse.

    With g_i the gradient of example i and N = `samples`: o <- g_0 and k <- v, then for every further example
    t = o.g_i, k <- k - (k.g_i) / (N + t) o, o <- o - t / (N + t) o. Woodbury's update has F_{i-1}^{-1} g_i in the place of
    o. As o is only ever scaled, k - v stays parallel to g_0, the gradient of whichever example came first. The published
    loop breaks after example number N + 1, so that N + 2 take part. For comparison with published tables only.
    """

    def gradient(i):
        example = sets.take(examples, jnp.reshape(i, (1,)))
        return jax.grad(lambda p: loss(apply(p, example.x), example.y)[0])(params)

    def body(i, state):
        o, k = state
        g = gradient(i)
        t = optax.tree.vdot(o, g)
        k = optax.tree.add_scale(k, -optax.tree.vdot(k, g) / (samples + t), o)
        return optax.tree.add_scale(o, -t / (samples + t), o), k

    return jax.lax.fori_loop(1, len(examples.y), body, (gradient(0), vector))[1]


def _relative(rest: Params, whole: Params) -> Array:
    length = tree.norm(whole)
    return jnp.where(length == 0, 0.0, tree.norm(rest) / jnp.where(length == 0, 1.0, length))
