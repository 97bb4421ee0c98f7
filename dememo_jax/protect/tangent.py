"""Noise against an infinitely wide network: neural tangent generalization attacks (NTGA), no surrogate to train.

Yuan and Wu, Neural Tangent Generalization Attacks, ICML 2021. Training an infinitely wide network by gradient flow on
squared loss has a closed form, so the loss on clean images of a network trained on a block of noisy ones is a
differentiable function of the noise.

The published code differs from its paper: each iteration of its loop starts at the clean images and the last one only is
kept, a single signed step of size `radius`. form="published" does all of it in one step; more only draw other validation
images, and `stride` is not used.
Deviations: the validation images are other images of the set, not 10,000 that are never released; the last images are
not dropped when the block size does not divide their number; the published network ends in its fifth Erf, here a linear
layer reads out; float32, not float64.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import data as sets
from dememo_jax import keys, losses
from dememo_jax.errors import require
from dememo_jax.protect import bilevel
from dememo_jax.types import Array, Dataset, Key, Method, Perturbation

WEIGHT_STD, BIAS_STD = math.sqrt(1.76), math.sqrt(0.18)


class NtgaState(NamedTuple):
    perturbation: Perturbation
    order: Key  # which images share a block
    step: Array


def ntga(
    *,
    radius: float = 8 / 255,
    steps: int = 10,
    stride: float | None = None,
    block: int = 512,
    validation: int = 256,
    classes: int = 10,
    form: Literal["iterated", "published"] = "iterated",
    depth: int = 5,
    weight_std: float = WEIGHT_STD,
    bias_std: float = BIAS_STD,
    time: float = 64.0,
    rate: float = 1.0,
    ridge: float = 1e-4,
) -> Method:
    """Sample-wise l-infinity noise that maximises the clean validation loss of the network trained on it (NTGA).

    Step: one step of projected gradient ascent, `stride * sign`, over every block of at most `block` images; the step
    gets the whole set, `steps` of them make the attack and set the default stride, 1.1 * radius / steps. The loss of a
    block is the cross-entropy of `predict` on `validation` clean images of the other blocks, drawn anew each step.
    Noise stays within +-radius, images within [0, 1]; examples outside the mask train as they are and get none.
    `init(key, data, mask=None)` deals the images into blocks at random. Info: mean `loss` at the start of the step.
    form="published" is one signed step of size `radius` from the clean images.
    Raises BadInput for options out of range and for fewer than 4 images.
    """
    stride = 1.1 * radius / max(steps, 1) if stride is None else stride
    _check(radius=radius, time=time, rate=rate, ridge=ridge, stride=stride, weight_std=weight_std)
    require(radius <= 1, f"radius is in units of a pixel range of 1: at most 1, got {radius}")
    require(min(steps, validation, depth) >= 1, f"steps, validation, depth must be at least 1: {steps}, {validation}, {depth}")
    require(block >= 2 and classes >= 2, f"block and classes must be at least 2, got {block} and {classes}")
    require(bias_std >= 0, f"bias_std must not be negative, got {bias_std}")
    require(form in ("iterated", "published"), f"form must be 'iterated' or 'published', got {form!r}")

    def init(key: Key, data: Dataset, mask: Array | None = None) -> NtgaState:
        require(len(data.y) >= 4, f"a block and its validation images need at least 4 images, got {len(data.y)}")
        noise = bilevel.blank(data, mask, granularity="sample", classes=classes)
        return NtgaState(noise, keys.named(key, "order"), jnp.zeros((), jnp.int32))

    learned = partial(predict, time=rate * time, ridge=ridge, depth=depth, weight_std=weight_std, bias_std=bias_std)
    again = form == "iterated"

    def step(key: Key, state: NtgaState, data: Dataset) -> tuple[NtgaState, dict[str, Array]]:
        start = state.perturbation.delta if again else jnp.zeros_like(state.perturbation.delta)
        jobs, deal = _deal(key, state.order, data, block, validation)

        def climb(delta, job):
            at, real, judge = deal(job)
            chosen = sets.take(data, at)
            loss, slope = jax.value_and_grad(_harm)(start[at], chosen, real, sets.take(data, judge), learned, classes)
            new = jnp.clip(start[at] + (stride if again else radius) * jnp.sign(slope), -radius, radius)
            rows = jnp.where(state.perturbation.mask[at] & real, at, len(data.y))  # beyond: dropped
            return delta.at[rows].set(jnp.clip(chosen.x + new, 0.0, 1.0) - chosen.x, mode="drop"), loss

        delta, loss = jax.lax.scan(climb, start, jobs)
        noise = state.perturbation._replace(delta=delta)
        return state._replace(perturbation=noise, step=state.step + 1), {"loss": loss.mean()}

    return Method(init, step)


def _deal(key: Key, order: Key, data: Dataset, block: int, validation: int):
    """Jobs to scan over, and the function from a job to the block's places, which of them are real, and its judges."""
    count = len(data.y)
    size = -(-count // max(2, -(-count // block)))  # nearly equal blocks, and at least two: others judge a block
    shuffled = jax.random.permutation(order, count)
    places, real = sets.blocks(count, size)

    def deal(job):
        number, place, real = job
        beyond = jax.random.permutation(keys.at(key, number), count - size)[:validation]  # counted from the block's end
        return shuffled[place], real, shuffled[((number + 1) * size + beyond) % count]

    return (jnp.arange(len(places)), jnp.asarray(places), jnp.asarray(real)), deal


def _harm(noise: Array, block: Dataset, real: Array, judge: Dataset, learned: Callable[..., Array], classes: int) -> Array:
    """Cross-entropy on the clean images of `judge` of the network trained on the noisy block."""
    target = jax.nn.one_hot(block.y, classes) * real[:, None]
    logits = learned((block.x + noise).reshape(len(real), -1), target, judge.x.reshape(len(judge.y), -1), real=real)
    return losses.cross_entropy(logits, judge.y).mean()


def predict(
    x: Array,
    y: Array,
    seen: Array,
    *,
    real: Array | None = None,
    time: float = 64.0,
    ridge: float = 1e-4,
    depth: int = 5,
    weight_std: float = WEIGHT_STD,
    bias_std: float = BIAS_STD,
) -> Array:
    """Mean outputs [m, K] on `seen` [m, D] of the infinite network after gradient flow on x [n, D], targets y [n, K].

    K(seen, x) K^-1 (I - exp(-time K / (n K))) y, K = K(x, x) + ridge * mean diagonal (Lee et al. 2019, eq. 10, from an
    initial output of zero). The loss is the squared error averaged over all n * K targets, as in the published
    experiments, so `time` counts steps at a learning rate of 1. Rows outside `real` [n] are not there.
    """
    real = jnp.ones(len(x), bool) if real is None else real
    both = real[:, None] & real[None, :]
    kernel = partial(erf_ntk, depth=depth, weight_std=weight_std, bias_std=bias_std)
    gram = jnp.where(both, kernel(x, x), 0.0)
    number = real.sum()
    floor = ridge * jnp.trace(gram) / number
    gram = gram + floor * jnp.eye(len(x))
    dual = flow(gram, y, time / (number * y.shape[1]))
    return _dot(kernel(seen, x) * real, dual)


def erf_ntk(a: Array, b: Array, *, depth: int = 5, weight_std: float = WEIGHT_STD, bias_std: float = BIAS_STD) -> Array:
    """Neural tangent kernel [n, m] between a [n, D] and b [m, D]: `depth` layers Dense-Erf, then a linear read-out.

    NTK parametrisation: a dense layer is weight_std / sqrt(fan in) * W x + bias_std * b, W and b standard normal. The
    covariance of a layer is the arcsine kernel (Williams 1997), the kernel its recursion (Jacot et al. 2018). Smooth
    everywhere, also where two rows are equal.
    """

    def dense(moment: Array) -> Array:
        return weight_std**2 * moment + bias_std**2

    covariance = dense(_dot(a, b.T) / a.shape[1])
    left, right = (dense(jnp.square(part).mean(axis=1)) for part in (a, b))
    kernel = covariance
    for _ in range(depth):
        spread = (1 + 2 * left)[:, None] * (1 + 2 * right)
        slopes = 4 / jnp.pi * jax.lax.rsqrt(spread - 4 * covariance**2)  # E erf'(u) erf'(v)
        covariance = dense(2 / jnp.pi * jnp.arcsin(2 * covariance * jax.lax.rsqrt(spread)))
        left, right = (dense(2 / jnp.pi * jnp.arcsin(2 * v / (1 + 2 * v))) for v in (left, right))
        kernel = covariance + weight_std**2 * slopes * kernel
    return kernel


# --- the matrix function -----------------------------------------------------------------------------------------


@jax.custom_jvp
def flow(gram: Array, y: Array, span: float | Array) -> Array:
    """gram^-1 (I - exp(-span gram)) y for a symmetric positive gram [n, n] and y [n, K], at any condition number.

    (1 - exp(-span v)) / v is bounded by span, so small eigenvalues do no harm. The derivative by gram is that of
    Daleckii and Krein, written with divided differences: differentiating eigh itself divides by the gaps between
    eigenvalues, which is infinite for equal ones. No derivative by span.
    """
    values, vectors = jnp.linalg.eigh(gram)
    scaled = span * _decay(_positive(span * values))
    return _dot(vectors, scaled[:, None] * _dot(vectors.T, y))


@flow.defjvp
def _flow_jvp(primals, tangents):
    (gram, y, span), (gram_dot, y_dot, _) = primals, tangents
    values, vectors = jnp.linalg.eigh(gram)
    z = _positive(span * values)
    scaled = (span * _decay(z))[:, None]
    inside = _dot(vectors.T, y)
    turned = span**2 * _divided(z) * _dot(_dot(vectors.T, gram_dot), vectors)
    moved = _dot(turned, inside) + scaled * _dot(vectors.T, y_dot)
    return _dot(vectors, scaled * inside), _dot(vectors, moved)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")  # accelerators would round the factors to fewer bits


def _positive(z: Array) -> Array:
    return jnp.maximum(z, 1e-30)  # rounding makes eigenvalues of a positive matrix negative


def _decay(z: Array) -> Array:
    """(1 - exp(-z)) / z."""
    return -jnp.expm1(-z) / z


def _decay_slope(z: Array) -> Array:
    """Its derivative: by the power series where the closed form cancels."""
    terms = [(-1) ** k * k / math.factorial(k + 1) for k in range(10, 0, -1)]
    large = jnp.maximum(z, 1.0)
    return jnp.where(z < 1.0, jnp.polyval(jnp.asarray(terms, z.dtype), z), (jnp.exp(-large) * (1 + large) - 1) / large**2)


def _divided(z: Array) -> Array:
    """Divided differences [n, n] of `_decay`; the slope half-way where two points are too close for a difference.

    At a gap of 0.005 (1 + z) the error of the slope and the rounding of the difference are both about 1e-5.
    """
    gap = z[:, None] - z[None, :]
    near = jnp.abs(gap) < 5e-3 * (1 + jnp.maximum(z[:, None], z[None, :]))
    rise = _decay(z)[:, None] - _decay(z)[None, :]
    return jnp.where(near, _decay_slope((z[:, None] + z[None, :]) / 2), rise / jnp.where(near, 1.0, gap))


def _check(**positive: float) -> None:
    for name, value in positive.items():
        require(np.isfinite(value) and value > 0, f"{name} must be positive, got {value}")
