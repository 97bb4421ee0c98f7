"""Gradients and curvature of the mean loss of a frozen network over a data set, one block of examples at a time.

L(theta) = mean of loss(apply(theta, x), y) over the examples of `data` where `mask` [N] is true, all of them without one.
Masks may be traced: one compiled program serves every mask of one length. The members of a mask are packed in front, so
that the cost is theirs alone, and no other example is ever evaluated: what is NaN outside the mask stays outside. A mask
known to be empty is BadInput; under jit its values are not known, and the mean is NaN.

A vector is a tree shaped like `params`. Params in half precision are raised to float32 first: derivatives are taken, summed
and returned in float32 at least. Memory is one block of activations, and no per-example gradient is stored except where it is
said. A network is taken in evaluation mode, its statistics bound (`models.freeze`): every function here is of the parameters
alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from dememo_jax import data as sets
from dememo_jax import losses, models, tree
from dememo_jax.errors import require
from dememo_jax.types import Apply, Array, Dataset, Loss, Params

Operator = Callable[[Params], Params]  # a symmetric matrix: K stacked vectors (trees of [K, ...]) -> K stacked products


def hvp(objective: Callable[[Params], Array], params: Params, vector: Params) -> Params:
    """The Hessian of a scalar `objective` at `params`, times `vector`: forward over reverse, Pearlmutter 1994."""
    return jax.jvp(jax.grad(objective), (params,), (vector,))[1]


def total(of_block: Callable[[Any, Array], Any], examples: Any, *, mask: Array | None = None, batch: int = 128) -> Any:
    """Sum of `of_block(block, real)` over blocks that hold the examples where `mask` [N] once each, in order.

    examples: any tree of arrays [N, ...]; a block is the same tree [batch, ...], and `real` [batch] is false where the last
    one is filled up, with the first member. The number of blocks is ceil(members / batch). With a mask it is known only
    when the program runs: the sum can then be differentiated forwards, not backwards.
    """
    count = len(jax.tree.leaves(examples)[0])
    mask = _check(mask, count, batch)
    batch = min(batch, count)
    order = jnp.arange(count) if mask is None else jnp.argsort(~mask, stable=True)
    members = count if mask is None else mask.sum()

    def block(i):
        at = i * batch + jnp.arange(batch)
        rows = order[jnp.where(at < members, at, 0)]
        return of_block(jax.tree.map(lambda part: jnp.take(part, rows, axis=0), examples), at < members)

    def zero(leaf):
        return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))

    start = jax.tree.map(zero, jax.eval_shape(block, 0))
    return jax.lax.fori_loop(0, -(-members // batch), lambda i, sums: jax.tree.map(jnp.add, sums, block(i)), start)


def mean_loss(
    apply: Apply,
    params: Params,
    data: Dataset,
    *,
    mask: Array | None = None,
    loss: Loss = losses.cross_entropy,
    batch: int = 128,
) -> Array:
    """L itself, a scalar."""
    params = tree.widened(params)
    summed = total(lambda block, real: _summed(apply, loss, block, real)(params), data, mask=mask, batch=batch)
    return summed / (len(data.y) if mask is None else jnp.asarray(mask).sum())


def mean_gradient(
    apply: Apply,
    params: Params,
    data: Dataset,
    *,
    mask: Array | None = None,
    loss: Loss = losses.cross_entropy,
    batch: int = 128,
) -> Params:
    """Gradient of L, shaped like `params`."""
    params = tree.widened(params)
    sums = total(lambda block, real: jax.grad(_summed(apply, loss, block, real))(params), data, mask=mask, batch=batch)
    return _mean(sums, params, mask, len(data.y))


def weighted_gradient(
    apply: Apply, params: Params, data: Dataset, weights: Array, *, loss: Loss = losses.cross_entropy, batch: int = 128
) -> Params:
    """sum_i weights[i] grad loss_i over all examples, weights [N]: G^T w for the matrix G [N, P] of their gradients."""
    params = tree.widened(params)

    def of_block(block, real):
        examples, share = block
        return jax.grad(_summed(apply, loss, examples, jnp.where(real, share, 0.0)))(params)

    return _like(params, total(of_block, (data, weights), batch=batch))


def slopes(
    apply: Apply, params: Params, data: Dataset, vector: Params, *, loss: Loss = losses.cross_entropy, batch: int = 128
) -> Array:
    """How fast the loss of every example rises along `vector`, [N]: G v for the matrix G [N, P] of their gradients."""
    params = tree.widened(params)
    vector, count = _like(params, vector), len(data.y)
    rows, _ = sets.blocks(count, min(batch, count))

    def of_block(at):
        block = sets.take(data, at)
        return jax.jvp(lambda p: loss(apply(p, block.x), block.y), (params,), (vector,))[1]

    return jax.lax.map(of_block, rows).reshape(-1)[:count]


def hessian_product(
    apply: Apply,
    params: Params,
    data: Dataset,
    vector: Params,
    *,
    mask: Array | None = None,
    loss: Loss = losses.cross_entropy,
    batch: int = 128,
) -> Params:
    """The Hessian of L times `vector`; of a network it may be indefinite."""
    params = tree.widened(params)
    vector = _like(params, vector)
    sums = total(lambda block, real: hvp(_summed(apply, loss, block, real), params, vector), data, mask=mask, batch=batch)
    return _mean(sums, params, mask, len(data.y))


def operator(
    apply: Apply,
    params: Params,
    data: Dataset,
    *,
    of: str = "hessian",
    mask: Array | None = None,
    loss: Loss = losses.cross_entropy,
    batch: int = 128,
) -> Operator:
    """A matrix of L as a function of K stacked vectors, for the estimates of this module: `of` "hessian" or "ggn".

    A block of examples is linearised once for all vectors, and its activations are forgotten before the next: memory is
    those of one block and K trees. float32 products run at the highest precision of the device. What is returned passes
    through jit as an argument, weights and data with it, and equal settings share compiled programs.
    """
    require(of in ("hessian", "ggn"), f"of must be 'hessian' or 'ggn', got {of!r}")
    return Partial(
        _operator(of, loss, batch), models.as_apply(apply), tree.widened(params), data, _check(mask, len(data.y), batch)
    )


@functools.lru_cache(maxsize=256)
def _operator(of: str, loss: Loss, batch: int) -> Callable:
    def product(apply, params, data, mask, vectors):
        vectors = _like(params, vectors)

        def of_block(block, real):
            if of == "hessian":
                _, linear = jax.linearize(jax.grad(_summed(apply, loss, block, real)), params)
                return jax.lax.map(linear, vectors)
            logits, push = jax.linearize(lambda p: apply(p, block.x), params)
            pull = jax.linear_transpose(push, params)
            _, bend = jax.linearize(jax.grad(lambda z: jnp.where(real, loss(z, block.y), 0.0).sum()), logits)
            return jax.lax.map(lambda vector: pull(bend(push(vector)))[0], vectors)

        with jax.default_matmul_precision("highest"):
            sums = total(of_block, data, mask=mask, batch=batch)
        return _mean(sums, params, mask, len(data.y))

    return product


def restricted(product: Operator, params: Params, chosen: list[bool]) -> tuple[Operator, list[Array]]:
    """The block of the matrix that belongs to the chosen leaves, as an operator on a list of them; and those leaves."""
    params = tree.widened(params)
    leaves = jax.tree.leaves(params)
    kept = [leaf for leaf, keep in zip(leaves, chosen, strict=True) if keep]
    return Partial(_block(tuple(chosen)), product, params), kept


@functools.lru_cache(maxsize=256)
def _block(chosen: tuple[bool, ...]) -> Callable:
    def product(whole, params, vectors):
        leaves, treedef = jax.tree.flatten(params)
        count, given = len(vectors[0]), iter(vectors)
        full = [next(given) if keep else jnp.zeros((count, *leaf.shape), leaf.dtype) for leaf, keep in zip(leaves, chosen)]
        found = jax.tree.leaves(whole(jax.tree.unflatten(treedef, full)))
        return [leaf for leaf, keep in zip(found, chosen) if keep]

    return product


def ggn_product(
    apply: Apply,
    params: Params,
    data: Dataset,
    vector: Params,
    *,
    mask: Array | None = None,
    loss: Loss = losses.cross_entropy,
    batch: int = 128,
) -> Params:
    """The generalised Gauss-Newton matrix of L times `vector`: mean of J^T H J v, Schraudolph 2002.

    J is the Jacobian of an example's logits and H [K, K] the Hessian of its loss at them. It leaves out the curvature of
    the network itself, has no negative eigenvalue where the loss is convex in the logits, is the Fisher matrix of the
    model for cross-entropy, and is the Hessian where logits are linear in `params`.
    """
    params = tree.widened(params)
    vector = _like(params, vector)

    def of_block(block, real):
        def network(p):
            return apply(p, block.x)

        logits, pull = jax.vjp(network, params)
        _, pushed = jax.jvp(network, (params,), (vector,))
        (found,) = pull(hvp(lambda z: jnp.where(real, loss(z, block.y), 0.0).sum(), logits, pushed))
        return found

    return _mean(total(of_block, data, mask=mask, batch=batch), params, mask, len(data.y))


def example_gradients(apply: Apply, params: Params, data: Dataset, *, loss: Loss = losses.cross_entropy) -> Params:
    """The gradient of every example's loss, one row each: a tree of [B, ...]. Stores B times the parameters."""
    params = tree.widened(params)

    def one(x, y):
        return jax.grad(lambda p: loss(apply(p, x[None]), y[None])[0])(params)

    return jax.vmap(one)(data.x, data.y)


def fisher_diagonal(
    apply: Apply,
    params: Params,
    data: Dataset,
    *,
    mask: Array | None = None,
    loss: Loss = losses.cross_entropy,
    batch: int = 16,
) -> Params:
    """Mean square of the gradients of single examples: the diagonal of the empirical Fisher matrix (1/n) sum g g^T.

    Empirical: at the labels of the data, not at labels drawn from the model. `batch` gradients are stored at a time.
    """
    params = tree.widened(params)

    def of_block(block, real):
        each = example_gradients(apply, params, block, loss=loss)
        return jax.tree.map(lambda rows: jnp.tensordot(real.astype(rows.dtype), jnp.square(rows), 1, precision="highest"), each)

    return _mean(total(of_block, data, mask=mask, batch=batch), params, mask, len(data.y))


def _summed(apply: Apply, loss: Loss, block: Dataset, weight: Array) -> Callable[[Params], Array]:
    """The loss of a block as a function of the params: a sum weighted by `weight` [B], bool or float."""
    return lambda params: (loss(apply(params, block.x), block.y) * weight).sum()


def _mean(sums: Params, params: Params, mask: Array | None, count: int) -> Params:
    members = count if mask is None else jnp.asarray(mask).sum()
    return _like(params, jax.tree.map(lambda leaf: leaf / members, sums))


def _like(params: Params, sums: Params) -> Params:
    return jax.tree.map(lambda leaf, like: leaf.astype(jnp.result_type(like)), sums, params)


def _check(mask: Array | None, count: int, batch: int) -> Array | None:
    require(batch >= 1, f"a block needs at least one example, got batch={batch}")
    if mask is None:
        return None
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    require(mask.shape == (count,), f"a mask must have one entry an example, [{count}]; got {mask.shape}")
    require(mask.dtype == bool, f"a mask must be boolean, got {mask.dtype}")
    known = not isinstance(mask, jax.core.Tracer)
    require(not known or np.asarray(mask).any(), "the mask is empty: a mean needs at least one example")
    return jnp.asarray(mask)
