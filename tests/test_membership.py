"""Membership attacks on one model against scikit-learn, scipy and brute force."""

import math

import numpy as np
import pytest
from scipy import special, stats
from sklearn.svm import SVC

from dememo_jax import audit, losses
from dememo_jax.errors import BadInput

K = 4
NAMES = ["correctness", "probability", "entropy"]


def outputs(seed, count, confidence, right=1.0):
    """Logits and labels; `confidence` is the label's lead, `right` the share of examples that get it."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, count)
    led = np.where(rng.uniform(size=count) < right, labels, (labels + 1) % K)
    return rng.normal(size=(count, K)) + confidence * np.eye(K)[led], labels


def test_clear_members_and_nonmembers():
    member, nonmember = outputs(0, 100, 8.0), outputs(1, 100, 0.0)
    like_member = audit.membership_scores(member, nonmember, outputs(2, 200, 8.0))
    like_nonmember = audit.membership_scores(member, nonmember, outputs(3, 200, 0.0))
    assert sorted(like_member) == sorted(NAMES)
    for name in ("probability", "entropy"):
        assert like_member[name] > 0.97
        assert like_nonmember[name] < 0.05
    gap = audit.membership_gap(like_member, like_nonmember)
    assert gap == {name: like_member[name] - like_nonmember[name] for name in NAMES}


def features(part, count=None):
    """The three features by other roads: argmax in a loop, scipy's softmax and scipy's entropy."""
    logits, labels = part[0][:count], part[1][:count]
    p = special.softmax(logits, axis=1)
    right = np.array([[float(np.flatnonzero(row == row.max())[0] == y)] for row, y in zip(logits, labels)])
    return dict(zip(NAMES, (right, p, stats.entropy(p, axis=1)[:, None]), strict=True))


@pytest.mark.parametrize("sizes", [(80, 50), (50, 80)])
def test_equals_an_svm_on_the_first_of_each(sizes):
    # Overlapping laws and unequal sets: the later examples of the longer set must not be looked at.
    member, nonmember = outputs(4, sizes[0], 2.0, right=0.9), outputs(5, sizes[1], 1.2, right=0.6)
    target = outputs(6, 300, 1.6, right=0.75)
    got = audit.membership_scores(member, nonmember, target)
    one, two, asked = features(member, 50), features(nonmember, 50), features(target)
    for name in NAMES:
        machine = SVC(C=3.0, kernel="rbf", gamma=1.0 / one[name].shape[1])
        machine.fit(np.concatenate([one[name], two[name]]), [1] * 50 + [0] * 50)
        assert got[name] == pytest.approx(machine.predict(asked[name]).mean(), abs=1.5 / 300)  # one on the edge may flip
    assert got["correctness"] == pytest.approx(asked["correctness"].mean())  # close to plain accuracy, as its note says
    assert 0.1 < got["probability"] < 0.9  # else the comparison would be empty
    assert len({round(value, 3) for value in got.values()}) == 3


def test_depends_on_logits_only_through_the_softmax():
    member, nonmember, target = outputs(7, 40, 3.0), outputs(8, 40, 1.0), outputs(9, 40, 2.0)
    parts = [(np.round(1024 * logits) / 1024, labels) for logits, labels in (member, nonmember, target)]
    shifted = [(logits + 128.0, labels) for logits, labels in parts]  # exact in float32, and would overflow a bare exp
    assert audit.membership_scores(*shifted) == audit.membership_scores(*parts)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, None])
def test_refuses_empty_sets_and_broken_logits(which, bad):
    parts = [outputs(10, 12, 3.0), outputs(11, 12, 1.0), outputs(12, 12, 2.0)]
    logits, labels = parts[which]
    if bad is None:
        parts[which] = logits[:0], labels[:0]
    else:
        logits[3, 1] = bad
    with pytest.raises(BadInput):
        audit.membership_scores(*parts)


# --- signals and thresholds --------------------------------------------------------------------------------------

SIGNALS = ["correctness", "confidence", "entropy", "modified entropy"]


def signals_by_hand(part):
    """In float64, modified entropy as Song and Mittal write it."""
    logits, labels = np.float64(part[0]), part[1]
    at = np.arange(len(labels)), labels
    log_p = special.log_softmax(logits, axis=1)
    p = np.exp(log_p)
    log_not = np.log1p(-p)
    others = (p * log_not).sum(axis=1) - (p * log_not)[at]
    modified = -(1 - p[at]) * log_p[at] - others
    found = features(part)["correctness"][:, 0], log_p[at], -stats.entropy(p, axis=1), -modified
    return dict(zip(SIGNALS, found, strict=True))


def test_signals():
    part = outputs(13, 200, 2.0, right=0.7)
    found = audit.signals(*part)
    assert list(found) == SIGNALS
    for name, expected in signals_by_hand(part).items():
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-6)


def test_signals_of_sure_answers_are_finite_and_ordered():
    leads = np.array([200.0, 8.0, 4.0, 0.0, 4.0, 8.0, 200.0])
    labels = np.array([0, 0, 0, 0, 1, 1, 1])  # from surely right to surely wrong
    found = audit.signals(leads[:, None] * np.eye(K)[0], labels)
    for name in ("confidence", "modified entropy"):
        assert np.isfinite(found[name]).all()
        assert (np.diff(found[name]) < 0).all()
    np.testing.assert_array_equal(found["correctness"], [1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_allclose(found["entropy"][[0, 3, 6]], [0, -np.log(4), 0], atol=1e-6)  # blind to the label
    np.testing.assert_array_equal(found["entropy"][:3], found["entropy"][:3:-1])


def balanced(member, nonmember, threshold):
    return ((member >= threshold).mean() + (nonmember < threshold).mean()) / 2


def best(member, nonmember):
    """The largest balanced accuracy of any threshold: one at each score, and one above all."""
    both = np.concatenate([member, nonmember])
    return max(balanced(member, nonmember, t) for t in [*both, both.max() + 1])


def known(seed):
    """Overlapping laws whose best thresholds differ from class to class."""
    member, nonmember = outputs(seed, 200, 2.5, right=0.9), outputs(seed + 1, 200, 1.5, right=0.7)
    scale = 1 + np.arange(K)[:, None] * 0.5
    return [(logits * scale[labels], labels) for logits, labels in (member, nonmember)]


def test_thresholds_against_all_that_could_be():
    member, nonmember = known(20)
    found = audit.class_thresholds(member, nonmember, K)
    assert list(found) == SIGNALS
    sides = audit.signals(*member), audit.signals(*nonmember)
    for name in SIGNALS:
        assert found[name].shape == (K,)
        for k in range(K):
            inside, outside = (values[name][part[1] == k] for values, part in zip(sides, (member, nonmember)))
            assert balanced(inside, outside, found[name][k]) == pytest.approx(best(inside, outside), abs=1e-12)
    everyone = [values["confidence"] for values in sides]
    common = max(np.concatenate(everyone), key=lambda t: balanced(*everyone, t))
    assert len(set(found["confidence"])) == K  # one for all would be worse
    assert balanced(*everyone, common) == pytest.approx(best(*everyone))


def test_a_class_that_cannot_tell_gets_the_threshold_of_all():
    member, nonmember = known(22)
    member[1][member[1] == 2] = 0  # no members of class 2, no others of class 3
    nonmember[1][nonmember[1] == 3] = 0
    for logits, labels in (member, nonmember):
        logits[labels == 1] = [0.0, 5.0, 0.0, 0.0]  # all alike
    found = audit.class_thresholds(member, nonmember, K + 1)  # nobody has class 4
    for name in SIGNALS:
        sides = [audit.signals(*part)[name] for part in (member, nonmember)]
        assert len(set(found[name][1:])) == 1
        assert balanced(*sides, found[name][1]) == pytest.approx(best(*sides), abs=1e-12)
    assert found["confidence"][0] != found["confidence"][1]


def test_nobody_is_called_where_that_is_best():
    labels = np.zeros(200, int)
    unsure, sure = np.zeros((200, K)), np.tile(3 * np.eye(K)[0], (200, 1))  # the others are the surer ones
    unsure[0, 1] = 0.1  # and one of the members is wrong
    found = audit.class_thresholds((unsure, labels), (sure, labels), K)
    for name in SIGNALS:
        assert np.isfinite(found[name]).all()
        for part in (unsure, sure):
            assert not audit.called_members(found, (part, labels))[name].any()


def test_signals_that_are_all_alike_have_no_threshold_and_cost_the_others_nothing():
    logits, labels = known(24)[0]
    right = np.where(np.eye(K, dtype=bool)[labels], logits.max(axis=1, keepdims=True) + 1, logits)  # everyone is right
    found = audit.class_thresholds((right, labels), (right[::-1], labels[::-1]), K)
    assert [name for name in SIGNALS if found[name] is None] == ["correctness"]
    called = audit.called_members(found, (right, labels))
    assert [name for name in SIGNALS if called[name] is None] == ["correctness"]
    assert all(called[name].shape == labels.shape for name in SIGNALS[1:])
    for member, nonmember in (((logits[:0], labels[:0]), (logits, labels)), ((logits, labels), (logits[:0], labels[:0]))):
        with pytest.raises(BadInput):
            audit.class_thresholds(member, nonmember, K)
    logits[3, 1] = np.nan
    with pytest.raises(BadInput, match="finite"):
        audit.signals(logits, labels)
    with pytest.raises(BadInput, match="one label"):
        audit.signals(logits[:5], labels)


def test_called_members():
    thresholds = audit.class_thresholds(*known(26), K)
    target = known(28)[0]
    found, values = audit.called_members(thresholds, target), audit.signals(*target)
    assert list(found) == SIGNALS
    for name in SIGNALS:
        expected = [value >= thresholds[name][label] for value, label in zip(values[name], target[1])]
        np.testing.assert_array_equal(found[name], expected)
        assert 0 < found[name].mean() < 1
    at = {name: np.full(K, values[name][0]) for name in SIGNALS}
    assert all(called[0] for called in audit.called_members(at, target).values())  # at the threshold counts as above


# --- sequences ---------------------------------------------------------------------------------------------------


def test_sequence_signals_against_a_loop_over_tokens():
    random = np.random.default_rng(5)
    logits = random.normal(size=(4, 6, 9)).astype(np.float32) * 2
    tokens = random.integers(0, 9, (4, 6))
    tokens[1, :3] = tokens[2, 1:] = -1
    found = audit.sequence_signals(logits, tokens, share=0.4)
    for i in range(4):
        own, usual = [], []
        for t in np.flatnonzero(tokens[i] >= 0):
            p = np.exp(logits[i, t].astype(np.float64))
            p /= p.sum()
            mean = sum(p[v] * math.log(p[v]) for v in range(9))
            spread = math.sqrt(sum(p[v] * (math.log(p[v]) - mean) ** 2 for v in range(9)))
            own.append(math.log(p[tokens[i, t]]))
            usual.append((own[-1] - mean) / spread)
        few = max(1, int(0.4 * len(own)))
        expected = {
            "likelihood": sum(own), "mean likelihood": sum(own) / len(own),
            "min-k": sum(sorted(own)[:few]) / few, "min-k++": sum(sorted(usual)[:few]) / few,
        }  # fmt: skip
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value, rel=1e-4), name
    np.testing.assert_allclose(found["likelihood"], -losses.sequence_nll(logits, tokens), rtol=1e-5)


def test_sequence_signals_of_a_model_that_knows_nothing_are_no_nan():
    found = audit.sequence_signals(np.zeros((1, 3, 4)), np.array([[1, 2, 3]]))
    assert found["min-k++"][0] == 0
    assert found["mean likelihood"][0] == pytest.approx(-math.log(4))


@pytest.mark.parametrize(
    ("logits", "tokens", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 3), int), r"expected logits \[B, T, V\]"),
        (np.zeros((1, 2, 3)), np.array([[0, 3]]), "token 3 is beyond the 3"),
        (np.zeros((2, 2, 3)), np.array([[0, 1], [-1, -1]]), r"no token of sequence \[1\] counts"),
        (np.full((1, 2, 3), np.nan), np.array([[0, 1]]), "must be finite"),
    ],
)
def test_what_sequence_signals_refuse(logits, tokens, message):
    with pytest.raises(BadInput, match=message):
        audit.sequence_signals(logits, tokens)
