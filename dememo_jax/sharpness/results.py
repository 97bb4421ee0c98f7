"""What a measurement of Sharpness-Aware Learnability is, and how it was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measure:
    """How SAL was measured. Numbers of two measures are different quantities, and are never compared."""

    solver: str  # "ball", "normalized", "one_step", "hvp" or "diagonal"
    granularity: str  # "layer": one number a weight tensor; "parameter": one a scalar
    radius: float  # share of the l2 length of a tensor
    settings: tuple[tuple[str, float | int | str], ...]  # of the solver
    mode: str  # "evaluation": both losses in evaluation mode; "mixed": against a running training loss, as published
    on: str  # whose loss, in the caller's word: "train", "clean", "test"
    examples: int
    layers: tuple[str, ...]  # names, in the order in which the network uses them


@dataclass(frozen=True)
class Sal:
    """SAL of one model at one moment, keyed by the path of the tensor: a float each, or an array of the tensor's shape."""

    measure: Measure
    value: Mapping[str, float | np.ndarray]  # nats
    loss: float  # mean loss before any perturbation (the running training loss in mixed mode), nats
    accuracy: float  # on the examples measured
    sizes: Mapping[str, int]  # scalars in each tensor
    test_accuracy: float | None = None
    rise: Mapping[str, float] | None = None  # S_max, by ascent
    fall: Mapping[str, float] | None = None  # S_min, by descent
    radius_fraction: Mapping[str, float] | None = None  # how much of the radius the ascent used at its end
    fall_fraction: Mapping[str, float] | None = None  # and the descent
    error: Mapping[str, float | np.ndarray] | None = None  # standard errors, of solvers that sample
    stalled: tuple[str, ...] = ()  # whose ascent used less than half of the radius: a low value is then no flatness


def tracked(epochs: Sequence[Sal]) -> np.ndarray:
    """SAL of every layer over epochs, [L, T]: a layer's mean where each parameter has a number of its own."""
    return np.array([[float(np.mean(one.value[name])) for one in epochs] for name in epochs[0].measure.layers])


def from_plain(plain: Mapping) -> Sal:
    """The Sal that `dataclasses.asdict` and JSON made a plain dict of."""
    measure = dict(plain["measure"])
    measure |= {"settings": tuple((name, value) for name, value in measure["settings"]), "layers": tuple(measure["layers"])}
    found = {**plain, "measure": Measure(**measure), "stalled": tuple(plain["stalled"])}
    if measure["granularity"] == "parameter":
        for name in ("value", "error"):
            if found[name] is not None:
                found[name] = {path: np.asarray(values) for path, values in found[name].items()}
    return Sal(**found)
