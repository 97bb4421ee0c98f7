"""SoK Figure 12 in small: how much of a forgotten task comes back inside a ball of weights, or of an adapter's weights.

    python experiments/figure12_text.py --preset cpu --data FOLDER   # as table04_text

The networks of `table04_text` are attacked with a tenth of the task's clean training texts, in l2 balls: around all parameters
of the network, and where an adapter forgot, around the adapter's alone. A cell is a task and what the victim learned from: each
network's accuracy among the task's labels on its test texts, after every epoch of the attack.
"""

import jax
import numpy as np
import optax

from dememo_jax import audit, data, keys, tree
from lab import table, texts
from lab.texts import TextWorld, Version


def compute(world: TextWorld, name: str) -> dict:
    task, kind = texts.asked(name)
    training, test = world.sets
    known, asked = texts.of_task(world, task, training), texts.of_task(world, task, test)
    key = keys.named(jax.random.key(world.preset.seeds[0]), f"figure12 {name}")
    hints = data.share_of(keys.named(key, "hints"), np.ones(len(known.y), bool), known.y, 0.1)
    alive = [version for version in texts.versions(world, task, kind) if tree.finite(version.weights.params)]
    rows = []
    for form in texts.FORMS:
        attacked = [version for version in alive if version.form == form]
        if attacked:
            rows += _attack(world, task, attacked, known, asked, key, hints)
    return {"value": rows, "texts": [len(training.y), len(test.y)], "hints": int(hints.sum())}


def _attack(world: TextWorld, task: str, attacked: list[Version], known, asked, key, hints: np.ndarray) -> list[dict]:
    how = world.preset.recovery
    curves, _ = audit.sweep(
        texts.answering(world, attacked[0].decoder, task), [version.weights for version in attacked], known, asked, key,
        radii=world.preset.radii, hints=hints, epochs=how.epochs, batch=world.preset.batch, tx=optax.adam(how.lr),
    )  # fmt: skip
    return [
        {
            "method": version.method, "form": version.form, "radius": curve.radius, "accuracy": curve.accuracy,
            "parameters": tree.size(version.weights.params),
        }
        for version, each in zip(attacked, curves) for curve in each
    ]  # fmt: skip


def main(argv=None):
    return table.main("figure12", __doc__, texts.names, compute, argv, presets=texts.PRESETS, make=TextWorld)


if __name__ == "__main__":
    main()
