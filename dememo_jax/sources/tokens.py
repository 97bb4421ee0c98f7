"""Texts as rows of tokens: a byte-level tokenizer of one's own or a released model's, and what is cut off said."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dememo_jax.errors import BadInput, require

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD = "<pad>"
SLOT = "{text}"
LARGEST = 2**24  # tokens of any vocabulary; ids near 2^32 make the library allocate a table of that size


@dataclass(frozen=True)
class Rows:
    """x [N, length] int32, filled up on the left with the padding token; cut [N]: how many tokens of each text did not fit."""

    x: np.ndarray
    cut: np.ndarray


def make_tokenizer(texts: Sequence[str], *, vocab: int = 4096) -> "Tokenizer":
    """A byte-level BPE tokenizer trained on the texts, with `<pad>` as token 0: it can write every text, and loses nothing.

    vocab: tokens at most, 257 of them `<pad>` and the bytes. `.save(path)` writes it, `read_tokenizer` reads it. Raises
    BadInput for no texts, or fewer tokens than that.
    """
    library = _library()
    decoders, models, pre_tokenizers, trainers = (
        getattr(library, name) for name in ("decoders", "models", "pre_tokenizers", "trainers")
    )
    require(len(texts) > 0, "expected one text at least to train a tokenizer on")
    require(vocab >= 257, f"vocab must be at least 257, {PAD} and the 256 bytes; got {vocab}")
    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=[PAD], initial_alphabet=alphabet, show_progress=False)
    )
    return made


def read_tokenizer(path: str | Path) -> "Tokenizer":
    """The tokenizer of a `tokenizer.json`, or of the folder of a released model that holds one. Raises BadInput for neither."""
    library = _library()
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    require(path.is_file(), f"{path}: no such file; expected tokenizer.json, or the folder of a released model with one")
    try:
        text = path.read_text(encoding="utf-8-sig")
        _check_ids(json.loads(text))
        return library.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more special
        raise BadInput(f"{path}: not a tokenizer ({error})") from None


def _check_ids(found: Any) -> None:
    """BadInput for what ends the process inside the library, or fails there when a text is encoded."""
    require(isinstance(found, dict) and isinstance(found.get("model"), dict), "no entry model")
    model, added = found["model"], found.get("added_tokens") or []
    vocab = model.get("vocab") or {}
    tokens = [entry[0] for entry in vocab] if isinstance(vocab, list) else list(vocab)
    ids = [] if isinstance(vocab, list) else list(vocab.values())
    ids += [entry["id"] for entry in added]
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < LARGEST]
    require(not wrong, f"a token's number must lie in 0..{LARGEST - 1}, got {wrong[:1]}")
    unknown, known = model.get("unk_token"), {*tokens, *(entry["content"] for entry in added)}
    require(unknown is None or unknown in known, f"its unk_token {unknown!r} is no token")
    place = model.get("unk_id")
    require(place is None or (type(place) is int and 0 <= place < len(tokens)), f"its unk_id {place!r} is no token's number")


def encode(
    tokenizer: "Tokenizer", texts: Sequence[str], *, length: int, form: str = SLOT, vocab: int | None = None, pad: int = 0
) -> Rows:
    """Each text as one row of `length` tokens, in an instruction's form; rows are not packed.

    form: what stands around the text, such as "Review: {text}\\nSentiment:"; special tokens in it are such. A text that does
    not fit loses its last tokens, never the form's; what looks like a special token in a text, "<pad>" say, is text.
    vocab: of the model; ids beyond it are refused, for the tokenizer is not the model's then.
    Raises BadInput for a form without `{text}` or with two, one that leaves no room, an empty text, a token that is `pad`.
    """
    require(form.count(SLOT) == 1, f"form must hold {SLOT} once, got {form!r}")
    empty = [i for i, text in enumerate(texts) if not text.strip()]
    require(len(texts) > 0 and not empty, f"expected texts that are not empty; number {empty[:1]} is")
    before, after = (tokenizer.encode(part, add_special_tokens=False).ids for part in form.split(SLOT))
    with _as_text(tokenizer):
        inner = [found.ids for found in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    room = length - len(before) - len(after)
    require(room >= 1, f"length={length} leaves no room for a text: the form alone has {len(before) + len(after)} tokens")
    x = np.full((len(texts), length), pad, np.int32)
    for i, (row, ids) in enumerate(zip(x, inner)):
        whole = [*before, *ids[:room], *after]
        require(pad not in whole, f"text {i}, {texts[i][:40]!r}, holds token {pad}, which fills rows up: give another pad")
        row[length - len(whole) :] = whole
    largest = int(x.max())
    require(
        vocab is None or largest < vocab,
        f"token {largest} is beyond the model's vocabulary of {vocab}: this tokenizer does not belong to it",
    )
    return Rows(x, np.array([max(0, len(ids) - room) for ids in inner]))


def label_tokens(tokenizer: "Tokenizer", words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each label word, for `likelihood.of_labels`; after a form that ends without a space, begin with one."""
    with _as_text(tokenizer):
        return tuple(tuple(tokenizer.encode(word, add_special_tokens=False).ids) for word in words)


@contextlib.contextmanager
def _as_text(tokenizer: "Tokenizer") -> Iterator[None]:
    """What is written like a special token is encoded as any other text."""
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        yield
    finally:
        tokenizer.encode_special_tokens = before


def _library():
    try:
        import tokenizers
    except ImportError:
        raise BadInput("tokens need the tokenizers library: pip install 'dememo-jax[text]'") from None
    return tokenizers
