"""SoK Tables 14-17 and 19, 21, 23, 25: unlearning a whole class, protected (0-3) or clean (4-7), and membership inference.

    python experiments/table14_class.py --preset cpu --data cifar10.npz

One network learns classes 0-3 perturbed and 4-9 clean, and forgets one of 0-7 by retraining (RT), influence function (IF),
fine-tuning (FT) and gradient ascent (GA), at a small and a large scale. A cell is a perturbation and a class. Its accuracies:
Du perturbed training images, Duc their clean counterparts, Dut test images; of a clean class Dc and Dct; Dtr test images of
classes 8 and 9. Beside them the success of the three membership attacks on the class's clean images. Weights are kept.
"""

import numpy as np

from lab import models, table
from lab.classes import OBSERVED, PROTECTED, asked, names, seen_by, versions
from lab.models import World


def compute(world: World, name: str) -> dict:
    kind, label = asked(name)
    training, test = models.sets_of(world)
    seen, forget, tested = seen_by(world, kind), np.asarray(training.y) == label, np.asarray(test.y)
    own = {"Du": (seen, forget), "Duc": (training, forget), "Dut": (test, tested == label)}
    if label >= PROTECTED:
        own = {"Dc": (training, forget), "Dct": (test, tested == label)}
    parts = own | {"Dtr": (test, np.isin(tested, OBSERVED))}
    return models.told(world, versions(world, kind, label), parts, seen, forget)


def main(argv=None):
    return table.main("table14", __doc__, names, compute, argv)


if __name__ == "__main__":
    main()
