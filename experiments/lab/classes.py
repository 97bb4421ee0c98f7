"""Class level: classes 0-3 are learned perturbed, 4-9 clean; one of 0-7 is forgotten, 8 and 9 are observed (SoK 6.2)."""

import jax.numpy as jnp
import numpy as np

from dememo_jax import data
from dememo_jax.types import Dataset, Weights
from lab import models
from lab.models import World

PERTURBATIONS, PROTECTED, OBSERVED = ("ue-s", "tue", "pue", "ops"), 4, (8, 9)


def names(world: World) -> list[str]:
    return [f"{kind}.{label}" for kind in PERTURBATIONS for label in world.preset.forgotten]


def asked(name: str) -> tuple[str, int]:
    """Perturbation and class of a cell."""
    kind, label = name.split(".")
    return kind, int(label)


def class_kind(name: str) -> str:
    """Whether a cell's class is protected or clean."""
    return "protected" if int(name.split(".")[1]) < PROTECTED else "clean"


def seen_by(world: World, kind: str) -> Dataset:
    """The training images as the victim meets them."""
    training, _ = models.sets_of(world)
    noise = models.noise(world, kind)
    return data.perturb(training, noise._replace(mask=jnp.asarray(np.asarray(training.y) < PROTECTED)))


def versions(world: World, kind: str, label: int) -> list[tuple[str, str, Weights]]:
    """(method, scale, weights) of the victim, the retrained network and each unlearned one."""
    seen = seen_by(world, kind)
    return list(models.versions(world, "class", kind, str(label), seen, np.asarray(seen.y) == label))
