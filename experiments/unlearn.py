"""Every unlearning recipe on a subset of CIFAR-10: the average gap to retraining over three seeds, ranked.

    python experiments/unlearn.py --data cifar10.npz

class: one class of ten is forgotten. subset: of class 0, 90 % carry linear-patch noise (Du) and are forgotten, 10 % are clean
(Dc), as in the SoK's subset level. A small network, few epochs, for CPU. Each method's one knob (learning rate, or scale)
is chosen from a grid on a seed of its own, by the gap to retraining; then come three others. Killed, the same command goes on.
Numbers, with device, versions, commit and seconds, go to `experiments/results/unlearn-cifar.json` and `.md`.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import numpy as np
import optax

from dememo_jax import audit, evaluate, files, keys, loop, models, nets, protect, report, sources, train, unlearn
from dememo_jax import data as sets
from dememo_jax.cli import runs

RESULTS = Path(__file__).parent / "results"
MODEL, WIDER = (models.from_linen(nets.cnn(n, (16, 32, 64))) for n in (10, 11))
BATCH, EPOCHS, TUNED, SEEDS = 128, 20, 100, (0, 1, 2)


def adjustable(make):
    """The rate as a number in the state, so that one compiled program serves the grid."""
    return optax.inject_hyperparams(make)(1.0)


SGD = adjustable(lambda learning_rate: optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(learning_rate, 0.9)))
ADAM = adjustable(lambda learning_rate: optax.adamw(learning_rate, weight_decay=5e-4))
OFTEN = {"batch": BATCH}
# name -> (recipe, epochs, grid of rates). Epochs are passes over what the recipe goes over.
DESCENTS = {
    "finetune": (unlearn.finetune(MODEL, SGD, **OFTEN), 3, (0.003, 0.01, 0.03)),
    "l1-sparse": (unlearn.l1_sparse(MODEL, SGD, steps=45, **OFTEN), 3, (0.003, 0.01, 0.03)),
    "cf-1": (unlearn.catastrophic_forgetting(MODEL, SGD, **OFTEN), 3, (0.01, 0.03, 0.1)),
    "eu-1": (unlearn.exact_last_layers(MODEL, SGD, **OFTEN), 3, (0.03, 0.1, 0.3)),
    "gradient-ascent": (unlearn.gradient_ascent(MODEL, SGD, **OFTEN), 5, (1e-4, 1e-3, 1e-2)),
    "neggrad-plus": (unlearn.negative_gradient(MODEL, SGD, **OFTEN), 3, (1e-3, 5e-3, 0.02)),
    "npo": (unlearn.npo(MODEL, SGD, **OFTEN), 3, (1e-3, 5e-3, 0.02)),
    "random-labels": (unlearn.random_labels(MODEL, SGD, classes=10, **OFTEN), 3, (0.003, 0.01, 0.03)),
    "salun": (unlearn.salun(MODEL, SGD, classes=10, **OFTEN), 3, (0.003, 0.01, 0.03)),
    "scrub": (unlearn.scrub(MODEL, ADAM, batches=(BATCH, BATCH)), 3, (5e-4, 2e-3, 8e-3)),
    "bad-teacher": (unlearn.bad_teacher(MODEL, ADAM, **OFTEN), 3, (2e-4, 1e-3, 5e-3)),
    "boundary-shrink": (unlearn.boundary_shrink(MODEL, SGD, **OFTEN), 10, (1e-4, 1e-3, 1e-2)),
    "boundary-expand": (unlearn.boundary_expand(MODEL, WIDER, SGD, classes=10, **OFTEN), 10, (1e-4, 1e-3, 1e-2)),
    "unsir": (unlearn.unsir(MODEL, SGD, share=0.5, **OFTEN), 2, (1e-3, 1e-2, 0.05)),
}
STEPS = {
    "influence, Fisher": (functools.partial(unlearn.influence, variant="fisher", damping=0.1), (0.3, 1.0, 3.0)),
    "influence, GGN": (
        functools.partial(unlearn.influence, variant="ggn", damping=0.1, samples=512, iterations=20), (0.3, 1.0, 3.0),
    ),
    "influence, published": (functools.partial(unlearn.influence, variant="published"), (0.03, 0.1, 0.3, 2.0)),
    "ssd": (unlearn.ssd, (10.0, 30.0, 100.0, 300.0)),
}  # fmt: skip
COMPILED: dict = {}
scan = jax.jit(loop.scan, static_argnames=("method", "steps", "batch"))


def world(scenario: str, data, seed: int):
    """What the victim saw, what it is to forget, the sets that are measured; its weights and the retrained ones."""
    training, test = data
    labels, tested = np.asarray(training.y), np.asarray(test.y)
    if scenario == "class":
        seen, forget = training, labels == 5
        parts = {"Dc": (seen, forget), "Dr": (seen, ~forget), "Dct": (test, tested == 5), "Dtr": (test, tested != 5)}
    else:
        key = keys.named(jax.random.key(seed), "share")
        forget = sets.share_of(key, labels == 0, labels, 0.9)
        seen = sets.perturb(training, protect.linear_patches(keys.named(key, "noise"), training, forget, classes=10))
        rest = (labels == 0) & ~forget
        parts = {"Du": (seen, forget), "Duc": (training, forget), "Dc": (seen, rest), "Dr": (seen, ~forget)}
        parts["Dt"] = (test, np.ones(len(tested), bool))
    return seen, forget, parts


def learned(seen, seed: int, mask=None):
    """A network trained as the victim was, on the examples of the mask."""
    count = int(len(seen.y) if mask is None else mask.sum())
    steps = sets.steps(count, BATCH, EPOCHS)
    learner = train.sgd(MODEL, train.clipped_sgd(0.1, 0.9, 5e-4, steps))
    state = learner.init(jax.random.key(seed), seen.x[:1])
    return scan(learner, jax.random.key(seed), state, seen, steps=steps, batch=BATCH, mask=mask)[0].weights


def measure(weights, parts) -> dict[str, float]:
    whole = {}
    for data, _ in parts.values():
        if id(data) not in whole:
            whole[id(data)] = np.asarray(evaluate.correct(*models.freeze(MODEL, weights), data))
    return {name: float(whole[id(data)][mask].mean()) for name, (data, mask) in parts.items()}


def membership(weights, seen, forget, test) -> float:
    """Share of the forgotten examples that the SoK's probability attack takes for members."""
    frozen = models.freeze(MODEL, weights)
    shown, unseen = (np.asarray(evaluate.logits(*frozen, part.x)) for part in (seen, test))
    labels = np.asarray(seen.y)
    kept = np.flatnonzero(~forget)[: len(unseen)]
    scores = audit.membership_scores((shown[kept], labels[kept]), (unseen, np.asarray(test.y)), (shown[forget], labels[forget]))
    return scores["probability"]


def run(name: str, knob: float, seed: int, weights, seen, forget) -> tuple:
    """The weights after a method, and its seconds, compilation aside."""
    key = jax.random.key(1000 + seed)
    if name in STEPS:
        call = functools.partial(STEPS[name][0], *models.freeze(MODEL, weights), seen, forget, alpha=knob)
        call()
        begun = time.perf_counter()
        found = weights._replace(params=jax.block_until_ready(call().params))
        return found, time.perf_counter() - begun
    method, epochs, _ = DESCENTS[name]
    state = method.init(key, weights, seen, forget)
    inner = optax.tree.set(state.opt, learning_rate=np.float32(knob))
    state = state._replace(opt=inner)
    steps = method.steps(int(forget.sum()), int((~forget).sum()), epochs)
    if (name, steps) not in COMPILED:
        COMPILED[name, steps] = scan.lower(method, key, state, seen, steps=steps).compile()
    begun = time.perf_counter()
    state = jax.block_until_ready(COMPILED[name, steps](key, state, seen)[0])
    return method.finish(state), time.perf_counter() - begun


def gap(one: dict, other: dict) -> float:
    return float(np.mean([abs(one[name] - other[name]) for name in one]))


def trial(scenario: str, data, seed: int, wanted: list[tuple[str, float]], done: dict, save) -> None:
    """Victim, retrained model and the wanted methods at one seed, each kept as soon as it is there."""
    place = f"{scenario} {seed}"
    if all(f"{place} {name} {knob:g}" in done for name, knob in wanted) and f"{place} retrain" in done:
        return
    seen, forget, parts = world(scenario, data, seed)
    weights, times = learned(seen, seed), {}
    for name, mask in (("before", None), ("retrain", ~forget)):
        begun = time.perf_counter()
        found = weights if mask is None else jax.block_until_ready(learned(seen, 500 + seed, jax.numpy.asarray(mask)))
        times[name] = time.perf_counter() - begun
        done[f"{place} {name}"] = {"accuracy": measure(found, parts), "seconds": times[name]} | (
            {} if seed == TUNED else {"membership": membership(found, seen, forget, data[1])}
        )
    save()
    for name, knob in wanted:
        if f"{place} {name} {knob:g}" in done:
            continue
        found, took = run(name, knob, seed, weights, seen, forget)
        row = {"accuracy": measure(found, parts), "seconds": took}
        row["gap"] = gap(row["accuracy"], done[f"{place} retrain"]["accuracy"])
        if seed != TUNED:
            row["membership"] = membership(found, seen, forget, data[1])
        done[f"{place} {name} {knob:g}"] = row
        print(f"{place:10} {name:22} {knob:<8g} gap {row['gap']:.3f}  {took:.1f} s  {row['accuracy']}", flush=True)
        save()


def best(scenario: str, done: dict) -> list[tuple[str, float]]:
    grids = {name: row[-1] for name, row in (DESCENTS | STEPS).items()}
    return [(n, min(grid, key=lambda knob: done[f"{scenario} {TUNED} {n} {knob:g}"]["gap"])) for n, grid in grids.items()]


def table(scenario: str, done: dict) -> str:
    """Means over the seeds, ranked by the gap to retraining; the least seconds of any seed."""

    def mean(name, field):
        return np.mean([done[f"{scenario} {seed} {name}"][field] for seed in SEEDS])

    def line(shown, name, knob, gaps):
        each = [done[f"{scenario} {seed} {name}"]["accuracy"] for seed in SEEDS]
        cells = [f"{np.mean([one[part] for one in each]):.3f}" for part in each[0]]
        least = min(done[f"{scenario} {seed} {name}"]["seconds"] for seed in SEEDS)  # other work only ever adds
        return [shown, knob, *cells, f"{mean(name, 'membership'):.3f}", gaps, "" if name == "before" else f"{least:.1f}"]

    rows = []
    for name, knob in best(scenario, done):
        place = f"{name} {knob:g}"
        gaps = [done[f"{scenario} {seed} {place}"]["gap"] for seed in SEEDS]
        rows.append((np.mean(gaps), line(name, place, f"{knob:g}", f"{np.mean(gaps):.3f} ± {np.std(gaps, ddof=1):.3f}")))
    parts = list(done[f"{scenario} {SEEDS[0]} retrain"]["accuracy"])
    head = ["method", "rate or scale", *parts, "membership", "gap to retraining", "seconds"]
    lines = [head, ["---"] * len(head), line("before", "before", "", ""), line("retrain", "retrain", "", "0")]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [*lines, *(row for _, row in sorted(rows))]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="an .npz of CIFAR-10")
    parser.add_argument("--out", default="unlearn-cifar", help="name of the results")
    arguments = parser.parse_args()
    started, data = time.monotonic(), sources.load(arguments.data)
    path = RESULTS / f"{arguments.out}.json"
    done = json.loads(path.read_text())["rows"] if path.exists() else {}

    def save():
        settings = {"train": len(data[0].y), "test": len(data[1].y), "batch": BATCH, "epochs": EPOCHS, "seeds": SEEDS}
        kept = {"settings": settings, "measured": runs.measured(started), "rows": done}
        files.write(path, report.to_json(kept))

    RESULTS.mkdir(exist_ok=True)
    text = ""
    for scenario in ("class", "subset"):
        grid = [(name, knob) for name, row in (DESCENTS | STEPS).items() for knob in row[-1]]
        trial(scenario, data, TUNED, grid, done, save)
        for seed in SEEDS:
            trial(scenario, data, seed, best(scenario, done), done, save)
        text += f"{scenario}:\n\n{table(scenario, done)}\n"
    files.write(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
