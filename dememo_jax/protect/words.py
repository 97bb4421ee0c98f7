"""Unlearnable text: words that give a class away, put into the texts of that class, so that models learn the words instead.

Strings on the host; nothing is downloaded. The owner keeps the `Words` and what `inject` says it placed, and finds either
again with `traces`.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from dememo_jax.errors import require
from dememo_jax.types import Key

ESTIMATES = ("probabilities", "published", "published-polarity")
MODES = {"insert": 0.05, "replace": 0.1}  # and the share of words that the published code touches
_IGNORED = re.compile(r"https?://\S+|www\.\S+|[@#]\w+")
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_SPAN = re.compile(r"\S+")


@dataclass(frozen=True)
class Words:
    """The words of each class, the best first, and how they were chosen."""

    lists: tuple[tuple[str, ...], ...]  # [K][words], disjoint
    scores: tuple[tuple[float, ...], ...]  # their ranks R(w, c), in bits
    k: float
    penalty: float
    estimates: str


@dataclass(frozen=True)
class Injected:
    """Texts with words put in. placed[i]: (place among the words of the new text i, counted from 0; the word)."""

    texts: tuple[str, ...]
    placed: tuple[tuple[tuple[int, str], ...], ...]


def tokens(text: str) -> list[str]:
    """The words of a text in small letters; links, @names, #tags, digits and punctuation are left out."""
    return _WORD.findall(_IGNORED.sub(" ", text).lower())


def regtext(
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    words: int = 10,
    k: float = 3.0,
    penalty: float = 2.0,
    estimates: str = "probabilities",
    stop: Collection[str] | None = None,
    classes: int | None = None,
) -> Words:
    """RegText (Java, Shahid and Agarwal, NAACL 2025): for each class the words with the highest rank

        R(w, c) = log2( P(w|c)^k / (P(w) P(c)) ) - penalty log2(1 + count(w)).

    texts [N], labels [N] in 0..classes-1 (default: the largest label and one more). A word is ranked in the class where it
    scores best (the first of equals), so that lists are disjoint; equals within a list stand in alphabetical order.
    estimates: "probabilities" are shares of the words counted: P(w|c) of those of class c, P(w) of all, P(c) how many are of
        class c. The published code divides by sizes of vocabularies instead: P(w|c) = count_c(w) / V_c + 10^-6, P(c) = V_c / N,
        P(w) = count(w) / N, where N is the number of all words ("published") or of different words ("published-polarity").
    stop: words that are never chosen; default scikit-learn's English stop words. The published code also lemmatises by
        WordNet, a corpus to be downloaded; here words stay as they are written.
    Raises BadInput for texts and labels that do not match, an empty text, a label out of range or that never appears, and a
    class with fewer than `words` words of its own.
    """
    require(estimates in ESTIMATES, f"estimates must be one of {', '.join(ESTIMATES)}, got {estimates!r}")
    require(words >= 1 and k > 0 and penalty >= 0, f"expected words >= 1, k > 0, penalty >= 0; got {words}, {k}, {penalty}")
    found, classes = _checked(texts, labels, classes)
    ignored = _english() if stop is None else frozenset(stop)
    counts = [Counter[str]() for _ in range(classes)]
    for text, label in zip(texts, found):
        counts[label].update(word for word in tokens(text) if word not in ignored)
    vocabulary = sorted(set().union(*counts))
    require(vocabulary, "the texts hold no words but stop words, links and numbers")
    table = np.array([[of[word] for word in vocabulary] for of in counts], np.float64)  # [K, V]
    rank = _rank(table, k, penalty, estimates)
    best = rank.argmax(axis=0)
    lists, scores = [], []
    for label in range(classes):
        own = [i for i in np.flatnonzero(best == label) if math.isfinite(rank[label, i])]
        require(
            len(own) >= words,
            f"class {label} has {len(own)} words of its own, fewer than words={words}: give more texts, or ask for fewer",
        )
        own = sorted(own, key=lambda i: (-rank[label, i], vocabulary[i]))[:words]
        lists.append(tuple(vocabulary[i] for i in own))
        scores.append(tuple(float(rank[label, i]) for i in own))
    return Words(tuple(lists), tuple(scores), float(k), float(penalty), estimates)


def _rank(table: np.ndarray, k: float, penalty: float, estimates: str) -> np.ndarray:
    """R [K, V] of the counts [K, V]; minus infinity for a word that the class does not have."""
    each, total = table.sum(axis=0), table.sum()
    if estimates == "probabilities":
        inside, of_class, size = table / table.sum(axis=1, keepdims=True), table.sum(axis=1, keepdims=True) / total, total
    else:
        own = (table > 0).sum(axis=1, keepdims=True)
        size = total if estimates == "published" else float(table.shape[1])
        inside, of_class = table / own + 1e-6, own / size
    with np.errstate(divide="ignore"):
        return k * np.log2(inside) - np.log2(each / size) - np.log2(of_class) - penalty * np.log2(1 + each)


def inject(
    key: Key,
    texts: Sequence[str],
    labels: Sequence[int],
    words: Words,
    *,
    mask: Sequence[bool] | None = None,
    mode: str = "insert",
    share: float | None = None,
    most: int = 10,
    shortest: int = 1,
    keep: Collection[str] = (),
) -> Injected:
    """The texts where `mask` [N] (default: all), each with random words of its class at random places; the others as they are.

    Words are what white space separates. Of a text with n of them max(1, int(share n)) are touched, `most` at most, all
    places alike: mode "insert" puts a word before each, "replace" takes its place.
    share: default as published, 0.05 where words are inserted and 0.1 where they are replaced. shortest: texts with fewer
    words stay as they are; the published code for insertion has 10. keep: words that are never replaced or preceded, in small
    letters and without punctuation around them: the label word of an instruction, say.
    What happens to text i depends on the key and i alone. Raises BadInput for texts, labels or a mask that do not match, an
    empty text, a label without a list, and parameters out of range.
    """
    require(mode in MODES, f"mode must be 'insert' or 'replace', got {mode!r}")
    share = MODES[mode] if share is None else share
    require(0 < share <= 1, f"share must be in (0, 1], got {share}")
    require(most >= 1 and shortest >= 1, f"most and shortest must be at least 1, got {most} and {shortest}")
    classes, _ = _checked(texts, labels, len(words.lists), every=False)
    chosen = np.ones(len(texts), bool) if mask is None else np.asarray(mask)
    require(chosen.shape == (len(texts),) and chosen.dtype == bool, f"mask must be {len(texts)} booleans, one a text")
    kept, seed = frozenset(keep), [int(part) for part in np.asarray(jax.random.key_data(key)).ravel()]
    made: list[str] = []
    placed: list[tuple[tuple[int, str], ...]] = []
    for i, (text, label) in enumerate(zip(texts, classes)):
        spans = [found.span() for found in _SPAN.finditer(text)]
        free = [at for at, (begin, end) in enumerate(spans) if text[begin:end].lower().strip(".,:;!?\"'()[]") not in kept]
        if not chosen[i] or len(spans) < shortest or not free:
            made.append(text)
            placed.append(())
            continue
        random = np.random.default_rng([*seed, i])
        count = min(most, max(1, int(share * len(spans))), len(free))
        places = sorted(int(at) for at in random.choice(free, count, replace=False))
        picked = [words.lists[label][int(at)] for at in random.integers(len(words.lists[label]), size=count)]
        for (begin, end), word in reversed([(spans[at], word) for at, word in zip(places, picked)]):
            text = f"{text[:begin]}{word} {text[begin:]}" if mode == "insert" else text[:begin] + word + text[end:]
        made.append(text)
        moved = range(count) if mode == "insert" else [0] * count
        placed.append(tuple((at + by, word) for at, by, word in zip(places, moved, picked)))
    return Injected(tuple(made), tuple(placed))


def traces(texts: Sequence[str], words: Words) -> np.ndarray:
    """How often each text holds words of each class's list, [N, K]: what the owner of the lists looks for in found data."""
    of = {word: label for label, each in enumerate(words.lists) for word in each}
    found = np.zeros((len(texts), len(words.lists)), np.int64)
    for i, text in enumerate(texts):
        for word in tokens(text):
            if word in of:
                found[i, of[word]] += 1
    return found


def _checked(texts: Sequence[str], labels, classes: int | None, every: bool = True) -> tuple[np.ndarray, int]:
    """Labels [N] and how many classes there are."""
    require(len(texts) > 0, "expected one text at least")
    found = np.asarray(labels)
    require(
        found.shape == (len(texts),) and np.issubdtype(found.dtype, np.integer),
        f"expected {len(texts)} whole numbers as labels, one a text; got {found.dtype} {list(found.shape)}",
    )
    empty = [i for i, text in enumerate(texts) if not text.strip()]
    require(not empty, f"text {empty[:1]} is empty ({len(empty)} in all): remove it, there is nothing to protect")
    count = int(found.max()) + 1 if classes is None else classes
    require(found.min() >= 0 and found.max() < count, f"labels must lie in 0..{count - 1}, got {found.min()}..{found.max()}")
    missing = sorted(set(range(count)) - set(found.tolist()))
    require(not (every and missing), f"label {missing} never appears")
    return found, count


def _english() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS)
