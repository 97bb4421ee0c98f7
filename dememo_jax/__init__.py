"""Model dememorization in JAX: protect data, unlearn it, audit the forgetting and certify its depth."""

import importlib
from typing import Any

from dememo_jax import (
    adapters,
    audit,
    augment,
    bounds,
    certify,
    convolution,
    curvature,
    data,
    errors,
    evaluate,
    keys,
    likelihood,
    loop,
    losses,
    mesh,
    models,
    montecarlo,
    nets,
    projected,
    protect,
    sharpness,
    train,
    tree,
    types,
    unlearn,
)

__version__ = "0.1.0"

_DOORS = ("cells", "checkpoint", "release", "report", "sources")  # disk, clock and network: opened when first named


def __getattr__(name: str) -> Any:
    if name in _DOORS:
        return importlib.import_module(f"dememo_jax.{name}")
    raise AttributeError(f"module 'dememo_jax' has no attribute {name!r}")


__all__ = [
    "adapters",
    "audit",
    "augment",
    "bounds",
    "certify",
    "convolution",
    "curvature",
    "data",
    "errors",
    "evaluate",
    "keys",
    "likelihood",
    "loop",
    "losses",
    "mesh",
    "models",
    "montecarlo",
    "nets",
    "projected",
    "protect",
    "sharpness",
    "train",
    "tree",
    "types",
    "unlearn",
    *_DOORS,
]
