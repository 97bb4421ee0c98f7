"""Error-minimizing noise and what grew from it: UE, EM, GrayAug, AUE, REM, SEM.

A learner and the noise descend the same loss in turn, so that the images look learned before they are. In every recipe:
`init(key, data, mask=None)`, `step(key, state, data)` with the whole set, `steps` and `stop`; budgets and strides are in
pixels of [0, 1]; `tx` is an optax transform or a function of the number of steps that makes one; `sharpness` adds SAPA's
worst-case weights. Learner batches are clipped to [0, 1], as the released images are, where some published codes do not.
All raise BadInput for a budget outside (0, 1], a stride that is not positive, and labels beyond `classes`.
"""

from functools import partial

from dememo_jax import augment as augments
from dememo_jax import projected, train
from dememo_jax.protect import objectives, refine
from dememo_jax.protect.bilevel import Granularity, Phase, Recipe, alternate
from dememo_jax.train import Optimiser
from dememo_jax.types import Model

SGD = train.clipped_sgd(0.1, 0.9, 5e-4)
DROPPING_SGD = partial(train.dropping_sgd, 0.1, 0.9, 5e-4, (0.4, 0.8), False)
COSINE_SGD = partial(train.clipped_sgd, 0.1, 0.9, 1e-4)


def error_minimizing(
    model: Model,
    tx: Optimiser = SGD,
    *,
    radius: float = 8 / 255,
    stride: float | None = None,
    classes: int = 10,
    granularity: Granularity = "sample",
    learner_steps: int = 10,
    inner_steps: int | None = None,
    batch: int = 512,
    passes: int = 50,
    stop: float | None = 0.01,
    portion: float = 1.0,
    gray: bool = False,
    sharpness: float = 0.0,
) -> Recipe:
    """Error-minimizing noise, sample-wise (UE-s) or class-wise (UE-c): Huang et al. 2021.

    min over theta, min over delta with |delta|_inf <= radius of E CE(f_theta(x + delta), y), alternating
    `learner_steps` batches of SGD with one pass of sign descent over the data (`inner_steps` an image: 20 sample-wise,
    1 class-wise, as published), until the training error is at most `stop`, `passes` times at most: with some surrogates
    the published loop, which has no ceiling, never ends. The stride is a tenth of the radius, as published.

    gray: one channel of noise against a surrogate that sees grey images (GrayAug: Liu et al. 2021), which survives
    grayscaling; the published step adds up the three channels' signs, which agree, so the stride is three times as long.

    Differences from the published code: class-wise noise is learned from all of the data rather than a fifth (that is
    `portion=0.2`), and single images' boxes do not shrink it; the noise keeps its sign when it is applied.
    """
    stride = radius * (0.3 if gray else 0.1) if stride is None else stride
    inner = (20 if granularity == "sample" else 1) if inner_steps is None else inner_steps
    look = augments.grayscale() if gray else None
    improve = refine.descent(
        objectives.minimizing(model),
        projected.linf(radius),
        stride=stride,
        steps=inner,
        view=None if look is None else refine.augmented(look),
        sharpness=sharpness,
        box=granularity == "sample" and not gray,
    )
    return alternate(
        model,
        lambda steps: train.sgd(model, train.optimiser(tx, steps), augment=look),
        improve,
        phases=(Phase(passes, learner_steps),),
        batch=batch,
        granularity=granularity,
        classes=classes,
        stop=stop,
        portion=portion,
        shape=(lambda image: (*image[:-1], 1)) if gray else tuple,
    )


def minimizing_online(
    model: Model,
    tx: Optimiser = DROPPING_SGD,
    *,
    radius: float = 8 / 255,
    stride: float | None = None,
    classes: int = 10,
    learner_steps: int = 5000,
    inner_steps: int = 10,
    batch: int = 128,
    iterations: int = 50,
    sharpness: float = 0.0,
) -> Recipe:
    """Error-minimizing noise batch by batch (EM), as the code of Fu et al. 2022 makes it: cheaper and stronger than UE-s.

    Each of the learner's `learner_steps` batches gets fresh noise first, `inner_steps` of sign descent with a stride of a
    fifth of the radius from a random start, and is then learned; at last, one pass makes the noise of all data. The
    learner's rate falls tenfold at 2,000 and 4,000 of 5,000 steps. `iterations` only says how often the state is seen.

    Differs from the published code where pixels are black or white: it clamps images inside the gradient, which is zero
    there, and keeps noise beyond [0, 1]; here the gradient passes and noise stays inside (`refine`). Ten steps on images that
    touch 0 or 1 moved 8 of 6,144 entries otherwise, on others none.
    """
    improve = refine.descent(
        objectives.minimizing(model),
        projected.linf(radius),
        stride=radius / 5 if stride is None else stride,
        steps=inner_steps,
        start="random",
        sharpness=sharpness,
    )
    return alternate(
        model,
        lambda steps: train.sgd(model, train.optimiser(tx, steps)),
        improve,
        phases=online(learner_steps, iterations),
        batch=batch,
        classes=classes,
    )


def robust(
    model: Model,
    tx: Optimiser = DROPPING_SGD,
    *,
    radius: float = 8 / 255,
    attack: float = 4 / 255,
    stable: bool = False,
    classes: int = 10,
    learner_steps: int = 5000,
    inner_steps: int = 10,
    draws: int = 5,
    attack_steps: int = 10,
    batch: int = 128,
    iterations: int = 50,
    sharpness: float = 0.0,
) -> Recipe:
    """Noise that adversarial training does not remove: REM (Fu et al. 2022), or with `stable` SEM (Liu et al. 2024).

    min over theta, min over du, E over t, max over |da| <= attack of CE(f(t(x + du) + da), y), with t a random crop and
    flip: each batch's du is refined in `inner_steps` of stride radius/5 from a random start, a gradient being the mean
    over `draws` of t and of the adversary's `attack_steps` of stride attack/5; then the learner takes a step on t(x + du)
    and an adversary of its own. At last one pass makes the noise of all data. SEM's da, for the noise, is one uniform
    draw: nine times cheaper. (APBench's "rem" is another algorithm, without expectation and adversarial learner.)
    At the edges of [0, 1] it differs from the published code as `minimizing_online` does (17 of 6,144 entries).
    """
    t = augments.compose(augments.crop(4), augments.flip())
    ball = projected.linf(attack)
    search = partial(train.adversary, model, ball, stride=attack / 5)
    against = search(steps=0 if stable else attack_steps)
    improve = refine.descent(
        objectives.minimizing(model),
        projected.linf(radius),
        stride=radius / 5,
        steps=inner_steps,
        start="random",
        view=refine.then(refine.augmented(t), against),
        draws=draws,
        sharpness=sharpness,
    )
    return alternate(
        model,
        lambda steps: train.sgd(model, train.optimiser(tx, steps), augment=t, adversary=search(steps=attack_steps)),
        improve,
        phases=online(learner_steps, iterations),
        batch=batch,
        classes=classes,
    )


def augmented_minimizing(
    model: Model,
    tx: Optimiser = COSINE_SGD,
    *,
    radius: float = 8 / 255,
    strength: float = 0.6,
    classes: int = 10,
    granularity: Granularity = "sample",
    inner_steps: int | None = None,
    batch: int = 128,
    passes: int = 60,
    sharpness: float = 0.0,
) -> Recipe:
    """Error-minimizing noise under contrastive augmentation (AUE: Wang et al. 2024), against contrastive learners too.

    `passes` times an epoch of the learner, whose rate falls by a cosine, and a pass of `inner_steps` (5 sample-wise, 1
    class-wise) of stride radius/10; both see strongly augmented images, `strength` 0.6 on CIFAR-10 and 1.0 on CIFAR-100.
    """
    strong = augments.strong(strength)
    improve = refine.descent(
        objectives.minimizing(model),
        projected.linf(radius),
        stride=radius / 10,
        steps=(5 if granularity == "sample" else 1) if inner_steps is None else inner_steps,
        view=refine.augmented(strong),
        sharpness=sharpness,
        box=granularity == "sample",
    )
    return alternate(
        model,
        lambda steps: train.sgd(model, train.optimiser(tx, steps), augment=strong),
        improve,
        phases=(Phase(passes, epochs=1.0),),
        batch=batch,
        granularity=granularity,
        classes=classes,
    )


def online(learner_steps: int, iterations: int) -> tuple[Phase, ...]:
    """Learning on batches that are refined as they come, in about `iterations` parts, then one pass for the noise of all."""
    each, more = divmod(learner_steps, min(iterations, learner_steps))
    sizes = {each + 1: more, each: min(iterations, learner_steps) - more}
    return *(Phase(n, size, sees="refined", sweep=False) for size, n in sizes.items() if n), Phase(1)
