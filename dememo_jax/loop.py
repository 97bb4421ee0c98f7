"""Drivers for one method: `scan` and `passes`, pure and vmappable; `run` and `stream`, which report, stop and can be resumed.

Step t of a run depends on `(key, t, state)` alone, so a run cut anywhere and resumed equals one that was not.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import callbacks, keys, tree
from dememo_jax import data as sets
from dememo_jax.callbacks import STOP
from dememo_jax.errors import NonFinite, require
from dememo_jax.types import Array, Dataset, Info, Key, Method, Perturbation

__all__ = ["STOP", "After", "Batches", "Draw", "passes", "run", "scan", "stream"]

Draw = Callable[..., Dataset]  # (key, step, data, batch, mask) -> batch
# steps done, state, info [steps since the last call] -> None, or STOP to end the run
After = Callable[[int, Any, dict[str, np.ndarray]], callbacks.Answer]
Batches = Callable[[int], Iterable[Dataset]]  # first step -> the batch of that step, of the next one, and so on


def scan(
    method: Method,
    key: Key,
    state: Any,
    data: Dataset,
    *,
    steps: int,
    batch: int | None = None,
    start: int | Array = 0,
    mask: Array | None = None,
    perturbation: Perturbation | None = None,
    draw: Draw = sets.shuffled,
) -> tuple[Any, Info]:
    """Steps `start .. start + steps` of a method; returns the state and each step's info, stacked [steps].

    Every step gets a batch that `draw` takes from the examples where `mask` [N], with `perturbation` joined. With
    `batch=None` it gets the whole set, for methods that draw their own batches.
    Outside jit, raises BadInput for a mask without examples, noise for a smaller set, or data that the method refuses, such as
    labels that the network has no outputs for.
    """
    _check(method, state, data, batch, mask, perturbation)
    to_draw, to_step = keys.named(key, "draw"), keys.named(key, "step")

    def body(current, t):
        examples = data if batch is None else draw(to_draw, t, data, batch, mask)
        return method.step(keys.at(to_step, t), current, sets.perturb(examples, perturbation))

    return jax.lax.scan(body, state, start + jnp.arange(steps))


def passes(
    method: Method, key: Key, state: Any, data: Dataset, *, passes: int, batch: int, per_pass: int, start: int | Array = 0,
    mask: Array | None = None, perturbation: Perturbation | None = None,
) -> tuple[Any, Info]:  # fmt: skip
    """Whole shuffled passes `start .. start + passes`; the steps of `scan`, but the examples are sorted once a pass.

    In a vmap over masks, `scan` sorts at every step. `per_pass` is ceil(count / batch), the same for every mask of a vmap.
    Returns the state and each step's info, stacked [passes, per_pass].
    """
    _check(method, state, data, batch, mask, perturbation)
    to_draw, to_step = keys.named(key, "draw"), keys.named(key, "step")
    mask = jnp.ones(len(data.y), bool) if mask is None else mask
    count = mask.sum()

    def once(current, number):
        order = sets.pass_order(to_draw, number, mask)

        def body(current, place):
            examples = sets.part_of_pass(order, place, data, batch, count)
            return method.step(keys.at(to_step, number * per_pass + place), current, sets.perturb(examples, perturbation))

        return jax.lax.scan(body, current, jnp.arange(per_pass))

    return jax.lax.scan(once, state, start + jnp.arange(passes))


_chunk = jax.jit(scan, static_argnames=("method", "steps", "batch", "draw"))
_passes = jax.jit(passes, static_argnames=("method", "passes", "batch", "per_pass"))


def _check(
    method: Method, state: Any, data: Dataset, batch: int | None, mask: Array | None, perturbation: Perturbation | None
) -> None:
    """BadInput for data, mask or perturbation that cannot serve; their values are not known, so not checked, under jit."""
    _check_data(method, state, data)
    require(batch is not None or mask is None, "a mask chooses what batches are drawn from; with batch=None there are none")
    if mask is not None and not isinstance(mask, jax.core.Tracer):
        require(np.asarray(mask).any(), "the mask selects no example to draw batches from")
    sets.check_covers(perturbation, data)
    if perturbation is not None:
        sets.check_unit(data)


def run(
    method: Method,
    key: Key,
    state: Any,
    data: Dataset,
    *,
    steps: int,
    every: int,
    after: After,
    batch: int | None = None,
    start: int = 0,
    mask: Array | None = None,
    perturbation: Perturbation | None = None,
    draw: Draw = sets.shuffled,
) -> Any:
    """The same steps in compiled chunks of `every`; after each, `after(steps_done, state, info)` may return `STOP`.

    Chunks lie on a fixed grid, so a run resumed from any chunk's state goes through the same programs to the same
    bits. Raises NonFinite, before `after` sees the state, when a reported quantity, or the state that a chunk leaves, is
    infinite or NaN; it keeps the state before that chunk. Raises BadInput when `after` returns anything but `STOP`, None
    or False.
    """
    _check_grid(steps, every, start)
    _check(method, state, data, batch, mask, perturbation)
    how = {"batch": batch, "mask": mask, "perturbation": perturbation}
    per_pass = 0  # where whole passes are asked for, the examples are sorted once a pass
    if batch is not None and draw is sets.shuffled:
        per_pass = sets.steps(len(data.y) if mask is None else int(np.asarray(mask).sum()), batch, 1)
    for begin in range(start, steps, every):
        count = min(every, steps - begin)
        before = state
        if per_pass and begin % per_pass == count % per_pass == 0:
            whole = {"passes": count // per_pass, "per_pass": per_pass, "start": jnp.asarray(begin // per_pass)}
            state, info = _passes(method, key, state, data, **whole, **how)
            host = {name: np.asarray(values).reshape(count, *values.shape[2:]) for name, values in info.items()}
        else:
            state, info = _chunk(method, key, state, data, steps=count, start=jnp.asarray(begin), draw=draw, **how)
            host = {name: np.asarray(values) for name, values in info.items()}
        _refuse_non_finite(host, begin, before, state, _labels(data) if begin * (batch or len(data.x)) < len(data.x) else None)
        if callbacks.stops(after(begin + count, state, host)):
            break
    return state


def stream(
    method: Method,
    key: Key,
    state: Any,
    batches: Batches,
    *,
    steps: int,
    every: int,
    after: After,
    start: int = 0,
    perturbation: Perturbation | None = None,
) -> Any:
    """The steps of `run` on batches from the host, one compiled step at a time; for data that does not fit on the device.

    `batches(start)` gives the batches from step `start` on, x uint8 or float in [0, 1] (bytes become floats on the device),
    index in the whole set, by which `perturbation` is joined. The keys are those of `scan`, so the same batches make the
    same steps, up to rounding: each is a program of its own. While the device is at work on one batch, the next is read and
    sent; never more than two lie there.
    `after`, the grid of `every` steps and NonFinite are as in `run`. Raises BadInput when the batches end too early, or
    when a batch has examples without noise.
    """
    _check_grid(steps, every, start)
    if start >= steps:
        return state
    incoming, perturbation = iter(batches(start)), jax.device_put(perturbation)
    for begin in range(start, steps, every):
        before, infos = state, list[Info]()
        for t in range(begin, min(begin + every, steps)):
            batch = next(incoming, None)
            require(batch is not None, f"the batches end before step {t}, of {steps}")
            sets.check_covers(perturbation, batch)  # type: ignore[arg-type]
            _check_data(method, state, batch)  # type: ignore[arg-type]
            state, info = _fed(method, key, state, jax.device_put(batch), perturbation, jnp.asarray(t))
            jax.block_until_ready(infos[-1:])
            infos.append(info)
        host = {name: np.stack([np.asarray(info[name]) for info in infos]) for name in infos[0]}
        _refuse_non_finite(host, begin, before, state)
        if callbacks.stops(after(begin + len(infos), state, host)):
            break
    return state


@partial(jax.jit, static_argnames="method")
def _fed(method: Method, key: Key, state: Any, batch: Dataset, perturbation: Perturbation | None, t: Array):
    examples = sets.perturb(batch._replace(x=sets.floats(batch.x)), perturbation)
    return method.step(keys.at(keys.named(key, "step"), t), state, examples)


def _check_data(method: Method, state: Any, data: Dataset) -> None:
    check = getattr(method, "check", None)  # certified methods have none
    if check is not None:
        check(state, data)


def _check_grid(steps: int, every: int, start: int) -> None:
    require(steps >= 0 and every >= 1, f"need steps >= 0 and every >= 1, got {steps} and {every}")
    require(start % every == 0 or start >= steps, f"resume on the grid of {every} steps, not at {start}")


def _labels(data: Dataset) -> int | None:
    """The largest label, where there are labels of classes."""
    known = data.y is not None and data.y.ndim == 1 and data.y.size
    return int(np.asarray(data.y).max()) if known else None


def _refuse_non_finite(info: dict[str, np.ndarray], begin: int, before: Any, state: Any, largest: int | None = None) -> None:
    """NonFinite for what the steps reported, which was before each of them, and for what the last one left."""
    cure = "lower the learning rate or clip gradients"
    for name, values in info.items():
        bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if bad.any():
            at = int(np.argmax(bad))
            if largest is not None:
                cure += f"; labels run to {largest}: has the network an output for each of 0..{largest}?"
            raise NonFinite(f"{name} became {values[at]} at step {begin + at}; {cure}", kept=before)
    if not tree.finite(state) and tree.finite(before):  # some begin with an infinity of their own
        names = [name for name, leaf in zip(tree.names(state), jax.tree.leaves(state)) if not tree.finite(leaf)]
        raise NonFinite(f"{names[0]} became infinite or NaN after step {begin}; {cure}", kept=before)
