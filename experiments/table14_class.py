"""SoK Tables 14-17 and 19, 21, 23, 25: unlearning a whole class, protected (0-3) or clean (4-7), and membership inference.

    python experiments/table14_class.py --preset cpu --data cifar10.npz

One network learns classes 0-3 perturbed and 4-9 clean, and forgets one of 0-7 by retraining (RT), influence function (IF),
fine-tuning (FT) and gradient ascent (GA), at a small and a large scale. A cell is a perturbation and a class. Its accuracies:
Du perturbed training images, Duc their clean counterparts, Dut test images; of a clean class Dc and Dct; Dtr test images of
classes 8 and 9. Beside them the success of the three membership attacks on the class's clean images. Weights are kept.
"""

import jax.numpy as jnp
import numpy as np

from dememo_jax import data
from dememo_jax.types import Weights
from lab import models, table
from lab.models import World

PERTURBATIONS, PROTECTED, OBSERVED = ("ue-s", "tue", "pue", "ops"), 4, (8, 9)


def names(world: World) -> list[str]:
    return [f"{kind}.{label}" for kind in PERTURBATIONS for label in world.preset.forgotten]


def asked(name: str) -> tuple[str, int]:
    """Perturbation and class of a cell."""
    kind, label = name.split(".")
    return kind, int(label)


def seen_by(world: World, kind: str):
    """The training images as the victim meets them."""
    training, _ = models.sets_of(world)
    noise = models.noise(world, kind)
    return data.perturb(training, noise._replace(mask=jnp.asarray(np.asarray(training.y) < PROTECTED)))


def versions(world: World, kind: str, label: int) -> list[tuple[str, str, Weights]]:
    """(method, scale, weights) of the victim, the retrained network and each unlearned one."""
    seen = seen_by(world, kind)
    return list(models.versions(world, "class", kind, str(label), seen, np.asarray(seen.y) == label))


def compute(world: World, name: str) -> dict:
    kind, label = asked(name)
    training, test = models.sets_of(world)
    seen, forget, tested = seen_by(world, kind), np.asarray(training.y) == label, np.asarray(test.y)
    own = {"Du": (seen, forget), "Duc": (training, forget), "Dut": (test, tested == label)}
    if label >= PROTECTED:
        own = {"Dc": (training, forget), "Dct": (test, tested == label)}
    parts = own | {"Dtr": (test, np.isin(tested, OBSERVED))}
    return models.told(world, versions(world, kind, label), parts, seen, forget)


def main(argv=None):
    return table.main("table14", __doc__, names, compute, argv)


if __name__ == "__main__":
    main()
