"""How much comes back: the recovery attack in a ball of weights."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dememo_jax import callbacks, evaluate, keys, loop, losses, models, projected, train, tree
from dememo_jax import data as sets
from dememo_jax.audit.lanes import each, usual_lanes
from dememo_jax.errors import NonFinite, require
from dememo_jax.types import Array, Dataset, Key, Loss, Method, Model, Params, Weights

NONE = -1  # the count of right answers of a network that does not answer in numbers


@dataclass(frozen=True)
class Recovery:
    """What an attack with a given radius brought back. Entry 0 of each curve is the model before the attack."""

    radius: float  # l2 length over the params that may move
    shape: str  # "ball" or "sphere"
    statistics: str  # batch-norm statistics while attacking: "frozen" or "fit"
    hints: int  # how many examples the attacker had
    accuracy: tuple[float, ...]  # on the evaluation set, after every epoch
    distance: tuple[float, ...]  # l2 distance of the weights from where they started, after every epoch
    relative: float | None = None  # the radius as a share of the length of those params, where it was given so
    only: str | None = None  # the regular expression of the params that may move; None: all


@functools.lru_cache(maxsize=32)
def attack(
    model: Model, tx: optax.GradientTransformation, *, shape: str = "ball", statistics: str = "frozen", only: str | None = None,
    loss: Loss = losses.cross_entropy,
) -> Method:  # fmt: skip
    """Descent on hint data, projected after every step onto the l2 ball (or sphere) around the attacked weights.

    init(weights, radius); one radius in the state serves a sweep in one compiled program. Weights stored in half precision
    are attacked in float32. The ball spans all params, or
    those whose names match the regular expression `only`, and the others stay. The published code rescales onto the sphere
    and lets batch-norm statistics run: `shape="sphere", statistics="fit"`. The same arguments give the same Method, so that a
    sweep compiles once. loss: what the attacker descends, `losses.label_nll` for a language model's answers.
    """
    require(shape in ("ball", "sphere"), f"shape must be 'ball' or 'sphere', got {shape!r}")
    require(statistics in ("frozen", "fit"), f"statistics must be 'frozen' or 'fit', got {statistics!r}")
    project = tree.project_ball if shape == "ball" else tree.project_sphere
    held = projected.within(train.sgd(model, tx, loss=loss, mode=statistics), project, only=only)

    def init(weights: Weights, radius: float | Array):
        return held.init(train.start(tx, weights._replace(params=tree.widened(weights.params))), radius)

    return Method(init, held.step)


def absolute_radius(params: Params, share: float, only: str | None = None) -> float:
    """`share` of the l2 length of the params (of those that `only` matches). BadInput when that is 0."""
    leaves = [leaf for leaf, free in zip(jax.tree.leaves(params), tree.matching(params, only)) if free]
    length = float(tree.norm(leaves))
    require(share > 0, f"the radius must be positive, got {share} of the weights' length")
    require(length > 0, "the weights are all zero: a radius relative to their length would be 0; give an absolute one")
    return share * length


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
    schedule: str = "constant",
    shape: str = "ball",
    statistics: str = "frozen",
    relative: bool = False,
    only: str | None = None,
    loss: Loss = losses.cross_entropy,
    after: Callable[[int, float], None] | None = None,
) -> Recovery:
    """Attack `weights` with the examples of `data` where `hints` [N], and follow the accuracy on `evaluation`.

    Defaults are the SoK's Table 7 for CIFAR-10: 60 epochs of SGD 0.01, momentum 0.9, weight decay 5e-4; the gradient
    is clipped at norm 5 as in the published code. The rate stays at 0.01, which makes the stronger attack: on a small problem
    (sphere, radius 2, 10 epochs) it reached 1.00 where the published code, whose rate falls by a cosine to 0 after every epoch
    (`schedule="cosine"`), ended at 0.61. A schedule is of the default optimiser: give none with `tx`.

    The radius is an absolute l2 length over all params, or over those that `only` matches, or with `relative` a share of
    their length. Evaluation data are never attacked with unless they are passed as `data`; the published code does so by
    default. `after(epoch, accuracy)` reports progress.
    Raises BadInput for a radius that is not positive or no hints, NonFinite when the attack's loss, or what the attacked
    network answers, is no number.
    """

    def told(epoch: int, accuracy: np.ndarray) -> Any:
        return None if after is None else after(epoch, float(accuracy[0]))

    found, _ = sweep(
        model, [weights], data, evaluation, key, radii=[radius], hints=hints, epochs=epochs, batch=batch, tx=tx,
        schedule=schedule, shape=shape, statistics=statistics, relative=relative, only=only, loss=loss, after=told,
    )  # fmt: skip
    return found[0][0]


def sweep(
    model: Model,
    attacked: Sequence[Weights],
    data: Dataset,
    evaluation: Dataset,
    key: Key,
    *,
    radii: Sequence[float],
    hints: Array | None = None,
    epochs: int = 60,
    batch: int = 128,
    tx: optax.GradientTransformation | None = None,
    schedule: str = "constant",
    shape: str = "ball",
    statistics: str = "frozen",
    relative: bool = False,
    only: str | None = None,
    loss: Loss = losses.cross_entropy,
    width: int | None = None,
    over: jax.sharding.Mesh | None = None,
    after: Callable[[int, np.ndarray], None] | None = None,
) -> tuple[list[list[Recovery]], list[list[Weights]]]:
    """Several models at several radii in one program: `recover` of each, and the weights where each attack ended.

    Both results are [models][radii]. All attacks see the same batches. width: how many go into one vmap; by default all
    of them, except for convolutions on CPU, which are faster one after another. `after(epoch, accuracies [models * radii])`
    reports progress. Other arguments, and what is refused, as `recover`.
    """
    held = _checked(attacked, radii, data, evaluation, hints, epochs, batch)
    count = int(held.sum())
    per_pass = sets.steps(count, batch, 1)
    require(tx is None or schedule == "constant", "a schedule is of the default optimiser: give tx or schedule, not both")
    tx = default_tx(schedule=schedule, epochs=epochs, per_epoch=per_pass) if tx is None else tx
    method = attack(model, tx, shape=shape, statistics=statistics, only=only, loss=loss)
    lanes = [(weights, radius) for weights in attacked for radius in radii]
    lengths = [absolute_radius(weights.params, radius, only) if relative else float(radius) for weights, radius in lanes]
    names = [f"model {lane // len(radii)} at radius {length:g}" for lane, length in enumerate(lengths)]
    state = _starts(method, [weights for weights, _ in lanes], lengths, 1 if over is None else over.size)
    run = functools.partial(each, over=over, width=usual_lanes(attacked[0].params, len(lanes)) if width is None else width)
    step = functools.partial(_epoch, method=method, model=model, batch=batch, per_pass=per_pass)
    right = np.asarray(run(functools.partial(_right, model=model), evaluation, state.inner.weights))[: len(lanes)]
    accuracy, distance = [right / len(evaluation.y)], [np.zeros(len(lanes))]
    for epoch in range(epochs):
        shared = (keys.named(key, "recovery"), data, held, evaluation, epoch)
        state, right, gone, lost = run(step, shared, state)
        lost, right = np.asarray(lost)[: len(lanes)], np.asarray(right)[: len(lanes)]
        _check_epoch(epoch, lost, right, names)
        accuracy.append(right / len(evaluation.y))
        distance.append(np.asarray(gone)[: len(lanes)])
        if after is not None:
            callbacks.reports(after(epoch + 1, accuracy[-1]))
    if (broken := accuracy[0] < 0).any():
        raise NonFinite(f"model {int(np.argmax(broken)) // len(radii)} answers with NaN or infinity before any attack")
    curves = zip(lanes, lengths, np.transpose(accuracy).tolist(), np.transpose(distance).tolist())
    found = [
        Recovery(length, shape, statistics, count, tuple(a), tuple(d), radius if relative else None, only)
        for (_, radius), length, a, d in curves
    ]
    ends = [jax.tree.map(lambda leaf, i=i: leaf[i], state.inner.weights) for i in range(len(lanes))]
    return _by_model(found, len(radii)), _by_model(ends, len(radii))


def _by_model(values: list, radii: int) -> list[list]:
    return [values[i : i + radii] for i in range(0, len(values), radii)]


def _starts(method: Method, attacked: Sequence[Weights], radii: Sequence[float], devices: int) -> Any:
    """The states of all attacks, stacked; the last again until every device has as many."""
    starts = [method.init(weights, radius) for weights, radius in zip(attacked, radii)]
    starts += starts[-1:] * (-len(starts) % devices)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)


def _check_epoch(epoch: int, lost: np.ndarray, right: np.ndarray, where: list[str]) -> None:
    """NonFinite naming the first attack whose loss or answers are no numbers after this epoch."""
    for what, bad in (("loss", ~np.isfinite(lost)), ("network's answer", right == NONE)):
        if bad.any():
            worst = int(np.argmax(bad))
            became = lost[worst] if what == "loss" else "NaN or infinite"
            raise NonFinite(
                f"the {what} of the attack on {where[worst]} became {became} in epoch {epoch}; lower the learning rate"
            )


def _checked(attacked, radii, data: Dataset, evaluation: Dataset, hints, epochs: int, batch: int) -> Array:
    """The hints as a mask, or BadInput for what cannot be attacked."""
    require(len(evaluation.y), "there are no examples to measure recovery on")
    for radius in radii:
        require(0 < radius < float("inf"), f"the radius must be positive and finite, got {radius}")
    require(len(radii) and len(attacked), "a recovery attack needs at least one model and one radius")
    require(epochs >= 1 and batch >= 1, f"need at least one epoch and one example a batch, got {epochs} and {batch}")
    return hint_mask(hints, len(data.y))


def hint_mask(hints, count: int) -> Array:
    """Which examples an attacker holds, bool [N], all of them for None; BadInput when there are none."""
    held = jnp.ones(count, bool) if hints is None else jnp.asarray(hints, bool)
    require(held.shape == (count,), f"hints must be a mask [{count}], got {held.shape}")
    require(held.any(), "the attack needs at least one hint example")
    return held


def _epoch(shared, state, *, method, model, batch, per_pass):
    key, data, hints, evaluation, epoch = shared
    state, info = loop.passes(method, key, state, data, passes=1, batch=batch, per_pass=per_pass, start=epoch, mask=hints)
    return state, _right(evaluation, state.inner.weights, model=model), info["distance"][-1, -1], info["loss"].mean()


def _right(evaluation, weights, *, model):
    # A count, since whole numbers do not depend on how a program is compiled; their share is taken on the host. A network
    # that names no class somewhere has none: it would look like one that forgot.
    logits = evaluate.logits(*models.freeze(model, weights), evaluation.x)
    return jnp.where(evaluate.answers(logits).all(), losses.correct(logits, evaluation.y).sum(), NONE)


SCHEDULES = ("constant", "cosine")


@functools.lru_cache(maxsize=64)
def default_tx(
    rate: float = 0.01, decay: float = 5e-4, *, schedule: str = "constant", epochs: int = 1, per_epoch: int = 1
) -> optax.GradientTransformation:
    """The attacker's optimiser: SGD with momentum 0.9, weight decay, the gradient clipped at norm 5.

    schedule: "constant", the stronger attack; "cosine", as the published code steps PyTorch's CosineAnnealingLR after every
    epoch: `rate (1 + cos(pi e / epochs)) / 2` in all `per_epoch` steps of epoch e = 0, 1, ... The same arguments give the
    same object. Raises BadInput for another schedule.
    """
    require(schedule in SCHEDULES, f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if schedule == "constant":
        return train.clipped_sgd(rate, 0.9, decay)

    def falling(step):
        return rate * (1 + jnp.cos(jnp.pi * jnp.minimum(step // per_epoch, epochs) / epochs)) / 2

    return optax.chain(optax.clip_by_global_norm(5.0), optax.add_decayed_weights(decay), optax.sgd(falling, 0.9))
