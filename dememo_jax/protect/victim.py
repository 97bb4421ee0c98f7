"""What a victim learns from protected data: the measure of every perturbation."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import augment as augments
from dememo_jax import callbacks, keys, loop, losses, models, projected, train
from dememo_jax import data as sets
from dememo_jax import evaluate as evaluation
from dememo_jax.errors import require
from dememo_jax.protect.countermeasures import Countermeasure
from dememo_jax.train import Augment, Optimiser
from dememo_jax.types import Dataset, Key, Loss, Method, Model, Perturbation, Weights

VICTIM_SGD = partial(train.clipped_sgd, 0.1, 0.9, 5e-4)


@dataclass(frozen=True)
class Outcome:
    """Accuracies of a victim on clean test images after each epoch; on the training data as it was seen; and its weights."""

    test: tuple[float, ...]
    train: tuple[float, ...]
    weights: Weights

    @property
    def final(self) -> float:
        return self.test[-1]

    @property
    def peak(self) -> float:
        return max(self.test)


@functools.lru_cache(maxsize=64)
def learner(
    model: Model, tx: Optimiser, steps: int, *, augment: Augment | None = None, against: Countermeasure | None = None,
    loss: Loss = losses.cross_entropy,
) -> Method:  # fmt: skip
    """Training with a countermeasure: its augmentation follows `augment`; what it prepares is not done here.

    The same arguments give the same object, so that victims of one kind share compiled programs.
    """
    against = against or Countermeasure()
    looks = [part for part in (augment, against.augment) if part is not None]
    return train.sgd(
        model,
        train.optimiser(tx, steps),
        loss=loss,
        augment=augments.compose(*looks) if len(looks) > 1 else looks[0] if looks else None,
        adversary=None if against.adversary is None else against.adversary(model),
        mix=against.mix,
        copies=against.copies,
    )


def released(data: Dataset, perturbation: Perturbation | None) -> Dataset:
    """The protected set as it is published: rounded to 8 bits. BadInput for images that do not lie in [0, 1]."""
    sets.check_unit(data)
    return data._replace(x=jnp.round(sets.perturb(data, perturbation).x * 255) / 255)


def learned(
    model: Model,
    key: Key,
    data: Dataset,
    test: Dataset,
    perturbation: Perturbation | None = None,
    *,
    tx: Optimiser = VICTIM_SGD,
    augment: Augment | None = None,
    against: Countermeasure | None = None,
    epochs: int = 60,
    batch: int = 128,
    watch: Callable[[int, dict[str, float]], Any] = lambda *_: None,
) -> Outcome:
    """Train a fresh victim on the released data and test it on clean images after every epoch.

    tx: an optax transform, or a function of the number of steps that makes one; by default the SoK's SGD 0.1 falling by a
    cosine. `watch(epoch, accuracies)` may print. Report `final` and `peak`: early stopping finds the peak.
    Raises BadInput for noise of another set and NonFinite when training diverges.
    """
    require(epochs >= 1, f"epochs must be at least 1, got {epochs}")
    seen = released(data, perturbation)
    if against is not None and against.prepare is not None:
        seen = against.prepare(keys.named(key, "prepare"), seen)
    per_epoch = sets.steps(len(data.y), batch, 1)
    method = learner(model, tx, per_epoch * epochs, augment=augment, against=against)
    curves: list[tuple[float, float]] = []

    def after(done, state, info):
        right = float(evaluation.accuracy(*models.freeze(model, state.weights), test))
        curves.append((right, float(info["accuracy"].mean())))
        callbacks.reports(watch(len(curves), {"test": right, "train": curves[-1][1]}), "watch")

    state = loop.run(
        method, key, jax.jit(method.init)(key, data.x[:1]), seen,
        steps=per_epoch * epochs, every=per_epoch, after=after, batch=batch,
    )  # fmt: skip
    return Outcome(tuple(t for t, _ in curves), tuple(t for _, t in curves), state.weights)


def trials(
    key: Key,
    data: Dataset,
    perturbation: Perturbation,
    *,
    against: Mapping[str, Countermeasure],
    ball: projected.Ball | None = None,
) -> dict[str, tuple[Dataset, Countermeasure]]:
    """What victims are trained on to measure a perturbation, by name: the released data, and what they do about it.

    "clean", "protected", "protected, NAME" for each countermeasure, "control: random noise" of the same `ball` on the
    same examples, and "control: random labels", which shows what can be reached without learning.
    """
    plain, clean, protected = Countermeasure(), released(data, None), released(data, perturbation)
    found = {"clean": (clean, plain), "protected": (protected, plain)}
    found |= {f"protected, {name}": (protected, one) for name, one in against.items()}
    if ball is not None:
        noise = random_noise(keys.named(key, "random noise"), data, perturbation.mask, ball=ball)
        found["control: random noise"] = released(data, noise), plain
    found["control: random labels"] = random_labels(keys.named(key, "labels"), clean), plain
    return found


def evaluate(
    model: Model,
    key: Key,
    data: Dataset,
    test: Dataset,
    perturbation: Perturbation,
    *,
    against: Mapping[str, Countermeasure],
    ball: projected.Ball | None = None,
    watch: Callable[[str, int, dict[str, float]], Any] = lambda *_: None,
    **how: Any,
) -> dict[str, Outcome]:
    """A fresh victim for each of the `trials`, all with the same key: what protection costs, withstands, and beats.

    `how` is that of `learned`: tx, augment, epochs, batch. `watch(trial, epoch, accuracies)` may print.
    """
    return {
        name: learned(model, key, seen, test, against=one, watch=partial(watch, name), **how)
        for name, (seen, one) in trials(key, data, perturbation, against=against, ball=ball).items()
    }


# --- controls ----------------------------------------------------------------------------------------------------


def random_noise(key: Key, data: Dataset, mask=None, *, ball: projected.Ball, granularity: str = "sample") -> Perturbation:
    """Noise at the full budget that knows nothing, sample-wise or one for each class: what a method must beat.

    l-inf: random signs. l2: a uniform direction. l0: random pixels, black or white in each channel.
    """
    require(granularity in ("sample", "class"), f"granularity must be 'sample' or 'class', got {granularity!r}")
    sets.check_whole(data, int(data.y.max()) + 1)
    mask = sets.check_mask(mask, len(data.y))
    if ball.norm == "l2":
        projected.check_l2(ball.size, data.x.shape[1:])
    sample = granularity == "sample"
    rows = len(data.y) if sample else int(data.y.max()) + 1
    drawn = jax.random.normal(key, (rows, *data.x.shape[1:]))
    noise = jnp.sign(ball.project(drawn)) if ball.norm == "l0" else ball.size * ball.direction(drawn)
    row = jnp.arange(rows, dtype=jnp.int32) if sample else data.y
    worn = jnp.zeros(rows, bool).at[row].max(mask).reshape(-1, *[1] * (noise.ndim - 1))
    return Perturbation(jnp.where(worn, noise, 0.0), row, mask)


def random_labels(key: Key, data: Dataset) -> Dataset:
    """The same images with their labels dealt out at random: what a victim reaches that can learn nothing."""
    return data._replace(y=jnp.asarray(np.asarray(data.y))[jax.random.permutation(key, len(data.y))])
