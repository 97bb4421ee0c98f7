"""Scores of a network under Gaussian weight noise, with all that it takes to join, extend and cite them."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import arithmetic, bounds, callbacks, evaluate, keys, models, montecarlo, tree
from dememo_jax import data as sets
from dememo_jax.errors import require
from dememo_jax.types import Apply, Dataset, Key, Params, Weights

PRECISIONS = ("float32", "bfloat16", "as given")


@dataclass(frozen=True, eq=False)
class Draws:
    """Scores [S, G] of draws `start .. start + S` from one Gaussian cloud: what certificates are made of."""

    scores: np.ndarray
    groups: tuple[str, ...]
    sigma: float | None  # standard deviation of the noise; None where leaves have scales of their own
    start: int = 0
    noise_norm: float | None = None  # expected length of the noise, the root of the summed variances
    scales: tuple[tuple[str, float], ...] = ()  # (leaf, standard deviation), where they are not all the same
    precision: str = "as given"  # of the arithmetic, and of stored weights below float32: the function as it is computed
    images: tuple[tuple[int, int], ...] | None = None  # (evaluated, all) of each group, where scores are accuracies
    fingerprint: Mapping[str, str] = field(default_factory=dict)  # of key, sigma, weights, data; the metric by name only


class Cloud(NamedTuple):
    """A fixed metric of a fixed Gaussian law over weights: what draws are made from."""

    metric: montecarlo.Metric  # counts of right answers where the blank draws have images, else the scores themselves
    params: Params
    data: Any
    key: Key
    scale: float | Params  # of the noise, one for all leaves or one for each
    blank: Draws  # no draws yet


def cloud(
    apply: Apply,
    params: Params,
    data: Dataset,
    key: Key,
    *,
    sigma: float | Params,
    groups: Mapping[str, np.ndarray] | None = None,
    only: str | None = None,
    prepare: Callable[[Params], Any] | None = None,
    precision: str = "float32",
    images: int | None = None,
    batch: int | None = None,
) -> Cloud:
    """The accuracies of a network under Gaussian weight noise, one for each group.

    apply: `(params, x [B, ...]) -> logits [B, K]` in evaluation mode. groups: name -> mask [N]; default one group "all".
    sigma: one number, or a tree with a scale for each leaf (`tree.scales`); only: a regular expression, noise falls on
        the leaves whose names it matches and on no others.
    prepare: applied once to each noisy tree before `apply` sees it: batch-norm statistics re-estimated on fixed images
        as part of the metric (`models.recalibrated`). Without it they are held fixed.
    precision: "float32" computes in true float32 on every device (no TF32, no bfloat16 passes); "bfloat16" rounds the
        noisy weights and the images to it, and the network multiplies in it (a head that the network itself keeps in
        float32 is counted and stated); "as given" leaves dtypes and the JAX setting alone. Noise is always added in
        float32: weights stored in less are raised to it first.
    images: evaluate a random subset of so many images instead of all, the same for every draw; `bound` then replaces each
        accuracy by a hypergeometric limit of the accuracy on all of them, and pays for the chance that one fails.
    batch: images evaluated at once; default by the device.
    Raises BadInput for groups of the wrong length or without images, params, keys and scales that `montecarlo.check`
    refuses, and a network that does not compute in the precision asked for.
    """
    require(precision in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    names, masks = evaluate.stack_groups(groups, len(data.y))
    network = (models.as_apply(apply), None if prepare is None else models.as_apply(prepare))
    law = _law(params, key, sigma, only, names)
    shown = _computed(network, params, data, precision) + _stored(params)
    fingerprint = {
        **law[1].fingerprint,
        "weights": tree.digest((params, network)),
        "data": tree.digest((data, masks)),
        "metric": f"accuracy in {precision} on {images or 'all'} images",
    }
    all_of = masks.sum(axis=1).tolist()
    if images is not None:
        data, masks = _subset(data, masks, names, images, keys.named(key, "images"))
    sampled = tuple(zip(masks.sum(axis=1).tolist(), all_of))
    blank = replace(law[1], precision=shown, images=sampled, fingerprint=fingerprint)
    types = tuple(jnp.result_type(leaf) for leaf in jax.tree.leaves(params))
    metric = jax.tree_util.Partial(_counts(batch, precision, types), network)
    return Cloud(metric, params, (data, jnp.asarray(masks)), key, law[0], blank)


def cloud_of(
    metric: montecarlo.Metric,
    params: Params,
    data: Any,
    key: Key,
    *,
    groups: Sequence[str],
    sigma: float | Params,
    only: str | None = None,
    name: str = "of the caller",
) -> Cloud:
    """The cloud of any metric `(params, data) -> [G]`: loss, margin, the score of an attack; `groups` names its entries.

    name: of the metric, kept in the fingerprint: code itself cannot be compared when draws are joined. Raises BadInput for
    a metric of another shape, and as `cloud` does.
    """
    scale, blank = _law(params, key, sigma, only, groups)
    shape = jax.eval_shape(models.as_apply(metric), params, data).shape
    require(shape == (len(groups),), f"the metric must give {len(groups)} scores, one a group; got the shape {shape}")
    own = {"weights": tree.digest((params, models.as_apply(metric))), "data": tree.digest(data), "metric": name}
    return Cloud(metric, params, data, key, scale, replace(blank, fingerprint={**blank.fingerprint, **own}))


def _law(params: Params, key: Key, sigma: float | Params, only: str | None, groups: Sequence[str]):
    """The noise scale, and draws of this law that are none yet."""
    scalar = number(sigma)
    require(only is None or scalar is not None, "give `only` with one number as sigma")
    scale = sigma if only is None or scalar is None else tree.scales(params, scalar, only=only)
    montecarlo.check(params, key, scale)
    leaves = jax.tree.leaves(params)
    scales = [np.asarray(s, np.float64) for s in tree.leaf_scales(scale, params)]
    variance = sum(float(np.mean(np.square(s))) * leaf.size for s, leaf in zip(scales, leaves))
    require(np.isfinite(variance), f"sigma is too large for noise of a finite length: {sigma}")
    typical = [float(np.sqrt(np.mean(np.square(s)))) for s in scales]
    return scale, Draws(
        scores=np.zeros((0, len(groups))),
        groups=tuple(groups),
        sigma=scalar,
        noise_norm=float(np.sqrt(variance)),
        scales=() if len(set(typical)) == 1 else tuple(zip(tree.names(params), typical)),
        fingerprint={"key": tree.digest(key), "sigma": tree.digest(scales)},
    )


def number(sigma: Any) -> float | None:
    """sigma as a float, or None where leaves have scales of their own."""
    return float(sigma) if jax.tree.leaves(sigma) == [sigma] and np.ndim(sigma) == 0 else None


def draw(
    source: Cloud,
    *,
    draws: int,
    start: int = 0,
    prior: Draws | None = None,
    after: Callable[[Draws], callbacks.Answer] | None = None,
    **engine: Any,
) -> Draws:
    """Draws `start .. draws` of a cloud. Draw i depends on the key and i alone: cut them over machines, and `join`.

    prior: draws already made, to go on from; what comes back holds both. after: called with all draws so far when a chunk
    of `every` is done (save them there); it may return `loop.STOP`.
    engine: `strategy, width, every, over, memory` of `montecarlo.scores`.
    Raises BadInput for a prior of another cloud, or draws that are all made; NonFinite, naming the draw, for a metric that
    is not a number: `after` has then seen everything before it.
    """
    made = replace(source.blank, start=start) if prior is None else prior
    if prior is not None:
        _check_same(source.blank, prior)
        require(start in (0, prior.start), f"the prior begins at draw {prior.start}, not at start={start}")
    begin = made.start + len(made.scores)
    require(draws > begin, f"draws up to {begin} are made; ask for more than that, not for {draws}")
    counted = source.blank.images
    whole = 1 if counted is None else np.array([evaluated for evaluated, _ in counted])

    def record(_, part):
        nonlocal made
        made = replace(made, scores=np.concatenate([made.scores, part / whole]))
        return None if after is None else after(made)

    montecarlo.scores(*source[:4], sigma=source.scale, start=begin, stop=draws, after=record, **engine)
    return made


def calibrate(source: Cloud, **engine: Any) -> montecarlo.Speed:
    """How fast draws of this cloud can be made, and how wide: see `montecarlo.calibrate`."""
    return montecarlo.calibrate(*source[:4], sigma=source.scale, **engine)


def _check_same(first: Draws, other: Draws) -> None:
    names = sorted({*first.fingerprint, *other.fingerprint})
    differing = [name for name in names if first.fingerprint.get(name) != other.fingerprint.get(name)]
    require(not differing, f"these draws are not of one cloud: they differ in {', '.join(differing)}")
    require(first.groups == other.groups, f"these draws have other groups: {first.groups} and {other.groups}")


def subset(draws: Draws) -> bool:
    """Whether accuracies are those of a subset of the images."""
    return draws.images is not None and any(evaluated < total for evaluated, total in draws.images)


def limits(draws: Draws, beta: float | np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(low, high) scores [S] of each group: the scores themselves, or limits of them from a subset of the images.

    Each limit fails with probability at most beta, one number or one for each draw [S]. Accuracies come back as exact
    shares in float64.
    """
    columns = np.asarray(draws.scores, np.float64).T
    if draws.images is None:
        return [(column, column) for column in columns]
    each = np.broadcast_to(beta, len(draws.scores))
    found = [(np.zeros(len(column)), np.zeros(len(column))) for column in columns]
    for value in np.unique(each):
        at = each == value
        for (low, high), column, (evaluated, total) in zip(found, columns, draws.images):
            low[at], high[at] = bounds.hypergeometric_limits(np.round(column[at] * evaluated), evaluated, total, float(value))
    return found


def measured(draws: Draws) -> tuple[tuple[str, str], ...]:
    """What rows of different models must agree on to be one statement: fingerprints of the noise, the data, the metric.

    Empty for draws without fingerprints. The key and the weights are left out: they differ from model to model.
    """
    return tuple((name, draws.fingerprint[name]) for name in ("sigma", "data", "metric") if name in draws.fingerprint)


def join(*parts: Draws) -> Draws:
    """Draws cut over machines, or made one after another, as one: in order, without gaps or repetitions.

    Raises BadInput when they do not fit: another key, sigma, weights, data, metric or groups, a gap, an overlap.
    """
    require(parts, "name at least one part to join")
    first, *rest = sorted(parts, key=lambda part: part.start)
    for part in rest:
        _check_same(first, part)
    reached = first.start
    for part in (first, *rest):
        require(part.start <= reached, f"draws {reached}..{part.start} are missing: they lie in none of the parts")
        require(part.start == reached, f"draws {part.start}..{reached} are in two parts; each must be counted once")
        reached += len(part.scores)
    return replace(first, scores=np.concatenate([part.scores for part in (first, *rest)]))


def _subset(data: Dataset, masks: np.ndarray, names: Sequence[str], images: int, key: Key):
    """A random subset of the images, and its masks."""
    require(1 <= images <= len(data.y), f"images must lie between 1 and {len(data.y)}, got {images}")
    chosen = np.sort(np.asarray(jax.random.permutation(key, len(data.y)))[:images])
    part = masks[:, chosen]
    for name, count in zip(names, part.sum(axis=1)):
        require(count > 0, f"none of the {images} images is of group {name!r}; evaluate more")
    return sets.take(data, jnp.asarray(chosen)), part


@functools.lru_cache
def _counts(batch: int | None, precision: str, types: tuple) -> Callable:
    # One function object a choice, so that jit recognises the next certificate.
    return functools.partial(_group_correct, batch=batch, precision=precision, types=types)


def _group_correct(network, params, data, *, batch, precision, types):
    examples, masks = data
    with jax.default_matmul_precision("highest") if precision == "float32" else contextlib.nullcontext():
        apply, weights, x = _ready(network, params, examples.x, precision, types)
        return evaluate.group_correct(apply, weights, (examples._replace(x=x), masks), batch=batch)


def _ready(network, params, x, precision: str, types: tuple):
    """The network, its weights and the images in the types that the precision asks for."""
    apply, prepare = network
    if precision == "as given":
        leaves, treedef = jax.tree.flatten(params)
        params = jax.tree.unflatten(treedef, [leaf.astype(dtype) for leaf, dtype in zip(leaves, types, strict=True)])
    elif precision == "float32":
        params = _cast(params, jnp.float32)
    weights = params if prepare is None else prepare(params)
    return (apply, _cast(weights, jnp.bfloat16), _cast(x, jnp.bfloat16)) if precision == "bfloat16" else (apply, weights, x)


def _cast(weights, dtype):
    if isinstance(weights, Weights):  # statistics stay as they are: they normalise
        return weights._replace(params=_cast(weights.params, dtype))
    # Whole numbers are counts, or the tokens of a text.
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, weights)


def _computed(network, params, data, precision: str) -> str:
    """The precision in words, or BadInput: decided by the types in which the network multiplies, not by that of its logits."""
    types = tuple(jnp.result_type(leaf) for leaf in jax.tree.leaves(params))

    def logits(params, x):
        given = params if precision == "float32" else _cast(params, jnp.float32)
        apply, weights, x = _ready(network, given, x, precision, types)
        return apply(weights, x)

    made = jax.eval_shape(logits, params, data.x[:1])
    evaluate.check_outputs(data, made.shape[-1])
    if precision == "as given":
        return f"as given: {jnp.result_type(*types)}"
    found = arithmetic.products(logits, params, data.x[:1])
    if precision == "bfloat16" and network[1] is not None:  # statistics are recomputed in float32, as part of the metric
        found = found[len(arithmetic.products(lambda p, x: network[1](_cast(p, jnp.float32)), params, data.x[:1])) :]
    found = [product for product in found if any(jnp.issubdtype(t, jnp.floating) for t in product.types)]  # no lookups
    dtype = made.dtype
    if not found or precision == "float32":
        _refuse(dtype == jnp.dtype(precision), precision, f"gives {dtype} from {precision} weights and images")
    if not found:
        return precision
    own = arithmetic.share(found, precision)
    others = {str(t) for product in found for t in product.types} - {precision}
    what = f"makes {1 - own:.1%} of its multiplications in {', '.join(sorted(others))}"
    if precision == "float32":
        _refuse(not others, precision, what)
        _refuse(
            all(product.full for product in found), precision, "asks for products that may be rounded (its own `precision`)"
        )
        return precision
    _refuse(own >= 0.5, precision, what)
    return precision if own == 1 else f"{precision}, with {1 - own:.2g} of the multiplications in {', '.join(sorted(others))}"


def _refuse(fits: bool, precision: str, what: str) -> None:
    require(
        fits,
        f"precision={precision!r}, but this network {what}: it sets a dtype of its own; take precision='as given', or build "
        f"it without one (in Flax dtype=None), so that it computes in the type of its weights and images",
    )


def _stored(params: Params) -> str:
    """What to add to the precision for weights that are stored in less than float32."""
    low = ", ".join(tree.half(params))
    return f"; weights stored in {low}, noise added in float32" if low else ""
