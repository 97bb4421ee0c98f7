"""Data, noise and networks of the experiments, each made once and kept in the work folder, whichever process asks first."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dememo_jax import audit, cells, certify, checkpoint, evaluate, keys, loop, models, report, sources, train, tree, unlearn
from dememo_jax import data as sets
from dememo_jax.cli import configs, lineage, networks, protecting, runs
from dememo_jax.types import Dataset, Model, Perturbation, Weights
from lab.presets import Learning, Preset

SCALES = ("small", "large")
scan = jax.jit(loop.scan, static_argnames=("method", "steps", "batch"))


@dataclass(frozen=True)
class Place:
    """A preset, its data, and the folder where noise and weights are kept; a kind of data says what `sets` and `model` are."""

    preset: Any
    data: str
    work: Path

    def __hash__(self) -> int:
        return hash((self.preset.name, self.data, self.work, self.preset.batch))


class World(Place):
    """Of images."""

    preset: Preset

    @property
    def sets(self) -> tuple[Dataset, Dataset]:
        return sets_of(self)

    @property
    def model(self) -> Model:
        """The network that is to forget."""
        return network(self.preset.networks["resnet18"])


@functools.lru_cache(maxsize=2)
def sets_of(world: World) -> tuple[Dataset, Dataset]:
    """Training and test images: as many of each class as the preset says, the first ones."""
    loaded = sources.load(world.data, side=world.preset.side)
    if world.preset.images is None:
        return loaded
    return tuple(_first(part, count) for part, count in zip(loaded, world.preset.images))  # type: ignore[return-value]


def _first(data: Dataset, count: int) -> Dataset:
    labels = np.asarray(data.y)
    rank = np.zeros(len(labels), int)
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    part = sets.select(data, rank < count)
    return sets.make(part.x, part.y)


def noise(world: World, name: str) -> Perturbation:
    """A perturbation of the whole training set, by `dememo protect`."""
    work, preset = world.work, world.preset
    with cells.turn(work / f"protect-{name}.lock"):
        training, test = sets_of(world)
        file = work / "data.npz"
        if not file.exists():
            part = file.with_name("part.npz")
            np.savez(part, x_train=training.x, y_train=training.y, x_test=test.x, y_test=test.y)
            part.replace(file)
        made = configs.Protect(work / f"protect-{name}", name, str(file), model=preset.surrogate, **preset.protect[name])  # type: ignore[arg-type]
        protecting.protect_data(made)
        perturbation = lineage.protected(made.run).perturbation
        assert perturbation is not None  # of a protect run
        return perturbation


# --- networks ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def network(module: Any) -> Model:
    return models.from_linen(module)


@functools.lru_cache(maxsize=32)
def optimiser(how: Learning, steps: int) -> optax.GradientTransformation:
    return train.usual(how.optimizer, "cosine", how.lr, 0.9, how.weight_decay, steps)


@functools.lru_cache(maxsize=32)
def _learner(module: Any, how: Learning, steps: int, augment: str):
    return train.sgd(network(module), optimiser(how, steps), augment=networks.augmentation(augment))


def learned(
    world: World, kind: str, seen: Dataset, seed: int, *, mask=None, augment: str | None = None, what: str = ""
) -> Weights:
    """Weights of a network of that kind after training on the examples where `mask`."""
    preset = world.preset
    module, how = preset.networks["resnet18" if kind == "victim" else kind], preset.learning[kind]
    steps = sets.steps(len(seen.y) if mask is None else int(np.sum(mask)), preset.batch, how.epochs)
    method, key = _learner(module, how, steps, preset.augment if augment is None else augment), jax.random.key(seed)
    state = method.init(keys.named(key, f"init {what}"), seen.x[:1])
    mask = None if mask is None else jnp.asarray(mask)
    return scan(method, keys.named(key, what), state, seen, steps=steps, batch=preset.batch, mask=mask)[0].weights


def kept(world: Any, name: str, make: Callable[[], Weights], model: Model | None = None) -> Weights:
    """Weights of a model (the victim's kind where nothing is said) under a name; made by whoever needs them first."""
    training, _ = world.sets
    like = jax.eval_shape((model or world.model).init, jax.random.key(0), training.x[:1])
    store = checkpoint.store(world.work / "weights", like, print)
    with cells.turn(world.work / "weights" / f"{name}.lock"):
        found = store.load(name)
        if found is None:
            found = jax.block_until_ready(make())
            store.save(name, found)
        return found


# --- unlearning --------------------------------------------------------------------------------------------------


def _adjustable(learning_rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(learning_rate, 0.9))


@functools.lru_cache(maxsize=8)
def _descent(recipe: Callable, module: Any, batch: int):
    return recipe(network(module), optax.inject_hyperparams(_adjustable)(1.0), batch=batch)


def unlearned(world: World, method: str, rate: float, weights: Weights, seen: Dataset, forget, seed: int) -> Weights:
    """Weights after FT, GA or IF, at a learning rate or a scale of the step."""
    preset, key = world.preset, jax.random.key(seed)
    if method == "IF":
        count = None if preset.samples is None else min(preset.samples, int((~forget).sum()))
        apply, params = models.freeze(world.model, weights)
        return weights._replace(
            params=unlearn.influence(apply, params, seen, forget, alpha=rate, damping=0.1, samples=count).params
        )
    recipe, epochs = {
        "FT": (unlearn.finetune, preset.finetune_epochs), "GA": (unlearn.gradient_ascent, preset.ascent_epochs),
    }[method]  # fmt: skip
    descent = _descent(recipe, preset.networks["resnet18"], preset.batch)
    state = descent.init(key, weights, seen, forget)
    state = state._replace(opt=optax.tree.set(state.opt, learning_rate=np.float32(rate)))
    steps = descent.steps(int(forget.sum()), int((~forget).sum()), epochs)
    return descent.finish(scan(descent, key, state, seen, steps=steps)[0])


@functools.lru_cache(maxsize=4)
def attacker(how: Learning) -> optax.GradientTransformation:
    """The optimiser of the recovery attack."""
    return audit.recovery.default_tx(how.lr, how.weight_decay)


def versions(
    world: World, level: str, kind: str, label: str, seen: Dataset, forget: np.ndarray
) -> Iterator[tuple[str, str, Weights]]:
    """(method, scale, weights): the victim of a level and perturbation, the network retrained without the examples, and each
    unlearned one."""
    seed, victim, what = world.preset.seeds[0], f"{level.split('-')[0]}-{kind}", f"{level}-{label}"
    scales = world.preset.rates.get(f"{level} {kind}") or world.preset.rates["*"]
    before = kept(world, victim, lambda: learned(world, "victim", seen, seed, what="victim"))
    yield "Before", "", before
    again = {"mask": ~forget, "what": f"retrain {what}"}
    yield "RT", "", kept(world, f"{kind}-{what}-RT", lambda: learned(world, "victim", seen, seed, **again))
    for method, rates in scales.items():
        for scale, rate in zip(SCALES, rates):
            how = (world, method, rate, before, seen, forget, seed)
            yield method, scale, kept(world, f"{kind}-{what}-{method}-{scale}", lambda how=how: unlearned(*how))


def told(world: World, made: Iterable, parts: dict[str, tuple[Dataset, np.ndarray]], seen: Dataset, forget: np.ndarray) -> dict:
    """What stands in a cell: accuracy on each part, and membership inference on the forgotten images, of every version."""
    training, test = sets_of(world)
    rows = []
    for method, scale, weights in made:
        row: dict[str, Any] = {"method": method, "scale": scale}
        if not tree.finite(weights):
            rows.append(row | {"accuracy": None, "membership": None, "reason": "diverged"})
            continue
        frozen = models.freeze(world.model, weights)
        right = {part: np.asarray(evaluate.correct(*frozen, of))[mask].mean() for part, (of, mask) in parts.items()}
        accuracy = {part: float(value) for part, value in right.items()}
        rows.append(row | {"accuracy": accuracy, "membership": membership(frozen, seen, training, test, forget)})
    return {"value": rows, "images": [len(training.y), len(test.y)]}


def membership(frozen, seen: Dataset, training: Dataset, test: Dataset, forget: np.ndarray) -> dict[str, float]:
    """Success of the SoK's attacks on the clean form of the forgotten images, shadowed by retained and by test images."""
    shown, clean, strange = (np.asarray(evaluate.logits(*frozen, part.x)) for part in (seen, training, test))
    labels = np.asarray(training.y)
    members = np.flatnonzero(~forget)[: len(strange)]
    known = (shown[members], labels[members]), (strange, np.asarray(test.y))
    return audit.membership_scores(*known, (clean[forget], labels[forget]))


def depth(preset: Any, frozen, weights: Weights, shown: Dataset, key) -> dict[str, Any]:
    """What stands in a row of Theorem 1: an upper bound at every radius, or null and the reason."""
    if not tree.finite(weights):
        return {"bounds": None, "reason": "diverged"}
    found = certify.depth(*frozen, shown, key, sigma=preset.sigma, eta=preset.etas, draws=preset.draws, side="upper")
    bounds = [{"eta": one.eta, "upper": one.upper, "quantile": one.quantile, "reason": one.reason} for one in found.rows]
    return {"bounds": bounds, "noise norm": found.noise_norm}


def claim(preset: Any) -> dict[str, float]:
    """What the bounds of `depth` say they are."""
    return {"q": 0.9, "alpha": 0.01, "sigma": preset.sigma, "draws": preset.draws}


def stamp(world: Any, started: float, seed: int) -> dict[str, Any]:
    """What stands beside a value: seed, device, versions, commit, configuration, seconds."""
    plain = dataclasses.asdict(world.preset) | {"networks": {name: repr(net) for name, net in world.preset.networks.items()}}
    found = runs.measured(started)
    return {"seed": seed, "commit": found["commit"], "measured": found, "configuration": json.loads(report.to_json(plain))}
