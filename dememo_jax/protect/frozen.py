"""Noise against surrogates that were trained on clean data first: TAP, Hypocritical, SEP, EntF, TensorClog, PIL.

The surrogate no longer moves while the noise is made, so images do not depend on each other: each is finished at once,
and an iteration goes over one of `parts` parts of the data. Arguments, results and errors as in `minimizing`; the numbers
of the surrogate's epochs and steps are the published ones for CIFAR-10.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from dememo_jax import augment as augments
from dememo_jax import data as sets
from dememo_jax import losses, models, projected, train
from dememo_jax.errors import require
from dememo_jax.protect import objectives, refine
from dememo_jax.protect.bilevel import Phase, Recipe, Refine, alternate
from dememo_jax.protect.objectives import Features
from dememo_jax.train import Augment, Optimiser, View
from dememo_jax.types import Array, Dataset, Key, Method, Model, Weights

TAP_SGD = partial(train.dropping_sgd, 0.1, 0.9, 5e-4, (1 / 2.667, 1 / 1.6, 1 / 1.142), True)
ENTF_SGD = partial(train.dropping_sgd, 0.1, 0.9, 5e-4, (0.75, 0.9), False)
PIL_SGD = partial(train.clipped_sgd, 0.003, 0.9, 0.0)
CROP_FLIP = augments.compose(augments.crop(4), augments.flip())


def shift_flip(pixels: float = 4.0) -> View:
    """A random shift by up to so many pixels, bilinear, and a flip."""
    return refine.augmented(augments.compose(augments.shift(pixels), augments.flip()))


def pretrained(
    model: Model,
    tx: Optimiser,
    improve: Refine,
    *,
    epochs: int,
    parts: int,
    classes: int,
    batch: int = 128,
    sweep_batch: int = 512,
    augment: Augment | None = CROP_FLIP,
    learner: Callable[[int], Method] | None = None,
    context: Callable[[Any, Dataset], Any] = lambda state, data: (),
) -> Recipe:
    """`epochs` iterations of a clean epoch each, then `parts` that make the noise."""
    return alternate(
        model,
        learner or (lambda steps: train.sgd(model, train.optimiser(tx, steps), augment=augment)),
        improve,
        phases=(Phase(epochs, epochs=1.0, sees="clean", sweep=False), Phase(parts, parts=parts)),
        batch=batch,
        sweep_batch=sweep_batch,
        classes=classes,
        context=context,
    )


def adversarial(
    model: Model,
    tx: Optimiser = TAP_SGD,
    *,
    radius: float = 8 / 255,
    stride: float | None = None,
    classes: int = 10,
    offset: int = 1,
    untargeted: bool = False,
    inner_steps: int = 250,
    restarts: int = 8,
    epochs: int = 40,
    shift: float = 4.0,
    parts: int = 25,
    sharpness: float = 0.0,
) -> Recipe:
    """Targeted adversarial poisoning (TAP): Fowl et al. 2021. Images carry the features of the next class.

    Sign descent of CE(f(t(x + delta)), (y + offset) mod K), with t a random shift of up to `shift` pixels (bilinear) and a
    flip, stride radius/20, from a random start. untargeted: ascent of CE on the true label instead, which its authors
    call brittle. Of the `restarts` each image keeps its best (published: all images keep the same one; other
    codes do one). Starts are uniform in the ball (published: a clipped normal).
    """
    require(offset % classes, f"offset {offset} is the true label's; the target must be another class")
    aim = objectives.maximizing(model) if untargeted else objectives.targeted(model, classes, offset)
    improve = refine.descent(
        aim,
        projected.linf(radius),
        stride=radius / 20 if stride is None else stride,
        steps=inner_steps,
        start="random",
        restarts=restarts,
        view=shift_flip(shift),
        sharpness=sharpness,
    )
    return pretrained(model, tx, improve, epochs=epochs, parts=parts, classes=classes)


def hypocritical(
    model: Model,
    tx: Optimiser = TAP_SGD,
    *,
    radius: float = 0.5,
    norm: Literal["l2", "linf"] = "l2",
    classes: int = 10,
    offset: int = 0,
    inner_steps: int = 100,
    epochs: int = 40,
    parts: int = 10,
    sharpness: float = 0.0,
) -> Recipe:
    """Hypocritical perturbations: Tao et al. 2021, the delusive adversary's P2. Images look learned to a clean surrogate.

    Descent of CE(f(x + delta), (y + offset) mod K) in steps of radius/5; offset 1 is the paper's P1. By default an l2 ball
    of 0.5; with norm "linf" use 8/255. Published surrogate: VGG-16. The class-wise P3 to P5 are not built.
    """
    require(norm in ("l2", "linf"), f"norm must be 'l2' or 'linf', got {norm!r}")
    ball = projected.l2(radius) if norm == "l2" else projected.linf(radius)
    aim = objectives.targeted(model, classes, offset)
    improve = refine.descent(aim, ball, stride=radius / 5, steps=inner_steps, start="zero", sharpness=sharpness)
    return pretrained(model, tx, improve, epochs=epochs, parts=parts, classes=classes)


def tensor_clog(
    model: Model,
    tx: Optimiser = TAP_SGD,
    *,
    radius: float = 8 / 255,
    classes: int = 10,
    inner_steps: int = 250,
    epochs: int = 40,
    parts: int = 25,
    explode: bool = False,
    batch: int = 512,
    sharpness: float = 0.0,
) -> Recipe:
    """TensorClog: Shen et al. 2019, in the form of Fowl et al.'s code. Images whose loss gradient vanishes.

    Sign descent of the norm of the batch's gradient in the params: second order. `explode` maximises it instead. Known to
    be weak: 88.7 % remain on CIFAR-10. The batch is part of the objective.
    """
    improve = refine.descent(
        objectives.gradient_norm(model, -1.0 if explode else 1.0),
        projected.linf(radius),
        stride=radius / 20,
        steps=inner_steps,
        start="random",
        view=shift_flip(),
        sharpness=sharpness,
    )
    return pretrained(model, tx, improve, epochs=epochs, parts=parts, classes=classes, sweep_batch=batch)


class Ensemble(NamedTuple):
    inner: Any
    weights: Weights  # the current ones
    stack: Weights  # a checkpoint every so many steps, [M, ...]
    step: Array


def checkpoints(learner: Method, count: int, every: int) -> Method:
    """A learner that keeps its weights after every `every` steps, `count` of them, the last overwriting the oldest."""

    def init(key: Key, x: Array) -> Ensemble:
        inner = learner.init(key, x)
        stack = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), inner.weights)
        return Ensemble(inner, inner.weights, stack, jnp.zeros((), jnp.int32))

    def step(key: Key, state: Ensemble, batch: Dataset):
        inner, info = learner.step(key, state.inner, batch)
        done = state.step + 1
        place = jnp.where(done % every == 0, (done // every - 1) % count, count)  # beyond: dropped
        stack = jax.tree.map(lambda kept, leaf: kept.at[place].set(leaf, mode="drop"), state.stack, inner.weights)
        return Ensemble(inner, inner.weights, stack, done), info

    return Method(init, step)


def self_ensemble(
    model: Model,
    tx: Optimiser = TAP_SGD,
    *,
    radius: float = 2 / 255,
    classes: int = 10,
    offset: int = 5,
    checkpoints_kept: int = 30,
    inner_steps: int = 30,
    epochs: int = 120,
    parts: int = 25,
    sharpness: float = 0.0,
) -> Recipe:
    """Self-ensemble protection (SEP): Chen et al. 2023. Adversarial examples of a whole training run.

    `checkpoints_kept` equally spaced checkpoints of one clean run; sign descent of their mean CE to the label
    (y + offset) mod K, in steps of half the radius (published: 1/255 at a budget of 2/255). The variants SEP-FA and
    SEP-FA-VR are not built. The checkpoints are held in memory: 1.3 GB for 30 of a ResNet-18.
    """
    require(offset % classes, f"offset {offset} is the true label's; the target must be another class")
    require(epochs >= checkpoints_kept, f"{checkpoints_kept} checkpoints need as many epochs at least, got {epochs}")
    improve = refine.descent(
        objectives.targeted(model, classes, offset),
        projected.linf(radius),
        stride=radius / 2,
        steps=inner_steps,
        start="zero",
        shift=refine.member,
        draws=checkpoints_kept,
        sharpness=sharpness,
    )

    def learner(steps):
        inner = train.sgd(model, train.optimiser(tx, steps), augment=CROP_FLIP)
        return checkpoints(inner, checkpoints_kept, max(1, steps // checkpoints_kept))

    return pretrained(
        model, tx, improve, epochs=epochs, parts=parts, classes=classes, learner=learner,
        context=lambda state, data: state.stack,
    )  # fmt: skip


def entangled_features(
    model: Model,
    features: Features,
    tx: Optimiser = ENTF_SGD,
    *,
    radius: float = 8 / 255,
    reference: float = 4 / 255,
    form: Literal["push", "pull"] = "push",
    classes: int = 10,
    inner_steps: int = 300,
    epochs: int = 100,
    attack_steps: int = 10,
    parts: int = 25,
    sharpness: float = 0.0,
) -> Recipe:
    """Entangled features (EntF): Wen et al. 2023, against victims that train adversarially.

    The surrogate is trained against PGD (l-inf `reference`, `attack_steps` of stride reference/2); then sign descent in
    steps of radius/20 drives each image's features away from the centroid of its class (`"push"`) or to that of another,
    the nearest to it (`"pull"`), centroids being the mean features of the clean set. Features [B, F] come from
    `features(weights, images)`, such as `models.penultimate(module)`. The published code's mask value in the search for
    the nearest class, and its ten hard-coded classes, are not kept.
    """
    require(form in ("push", "pull"), f"form must be 'push' or 'pull', got {form!r}")
    against = train.adversary(model, projected.linf(reference), stride=reference / 2, steps=attack_steps)
    improve = refine.descent(
        {"push": objectives.push, "pull": objectives.pull}[form](features),
        projected.linf(radius),
        stride=radius / 20,
        steps=inner_steps,
        start="random",
        view=shift_flip(),
        sharpness=sharpness,
    )

    def centroids(state, data):
        found = jax.lax.map(lambda at: features(state.weights, data.x[at]), jnp.asarray(sets.blocks(len(data.y), 512)[0]))
        found = found.reshape(-1, found.shape[-1])[: len(data.y)]
        member = jax.nn.one_hot(data.y, classes)
        count = member.sum(axis=0)[:, None]
        return jnp.where(count > 0, (member.T @ found) / jnp.maximum(count, 1), jnp.inf)

    return pretrained(
        model, tx, improve, epochs=epochs, parts=parts, classes=classes, context=centroids,
        learner=lambda steps: train.sgd(model, train.optimiser(tx, steps), augment=CROP_FLIP, adversary=against),
    )  # fmt: skip


def linear_surrogate(
    *,
    radius: float = 8 / 255,
    classes: int = 10,
    epochs: int = 30,
    inner_steps: int = 30,
    stride: float | None = None,
    weight: float = 0.9,
    tx: Optimiser = PIL_SGD,
    sharpness: float = 0.0,
) -> Recipe:
    """Perturbation-induced linearization (PIL): Liu et al. 2026. A linear surrogate is enough, and a minute.

    Two linear layers without bias, D -> K -> K, trained on clean images; then sign descent, in steps of radius/10 from a
    uniform start, of weight * CE(f(-noise), y) + (1 - weight) * KL(softmax f(x + noise) || uniform): what is taken away
    from an image is what a linear network recognises its class by.
    """
    model = models.from_apply(partial(_linear_init, classes), _linear)

    def objective(weights: Weights, seen: refine.Seen) -> Array:
        taken = model.apply(weights, -seen.noise)
        left = jax.nn.log_softmax(model.apply(weights, seen.x))
        uniform = (jnp.exp(left) * left).sum(axis=-1) + jnp.log(classes)
        return weight * losses.cross_entropy(taken, seen.y) + (1 - weight) * uniform

    improve = refine.descent(
        objective,
        projected.linf(radius),
        stride=radius / 10 if stride is None else stride,
        steps=inner_steps,
        start="random",
        sharpness=sharpness,
    )
    return pretrained(model, tx, improve, epochs=epochs, parts=1, classes=classes, batch=512, augment=None)


def _linear_init(classes: int, key: Key, x: Array) -> dict[str, Array]:
    size = x[0].size
    first, second = jax.random.split(key)
    return {
        "first": jax.random.uniform(first, (size, classes), minval=-1, maxval=1) / jnp.sqrt(size),
        "second": jax.random.uniform(second, (classes, classes), minval=-1, maxval=1) / jnp.sqrt(classes),
    }


def _linear(params: dict[str, Array], x: Array) -> Array:
    return x.reshape(len(x), -1) @ params["first"] @ params["second"]
