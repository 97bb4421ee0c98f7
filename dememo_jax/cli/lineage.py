"""What a run stands on: its data, perturbation, network and weights, found by following --from."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from dememo_jax import augment, checkpoint, evaluate, models, nets, sources
from dememo_jax import data as sets
from dememo_jax.augment import Augment
from dememo_jax.cli import runs
from dememo_jax.errors import BadInput, require
from dememo_jax.types import Dataset, Method, Model, Perturbation, Weights

NOISE, WEIGHTS, FORGET = "perturbation.npz", "weights", "forget.npy"


@dataclass(frozen=True)
class Context:
    """Everything that later commands need of the runs before them."""

    name: str  # of the data
    train: Dataset  # clean
    test: Dataset
    classes: int
    digest: str  # of the data, or of the run that this comes from
    perturbation: Perturbation | None = None
    trained: dict | None = None  # configuration of the train run
    weights: Weights | None = None
    forget: np.ndarray | None = None  # [N]

    @functools.cached_property
    def seen(self) -> Dataset:
        """The training set as the model saw it."""
        return sets.perturb(self.train, self.perturbation)

    @property
    def protected(self) -> np.ndarray:
        """Mask [N] of the protected training examples."""
        return np.zeros(len(self.train.y), bool) if self.perturbation is None else np.asarray(self.perturbation.mask)

    @property
    def model(self) -> Model:
        assert self.trained is not None
        return model(self.trained["model"], self.classes)


# --- networks and optimisers: cached, so that runs of one shape in one process share compiled programs -----------


@functools.lru_cache
def model(name: str, classes: int) -> Model:
    return models.from_linen({"mlp": nets.mlp, "cnn": nets.cnn, "resnet18": nets.resnet18}[name](classes))


@functools.lru_cache
def tx(lr: float, momentum: float, weight_decay: float, cosine_steps: int | None = None) -> optax.GradientTransformation:
    """SGD with momentum, weight decay and gradients clipped at norm 5, at a constant rate or falling by a cosine."""
    rate = lr if cosine_steps is None else optax.cosine_decay_schedule(lr, cosine_steps)
    return optax.chain(optax.clip_by_global_norm(5.0), optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum))


@functools.lru_cache
def augmentation(name: str) -> Augment | None:
    return augment.compose(augment.crop(4), augment.flip()) if name == "crop-flip" else None


@functools.lru_cache
def method(recipe: Callable[..., Method], net: Model, transform: optax.GradientTransformation, **how: Any) -> Method:
    """`recipe(net, transform, **how)`, the same object for the same arguments."""
    return recipe(net, transform, **how)


# --- lineage -----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def root(name: str, data_dir: Path | None) -> Context:
    """The clean data that everything starts from."""
    train_set, test_set = sources.load(name, data_dir)
    digest = runs.digest(train_set.x, train_set.y, test_set.x, test_set.y)
    return Context(name, train_set, test_set, sources.classes(train_set), digest)


def resolve(folder: Path, *, expected: tuple[str, ...]) -> Context:
    """The context after the run in `folder`; BadInput when it is unfinished or of another kind than `expected`."""
    config = runs.result(folder)["config"]
    command = config["command"]
    require(command in expected, f"{folder} is a {command} run; expected a {' or '.join(expected)} run")
    digest = runs.digest((folder / runs.CONFIG).read_bytes())
    if config.get("source") is None:
        base = root(*_located(folder, config))
    else:
        base = resolve(folder / config["source"], expected=("protect", "train"))
    if command == "protect":
        with np.load(folder / NOISE, allow_pickle=False) as noise:
            perturbation = Perturbation(*(jax.numpy.asarray(noise[name]) for name in Perturbation._fields))
        return dataclasses.replace(base, perturbation=perturbation, digest=digest)
    if command == "train":
        base = dataclasses.replace(base, perturbation=narrowed(base, config["protected_classes"]), trained=config)
    forget = np.load(folder / FORGET, allow_pickle=False) if command == "unlearn" else None
    base = dataclasses.replace(base, forget=forget, digest=digest)
    return dataclasses.replace(base, weights=_weights(folder, base))


def narrowed(base: Context, classes: Any) -> Perturbation | None:
    """The perturbation, on the given classes only."""
    if base.perturbation is None or not classes:
        require(not classes, "--protected-classes needs a protect run as --from: clean data has no protected classes")
        return base.perturbation
    mask = base.perturbation.mask & sets.of_classes(base.train.y, classes)
    require(mask.any(), f"the protect run protects no example of the classes {list(classes)}")
    return base.perturbation._replace(mask=mask)


def _located(folder: Path, config: dict) -> tuple[str, Path | None]:
    name, where = config["data"], config["data_dir"]
    return str(folder / name) if name.endswith(".npz") else name, folder / where if where else None


def _weights(folder: Path, base: Context) -> Weights:
    like = jax.eval_shape(base.model.init, jax.random.key(0), base.train.x[:1])
    restored, damaged = checkpoint.newest(folder / WEIGHTS, like)
    if restored is None:
        raise BadInput(f"{folder}: its weights cannot be read ({'; '.join(damaged) or 'none there'}); run it again in a new folder")
    return restored.state


# --- the sets of the paper ---------------------------------------------------------------------------------------


def splits(base: Context, forget: np.ndarray, observed: tuple[int, ...]) -> dict[str, tuple[str, np.ndarray]]:
    """name -> (which images, mask), as the SoK names them.

    Du forgotten protected examples as the model saw them, Duc their clean counterparts, Dut test images of their
    classes; Dc and Dct the same for forgotten clean examples; Dtr test images of the observed classes.
    """
    labels, test_labels = np.asarray(base.train.y), np.asarray(base.test.y)
    hidden, open_ = forget & base.protected, forget & ~base.protected
    found: dict[str, tuple[str, np.ndarray]] = {}
    if hidden.any():
        test = np.isin(test_labels, labels[hidden])
        found |= {"Du": ("seen", hidden), "Duc": ("train", hidden), "Dut": ("test", test)}
    if open_.any():
        found |= {"Dc": ("train", open_), "Dct": ("test", np.isin(test_labels, labels[open_]))}
    rest = np.isin(test_labels, observed) if observed else ~np.isin(test_labels, labels[forget])
    return {name: part for name, part in (found | {"Dtr": ("test", rest)}).items() if part[1].any()}


def accuracies(base: Context, weights: Weights, parts: dict[str, tuple[str, np.ndarray]]) -> dict[str, float]:
    """Accuracy on each of the splits, and on the whole test set."""
    apply, params = models.freeze(base.model, weights)
    needed = {where for where, _ in parts.values()} | {"test"}
    right = {where: np.asarray(evaluate.correct(apply, params, getattr(base, where))) for where in needed}
    return {name: float(right[where][mask].mean()) for name, (where, mask) in parts.items()} | {"test": float(right["test"].mean())}
