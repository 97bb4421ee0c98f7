"""Adapters from Linen, NNX and bare functions to `Model`, and `freeze`, which hands a trained network to the rest.

Certificates and audits take `Apply` and `Params`. What `freeze` returns is a `jax.tree_util.Partial`: batch-norm
statistics travel as arguments of compiled functions, and networks of one architecture share one compiled program.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax.extend.core import Var
from jax.tree_util import Partial

from dememo_jax import modes, tree
from dememo_jax.errors import require
from dememo_jax.types import Apply, Array, Key, Model, Params, Weights


def from_linen(module: Any, *, training: Mapping | None = None, evaluation: Mapping | None = None) -> Model:
    """A `flax.linen.Module` as a Model; collections other than `params` become `stats`.

    Training mode gets a `dropout` key.

    Args:
        module: The network, logits [B, K] of a batch [B, ...].
        training: The keyword arguments of `__call__` in training mode.
        evaluation: Those in evaluation mode. Where neither is given, the arguments `train`, `training`, `is_training`,
            `deterministic` and `use_running_average` are found and set.

    Raises:
        BadInput: For what is no Linen module, and for a `__call__` that needs other arguments than those. Unless the modes
            are given, `init` and `fit` refuse, while they are traced, a network whose modes do not differ as they must:
            dropout that acts in evaluation or in training does not, batch statistics that training does not move.

    Example:
        >>> model = models.from_linen(nets.cnn(10))
        >>> model = models.from_linen(MyNet(), training={"mode": "fit"}, evaluation={"mode": "eval"})
    """
    require(isinstance(module, nn.Module), f"expected an instance of flax.linen.Module, got {_what(module)}")
    found = training is None and evaluation is None
    if found:
        training, evaluation = modes.switches(module)
    training, evaluation = dict(training or {}), dict(evaluation or {})

    @jax.jit  # operation by operation a first call takes seconds
    def init(key: Key, x: Array) -> Weights:
        with modes.observed() as seen:
            stats = dict(module.init({"params": key, "dropout": key}, x, **evaluation))
        if found:
            modes.check_evaluation(module, seen)
        return Weights(stats.pop("params", {}), stats)

    def apply(weights: Weights, x: Array) -> Array:
        return module.apply({"params": weights.params, **weights.stats}, x, **evaluation)

    def fit(weights: Weights, x: Array, key: Key) -> tuple[Array, Weights]:
        with modes.observed() as seen:
            logits, stats = module.apply(
                {"params": weights.params, **weights.stats}, x, **training, mutable=list(weights.stats), rngs={"dropout": key}
            )
        if found:
            modes.check_training(module, seen, weights.stats.get("batch_stats"), stats.get("batch_stats"))
        return logits, weights._replace(stats=stats)

    return Model(init, apply, fit)


def _what(network: Any) -> str:
    return f"the class {network.__name__}" if isinstance(network, type) else type(network).__name__


def penultimate(module: Any, *, evaluation: Mapping | None = None) -> Callable[[Weights, Array], Array]:
    """`features(weights, x [B, ...]) -> [B, F]`: what the last `nn.Dense` of a Linen module is given, in evaluation mode.

    BadInput, when called, for a module without one; networks of other kinds bring a function of their own.
    """
    how = dict(modes.switches(module)[1] if evaluation is None else evaluation)

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


@overload
def from_nnx(network: nnx.Module) -> tuple[Model, Weights]: ...
@overload
def from_nnx(network: Callable[[nnx.Rngs], nnx.Module]) -> Model: ...


def from_nnx(network):
    """A Model from a function that builds an NNX module; of a module that is there already, the Model and its weights.

    Variables of type `nnx.Param` are params, everything else (batch statistics, dropout keys) is stats. Training mode is
    `module.train()`, evaluation mode `module.eval()`; the switches that `from_linen` knows are set where `__call__` has them.

    Args:
        network: `nnx.Rngs -> nnx.Module`, or a trained module. Of a module the Model cannot draw fresh weights: `init` raises
            BadInput, and with it whatever begins at random. Weights of a module also fit the Model of the function that
            built it.

    Returns:
        The Model; for a module, `(model, weights)`.

    Raises:
        BadInput: For anything else, and as `from_linen` for arguments of `__call__` and batch statistics that do not move.

    Example:
        >>> model = models.from_nnx(lambda rngs: MyNet(10, rngs=rngs))
        >>> model, weights = models.from_nnx(trained)
    """
    given = isinstance(network, nnx.Module)
    builds = callable(network) and not isinstance(network, nn.Module)
    require(given or builds, f"expected a function nnx.Rngs -> nnx.Module, or such a module, got {_what(network)}")

    def split(module):
        graph, params, stats = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
        return graph, Weights(nnx.to_pure_dict(params), nnx.to_pure_dict(stats))

    like = network if given else nnx.eval_shape(lambda: network(nnx.Rngs(0)))
    require(isinstance(like, nnx.Module), f"the function must build an nnx.Module, it gave {_what(like)}")
    training, evaluation = modes.switches(like, modes.FOLLOWED)
    name, (graph, weights) = _what(like), split(like)

    def join(weights):
        params, stats = jax.tree.map(jnp.asarray, tuple(weights))  # NNX writes into NumPy arrays in place
        return nnx.merge(graph, nnx.State(params), nnx.State(stats))

    def init(key: Key, x: Array) -> Weights:
        require(
            not given,
            f"this Model was made of a trained {name}, which has no way to fresh weights: "
            "give from_nnx the function that builds it, lambda rngs: ...",
        )
        return split(network(nnx.Rngs(key)))[1]

    def apply(weights: Weights, x: Array) -> Array:
        module = join(weights)
        module.eval()
        return module(x, **evaluation)

    def fit(weights: Weights, x: Array, key: Key) -> tuple[Array, Weights]:
        module = join(weights)
        module.train()
        nnx.reseed(module, default=key)
        logits = modes.fitted_nnx(module, x, training)
        return logits, weights._replace(stats=split(module)[1].stats)

    return (Model(init, apply, fit), weights) if given else Model(init, apply, fit)


def from_apply(
    init: Callable[[Key, Array], Params],
    apply: Callable[..., Array],
    *,
    fit: Callable[..., Any] | None = None,
    stats: Callable[[Key, Array], Any] | None = None,
) -> Model:
    """A Model from bare functions, for networks of any other library (Equinox, Haiku) or of none.

    Args:
        init: `init(key, x [B, ...]) -> params`, a nest of floating arrays and nothing else.
        apply: Evaluation mode, `apply(params, x) -> logits [B, K]`; with stats, `apply(params, stats, x)`.
        fit: Training mode, for dropout: `fit(params, x, key) -> logits`; with stats, `fit(params, stats, x, key) ->
            (logits, stats)`. Without it the network has one mode.
        stats: `stats(key, x)`: the running statistics to begin with, of arrays only; they get the key that `init` gets.

    Raises:
        BadInput: For stats without `fit`, which alone could move them; from `init`, for leaves that are no arrays (the
            activation functions of an Equinox module) or params that are not floating.

    Example:
        >>> net = hk.without_apply_rng(hk.transform(forward))
        >>> model = models.from_apply(net.init, net.apply)
    """
    require(stats is None or fit is not None, "stats without fit= would never move: give the training mode, fit=")

    def begin(key: Key, x: Array) -> Weights:
        weights = Weights(init(key, x), () if stats is None else stats(key, x))
        tree.check_arrays(weights.params, "params")
        tree.check_arrays(weights.stats, "stats")
        tree.check_floating(weights.params, "params")
        return weights

    def evaluated(weights: Weights, x: Array) -> Array:
        return apply(weights.params, x) if stats is None else apply(weights.params, _copied(weights.stats), x)

    def trained(weights: Weights, x: Array, key: Key) -> tuple[Array, Weights]:
        if fit is None:
            return apply(weights.params, x), weights
        if stats is None:
            return fit(weights.params, x, key), weights
        logits, new = fit(weights.params, _copied(weights.stats), x, key)
        return logits, weights._replace(stats=new)

    return Model(begin, evaluated, trained)


def _copied(stats: Params) -> Params:
    """The same arrays in a new tree: an Equinox State may be used once."""
    return jax.tree.map(lambda leaf: leaf, stats)


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
