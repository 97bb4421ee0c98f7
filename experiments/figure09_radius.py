"""SoK Figure 9: how much of what a perturbation hides comes back inside a ball of weights, radius by radius.

    python experiments/figure09_radius.py --preset cpu --data cifar10.npz

The residual networks of `table03_efficacy` (with augmentation) are attacked with a tenth of the clean training set (Table 7).
A cell is a perturbation of the whole training set, or none. In it, at every radius: test accuracy after every epoch of the
attack, and the distance that the attack has gone.
"""

import jax
import numpy as np

from dememo_jax import audit, data, keys, tree
from lab import models, table
from lab.findings import PERTURBED
from lab.models import World


def names(world: World) -> list[str]:
    return ["clean", *PERTURBED]


def compute(world: World, name: str) -> dict:
    preset, (training, test) = world.preset, models.sets_of(world)
    seed, how = preset.seeds[0], preset.recovery
    seen = training if name == "clean" else data.perturb(training, models.noise(world, name))
    weights = models.learned(world, "resnet18", seen, seed)
    if not tree.finite(weights):
        return {"value": None, "reason": "the training diverged"}
    key = keys.named(jax.random.key(seed), f"figure09 {name}")
    hints = data.share_of(keys.named(key, "hints"), np.ones(len(training.y), bool), training.y, 0.1)
    [curves], _ = audit.sweep(
        world.model, [weights], training, test, key, radii=preset.sweep, hints=hints, epochs=how.epochs, batch=preset.batch,
        tx=models.attacker(how),
    )  # fmt: skip
    rows = [{"radius": c.radius, "hints": c.hints, "accuracy": c.accuracy, "distance": c.distance} for c in curves]
    return {"value": rows, "images": [len(training.y), len(test.y)]}


def main(argv=None):
    return table.main("figure09", __doc__, names, compute, argv)


if __name__ == "__main__":
    main()
