"""SoK Tables 14-17 and 19, 21, 23, 25: unlearning a whole class, protected (0-3) or clean (4-7), and membership inference.

    python experiments/table14_class.py --preset cpu --data cifar10.npz

One network learns classes 0-3 perturbed and 4-9 clean, and forgets one of 0-7 by retraining (RT), influence function (IF),
fine-tuning (FT) and gradient ascent (GA), at a small and a large scale. A cell is a perturbation and a class. Its accuracies:
Du perturbed training images, Duc their clean counterparts, Dut test images; of a clean class Dc and Dct; Dtr test images of
classes 8 and 9. Beside them the success of the three membership attacks on the class's clean images. Weights are kept.
"""

import jax.numpy as jnp
import numpy as np

from dememo_jax import audit, data, evaluate
from dememo_jax.models import freeze
from lab import models, table
from lab.models import World

PERTURBATIONS, PROTECTED, FORGOTTEN, OBSERVED = ("ue-s", "tue", "pue", "ops"), 4, range(8), (8, 9)
SCALES = ("small", "large")


def names(world: World) -> list[str]:
    return [f"{kind}.{label}" for kind in PERTURBATIONS for label in FORGOTTEN]


def seen_by(world: World, kind: str):
    """The training images as the victim meets them."""
    training, _ = models.sets_of(world)
    noise = models.noise(world, kind)
    return data.perturb(training, noise._replace(mask=jnp.asarray(np.asarray(training.y) < PROTECTED)))


def versions(world: World, kind: str, label: int):
    """(method, scale) and the weights of the victim, of the retrained network and of each unlearned one."""
    seen, seed = seen_by(world, kind), world.preset.seeds[0]
    forget = np.asarray(seen.y) == label
    victim = models.kept(world, f"class-{kind}", lambda: models.learned(world, "victim", seen, seed, what="victim"))
    yield ("Before", ""), victim
    again = {"mask": ~forget, "what": f"retrain {label}"}
    yield (
        ("RT", ""),
        models.kept(world, f"class-{kind}-{label}-RT", lambda: models.learned(world, "victim", seen, seed, **again)),
    )
    for method, rates in world.preset.rates.items():
        for scale, rate in zip(SCALES, rates):
            how = (world, method, rate, victim, seen, forget, seed)
            yield (
                (method, scale),
                models.kept(world, f"class-{kind}-{label}-{method}-{scale}", lambda how=how: models.unlearned(*how)),
            )


def compute(world: World, name: str) -> dict:
    kind, label = name.split(".")[0], int(name.split(".")[1])
    training, test = models.sets_of(world)
    seen, forget, tested = seen_by(world, kind), np.asarray(training.y) == label, np.asarray(test.y)
    own = {"Du": (seen, forget), "Duc": (training, forget), "Dut": (test, tested == label)}
    if label >= PROTECTED:
        own = {"Dc": (training, forget), "Dct": (test, tested == label)}
    parts = own | {"Dtr": (test, np.isin(tested, OBSERVED))}
    rows = []
    for (method, scale), weights in versions(world, kind, label):
        row = {"method": method, "scale": scale}
        if not models.finite(weights):
            rows.append(row | {"accuracy": None, "membership": None, "reason": "diverged"})
            continue
        frozen = freeze(models.network(world.preset.networks["resnet18"]), weights)
        right = {part: np.asarray(evaluate.correct(*frozen, part_of))[mask].mean() for part, (part_of, mask) in parts.items()}
        rows.append(row | {"accuracy": {part: float(value) for part, value in right.items()},
                           "membership": membership(frozen, seen, training, test, forget)})  # fmt: skip
    return {"value": rows, "images": [len(training.y), len(test.y)]}


def membership(frozen, seen, training, test, forget) -> dict[str, float]:
    """Success of the SoK's attacks on the clean images of the forgotten class, shadowed by retained and by test images."""
    shown, clean, strange = (np.asarray(evaluate.logits(*frozen, part.x)) for part in (seen, training, test))
    labels = np.asarray(training.y)
    members = np.flatnonzero(~forget)[: len(strange)]
    known = (shown[members], labels[members]), (strange, np.asarray(test.y))
    return audit.membership_scores(*known, (clean[forget], labels[forget]))


def main(argv=None):
    return table.main("table14", __doc__, names, compute, argv)


if __name__ == "__main__":
    main()
