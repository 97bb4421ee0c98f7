"""The recipes by the names that the command line gives them, with the published numbers where nothing else is asked."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from dememo_jax import projected, protect
from dememo_jax.cli import lineage, networks
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
        return self.base.model_of(self.config.model)

    @property
    def features(self):
        return networks.features(self.config.model, self.base.classes, self.base.test.x.shape[1:-1])

    @property
    def passes(self) -> int | None:
        return DIGITS_PASSES if self.config.passes is None and self.small else self.config.passes

    def batch(self, published: int) -> int:
        return self.config.batch or (DIGITS_BATCH if self.small else published)

    def learner_steps(self, batch: int) -> int:
        """A tenth of the data, as the published 10 batches of 512 are of CIFAR-10."""
        return self.config.learner_steps or max(1, round(len(self.mask) / 10 / batch))

    def common(self, **more: Any) -> dict[str, Any]:
        """The arguments that all learned recipes share, and those of `more` that were given."""
        given = {"inner_steps": self.config.inner_steps, **more}
        shared = {"radius": self.radius, "classes": self.base.classes, "sharpness": self.config.sharpness}
        return shared | {name: value for name, value in given.items() if value is not None}


@functools.lru_cache(maxsize=64)
def _made(recipe: Callable[..., Any], *first: Any, **how: Any) -> Any:
    """`recipe(*first, **how)`, the same object for the same arguments, so that its programs are compiled and kept once."""
    return recipe(*first, **how)


def _alternating(recipe: Callable, job: Job, *, published: int, **more: Any) -> protect.Recipe:
    """UE, GrayAug, lock: a few batches of the learner, then a pass."""
    batch = job.batch(published)
    return _made(
        recipe, job.model, **job.common(batch=batch, learner_steps=job.learner_steps(batch), passes=job.passes, **more)
    )


def _online(recipe: Callable, job: Job, **more: Any) -> protect.Recipe:
    """EM, REM, SEM: 12.8 epochs, the published 5,000 batches of CIFAR-10."""
    batch = job.batch(128)
    steps = math.ceil((job.config.epochs or 12.8) * len(job.mask) / batch)
    return _made(recipe, job.model, **job.common(batch=batch, learner_steps=steps, iterations=min(50, steps), **more))


def _robust(job: Job, *, stable: bool) -> protect.Recipe:
    how = {"draws": job.config.draws, "attack_steps": job.config.attack_steps}
    return _online(protect.robust, job, attack=job.radius / 2, stable=stable, **how)


def _by_epochs(recipe: Callable, job: Job, *first: Any) -> protect.Recipe:
    """AUE, MI-UE: an epoch of the learner, then a pass."""
    return _made(recipe, job.model, *first, **job.common(batch=job.batch(128), passes=job.passes))


def _pretrained(recipe: Callable, job: Job, *first: Any, **more: Any) -> protect.Recipe:
    return _made(recipe, job.model, *first, **job.common(epochs=job.config.epochs, **more))


def _adversarial(job: Job, **how: Any) -> protect.Recipe:
    return _pretrained(protect.adversarial, job, restarts=job.config.restarts, **how)


def _ensemble(job: Job) -> protect.Recipe:
    kept = job.config.draws or min(30, job.config.epochs or 120)
    return _pretrained(protect.self_ensemble, job, checkpoints_kept=kept)


def _entangled(job: Job, form: str) -> protect.Recipe:
    how = {"form": form, "reference": job.radius / 2, "attack_steps": job.config.attack_steps}
    return _pretrained(protect.entangled_features, job, job.features, **how)


def _transferable(job: Job, form: Literal["published", "paper"]) -> protect.Recipe:
    encoder = job.base.model_of(job.config.model, 128) if form == "paper" else None
    how = job.common(batch=job.batch(512), passes=job.config.passes)
    return _made(protect.transferable, encoder, form=form, **how)


def _provable(job: Job) -> protect.Recipe:
    batch, draws = job.batch(128), job.config.draws
    steps = job.config.learner_steps or (job.learner_steps(batch) if job.small else 20)
    how = job.common(batch=batch, learner_steps=steps, passes=job.passes)
    return _made(protect.provable, job.model, learner_draws=draws or 100, noise_draws=min(draws or 10, 10), **how)


def _kernel(job: Job) -> protect.Recipe:
    steps = job.config.passes or 10
    method = _made(protect.ntga, radius=job.radius, classes=job.base.classes, steps=steps)
    return protect.Recipe(method.init, method.step, steps, None, lambda state, data: state.perturbation)


def _random(job: Job, granularity: str) -> Perturbation:
    ball = projected.linf(job.radius)
    return protect.random_noise(job.key, job.base.train, job.mask, ball=ball, granularity=granularity)


def _patches(job: Job) -> Perturbation:
    side = 8 if min(job.base.train.x.shape[1:3]) >= 32 else 2
    return protect.linear_patches(job.key, job.base.train, job.mask, classes=job.base.classes, patch=side, radius=job.radius)


def _autoregressive(job: Job) -> Perturbation:
    return protect.autoregressive(job.key, job.base.train, job.mask, classes=job.base.classes, radius=job.radius)


def _filters(job: Job) -> Perturbation:
    return protect.convolution_filters(job.key, job.base.train, job.mask, classes=job.base.classes)


def _pixels(job: Job) -> Perturbation:
    return protect.one_pixel(job.base.train, job.mask, classes=job.base.classes, pixels=job.config.pixels)


class Kind(NamedTuple):
    """A method's norm, its published budget as a function of the numbers in an image, and how it is made."""

    norm: str | None
    radius: Callable[[int], float] | None
    make: Callable[[Job], protect.Recipe | Perturbation]


def _linf(make: Callable[[Job], Any], levels: int = 8) -> Kind:
    return Kind("linf", lambda size: levels / 255, make)


_UE = partial(_alternating, protect.error_minimizing, published=512)
KINDS: dict[str, Kind] = {
    "ue-s": _linf(_UE),
    "ue-c": _linf(partial(_UE, granularity="class")),
    "gray": _linf(partial(_UE, gray=True)),
    "em": _linf(partial(_online, protect.minimizing_online)),
    "rem": _linf(partial(_robust, stable=False)),
    "sem": _linf(partial(_robust, stable=True)),
    "aue": _linf(partial(_by_epochs, protect.augmented_minimizing)),
    "mi": _linf(lambda job: _by_epochs(protect.mutual_information, job, job.features)),
    "lock": _linf(partial(_alternating, protect.learnability_lock, published=128)),
    "tap": _linf(_adversarial),
    "tap-untargeted": _linf(partial(_adversarial, untargeted=True)),
    "hypo": Kind("l2", lambda size: 0.5, partial(_pretrained, protect.hypocritical)),
    "sep": _linf(_ensemble, 2),
    "entf-push": _linf(partial(_entangled, form="push")),
    "entf-pull": _linf(partial(_entangled, form="pull")),
    "clog": _linf(partial(_pretrained, protect.tensor_clog)),
    "pil": _linf(lambda job: _made(protect.linear_surrogate, **job.common(epochs=job.config.epochs))),
    "tue": _linf(partial(_transferable, form="published")),
    "tue-paper": _linf(partial(_transferable, form="paper")),
    "pue": _linf(_provable),
    "ntga": _linf(_kernel),
    "ops": Kind("l0", None, _pixels),
    "lsp": Kind("l2", lambda size: 6 / 255 * math.sqrt(size), _patches),
    "ar": Kind("l2", lambda size: math.sqrt(size / 3072), _autoregressive),
    "cuda": Kind(None, None, _filters),
    "random": _linf(partial(_random, granularity="sample")),
    "random-class": _linf(partial(_random, granularity="class")),
}
BLIND = ("tue", "ntga", "ops", "lsp", "ar", "cuda", "random", "random-class")  # their noise meets no network's weights


def radius(config: Protect, base: lineage.Source) -> float | None:
    """The budget: as asked, or as published. None where the method has none in a norm."""
    kind = KINDS[config.method]
    if kind.radius is None:
        require(config.radius is None, f"{config.method} has no budget in a norm: leave --radius away")
        return None
    if config.radius is not None:
        if kind.norm == "l2":
            projected.check_l2(config.radius, base.train.x.shape[1:])
        return config.radius
    published = kind.radius(int(np.prod(base.train.x.shape[1:])))
    return published * scale(base)


def scale(base: lineage.Known) -> float:
    """How many times the published budgets suit the data."""
    return DIGITS if base.name == "digits" else 1.0


def make(config: Protect, base: lineage.Source, mask: np.ndarray, budget: float | None) -> protect.Recipe | Perturbation:
    """The recipe of that name, or at once the perturbation of a method without gradients."""
    require(config.method not in BLIND or not config.sharpness, f"{config.method} looks at no weights: leave --sharpness away")
    return KINDS[config.method].make(Job(config, base, mask, budget or 0.0, jax.random.key(config.seed)))
