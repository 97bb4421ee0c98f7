"""SoK Theorem 1, for which the paper prints no number: certified depth of every network of Tables 14-17, beside controls.

    python experiments/theorem1_depth.py --preset cpu --data cifar10.npz

A cell is a perturbation and a class. For the victim, the retrained network, each unlearned one, and a network trained on clean
images with the class: an upper bound, at each radius eta, of the accuracy on the class's test images that weight noise of scale
sigma around any weights within eta reaches with probability q = 0.9, at confidence 0.99 over the draws. Where the draws do not
support one the bound is null and the reason stands beside it.
"""

import jax
import numpy as np

from dememo_jax import data, keys
from dememo_jax.models import freeze
from lab import models, table
from lab.classes import asked, names, versions
from lab.models import World


def compute(world: World, name: str) -> dict:
    kind, label = asked(name)
    training, test = models.sets_of(world)
    seed, preset = world.preset.seeds[0], world.preset
    of_class, key = data.select(test, np.asarray(test.y) == label), jax.random.key(seed)
    shown = data.make(of_class.x, of_class.y)
    control = models.kept(world, "clean", lambda: models.learned(world, "victim", training, seed, what="victim"))
    rows = []
    for method, scale, weights in [*versions(world, kind, label), ("Clean control", "", control)]:
        at = keys.named(key, f"{name} {method} {scale}")
        rows.append({"method": method, "scale": scale} | models.depth(preset, freeze(world.model, weights), weights, shown, at))
    return {"value": rows, "images": [len(training.y), len(test.y)], "claim": models.claim(preset)}


def main(argv=None):
    return table.main("theorem1", __doc__, names, compute, argv)


if __name__ == "__main__":
    main()
