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


def recalibrated(model: Model, weights: Weights, x: Array) -> tuple[Apply, Params, Callable[[Params], Weights]]:
    """`(apply, params, prepare)` of a network whose batch-norm statistics are those of the fixed images x [B, ...].

    `apply(prepare(params), images)` first passes x through the network with the params in question, in training mode,
    and normalises with the means and variances found there: a fixed function of the params, whose noisy versions do not
    suffer from statistics that belong to other weights. Works for running averages `m * old + (1 - m) * new`; statistics
    of another kind stay as they are, and so do all in a network without batch norm.
    """
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(weights.stats)]

    def passed(params, fill, images):
        leaves, treedef = jax.tree.flatten(weights.stats)
        start = [jnp.full_like(leaf, fill) if f else leaf for leaf, f in zip(leaves, floating)]
        return model.fit(Weights(params, jax.tree.unflatten(treedef, start)), images, jax.random.key(0))[1].stats

    zeros, ones = (passed(weights.params, fill, x) for fill in (0.0, 1.0))
    pairs = zip(floating, jax.tree.leaves(zeros), jax.tree.leaves(ones))
    kept = [float(jnp.mean(one - zero)) if f else 1.0 for f, zero, one in pairs]  # the momentum m; 1 where nothing is averaged

    def prepare(images, params):
        found = jax.tree.leaves(passed(params, 0.0, images))
        old, treedef = jax.tree.flatten(weights.stats)
        fresh = [leaf if m >= 1 - 1e-6 else new / (1 - m) for leaf, new, m in zip(old, found, kept)]
        return Weights(params, jax.tree.unflatten(treedef, fresh))

    return model.apply, weights.params, Partial(prepare, x)


@functools.lru_cache(maxsize=256)
def _with_stats(apply: Callable[[Weights, Array], Array]) -> Callable:
    # One function object a model, so that jit recognises the next network of the same architecture.
    return lambda stats, params, x: apply(Weights(params, stats), x)


def as_apply(apply: Callable[..., Any]) -> Partial:
    """Any `(params, x) -> logits` in the form that passes through jit as an argument."""
    require(callable(apply), f"expected a function (params, x) -> logits, got {type(apply).__name__}")
    return apply if isinstance(apply, Partial) else Partial(apply)
