"""RegText: ranks against a slow reference, words placed where it says, and what is refused."""

import math

import jax
import numpy as np
import pytest

from dememo_jax import protect
from dememo_jax.errors import BadInput
from dememo_jax.protect import words as family

TEXTS = (
    "the happy cat sat; a happy, HAPPY cat! http://a.bc/happy",
    "a dog ran with joy @cat #joy 42",
    "joy and cat and joy",
    "sad rain fell on the dog",
    "rain rain gloom, the sad end",
    "gloom fell; cat fled",
)
LABELS = (0, 0, 0, 1, 1, 1)
KEY = jax.random.key(3)


def slow(texts, labels, word, label, k, penalty, estimates, stop):
    """R(w, c) by counting lists of words."""
    of = {c: [w for t, y in zip(texts, labels) for w in family.tokens(t) if y == c and w not in stop] for c in set(labels)}
    everything = [word for each in of.values() for word in each]
    n = len(everything)
    if estimates == "probabilities":
        inside, prior, share = of[label].count(word) / len(of[label]), len(of[label]) / n, everything.count(word) / n
    else:
        size = n if estimates == "published" else len(set(everything))
        own = len(set(of[label]))
        inside, prior, share = of[label].count(word) / own + 1e-6, own / size, everything.count(word) / size
    if inside == 0:
        return -math.inf
    return math.log2(inside**k / (share * prior)) - penalty * math.log2(1 + everything.count(word))


def test_tokens():
    assert family.tokens(TEXTS[0]) == ["the", "happy", "cat", "sat", "a", "happy", "happy", "cat"]
    assert family.tokens("It's well-made: 3rd@x #no https://x.y/z www.a.b Ünder_score") == [
        "it's", "well-made", "rd", "ünder", "score",
    ]  # fmt: skip


@pytest.mark.parametrize("estimates", family.ESTIMATES)
@pytest.mark.parametrize(("k", "penalty"), [(3.0, 2.0), (1.0, 0.0)])
def test_ranks_are_those_of_a_slow_count(estimates, k, penalty):
    stop = ("the", "a", "and", "on", "with")
    found = protect.regtext(TEXTS, LABELS, words=3, k=k, penalty=penalty, estimates=estimates, stop=stop)
    vocabulary = sorted({w for t in TEXTS for w in family.tokens(t)} - set(stop))
    rank = {w: [slow(TEXTS, LABELS, w, c, k, penalty, estimates, stop) for c in (0, 1)] for w in vocabulary}
    for label in (0, 1):
        own = [w for w in vocabulary if (rank[w][0] >= rank[w][1]) == (label == 0)]
        expected = sorted(own, key=lambda w, label=label: (-round(rank[w][label], 9), w))[:3]
        np.testing.assert_allclose(found.scores[label], [rank[w][label] for w in expected], rtol=1e-9)
        assert {round(rank[w][label], 9) for w in found.lists[label]} == {round(rank[w][label], 9) for w in expected}
    assert not set(found.lists[0]) & set(found.lists[1])


def test_words_of_a_class_alone_win_and_stop_words_never():
    found = protect.regtext(TEXTS, LABELS, words=2)
    assert set(found.lists[0]) == {"happy", "joy"}
    assert set(found.lists[1]) <= {"rain", "gloom", "sad", "fell"}


WORDS = family.Words((("alpha", "beta"), ("gamma",)), ((1.0, 0.5), (1.0,)), 3.0, 2.0, "probabilities")
LONG = ("one two  three four\tfive six seven eight nine ten " * 6).strip()


@pytest.mark.parametrize(("mode", "count"), [("insert", 3), ("replace", 6)])
def test_words_stand_where_it_says(mode, count):
    texts = (LONG, LONG, "short one", LONG)
    mask = np.array([True, True, True, False])
    made = protect.inject(KEY, texts, (0, 1, 1, 0), WORDS, mode=mode, mask=mask)
    assert made.texts[3] == LONG
    assert made.placed[3] == ()
    assert [len(each) for each in made.placed[:3]] == [count, count, 1]
    for text, before, placed, label in zip(made.texts, texts, made.placed, (0, 1, 1)):
        new, old = text.split(), before.split()
        assert all(new[at] == word and word in WORDS.lists[label] for at, word in placed)
        left = [word for at, word in enumerate(new) if at not in dict(placed)]
        if mode == "insert":
            assert left == old
        else:
            assert left == [word for at, word in enumerate(old) if at not in dict(placed)]
    assert protect.inject(KEY, ("a  b\tc ",), (0,), WORDS, mode=mode).texts[0].endswith(" ")  # white space stays
    np.testing.assert_array_equal(protect.traces(made.texts, WORDS)[:, 0] > 0, [True, False, False, False])
    np.testing.assert_array_equal(protect.traces(made.texts, WORDS)[:3, 1], [0, count, 1])


def test_a_text_depends_on_its_index_alone():
    whole = protect.inject(KEY, (LONG,) * 5, (0,) * 5, WORDS)
    masked = protect.inject(KEY, (LONG,) * 5, (0,) * 5, WORDS, mask=np.arange(5) == 3)
    assert masked.texts[3] == whole.texts[3]
    assert len(set(whole.texts)) > 1
    assert protect.inject(KEY, (LONG,) * 5, (0,) * 5, WORDS) == whole
    assert protect.inject(jax.random.key(4), (LONG,) * 5, (0,) * 5, WORDS) != whole


def test_places_and_words_are_uniform():
    """2,000 texts of ten words: each place and word as often as it should be, within five standard deviations."""
    count = 2000
    made = protect.inject(KEY, (" ".join("abcdefghij"),) * count, (0,) * count, WORDS, mode="replace", share=0.2)
    places = np.bincount([at for each in made.placed for at, _ in each], minlength=10)
    assert places.sum() == 2 * count
    assert np.abs(places - 0.2 * count).max() < 5 * math.sqrt(count * 0.2 * 0.8)
    alphas = sum(word == "alpha" for each in made.placed for _, word in each)
    assert abs(alphas - count) < 5 * math.sqrt(2 * count * 0.25)


def test_limits():
    made = protect.inject(
        KEY, (LONG * 9, "a b c", "Label: yes"), (0, 0, 0), WORDS, shortest=3, share=1.0, keep=("label", "yes")
    )
    assert [len(each) for each in made.placed] == [10, 3, 0]
    kept = protect.inject(KEY, ("Label: yes it is",), (0,), WORDS, mode="replace", share=1.0, keep=("label", "yes"))
    assert kept.texts[0].startswith("Label: yes ")
    assert [at for at, _ in kept.placed[0]] == [2, 3]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"texts": ()}, "one text at least"),
        ({"labels": (0, 1)}, "6 whole numbers"),
        ({"labels": (0.0,) * 6}, "6 whole numbers"),
        ({"texts": (*TEXTS[:5], "  ")}, "is empty"),
        ({"labels": (0, 0, 0, 2, 2, 2)}, r"label \[1\] never appears"),
        ({"labels": (0, 0, 0, 1, 1, -1)}, "must lie in"),
        ({"classes": 1}, "must lie in"),
        ({"words": 40}, "fewer than words=40"),
        ({"estimates": "true"}, "estimates must be"),
        ({"k": 0.0}, "k > 0"),
        ({"texts": ("the", "a") * 3}, "no words but stop words"),
    ],
)
def test_regtext_refuses(how, says):
    with pytest.raises(BadInput, match=says):
        protect.regtext(**{"texts": TEXTS, "labels": LABELS} | how)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"mode": "append"}, "mode must be"),
        ({"share": 0.0}, "share must be"),
        ({"most": 0}, "at least 1"),
        ({"mask": np.ones(3, bool)}, "6 booleans"),
        ({"labels": (0, 0, 0, 1, 1, 2)}, "must lie in"),
    ],
)
def test_inject_refuses(how, says):
    with pytest.raises(BadInput, match=says):
        protect.inject(KEY, **{"texts": TEXTS, "labels": LABELS, "words": WORDS} | how)
