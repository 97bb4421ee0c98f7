"""Published perturbations as recipes over the bi-level engine."""

import jax
import jax.numpy as jnp
import optax

from dememo_jax import losses, projected, train
from dememo_jax.errors import require
from dememo_jax.protect import bilevel
from dememo_jax.types import Method, Model


def error_minimizing(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    radius: float,
    stride: float,
    classes: int = 10,
    granularity: str = "sample",
    learner_steps: int = 10,
    inner_steps: int | None = None,
    batch: int = 512,
) -> Method:
    """Error-minimizing noise, sample-wise (UE-s) or class-wise (UE-c): Huang et al. 2021.

    min over theta, min over delta with |delta|_inf <= radius of E CE(f_theta(x + delta), y), alternating
    `learner_steps` batches of SGD with one pass of sign descent over the data (`inner_steps` an image: 20 sample-wise,
    1 class-wise, as published). Defaults are the published ones for CIFAR-10 where `radius=8/255, stride=0.8/255`,
    tx = SGD 0.1, momentum 0.9, weight decay 5e-4, gradient norm clipped at 5.

    init(key, data, mask=None), step(key, state, whole_data): see `bilevel.alternate`. Stop at `error` <= 0.01 with a
    ceiling on the steps: with some surrogates the published loop never ends.

    Differences from the published code: learner batches are clipped to [0, 1] as the released images are; class-wise
    noise is learned from all of the data rather than a fifth, and single images' boxes do not shrink it; the noise
    keeps its sign when it is applied.
    Raises BadInput for a radius or stride that is not positive.
    """
    require(radius > 0, f"the budget (radius) must be positive, got {radius}")
    require(stride > 0, f"stride must be positive, got {stride}")
    require(granularity in ("sample", "class"), f"granularity must be 'sample' or 'class', got {granularity!r}")
    inner = (20 if granularity == "sample" else 1) if inner_steps is None else inner_steps
    ball = projected.linf(radius)

    def refine(key, weights, examples, noise):
        def gradient(_, delta):
            def loss(images):
                return losses.cross_entropy(model.apply(weights, images), examples.y).sum()

            return jax.grad(loss)(jnp.clip(examples.x + delta, 0.0, 1.0))  # passed straight through the clip

        def project(delta):
            delta = ball(delta)  # noise of one image stays in its box; noise of a class has no one box to stay in
            return jnp.clip(examples.x + delta, 0.0, 1.0) - examples.x if granularity == "sample" else delta

        return projected.search(key, noise, gradient, stride=stride, steps=inner, project=project)

    learner = train.sgd(model, tx)
    return bilevel.alternate(
        model, learner, refine, granularity=granularity, classes=classes, learner_steps=learner_steps, batch=batch
    )
