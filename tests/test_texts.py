"""Labelled texts from `.tsv` and `.jsonl`, and what is refused."""

import json

import numpy as np
import pytest

from dememo_jax import protect, sources
from dememo_jax.errors import BadInput

ROWS = (("good, 'quoted\" film", "10"), ("bad  film", "9"), ("é ünicode", "9"))


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def tsv(rows, header=""):
    return header + "".join(f"{text}\t{label}\n" for text, label in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", tsv(ROWS)),
        ("a.tsv", tsv(ROWS, "sentence\tlabel\n")),
        ("a.tsv", tsv(ROWS).replace("\n", "\r\n")),
        ("a.jsonl", "\n".join(json.dumps({"id": 1, "text": text, "label": int(label)}) for text, label in ROWS)),
        ("a.jsonl", "\n\n".join(json.dumps({"sentence": text, "label": label}) for text, label in ROWS)),
    ],
)
def test_reading(tmp_path, name, content):
    found = sources.texts(written(tmp_path, name, content))
    assert found.texts == tuple(text for text, _ in ROWS)
    assert found.names == ("9", "10")  # numbers sort as numbers
    np.testing.assert_array_equal(found.labels, [1, 0, 0])
    assert found.labels.dtype == np.int32


def test_names_of_the_training_set(tmp_path):
    path = written(tmp_path, "a.tsv", tsv((("one", "world"),)))
    found = sources.texts(path, names=("sports", "world"))
    assert (found.labels.tolist(), found.names) == ([1], ("sports", "world"))


def test_into_regtext(tmp_path):
    found = sources.texts(written(tmp_path, "a.tsv", tsv([("lovely lovely", "pos"), ("dreadful", "neg")] * 3)))
    assert protect.regtext(found.texts, found.labels, words=1).lists == (("dreadful",), ("lovely",))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "x,1", "expected one of .tsv, .jsonl"),
        ("a.tsv", "", "no texts"),
        ("a.tsv", "sentence\tlabel\n", "no texts"),
        ("a.tsv", "a film\n", "line 1: expected two columns"),
        ("a.tsv", "a\t0\nb\tc\t1\n", "line 2: expected two columns, text and label; got 3"),
        ("a.tsv", "a\t0\n \t1\n", "line 2: the text is empty"),
        ("a.tsv", "a\t0\nb\t0\n", "a single label, '0'"),
        ("a.tsv", b"a\t0\n\xff\t1\n", "not UTF-8"),
        ("a.jsonl", "{]", "line 1: not JSON"),
        ("a.jsonl", "[1]", "expected an object"),
        ("a.jsonl", '{"body": "x", "label": 1}', "it has body, label"),
        ("a.jsonl", '{"text": "x"}', "under 'label', got None"),
        ("a.jsonl", '{"text": "x", "label": true}', "under 'label', got True"),
    ],
)
def test_refused(tmp_path, name, content, says):
    with pytest.raises(BadInput, match=says):
        sources.texts(written(tmp_path, name, content))


def test_refused_beside_content(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        sources.texts(tmp_path / "none.tsv")
    with pytest.raises(BadInput, match="line 2: unknown label '1'; there are 0, 2"):
        sources.texts(written(tmp_path, "a.tsv", tsv((("a", "0"), ("b", "1")))), names=("0", "2"))


@pytest.mark.parametrize("name", ["a.tsv", "b.jsonl"])
def test_rewritten_keeps_all_but_the_texts(tmp_path, name):
    lines = [{"id": i, "sentence": text, "label": int(label)} for i, (text, label) in enumerate(ROWS)]
    objects = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    content = tsv(ROWS, "sentence\tlabel\n").replace("\n", "\r\n") if name == "a.tsv" else objects
    path = written(tmp_path, name, content)
    assert sources.is_texts(name)
    assert sources.is_path(name)
    new = [f"dreadful {text} \u00e9" for text, _ in ROWS]
    again = sources.rewritten(path, new)
    path.write_text(again, encoding="utf-8")
    found = sources.texts(path)
    assert found.texts == tuple(new)
    assert found.labels.tolist() == [1, 0, 0]
    assert again.replace("dreadful ", "").replace(" \u00e9\t", "\t").replace(' \u00e9"', '"') == content.replace("\r", "")
    with pytest.raises(BadInput, match="holds 3 texts, not 2"):
        sources.rewritten(path, new[:2])


def test_rewritten_refuses_what_is_no_line(tmp_path):
    path = written(tmp_path, "a.tsv", tsv(ROWS))
    with pytest.raises(BadInput, match="line 2: a text with a tab"):
        sources.rewritten(path, ["a", "b\tc", "d"])
