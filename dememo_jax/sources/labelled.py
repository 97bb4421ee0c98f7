"""Labelled texts from disk: `.tsv` with a text and a label on each line, `.jsonl` with an object on each."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dememo_jax.errors import BadInput, require
from dememo_jax.sources import words

FIELDS = ("text", "sentence")
SUFFIXES = (".tsv", ".jsonl")


@dataclass(frozen=True)
class Texts:
    """Texts [N] with their labels, places in `names`."""

    texts: tuple[str, ...]
    labels: np.ndarray  # [N], int32
    names: tuple[str, ...]


def is_texts(name: str) -> bool:
    """Whether the data set of that name is a file of labelled texts."""
    return Path(name).suffix in SUFFIXES


def texts(path: str | Path, *, names: Sequence[str] | None = None) -> Texts:
    """The texts of a file in UTF-8, with or without a byte order mark, in its order.

    .tsv: two columns, text and label, without quoting; a first line `text` or `sentence`, then `label`, is a header.
    .jsonl: objects with `text` or `sentence`, and `label`, a string or a whole number; other entries are left alone.
    names: the labels that there are, in the order of their numbers: give those of the training set with the test set. By
    default those that appear, sorted: as numbers where all are whole numbers, else as words.
    Labels are compared in Unicode's composed form.
    Raises BadInput, naming the line, for a missing or unreadable file, another suffix, wrong columns or fields, an empty text
    or label, half of a character (a lone surrogate), a label that `names` does not have, and a file with fewer than two
    labels where they are not given.
    """
    path = Path(path)
    require(path.suffix in SUFFIXES, f"{path.name}: expected one of {', '.join(SUFFIXES)}")
    require(path.is_file(), f"{path}: no such file")
    rows = list((_tsv if path.suffix == ".tsv" else _jsonl)(path.name, _lines(path)))
    require(rows, f"{path.name}: no texts")
    for line, text, label in rows:
        where = f"{path.name}, line {line}"
        require(text.strip(), f"{where}: the text is empty; remove the line")
        require(label.strip(), f"{where}: the label is empty")
        half = any("\ud800" <= letter <= "\udfff" for letter in text + label)
        require(not half, f"{where}: half of a character (a lone surrogate such as \\ud83d); remove it")
    if names is None:
        names = words.ordered({label for _, _, label in rows}, path.name)
        require(len(names) > 1, f"{path.name}: a single label, {names[0]!r}; at least two are needed")
    of = {name: number for number, name in enumerate(names)}
    for line, _, label in rows:
        require(label in of, f"{path.name}, line {line}: unknown label {label!r}; there are {', '.join(names)}")
    labels = np.array([of[label] for _, _, label in rows], np.int32)
    return Texts(tuple(text for _, text, _ in rows), labels, tuple(names))


def rewritten(path: str | Path, texts: Sequence[str]) -> str:
    """The content of a file that `texts` reads with other texts, in their order; the rest as it stands, but for \\r\\n.

    Raises BadInput for another number of texts than the file has, and for a text that a line of `.tsv` cannot hold.
    """
    path = Path(path)
    lines, tsv = _lines(path), path.suffix == ".tsv"
    places = [number - 1 for number, _, _ in (_tsv if tsv else _jsonl)(path.name, lines)]
    require(len(places) == len(texts), f"{path.name} holds {len(places)} texts, not {len(texts)}")
    for place, text in zip(places, texts):
        if tsv:
            require(not set("\t\n") & set(text), f"{path.name}, line {place + 1}: a text with a tab or a line break is no line")
            lines[place] = f"{text}\t{lines[place].split(chr(9), 1)[1]}"
        else:
            found = json.loads(lines[place])
            field = next(name for name in FIELDS if name in found)
            lines[place] = json.dumps({**found, field: text}, ensure_ascii=False)
    return "\n".join(lines)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # editors put a byte order mark in front
    except UnicodeDecodeError as error:
        raise BadInput(f"{path.name}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _tsv(name: str, lines: list[str]) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(lines, 1):
        columns = line.removesuffix("\r").split("\t")
        if columns == [""] or (number == 1 and columns[0] in FIELDS and columns[1:] == ["label"]):
            continue
        require(len(columns) == 2, f"{name}, line {number}: expected two columns, text and label; got {len(columns)}")
        yield number, columns[0], words.composed(columns[1].strip())


def _jsonl(name: str, lines: list[str]) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits, thousands of brackets
            raise BadInput(f"{where}: not JSON ({getattr(error, 'msg', error)})") from None
        require(isinstance(found, dict), f"{where}: expected an object with text and label")
        text = next((found[field] for field in FIELDS if field in found), None)
        require(isinstance(text, str), f"{where}: expected a string under 'text' or 'sentence'; it has {', '.join(found)}")
        label = found.get("label")
        require(
            isinstance(label, str | int) and not isinstance(label, bool),
            f"{where}: expected a string or a whole number under 'label', got {label!r}",
        )
        yield number, str(text), words.composed(str(label))
