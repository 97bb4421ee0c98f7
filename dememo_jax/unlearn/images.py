"""Recipes that invent something: labels from across the boundary, a class of their own, images that stand for a class."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dememo_jax import data as sets
from dememo_jax import keys, losses
from dememo_jax.augment import Augment
from dememo_jax.errors import require
from dememo_jax.types import Array, Dataset, Key, Model, Weights
from dememo_jax.unlearn.descent import DescentState, Stage, Term, Unlearner, descent
from dememo_jax.unlearn.recipes import Transform, published_sgd


def boundary_shrink(
    model: Model, tx: Transform = None, *, radius: float = 0.1, other: bool = False, batch: int = 256, mode: str = "fit",
    augment: Augment | None = None,
) -> Unlearner:  # fmt: skip
    """Give each forgotten image the class of its neighbour across the boundary: Chen et al. 2023.

    The neighbour is one step of `radius` along the sign of the given network's gradient, clipped to [0, 1]. Where it is
    still of the image's class, so is the label, as published; `other=True` takes the next best. Epochs go over the forget
    set. Published: 10 epochs; rates from 1e-8 to 1e-4 are searched. BadInput for images that do not lie in [0, 1].
    """
    require(radius > 0, f"radius must be positive, got {radius}")

    def relabel(key, given, batch):
        climb = jax.grad(lambda x: losses.cross_entropy(model.apply(given, x), batch.y).sum())(batch.x)
        logits = model.apply(given, jnp.clip(batch.x + radius * jnp.sign(climb), 0.0, 1.0))
        own = jax.nn.one_hot(batch.y, logits.shape[-1], dtype=bool)
        return jnp.argmax(jnp.where(own, -jnp.inf, logits) if other else logits, axis=-1)

    tx = tx or published_sgd(1e-4)
    inner = descent(model, tx, Term("forget", relabel=relabel), batch=batch, mode=mode, augment=augment)

    def init(key: Key, weights: Weights, data: Dataset, forget: Array) -> DescentState:
        sets.check_unit(data)
        return inner.init(key, weights, data, forget)

    return inner._replace(init=init)


def boundary_expand(
    model: Model, wider: Model, tx: Transform = None, *, classes: int, batch: int = 256, mode: str = "fit",
    augment: Augment | None = None,
) -> Unlearner:  # fmt: skip
    """Teach the forget set a class of its own, then drop that class: Chen et al. 2023.

    wider: the same architecture with `classes + 1` outputs. Its weights are the given ones, and a fresh output; the run's
    state holds those, `finish` cuts the output away again. Epochs go over the forget set. Published: 10 epochs; rates
    from 1e-8 to 1e-4 are searched.
    """

    def relabel(key, given, batch):
        return jnp.full_like(batch.y, classes)

    tx = tx or published_sgd(1e-4)
    inner = descent(wider, tx, Term("forget", relabel=relabel), batch=batch, mode=mode, augment=augment)

    def init(key: Key, weights: Weights, data: Dataset, forget: Array) -> DescentState:
        random = wider.init(keys.named(key, "output"), data.x[:1])
        check_wider(weights, random)
        state = inner.init(key, jax.tree.map(grafted, weights, random), data, forget)
        return state._replace(extra=jax.tree.map(lambda leaf: jnp.asarray(jnp.shape(leaf)[-1:] or 0, jnp.int32), weights))

    def check_wider(small: Weights, big: Weights) -> None:
        pairs = list(zip(jax.tree.leaves(small), jax.tree.leaves(big)))
        same = jax.tree.structure(small) in (jax.tree.structure(big),)
        wide = [(a.shape, b.shape) for a, b in pairs if a.shape != b.shape]
        fits = same and wide and all(a[:-1] == b[:-1] and (a[-1], b[-1]) == (classes, classes + 1) for a, b in wide)
        require(fits, f"wider must be the same network with {classes + 1} outputs, and the given one must have {classes}")

    def grafted(small: Array, big: Array) -> Array:
        return small if small.shape == big.shape else jnp.concatenate([small, big[..., -1:]], axis=-1)

    def finish(state: DescentState) -> Weights:
        return jax.tree.map(lambda leaf, n: leaf[..., : int(n[0])] if leaf.ndim else leaf, state.weights, state.extra)

    return inner._replace(init=init, finish=finish)


# --- images that stand for a class -------------------------------------------------------------------------------


def unsir(
    model: Model, tx: Transform = None, *, images: int = 32, noise_steps: int = 25, noise_lr: float = 0.1, decay: float = 0.1,
    share: float = 0.1, noisy: float = 0.36, batch: int = 256, mode: str = "fit", augment: Augment | None = None,
) -> Unlearner:  # fmt: skip
    """Impair with images that the network is most wrong about, then repair: Tarun et al. 2023, for whole classes.

    init learns `images` of noise under labels of the forget set: `noise_steps` of Adam at `noise_lr` on minus the
    cross-entropy + `decay` times the mean squared norm, from N(0, 1). A round is an impair stage, whose batches hold such
    images with chance `noisy` and retained ones otherwise, and a repair stage on retained ones; both meet as many
    retained images as a `share` of their set.
    Published: one round; 500 retained images of each class and 80 batches of 32 noise images, 36 % of the impair stage;
    rate 1e-4. The noise is one draw of labels for all forgotten classes, where the published code takes one class.
    """
    require(images >= 1 and noise_steps >= 0, f"need images >= 1 and noise_steps >= 0, got {images} and {noise_steps}")
    require(0 < noisy < 1 and 0 < share <= 1, f"noisy must lie in (0, 1) and share in (0, 1], got {noisy} and {share}")
    climber = optax.adam(noise_lr)

    def prepare(key: Key, weights: Weights, data: Dataset, forget: Array) -> tuple[Array, Array]:
        to_labels, to_noise = jax.random.split(key)
        labels = sets.uniform(to_labels, 0, data, images, forget).y
        noise = jax.random.normal(to_noise, (images, *data.x.shape[1:]))

        def objective(noise):
            size = jnp.square(noise).reshape(images, -1).sum(axis=1)
            return -losses.cross_entropy(model.apply(weights, noise), labels).mean() + decay * size.mean()

        def climb(carry, _):
            noise, opt = carry
            updates, opt = climber.update(jax.grad(objective)(noise), opt, noise)
            return (optax.apply_updates(noise, updates), opt), None

        (noise, _), _ = jax.lax.scan(climb, (noise, climber.init(noise)), None, length=noise_steps)
        return noise, labels

    def mixed(key: Key, number: Array, state: Any, data: Dataset, size: int) -> Dataset:
        noise, labels = state.extra
        to_order, to_kind, to_which = (keys.named(key, name) for name in ("order", "kind", "which"))
        kept = sets.shuffled(to_order, number, data, size, ~state.forget)
        chosen = jax.random.bernoulli(keys.at(to_kind, number), noisy, (size,))
        which = jax.random.randint(keys.at(to_which, number), (size,), 0, images)
        x = jnp.where(chosen.reshape(-1, *[1] * (data.x.ndim - 1)), noise[which], kept.x)
        return kept._replace(x=x, y=jnp.where(chosen, labels[which], kept.y))

    impair = Stage((Term(mixed),), share=share / (1 - noisy))
    repair = Stage((Term("retain"),), share=share)
    tx = tx or published_sgd(1e-4)
    return descent(model, tx, impair, repair, batch=batch, mode=mode, augment=augment, prepare=prepare)
