"""Per-example losses and margins: logits [B, K], labels [B] -> [B]."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dememo_jax.errors import require
from dememo_jax.types import Array, Loss


def _of_label(values: Array, labels: Array) -> Array:
    return jnp.take_along_axis(values, labels[..., None], axis=-1)[..., 0]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-log softmax(logits)[label], in nats."""
    return jax.nn.logsumexp(logits, axis=-1) - _of_label(logits, labels)


def correct(logits: Array, labels: Array) -> Array:
    """1.0 where the largest logit is the label's, else 0.0; the first of equal logits wins, NaN is never right."""
    # On CPU an argmax is a slow scalar loop; whether any class stands before the label is one comparison and one reduction.
    # The label's own place is left out: a compiler may compute a logit twice, and round it otherwise the second time.
    own, place, label = _of_label(logits, labels)[..., None], jnp.arange(logits.shape[-1]), labels[..., None]
    before = jnp.where(place < label, ~(logits < own), ~(logits <= own)) & (place != label)
    return 1.0 - (before.any(axis=-1) | jnp.isnan(own[..., 0])).astype(jnp.float32)


def margin(logits: Array, labels: Array) -> Array:
    """log p_y - log(1 - p_y) without overflow: the label's logit less the logsumexp of all others."""
    others = jnp.where(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), -jnp.inf, logits)
    return _of_label(logits, labels) - jax.nn.logsumexp(others, axis=-1)


def entropy(logits: Array, labels: Array | None = None) -> Array:
    """Entropy of softmax(logits) in nats; labels are not looked at."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    return -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)  # 0 log 0 = 0


def modified_entropy(logits: Array, labels: Array) -> Array:
    """`-(1 - p_y) log p_y - sum_{i != y} p_i log(1 - p_i)` in nats, Song and Mittal 2021: small for a sure and right answer.

    (The code that the SoK's scores come from writes another expression into all columns.)
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    first = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
    # 1 - p rounds to nothing for the first class alone, whose others are summed instead.
    rest = jax.nn.logsumexp(jnp.where(first, -jnp.inf, log_p), axis=-1, keepdims=True)
    log_p = jnp.where(first, jnp.log1p(-jnp.exp(rest)), log_p)  # its own digits are lost where it is sure
    log_not = jnp.where(first, rest, jnp.log1p(-jnp.where(first, 0.0, jnp.exp(log_p))))
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    weighted = jnp.where(own, jnp.exp(log_not) * log_p, jnp.exp(log_p) * log_not)
    return -weighted.sum(axis=-1)


# --- of sequences, and against a teacher -------------------------------------------------------------------------


def label_nll(likelihoods: Array, labels: Array) -> Array:
    """-log p(label | text) in nats, [B], where [B, K] holds log-likelihoods already (`likelihood.of_labels`)."""
    return -_of_label(likelihoods, labels)


def sequence_nll(logits: Array, labels: Array) -> Array:
    """-log p of whole sequences in nats, [B]: logits [B, T, V] and labels [B, T], of which negative ones do not count."""
    each = cross_entropy(logits, jnp.maximum(labels, 0))
    return jnp.where(labels >= 0, each, 0.0).sum(axis=-1)


def per_token(nll: Loss, lengths: Sequence[int] | None = None) -> Loss:
    """`nll` over the number of tokens of each answer, [B]: for `label_nll` the `lengths` of the labels' tokens, [K]; for
    `sequence_nll` the labels that count, one where none does; for classifiers one.

    BadInput for a length below one, and, when called, for lengths where labels are sequences.
    """
    _check_lengths(lengths)

    def mean(logits: Array, labels: Array) -> Array:
        return nll(logits, labels) / jnp.maximum(_tokens(labels, lengths), 1)

    return mean


def token_mean(nll: Loss, lengths: Sequence[int] | None = None) -> Loss:
    """`nll` on the scale of a language model's loss: its mean over a batch is the sum over all tokens by their number.

    Long answers weigh more than in `per_token`, whose arguments and errors these are. Values [B] depend on the batch;
    of classifiers they are those of `nll`.
    """
    _check_lengths(lengths)

    def shared(logits: Array, labels: Array) -> Array:
        count = jnp.asarray(_tokens(labels, lengths), jnp.float32)
        return nll(logits, labels) / jnp.maximum(jnp.broadcast_to(count, labels.shape[:1]).mean(), 1 / len(labels))

    return shared


def _check_lengths(lengths: Sequence[int] | None) -> None:
    require(lengths is None or min(lengths, default=0) >= 1, f"every label needs a token at least, got lengths {lengths}")


def _tokens(labels: Array, lengths: Sequence[int] | None) -> Array | int:
    """How many tokens each answer has: [B], or one number for all."""
    if lengths is not None:
        require(labels.ndim == 1, f"lengths belong to labels [B], got labels of shape {list(labels.shape)}")
        return jnp.asarray(lengths)[labels]
    return 1 if labels.ndim == 1 else (labels >= 0).sum(axis=-1)


def distillation(temperature: float = 1.0, scale: float | None = None):
    """loss(logits, labels, teacher's logits) -> [B]: KL(teacher | student) of the softened predictions, times T^2.

    scale: another factor than the squared temperature. Labels are not looked at.
    """
    require(temperature > 0, f"temperature must be positive, got {temperature}")
    factor = temperature**2 if scale is None else scale

    def divergence(logits: Array, labels: Array, teacher: Array) -> Array:
        log_p, log_q = (jax.nn.log_softmax(z / temperature, axis=-1) for z in (teacher, logits))
        return factor * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    return divergence
