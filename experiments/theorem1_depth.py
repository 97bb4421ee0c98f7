"""SoK Theorem 1, for which the paper prints no number: certified depth of every network of Tables 14-17, beside controls.

    python experiments/theorem1_depth.py --preset cpu --data cifar10.npz

A cell is a perturbation and a class. For the victim, the retrained network, each unlearned one, and a network trained on clean
images with the class: an upper bound, at each radius eta, of the accuracy on the class's test images that weight noise of scale
sigma around any weights within eta reaches with probability q = 0.9, at confidence 0.99 over the draws. Where the draws do not
support one the bound is null and the reason stands beside it.
"""

import jax
import numpy as np

from dememo_jax import certify, data, keys, tree
from dememo_jax.models import freeze
from lab import models, table
from lab.classes import asked, names, versions
from lab.models import World


def compute(world: World, name: str) -> dict:
    kind, label = asked(name)
    training, test = models.sets_of(world)
    seed, preset = world.preset.seeds[0], world.preset
    shown, key = data.select(test, np.asarray(test.y) == label), jax.random.key(seed)
    control = models.kept(world, "clean", lambda: models.learned(world, "victim", training, seed, what="victim"))
    rows = []
    for method, scale, weights in [*versions(world, kind, label), ("Clean control", "", control)]:
        row = {"method": method, "scale": scale}
        if not tree.finite(weights):
            rows.append(row | {"bounds": None, "reason": "diverged"})
            continue
        frozen = freeze(world.model, weights)
        found = certify.depth(
            *frozen, data.make(shown.x, shown.y), keys.named(key, f"{name} {method} {scale}"), sigma=preset.sigma,
            eta=preset.etas, draws=preset.draws, side="upper",
        )  # fmt: skip
        bounds = [{"eta": one.eta, "upper": one.upper, "quantile": one.quantile, "reason": one.reason} for one in found.rows]
        rows.append(row | {"bounds": bounds, "noise norm": found.noise_norm})
    claim = {"q": 0.9, "alpha": 0.01, "sigma": preset.sigma, "draws": preset.draws}
    return {"value": rows, "images": [len(training.y), len(test.y)], "claim": claim}


def main(argv=None):
    return table.main("theorem1", __doc__, names, compute, argv)


if __name__ == "__main__":
    main()
