"""The networks behind `audit.py`: scores of shadow models and of unlearned and retrained ones, kept as they are made.

    python experiments/audit_models.py [--data cifar10.npz] [--only digits|cifar]

For each data set two things are trained, all from one key. `halves`: 64 networks on random halves. `worlds`: networks on all of
the data, each of which then unlearns the same random 5 % by every method; and twice as many retrained without, half of
which serve as the null. Log-odds of every example and what was right go to `runs/audit-models/*.npz`, a file a block, and
finished groups are never trained again. Certified descent also starts from the retrained networks: its comparator.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dememo_jax import audit, keys, losses, models, nets, sources, train, types, unlearn
from dememo_jax import data as sets

WORK = Path("runs/audit-models")
CERTIFIED = {"lr": 0.001, "clip_init": 0.01, "clip_grad": 1.0}
EPSILON, DELTA, NOISY = 4.0, 1e-5, 10


class Case(NamedTuple):
    model: types.Model
    halves: int
    worlds: int
    count: int | None  # training examples of the worlds; None is all
    batch: int
    epochs: int
    rates: dict[str, tuple[float, int]]  # method -> learning rate, epochs


CASES = {
    "digits": Case(
        models.from_linen(nets.mlp(10, (64,))), 128, 128, None, 64, 30,
        {"finetune": (0.05, 5), "gradient ascent": (0.01, 5), "NPO": (0.003, 5)},
    ),
    "cifar": Case(
        models.from_linen(nets.cnn(10, (16, 32, 64))), 64, 64, 1000, 64, 20,
        {"finetune": (0.02, 3), "gradient ascent": (0.01, 5), "NPO": (0.01, 3)},
    ),
}  # fmt: skip
RECIPES = {"finetune": unlearn.finetune, "gradient ascent": unlearn.gradient_ascent, "NPO": unlearn.npo}


def both(logits, labels):
    """Log-odds of the label, and whether it comes first."""
    return jnp.stack([losses.margin(logits, labels), losses.correct(logits, labels)], axis=-1)


def learner(case: Case, count: int) -> types.Method:
    return train.sgd(case.model, train.clipped_sgd(0.1, 0.9, 5e-4, sets.steps(count, case.batch, case.epochs)))


def kept(name: str, shape: tuple[int, ...]):
    """A block of scores on disk, how to add to it, and which of its rows are there."""
    path = WORK / f"{name}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            scores, done = file["scores"], file["done"]
    else:
        scores, done = np.zeros(shape, np.float32), np.zeros(shape[0], bool)

    def add(rows, values):
        scores[rows], done[rows] = values, True
        part = path.with_suffix(".part.npz")
        np.savez(part, allow_pickle=False, scores=scores, done=done)
        part.replace(path)

    return scores, add, done


def certified(case: Case, count: int, retained: int, centre):
    """Noisy descent around a fixed public initialisation, then free training, as one pure function."""
    sigma = unlearn.calibrate(EPSILON, DELTA, steps=NOISY, **CERTIFIED)
    noisy = unlearn.noisy_descent(case.model, sigma=sigma, delta=DELTA, batch=case.batch, **CERTIFIED)
    steps = sets.steps(retained, case.batch, case.epochs)
    free = audit.descended(unlearn.finetune(case.model, train.clipped_sgd(0.1, 0.9, 5e-4, steps), batch=case.batch), steps)
    walk = audit.descended(types.Method(lambda *given: noisy.init(*given, centre), noisy.step), NOISY)

    def then(key, weights, data, forget):
        # Batch statistics begin anew in the noisy steps, and the free training brings them up from the retain set.
        return free(keys.named(key, "free"), walk(keys.named(key, "noise"), weights, data, forget), data, forget)

    return then, noisy.guarantee(NOISY)


def halves(name: str, case: Case, data, test, key) -> None:
    masks = audit.halves(keys.named(key, "halves"), case.halves, len(data.y))
    shown = sets.make(jnp.concatenate([data.x, test.x]), jnp.concatenate([data.y, test.y]))
    _, add, done = kept(f"{name}-halves", (case.halves, len(shown.y), 2))
    method = learner(case, len(data.y) // 2)
    how = {"passes": case.epochs, "batch": case.batch, "skip": np.flatnonzero(done).tolist()}
    for group in audit.train_shadows(keys.named(key, "shadows"), case.model, method, data, masks, **how):
        add(group.rows, audit.score(case.model, group.weights, shown, loss=both, width=len(group.rows)))
        print(f"{name} halves {done.sum()} of {len(done)}", time.strftime("%X"), flush=True)


def worlds(name: str, case: Case, data, test, key) -> None:
    count, forget = len(data.y), forgotten(key, len(data.y))
    shown = sets.make(jnp.concatenate([data.x, test.x]), jnp.concatenate([data.y, test.y]))
    retained = int((~forget).sum())
    centre = case.model.init(keys.named(key, "centre"), data.x[:1]).params
    private, _ = certified(case, count, retained, centre)
    thens = {"certified": private}
    for what, (rate, epochs) in case.rates.items():
        method = RECIPES[what](case.model, optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, 0.9)), batch=case.batch)
        thens[what] = audit.descended(method, method.steps(count - retained, retained, epochs))
    for side, models_ in (("original", case.worlds), ("retrained", 2 * case.worlds)):
        mask = np.ones(count, bool) if side == "original" else ~forget
        masks = np.tile(mask, (models_, 1))
        wanted = {side: None} | (thens if side == "original" else {})
        blocks = {what: kept(f"{name}-{what.replace(' ', '-')}", (models_, len(shown.y), 2)) for what in wanted}
        if side == "retrained":  # what certified descent must not be told from
            blocks["certified, retrained"] = kept(f"{name}-certified-retrained", (case.worlds, len(shown.y), 2))
        # A block with fewer rows does not want the last ones.
        done = np.all([np.append(block[2], np.ones(models_ - len(block[2]), bool)) for block in blocks.values()], axis=0)
        own = keys.named(key, side)
        method = learner(case, int(mask.sum()))
        how = {"passes": case.epochs, "batch": case.batch, "skip": np.flatnonzero(done).tolist()}
        for group in audit.train_shadows(own, case.model, method, data, masks, **how):
            width = len(group.rows)
            for what, (_, add, _) in blocks.items():
                if what == "certified, retrained":
                    if group.rows.max() >= case.worlds:
                        continue
                    # Trained without them, it goes through the same procedure, which looks at the rest only.
                    then, everything = private, np.ones((models_, count), bool)
                else:
                    then, everything = wanted[what], masks
                made = group
                if then is not None:
                    made = audit.then_unlearn(keys.named(own, what), group, then, data, everything, forget, width=width)
                add(group.rows, audit.score(case.model, made.weights, shown, loss=both, width=width))
            print(f"{name} {side} {group.rows.max() + 1} of {models_}", time.strftime("%X"), flush=True)


def forgotten(key, count: int) -> np.ndarray:
    """The forget set: a random twentieth."""
    mask = np.zeros(count, bool)
    mask[np.asarray(jax.random.permutation(keys.named(key, "forget"), count))[: count // 20]] = True
    return mask


def load(name: str, path: str | None):
    training, test = sources.load("digits" if name == "digits" else path)
    return training, test


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="an .npz of CIFAR-10; without it digits alone")
    parser.add_argument("--only", choices=list(CASES))
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        if (name == "cifar" and not arguments.data) or arguments.only not in (None, name):
            continue
        data, test = load(name, arguments.data)
        key = jax.random.key(0)
        part = data if case.count is None else sets.make(data.x[: case.count], data.y[: case.count])
        begun = time.monotonic()
        worlds(name, case, part, test, key)
        halves(name, case, data, test, key)
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
