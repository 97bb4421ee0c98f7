"""A language model that answers with a label, as a Model like any other: tokens of a text -> one logit a label."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax.errors import require
from dememo_jax.types import Array, Key, Model, Weights


def of_labels(model: Model, labels: Sequence[Sequence[int]], *, pad: int = 0) -> Model:
    """`x [B, L] -> [B, K]`: the log-likelihood, in nats, with which `model` goes on from text x with each label's tokens.

    model: a decoder, tokens [B, L] -> logits [B, L, V] of the next; those of the last positions, as many as the longest answer
    has tokens, are enough (`Decoder(last=...)`). labels: the tokens of each of K answers, one or more; no
    answer may begin with another one. x: rows filled up with `pad` on the left, so that the answer follows the text.
    Every part of the library takes the result for a classifier: cross entropy over [B, K] compares the answers with each
    other, and `losses.label_nll` is the sequence's own negative log-likelihood among all texts, which language models are
    trained and unlearned by. Answers of one token all cost one pass through the model, longer ones a pass each.
    Raises BadInput for fewer than two answers, an empty one, one that begins with another, or one that holds `pad`; while
    tracing, for a model that gives logits of fewer positions than an answer has tokens.
    """
    require(len(labels) > 1, "expected the tokens of two labels at least")
    answers = [tuple(int(token) for token in label) for label in labels]
    require(all(answers), "a label has no tokens")
    require(not any(pad in answer for answer in answers), f"a label holds the token {pad}, which fills rows up")
    for i, one in enumerate(answers):
        same = [j for j, other in enumerate(answers) if i != j and other[: len(one)] == one]
        require(not same, f"label {same[:1]} begins with label {i}: no text could tell them apart")
    single = all(len(answer) == 1 for answer in answers)

    def scores(run, x: Array) -> Array:
        if single:
            last = jax.nn.log_softmax(run(x)[:, -1].astype(jnp.float32))
            return last[:, jnp.asarray(np.ravel(answers))]
        return jnp.stack([_continued(run, x, answer) for answer in answers], axis=1)

    def apply(weights: Weights, x: Array) -> Array:
        return scores(functools.partial(model.apply, weights), x)

    def fit(weights: Weights, x: Array, key: Key) -> tuple[Array, Weights]:
        kept = [weights]

        def run(tokens: Array) -> Array:
            logits, kept[0] = model.fit(kept[0], tokens, key)
            return logits

        return scores(run, x), kept[0]

    return Model(model.init, apply, fit)


def _continued(run, x: Array, answer: tuple[int, ...]) -> Array:
    """[B] log-likelihood of one answer."""
    found = jax.nn.log_softmax(_along(run, x, answer).astype(jnp.float32))
    return jnp.take_along_axis(found, jnp.asarray(answer)[None, :, None], axis=2)[:, :, 0].sum(axis=1)


def _along(run, x: Array, answer: tuple[int, ...]) -> Array:
    """Logits [B, T, V] of the answer's tokens, each predicted from the text and the tokens before it."""
    known = jnp.broadcast_to(jnp.asarray(answer[:-1], x.dtype), (len(x), len(answer) - 1))
    logits = run(jnp.concatenate([x, known], axis=1))[:, -len(answer) :]
    few = f"the model gives logits of the last {logits.shape[1]} positions, a label has {len(answer)} tokens: raise `last`"
    require(logits.shape[1] == len(answer), few)
    return logits


def generated(model: Model, weights: Weights, x: Array, labels: Sequence[Sequence[int]]) -> Array:
    """[B]: which label the model writes after each text, taking the likeliest token each time; -1 where it writes another.

    Stricter than the largest log-likelihood, which only compares labels with each other. Arguments as `of_labels`.
    """
    answers = [tuple(int(token) for token in label) for label in labels]
    found = jnp.full(len(x), -1)
    for number, answer in enumerate(answers):
        logits = _along(functools.partial(model.apply, weights), x, answer)
        found = jnp.where((logits.argmax(axis=-1) == jnp.asarray(answer)).all(axis=1), number, found)
    return found
