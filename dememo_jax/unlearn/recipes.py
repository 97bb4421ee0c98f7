"""The published approximate methods, as recipes over one descent.

Each takes a Model and an optax transform; without one, the published optimiser at its published rate. Rates do not carry
over: between data sets, networks and forget sets the useful ones differ by orders of magnitude, and a method run at a rate
that does not suit it says nothing about the method. Epochs are passes over the retain set, for methods that see only the
forget set over that. `batch`, `mode` (of batch norm) and `augment` are those of `descent`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from dememo_jax import losses
from dememo_jax.augment import Augment
from dememo_jax.errors import require
from dememo_jax.types import Array, Loss, Model, Params
from dememo_jax.unlearn import masks
from dememo_jax.unlearn.descent import FRESH, GIVEN, Progress, Stage, Term, Unlearner, descent

Transform: TypeAlias = optax.GradientTransformation | None


@functools.lru_cache
def published_sgd(lr: float) -> optax.GradientTransformation:
    """SGD with momentum 0.9 and weight decay 5e-4 at a constant rate, as the published codes have it."""
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(lr, momentum=0.9))


# --- exact, and the simplest -------------------------------------------------------------------------------------


def retrain(
    model: Model, tx: Transform = None, *, nll: Loss = losses.cross_entropy, batch: int = 256, augment: Augment | None = None
) -> Unlearner:
    """Exact unlearning: fresh weights, trained on the retain set alone. The reference of every other method.

    nll: the loss, here and below; `losses.label_nll` for a language model's answers (`likelihood.of_labels`).

    Published for CIFAR-10 (Unlearn-Sparse): 160 epochs of SGD at 0.1, falling tenfold at 91 and 136, batch 256.
    """
    return descent(model, tx or published_sgd(0.1), Term("retain", 1.0, nll), batch=batch, augment=augment, fresh=True)


def finetune(
    model: Model, tx: Transform = None, *, nll: Loss = losses.cross_entropy, batch: int = 256, mode: str = "fit",
    augment: Augment | None = None,
) -> Unlearner:  # fmt: skip
    """Descend on the retain set from the trained weights, with a fresh optimiser.

    Published for CIFAR-10: 10 epochs, SGD at a constant 0.01 (SoK Table 9: 0.015 or 0.03 at class level), momentum
    0.9, weight decay 5e-4, batch 256, batch norm updated, the training augmentation on.
    """
    return descent(model, tx or published_sgd(0.01), Term("retain", 1.0, nll), batch=batch, mode=mode, augment=augment)


def gradient_ascent(
    model: Model, tx: Transform = None, *, nll: Loss = losses.cross_entropy, batch: int = 256, mode: str = "fit",
    augment: Augment | None = None,
) -> Unlearner:  # fmt: skip
    """Climb the loss of the forget set. Nothing holds the rest in place: the learning rate decides everything.

    Published for CIFAR-10: 5 epochs over the forget set, SGD at 1e-5 to 2e-4, momentum 0.9, weight decay 5e-4 (which
    still descends), batch 256, batch norm updated on the forget set, the training augmentation on.
    """
    return descent(model, tx or published_sgd(1e-4), Term("forget", -1.0, nll), batch=batch, mode=mode, augment=augment)


def negative_gradient(
    model: Model, tx: Transform = None, *, retain: float = 0.9, batch: int = 256, mode: str = "fit",
    augment: Augment | None = None,
) -> Unlearner:  # fmt: skip
    """NegGrad+: `retain` times the loss of a retain batch less (1 - retain) times that of a forget batch, in every step.

    Kurmanji et al. 2023. Epochs go over the retain set, the forget set cycles. Tuned, it is the line to beat. Used values:
    10 epochs at 5e-4 with 0.9 (RULI), 5 epochs at 0.01 (RUM).
    """
    require(0 < retain < 1, f"retain is the share of the retain loss, in (0, 1); got {retain}")
    terms = Term("retain", retain), Term("forget", retain - 1)
    return descent(model, tx or published_sgd(0.01), *terms, batch=batch, mode=mode, augment=augment)


def l1_sparse(
    model: Model, tx: Transform = None, *, strength: float = 5e-4, steps: int, batch: int = 256, mode: str = "fit",
    augment: Augment | None = None,
) -> Unlearner:  # fmt: skip
    """Fine-tuning with `strength` times the l1 norm of all parameters, falling linearly to zero over `steps`: Jia et al. 2023.

    Published: 10 epochs at 0.01; strengths from 1e-6 to 1e-3 are searched.
    """
    require(strength > 0 and steps >= 1, f"strength and steps must be positive, got {strength} and {steps}")

    def penalty(params: Params, step: Array) -> Array:
        return strength * jnp.maximum(0.0, 1 - step / steps) * optax.tree.norm(params, ord=1)

    tx = tx or published_sgd(0.01)
    return descent(model, tx, Term("retain"), batch=batch, mode=mode, augment=augment, penalty=penalty)


# --- the last layers ------------------------------------------------------------------------------------------------


def catastrophic_forgetting(
    model: Model, tx: Transform = None, *, layers: int = 1, batch: int = 256, mode: str = "fit", augment: Augment | None = None
) -> Unlearner:
    """CF-k: fine-tune the last `layers` on the retain set and leave the rest as it is. Goel et al. 2022.

    Batch-norm statistics follow `mode` in all layers.
    """
    tx, free = tx or published_sgd(0.01), masks.last_layers(model, layers)
    return descent(model, tx, Term("retain"), batch=batch, mode=mode, augment=augment, trainable=free)


def exact_last_layers(
    model: Model, tx: Transform = None, *, layers: int = 1, batch: int = 256, mode: str = "fit", augment: Augment | None = None
) -> Unlearner:
    """EU-k: train the last `layers` anew on the retain set and leave the rest as it is. Goel et al. 2022.

    Exact for those layers only: the others still know what they knew.
    """
    tx, free = tx or published_sgd(0.1), masks.last_layers(model, layers)
    return descent(model, tx, Term("retain"), batch=batch, mode=mode, augment=augment, trainable=free, fresh=True)


# --- preference, labels, teachers --------------------------------------------------------------------------------


def npo(
    model: Model, tx: Transform = None, *, beta: float = 0.1, retain: float = 1.0, hold: str = "nll",
    nll: Loss = losses.cross_entropy, lengths: Sequence[int] | None = None, batch: int = 256, mode: str = "fit",
    augment: Augment | None = None,
) -> Unlearner:  # fmt: skip
    """Negative preference optimisation, Zhang et al. 2024: gradient ascent that stops by itself.

    The forget loss is `-(2 / beta) log sigmoid(beta (nll - nll of the given weights))`. `retain` weighs what holds the rest:
    the retain set's own nll (`hold="nll"`) or the divergence from the given weights (`"kl"`); with 0 there is none, and
    epochs go over the forget set. For language models pass `nll=losses.sequence_nll`, the sum over tokens; logits are then
    [B, T, V] and labels [B, T]. The forget loss is of whole answers; what holds the rest is a mean over the tokens of a batch,
    as published (`losses.token_mean`; the published KL counts the tokens of prompt and padding too). `lengths` [K], the tokens
    of the labels with `losses.label_nll`, as `simnpo`; without them a label counts as one token.
    Published (TOFU): beta 0.1, 10 epochs of AdamW at 1e-5; without a transform, `optax.adamw(1e-5, weight_decay=0.01)`
    for sequences and the published SGD at 0.01 for classifiers, which the paper does not treat.
    """
    require(beta > 0 and retain >= 0, f"beta must be positive and retain not negative, got {beta} and {retain}")
    require(hold in ("nll", "kl"), f"hold must be 'nll' or 'kl', got {hold!r}")

    def preference(logits: Array, labels: Array, given: Array) -> Array:
        return 2 / beta * jax.nn.softplus(-beta * (nll(logits, labels) - nll(given, labels)))

    def divergence(logits: Array, labels: Array, given: Array) -> Array:
        found = losses.distillation()(logits, labels, given)
        if found.ndim == 1:
            return found
        return losses.token_mean(lambda found, labels: jnp.where(labels >= 0, found, 0.0).sum(axis=-1))(found, labels)

    own = losses.token_mean(nll, lengths)
    held = Term("retain", retain, own) if hold == "nll" else Term("retain", retain, divergence, GIVEN)
    terms = (Term("forget", 1.0, preference, GIVEN), *((held,) if retain else ()))
    return descent(model, tx or _published_preference(nll), *terms, batch=batch, mode=mode, augment=augment)


def simnpo(
    model: Model, tx: Transform = None, *, beta: float = 4.5, gamma: float = 0.0, forget: float = 0.125, retain: float = 1.0,
    nll: Loss = losses.cross_entropy, lengths: Sequence[int] | None = None, batch: int = 256, mode: str = "fit",
    augment: Augment | None = None,
) -> Unlearner:  # fmt: skip
    """SimNPO, Fan et al. 2024 (arXiv 2410.07163): NPO of the nll per token, without the given weights to compare it with.

    The forget loss is `-(2 / beta) log sigmoid(beta nll / |y| - gamma)`, whose pull fades where a token has become unlikely,
    however long the answer and however well the given model knew it. |y| is the number of tokens (`losses.per_token`): the
    labels [B, T] that count with `nll=losses.sequence_nll`; the `lengths` [K] of the labels' tokens with `losses.label_nll`;
    one for classifiers. For beta to 0 (and gamma 0) it is gradient ascent on nll / |y|, less a constant. Without a teacher the
    weights are held once, not twice.
    `forget` weighs it, `retain` the nll per token of the retain set, here the mean over answers (published: over all tokens of
    a batch); with retain 0 there is none, and epochs go over the forget set.
    Published (TOFU, Llama-2 7B): AdamW at 1e-5, gamma 0; beta 4.5 and forget 0.125 where 10 % are forgotten, the defaults here
    and in OpenUnlearning; beta 2.5 and forget 0.1375 where 5 % are. The codes' margin is inside beta: theirs is gamma / beta.
    Without a transform as `npo`.
    """
    positive = beta > 0 and forget > 0 and retain >= 0
    require(positive, f"beta and forget must be positive and retain not negative, got {beta}, {forget} and {retain}")
    each = losses.per_token(nll, lengths)

    def preference(logits: Array, labels: Array) -> Array:
        return 2 / beta * jax.nn.softplus(gamma - beta * each(logits, labels))

    terms = (Term("forget", forget, preference), *((Term("retain", retain, each),) if retain else ()))
    return descent(model, tx or _published_preference(nll), *terms, batch=batch, mode=mode, augment=augment)


def _published_preference(nll: Loss) -> optax.GradientTransformation:
    return published_sgd(0.01) if nll is losses.cross_entropy else optax.adamw(1e-5, weight_decay=0.01)


def random_labels(
    model: Model, tx: Transform = None, *, classes: int | None = None, wrong: bool = False, batch: int = 256, mode: str = "fit",
    augment: Augment | None = None, trainable: Callable | None = None,
) -> Unlearner:  # fmt: skip
    """Learn random labels on the forget set, then the retain set's own, epoch by epoch.

    The labels are drawn anew at every batch, from all classes, so some are true by chance (published, Unlearn-Saliency);
    `wrong=True` draws from the others only ("amnesiac"). classes: by default as many as the model has outputs.
    Published: 10 epochs, rates from 1e-3 to 1e-1.
    """
    require(classes is None or classes >= 2, f"random labels need at least two classes, got {classes}")

    def relabel(key, given, batch):
        count = jax.eval_shape(model.apply, given, batch.x).shape[-1] if classes is None else classes
        if not wrong:
            return jax.random.randint(key, batch.y.shape, 0, count)
        return (batch.y + jax.random.randint(key, batch.y.shape, 1, count)) % count

    stages = Stage((Term("forget", relabel=relabel),), "forget"), Stage((Term("retain"),))
    tx = tx or published_sgd(0.01)
    return descent(model, tx, *stages, batch=batch, mode=mode, augment=augment, trainable=trainable)


def salun(
    model: Model, tx: Transform = None, *, classes: int | None = None, share: float = 0.5, wrong: bool = False,
    batch: int = 256, mode: str = "fit", augment: Augment | None = None,
) -> Unlearner:  # fmt: skip
    """Random labels, learned by the `share` of weights that matter most to the forget set alone: Fan et al. 2024.

    Salience is the size of the summed gradient over the forget set, in evaluation mode. Updates are masked, not gradients,
    so that weight decay and momentum cannot move the others; the published code did that only from 2026 on. Published:
    half of the weights, 10 epochs at 0.013.
    """
    tx = tx or published_sgd(0.013)
    return random_labels(
        model, tx, classes=classes, wrong=wrong, batch=batch, mode=mode, augment=augment,
        trainable=masks.salient(model, share),
    )  # fmt: skip


def scrub(
    model: Model, tx: Transform = None, *, forget_rounds: int = 3, gamma: float = 1.0, alpha: float = 0.5,
    temperature: float = 2.0, batches: tuple[int, int] = (64, 32), mode: str = "fit", augment: Augment | None = None,
) -> Unlearner:  # fmt: skip
    """Disobey the teacher on the forget set, obey it on the rest: Kurmanji et al. 2023.

    In each of the first `forget_rounds` epochs a pass over the forget set that maximises KL(given | student), and in every
    epoch one over the retain set that minimises gamma cross-entropy + alpha KL. `batches`: of the forget and the retain
    set. `rewind` picks the epoch whose forget error is that of held-out examples. Published: 10 epochs of Adam
    at 5e-4, falling tenfold at epochs 5, 8 and 9, weight decay 0.1 (here constant, decay 5e-4 by AdamW without a transform).
    The first forget pass begins where student and teacher agree, and the gradient of their divergence is zero: only batch
    norm in training mode, dropout or augmentation move it from there before the first retain pass.
    """
    apart = losses.distillation(temperature)

    def obey(logits, labels, given):
        return gamma * losses.cross_entropy(logits, labels) + alpha * apart(logits, labels, given)

    away = Stage((Term("forget", -1.0, apart, GIVEN, batch=batches[0]),), "forget", rounds=forget_rounds)
    back = Stage((Term("retain", 1.0, obey, GIVEN, batch=batches[1]),))
    return descent(model, tx or optax.adamw(5e-4, weight_decay=5e-4), away, back, mode=mode, augment=augment)


def bad_teacher(
    model: Model, tx: Transform = None, *, share: float = 0.3, temperature: float = 1.0, batch: int = 256, mode: str = "fit",
    augment: Augment | None = None,
) -> Unlearner:  # fmt: skip
    """Imitate a random network on the forget set and the given one on a `share` of the rest: Chundawat et al. 2023.

    The two divergences are weighted by how many examples each side has, as mixed batches would; each step sees a batch of
    both. Published: 1 epoch of Adam at 1e-4, 30 % of the retain set, batch 256. The published code takes the mean over
    examples and classes, so that its loss is K times smaller (K classes): nothing to Adam, but a rate published for SGD is
    K times too large here.
    """
    require(0 < share <= 1, f"share must lie in (0, 1], got {share}")
    apart = losses.distillation(temperature, scale=1.0)

    def of_forget(now: Progress) -> Array:
        return now.forget / (now.forget + share * now.retain)

    terms = Term("forget", of_forget, apart, FRESH), Term("retain", lambda now: 1 - of_forget(now), apart, GIVEN)
    return descent(model, tx or optax.adam(1e-4), Stage(terms, share=share), batch=batch, mode=mode, augment=augment)
