"""Membership inference on the outputs of one model."""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.svm import SVC

from dememo_jax import losses
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
    for logits, labels in (member, nonmember, target):
        require(len(logits) == len(labels), f"need one label a row of logits, got {len(logits)} rows and {len(labels)} labels")
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


def _features(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Feature name -> [B, features], from logits [B, K] and labels [B]."""
    require(np.isfinite(logits).all(), "the logits to audit must be finite")
    outputs = jnp.asarray(logits)
    features = {
        "correctness": losses.correct(outputs, jnp.asarray(labels))[:, None],
        "probability": jax.nn.softmax(outputs),
        "entropy": losses.entropy(outputs)[:, None],
    }
    return {name: np.asarray(values, np.float64) for name, values in features.items()}
