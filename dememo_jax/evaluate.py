"""Logits and accuracies of a frozen network over a whole set, in image batches that fit in memory."""

import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import losses, models, values
from dememo_jax.errors import NonFinite, require
from dememo_jax.types import Apply, Array, Dataset, Params

# Numbers in one image batch: 100 CIFAR images on CPU, where larger ones leave the cache, and 2,048 elsewhere.
CPU, OTHER = 100 * 3072, 2048 * 3072
# Tokens in one batch of texts: a decoder has a logit for each word of its vocabulary at every one of them.
CPU_TOKENS, OTHER_TOKENS = 2**12, 2**14


def batch_size(x: Array) -> int:
    """How many of the images [N, ...], or of the rows of tokens [N, L], to evaluate at once when nobody says."""
    tokens, cpu = jnp.issubdtype(x.dtype, jnp.signedinteger), jax.default_backend() == "cpu"
    numbers = (CPU_TOKENS if cpu else OTHER_TOKENS) if tokens else CPU if cpu else OTHER
    return max(1, min(len(x), numbers // max(1, math.prod(x.shape[1:]))))


def logits(apply: Apply, params: Params, x: Array, *, batch: int | None = None) -> Array:
    """Logits [N, K] of images [N, ...], `batch` at a time; by default as many as suit the device."""
    x = jnp.asarray(x)
    return _logits(models.as_apply(apply), params, x, batch=batch_size(x) if batch is None else batch)


@partial(jax.jit, static_argnames="batch")
def _logits(apply, params, x, *, batch):
    whole = len(x) // batch * batch
    if whole == 0:
        return apply(params, x)
    parts = jax.lax.map(lambda part: apply(params, part), x[:whole].reshape(-1, batch, *x.shape[1:]))
    parts = parts.reshape(whole, *parts.shape[2:])
    return parts if whole == len(x) else jnp.concatenate([parts, apply(params, x[whole:])])


def correct(apply: Apply, params: Params, data: Dataset, *, batch: int | None = None) -> Array:
    """1.0 where the network is right, NaN where its logits name no class (`answers`), else 0.0: [N].

    A network that answers with NaN would be right nowhere, which looks like forgetting. Outside jit, raises NonFinite for
    such answers, and BadInput for labels that the network has no output for. Under jit nothing can be raised: the NaN goes
    on into every sum and mean, and `montecarlo.scores` raises NonFinite for the draw.
    """
    found = logits(apply, params, data.x, batch=batch)
    check_outputs(data, found.shape[-1])
    if not isinstance(found, jax.core.Tracer):
        check_answers(found)
    return _right(found, data.y)


def check_outputs(data: Dataset, outputs: int) -> None:
    """BadInput unless a network with so many outputs has one for each label of `data`; under jit nothing is checked."""
    if not isinstance(data.y, jax.core.Tracer) and data.y.size:
        values.check_outputs(int(np.asarray(data.y).max()), outputs)


@jax.jit  # one program where it is called outside of one
def _right(logits: Array, labels: Array) -> Array:
    return jnp.where(answers(logits), losses.correct(logits, labels), jnp.nan)


@jax.jit
def answers(logits: Array) -> Array:
    """Whether rows of logits [..., K] name a class: none is NaN or +infinity, and one at least is finite. [...]"""
    return jnp.isfinite(logits.max(axis=-1))


def check_answers(logits: Array) -> None:
    """NonFinite, with their number, for rows of logits [N, K] that name no class."""
    bad = int((~answers(logits)).sum())
    if bad:
        sentence = f"the network's logits on {bad:,} of {len(logits):,} examples are NaN or infinite: its weights are of no use"
        raise NonFinite(f"{sentence}. Lower the learning rate, or clip gradients")


def accuracy(apply: Apply, params: Params, data: Dataset, *, batch: int | None = None) -> Array:
    """Share of examples that the network gets right.

    Raises BadInput for no examples, of which there is no such share; NonFinite as `correct`.
    """
    require(len(data.y), "there are no examples to measure an accuracy on")
    return correct(apply, params, data, batch=batch).mean()


def group_correct(apply: Apply, params: Params, data: tuple[Dataset, Array], *, batch: int | None = None) -> Array:
    """How many examples of each of the masks [G, N] that come with the data the network gets right: [G], one pass for all.

    Counts, since whole numbers are exact however a program is compiled; their shares are not. NaN for a mask with an example
    on which the network names no class.
    """
    examples, masks = data
    return jnp.where(masks, correct(apply, params, examples, batch=batch), 0.0).sum(axis=-1)


def stack_groups(groups: Mapping[str, np.ndarray] | None, count: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and masks [G, N] of evaluation groups; without any, one group "all". BadInput names an unusable one."""
    groups = {"all": np.ones(count, bool)} if groups is None else groups
    require(groups, "name at least one group to evaluate")
    for name, mask in groups.items():
        fits = np.shape(mask) == (count,) and np.asarray(mask).dtype == bool
        got = f"{np.asarray(mask).dtype} {list(np.shape(mask))}"
        require(
            fits, f"group {name!r} must be a mask [{count}] of booleans; got {got}. Make zeros and ones a mask by .astype(bool)"
        )
        require(np.any(mask), f"group {name!r} has no examples, so it has no accuracy")
    return tuple(groups), np.stack([np.asarray(mask, bool) for mask in groups.values()])
