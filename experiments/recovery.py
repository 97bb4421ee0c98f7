"""How much comes back after unlearning a protected and a clean class, as the SoK's Figures 2 and 10, at reduced size.

    python experiments/recovery.py --data cifar10.npz

Classes 0-3 of the training images carry linear patches (LSP), classes 4-9 are clean; a three-layer network learns them, and
forgets class 0 or class 5 by each method. The attacker holds a tenth of the class's clean training images and moves the weights
inside an l2 ball, for 60 epochs; all models of a class and all radii in one sweep. Beside it the best of random points on the
sphere, and the steps that training without a ball needs. Numbers go to `experiments/results/recovery.json` and `.md`, curves
to `docs/recovery.png`.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dememo_jax import audit, evaluate, files, keys, loop, models, nets, protect, report, sources, train, unlearn
from dememo_jax import data as sets
from dememo_jax.cli import runs
from dememo_jax.report import Plot

RESULTS, PICTURES = Path(__file__).parent / "results", Path(__file__).parent.parent / "docs"
MODEL, BATCH, EPOCHS, RADII, GOAL = models.from_linen(nets.cnn(10, (16, 32, 64))), 128, 20, (0.4, 0.8, 1.6), 0.3
SGD = {
    "finetune": (unlearn.finetune, 0.01, 5),
    "gradient ascent": (unlearn.gradient_ascent, 0.001, 5),
    "NPO": (unlearn.npo, 0.005, 3),
}
scan = jax.jit(loop.scan, static_argnames=("method", "steps", "batch"))


def learned(seen, key, mask=None):
    steps = sets.steps(len(seen.y) if mask is None else int(mask.sum()), BATCH, EPOCHS)
    method = train.sgd(MODEL, train.clipped_sgd(0.1, 0.9, 5e-4, steps))
    mask = None if mask is None else jnp.asarray(mask)
    return scan(method, key, method.init(key, seen.x[:1]), seen, steps=steps, batch=BATCH, mask=mask)[0].weights


def forgotten(name: str, weights, seen, forget, key):
    if name in ("before", "retrain"):
        return weights if name == "before" else learned(seen, keys.named(key, "retrain"), ~forget)
    recipe, rate, epochs = SGD[name]
    method = recipe(MODEL, optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, 0.9)), batch=BATCH)
    state = method.init(key, weights, seen, forget)
    steps = method.steps(int(forget.sum()), int((~forget).sum()), epochs)
    return method.finish(scan(method, key, state, seen, steps=steps)[0])


def attacked(data, test, weights, seen, label: int, key) -> tuple[dict, list]:
    """Every method's curves at every radius, its baselines, and the curves of the largest radius but one."""
    forget, shown = np.asarray(seen.y) == label, sets.select(test, np.asarray(test.y) == label)
    hints = sets.share_of(keys.named(key, "hints"), forget, data.y, 0.1)
    names = ("before", "retrain", *SGD)
    models_ = [forgotten(name, weights, seen, forget, key) for name in names]
    swept, ends = audit.sweep(MODEL, models_, data, shown, key, radii=RADII, hints=hints)
    others = sets.select(test, np.asarray(test.y) != label)
    found = {}
    for name, one, curves in zip(names, models_, swept):
        random = audit.random_search(MODEL, one, data, shown, key, radius=RADII[1], hints=hints, draws=200)
        back = audit.relearn(MODEL, one, data, shown, key, goal=GOAL, hints=hints, most=400, every=5)
        found[name] = {"recovery": [dataclasses.asdict(c) for c in curves], "random": dataclasses.asdict(random)}
        found[name]["relearning"] = dataclasses.asdict(back)
        rest = (one, ends[names.index(name)][1])
        found[name]["other classes"] = [float(evaluate.accuracy(*models.freeze(MODEL, w), others)) for w in rest]
    span = tuple(float(i) for i in range(len(swept[0][1].accuracy)))
    return found, [(f"{name}: class {label}", span, curves[1].accuracy) for name, curves in zip(names, swept)]


def table(found: dict) -> str:
    head = ["class", "model", "before the attack", *(f"peak at {r:g}" for r in RADII)]
    head += [f"other classes, {RADII[1]:g}", f"random at {RADII[1]:g}", f"steps to {GOAL:g}"]
    rows = []
    for label, each in found.items():
        for name, one in each.items():
            peaks = [f"{max(curve['accuracy']):.3f}" for curve in one["recovery"]]
            steps = one["relearning"]["steps"]
            before = f"{one['recovery'][0]['accuracy'][0]:.3f}"
            rest = " -> ".join(f"{value:.3f}" for value in one["other classes"])
            random = f"{one['random']['chosen']:.3f}"
            rows.append([label, name, before, *peaks, rest, random, "never" if steps is None else str(steps)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="an .npz of CIFAR-10")
    arguments = parser.parse_args()
    started, key = time.monotonic(), jax.random.key(0)
    data, test = sources.load(arguments.data)
    noise = protect.linear_patches(keys.named(key, "noise"), data, np.asarray(data.y) < 4, classes=10)
    seen = sets.perturb(data, noise)
    weights = learned(seen, keys.named(key, "victim"))
    found, curves = {}, []
    for kind, label in (("0 (protected)", 0), ("5 (clean)", 5)):
        found[kind], points = attacked(data, test, weights, seen, label, keys.at(key, label))
        curves += points
    settings = {"train": len(data.y), "test": len(test.y), "batch": BATCH, "epochs": EPOCHS, "radii": RADII, "goal": GOAL}
    kept = {"settings": settings, "measured": runs.measured(started), "found": found}
    files.write(RESULTS / "recovery.json", report.to_json(kept))
    files.write(RESULTS / "recovery.md", table(found))
    title = f"Recovery inside an l2 ball of radius {RADII[1]:g}"
    plot = Plot("recovery", title, "epoch of the attack", "accuracy on test images of the class", tuple(curves))
    files.write(PICTURES / "recovery.png", report.draw(plot))
    print(table(found))


if __name__ == "__main__":
    main()
