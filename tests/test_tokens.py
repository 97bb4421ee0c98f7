"""Tokenizers, rows of tokens, and what is refused."""

import numpy as np
import pytest

from dememo_jax import data, sources
from dememo_jax.errors import BadInput

TEXTS = ("the cat sat on the mat", "the dog sat on the log", "ünïcode \U0001f600 and\ttabs", "x")


@pytest.fixture(scope="module")
def tokenizer():
    return sources.make_tokenizer(TEXTS, vocab=270)


def test_every_text_comes_back(tokenizer):
    assert tokenizer.token_to_id("<pad>") == 0
    assert 257 < tokenizer.get_vocab_size() <= 270
    for text in (*TEXTS, "never seen: \x00 \u4e2d\u6587"):
        ids = tokenizer.encode(text).ids
        assert 0 not in ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("the ").ids) < 4  # pairs were merged


def test_file_and_folder(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert sources.read_tokenizer(path).encode(TEXTS[0]).ids == tokenizer.encode(TEXTS[0]).ids


def test_rows(tokenizer):
    form = "Say {text}:"
    found = sources.encode(tokenizer, TEXTS, length=12, form=form, vocab=300)
    assert found.x.shape == (4, 12)
    assert found.x.dtype == np.int32
    lengths = [len(tokenizer.encode(text).ids) for text in TEXTS]
    around = len(tokenizer.encode("Say ").ids) + len(tokenizer.encode(":").ids)
    np.testing.assert_array_equal(found.cut, [max(0, n - 12 + around) for n in lengths])
    for row, text, cut, n in zip(found.x, TEXTS, found.cut, lengths):
        kept = row[row != 0]
        assert (row[: 12 - len(kept)] == 0).all()  # on the left
        whole = tokenizer.decode(tokenizer.encode(text).ids[: n - cut])
        assert tokenizer.decode(kept.tolist()) == f"Say {whole}:"
    assert found.cut[-1] == 0 < max(found.cut)
    made = data.rows(found.x, np.arange(4))
    assert (made.x.dtype, made.y.tolist()) == (np.int32, [0, 1, 2, 3])


def test_label_tokens(tokenizer):
    assert sources.label_tokens(tokenizer, (" dog", "x")) == tuple(tuple(tokenizer.encode(w).ids) for w in (" dog", "x"))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"form": "no place"}, "form must hold {text} once"),
        ({"form": "{text} {text}"}, "form must hold {text} once"),
        ({"length": 2, "form": "Say {text}:"}, "leaves no room"),
        ({"texts": ("a", " ")}, r"number \[1\] is"),
        ({"texts": ()}, "not empty"),
        ({"vocab": 50}, "does not belong to it"),
        ({"texts": ("x",), "pad": 89}, "give another pad"),
    ],
)
def test_refused(tokenizer, how, says):
    pad = {"pad": tokenizer.encode("x").ids[0]} if "pad" in how else {}
    with pytest.raises(BadInput, match=says):
        sources.encode(tokenizer, **{"texts": TEXTS, "length": 8} | how | pad)


def test_refused_files_and_sizes(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        sources.read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="not a tokenizer"):
        sources.read_tokenizer(tmp_path)
    with pytest.raises(BadInput, match="at least 257"):
        sources.make_tokenizer(TEXTS, vocab=100)
    with pytest.raises(BadInput, match="one text at least"):
        sources.make_tokenizer(())
    with pytest.raises(BadInput, match="expected tokens"):
        data.rows(np.ones((2, 3)), (0, 1))
