"""The benchmark of Unlearnable Distance: perturbations, networks and countermeasures, with accuracy beside it.

    python experiments/benchmark_ud.py --preset cpu --data cifar10.npz

Ye, Su and Qian, ICLR 2025, Tables 1-3. A cell is what a network trains on, the network and a countermeasure. In it, after
some of the epochs, SAL of every layer by their solver, on the images as the network saw them, and accuracy on clean test
images. UD is the ratio to the cell of clean data with the same network and countermeasure: `results.py` takes it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dememo_jax import data, evaluate, keys, loop, protect, sharpness, tree
from dememo_jax.cli import networks
from dememo_jax.models import freeze
from dememo_jax.protect import victim
from lab import models, table
from lab.findings import PERTURBED
from lab.models import World

PLAIN = ("none", "crop-flip")  # augmentation alone


def names(world: World) -> list[str]:
    how = world.preset.sharpness
    return [
        f"{kind}.{net}.{against}" for against in how.countermeasures for net in how.networks for kind in ("clean", *PERTURBED)
    ]


def compute(world: World, name: str) -> dict:
    (kind, net, against), preset = name.split("."), world.preset
    (training, test), how, key = models.sets_of(world), preset.sharpness, jax.random.key(preset.seeds[0])
    seen = training if kind == "clean" else data.perturb(training, models.noise(world, kind))
    counter = None if against in PLAIN else protect.countermeasure(against)
    if counter is not None and counter.prepare is not None:
        seen = counter.prepare(keys.named(key, "prepare"), seen)
    module, every = preset.networks[net], data.steps(len(seen.y), preset.batch, 1)
    tx = models.optimiser(preset.learning[net], every * how.epochs[-1])
    augment = networks.augmentation(against) if against in PLAIN else None
    method = victim.learner(models.network(module), tx, every * how.epochs[-1], augment=augment, against=counter)
    at = jax.random.permutation(keys.named(key, "measured"), len(seen.y))[: how.images]
    measured, rows = data.take(seen, jnp.sort(at)), []

    def after(done, state, info):
        epoch = done // every
        if epoch in how.epochs and tree.finite(state.weights):
            frozen = freeze(models.network(module), state.weights)
            sal = sharpness.sal(*frozen, measured, test=test, key=keys.at(key, epoch), batch=how.batch)
            rows.append({"epoch": epoch, "accuracy": float(evaluate.accuracy(*frozen, test)), "sal": dataclasses.asdict(sal)})

    state = method.init(keys.named(key, "init"), seen.x[:1])
    loop.run(
        method, keys.named(key, kind), state, seen, steps=every * how.epochs[-1], every=every, after=after, batch=preset.batch
    )
    if len(rows) < len(how.epochs):
        return {"value": None, "reason": "the training diverged"}
    return {"value": rows, "images": [len(training.y), len(test.y)]}


def main(argv=None):
    return table.main("ud", __doc__, names, compute, argv)


if __name__ == "__main__":
    main()
