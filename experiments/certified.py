"""Certified unlearning measured: accuracy after the free training against epsilon, and against retraining.

    python experiments/certified.py [--data cifar10.npz]

One class is forgotten. Networks: noisy descent, model clipping and output perturbation around a fresh initialisation, then
noiseless training on the retain set; beside them, training from nothing for as many steps in all. Linear heads on the
frozen features of a network that was trained on other images: noisy descent, Langevin unlearning, certified removal at two
ridges, and beside them the published objective perturbation, whose epsilon is a heuristic claim. delta = 1e-5, comparator
same_procedure (retraining for certified removal and Langevin), three seeds. Digits always, CIFAR-10 where it is given (half
of it makes the features); what stands in the results is 4,000 training and 2,000 test images, the first of every class.
Numbers go to `experiments/results/certified.json` and `.md`; rows that are there are kept, delete them to measure again.
"""

import argparse
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dememo_jax import bounds, evaluate, files, keys, loop, models, nets, report, sources, train, unlearn
from dememo_jax import data as sets
from dememo_jax.cli import runs

RESULTS = Path(__file__).parent / "results"
EPSILONS, DELTA, SEEDS, CLASS = (0.5, 1.0, 2.0, 4.0, 8.0), 1e-5, (0, 1, 2), 5
BALL = {"clip_init": 0.01}  # chosen once, on no data
STEPS, MOVES = 10, {"lr": 0.001, "clip_grad": 1.0}
RIDGES, SIGMA = (0.01, 0.001), 0.01  # of certified removal, for every epsilon
scan = jax.jit(loop.scan, static_argnames=("method", "steps", "batch"))


def accuracies(apply, params, training, test, forget) -> dict[str, float]:
    right = {name: np.asarray(evaluate.correct(apply, params, part)) for name, part in (("train", training), ("test", test))}
    other = np.asarray(test.y) != CLASS
    return {
        "forgotten": float(right["train"][forget].mean()),
        "forgotten class, test": float(right["test"][~other].mean()),
        "other classes, test": float(right["test"][other].mean()),
    }


# --- networks ----------------------------------------------------------------------------------------------------


def certified(model, epsilon: float, kind: str):
    if kind == "noisy descent":
        sigma = unlearn.calibrate(epsilon, DELTA, steps=STEPS, **BALL, **MOVES)
        return unlearn.noisy_descent(model, sigma=sigma, delta=DELTA, batch=64, **BALL, **MOVES), STEPS
    if kind == "model clipping":
        sigma = unlearn.calibrate_model_clipping(epsilon, DELTA, steps=STEPS, clip_model=BALL["clip_init"])
        how = {"lr": MOVES["lr"], "clip_model": BALL["clip_init"]}
        return unlearn.noisy_model_clipping(model, sigma=sigma, epsilon=epsilon, batch=64, **BALL, **how), STEPS
    sigma = unlearn.calibrate(epsilon, DELTA, steps=1, lr=0.0, clip_grad=0.0, **BALL)
    return unlearn.output_perturbation(model, sigma=sigma, delta=DELTA, **BALL), 1


def network(model, training, test, epochs: int, seed: int) -> dict:
    """Accuracies of the victim, of training anew, and of each certified run after the same training."""
    forget, key = np.asarray(training.y) == CLASS, jax.random.key(seed)
    steps = sets.steps(int((~forget).sum()), 64, epochs)
    tx = train.clipped_sgd(0.1, 0.9, 5e-4, steps)
    learner, free = train.sgd(model, tx), unlearn.finetune(model, tx, batch=64)

    def measured(weights):
        return accuracies(*models.freeze(model, weights), training, test, forget)

    def freely(weights, more=0):
        state = free.init(keys.named(key, "free"), weights, training, forget)
        return scan(free, key, state, training, steps=steps + more)[0].weights

    victim = scan(learner, key, learner.init(key, training.x[:1]), training, steps=2 * steps, batch=64)[0].weights
    centre = model.init(keys.named(key, "centre"), training.x[:1])
    rows = {"victim": measured(victim), "training anew": measured(freely(centre, STEPS))}
    for kind in ("noisy descent", "model clipping", "output perturbation"):
        for epsilon in EPSILONS:
            method, count = certified(model, epsilon, kind)
            secret = keys.named(key, f"{kind} {epsilon}")
            state = method.init(secret, victim, training, forget, centre.params)
            state, _ = scan(method, secret, state, training, steps=count)
            weights = unlearn.released(model, state.weights, training, jnp.asarray(forget))
            rows[f"{kind}, {epsilon:g}"] = measured(freely(weights)) | {"epsilon": method.guarantee(count).epsilon}
    return rows


# --- linear heads ------------------------------------------------------------------------------------------------


def heads(x, training, test_x, test, seed: int) -> dict:
    """The same for heads W [F, K] on rows at most 1 long."""
    forget, key = np.asarray(training.y) == CLASS, jax.random.key(seed)
    rows, shown = sets.make(x, training.y, box=None), sets.make(test_x, test.y, box=None)
    model = models.from_apply(lambda key, x: {"w": jnp.zeros((x.shape[1], 10))}, lambda p, x: x @ p["w"])

    def measured(w):
        return accuracies(unlearn.heads.linear, w, rows, shown, forget)

    tx, steps = optax.sgd(2.0, momentum=0.9), sets.steps(int((~forget).sum()), 64, 20)
    learner, free = train.sgd(model, tx), unlearn.finetune(model, tx, batch=64)
    victim = scan(learner, key, learner.init(key, rows.x[:1]), rows, steps=2 * steps, batch=64)[0].weights

    def freely(weights):
        return scan(free, key, free.init(key, weights, rows, forget), rows, steps=steps)[0].weights.params["w"]

    found = {"victim": measured(victim.params["w"]), "training anew": measured(freely(model.init(key, rows.x[:1])))}
    for lam in RIDGES:
        retrained = unlearn.certified_head(classes=10, lam=lam, sigma=SIGMA, delta=DELTA).fit(rows.x, rows.y, forget)
        newton = {"newton": left_by_newton(lam, rows, forget)}
        found[f"fit anew without noise, ridge {lam:g}"] = measured(jnp.asarray(retrained.params)) | newton
    for epsilon in EPSILONS:
        how = {"lr": 0.5, "clip_init": 1.0, "clip_grad": 0.2}
        sigma = unlearn.calibrate(epsilon, DELTA, steps=STEPS, **how)
        method = unlearn.noisy_descent(model, sigma=sigma, delta=DELTA, batch=64, **how)
        state, _ = scan(method, key, method.init(key, victim, rows, forget), rows, steps=STEPS)
        found[f"noisy descent, {epsilon:g}"] = measured(freely(state.weights))
        found[f"Langevin, {epsilon:g}"] = langevin(epsilon, rows, forget, key, measured)
        for lam in RIDGES:
            found[f"certified removal, ridge {lam:g}, {epsilon:g}"] = removal(epsilon, lam, rows, forget, key, measured)
        found[f"published, heuristic, {epsilon:g}"] = published(epsilon, rows, forget, key, measured)
    return found


def langevin(epsilon, rows, forget, key, measured) -> dict:
    """Learn with the least noise at which 200 unlearning steps keep the promise, then take them."""
    decay, n, count, learning, steps = 0.01, len(rows.y), int(forget.sum()), 1000, 200
    fixed = {
        "classes": 10,
        "n": n,
        "forget": count,
        "learning_steps": learning,
        "lr": 1.0,
        "weight_decay": decay,
        "delta": DELTA,
    }
    unit = unlearn.langevin.langevin_head(sigma=1.0, **fixed).guarantee(steps).mu
    method = unlearn.langevin.langevin_head(sigma=unit / bounds.gdp_mu(epsilon, DELTA) * (1 + 1e-9), **fixed)
    learned, _ = scan(method, key, method.init(key, None, rows), rows, steps=learning)
    later = keys.named(key, "unlearn")
    state, _ = scan(method, later, method.init(later, learned.params, rows, forget), rows, steps=steps)
    return measured(state.params) | {"epsilon": method.guarantee(steps).epsilon, "before": measured(learned.params)}


def removal(epsilon, lam, rows, forget, key, measured) -> dict:
    """Remove the class in one request by Newton steps, and release with noise of one scale for every epsilon."""
    head = unlearn.certified_head(classes=10, lam=lam, sigma=SIGMA, epsilon=epsilon, delta=DELTA)
    state, update = head.remove(head.fit(rows.x, rows.y), rows.x, rows.y, forget)
    released, _ = head.release(keys.named(key, f"output {lam} {epsilon}"), state)
    found = {"epsilon": released.guarantee.epsilon, "sigma": SIGMA, "path": update.path, "steps": update.steps}
    found |= {"distance": update.distance, "allowed": update.allowed, "tried": update.tried}
    return measured(released.params) | found | {"without noise": measured(jnp.asarray(state.params))}


def left_by_newton(lam, rows, forget) -> dict:
    """How far one to five Newton steps may be from the minimiser, and the noise that would hide it at each epsilon."""
    left = {}
    for steps in range(1, 6):
        head = unlearn.certified_head(classes=10, lam=lam, sigma=1e-6, delta=DELTA, steps=steps)  # so small that all are taken
        left[str(steps)] = head.remove(head.fit(rows.x, rows.y), rows.x, rows.y, forget)[1].tried
    hidden = {f"{e:g}": bounds.gdp_mu(e, DELTA) * (1 - unlearn.heads.FIT) for e in EPSILONS}
    return {"distance": left, "sigma": {e: {steps: far / mu for steps, far in left.items()} for e, mu in hidden.items()}}


def published(epsilon, rows, forget, key, measured) -> dict:
    """The published form, a heuristic: Newton steps of 10 examples each, for as long as the budget lasts."""
    sigma = 20 / epsilon
    how = {"lam": 0.01, "sigma": sigma, "epsilon": epsilon, "delta": DELTA, "account": "measured"}
    head = unlearn.published_head(classes=10, **how)
    state = head.fit(key, rows.x, rows.y)
    removed, found = 0, {"before": measured(state.params)}
    for part in np.array_split(np.flatnonzero(forget), math.ceil(forget.sum() / 10)):
        try:
            state, update = head.remove(state, rows.x, rows.y, part)
        except unlearn.BudgetSpent:
            break
        removed += len(part)
        found |= {"spent": update.spent, "budget": update.budget}
    return measured(state.params) | {"removed": removed, "of": int(forget.sum()), "sigma": sigma} | found


# --- tables ------------------------------------------------------------------------------------------------------


def table(rows: dict[str, list[dict]]) -> str:
    names = ("forgotten", "forgotten class, test", "other classes, test")
    lines = ["| | " + " | ".join(names) + " | |", "|---" * (len(names) + 2) + "|"]
    for name, each in rows.items():
        cells = [f"{np.mean([one[n] for one in each]):.3f} ± {np.std([one[n] for one in each], ddof=1):.3f}" for n in names]
        more = ""
        if "removed" in each[0]:
            removed = f"{np.mean([one['removed'] for one in each]):.0f} of {each[0]['of']}"
            more = f"no guarantee; sigma {each[0]['sigma']:g} on the objective, {removed} removed within the published budget"
        if "path" in each[0]:
            paths = ", ".join(f"{one['steps']} Newton steps" if one["path"] == "newton" else one["path"] for one in each)
            clean = np.mean([one["without noise"]["other classes, test"] for one in each])
            more = f"sigma {each[0]['sigma']:g} on the weights; {paths}; {clean:.3f} without noise"
        if "newton" in each[0]:
            steps = each[0]["newton"]["distance"]
            far = [np.mean([one["newton"]["distance"][s] for one in each]) for s in steps]
            more = "at most this far from it after 1 to 5 Newton steps: " + ", ".join(f"{f:.2g}" for f in far)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {more} |")
    return "\n".join(lines) + "\n"


def worlds(data: str | None):
    """name -> a function of the seed."""
    training, test = sources.load("digits")
    found = {
        f"digits, {name}": lambda seed, net=net: network(models.from_linen(net), training, test, 10, seed)
        for name, net in (("MLP (32)", nets.mlp(10, (32,))), ("CNN (16, 32)", nets.cnn(10)))
    }
    if data is None:
        return found
    more, other = sources.load(data)
    net = nets.cnn(10, (16, 32, 64))
    half = len(more.y) // 2
    public, private = (sets.make(more.x[part], more.y[part]) for part in (slice(half), slice(half, None)))

    def on_features(seed):
        model, key = models.from_linen(net), jax.random.key(100 + seed)
        learner, steps = train.sgd(model, train.clipped_sgd(0.1, 0.9, 5e-4, 20 * half // 64)), 20 * half // 64
        weights = scan(learner, key, learner.init(key, public.x[:1]), public, steps=steps, batch=64)[0].weights
        features = jax.jit(models.penultimate(net))
        x, shown = (unlearn.langevin.clip_rows(features(weights, part.x), 4.0) for part in (private, other))
        return heads(x, private, shown, other, seed)

    found["CIFAR-10, CNN (16, 32, 64)"] = lambda seed: network(models.from_linen(net), private, other, 10, seed)
    found["CIFAR-10, linear heads on frozen features"] = on_features
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="an .npz of CIFAR-10")
    arguments = parser.parse_args()
    path = RESULTS / "certified.json"
    kept = json.loads(path.read_text()) if path.exists() else {"rows": {}, "measured": {}}
    done, when = kept["rows"], kept["measured"]  # each row says when and by what it was measured
    text = ""
    for name, make in worlds(arguments.data).items():
        for seed in SEEDS:
            if f"{name} {seed}" not in done:
                started = time.monotonic()
                done[f"{name} {seed}"] = make(seed)
                print(name, seed, json.dumps(done[f"{name} {seed}"]), flush=True)
                when[f"{name} {seed}"] = runs.measured(started)
                kept = {"measured": when, "epsilons": EPSILONS, "delta": DELTA, "rows": done}
                files.write(path, report.to_json(kept))
        each = {row: [done[f"{name} {seed}"][row] for seed in SEEDS] for row in done[f"{name} {SEEDS[0]}"]}
        text += f"{name}:\n\n{table(each)}\n"
    files.write(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
