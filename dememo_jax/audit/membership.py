"""Membership inference on the outputs of one model: the SoK's three attacks; signals and thresholds that have a ROC."""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.svm import SVC

from dememo_jax import bounds, losses
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


# --- one model, per example ----------------------------------------------------------------------------------------


def signals(logits, labels) -> dict[str, np.ndarray]:
    """What a single model's outputs say of each example, name -> [B], larger for members; scores for `bounds.auc`.

    `correctness` 1[argmax p = y]; `confidence` log p_y, which ranks as the (negative) loss does, Yeom et al. 2018;
    `entropy` and `modified entropy` of p, negated: Song and Mittal 2021. Raises BadInput for logits that are not finite.
    """
    found = _signals(*_outputs(logits, labels))
    names = ("correctness", "confidence", "entropy", "modified entropy")
    return {name: np.asarray(values, np.float64) for name, values in zip(names, found)}


def class_thresholds(member, nonmember, classes: int) -> dict[str, np.ndarray]:
    """For each of the `signals` and each class the threshold that tells known members from non-members best, [K].

    Song and Mittal 2021: it maximises (true-positive + true-negative rate) / 2 among the examples of the class. A class that
    lacks examples of either kind, or whose signals are all equal, gets the threshold of all classes together. member and
    nonmember are (logits, labels) of known examples, none of which should be among those that are judged.
    """
    known = [(signals(*part), np.asarray(part[1])) for part in (member, nonmember)]
    found = {}
    for name in known[0][0]:
        sides = [(values[name], labels) for values, labels in known]
        usual = _threshold(*(values for values, _ in sides))
        each = [_threshold(*(values[labels == k] for values, labels in sides)) for k in range(classes)]
        found[name] = np.array([usual if one is None else one for one in each], np.float64)
        require(np.isfinite(found[name]).all(), f"{name} is the same for all known examples: there is nothing to fit")
    return found


def called_members(thresholds: dict[str, np.ndarray], target) -> dict[str, np.ndarray]:
    """Which examples of target = (logits, labels) each attack of `class_thresholds` calls members, name -> bool [B]."""
    labels = np.asarray(target[1])
    return {name: values >= thresholds[name][labels] for name, values in signals(*target).items()}


def _threshold(member: np.ndarray, nonmember: np.ndarray) -> float | None:
    both = np.concatenate([member, nonmember])
    if not (len(member) and len(nonmember)) or np.ptp(both) == 0:
        return None
    false, true, at = bounds.roc(both, np.repeat([True, False], [len(member), len(nonmember)]))
    best = int((true - false).argmax())
    return float(at[best]) if np.isfinite(at[best]) else float(both.max()) + 1.0  # nobody: above all that was seen


def _outputs(logits, labels) -> tuple[jnp.ndarray, jnp.ndarray]:
    logits, labels = np.asarray(logits), np.asarray(labels)
    require(len(logits) == len(labels), f"need one label a row of logits, got {len(logits)} rows and {len(labels)} labels")
    require(np.isfinite(logits).all(), "the logits to audit must be finite")
    return jnp.asarray(logits), jnp.asarray(labels)


_softmax = jax.jit(jax.nn.softmax)


@jax.jit
def _signals(logits, labels):
    unlikely = (losses.cross_entropy(logits, labels), losses.entropy(logits), losses.modified_entropy(logits, labels))
    return losses.correct(logits, labels), *(-values for values in unlikely)


def _features(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Feature name -> [B, features], from logits [B, K] and labels [B]."""
    found = signals(logits, labels)
    chances = np.asarray(_softmax(jnp.asarray(logits)), np.float64)
    return {"correctness": found["correctness"][:, None], "probability": chances, "entropy": -found["entropy"][:, None]}
