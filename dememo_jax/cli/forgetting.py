"""The unlearning methods by the names that the command line gives them, with the published numbers where nothing is asked."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dememo_jax import data as sets
from dememo_jax import models, train, unlearn
from dememo_jax.cli import lineage, networks, runs
from dememo_jax.cli.configs import Unlearn
from dememo_jax.errors import require
from dememo_jax.types import Array, Weights

# What belongs to some methods only: given to another, it is refused.
OPTIONS = (
    "retain_weight", "beta", "hold", "share", "forget_rounds", "rewind", "strength", "layers", "radius", "alpha", "inverse",
    "damping", "samples", "epsilon", "steps", "clip_init", "clip_grad", "clip_model", "noise_decay", "centre", "noise_seed",
    "delta", "comparator",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a method is made of."""

    config: Unlearn
    base: lineage.Trained
    forget: np.ndarray  # [N] bool
    epochs: int
    lr: float

    @property
    def batch(self) -> int:
        return self.config.batch or 64

    @property
    def mask(self) -> Array:
        return jnp.asarray(self.forget)

    @property
    def counts(self) -> tuple[int, int]:
        return int(self.forget.sum()), int((~self.forget).sum())

    def get(self, name: str, default: Any) -> Any:
        given = getattr(self.config, name)
        return default if given is None else given

    def given(self, **named: str) -> dict[str, Any]:
        """Arguments of a recipe from fields of the configuration, where they were given."""
        return {to: value for to, name in named.items() if (value := getattr(self.config, name)) is not None}

    @property
    def decay(self) -> float:
        return self.base.trained["weight_decay"]

    def usual(self, steps: int | None = None, lr: float | None = None) -> optax.GradientTransformation:
        """The victim's optimizer at the rate in question; with steps, on its schedule over so many."""
        known = self.base.trained
        schedule = "constant" if steps is None else known["schedule"]
        rate = self.lr if lr is None else lr
        return train.usual(known["optimizer"], schedule, rate, known["momentum"], self.decay, steps or 1)

    def descend(self, recipe: Callable, transform: optax.GradientTransformation | None = None, **how: Any) -> unlearn.Unlearner:
        how = {"batch": self.batch, "augment": networks.augmentation(self.base.trained["augment"]), **how}
        if recipe is not unlearn.retrain:
            how["mode"] = self.config.statistics
        if self.base.language is not None and "nll" in inspect.signature(recipe).parameters:
            how["nll"] = self.base.loss  # the others compare the labels with each other
        return networks.method(recipe, self.base.trainee, transform or self.usual(), **how)


# --- methods that descend ----------------------------------------------------------------------------------------


@functools.lru_cache
def _adam(lr: float, decay: float) -> optax.GradientTransformation:
    return optax.adamw(lr, weight_decay=decay)


def _retrain(job: Job) -> unlearn.Unlearner:
    return job.descend(unlearn.retrain, job.usual(sets.steps(job.counts[1], job.batch, job.epochs)))


def _npo(job: Job) -> unlearn.Unlearner:
    return job.descend(unlearn.npo, lengths=_lengths(job), **job.given(beta="beta", retain="retain_weight", hold="hold"))


def _simnpo(job: Job) -> unlearn.Unlearner:
    return job.descend(unlearn.simnpo, lengths=_lengths(job), **job.given(beta="beta", retain="retain_weight"))


def _lengths(job: Job) -> tuple[int, ...] | None:
    """The tokens of each label, where a language model answers with labels."""
    language = job.base.language
    return None if language is None else tuple(len(label) for label in language.labels)


def _random(job: Job) -> unlearn.Unlearner:
    return job.descend(unlearn.random_labels, classes=job.base.classes)


def _salun(job: Job) -> unlearn.Unlearner:
    return job.descend(unlearn.salun, classes=job.base.classes, **job.given(share="share"))


def _scrub(job: Job) -> unlearn.Unlearner:
    batches = (job.batch, job.batch)
    recipe = _keeping_scrub if job.config.rewind else _plain_scrub
    how = job.given(forget_rounds="forget_rounds") | ({"epochs": job.epochs} if job.config.rewind else {})
    return job.descend(recipe, _adam(job.lr, job.decay), batches=batches, **how)


# SCRUB has a batch size for each set in the place of one for both.
def _plain_scrub(model, tx, *, batch, **how):
    return unlearn.scrub(model, tx, **how)


def _keeping_scrub(model, tx, *, batch, epochs, **how):
    return unlearn.keeping(unlearn.scrub(model, tx, **how), epochs)


def _bad_teacher(job: Job) -> unlearn.Unlearner:
    return job.descend(unlearn.bad_teacher, _adam(job.lr, 0.0), **job.given(share="share"))


def _l1(job: Job) -> unlearn.Unlearner:
    steps = sets.steps(job.counts[1], job.batch, job.epochs)
    return job.descend(unlearn.l1_sparse, steps=steps, **job.given(strength="strength"))


def _expand(model, tx, *, wider, **how):
    return unlearn.boundary_expand(model, wider, tx, **how)


def _boundary_expand(job: Job) -> unlearn.Unlearner:
    wider = job.base.model_of(job.base.trained["model"], job.base.classes + 1, job.base.trained["precision"])
    return job.descend(_expand, wider=wider, classes=job.base.classes)


# --- methods of one step -----------------------------------------------------------------------------------------


def _influence(job: Job) -> tuple[Weights, dict]:
    apply, params = job.base.frozen
    decay = job.decay if job.base.trained["optimizer"] == "sgd" else 0.0  # AdamW's is no part of the loss
    how = {"variant": job.get("inverse", "fisher"), "alpha": job.get("alpha", 0.3), "weight_decay": decay}
    how |= {"damping": job.get("damping", 0.1), **job.given(samples="samples", batch="batch")}
    done = unlearn.influence(apply, params, job.base.seen, job.forget, key=jax.random.key(job.config.seed), **how)
    facts = {name: value for name, value in dataclasses.asdict(done).items() if name != "params"}
    return job.base.weights._replace(params=done.params), facts


def _ssd(job: Job) -> tuple[Weights, dict]:
    how = {
        "alpha": job.get("alpha", 100.0 if job.base.name == "digits" else 10.0),
        **job.given(strength="strength", batch="batch"),
    }
    done = unlearn.ssd(*models.freeze(job.base.model, job.base.weights), job.base.seen, job.forget, **how)
    facts = {"share": done.share, "length": done.length, "relative": done.relative}
    return job.base.weights._replace(params=done.params), facts


class Kind(NamedTuple):
    """A method: passes and learning rate as published for CIFAR-10 and as tuned for digits, and what else it reads."""

    make: Callable[[Job], Any]
    published: tuple[int, float] | None = None
    digits: tuple[int, float] | None = None
    options: tuple[str, ...] = ()
    family: str = "descent"  # or "step" or "certified"


PICTURED = ("boundary-shrink", "boundary-expand", "unsir")  # what they do is done to pixels, or with one class more
ADAM = ("scrub", "bad-teacher")  # as published, whatever the victim was trained by
_CERTIFIED = ("epsilon", "delta", "comparator", "clip_init", "centre", "noise_seed")


def _certified(*options: str) -> Kind:
    return Kind(lambda job: None, (10, 0.001), (10, 0.001), (*_CERTIFIED, *options), "certified")


KINDS: dict[str, Kind] = {
    "retrain": Kind(_retrain),
    "finetune": Kind(lambda job: job.descend(unlearn.finetune), (10, 0.015), (10, 0.1)),
    "gradient-ascent": Kind(lambda job: job.descend(unlearn.gradient_ascent), (5, 1e-4), (5, 1e-3)),
    "neggrad-plus": Kind(
        lambda job: job.descend(unlearn.negative_gradient, **job.given(retain="retain_weight")), (5, 0.01), (5, 0.003),
        ("retain_weight",),
    ),
    "npo": Kind(_npo, (10, 0.01), (10, 0.01), ("beta", "retain_weight", "hold")),
    "simnpo": Kind(_simnpo, (10, 0.01), (10, 0.01), ("beta", "retain_weight")),
    "random-labels": Kind(_random, (10, 0.01), (10, 0.1)),
    "salun": Kind(_salun, (10, 0.013), (10, 0.1), ("share",)),
    "scrub": Kind(_scrub, (10, 5e-4), (10, 0.02), ("forget_rounds", "rewind")),
    "bad-teacher": Kind(_bad_teacher, (1, 1e-4), (5, 0.03), ("share",)),
    "l1-sparse": Kind(_l1, (10, 0.01), (10, 0.1), ("strength",)),
    "boundary-shrink": Kind(
        lambda job: job.descend(unlearn.boundary_shrink, **job.given(radius="radius")), (10, 1e-4), (10, 1e-3), ("radius",)
    ),
    "boundary-expand": Kind(_boundary_expand, (10, 1e-4), (10, 0.003)),
    "unsir": Kind(lambda job: job.descend(unlearn.unsir), (1, 1e-4), (10, 0.03)),
    "cf-k": Kind(
        lambda job: job.descend(unlearn.catastrophic_forgetting, **job.given(layers="layers")), (10, 0.01), (10, 0.1),
        ("layers",),
    ),
    "eu-k": Kind(
        lambda job: job.descend(unlearn.exact_last_layers, **job.given(layers="layers")), (10, 0.1), (10, 0.1), ("layers",)
    ),
    "ssd": Kind(_ssd, options=("alpha", "strength"), family="step"),
    "influence": Kind(_influence, options=("alpha", "inverse", "damping", "samples"), family="step"),
    "noisy": _certified("steps", "clip_grad", "noise_decay"),
    "noisy-clip": _certified("steps", "clip_model", "noise_decay"),
    "output-noise": _certified(),
}  # fmt: skip


def effort(config: Unlearn, base: lineage.Trained) -> tuple[int, float]:
    """Epochs and learning rate: as asked, as published, or of retraining as the victim was trained."""
    kind = KINDS[config.method]
    if config.method == "retrain":
        usual = (base.trained["epochs"], base.trained["lr"])
    else:
        usual = (kind.digits if base.name == "digits" else kind.published) or (0, 0.0)
        strange = kind.family == "descent" and config.method not in ADAM and base.trained["optimizer"] != "sgd"
        require(
            config.lr is not None or not strange,
            f"the usual learning rate of {config.method} is for sgd, and {config.source} was trained by "
            f"{base.trained['optimizer']}: give --lr",
        )
    if kind.family == "step":
        require(config.epochs is None and config.lr is None, f"{config.method} is one step: leave --epochs and --lr away")
    return (usual[0] if config.epochs is None else config.epochs), (usual[1] if config.lr is None else config.lr)


def check_options(config: Unlearn) -> None:
    """BadInput for an option that the method does not read, or a value that none can."""
    kind = KINDS[config.method]
    plain = {field.name: field.default for field in dataclasses.fields(Unlearn)}
    for name in OPTIONS:
        strange = getattr(config, name) != plain[name] and name not in kind.options
        readers = ", ".join(method for method, one in KINDS.items() if name in one.options)
        require(not strange, f"--{name.replace('_', '-')} belongs to {readers}; {config.method} does not read it")
    deaf = kind.family != "descent" or config.method == "retrain"
    require(
        not deaf or config.statistics == "fit",
        f"--statistics belongs to methods that descend from the given weights; {config.method} does not read it",
    )
    require(config.method != "output-noise" or config.lr is None, "output-noise takes no steps: leave --lr away")
    decay = config.noise_decay
    require(decay is None or 0 <= decay < math.inf, f"--noise-decay must not be negative, or infinite, got {decay}")
    names = (
        "alpha", "batch", "beta", "share", "forget_rounds", "layers", "strength", "radius", "damping", "samples", "epsilon",
        "delta", "steps", "clip_init", "clip_grad", "clip_model",
    )  # fmt: skip
    runs.positive(**{name: getattr(config, name) for name in names})


def check_counts(job: Job) -> None:
    """BadInput for what the numbers of examples do not allow."""
    samples, retained = job.config.samples, job.counts[1]
    require(samples is None or samples <= retained, f"--samples {samples} are more than the {retained} retained examples")


def chunk(steps: int, epochs: int) -> int:
    """Steps between two looks at a run: about an epoch."""
    return max(1, math.ceil(steps / max(1, epochs)))
