"""SoK Table 3 and Figure 4: what three networks learn of clean test images from perturbed training images.

    python experiments/table03_efficacy.py --preset cpu --data cifar10.npz

Six perturbations of the whole training set and none, with and without augmentation; CIFAR-10. Killed, the same command goes
on; started twice, or on machines that share `--results` and `--work`, the processes share the cells.
"""

from dememo_jax import data, evaluate, tree
from dememo_jax.models import freeze
from lab import models, table
from lab.findings import PERTURBED
from lab.models import World

AUGMENTED = ("augmented", "plain")


def names(world: World) -> list[str]:
    """Most telling first: the paper's setting, one network after another."""
    return [f"{kind}.{net}.{how}" for how in AUGMENTED for net in world.preset.networks for kind in ("clean", *PERTURBED)]


def compute(world: World, name: str) -> dict:
    kind, net, how = name.split(".")
    training, test = models.sets_of(world)
    seen = training if kind == "clean" else data.perturb(training, models.noise(world, kind))
    augment = world.preset.augment if how == "augmented" else "none"
    seed = world.preset.seeds[0]
    weights = models.learned(world, net, seen, seed, augment=augment)
    if not tree.finite(weights):
        return {"value": None, "reason": "the training diverged"}
    frozen = freeze(models.network(world.preset.networks[net]), weights)
    return {
        "value": {"test": float(evaluate.accuracy(*frozen, test)), "training": float(evaluate.accuracy(*frozen, seen))},
        "images": [len(training.y), len(test.y)],
    }


def main(argv=None):
    return table.main("table03", __doc__, names, compute, argv)


if __name__ == "__main__":
    main()
