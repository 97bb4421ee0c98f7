"""Training as a method: descent, on augmented, mixed, worst-case or adversarial images, or under weight noise."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from dememo_jax import data as sets
from dememo_jax import keys, losses, projected, tree
from dememo_jax.augment import Augment, Mix
from dememo_jax.errors import BadInput, require
from dememo_jax.types import Array, Dataset, Key, Loss, Method, Model, Params, Weights

EvalParams = Callable[[Any, Params], Params]  # state of an optimizer, params that are trained -> params to use
View = Callable[[Key, Weights, Dataset], Array]  # the images of a batch as the network with those weights meets them
# An optax transform, or how to make one when the number of steps is known, for rates that fall over a run.
Optimiser: TypeAlias = optax.GradientTransformation | Callable[[int], optax.GradientTransformation]


class TrainState(NamedTuple):
    weights: Weights
    opt: Any
    step: Array


def forward(model: Model, mode: str, weights: Weights, x: Array, key: Key) -> tuple[Array, Weights]:
    """Logits and the weights with their new statistics: `"fit"` updates them, `"frozen"` evaluates with them as they are."""
    require(mode in ("fit", "frozen"), f"mode must be 'fit' or 'frozen', got {mode!r}")
    return model.fit(weights, x, key) if mode == "fit" else (model.apply(weights, x), weights)


def update(
    tx: optax.GradientTransformation,
    grads: Any,
    opt: Any,
    weights: Weights,
    value: Array | None = None,
    value_fn: Callable[[Params], Array] | None = None,
) -> tuple[Weights, Any]:
    """One optax step on the params; the statistics stay.

    value, value_fn: the loss at these params, and as a function of the params on the same batch, for optimizers that look at
    it (`optax.lbfgs`). BadInput for such an optimizer where they are not given.
    """
    how: dict[str, Any] = {} if value_fn is None else {"value": value, "grad": grads, "value_fn": value_fn}
    try:
        updates, opt = optax.with_extra_args_support(tx).update(grads, opt, weights.params, **how)
    except TypeError as error:
        if how or "missing" not in str(error):
            raise
        what = "this method gives an optimizer gradients alone, and this one looks at the loss too"
        raise BadInput(f"{what} ({error}): take another, such as optax.sgd or optax.adamw") from error
    return weights._replace(params=optax.apply_updates(weights.params, updates)), opt


def result(state: Any, eval_params: EvalParams | None = None) -> Weights:
    """The weights to use of a state with `weights` and `opt`, such as those of `sgd` and of `unlearn.descent`.

    Args:
        state: The state.
        eval_params: For optimizers that keep the params to use in their state, `(state of the optimizer, params) -> params`:
            `optax.contrib.schedule_free_eval_params`. By default the params are those that are trained.
    """
    weights = state.weights
    return weights if eval_params is None else weights._replace(params=eval_params(state.opt, weights.params))


def _warn_of_averages(opt: Any) -> None:
    def kept(node: Any) -> bool:
        return isinstance(node, optax.contrib.ScheduleFreeState)

    if any(map(kept, jax.tree.leaves(opt, is_leaf=kept))):
        warnings.warn(
            "a schedule-free optimizer keeps the params to use in its state, and state.weights are others: give "
            "eval_params=optax.contrib.schedule_free_eval_params, or use train.result(state, eval_params)",
            stacklevel=3,
        )


# --- optimisers --------------------------------------------------------------------------------------------------


def optimiser(tx: Optimiser, steps: int) -> optax.GradientTransformation:
    """The transform for a run of so many steps."""
    return tx(steps) if callable(tx) else tx


def falling(lr: float, schedule: str, steps: int, drops: tuple[float, ...] = (0.5, 0.75)) -> float | optax.Schedule:
    """The learning rate of a run of `steps`: "constant"; "cosine", from lr to zero; "step", tenfold lower at each drop.

    drops: shares of the run; the usual ones are those of He et al. 2016 on CIFAR-10. BadInput for another schedule.
    """
    require(schedule in ("constant", "cosine", "step"), f"schedule must be constant, cosine or step, got {schedule!r}")
    if schedule == "cosine":
        return optax.cosine_decay_schedule(lr, max(1, steps))
    falls: dict[int, float] = {}
    for share in drops:
        at = max(1, round(share * steps))
        falls[at] = 0.1 * falls.get(at, 1.0)
    return lr if schedule == "constant" else optax.piecewise_constant_schedule(lr, falls)


@functools.lru_cache(maxsize=256)
def usual(
    optimizer: str, schedule: str, lr: float, momentum: float, weight_decay: float, steps: int = 1
) -> optax.GradientTransformation:
    """How the SoK trains (Table 6): "sgd" as `clipped_sgd`, or "adamw", at a rate that is `falling` over `steps`.

    AdamW (Loshchilov and Hutter 2019) as in PyTorch: betas (momentum, 0.999), the decay decoupled and of all parameters,
    biases and norms too; its gradient is not clipped. The same arguments give the same object, so that methods made of it
    share compiled programs. BadInput for another optimizer or schedule.
    """
    require(optimizer in ("sgd", "adamw"), f"optimizer must be sgd or adamw, got {optimizer!r}")
    rate = falling(lr, schedule, steps)
    if optimizer == "adamw":
        return optax.adamw(rate, momentum, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(5.0), optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum))


def clipped_sgd(
    lr: float, momentum: float, weight_decay: float, cosine_steps: int | None = None
) -> optax.GradientTransformation:
    """The published codes' SGD: gradient clipped at norm 5, weight decay towards zero, momentum.

    At a constant rate, or falling to zero by a cosine. The same arguments give the same object.
    """
    schedule, steps = ("constant", 1) if cosine_steps is None else ("cosine", cosine_steps)
    return usual("sgd", schedule, lr, momentum, weight_decay, steps)


@functools.lru_cache(maxsize=256)
def dropping_sgd(
    lr: float, momentum: float, weight_decay: float, drops: tuple[float, ...], nesterov: bool, steps: int
) -> optax.GradientTransformation:
    """SGD whose rate falls tenfold at the given shares of the run."""
    rate = falling(lr, "step", steps, drops)
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum, nesterov=nesterov))


# --- what a network meets ----------------------------------------------------------------------------------------


def adversary(model: Model, ball: projected.Ball, *, stride: float, steps: int, loss: Loss = losses.cross_entropy) -> View:
    """Projected gradient ascent on the loss, in evaluation mode, from a random start in the ball: Madry et al. 2018.

    What it adds is a constant to whoever differentiates through the images. No steps leave the random start.
    """
    require(steps >= 0 and stride > 0, f"an adversary needs steps >= 0 and a positive stride, got {steps} and {stride}")

    def view(key: Key, weights: Weights, batch: Dataset) -> Array:
        x = jax.lax.stop_gradient(batch.x)

        def gradient(_, t, noise):
            return jax.grad(lambda images: -loss(model.apply(weights, images), batch.y).sum())(x + noise)

        def project(noise):  # images may lie outside [0, 1] before: they are not driven further, nor back
            return jnp.clip(x + ball.project(noise), jnp.minimum(x, 0.0), jnp.maximum(x, 1.0)) - x

        to_start, to_search = jax.random.split(key)
        start = project(ball.draw(to_start, x.shape))
        found = projected.search(
            to_search, start, gradient, stride=stride, steps=steps, project=project, direction=ball.direction
        )
        return batch.x + jax.lax.stop_gradient(found)

    return view


# --- methods -----------------------------------------------------------------------------------------------------


def sgd(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    loss: Loss = losses.cross_entropy,
    augment: Augment | None = None,
    adversary: View | None = None,
    mix: Mix | None = None,
    copies: int = 1,
    mode: str = "fit",
    eval_params: EvalParams | None = None,
) -> Method:
    """Minibatch descent with any optax transform. `init(key, x)` for fresh weights, `start(tx, weights)` for given ones.

    The images are augmented, then attacked by the `adversary` (adversarial training), then mixed (mixup, cutmix: the
    loss is weighted between the labels of both). With `copies` above one, each example counts with the largest loss of
    so many draws of all that (UEraser-max, Qin et al. 2023). eval_params: of `result`, for `finish(state)`, the weights to
    use of an optimizer that keeps them in its state.

    Info: mean `loss` of the batch and its `accuracy` on the examples' own labels, before the step.
    """
    require(copies >= 1, f"copies must be at least 1, got {copies}")

    def init(key: Key, x: Array) -> TrainState:
        return start(tx, model.init(key, x), eval_params)

    def step(key: Key, state: TrainState, batch: Dataset) -> tuple[TrainState, dict[str, Array]]:
        to_meet, to_fit = jax.random.split(key)

        def once(weights, to_meet, to_fit):
            x, measured = _meet(augment, adversary, mix, loss, to_meet, jax.lax.stop_gradient(weights), batch)
            logits, weights = forward(model, mode, weights, x, to_fit)
            return weights, measured(logits), losses.correct(logits, batch.y)

        def objective(params):
            weights = state.weights._replace(params=params)
            if copies == 1:
                weights, each, right = once(weights, to_meet, to_fit)
            else:

                def copy(weights, c):
                    weights, each, right = once(weights, keys.at(to_meet, c), keys.at(to_fit, c))
                    return weights, (each, right)

                weights, (each, right) = jax.lax.scan(copy, weights, jnp.arange(copies))
                each = each.max(axis=0)
            return each.mean(), (right.mean(), weights)

        (value, (accuracy, weights)), grads = jax.value_and_grad(objective, has_aux=True)(state.weights.params)
        weights = weights._replace(params=state.weights.params)
        weights, opt = update(tx, grads, state.opt, weights, value, lambda params: objective(params)[0])
        return TrainState(weights, opt, state.step + 1), {"loss": value, "accuracy": accuracy}

    return Method(init, step, label_check(model, augment), functools.partial(result, eval_params=eval_params))


def _meet(augment, adversary, mix, loss, key, weights, batch) -> tuple[Array, Callable[[Array], Array]]:
    """The images as the learner meets them, and how the loss of their logits is made."""
    x = batch.x if augment is None else augment(key, batch.x)
    if adversary is not None:
        x = adversary(keys.named(key, "adversary"), weights, batch._replace(x=x))
    if mix is None:
        return x, lambda logits: loss(logits, batch.y)
    x, partner, own = mix(keys.named(key, "mix"), x)
    return x, lambda logits: own * loss(logits, batch.y) + (1 - own) * loss(logits, batch.y[partner])


def weight_noise(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    sigmas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25),
    draws: int = 100,
    loss: Loss = losses.cross_entropy,
) -> Method:
    """Training under Gaussian weight noise of a rising scale: the surrogate of PUE, Wang et al. 2025.

    A step takes one optimiser step for each of the `sigmas`, in order, with the mean gradient of `draws` noisy networks
    divided by the number of levels, as published. Noise touches the params only; the batch statistics are those of the
    noisy networks, so that they end near the ones of the largest sigma. The published code clips the gradient while it
    accumulates; here `tx` sees the mean. State and info as those of `sgd`.
    """
    require(draws >= 1 and sigmas, "weight noise needs at least one level and one draw of each")
    require(all(sigma >= 0 for sigma in sigmas), f"sigmas must not be negative, got {sigmas}")

    def init(key: Key, x: Array) -> TrainState:
        return start(tx, model.init(key, x))

    def step(key: Key, state: TrainState, batch: Dataset) -> tuple[TrainState, dict[str, Array]]:
        def level(current, job):
            number, sigma = job

            def draw(carry, s):
                total, stats = carry
                to_noise, to_fit = jax.random.split(keys.at(keys.at(key, number), s))
                noisy = tree.add(current.weights.params, tree.gaussian_like(to_noise, current.weights.params, sigma))

                def objective(params):
                    logits, weights = model.fit(Weights(params, stats), batch.x, to_fit)
                    return loss(logits, batch.y).mean(), (weights.stats, losses.correct(logits, batch.y).mean())

                (value, (stats, right)), grads = jax.value_and_grad(objective, has_aux=True)(noisy)
                return (tree.add(total, grads), stats), (value, right)

            begin = (jax.tree.map(jnp.zeros_like, tree.widened(current.weights.params)), current.weights.stats)
            (total, stats), (values, right) = jax.lax.scan(draw, begin, jnp.arange(draws))
            mean = jax.tree.map(lambda g: g / (draws * len(sigmas)), total)
            grads = jax.tree.map(lambda g, p: g.astype(p.dtype), mean, current.weights.params)
            weights, opt = update(tx, grads, current.opt, current.weights._replace(stats=stats))
            return TrainState(weights, opt, current.step), (values.mean(), right.mean())

        levels = (jnp.arange(len(sigmas)), jnp.asarray(sigmas, jnp.float32))
        state, (values, right) = jax.lax.scan(level, state, levels)
        return state._replace(step=state.step + 1), {"loss": values.mean(), "accuracy": right.mean()}

    return Method(init, step, label_check(model, None))


def start(tx: optax.GradientTransformation, weights: Weights, eval_params: EvalParams | None = None) -> TrainState:
    """The state that continues from given weights with a fresh optimiser; BadInput for weights that are no arrays."""
    return TrainState(weights, begun(tx, weights, eval_params), jnp.zeros((), jnp.int32))


def begun(tx: optax.GradientTransformation, weights: Weights, eval_params: EvalParams | None = None) -> Any:
    """The state of a fresh optimizer; BadInput for weights that are no arrays.

    Warns where the optimizer keeps the params to use in its state and nothing is said about them (`result`).
    """
    tree.check_arrays(weights, "weights")
    opt = tx.init(weights.params)
    if eval_params is None:
        _warn_of_averages(opt)
    return opt


def label_check(model: Model, augment: Augment | None) -> Callable[[Any, Dataset], None]:
    """`check(state, data)`: BadInput for labels that the network has no outputs for, or that are negative."""

    @jax.jit  # for its cache of traces; nothing is computed
    def outputs(weights: Weights, x: Array) -> Array:
        return model.apply(weights, x if augment is None else augment(jax.random.key(0), x))

    def check(state: Any, data: Dataset) -> None:
        if data.y is not None and not isinstance(data.y, jax.core.Tracer):
            dtype = jnp.float32 if data.x.dtype == jnp.uint8 else data.x.dtype
            x = jax.ShapeDtypeStruct((1, *data.x.shape[1:]), dtype)
            sets.check_labels(data.y, outputs.eval_shape(state.weights, x).shape[-1])

    return check
