"""SoK Tables 10-13 and 18, 20, 22, 24: unlearning the perturbed or the clean part of a class, and membership inference.

    python experiments/table10_subset.py --preset cpu --data cifar10.npz

One network learns every class with 90 % of its images perturbed and 10 % clean, and forgets the perturbed (Du) or the clean
(Dc) images of one of the classes 0-7, by the methods and scales of `table14_class`. A cell is a perturbation, a class and what
is forgotten. Its accuracies: Du as seen, Duc their clean counterparts, Dc, and Dt the whole test set.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import data
from lab import models, table
from lab.models import World

PERTURBATIONS, SHARE = ("ue-s", "tue", "pue", "ops"), 0.9


def names(world: World) -> list[str]:
    return [f"{kind}.{label}.{part}" for kind in PERTURBATIONS for label in world.preset.forgotten for part in ("Du", "Dc")]


def compute(world: World, name: str) -> dict:
    kind, label, part = name.split(".")
    training, test = models.sets_of(world)
    labels, seed = np.asarray(training.y), world.preset.seeds[0]
    perturbed = data.share_of(jax.random.key(seed), np.ones(len(labels), bool), labels, SHARE)
    seen = data.perturb(training, models.noise(world, kind)._replace(mask=jnp.asarray(perturbed)))
    du, dc = ((labels == int(label)) & which for which in (perturbed, ~perturbed))
    parts = {"Du": (seen, du), "Duc": (training, du), "Dc": (training, dc), "Dt": (test, np.ones(len(test.y), bool))}
    forget = du if part == "Du" else dc
    return models.told(world, models.versions(world, f"subset-{part}", kind, label, seen, forget), parts, seen, forget)


def main(argv=None):
    return table.main("table10", __doc__, names, compute, argv)


if __name__ == "__main__":
    main()
