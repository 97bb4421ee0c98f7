"""Perturbations against a weight-noised surrogate, whose certificate they are made to lower: PUE."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dememo_jax import projected, train
from dememo_jax.protect import objectives, refine
from dememo_jax.protect.bilevel import Granularity, Phase, Recipe, alternate
from dememo_jax.protect.minimizing import SGD
from dememo_jax.train import Optimiser
from dememo_jax.types import Array, Dataset, Key, Method, Model, Weights

SIGMAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)


class Hardening(NamedTuple):
    inner: Any
    weights: Weights
    robust: Array  # whether the noise on the weights has been turned on


def hardening(plain: Method, noisy: Method) -> Method:
    """A learner that takes plain steps until its state says `robust`, noisy ones from then on; their states are alike."""

    def init(key: Key, x: Array) -> Hardening:
        inner = plain.init(key, x)
        return Hardening(inner, inner.weights, jnp.zeros((), bool))

    def step(key: Key, state: Hardening, batch: Dataset):
        inner, info = jax.lax.cond(state.robust, noisy.step, plain.step, key, state.inner, batch)
        return Hardening(inner, inner.weights, state.robust), info

    return Method(init, step)


def _surrogate(model: Model, tx: Optimiser, sigmas: tuple[float, ...], draws: int, steps: int) -> Method:
    transform = train.optimiser(tx, steps)
    return hardening(train.sgd(model, transform), train.weight_noise(model, transform, sigmas=sigmas, draws=draws))


def provable(
    model: Model,
    tx: Optimiser = SGD,
    *,
    radius: float = 8 / 255,
    stride: float | None = None,
    classes: int = 10,
    granularity: Granularity = "class",
    sigmas: tuple[float, ...] = SIGMAS,
    learner_draws: int = 100,
    noise_draws: int = 10,
    learner_steps: int = 20,
    inner_steps: int = 1,
    batch: int = 128,
    passes: int = 50,
    stop: float | None = 0.1,
    switch: float = 0.5,
    portion: float = 0.2,
    sharpness: float = 0.0,
) -> Recipe:
    """Provably unlearnable examples (PUE): Wang et al. 2025. Error-minimizing noise under a ramp of weight noise.

    Alternates `learner_steps` batches of the surrogate with a pass over the `portion` of the data, until the error of the
    surrogate, without weight noise, is at most `stop`, `passes` times at most. The surrogate trains plainly until its
    error is below `switch`, then by `train.weight_noise` (`learner_draws` networks at each of the `sigmas`). In the pass,
    each of `inner_steps` goes through the sigmas, a sign step each, with the mean gradient of `noise_draws` noisy
    networks; class-wise, each class takes the mean of its images. The online surrogate for a certificate is
    `state.learner.weights`; its batch statistics end near those of the largest sigma, as in the published code.

    Differences from the published code: the portion is random rather than stratified, the surrogate learns from it alone,
    on images clipped to [0, 1], and stops by its error on all data; its gradient is clipped once and not while it
    accumulates; single images' boxes do not shrink a class's noise; and the noise keeps its sign, where the released data
    lost the negative half (`release.quantise(form="positive_part")` is that).
    """
    improve = refine.descent(
        objectives.minimizing(model),
        projected.linf(radius),
        stride=radius / 10 if stride is None else stride,
        steps=inner_steps * len(sigmas),
        shift=refine.ramp(sigmas),
        draws=noise_draws,
        sharpness=sharpness,
        box=granularity == "sample",
    )

    return alternate(
        model,
        partial(_surrogate, model, tx, sigmas, learner_draws),
        improve,
        phases=(Phase(passes, learner_steps),),
        batch=batch,
        granularity=granularity,
        classes=classes,
        stop=stop,
        portion=portion,
        notice=lambda state, error: state._replace(robust=state.robust | (error < switch)),
    )
