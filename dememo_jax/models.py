"""Adapters from Linen, NNX and bare functions to `Model`, and `freeze`, which hands a trained network to the rest.

Certificates and audits take `Apply` and `Params`. What `freeze` returns is a `jax.tree_util.Partial`: batch-norm
statistics travel as arguments of compiled functions, and networks of one architecture share one compiled program.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial

from dememo_jax.errors import require
from dememo_jax.types import Apply, Array, Key, Model, Params, Weights


def from_linen(module: Any, *, training: Mapping | None = None, evaluation: Mapping | None = None) -> Model:
    """A `flax.linen.Module` as a Model; collections other than `params` become `stats`.

    `training` and `evaluation` are the keyword arguments of `__call__` in the two modes; when neither is given, a
    boolean argument `train` is looked for and set. Training mode gets a `dropout` key.
    """
    if training is None and evaluation is None:
        switch = "train" in inspect.signature(type(module).__call__).parameters
        training, evaluation = ({"train": True}, {"train": False}) if switch else ({}, {})
    training, evaluation = dict(training or {}), dict(evaluation or {})

    def init(key: Key, x: Array) -> Weights:
        stats = dict(module.init({"params": key, "dropout": key}, x, **evaluation))
        return Weights(stats.pop("params"), stats)

    def apply(weights: Weights, x: Array) -> Array:
        return module.apply({"params": weights.params, **weights.stats}, x, **evaluation)

    def fit(weights: Weights, x: Array, key: Key) -> tuple[Array, Weights]:
        logits, stats = module.apply(
            {"params": weights.params, **weights.stats}, x, **training, mutable=list(weights.stats), rngs={"dropout": key}
        )
        return logits, weights._replace(stats=stats)

    return Model(init, apply, fit)


def from_nnx(make: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """A Model from a function that builds an NNX module: `from_nnx(lambda rngs: MyNet(10, rngs=rngs))`.

    Variables of type `nnx.Param` are params, everything else (batch statistics, dropout keys) is stats.
    """

    def split(module):
        graph, params, stats = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
        return graph, Weights(nnx.to_pure_dict(params), nnx.to_pure_dict(stats))

    graph = split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]

    def join(weights):
        params, stats = jax.tree.map(jnp.asarray, tuple(weights))  # NNX writes into NumPy arrays in place
        return nnx.merge(graph, nnx.State(params), nnx.State(stats))

    def init(key: Key, x: Array) -> Weights:
        return split(make(nnx.Rngs(key)))[1]

    def apply(weights: Weights, x: Array) -> Array:
        module = join(weights)
        module.eval()
        return module(x)

    def fit(weights: Weights, x: Array, key: Key) -> tuple[Array, Weights]:
        module = join(weights)
        module.train()
        nnx.reseed(module, default=key)
        logits = module(x)
        return logits, weights._replace(stats=split(module)[1].stats)

    return Model(init, apply, fit)


def from_apply(init: Callable[[Key, Array], Params], apply: Apply) -> Model:
    """A Model from two functions, for networks without modes and running statistics."""
    return Model(
        init=lambda key, x: Weights(init(key, x), ()),
        apply=lambda weights, x: apply(weights.params, x),
        fit=lambda weights, x, key: (apply(weights.params, x), weights),
    )


def freeze(model: Model, weights: Weights) -> tuple[Apply, Params]:
    """`(apply, params)` of a trained network in evaluation mode, its statistics bound."""
    return Partial(_with_stats(model.apply), weights.stats), weights.params


@functools.lru_cache(maxsize=256)
def _with_stats(apply: Callable[[Weights, Array], Array]) -> Callable:
    # One function object a model, so that jit recognises the next network of the same architecture.
    return lambda stats, params, x: apply(Weights(params, stats), x)


def as_apply(apply: Apply) -> Partial:
    """Any `(params, x) -> logits` in the form that passes through jit as an argument."""
    require(callable(apply), f"expected a function (params, x) -> logits, got {type(apply).__name__}")
    return apply if isinstance(apply, Partial) else Partial(apply)
