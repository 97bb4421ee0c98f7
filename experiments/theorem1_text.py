"""SoK Theorem 1 for text: certified depth of every network of Table 4, of all parameters beside an adapter alone.

    python experiments/theorem1_text.py --preset cpu --data FOLDER   # as table04_text

A cell is a task and what the victim learned from. For each network an upper bound, at every radius eta, of the accuracy on the
task's test texts, among its labels, that weight noise of scale sigma around any weights within eta reaches with probability
q = 0.9, at confidence 0.99 over the draws; around all parameters, or around the fewer of the adapter that
forgot.
"""

import jax

from dememo_jax import keys, tree
from lab import models, table, texts
from lab.texts import TextWorld


def compute(world: TextWorld, name: str) -> dict:
    task, kind = texts.asked(name)
    (training, test), preset = world.sets, world.preset
    shown, key, rows = texts.of_task(world, task, test), jax.random.key(world.preset.seeds[0]), []
    for version in texts.versions(world, task, kind):
        row = {"method": version.method, "form": version.form, "parameters": tree.size(version.weights.params)}
        at = keys.named(key, f"{name} {version.method} {version.form}")
        rows.append(row | models.depth(preset, texts.frozen(world, version, task), version.weights, shown, at))
    return {"value": rows, "texts": [len(training.y), len(test.y)], "claim": models.claim(preset)}


def main(argv=None):
    return table.main("theorem1_text", __doc__, texts.names, compute, argv, presets=texts.PRESETS, make=TextWorld)


if __name__ == "__main__":
    main()
