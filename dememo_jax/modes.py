"""The two modes of a module: which arguments of `__call__` switch them, and whether anything follows the switch.

Batch norm that never updates and dropout that never acts give a network that trains, badly, without an error. What can be
seen while a program is traced is therefore looked at there; nothing is computed for it.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from dememo_jax.errors import require

ON = ("train", "training", "is_training")  # True while training
OFF = ("deterministic", "use_running_average")  # False while training
NAMED = (
    "name the arguments of __call__ in both modes, such as training={'fit': True}, evaluation={'fit': False} "
    f"(found without: {', '.join(ON + OFF)})"
)
FOLLOWED = f"layers must follow module.train() and module.eval(), or an argument of __call__ ({', '.join(ON + OFF)})"


def switches(module: Any, how: str = NAMED) -> tuple[dict[str, bool], dict[str, bool]]:
    """The keyword arguments of `module.__call__` in training and in evaluation mode: every known switch that it has.

    how: what the caller can do about arguments that are not known, for the error.

    Raises:
        BadInput: When `__call__` needs arguments beside the batch that are no known switch.
    """
    parameters = list(inspect.signature(type(module).__call__).parameters.values())[2:]  # without self and the batch
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    unknown = [name for name in needed if name not in ON + OFF]
    require(not unknown, f"{type(module).__name__}.__call__ needs {', '.join(unknown)} beside the batch: {how}")
    known = [p.name for p in parameters if p.name in ON + OFF]
    return {name: name in ON for name in known}, {name: name in OFF for name in known}


class Observed:
    """What the layers of one call did: for each kind that has modes, whether it was in training mode, by its path."""

    def __init__(self) -> None:
        self.dropout: dict[str, bool] = {}
        self.norm: dict[str, bool] = {}


@contextmanager
def observed() -> Iterator[Observed]:
    """Watch the Linen layers that are called inside: batch norm, and whatever has a share to drop."""
    seen = Observed()

    def look(call, arguments, keywords, context):
        module = context.module
        if context.method_name == "__call__":
            path = "/".join(module.path) or type(module).__name__
            if isinstance(module, nn.BatchNorm):
                seen.norm[path] = not _setting(module, "use_running_average", arguments, keywords)
            elif _share(module) > 0:
                seen.dropout[path] = not _setting(module, "deterministic", arguments, keywords)
        return call(*arguments, **keywords)

    with nn.intercept_methods(look):
        yield seen


def _share(module: nn.Module) -> float:
    """What share of its input a layer drops."""
    attention = isinstance(module, nn.MultiHeadDotProductAttention)
    return module.rate if isinstance(module, nn.Dropout) else module.dropout_rate if attention else 0.0


def _setting(module: nn.Module, name: str, arguments: tuple, keywords: dict) -> Any:
    """A flag that a layer takes as a field or in its call."""
    own = getattr(module, name)
    if own is not None:
        return own
    given = inspect.signature(type(module).__call__).bind(module, *arguments, **keywords).arguments
    return given.get(name)


def check_evaluation(module: Any, seen: Observed) -> None:
    """BadInput when a layer is in training mode while the network is evaluated."""
    busy = [name for found in (seen.dropout, seen.norm) for name, trains in found.items() if trains]
    require(not busy, f"{type(module).__name__}: {', '.join(busy)} trains while the network is evaluated: {NAMED}")


def check_training(module: Any, seen: Observed, before: Any, after: Any) -> None:
    """BadInput when no dropout acts in training mode, or no batch statistic moves.

    before, after: the statistics that a call was given and gave back, arrays or tracers.
    """
    name, idle = type(module).__name__, ", ".join(seen.dropout)
    require(not idle or any(seen.dropout.values()), f"{name}: dropout ({idle}) does not act in training mode: {NAMED}")
    check_moves(name, before, after, NAMED)


def check_moves(name: str, before: Any, after: Any, how: str) -> None:
    """BadInput when there are batch statistics and a call in training mode gave all of them back as they were."""
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after)))
    still = pairs and all(new is old for old, new in pairs)
    require(not still, f"{name}: its batch statistics do not move in training mode: {how}")


def fitted_nnx(module: nnx.Module, x: Any, training: dict[str, bool]) -> Any:
    """`module(x)` in training mode; BadInput when no dropout acts or no batch statistic moves."""
    name, before, draws = type(module).__name__, _state(module, nnx.BatchStat), _state(module, nnx.RngCount)
    logits = module(x, **training)
    check_moves(name, before, _state(module, nnx.BatchStat), FOLLOWED)
    own = [part for _, part in nnx.iter_modules(module) if isinstance(part, nnx.Dropout) and part.rate > 0 and part.rngs]
    still = all(new is old for old, new in zip(draws, _state(module, nnx.RngCount)))
    require(not own or not still, f"{name}: dropout does not act in training mode: {FOLLOWED}")
    return logits


def _state(module: nnx.Module, kind: type) -> list:
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, kind)))
