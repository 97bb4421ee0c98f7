"""How much comes back: the recovery attack in a ball of weights."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import optax

from dememo_jax import data as sets
from dememo_jax import evaluate, keys, loop, models, projected, train, tree
from dememo_jax.errors import require
from dememo_jax.types import Array, Dataset, Key, Method, Model, Weights


@dataclass(frozen=True)
class Recovery:
    """What an attack with a given radius brought back. Entry 0 of each curve is the model before the attack."""

    radius: float
    shape: str  # "ball" or "sphere"
    statistics: str  # batch-norm statistics while attacking: "frozen" or "fit"
    hints: int  # how many examples the attacker had
    accuracy: tuple[float, ...]  # on the evaluation set, after every epoch
    distance: tuple[float, ...]  # l2 distance of the weights from where they started, after every epoch


@functools.lru_cache(maxsize=32)
def attack(model: Model, tx: optax.GradientTransformation, *, shape: str = "ball", statistics: str = "frozen") -> Method:
    """Descent on hint data, projected after every step onto the l2 ball (or sphere) around the attacked weights.

    init(weights, radius); one radius in the state serves a sweep in one compiled program. The ball spans all params.
    The published code rescales onto the sphere and lets batch-norm statistics run: `shape="sphere",
    statistics="fit"`. The same arguments give the same Method, so that a sweep compiles once.
    """
    require(shape in ("ball", "sphere"), f"shape must be 'ball' or 'sphere', got {shape!r}")
    require(statistics in ("frozen", "fit"), f"statistics must be 'frozen' or 'fit', got {statistics!r}")
    project = tree.project_ball if shape == "ball" else tree.project_sphere
    held = projected.within(train.sgd(model, tx, mode=statistics), project)
    return Method(lambda weights, radius: held.init(train.start(tx, weights), radius), held.step)


def recover(
    model: Model,
    weights: Weights,
    data: Dataset,
    evaluation: Dataset,
    key: Key,
    *,
    radius: float,
    hints: Array | None = None,
    epochs: int = 60,
    batch: int = 128,
    tx: optax.GradientTransformation | None = None,
    shape: str = "ball",
    statistics: str = "frozen",
    after: Callable[[int, float], None] | None = None,
) -> Recovery:
    """Attack `weights` with the examples of `data` where `hints` [N], and follow the accuracy on `evaluation`.

    Defaults are the SoK's Table 7 for CIFAR-10: 60 epochs of SGD 0.01, momentum 0.9, weight decay 5e-4; the gradient
    is clipped at norm 5 as in the published code. The radius is an absolute l2 length over all params. Evaluation data
    are never attacked with unless they are passed as hints. `after(epoch, accuracy)` reports progress.
    Raises BadInput for a radius that is not positive or no hints.
    """
    require(radius > 0, f"the radius must be positive, got {radius}")
    held = jnp.ones(len(data.y), bool) if hints is None else jnp.asarray(hints, bool)
    require(held.any(), "the recovery attack needs at least one hint example")
    method = attack(model, default_tx() if tx is None else tx, shape=shape, statistics=statistics)

    def measure(current: Weights) -> float:
        return float(evaluate.accuracy(*models.freeze(model, current), evaluation))

    accuracy, distance = [measure(weights)], [0.0]

    def record(done, state, info):
        accuracy.append(measure(state.inner.weights))
        distance.append(float(info["distance"][-1]))
        if after is not None:
            after(len(accuracy) - 1, accuracy[-1])

    each = sets.steps(int(held.sum()), batch, 1)
    start = method.init(weights, radius)
    loop.run(
        method, keys.named(key, "recovery"), start, data, steps=each * epochs, every=each, after=record, batch=batch, mask=held
    )
    return Recovery(radius, shape, statistics, int(held.sum()), tuple(accuracy), tuple(distance))


def default_tx(rate: float = 0.01, decay: float = 5e-4) -> optax.GradientTransformation:
    """The published attacker's optimiser."""
    return train.clipped_sgd(rate, 0.9, decay)
