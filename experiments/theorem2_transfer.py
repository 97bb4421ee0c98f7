"""SoK Theorem 2, for which the paper prints no number: what certified reference networks promise of certified-unlearned ones.

    python experiments/theorem2_transfer.py --preset cpu --data cifar10.npz

The victim of `table14_class` forgets a class by noisy clipped descent around a fresh initialisation and free training after it;
references are the same runs from the network retrained without the class, from which (epsilon, delta) keeps the others
indistinguishable. A cell is a perturbation and a class, one protected and one clean. In it: each reference's own bound (as
in `theorem1_depth`) and what that promises of all runs, by the event "the bound is at most tau" and by the ball around one
reference; the same for what a recovery attack reaches; and the same numbers of runs that were really made.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np

from dememo_jax import audit, certify, data, evaluate, keys, tree, unlearn
from dememo_jax.models import freeze
from dememo_jax.types import Weights
from lab import models, table
from lab.classes import PERTURBATIONS, PROTECTED, asked, seen_by
from lab.models import World
from lab.presets import Certified

THRESHOLDS = (0.1, 0.25, 0.5)  # of the attack's accuracy; fixed before any run


def names(world: World) -> list[str]:
    forgotten = world.preset.forgotten
    labels = [next(label for label in forgotten if (label < PROTECTED) == protected) for protected in (True, False)]
    return [f"{kind}.{label}" for label in labels for kind in PERTURBATIONS]


@functools.lru_cache(maxsize=2)
def procedure(world: World, how: Certified, retained: int):
    """Noisy descent, its guarantee, and the free training that follows."""
    rates = {"lr": how.lr, "clip_init": how.clip_init, "clip_grad": how.clip_grad}
    sigma = unlearn.calibrate(how.epsilon, how.delta, steps=how.steps, **rates)
    noisy = unlearn.noisy_descent(world.model, sigma=sigma, delta=how.delta, batch=world.preset.batch, **rates)
    net, steps = world.preset.learning["resnet18"], data.steps(retained, world.preset.batch, how.epochs)
    free = unlearn.finetune(world.model, models.optimiser(net, steps), batch=world.preset.batch)
    return noisy, noisy.guarantee(how.steps), free, steps


def forgetful(world: World, start: Weights, seen, forget, who: str) -> Weights:
    """One certified run from `start`, and the training after it, which costs nothing: it sees the retain set alone."""
    key = jax.random.key(world.preset.seeds[0])
    noisy, _, free, steps = procedure(world, world.preset.certified, int((~forget).sum()))
    centre, secret = world.model.init(keys.named(key, "centre"), seen.x[:1]), keys.named(key, f"theorem2 {who}")
    state = noisy.init(secret, start, seen, forget, centre.params)
    state, _ = models.scan(noisy, secret, state, seen, steps=world.preset.certified.steps)
    weights = unlearn.released(world.model, state.weights, seen, forget)
    later = keys.named(secret, "free")
    return models.scan(free, later, free.init(later, weights, seen, forget), seen, steps=steps)[0].weights


def compute(world: World, name: str) -> dict:
    (kind, label), preset = asked(name), world.preset
    how, (training, test), seen = preset.certified, models.sets_of(world), seen_by(world, kind)
    forget, tested = np.asarray(seen.y) == label, np.asarray(test.y) == label
    firsts = itertools.islice(models.versions(world, "class", kind, str(label), seen, forget), 2)
    (_, _, before), (_, _, retrained) = firsts
    many = {f"reference {i}": retrained for i in range(how.references)} | {f"run {i}": before for i in range(how.runs)}
    made = {
        who: models.kept(world, f"{kind}-{label}-{who.replace(' ', '-')}",
                         lambda who=who, start=start: forgetful(world, start, seen, forget, f"{name} {who}"))
        for who, start in many.items()
    }  # fmt: skip
    key, shown = keys.named(jax.random.key(preset.seeds[0]), f"theorem2 {name}"), data.select(test, tested)
    shown = data.make(shown.x, shown.y)
    frozen = {who: freeze(world.model, weights) for who, weights in made.items()}
    ask = {"sigma": preset.sigma, "eta": preset.etas, "draws": preset.draws, "side": "upper"}
    depths = {
        who: certify.depth(*net, shown, keys.named(key, who), alpha=0.01 / how.references, **ask).rows
        for who, net in frozen.items()
    }
    hints = data.share_of(keys.named(key, "hints"), forget, training.y, 0.1)
    swept, _ = audit.sweep(
        world.model, list(made.values()), training, shown, key, radii=preset.radii[-1:], hints=hints,
        epochs=preset.recovery.epochs, batch=preset.batch, tx=models.attacker(preset.recovery),
    )  # fmt: skip
    reached = {who: max(curves[0].accuracy) for who, curves in zip(made, swept)}
    others = data.select(test, ~tested)
    rows = [
        {
            "who": who, "upper": [row.upper for row in depths[who]], "attack": reached[who],
            "class": float(evaluate.accuracy(*frozen[who], shown)), "others": float(evaluate.accuracy(*frozen[who], others)),
        }
        for who in made
    ]  # fmt: skip
    promised = promises(world, key, shown, frozen, depths, reached, int((~forget).sum()))
    images = [len(training.y), len(test.y)]
    return {"value": {"networks": rows, **promised}, "images": images, "claim": dataclasses.asdict(how) | {"q": 0.9}}


def promises(world: World, key, shown, frozen, depths, reached, retained: int) -> dict[str, Any]:
    """Every form of the transfer, from the references alone."""
    how, preset = world.preset.certified, world.preset
    guarantee = procedure(world, how, retained)[1]
    references = [who for who in depths if who.startswith("reference")]
    budget, found = {"epsilon": how.epsilon, "zeta": how.delta}, []
    for i, eta in enumerate(preset.etas):
        rows = [depths[who][i] for who in references]
        event = certify.transfer_event(rows, tau=how.tau, **budget)
        found += [(eta, event), (eta, certify.transfer_gdp(rows, tau=how.tau, mu=guarantee.mu))]
    centre, rest = frozen[references[0]], references[1:]
    away = [float(tree.distance(frozen[who][1], centre[1])) for who in rest]
    draws = certify.draw(
        certify.cloud(*centre, shown, keys.named(key, "ball"), sigma=preset.sigma), draws=preset.draws
    )  # fmt: skip
    ball = certify.transfer_ball(draws, away, radius=max(away), eta=preset.etas, side="upper", **budget)
    scores = [reached[who] for who in references]
    attacks = [certify.transfer_attack(scores, threshold=at, **budget) for at in THRESHOLDS]
    return {
        "events": [plain(one) | {"eta": eta} for eta, one in found],
        "ball": plain(ball) | {"radius": max(away), "upper": [row.upper for row in ball.certificate.rows]},
        "attacks": [plain(one) | {"threshold": at} for at, one in zip(THRESHOLDS, attacks)],
        "mu": guarantee.mu,
    }


def plain(one: certify.Transfer) -> dict[str, Any]:
    told = ("form", "statement", "probability", "confidence", "successes", "references")
    return {name: getattr(one, name) for name in told}


def main(argv=None):
    return table.main("theorem2", __doc__, names, compute, argv)


if __name__ == "__main__":
    main()
