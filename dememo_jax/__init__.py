"""Model dememorization in JAX: protect data, unlearn it, audit the forgetting and certify its depth."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dememo_jax import (
        adapters,
        arithmetic,
        audit,
        augment,
        bounds,
        cells,
        certify,
        checkpoint,
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
        noise,
        projected,
        protect,
        release,
        report,
        sharpness,
        sources,
        train,
        tree,
        types,
        unlearn,
    )

__version__ = "0.1.0"

__all__ = [
    "adapters",
    "arithmetic",
    "audit",
    "augment",
    "bounds",
    "cells",
    "certify",
    "checkpoint",
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
    "noise",
    "projected",
    "protect",
    "release",
    "report",
    "sharpness",
    "sources",
    "train",
    "tree",
    "types",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    """A module is imported when it is first named, so that `import dememo_jax` costs nothing and opens no door."""
    if name in __all__:
        return importlib.import_module(f"dememo_jax.{name}")
    raise AttributeError(f"module 'dememo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
