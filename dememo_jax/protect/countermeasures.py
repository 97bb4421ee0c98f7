"""What a victim may do against protected data while it trains, with the settings that the literature tests."""

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dememo_jax import augment as augments
from dememo_jax import data as sets
from dememo_jax import keys, loop, models, projected, train
from dememo_jax.augment import Augment, Mix
from dememo_jax.errors import require
from dememo_jax.train import View
from dememo_jax.types import Array, Dataset, Key, Model


class Countermeasure(NamedTuple):
    """Done once to the training images; to each batch; against the victim itself; to pairs of examples; how often."""

    prepare: Callable[[Key, Dataset], Dataset] | None = None
    augment: Augment | None = None
    adversary: Callable[[Model], View] | None = None
    mix: Mix | None = None
    copies: int = 1  # the loss of an example is the worst of so many draws


def combine(*parts: Countermeasure) -> Countermeasure:
    """All of them: preparations and augmentations in order. BadInput for two adversaries or two ways to mix."""

    def only(name):
        given = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        require(len(given) <= 1, f"two countermeasures have an entry for {name!r}; only one can")
        return given[0] if given else None

    prepares = [part.prepare for part in parts if part.prepare is not None]
    looks = [part.augment for part in parts if part.augment is not None]

    def prepare(key, data):
        for i, one in enumerate(prepares):
            data = one(keys.at(key, i), data)
        return data

    return Countermeasure(
        prepare if prepares else None,
        augments.compose(*looks) if len(looks) > 1 else looks[0] if looks else None,
        only("adversary"),
        only("mix"),
        max((part.copies for part in parts), default=1),
    )


def once(augment: Augment, block: int = 512) -> Callable[[Key, Dataset], Dataset]:
    """An augmentation of the whole set, before training: for those that do the same every time."""

    @jax.jit
    def images(key, x):
        at = jnp.asarray(sets.blocks(len(x), block)[0])
        parts = jax.lax.map(lambda job: augment(keys.at(key, job[0]), x[job[1]]), (jnp.arange(len(at)), at))
        return parts.reshape(-1, *x.shape[1:])[: len(x)]

    return lambda key, data: data._replace(x=images(key, data.x))


def shortcut_directions(
    key: Key, data: Dataset, *, classes: int, epochs: int = 20, batch: int = 1024, lr: float = 0.1
) -> Array:
    """Orthonormal directions [D, K - 1] that a linear classifier without bias finds in images: Sandoval-Segura et al. 2023.

    SGD at `lr`, tenfold less from one half and from three quarters of the epochs, as published. From weights of zero, where
    the published code starts at random, so that nothing but what is learned is taken out: the weights of K classes then
    add up to zero, and span K - 1 directions.
    """
    linear = models.from_apply(partial(_zeros, classes), lambda params, x: x.reshape(len(x), -1) @ params["w"])
    steps = sets.steps(len(data.y), min(batch, len(data.y)), epochs)
    method = train.sgd(linear, train.dropping_sgd(lr, 0.0, 0.0, (0.5, 0.75), False, steps))
    run = jax.jit(partial(loop.scan, method, steps=steps, batch=min(batch, len(data.y))))
    state = run(key, method.init(key, data.x[:1]), data)[0]
    return jnp.linalg.qr(state.weights.params["w"])[0][:, :-1]


def _zeros(classes: int, key: Key, x: Array) -> dict[str, Array]:
    return {"w": jnp.zeros((x[0].size, classes))}


def project_out(key: Key, data: Dataset) -> Dataset:
    """Take the shortcut directions out of the training images: undoes noise that is linear in the class."""
    directions = shortcut_directions(key, data, classes=int(data.y.max()) + 1)
    return once(augments.orthogonal(directions))(key, data)


def adversarial_training(ball: projected.Ball, steps: int = 10) -> Callable[[Model], View]:
    """PGD-10 in steps of a quarter of the budget (2/255 of 8/255); in l2 of a fifth."""
    stride = ball.size / (4 if ball.norm == "linf" else 5)
    return lambda model: train.adversary(model, ball, stride=stride, steps=steps)


def _half_cutout(key: Key, x: Array) -> Array:
    return augments.cutout(x.shape[1] // 2)(key, x)  # 16 pixels of 32


NAMES = (
    "rotation", "cutout", "mixup", "cutmix", "jitter", "gaussian", "gray", "bdr", "jpeg", "ueraser-lite", "ueraser-max", "at",
    "at-l2", "orthogonal",
)  # fmt: skip


def countermeasure(name: str, *, scale: float = 1.0) -> Countermeasure:
    """One of `NAMES` at the settings that the literature tests on CIFAR-10.

    rotation by 15 degrees; cutout of half the side; mixup, cutmix (beta 1); jitter (.4, .4, .4, .1); gaussian noise of 8/255;
    gray, bdr (2 bits), jpeg (quality 10): once, on the training images (ISS); ueraser-lite, ueraser-max (worst of 5 draws);
    at: PGD-10 in l-inf 8/255, at-l2: in l2 0.5; orthogonal: the shortcut directions of a linear classifier taken out.
    scale: times those budgets of gaussian, at and at-l2. The same arguments give the same object.
    """
    return _countermeasure(name, float(scale))


@functools.lru_cache
def _countermeasure(name: str, scale: float) -> Countermeasure:
    require(name in NAMES, f"unknown countermeasure {name!r}; expected one of {', '.join(NAMES)}")
    makers: dict[str, Callable[[], Countermeasure]] = {
        "rotation": lambda: Countermeasure(augment=augments.rotation(15)),
        "cutout": lambda: Countermeasure(augment=_half_cutout),
        "mixup": lambda: Countermeasure(mix=augments.mixup()),
        "cutmix": lambda: Countermeasure(mix=augments.cutmix()),
        "jitter": lambda: Countermeasure(augment=augments.jitter(0.4, 0.4, 0.4, 0.1)),
        "gaussian": lambda: Countermeasure(augment=augments.gaussian(scale * 8 / 255)),
        "gray": lambda: Countermeasure(prepare=once(augments.grayscale())),
        "bdr": lambda: Countermeasure(prepare=once(augments.bit_depth(2))),
        "jpeg": lambda: Countermeasure(prepare=once(augments.jpeg(10))),
        "ueraser-lite": lambda: Countermeasure(augment=augments.ueraser()),
        "ueraser-max": lambda: Countermeasure(augment=augments.ueraser(), copies=5),
        "at": lambda: Countermeasure(adversary=adversarial_training(projected.linf(scale * 8 / 255))),
        "at-l2": lambda: Countermeasure(adversary=adversarial_training(projected.l2(scale * 0.5))),
        "orthogonal": lambda: Countermeasure(prepare=project_out),
    }
    return makers[name]()
