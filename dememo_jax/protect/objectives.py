"""What noise descends: functions of the weights and of what is seen, `(weights, Seen) -> [B]` or a scalar."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dememo_jax import losses, tree
from dememo_jax.protect.refine import Objective, Seen
from dememo_jax.types import Array, Loss, Model, Weights

Features = Callable[[Weights, Array], Array]  # images [B, ...] -> features [B, F], such as `models.penultimate(module)`


def minimizing(model: Model, loss: Loss = losses.cross_entropy) -> Objective:
    """The loss on the true label: images that already look learned."""
    return lambda weights, seen: loss(model.apply(weights, seen.x), seen.y)


def maximizing(model: Model, loss: Loss = losses.cross_entropy) -> Objective:
    """Less the loss on the true label: untargeted adversarial examples."""
    return lambda weights, seen: -loss(model.apply(weights, seen.x), seen.y)


def targeted(model: Model, classes: int, offset: int, loss: Loss = losses.cross_entropy) -> Objective:
    """The loss on the label (y + offset) mod K."""
    return lambda weights, seen: loss(model.apply(weights, seen.x), (seen.y + offset) % classes)


def gradient_norm(model: Model, sign: float = 1.0, loss: Loss = losses.cross_entropy) -> Objective:
    """The l2 norm of the gradient, in the params, of the batch's summed loss; its maximisation with sign -1."""

    def objective(weights: Weights, seen: Seen) -> Array:
        def total(params):
            each = loss(model.apply(weights._replace(params=params), seen.x), seen.y)
            return jnp.where(seen.active, each, 0.0).sum()

        return sign * tree.norm(jax.grad(total)(weights.params))

    return objective


def separation(classes: int, *, detached: bool) -> Objective:
    """Class-wise separability of the noise itself (TUE, Ren et al. 2023), a Davies-Bouldin index of one batch.

    Mean over ordered pairs of classes of (s_k + s_l + 1e-5) / (d_kl + 1e-5), with s_k the mean l2 distance of class k's
    noise to its mean and d_kl the distance of the means; classes without active examples take no part, and fewer than
    two give 0. detached: s_k is a constant to the gradient, as in the published code.
    """

    def objective(weights: Weights, seen: Seen) -> Array:
        noise = seen.noise.reshape(len(seen.noise), -1)
        member = jax.nn.one_hot(seen.y, classes) * seen.active[:, None]
        present = member.sum(axis=0) > 0
        share = member / jnp.maximum(member.sum(axis=0), 1)
        centre = share.T @ noise
        scatter = share.T @ _length(noise - centre[seen.y])
        scatter = jax.lax.stop_gradient(scatter) if detached else scatter
        apart = jax.lax.map(lambda one: _length(centre - one), centre)
        pairs = present[:, None] & present[None] & ~jnp.eye(classes, dtype=bool)
        ratio = (scatter[:, None] + scatter[None] + 1e-5) / (apart + 1e-5)
        return jnp.where(pairs, ratio, 0.0).sum() / jnp.maximum(pairs.sum(), 1)

    return objective


def same_class_contrast(features: Features, temperature: float, pull: float) -> Objective:
    """Features close to their class and far from others (MI-UE, Zhu et al. 2026), for every example of the batch:

    -log(sum over its class of exp(cos / temperature) / sum over other classes of the same)
    + pull * log(1 + sum over its class of the l2 distance of features). Examples without partners count 0.
    """

    def objective(weights: Weights, seen: Seen) -> Array:
        found = features(weights, seen.x)
        unit = found / jnp.maximum(_length(found)[:, None], 1e-12)
        close = unit @ unit.T / temperature
        both = seen.active[:, None] & seen.active[None]
        same = (seen.y[:, None] == seen.y[None]) & both & ~jnp.eye(len(seen.y), dtype=bool)
        other = (seen.y[:, None] != seen.y[None]) & both
        has = same.any(axis=1) & other.any(axis=1)
        sums = [
            jax.nn.logsumexp(jnp.where(has[:, None], jnp.where(part, close, -jnp.inf), 0.0), axis=1) for part in (same, other)
        ]
        spread = jnp.where(same, _length(found[:, None] - found[None]), 0.0).sum(axis=1)
        return jnp.where(has, sums[1] - sums[0] + pull * jnp.log1p(spread), 0.0)

    return objective


def push(features: Features) -> Objective:
    """Away, in mean square, from the own class's centroid; the context is the centroids [K, F] (EntF, Wen et al. 2023)."""
    return lambda weights, seen: -jnp.square(features(weights, seen.x) - seen.context[seen.y]).mean(axis=-1)


def pull(features: Features) -> Objective:
    """To the centroid of another class, the nearest to the own one (EntF).

    The context is the centroids [K, F], infinite for classes without examples.
    """

    def objective(weights: Weights, seen: Seen) -> Array:
        centroids = seen.context
        apart = jnp.square(centroids[:, None] - centroids[None]).sum(axis=-1)
        nobody = jnp.eye(len(apart), dtype=bool) | ~jnp.isfinite(apart)  # itself, and classes without examples
        nearest = jnp.argmin(jnp.where(nobody, jnp.inf, apart), axis=1)
        return jnp.square(features(weights, seen.x) - centroids[nearest[seen.y]]).mean(axis=-1)

    return objective


def nt_xent(z: Array, temperature: float, active: Array | None = None) -> Array:
    """SimCLR's contrastive loss (Chen et al. 2020) of two embeddings of each of B examples, z [2B, D] -> [2B].

    Examples that are not `active` [B] are nobody's negatives, and count 0.
    """
    unit = z / jnp.maximum(_length(z)[:, None], 1e-12)
    count = len(z) // 2
    some = jnp.ones(len(z), bool) if active is None else jnp.tile(active, 2)
    own, other = jnp.eye(len(z), dtype=bool), (jnp.arange(len(z)) + count) % len(z)
    partner = jnp.arange(len(z))[None] == other[:, None]
    logits = jnp.where(partner | (some[None] & ~own), unit @ unit.T / temperature, -jnp.inf)
    return jnp.where(some, losses.cross_entropy(logits, other), 0.0)


def _length(rows: Array) -> Array:
    """l2 norm over the last axis, with a gradient of zero at zero."""
    square = jnp.square(rows).sum(axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
