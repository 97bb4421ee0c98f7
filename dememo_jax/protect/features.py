"""Noise made on features rather than on logits: TUE for contrastive learners, MI-UE on the features of a classifier."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from dememo_jax import augment as augments
from dememo_jax import projected, train
from dememo_jax.errors import require
from dememo_jax.protect import objectives, refine
from dememo_jax.protect.bilevel import Phase, Recipe, alternate, still
from dememo_jax.protect.minimizing import COSINE_SGD
from dememo_jax.protect.objectives import Features
from dememo_jax.train import Optimiser
from dememo_jax.types import Array, Dataset, Key, Method, Model, Weights


def transferable(
    encoder: Model | None = None,
    tx: Optimiser | None = None,
    *,
    form: Literal["published", "paper"] = "published",
    radius: float = 8 / 255,
    stride: float | None = None,
    classes: int = 10,
    separation: float | None = None,
    temperature: float = 0.5,
    inner_steps: int | None = None,
    batch: int = 512,
    passes: int | None = None,
    learner_steps: int = 20,
    sharpness: float = 0.0,
) -> Recipe:
    """Transferable unlearnable examples (TUE): Ren et al. 2023, in two forms that are different methods.

    `"published"`, the command that made the published CIFAR-10 sets (SimCLR and SimSiam): the weight of the contrastive
    loss is zero and the scatter s_k of `objectives.separation` is a constant to the gradient. So the noise never sees a
    network, which is not trained here, and in a few passes becomes one pattern of signs a class; 10 passes of 20 steps by
    default (published: over 200, of which the later change nothing). Needs no encoder.
    `"paper"`: min over theta, min over delta of NT-Xent(f_theta of two views of x + delta) + separation * CSD(delta), with
    the gradient through s_k, alternating `learner_steps` batches of SimCLR with a pass; 200 passes of 5 steps, from the
    published MoCo command, the only one whose noise does see its network. `encoder` maps images to embeddings [B, D]: any
    Model, `nets.resnet18(128)` say; tx defaults to Adam 1e-3.

    Steps are signs of stride radius/10 from a uniform start. Images stay in their boxes (published: the boxes of two
    augmented views). The batch is part of the objective, and each pass goes over the data in another order. `sharpness`
    is for the paper's form, which has weights to move.
    """
    paper = _check_form(form, encoder)
    weight = (1.0 if paper else 0.1) if separation is None else separation
    csd = objectives.separation(classes, detached=not paper)
    encoder = encoder if paper else None
    improve = refine.descent(
        _contrast(encoder, temperature, weight, csd),
        projected.linf(radius),
        stride=radius / 10 if stride is None else stride,
        steps=(5 if paper else 20) if inner_steps is None else inner_steps,
        view=refine.twice(augments.strong(1.0)) if paper else None,
        sharpness=sharpness if paper else 0.0,
    )

    def learner(steps: int) -> Method:
        transform = optax.adam(1e-3) if tx is None else train.optimiser(tx, steps)
        return still() if encoder is None else contrastive(encoder, transform, temperature=temperature)

    return alternate(
        None,
        learner,
        improve,
        phases=(Phase((200 if paper else 10) if passes is None else passes, learner_steps if paper else 0),),
        batch=batch,
        classes=classes,
        shuffle=True,
        begin=projected.linf(radius).draw,
    )


def _contrast(encoder: Model | None, temperature: float, weight: float, csd: refine.Objective) -> refine.Objective:
    """The contrastive loss of the encoder, if there is one, and the separability of the noise."""

    def objective(weights: Weights, seen: refine.Seen) -> Array:
        if encoder is None:
            return weight * csd(weights, seen)
        each = objectives.nt_xent(encoder.apply(weights, seen.x), temperature, seen.active)
        return each.sum() / jnp.maximum(2 * seen.active.sum(), 1) + weight * csd(weights, seen)

    return objective


def _check_form(form: str, encoder: Model | None) -> bool:
    require(form in ("published", "paper"), f"form must be 'published' or 'paper', got {form!r}")
    require(form == "published" or encoder is not None, "the paper's TUE needs an encoder: a Model from images to embeddings")
    return form == "paper"


def contrastive(encoder: Model, tx: optax.GradientTransformation, *, temperature: float = 0.5) -> Method:
    """SimCLR as a method: descent of NT-Xent on two strongly augmented views of a batch. Labels are not looked at."""
    look = refine.twice(augments.strong(1.0))

    def init(key: Key, x: Array) -> train.TrainState:
        return train.start(tx, encoder.init(key, x))

    def step(key: Key, state: train.TrainState, batch: Dataset):
        to_look, to_fit = jax.random.split(key)
        images = look(to_look, state.weights, batch)

        def objective(params):
            z, weights = encoder.fit(state.weights._replace(params=params), images, to_fit)
            return objectives.nt_xent(z, temperature).mean(), weights

        (value, weights), grads = jax.value_and_grad(objective, has_aux=True)(state.weights.params)
        weights, opt = train.update(tx, grads, state.opt, weights._replace(params=state.weights.params))
        return train.TrainState(weights, opt, state.step + 1), {"loss": value}

    return Method(init, step)


def mutual_information(
    model: Model,
    features: Features,
    tx: Optimiser = COSINE_SGD,
    *,
    radius: float = 8 / 255,
    stride: float | None = None,
    classes: int = 10,
    temperature: float = 0.5,
    pull: float = 0.1,
    inner_steps: int = 10,
    batch: int = 128,
    passes: int = 100,
    sharpness: float = 0.0,
) -> Recipe:
    """Noise of little mutual information (MI-UE): Zhu et al. 2026. Features of a class close, of different ones far.

    Alternates an epoch of the classifier, by cross-entropy, with a pass of `inner_steps` of stride radius/40 down
    `objectives.same_class_contrast` of its features. `features(weights, images) -> [B, F]`, such as
    `models.penultimate(module)`. Known from its paper by way of a note: the temperature, the batch and the optimiser are
    this library's choice. The batch is part of the objective, so each pass goes over the data in another order.
    """
    improve = refine.descent(
        objectives.same_class_contrast(features, temperature, pull),
        projected.linf(radius),
        stride=radius / 40 if stride is None else stride,
        steps=inner_steps,
        sharpness=sharpness,
    )
    return alternate(
        model,
        lambda steps: train.sgd(model, train.optimiser(tx, steps)),
        improve,
        phases=(Phase(passes, epochs=1.0),),
        batch=batch,
        classes=classes,
        shuffle=True,
    )
