"""SoK Figure 19: what a network learns of clean test images as the share of perturbed training images rises.

    python experiments/figure19_share.py --preset cpu --data cifar10.npz

Class-wise perturbations (UE-c, PUE, OPS) of a random share of every class (the paper: ImageNet-100); a cell is a perturbation
and a share. Beside it what the clean images alone would teach, without the perturbed ones.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import data, evaluate, tree
from dememo_jax.models import freeze
from lab import models, table
from lab.models import World

PERTURBATIONS, SHARES = ("ue-c", "pue", "ops"), (20, 40, 60, 80, 100)


def names(world: World) -> list[str]:
    return [f"{kind}.{share}" for kind in PERTURBATIONS for share in SHARES]


def compute(world: World, name: str) -> dict:
    kind, share = name.split(".")
    training, test = models.sets_of(world)
    seed = world.preset.seeds[0]
    part = data.share_of(jax.random.key(seed), np.ones(len(training.y), bool), training.y, int(share) / 100)
    seen = data.perturb(training, models.noise(world, kind)._replace(mask=jnp.asarray(part)))
    value: dict[str, float | None] = {}
    for what, mask in (("perturbed", None), ("clean part alone", ~part)):
        if mask is not None and not mask.any():
            value[what] = None
            continue
        weights = models.learned(world, "resnet18", seen, seed, mask=mask)
        frozen = freeze(world.model, weights)
        value[what] = float(evaluate.accuracy(*frozen, test)) if tree.finite(weights) else None
    return {"value": value, "images": [len(training.y), len(test.y)]}


def main(argv=None):
    return table.main("figure19", __doc__, names, compute, argv)


if __name__ == "__main__":
    main()
