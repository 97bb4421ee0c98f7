"""Labelled texts as the commands know them: two files, a tokenizer, rows of tokens, a decoder that writes the label."""

import dataclasses
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import data as sets
from dememo_jax import evaluate, likelihood, models, nets, report, sources
from dememo_jax.cli import identity, runs
from dememo_jax.cli.configs import TEXT, Text
from dememo_jax.errors import require
from dememo_jax.sources.tokens import SLOT
from dememo_jax.types import Dataset, Model, Weights

TRAIN, TEST = "train", "test"
SIZES: dict[str, Any] = {"width": 64, "depth": 2, "heads": 4, "key_heads": 2, "hidden": 128}  # of --model decoder


@dataclass(frozen=True)
class Language:
    """What stands behind the rows of tokens."""

    files: tuple[Path, Path]  # training texts, test texts
    train: sources.Texts
    test: sources.Texts
    settings: Text
    tokenizer: Any
    labels: tuple[tuple[int, ...], ...]  # [K], the tokens of each label's word
    cut: tuple[int, int]  # how many training and test texts were cut

    @property
    def vocab(self) -> int:
        return self.tokenizer.get_vocab_size()

    def rows(self, texts: tuple[str, ...]) -> sources.Rows:
        """Texts as rows of tokens, in the form."""
        known = self.settings
        return sources.encode(self.tokenizer, texts, length=known.length, form=_form(known), pad=known.pad)


def beside(path: Path) -> Path:
    """The file of test texts that belongs to one of training texts. BadInput where there is none."""
    head, found, tail = path.name.rpartition(TRAIN)
    wanted = "texts come as two files: --data takes the training texts, in a file with 'train' in its name"
    require(found, f"{wanted}, such as reviews_train.tsv beside reviews_test.tsv; got {path.name}")
    test = path.with_name(head + TEST + tail)
    require(path.is_file(), f"{path}: no such file")
    require(test.is_file(), f"{path.name} has no test texts beside it: {test} does not exist")
    return test


def read(name: str, settings: Text) -> tuple[Dataset, Dataset, Language, str]:
    """Rows of the training and test texts, what stands behind them, and a digest of all of it.

    Raises BadInput as `sources.texts`, `sources.encode` and `likelihood.of_labels` do, and for settings that do not fit.
    """
    runs.positive(**{"text.length": settings.length, "text.vocab": settings.vocab})
    form, path = _form(settings), Path(name)
    require(form.count(SLOT) == 1, f"--text.form must hold {SLOT} once, got {settings.form!r}")
    files = path, beside(path)
    train = sources.texts(files[0])
    test = sources.texts(files[1], names=train.names)
    words = _words(settings, train.names, form)
    if settings.tokenizer is None:
        require(settings.pad == 0, "--text.pad belongs to --text.tokenizer; a tokenizer that is trained here has <pad> as 0")
        whole = [form.replace(SLOT, text) + words[label] for text, label in zip(train.texts, train.labels)]
        tokenizer = sources.make_tokenizer(whole, vocab=settings.vocab)
    else:
        usual = settings.vocab == TEXT.vocab
        require(usual, "--text.vocab is for a tokenizer that is trained here: leave it away with --text.tokenizer")
        tokenizer = sources.read_tokenizer(settings.tokenizer)
    language = Language(files, train, test, settings, tokenizer, sources.label_tokens(tokenizer, words), (0, 0))
    network(language)  # BadInput for labels that no text could tell apart
    shown, tested = language.rows(train.texts), language.rows(test.texts)
    language = dataclasses.replace(language, cut=(int((shown.cut > 0).sum()), int((tested.cut > 0).sum())))
    behind = repr((train.texts, test.texts, train.names, language.labels, language.vocab)).encode()
    digest = identity.digest(behind, shown.x, train.labels, tested.x, test.labels)
    return sets.rows(shown.x, train.labels), sets.rows(tested.x, test.labels), language, digest


def _form(settings: Text) -> str:
    return settings.form.replace(r"\n", "\n")


def _words(settings: Text, names: tuple[str, ...], form: str) -> tuple[str, ...]:
    """The words that the model writes for the labels."""
    words = settings.labels or names
    listed = ", ".join(names)
    require(len(words) == len(names), f"--text.labels names {len(words)} words, and there are {len(names)} labels: {listed}")
    require(all(word.strip() for word in words), "a word of --text.labels is empty")
    return tuple(words) if form[-1:].isspace() else tuple(f" {word.strip()}" for word in words)


# --- the network -------------------------------------------------------------------------------------------------


def network(language: Language, precision: str = "float32") -> Model:
    """The decoder as a classifier of the labels."""
    return _classifier(language.vocab, language.labels, language.settings.pad, precision)


@functools.lru_cache
def _classifier(vocab: int, labels: tuple[tuple[int, ...], ...], pad: int, precision: str) -> Model:
    return likelihood.of_labels(_decoder(vocab, labels, pad, precision), labels, pad=pad)


@functools.lru_cache
def _decoder(vocab: int, labels: tuple[tuple[int, ...], ...], pad: int, precision: str) -> Model:
    dtype = jnp.bfloat16 if precision == "bfloat16" else None
    longest = max(map(len, labels))  # a head over the whole text would be most of the work
    return models.from_linen(nets.Decoder(vocab=vocab, pad=pad, last=longest, dtype=dtype, **SIZES))


@functools.lru_cache
def _writer(vocab: int, labels: tuple[tuple[int, ...], ...], pad: int) -> Any:
    decoder = _decoder(vocab, labels, pad, "float32")
    return jax.jit(lambda weights, x: likelihood.generated(decoder, weights, x, labels))


def written(language: Language, weights: Weights, data: Dataset) -> np.ndarray:
    """1.0 where the label is what the model writes after the text, of all tokens that it knows, [N]."""
    write = _writer(language.vocab, language.labels, language.settings.pad)
    at, real = sets.blocks(len(data.y), evaluate.batch_size(data.x))
    found = np.concatenate([np.asarray(write(weights, data.x[rows])) for rows in at])[real.ravel()]
    return (found == np.asarray(data.y)).astype(np.float32)


# --- in words ----------------------------------------------------------------------------------------------------


def told(section: report.Section) -> report.Section:
    """What a command says of images, said of texts; the names of files stay."""
    plain = dataclasses.asdict(section)
    kept = [plot.pop("name") for plot in plain["plots"]], plain.pop("pictures")
    said = _said(plain)
    plots = [{**plot, "name": name} for plot, name in zip(said["plots"], kept[0])]
    return report.section({**said, "plots": plots, "pictures": kept[1]})


def _said(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _said(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_said(part) for part in value)
    if not isinstance(value, str):
        return value
    value = re.sub(r"\b([Aa])n (?=image)", r"\1 ", value)
    return re.sub(r"(?<!-)\b(I|i)mage(s?)\b", lambda word: f"{'T' if word[1] == 'I' else 't'}ext{word[2]}", value)
