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
from flax import linen as nn
from flax import nnx
from jax.extend.core import Var
from jax.tree_util import Partial

from dememo_jax import tree
from dememo_jax.errors import require
from dememo_jax.types import Apply, Array, Key, Model, Params, Weights


def from_linen(module: Any, *, training: Mapping | None = None, evaluation: Mapping | None = None) -> Model:
    """A `flax.linen.Module` as a Model; collections other than `params` become `stats`.

    `training` and `evaluation` are the keyword arguments of `__call__` in the two modes; when neither is given, a
    boolean argument `train` is looked for and set. Training mode gets a `dropout` key.
    """
    if training is None and evaluation is None:
        training, evaluation = _modes(module)
    training, evaluation = dict(training or {}), dict(evaluation or {})

    @jax.jit  # operation by operation a first call takes seconds
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


def _modes(module: Any) -> tuple[dict, dict]:
    switch = "train" in inspect.signature(type(module).__call__).parameters
    return ({"train": True}, {"train": False}) if switch else ({}, {})


def penultimate(module: Any, *, evaluation: Mapping | None = None) -> Callable[[Weights, Array], Array]:
    """`features(weights, x [B, ...]) -> [B, F]`: what the last `nn.Dense` of a Linen module is given, in evaluation mode.

    BadInput, when called, for a module without one; networks of other kinds bring a function of their own.
    """
    how = dict(_modes(module)[1] if evaluation is None else evaluation)

    def features(weights: Weights, x: Array) -> Array:
        given: list[Array] = []

        def listen(call, arguments, keywords, context):
            if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
                given.append(arguments[0])
            return call(*arguments, **keywords)

        with nn.intercept_methods(listen):
            module.apply({"params": weights.params, **weights.stats}, x, **how)
        require(given, f"{type(module).__name__} has no nn.Dense whose input could be its features; write features(weights, x)")
        return given[-1].reshape(len(x), -1)

    return features


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


def layers(apply: Callable[[Any, Array], Array], params: Params, x: Array) -> list[list[str]]:
    """The names of the parameters, layer by layer, in the order in which `apply(params, x)` comes to use them.

    Parameters of one parent (`Dense_0/kernel`, `Dense_0/bias`) stand together; a parent with vectors alone, such as batch
    norm, belongs to the layer before it. The order is that of the traced program, so it holds for networks of any kind.
    """
    names = tree.names(params)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, x))
    program = jax.make_jaxpr(apply)(*shapes).jaxpr
    order: list[int] = []
    _uses(program, dict(zip(program.invars, range(len(names)))), order)
    parents = [name.rpartition("/")[0] or name for name in names]
    found: list[list[str]] = []
    ranks = [leaf.ndim for leaf in jax.tree.leaves(params)]
    for parent in dict.fromkeys(parents[i] for i in order):
        members = [i for i, one in enumerate(parents) if one == parent]
        group = [names[i] for i in members]
        if found and max(ranks[i] for i in members) < 2:
            found[-1] += group
        else:
            found.append(group)
    return found


def _uses(program: Any, known: dict[Any, int], order: list[int]) -> None:
    """Append the numbers of the known variables as the program computes with them, inner programs included."""
    for equation in program.eqns:
        given = [known.get(v) if isinstance(v, Var) else None for v in equation.invars]
        inner = [getattr(p, "jaxpr", p) for p in equation.params.values() if hasattr(getattr(p, "jaxpr", p), "eqns")]
        if len(inner) == 1 and len(inner[0].invars) == len(given):
            _uses(inner[0], {v: n for v, n in zip(inner[0].invars, given) if n is not None}, order)
        elif equation.primitive.name in ("convert_element_type", "copy") and given[0] is not None:
            known[equation.outvars[0]] = given[0]  # a parameter in another type is still that parameter
        else:
            order += [n for n in given if n is not None]


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
    kept = _momenta(model, weights, x)
    return model.apply, weights.params, Partial(_fresh_stats(model.fit, kept), x, weights.stats)


def not_averaged(model: Model, weights: Weights, x: Array) -> list[str]:
    """The names of floating statistics that are no running averages of what training mode computes of a batch x [B, ...]."""
    kept, leaves = _momenta(model, weights, x), jax.tree.leaves(weights.stats)
    names = tree.names(weights.stats)
    return [n for n, m, leaf in zip(names, kept, leaves) if m >= 1 and jnp.issubdtype(leaf.dtype, jnp.floating)]


def _momenta(model: Model, weights: Weights, x: Array) -> tuple[float, ...]:
    """The momentum m of every leaf of the statistics, a round number; 1 where nothing is averaged."""
    all_of = (0.0,) * len(jax.tree.leaves(weights.stats))
    passed = [_stats_of(model.fit, weights.params, weights.stats, x, all_of, fill) for fill in (0.0, 1.0)]
    zeros, ones = map(jax.tree.leaves, passed)
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in zeros]
    return tuple(round(float(jnp.mean(b - a)), 6) if f else 1.0 for f, a, b in zip(floating, zeros, ones))


def _stats_of(fit, params: Params, stats: Params, x: Array, kept: tuple[float, ...], fill: float) -> Params:
    """Statistics after one pass over x in training mode, begun at `fill` where something is averaged."""
    leaves, treedef = jax.tree.flatten(stats)
    averaged = [m < 1 and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf, m in zip(leaves, kept)]
    begun = [jnp.full_like(leaf, fill) if a else leaf for leaf, a in zip(leaves, averaged)]
    return fit(Weights(params, jax.tree.unflatten(treedef, begun)), x, jax.random.key(0))[1].stats


@functools.lru_cache(maxsize=256)
def _fresh_stats(fit: Callable, kept: tuple[float, ...]) -> Callable:
    # One function object a model, so that jit recognises it; images and old statistics travel as arguments.
    def prepare(x: Array, stats: Params, params: Params) -> Weights:
        found = jax.tree.leaves(_stats_of(fit, params, stats, x, kept, 0.0))
        old, treedef = jax.tree.flatten(stats)
        fresh = [leaf if m >= 1 else new / (1 - m) for leaf, new, m in zip(old, found, kept)]
        return Weights(params, jax.tree.unflatten(treedef, fresh))

    return prepare


@functools.lru_cache(maxsize=256)
def _with_stats(apply: Callable[[Weights, Array], Array]) -> Callable:
    # One function object a model, so that jit recognises the next network of the same architecture.
    return lambda stats, params, x: apply(Weights(params, stats), x)


def as_apply(apply: Callable[..., Any]) -> Partial:
    """Any `(params, x) -> logits` in the form that passes through jit as an argument."""
    require(callable(apply), f"expected a function (params, x) -> logits, got {type(apply).__name__}")
    return apply if isinstance(apply, Partial) else Partial(apply)
