"""SoK Theorem 1 for text: certified depth of every network of Table 4, of all parameters beside an adapter alone.

    python experiments/theorem1_text.py --preset cpu --data FOLDER   # as table04_text

A cell is a task and what the victim learned from. For each network an upper bound, at every radius eta, of the accuracy on the
task's test texts, among its labels, that weight noise of scale sigma around any weights within eta reaches with probability
q = 0.9, at confidence 0.99 over the draws; around all parameters, or around the fewer of the adapter that
forgot.
"""

import jax

from dememo_jax import certify, keys, tree
from lab import table, texts
from lab.texts import TextWorld


def compute(world: TextWorld, name: str) -> dict:
    task, kind = texts.asked(name)
    (training, test), preset = world.sets, world.preset
    shown, key, rows = texts.of_task(world, task, test), jax.random.key(world.preset.seeds[0]), []
    for version in texts.versions(world, task, kind):
        row = {"method": version.method, "form": version.form, "parameters": tree.size(version.weights.params)}
        if not tree.finite(version.weights.params):
            rows.append(row | {"bounds": None, "reason": "diverged"})
            continue
        found = certify.depth(
            *texts.frozen(world, version, task), shown, keys.named(key, f"{name} {version.method} {version.form}"),
            sigma=preset.sigma, eta=preset.etas, draws=preset.draws, side="upper",
        )  # fmt: skip
        bounds = [{"eta": one.eta, "upper": one.upper, "quantile": one.quantile, "reason": one.reason} for one in found.rows]
        rows.append(row | {"bounds": bounds, "noise norm": found.noise_norm})
    claim = {"q": 0.9, "alpha": 0.01, "sigma": preset.sigma, "draws": preset.draws}
    return {"value": rows, "texts": [len(training.y), len(test.y)], "claim": claim}


def main(argv=None):
    return table.main("theorem1_text", __doc__, texts.names, compute, argv, presets=texts.PRESETS, make=TextWorld)


if __name__ == "__main__":
    main()
