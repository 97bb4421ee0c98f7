"""SoK Figures 2, 10, 11 and 13-18: how much of an unlearned class comes back inside a ball of weights.

    python experiments/figure02_recovery.py --preset cpu --data cifar10.npz

The networks of `table14_class` are attacked with a tenth of the class's clean training images, in l2 balls of radius
0.4 and 0.8 (Table 7). A cell is a perturbation and a class: each network's accuracy on its test images after every epoch
of the attack, and on those of other classes at its end, which an attack that answers "this class" to everything loses.
"""

import jax
import numpy as np

from dememo_jax import audit, data, evaluate, keys, tree
from dememo_jax.models import freeze
from lab import models, table
from lab.classes import asked, names, versions
from lab.models import World


def compute(world: World, name: str) -> dict:
    kind, label = asked(name)
    training, test = models.sets_of(world)
    key, how = keys.named(jax.random.key(world.preset.seeds[0]), name), world.preset.recovery
    hints = data.share_of(keys.named(key, "hints"), np.asarray(training.y) == label, training.y, 0.1)
    of_class, others = (data.select(test, part) for part in (np.asarray(test.y) == label, np.asarray(test.y) != label))
    alive = [version for version in versions(world, kind, label) if tree.finite(version[2])]
    swept, ends = audit.sweep(
        world.model, [weights for _, _, weights in alive], training, of_class, key, radii=world.preset.radii, hints=hints,
        epochs=how.epochs, batch=world.preset.batch, tx=models.attacker(how),
    )  # fmt: skip
    rows = []
    for (method, scale, _), curves, reached in zip(alive, swept, ends):
        for curve, weights in zip(curves, reached):
            rest = float(evaluate.accuracy(*freeze(world.model, weights), others))
            row = {"method": method, "scale": scale, "radius": curve.radius, "hints": curve.hints, "accuracy": curve.accuracy}
            rows.append(row | {"other classes": rest})
    return {"value": rows, "images": [len(training.y), len(test.y)]}


def main(argv=None):
    return table.main("figure02", __doc__, names, compute, argv)


if __name__ == "__main__":
    main()
