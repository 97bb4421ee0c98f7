"""The SoK's three membership attacks against scikit-learn and scipy used directly."""

import numpy as np
import pytest
from scipy import special, stats
from sklearn.svm import SVC

from dememo_jax import audit
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
