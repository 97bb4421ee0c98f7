"""Certified unlearning of any network: noisy clipped descent on the retain set (Koloskova et al. 2025; SoK appendix C).

The given weights are clipped into a ball around a centre that does not depend on the data; then every step moves by a
clipped gradient of the retain set and adds Gaussian noise to every parameter. What the forget set did to the given
weights is hidden by the noise, with a guarantee that holds for any loss and network, needs no gradient of single
examples, and is computed exactly (`bounds.noisy_iteration_mu`). Noiseless training on the retain set afterwards is
post-processing and free: start `finetune` from what `released` returns.

The guarantee is about *everything that is released*. Hence no momentum and no other optimiser state; batch-norm statistics
begin anew and are recomputed from the retain set (`released`); and the noise key is a secret, drawn afresh for every
request from the operating system's entropy, `jax.random.wrap_key_data(np.frombuffer(os.urandom(8), np.uint32))`, never
reused and never published: who knows the key can subtract the noise. `clip_init`, `clip_grad`, `steps`, `lr`, `sigma` and the
centre must be chosen without looking at the given weights or the forget set.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import bounds, keys, losses, models, noise, train, tree
from dememo_jax import data as sets
from dememo_jax.augment import Augment
from dememo_jax.errors import require
from dememo_jax.types import Array, CertifiedMethod, Dataset, Guarantee, Info, Key, Loss, Model, Params, Weights
from dememo_jax.unlearn.guarantees import ASSUMPTIONS, Schedule, at_step, check_params, contracted, descent_mu, stated


class NoisyState(NamedTuple):
    weights: Weights
    centre: Params
    forget: Array  # [N] bool
    order: Key
    step: Array


# --- methods -----------------------------------------------------------------------------------------------------


def noisy_descent(
    model: Model,
    *,
    lr: Schedule,
    clip_init: float,
    clip_grad: Schedule,
    sigma: Schedule,
    weight_decay: float = 0.0,
    delta: float = 1e-5,
    comparator: str = "same_procedure",
    batch: int = 256,
    augment: Augment | None = None,
    loss: Loss = losses.cross_entropy,
) -> CertifiedMethod:
    """`x <- x - lr (clip(g, clip_grad) + weight_decay (x - c)) + N(0, sigma^2)`, from the given weights clipped around c.

    g is the mean gradient of a batch of the retain set, clipped as a whole: one global l2 norm over all parameters, no
    momentum. c is the centre. The noise falls on every parameter. sigma comes from `calibrate`. Rates, clips and noise may
    be schedules; `guarantee(steps)` accounts them step by step, at `delta`, and is infinite (BadInput) where a step without
    noise comes last.

    init(key, weights, data, forget, centre=None): the centre, zero without one, must not depend on the forget set: an
    initialisation, public weights, a short training on the retain set. Clipping around it costs the same as around zero
    and takes a smaller ball. Batch-norm statistics are those of `model.init` until `released`; training mode is used.
    comparator: what the released model cannot be told from. "same_procedure": the same run from other clipped
    weights, such as retrained ones; "from_centre": the same run from the centre; "data_independent": a walk of the same
    noise that sees no data. The first is the strongest.
    Info: `retain_loss`, `gradient_norm` before the clip, `clipped` (1 where it was cut).
    Raises BadInput for parameters out of range; init, outside jit, for an unusable forget set or a network whose
    statistics cannot be recomputed.
    """
    descent_mu(1, lr, clip_init, clip_grad, sigma, weight_decay, comparator)
    bounds.check_privacy(1.0, delta)

    def move(key: Key, state: NoisyState, data: Dataset) -> tuple[Params, Info]:
        grads, value = _gradient(model, loss, augment, batch, key, state, data)
        length, ceiling = tree.norm(grads), jnp.asarray(at_step(clip_grad, state.step), jnp.float32)
        # A gradient that is not finite would slip through a comparison: it counts as zero, and the norm is reported.
        scale = jnp.where(jnp.isfinite(length), jnp.minimum(1.0, ceiling / jnp.maximum(length, 1e-30)), 0.0)
        rate = at_step(lr, state.step)

        def moved(x, g, c):  # schedules may be of another type
            return (x - rate * (jnp.where(scale > 0, g * scale, 0.0) + weight_decay * (x - c))).astype(x.dtype)

        params = jax.tree.map(moved, state.weights.params, grads, state.centre)
        return params, {"retain_loss": value, "gradient_norm": length, "clipped": (length > ceiling).astype(jnp.float32)}

    def guarantee(steps: int) -> Guarantee:
        mu = descent_mu(steps, lr, clip_init, clip_grad, sigma, weight_decay, comparator)
        require(math.isfinite(mu), "no noise follows the last difference: sigma must be positive at the end of the run")
        return stated(mu, delta, comparator)

    return CertifiedMethod(*_noisy(model, clip_init, 0.0, move, lambda params, centre: params, sigma), guarantee=guarantee)


def noisy_model_clipping(
    model: Model,
    *,
    lr: Schedule,
    clip_init: float,
    clip_model: float,
    sigma: float,
    sigma_init: float = 0.0,
    weight_decay: float = 0.0,
    epsilon: float = 1.0,
    comparator: str = "same_procedure",
    batch: int = 256,
    augment: Augment | None = None,
    loss: Loss = losses.cross_entropy,
) -> CertifiedMethod:
    """`x <- clip(x - lr (g + weight_decay (x - c)), clip_model) + N(0, sigma^2)`: weights are clipped, gradients are not.

    Each step hides a share of what is left, whatever the rate: `guarantee(steps)` is the delta at `epsilon` after so many,
    by Koloskova et al.'s recursion; it has no mu. sigma comes from `calibrate_model_clipping`; with sigma_init the clipped
    start is noised as well, which counts. All else as `noisy_descent`.
    """
    apart, each = contracted(comparator)
    require(clip_model > 0 and math.isfinite(clip_model), f"clip_model must be positive and finite, got {clip_model}")
    require(0 < sigma < math.inf, f"sigma must be positive and finite, got {sigma}")
    require(0 <= sigma_init < math.inf, f"sigma_init must be finite and not negative, got {sigma_init}")
    require(0 < epsilon < math.inf, f"epsilon must be positive and finite, got {epsilon}")
    descent_mu(1, lr, clip_init, 0.0, sigma, weight_decay, comparator)

    def move(key: Key, state: NoisyState, data: Dataset) -> tuple[Params, Info]:
        grads, value = _gradient(model, loss, augment, batch, key, state, data)
        rate = at_step(lr, state.step)
        step = jax.tree.map(
            lambda x, g, c: (x - rate * (g + weight_decay * (x - c))).astype(x.dtype), state.weights.params, grads, state.centre
        )
        length = tree.distance(step, state.centre)
        return step, {"retain_loss": value, "gradient_norm": tree.norm(grads), "clipped": (length > clip_model) * 1.0}

    def guarantee(steps: int) -> Guarantee:
        require(steps >= 1, f"steps must be at least 1, got {steps}")
        delta = bounds.model_clipping_delta(
            epsilon,
            steps=steps,
            diameter=each * clip_model,
            sigma=sigma,
            start=apart * clip_init,
            sigma_init=sigma_init,
        )
        return Guarantee(epsilon, delta, None, comparator, ASSUMPTIONS)

    def clip(params, centre):
        finite = jnp.isfinite(tree.distance(params, centre))
        safe = jax.tree.map(lambda x, c: jnp.where(finite, x, c), params, centre)
        return tree.project_ball(safe, centre, clip_model)

    return CertifiedMethod(*_noisy(model, clip_init, sigma_init, move, clip, sigma), guarantee=guarantee)


def output_perturbation(
    model: Model, *, clip_init: float, sigma: float, delta: float = 1e-5, comparator: str = "same_procedure"
) -> CertifiedMethod:
    """Clip the given weights and add noise, once: the baseline. sigma is `calibrate(..., steps=1, lr=0, clip_grad=0)`.

    The published `sqrt(2 log(1.25 / delta)) 2 clip_init / epsilon` is larger, and proved for epsilon <= 1 only.
    """
    require(sigma > 0, f"sigma must be positive, got {sigma}")
    bounds.check_privacy(1.0, delta)
    mu = descent_mu(1, 0.0, clip_init, 0.0, sigma, 0.0, comparator)

    def guarantee(steps: int) -> Guarantee:
        require(steps == 1, f"output perturbation is one step, got {steps}")
        return stated(mu, delta, comparator)

    def stay(key: Key, state: NoisyState, data: Dataset) -> tuple[Params, Info]:
        return state.weights.params, {"distance": tree.distance(state.weights.params, state.centre)}

    return CertifiedMethod(*_noisy(model, clip_init, 0.0, stay, lambda params, centre: params, sigma), guarantee=guarantee)


def released(model: Model, weights: Weights, data: Dataset, forget: Array, *, images: int = 2048) -> Weights:
    """The weights of a certified run's last state, with batch-norm statistics from the first `images` of the retain set.

    `data` as the network was trained on it. Statistics of the given model know the forget set, whatever was done to its
    parameters; those of a certified run begin anew, and this brings them up to the parameters. Raises BadInput as
    `check_network`.
    """
    require(images >= 1, f"statistics need at least one image, got images={images}")
    check_network(model, weights, data.x[:1])
    kept = np.flatnonzero(~sets.check_forget(forget, len(data.y)))[:images]
    if not jax.tree.leaves(weights.stats):
        return weights
    _, params, prepare = models.recalibrated(model, weights, data.x[jnp.asarray(kept)])
    return prepare(params)


def check_network(model: Model, weights: Weights, x: Array) -> None:
    """BadInput for what a guarantee could not cover: parameters that take no noise, statistics that cannot be recomputed.

    Running averages can be, from the retain set, and constants are those of `model.init`. What else differs from an
    initialisation was learned from all data: an EMA of the weights kept beside them, vectors of spectral normalisation.
    """
    check_params(weights.params, "parameters")
    one, other = (model.init(jax.random.key(seed), jnp.zeros_like(x)).stats for seed in (0, 1))
    leaves = zip(tree.names(weights.stats), *(map(_plain, jax.tree.leaves(part)) for part in (weights.stats, one, other)))
    changed = {name for name, leaf, *fresh in leaves if not all(np.array_equal(leaf, start) for start in fresh)}
    held = [name for name in models.not_averaged(model, weights, x) if name in changed]
    require(
        not held,
        f"a guarantee covers all that is released, and {', '.join(held)} may have learned from the forget set and cannot be "
        "recomputed from the rest: leave it out of the network, or make it as `model.init` makes it under any key",
    )


def _plain(leaf: Array) -> np.ndarray:
    keyed = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if keyed else leaf)


# --- what the methods share --------------------------------------------------------------------------------------


def _noisy(model: Model, clip_init: float, sigma_init: float, move, clip, sigma: Schedule) -> tuple[Callable, Callable]:
    def init(key: Key, weights: Weights, data: Dataset, forget: Array, centre: Params | None = None) -> NoisyState:
        sets.check_forget(forget, len(data.y))
        if not isinstance(forget, jax.core.Tracer):
            check_network(model, weights, data.x[:1])
        centre = jax.tree.map(jnp.zeros_like, weights.params) if centre is None else centre
        tree.check_like(centre, weights.params, "the centre")
        check_params(centre, "the centre")
        params = tree.project_ball(weights.params, centre, clip_init)
        if sigma_init > 0:
            params = noise.add(keys.named(key, "initial noise"), params, sigma_init)
        stats = model.init(keys.named(key, "statistics"), jnp.zeros_like(data.x[:1])).stats
        order, zero = keys.named(key, "order"), jnp.zeros((), jnp.int32)
        return NoisyState(Weights(params, stats), centre, jnp.asarray(forget, bool), order, zero)

    def step(key: Key, state: NoisyState, data: Dataset) -> tuple[NoisyState, Info]:
        params, info = move(keys.named(key, "gradient"), state, data)
        params = noise.add(keys.named(key, "noise"), clip(params, state.centre), at_step(sigma, state.step))
        return state._replace(weights=state.weights._replace(params=params), step=state.step + 1), info

    return init, step


def _gradient(
    model: Model, loss: Loss, augment: Augment | None, batch: int, key: Key, state: NoisyState, data: Dataset
) -> tuple[Params, Array]:
    """Of the mean loss of a batch of the retain set, in training mode: a function of the params and the retain set alone."""
    require(batch >= 1, f"a batch needs at least one example, got {batch}")
    to_augment, to_fit = jax.random.split(key)
    examples = sets.shuffled(state.order, state.step, data, batch, ~state.forget)
    x = examples.x if augment is None else augment(to_augment, examples.x)

    def objective(params):
        logits, _ = train.forward(model, "fit", state.weights._replace(params=params), x, to_fit)
        return loss(logits, examples.y).mean()

    value, grads = jax.value_and_grad(objective)(state.weights.params)
    return grads, value
