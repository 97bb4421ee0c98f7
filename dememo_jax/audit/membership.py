"""Membership inference on the outputs of one model: the SoK's three attacks; signals and thresholds that have a ROC."""

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import bounds, losses, values
from dememo_jax.errors import require


def membership_scores(member, nonmember, target) -> dict[str, float]:
    """The SoK's three attacks: the share of the target set that a classifier calls members, in [0, 1].

    member = (logits [A, K], labels [A]) of retained training data as the model saw it, nonmember the same of test
    data, target the same of the set in question. On each of three features of the softmax output p an RBF support
    vector machine (C = 3, gamma = 1 / features, as in the code behind the SoK's Tables 18-25) learns member against
    nonmember on equally many of both, the first of each:
    `correctness` 1[argmax p = y], `probability` the whole vector p, `entropy` of p.

    These rates have no false-positive control and correctness is close to plain accuracy: only the gap to a model
    retrained without the target means anything (`membership_gap`). Raises BadInput for an empty set.
    """
    from sklearn.svm import SVC  # heavy, and used here alone

    for logits, labels in (member, nonmember, target):
        _paired(logits, labels)
    count = min(len(member[1]), len(nonmember[1]))
    require(count and len(target[1]), "membership scores need at least one member, one nonmember and one target example")
    shadow = [_features(np.asarray(logits)[:count], np.asarray(labels)[:count]) for logits, labels in (member, nonmember)]
    asked = _features(np.asarray(target[0]), np.asarray(target[1]))
    truth = np.repeat([1, 0], count)
    rates = {}
    for name, feature in asked.items():
        attack = SVC(C=3.0, kernel="rbf", gamma="auto").fit(np.concatenate([part[name] for part in shadow]), truth)
        rates[name] = float(attack.predict(feature).mean())
    return rates


def membership_gap(scores: dict[str, float], retrained: dict[str, float]) -> dict[str, float]:
    """Each score less that of the retrained model: above zero it remembers, below zero it over-forgets."""
    return {name: value - retrained[name] for name, value in scores.items()}


# --- one model, per example ----------------------------------------------------------------------------------------


def signals(logits, labels) -> dict[str, np.ndarray]:
    """What a single model's outputs say of each example, name -> [B], larger for members; scores for `bounds.auc`.

    `correctness` 1[argmax p = y]; `confidence` log p_y, which ranks as the (negative) loss does, Yeom et al. 2018;
    `entropy` and `modified entropy` of p, negated: Song and Mittal 2021. Raises BadInput for logits that are not finite.
    """
    found = _signals(*_outputs(logits, labels))
    names = ("correctness", "confidence", "entropy", "modified entropy")
    return {name: np.asarray(values, np.float64) for name, values in zip(names, found)}


def sequence_signals(logits, tokens, *, share: float = 0.2) -> dict[str, np.ndarray]:
    """What a language model's predictions say of each sequence, name -> [B], larger for members; scores for `bounds.auc`.

    logits [B, T, V], each of the token in its place (those of position t - 1 of a decoder that was given the sequence); tokens
    [B, T], of which negative ones do not count (padding, or a question whose answer alone was learned).
    `likelihood`: log p of the sequence, in nats, the negative of `losses.sequence_nll`; `mean likelihood`: of its tokens.
    `min-k`: mean log p of the `share` of tokens, at least one, that are the least likely (Min-K% Prob, Shi et al., ICLR 2024).
    `min-k++`: the same of (log p - mean) / standard deviation, both over the model's own next tokens (Zhang et al., ICLR 2025).
    Raises BadInput for shapes that do not match, a share outside (0, 1], logits that are not finite, tokens beyond V, and a
    sequence in which no token counts.
    """
    logits, tokens = np.asarray(logits), np.asarray(tokens)
    require(
        logits.ndim == 3 and tokens.shape == logits.shape[:2] and np.issubdtype(tokens.dtype, np.integer),
        f"expected logits [B, T, V] and whole numbers [B, T], got {list(logits.shape)}, {tokens.dtype} {list(tokens.shape)}",
    )
    require(0 < share <= 1, f"share must be in (0, 1], got {share}")
    require(np.isfinite(logits).all(), "the logits to audit must be finite")
    require(tokens.max(initial=-1) < logits.shape[-1], f"token {tokens.max()} is beyond the {logits.shape[-1]} of the logits")
    counted = tokens >= 0
    empty = np.flatnonzero(~counted.any(axis=1))
    require(not len(empty), f"no token of sequence {empty[:1].tolist()} counts")
    own, usual = (np.asarray(part, np.float64) for part in _token_signals(jnp.asarray(logits), jnp.maximum(tokens, 0)))
    total = np.where(counted, own, 0.0).sum(axis=1)
    lengths = counted.sum(axis=1)
    few = np.maximum(1, (share * lengths).astype(int))
    return {
        "likelihood": total,
        "mean likelihood": total / lengths,
        "min-k": _least(own, counted, few),
        "min-k++": _least(usual, counted, few),
    }


def class_thresholds(member, nonmember, classes: int) -> dict[str, np.ndarray | None]:
    """For each of the `signals` and each class the threshold that tells known members from non-members best, [K].

    Song and Mittal 2021: it maximises (true-positive + true-negative rate) / 2 among the examples of the class. A class that
    lacks examples of either kind, or whose signals are all equal, gets the threshold of all classes together. A signal that
    is the same for all known examples, as correctness of a model that is always right, has none: None. member and nonmember
    are (logits, labels) of known examples, none of which should be among those that are judged. Raises BadInput for an
    empty set, and as `signals`.
    """
    require(len(member[1]) and len(nonmember[1]), "thresholds need at least one known member and one known non-member")
    known = [(signals(*part), np.asarray(part[1])) for part in (member, nonmember)]
    found: dict[str, np.ndarray | None] = {}
    for name in known[0][0]:
        sides = [(values[name], labels) for values, labels in known]
        usual = _threshold(*(values for values, _ in sides))
        each = [_threshold(*(values[labels == k] for values, labels in sides)) for k in range(classes)]
        found[name] = None if usual is None else np.array([usual if one is None else one for one in each], np.float64)
    return found


def called_members(thresholds: dict[str, np.ndarray | None], target) -> dict[str, np.ndarray | None]:
    """Which examples of target = (logits, labels) each attack of `class_thresholds` calls members, name -> bool [B].

    None for a signal without thresholds.
    """
    labels, values = np.asarray(target[1]), signals(*target)
    return {name: None if at is None else values[name] >= at[labels] for name, at in thresholds.items()}


def _threshold(member: np.ndarray, nonmember: np.ndarray) -> float | None:
    both = np.concatenate([member, nonmember])
    if not (len(member) and len(nonmember)) or np.ptp(both) == 0:
        return None
    false, true, at = bounds.roc(both, np.repeat([True, False], [len(member), len(nonmember)]))
    best = int((true - false).argmax())
    return float(at[best]) if np.isfinite(at[best]) else float(both.max()) + 1.0  # nobody: above all that was seen


def _outputs(logits, labels) -> tuple[jnp.ndarray, jnp.ndarray]:
    logits, labels = _paired(logits, labels)
    require(np.isfinite(logits).all(), "the logits to audit must be finite")
    return jnp.asarray(logits), jnp.asarray(labels, jnp.int32)


def _paired(logits, labels) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, K] and labels [B], which are places among them; BadInput for any others."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    require(logits.ndim == 2, f"logits must be [B, K], got {list(logits.shape)}")
    require(len(logits) == len(labels), f"need one label a row of logits, got {len(logits)} rows and {len(labels)} labels")
    values.check_labels(labels, len(logits), "labels", outputs=logits.shape[1])
    return logits, labels


_softmax = jax.jit(jax.nn.softmax)


@jax.jit
def _signals(logits, labels):
    unlikely = (losses.cross_entropy(logits, labels), losses.entropy(logits), losses.modified_entropy(logits, labels))
    return losses.correct(logits, labels), *(-values for values in unlikely)


@jax.jit
def _token_signals(logits, tokens):
    """log p of each token, and how many standard deviations it lies above what the model expects of its next token."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    own = -losses.cross_entropy(logits.astype(jnp.float32), tokens)
    p = jnp.exp(log_p)
    mean = (p * log_p).sum(axis=-1)
    spread = jnp.sqrt((p * jnp.square(log_p - mean[..., None])).sum(axis=-1))
    return own, (own - mean) / jnp.maximum(spread, 1e-6)  # a model that finds all tokens alike says nothing: 0


def _least(values: np.ndarray, counted: np.ndarray, few: np.ndarray) -> np.ndarray:
    """Mean of the `few` [B] smallest of each row's counted values."""
    ordered = np.sort(np.where(counted, values, np.inf), axis=1)
    taken = np.arange(values.shape[1]) < few[:, None]
    return np.where(taken, ordered, 0.0).sum(axis=1) / few


def _features(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Feature name -> [B, features], from logits [B, K] and labels [B]."""
    found = signals(logits, labels)
    chances = np.asarray(_softmax(jnp.asarray(logits)), np.float64)
    return {"correctness": found["correctness"][:, None], "probability": chances, "entropy": -found["entropy"][:, None]}
