"""Networks and methods by name; cached, so that runs of one shape in one process share compiled programs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
import optax

from dememo_jax import augment, models, nets
from dememo_jax import train as training
from dememo_jax.augment import Augment
from dememo_jax.cli.configs import Sisa, Train
from dememo_jax.errors import require
from dememo_jax.types import Array, Model, Weights

MAKERS: dict[str, Callable[..., Any]] = {
    "mlp": nets.mlp,
    "cnn": nets.cnn,
    "cnn3": functools.partial(nets.cnn, widths=(16, 32, 64)),
    "resnet18": nets.resnet18,
    "resnet50": nets.resnet50,
    "densenet121": nets.densenet121,
    "senet18": nets.senet18,
    "vit-tiny": nets.vit_tiny,
}
STEMMED = ("resnet18", "resnet50", "densenet121", "senet18")
DECODER = "decoder"
LARGE = 96  # pixels of the shorter side, from which networks are those for 224 x 224


def _net(name: str, outputs: int, size: tuple[int, ...], precision: str) -> Any:
    large, dtype = min(size, default=0) >= LARGE, jnp.bfloat16 if precision == "bfloat16" else None
    if name in STEMMED:
        return MAKERS[name](outputs, stem="large" if large else "small", dtype=dtype)
    if name != "vit-tiny":
        return MAKERS[name](outputs, dtype=dtype)
    patch = 16 if large else 4
    fits = all(side % patch == 0 for side in size)
    require(fits, f"vit-tiny cuts images of {' x '.join(map(str, size))} into patches of {patch}, which does not divide them")
    return nets.vit_tiny(outputs, patch, dtype=dtype)


@functools.lru_cache
def model(name: str, outputs: int, size: tuple[int, ...] = (32, 32), precision: str = "float32") -> Model:
    """The network for images of that size (height, width). BadInput where ViT's patches do not fit."""
    return models.from_linen(_net(name, outputs, size, precision))


@functools.lru_cache
def features(name: str, outputs: int, size: tuple[int, ...]) -> Callable[[Weights, Array], Array]:
    """What the last layer of that network is given."""
    return models.penultimate(_net(name, outputs, size, "float32"))


@functools.lru_cache
def augmentation(name: str) -> Augment | None:
    parts = {"none": (), "crop-flip": (augment.crop(4), augment.flip())}
    parts["crop-flip-rotation"] = (*parts["crop-flip"], augment.rotation(15))
    parts["resized-crop-flip-jitter"] = (augment.resized_crop(), augment.flip(), augment.jitter(0.4, 0.4, 0.4))
    return augment.compose(*parts[name]) if parts[name] else None


Trainer = TypeVar("Trainer", bound=Train | Sisa)


def settled(config: Trainer) -> Trainer:
    """With an optimizer, a learning rate and a weight decay: as asked, or as the SoK has them on CIFAR-10.

    The decoder is small and trained from nothing: AdamW, at a rate above the SoK's.
    """
    decoder = config.model == DECODER
    name = config.optimizer or ("adamw" if decoder else "sgd")
    lr, decay = {"sgd": (0.1, 5e-4), "adamw": (1e-3 if decoder else 3e-4, 0.05)}[name]
    lr, decay = lr if config.lr is None else config.lr, decay if config.weight_decay is None else config.weight_decay
    return dataclasses.replace(config, optimizer=name, lr=lr, weight_decay=decay)


def optimiser(config: Train | Sisa, schedule: str, steps: int = 1) -> optax.GradientTransformation:
    """The transform of a configuration, `settled` or not."""
    known = settled(config)
    lr, decay = known.lr or 0.0, known.weight_decay or 0.0
    return training.usual(known.optimizer or "", schedule, lr, config.momentum, decay, steps)


@functools.lru_cache
def method(recipe: Callable[..., Any], net: Model, transform: optax.GradientTransformation, **how: Any) -> Any:
    """`recipe(net, transform, **how)`, the same object for the same arguments."""
    return recipe(net, transform, **how)
