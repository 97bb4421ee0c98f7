"""The recipes by the names that the command line gives them, with the published numbers where nothing else is asked."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from dememo_jax import projected, protect
from dememo_jax.cli import lineage
from dememo_jax.cli.configs import Protect
from dememo_jax.errors import require
from dememo_jax.types import Key, Perturbation

DIGITS = 6.375  # times the published budgets: 8 x 8 images have 64 pixels, and 8/255 hides nothing in them
DIGITS_PASSES, DIGITS_BATCH = 15, 64


@dataclass(frozen=True)
class Job:
    """What a recipe is made of."""

    config: Protect
    base: lineage.Source
    mask: np.ndarray
    radius: float
    key: Key

    @property
    def small(self) -> bool:
        return scale(self.base) > 1

    @property
    def model(self):
        return lineage.model(self.config.model, self.base.classes)

    @property
    def features(self):
        return lineage.features(self.config.model, self.base.classes)

    @property
    def passes(self) -> int | None:
        return DIGITS_PASSES if self.config.passes is None and self.small else self.config.passes

    def batch(self, published: int) -> int:
        return self.config.batch or (DIGITS_BATCH if self.small else published)

    def learner_steps(self, batch: int) -> int:
        """A tenth of the data, as the published 10 batches of 512 are of CIFAR-10."""
        return self.config.learner_steps or max(1, round(len(self.mask) / 10 / batch))

    def common(self, **more: Any) -> dict[str, Any]:
        """The arguments that all recipes share, and those of `more` that were given."""
        return {"radius": self.radius, "classes": self.base.classes} | {k: v for k, v in more.items() if v is not None}


def _alternating(recipe: Callable, job: Job, *, published: int, **more: Any) -> protect.Recipe:
    """UE, GrayAug, lock: a few batches of the learner, then a pass."""
    batch = job.batch(published)
    how = job.common(
        batch=batch, learner_steps=job.learner_steps(batch), passes=job.passes, inner_steps=job.config.inner_steps, **more
    )
    return recipe(job.model, sharpness=job.config.sharpness, **how)


def _online(recipe: Callable, job: Job, **more: Any) -> protect.Recipe:
    """EM, REM, SEM: 12.8 epochs, the published 5,000 batches of CIFAR-10."""
    batch = job.batch(128)
    steps = math.ceil((job.config.epochs or 12.8) * len(job.mask) / batch)
    if recipe is protect.robust:
        more |= {"draws": job.config.draws, "attack_steps": job.config.attack_steps}
    how = job.common(batch=batch, learner_steps=steps, inner_steps=job.config.inner_steps, **more)
    return recipe(job.model, iterations=min(50, steps), sharpness=job.config.sharpness, **how)


def _pretrained(recipe: Callable, job: Job, *first: Any, **more: Any) -> protect.Recipe:
    return recipe(job.model, *first, **job.common(epochs=job.config.epochs, inner_steps=job.config.inner_steps, **more))


def _sharp(job: Job) -> dict[str, float]:
    return {"sharpness": job.config.sharpness}


def _by_epochs(recipe: Callable, job: Job, *first: Any) -> protect.Recipe:
    """AUE, MI-UE: an epoch of the learner, then a pass."""
    how = job.common(batch=job.batch(128), passes=job.passes, inner_steps=job.config.inner_steps)
    return recipe(job.model, *first, **_sharp(job), **how)


def _transferable(job: Job, form: Literal["published", "paper"]) -> protect.Recipe:
    encoder = lineage.model(job.config.model, 128) if form == "paper" else None
    how = job.common(batch=job.batch(512), passes=job.config.passes, inner_steps=job.config.inner_steps)
    return protect.transferable(encoder, form=form, **how)


def _provable(job: Job) -> protect.Recipe:
    batch = job.batch(128)
    steps = job.config.learner_steps or (20 if not job.small else job.learner_steps(batch))
    how = job.common(batch=batch, learner_steps=steps, passes=job.passes, inner_steps=job.config.inner_steps)
    draws = job.config.draws
    return protect.provable(job.model, learner_draws=draws or 100, noise_draws=min(draws or 10, 10), **how)


def _kernel(job: Job) -> protect.Recipe:
    method = protect.ntga(**job.common(steps=job.config.passes))
    return protect.Recipe(method.init, method.step, job.config.passes or 10, None, lambda state, data: state.perturbation)


def _random(job: Job, granularity: str) -> Perturbation:
    return protect.random_noise(job.key, job.base.train, job.mask, ball=projected.linf(job.radius), granularity=granularity)


def _patches(job: Job) -> Perturbation:
    side = 8 if min(job.base.train.x.shape[1:3]) >= 32 else 2
    return protect.linear_patches(job.key, job.base.train, job.mask, classes=job.base.classes, patch=side, radius=job.radius)


class Kind(NamedTuple):
    """A method's norm, its published budget (a function of the numbers in an image), and how it is made."""

    norm: str | None
    radius: Callable[[int], float] | None
    make: Callable[[Job], protect.Recipe | Perturbation]
    sharp: bool = False  # whether it takes --sharpness


def _eight(size: int) -> float:
    return 8 / 255


def _linf(make: Callable[[Job], Any], *, radius: Callable[[int], float] = _eight, sharp: bool = False) -> Kind:
    return Kind("linf", radius, make, sharp)


def _minimizing(**how: Any) -> Callable[[Job], Any]:
    return lambda job: _alternating(protect.error_minimizing, job, published=512, **how)


KINDS: dict[str, Kind] = {
    "ue-s": _linf(_minimizing(), sharp=True),
    "ue-c": _linf(_minimizing(granularity="class"), sharp=True),
    "gray": _linf(_minimizing(gray=True), sharp=True),
    "em": _linf(partial(_online, protect.minimizing_online), sharp=True),
    "rem": _linf(lambda job: _online(protect.robust, job, attack=job.radius / 2), sharp=True),
    "sem": _linf(lambda job: _online(protect.robust, job, attack=job.radius / 2, stable=True), sharp=True),
    "aue": _linf(partial(_by_epochs, protect.augmented_minimizing), sharp=True),
    "mi": _linf(lambda job: _by_epochs(protect.mutual_information, job, job.features), sharp=True),
    "lock": _linf(lambda job: _alternating(protect.learnability_lock, job, published=128), sharp=True),
    "tap": _linf(lambda job: _pretrained(protect.adversarial, job, restarts=job.config.restarts, **_sharp(job)), sharp=True),
    "tap-untargeted": _linf(
        lambda job: _pretrained(partial(protect.adversarial, offset=None), job, restarts=job.config.restarts, **_sharp(job)),
        sharp=True,
    ),
    "hypo": Kind("l2", lambda size: 0.5, lambda job: _pretrained(protect.hypocritical, job, **_sharp(job)), True),
    "sep": _linf(lambda job: _ensemble(job), radius=lambda size: 2 / 255, sharp=True),
    "entf-push": _linf(lambda job: _entangled(job, "push")),
    "entf-pull": _linf(lambda job: _entangled(job, "pull")),
    "clog": _linf(partial(_pretrained, protect.tensor_clog)),
    "pil": _linf(
        lambda job: protect.linear_surrogate(**job.common(epochs=job.config.epochs, inner_steps=job.config.inner_steps))
    ),
    "tue": _linf(partial(_transferable, form="published")),
    "tue-paper": _linf(partial(_transferable, form="paper")),
    "pue": _linf(_provable),
    "ntga": _linf(_kernel),
    "ops": Kind(
        "l0",
        None,
        lambda job: protect.one_pixel(job.base.train, job.mask, classes=job.base.classes, pixels=job.config.pixels),
    ),
    "lsp": Kind("l2", lambda size: 6 / 255 * math.sqrt(size), _patches),
    "ar": Kind(
        "l2",
        lambda size: math.sqrt(size / 3072),
        lambda job: protect.autoregressive(job.key, job.base.train, job.mask, classes=job.base.classes, radius=job.radius),
    ),
    "cuda": Kind(
        None,
        None,
        lambda job: protect.convolution_filters(job.key, job.base.train, job.mask, classes=job.base.classes),
    ),
    "random": _linf(partial(_random, granularity="sample")),
    "random-class": _linf(partial(_random, granularity="class")),
}


def _ensemble(job: Job) -> protect.Recipe:
    kept = job.config.draws or min(30, job.config.epochs or 120)
    return _pretrained(protect.self_ensemble, job, checkpoints_kept=kept, **_sharp(job))


def _entangled(job: Job, form: str) -> protect.Recipe:
    how = {"form": form, "reference": job.radius / 2, "attack_steps": job.config.attack_steps}
    return _pretrained(protect.entangled_features, job, job.features, **how)


def radius(config: Protect, base: lineage.Source) -> float | None:
    """The budget: as asked, or as published. None where the method has none in a norm."""
    kind = KINDS[config.method]
    if kind.radius is None:
        require(config.radius is None, f"{config.method} has no budget in a norm: leave --radius away")
        return None
    if config.radius is not None:
        return config.radius
    published = kind.radius(int(np.prod(base.train.x.shape[1:])))
    return published * scale(base)


def scale(base: lineage.Source) -> float:
    """How many times the published budgets suit the data."""
    return DIGITS if base.name == "digits" else 1.0


def make(config: Protect, base: lineage.Source, mask: np.ndarray, budget: float | None) -> protect.Recipe | Perturbation:
    """The recipe of that name, or at once the perturbation of a method without gradients."""
    kind = KINDS[config.method]
    require(kind.sharp or not config.sharpness, f"{config.method} does not take --sharpness")
    return kind.make(Job(config, base, mask, budget or 0.0, jax.random.key(config.seed)))
