"""Shadow models in one program against one after another, attacks on large score matrices, recovery against plain training.

    python benchmarks/audit.py [--only shadows|attacks|recovery] [--data cifar10.npz]

Ratios come from sides that run in turn, compiled before, and are medians of the pairs. Shadows: 32 networks on random halves of
the digits, a few passes; "a step at a time" calls a jitted step from Python, as a plain training script does, "one scan
each" is `loop.scan`, which sorts at every step; width 1 is `train_shadows`, one network after another.
"""

import argparse
import functools
import statistics
import time

import jax
import numpy as np
import optax

from dememo_jax import audit, bounds, data, keys, loop, models, nets, sources, train
from dememo_jax import data as sets

MODELS, PASSES, BATCH, PAIRS = 32, 5, 64, 3
NETS = {"MLP 64-32-10": nets.mlp(10, (32,)), "MLP 64-128-10": nets.mlp(10, (128,)), "CNN (16, 32)": nets.cnn(10)}


def seconds(call) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begun


def shadows() -> None:
    digits, _ = sources.load("digits")
    key = jax.random.key(0)
    masks = audit.halves(key, MODELS, len(digits.y))
    scan = jax.jit(loop.scan, static_argnames=("method", "steps", "batch"))
    head = ["network", "a step at a time", "one scan each", "width 1", "width 8", "width 32", "best"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name, net in NETS.items():
        model = models.from_linen(net)
        method = train.sgd(model, optax.sgd(0.1, momentum=0.9))
        step, draw = jax.jit(method.step), jax.jit(data.shuffled, static_argnames="batch")

        def start(m, method=method):
            return method.init(keys.named(keys.at(key, m), "init"), digits.x[:1])

        def plain(step=step, draw=draw, start=start):
            for m in range(MODELS):
                own, state = keys.named(keys.at(key, m), "train"), start(m)
                for t in range(PASSES * sets.steps(int(masks[m].sum()), BATCH, 1)):
                    state, _ = step(keys.at(own, t), state, draw(own, t, digits, batch=BATCH, mask=masks[m]))
            return state

        def scans(method=method, start=start):
            for m in range(MODELS):
                own, steps = keys.named(keys.at(key, m), "train"), PASSES * sets.steps(int(masks[m].sum()), BATCH, 1)
                state, _ = scan(method, own, start(m), digits, steps=steps, batch=BATCH, mask=masks[m])
                jax.block_until_ready(state)
            return state

        def together(width, model=model, method=method):
            made = audit.train_shadows(key, model, method, digits, masks, passes=PASSES, batch=BATCH, width=width)
            return [jax.block_until_ready(group.weights) for group in made][-1]

        ways = {"plain": plain, "scans": scans, **{w: functools.partial(together, w) for w in (1, 8, 32)}}
        for way in ways.values():
            way()
        times = [{way: seconds(call) for way, call in ways.items()} for _ in range(PAIRS)]
        usual = audit.usual_width(key, model, method, digits, masks, batch=BATCH)
        ratio = {way: statistics.median(one[way] / one[usual] for one in times) for way in ways}
        cells = [f"{statistics.median(one[way] for one in times):.2f} s ({ratio[way]:.2f})" for way in ways]
        print(f"| {name} | " + " | ".join(cells) + f" | {usual} |", flush=True)


def attacks() -> None:
    random = np.random.default_rng(0)
    count, examples = 256, 50_000
    masks = audit.halves(jax.random.key(0), count, examples)
    scores = random.normal(size=(count, examples)) + random.normal(size=examples) + masks
    strangers = random.normal(size=(count, 2000))
    print(f"\n| attack on [{count}, {examples:,}] scores | seconds |\n|---|---|")
    made = {}
    jobs = {
        "LiRA, online, each model by the others": lambda: audit.lira(scores, masks),
        "LiRA, offline": lambda: audit.lira(scores, masks, form="offline"),
        "RMIA, 2,000 strangers": lambda: audit.rmia(scores, masks, strangers),
        "population": lambda: audit.population_attack(scores, strangers),
    }
    for name, job in jobs.items():
        begun = time.perf_counter()
        made[name] = job()
        print(f"| {name} | {time.perf_counter() - begun:.1f} |", flush=True)
    ratios = made["LiRA, online, each model by the others"]
    for name, job in {
        "area with limits": lambda: bounds.auc(ratios, masks),
        "true-positive rate at 0.1 % with limits": lambda: bounds.tpr_at(ratios, masks, 0.001),
    }.items():
        begun = time.perf_counter()
        job()
        print(f"| {name} | {time.perf_counter() - begun:.1f} |", flush=True)


def recovery(path: str | None) -> None:
    print("\n| network, images, batch | plain training, ms a step | recovery attack | ratio |\n|---|---|---|---|")
    digits, _ = sources.load("digits")
    cases = [(name, digits, net, BATCH, 20) for name, net in NETS.items()]
    if path:
        cases.append(("CNN (16, 32, 64), CIFAR-10", sources.load(path)[0], nets.cnn(10, (16, 32, 64)), 128, 1))
    run = jax.jit(loop.passes, static_argnames=("method", "passes", "batch", "per_pass"))
    for name, examples, net, batch, passes in cases:
        model, tx, key = models.from_linen(net), audit.recovery.default_tx(), jax.random.key(0)
        weights, per_pass = jax.jit(model.init)(key, examples.x[:1]), sets.steps(len(examples.y), batch, 1)
        plain, attack = train.sgd(model, tx, mode="frozen"), audit.attack(model, tx)
        starts = {plain: train.start(tx, weights), attack: attack.init(weights, 0.4)}

        def once(method, key=key, starts=starts, examples=examples, passes=passes, batch=batch, per_pass=per_pass):
            return run(method, key, starts[method], examples, passes=passes, batch=batch, per_pass=per_pass)

        once(plain), once(attack)
        sides = functools.partial(once, plain), functools.partial(once, attack)
        times = [(seconds(sides[0]), seconds(sides[1])) for _ in range(5)]
        bare, held = (1e3 * statistics.median(side) / passes / per_pass for side in zip(*times))
        ratio = statistics.median(b / a for a, b in times)
        print(f"| {name}, {len(examples.y):,}, {batch} | {bare:.3f} | {held:.3f} | {ratio:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("shadows", "attacks", "recovery"))
    parser.add_argument("--data", help="an .npz of CIFAR-10, for the last row of recovery")
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {MODELS} models, {PASSES} passes, batch {BATCH}\n")
    for name, part in {"shadows": shadows, "attacks": attacks, "recovery": lambda: recovery(arguments.data)}.items():
        if arguments.only in (None, name):
            part()


if __name__ == "__main__":
    main()
