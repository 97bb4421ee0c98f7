"""What the fuzz is made of: runs to begin from, odd values, files broken in many ways, and what every outcome must be."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import shutil
import signal
import types
import typing
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from commands import inside
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from PIL import Image

from dememo_jax import cli
from dememo_jax.cli import quickstart
from dememo_jax.cli.configs import COMMANDS

SECONDS = 300.0  # that one input may take; the slowest that end take ten on an idle machine


class TooLong(BaseException):
    """An input that did not end in its time."""


class Accepted(BaseException):
    """A command that takes minutes found nothing wrong, and would begin its work."""


def fuzz(size: int) -> settings:
    """The same inputs every time, and as many; nothing is kept between runs, and failures are shown as they were met."""
    return settings(
        max_examples=size, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip


class Outcome(NamedTuple):
    code: int
    said: str
    result: dict | None  # what the run folder holds, where the code is 0


@contextlib.contextmanager
def limit(seconds: float):
    def over(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(arguments, run: Path, *, shown: bool = False) -> Outcome:
    """The command, and all that must hold of whatever it does.

    A code of 0 comes with a result in strict JSON, unless the command only shows something. Any other comes with one sentence,
    and a refused command leaves no folder that was not there. Nothing else may leave the command: no traceback, no hang.
    """
    there, said, accepted = run.exists() or run.is_symlink(), io.StringIO(), False
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), limit(SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about fonts and the like
        try:
            code = inside(*arguments)
        except Accepted:
            code, accepted = 0, True
    text = said.getvalue()
    sentences = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in text
    if code == 0:
        assert not sentences, text
        return Outcome(0, text, None if accepted or shown else read(run))
    assert code in (1, 2), (code, text)
    assert len(sentences) == 1 or (text.strip() and _unparsable(arguments)), text
    assert code == 1 or there or not run.exists(), f"refused, and {sorted(run.rglob('*'))} stays: {text}"
    assert not (run / "result.json").exists() or there, text
    return Outcome(code, text, None)


def _unparsable(arguments) -> bool:
    """Whether the words are none of the command's, so that its usage is the answer."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.parse([str(argument) for argument in arguments])
        except SystemExit:
            return True
    return False


def read(run: Path) -> dict:
    """result.json, which is strict JSON."""

    def refused(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((run / "result.json").read_text(), parse_constant=refused)


def plain(done: dict | None) -> Any:
    """What a result says, less what every run has of its own: seconds, and on a page the names of folders."""
    values = None if done is None else _less(done["values"])
    return list(values.values()) if done is not None and done["config"]["command"] == "report" else values


def _less(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _less(part) for name, part in value.items() if "seconds" not in name and name not in ("log", "date")}
    return [_less(part) for part in value] if isinstance(value, list) else value


# --- runs to begin from -------------------------------------------------------------------------------------------


class Place:
    """A folder with data and finished runs, made when they are first asked for; every input gets a folder of its own."""

    def __init__(self, root: Path):
        self.root, self.count = root, 0
        (root / "fifo.npz").parent.mkdir(exist_ok=True)
        for name in ("fifo", "fifo.npz", "fifo.npy"):
            os.mkfifo(root / name)
        (root / "dangling").symlink_to(root / "nowhere")
        (root / "loop").symlink_to(root / "loop")
        (root / "text.txt").write_text("private")
        (root / "empty").mkdir()

    def fresh(self) -> Path:
        self.count += 1
        folder = self.root / f"input-{self.count}"
        folder.mkdir()
        return folder

    def made(self, name: str, *arguments) -> Path:
        assert inside(*arguments, "--run", self.root / name) == 0
        return self.root / name

    @functools.cached_property
    def data(self) -> Path:
        np.savez(self.root / "tiny.npz", **arrays())
        return self.root / "tiny.npz"

    @functools.cached_property
    def texts(self) -> Path:
        for part in ("train", "test"):
            lines = [f"{word} film number {i}\t{label}" for i in range(6) for word, label in (("good", "pos"), ("bad", "neg"))]
            (self.root / f"t_{part}.tsv").write_text("\n".join(lines))
        return self.root / "t_train.tsv"

    @functools.cached_property
    def victim(self) -> Path:
        return self.made("victim", "train", "--data", self.data, "--model", "mlp", "--epochs", 2, "--every", 1)

    @functools.cached_property
    def unlearned(self) -> Path:
        how = ("--from", self.victim, "--forget-class", 0, "--epochs", 1)
        return self.made("unlearned", "unlearn", *how)

    @functools.cached_property
    def protected(self) -> Path:
        return self.made("protected", "protect", "--data", self.data, "--method", "random", "--radius", 0.1, "--model", "mlp")

    @functools.cached_property
    def certified(self) -> Path:
        return self.made("certified", *self.basis("certify"))

    @functools.cached_property
    def part(self) -> Path:
        return self.made("part", *self.basis("certify"), "--first", 0)

    @functools.cached_property
    def sisa(self) -> Path:
        return self.made("sisa", *self.basis("sisa"), "--delete", 5)

    def basis(self, command: str) -> tuple:
        """The command in its shortest form, less --run."""
        return {
            "quickstart": lambda: ("quickstart", "--model", "mlp"),
            "protect": lambda: ("protect", "--data", self.data, "--method", "random", "--radius", 0.1, "--model", "mlp"),
            "train": lambda: ("train", "--data", self.data, "--model", "mlp", "--epochs", 1),
            "unlearn": lambda: ("unlearn", "--from", self.victim, "--forget-class", 0, "--epochs", 1),
            "sisa": lambda: ("sisa", "--data", self.data, "--model", "mlp", "--epochs", 2, "--shards", 2, "--slices", 1),
            "audit": lambda: ("audit", "--from", self.victim, "--attack", "sok", "--target-class", 0, "--epochs", 1),
            "certify": lambda: (
                "certify", "--from", self.victim, "--target-class", 1, "--draws", 120, "--strategy", "vmap", "--width", 8,
                "--eta", 0.01,
            ),
            "join": lambda: ("join", self.part),
            "sharpness": lambda: ("sharpness", "--from", self.victim, "--solver", "one_step", "--batch", 16),
            "report": lambda: ("report", self.victim),
        }[command]()  # fmt: skip


def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    y = np.arange(66) % 3
    x = (draw.integers(0, 60, (66, 6, 6, 1)) + 60 * y[:, None, None, None]).astype(np.uint8)
    return {"x_train": x[:48], "y_train": y[:48], "x_test": x[48:], "y_test": y[48:]}


@contextlib.contextmanager
def no_work(command: str):
    """quickstart stops where its work would begin."""

    def accepted(config):
        raise Accepted

    usual = quickstart.story
    quickstart.story = accepted if command == "quickstart" else usual
    try:
        yield
    finally:
        quickstart.story = usual


# --- options ------------------------------------------------------------------------------------------------------

NUMBERS = (
    "0", "-1", "1", "2", "3", "0.5", "nan", "inf", "-inf", "1e-30", "1e30", "1e39", "1e400", "", "abc", "2147483648",
    "9223372036854775808", "1" + "0" * 31, "0x10", "1_0", " 2", "\u00b2", "1e3", "True", "--", "4294967295",
)  # fmt: skip
NAMES = (
    "", ".", "..", "/", "nowhere", "n" * 300, "a\udcff", "dangling", "loop", "fifo", "fifo.npz", "fifo.npy", "/dev/zero",
    "/dev/null", "tiny.npz", "victim", "protected", "unlearned", "certified", "victim/config.json", "empty", "text.txt", "[x]",
    "a\\b", "~", "a b", "$x", "-", "\x1b[31m", "x.tsv", "x.jsonl", "t_train.tsv", "cifar10", "digits",
)  # fmt: skip
PATTERNS = ("", "(", "*", "[", "(?P<x", "\\", "Dense", "kernel", "nothing", "Dense|kernel", ".", "\x1b")
QUICK = {  # of words that may be chosen, those that do not take long
    "model": ("mlp", "cnn", "decoder", "vit-tiny", "magic"),
    "method": (
        "random", "random-class", "ops", "lsp", "ar", "cuda", "regtext", "retrain", "finetune", "ssd", "noisy", "l1-sparse",
        "influence", "cf-k", "eu-k", "output-noise", "scrub", "magic",
    ),
    "attack": ("sok", "signals", "thresholds", "recovery", "relearn", "random", "u-lira", "magic"),
    "solver": ("one_step", "hvp", "diagonal", "normalized", "magic"),
}  # fmt: skip
SKIPPED = ("run", "shadows", "text", "regtext")


def option(place: Place, command: str) -> st.SearchStrategy:
    """A flag of the command with one value or two, odd or not."""
    kind = COMMANDS[command]
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind) if field.name not in SKIPPED]
    if command in ("join", "report"):  # which have no flags, but names
        return st.sampled_from(NAMES).map(lambda name: (name,))
    return st.one_of(*(_values(name, hints[name]) for name in names))


def _values(name: str, hint: Any) -> st.SearchStrategy:
    flag = "--from" if name == "source" else "--" + name.replace("_", "-")
    several, hint = _plain_type(hint)
    if hint is bool:
        return st.sampled_from([(flag,), (f"--no-{flag[2:]}",), (flag, "maybe")])
    if typing.get_origin(hint) is Literal:
        words = QUICK.get(name, (*typing.get_args(hint), "magic", ""))
    elif hint in (int, float):
        words = NUMBERS
    else:
        words = PATTERNS if name == "only" else NAMES
    most = 2 if several else 1
    return st.lists(st.sampled_from(words), min_size=1, max_size=most).map(lambda values: (flag, *values))


def _plain_type(hint: Any) -> tuple[bool, Any]:
    """Whether a flag takes several values, and of which type each is."""
    several = False
    while True:
        origin, parts = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            hint = parts[0]
        elif origin is tuple:
            several, hint = True, parts[0]
        elif origin in (typing.Union, types.UnionType):
            hint = next(part for part in parts if part is not type(None))
        else:
            return several, hint


def options(place: Place, command: str) -> st.SearchStrategy:
    return st.lists(option(place, command), min_size=1, max_size=2)


# --- damage -------------------------------------------------------------------------------------------------------

DAMAGE = ("delete", "empty", "truncate", "garbage", "zeros", "flip", "digit", "swap", "folder", "link")


def damage(path: Path, how: str, where: float) -> None:
    """Break a file in one of many ways, at a place in [0, 1)."""
    content = bytearray(path.read_bytes())
    at = int(where * len(content))
    if how == "delete":
        path.unlink()
        return
    if how in ("folder", "link"):
        path.unlink()
        path.mkdir() if how == "folder" else path.symlink_to(path.parent / "nowhere")
        return
    if how == "empty":
        content = bytearray()
    elif how == "truncate":
        content = content[:at]
    elif how == "garbage":
        content = bytearray(random.Random(at).randbytes(max(1, len(content))))
    elif how == "zeros":
        content[at:] = bytes(len(content) - at)
    elif how == "flip" and content:
        content[at] ^= 1 << (at % 8)
    elif how == "swap" and len(content) > 1:
        content[at - 1], content[at] = content[at], content[at - 1]
    elif how == "digit":
        digits = [i for i, byte in enumerate(content) if 48 <= byte < 58]
        if digits:
            one = digits[int(where * len(digits))]
            content[one] = 48 + (content[one] - 47) % 10
    path.write_bytes(content)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def copied(folder: Path, into: Path) -> Path:
    """A run folder beside the others, so that what it says of its sources still leads there."""
    shutil.copytree(folder, into)
    return into


# --- files of data ------------------------------------------------------------------------------------------------

DTYPES = ("u1", "i8", "i4", "f4", "f8", "f2", ">f4", ">i8", "c8", "?", "g", "U3", "S2", "M8[s]", "u8")
SHAPES = ((48, 6, 6, 1), (48, 6, 6, 3), (48, 1, 6, 6), (48, 6, 6), (48,), (), (0, 6, 6, 1), (48, 0, 6, 1), (48, 6, 6, 0),
          (47, 6, 6, 1), (48, 6, 6, 2), (48, 6, 6, 4), (48, 1), (48, 2, 2, 1), (1, 6, 6, 1))  # fmt: skip
FILLS = ("whole", "zeros", "nan", "inf", "negative", "large", "fractions")


def array(dtype: str, shape: tuple[int, ...], fill: str) -> np.ndarray:
    draw = np.random.default_rng(1)
    values = {
        "whole": lambda: draw.integers(0, 3, shape),
        "zeros": lambda: np.zeros(shape),
        "nan": lambda: np.full(shape, np.nan),
        "inf": lambda: np.full(shape, np.inf),
        "negative": lambda: -draw.integers(0, 3, shape),
        "large": lambda: draw.integers(0, 2**40, shape),
        "fractions": lambda: draw.uniform(size=shape),
    }[fill]()
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return np.asarray(values).astype(dtype)
        except (ValueError, TypeError):
            return np.asarray(values)


HOSTILE_ARRAYS = st.dictionaries(
    st.sampled_from(("x_train", "y_train", "x_test", "y_test", "class_names", "extra")),
    st.builds(array, st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.sampled_from(FILLS)),
    min_size=1, max_size=2,
)  # fmt: skip

MODES = ("L", "RGB", "RGBA", "P", "1", "I;16", "LA", "CMYK", "I", "F")
ENDINGS = (
    "a.png",
    "a.jpg",
    "a.webp",
    "A.PNG",
    "a.gif",
    "a.txt",
    ".hidden.png",
    "Thumbs.db",
    "a\udcff.png",
    "a b.png",
    "\u202e.png",
)
ODDITIES = ("text", "empty", "fifo", "dangling", "folder", "cut", "html", "postscript", "larger", "none")


def image(path: Path, mode: str, size: tuple[int, int] = (6, 6)) -> None:
    """A picture of a mode, in whatever format its name allows; as PNG where it allows none."""
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 255, (*size, 3)).astype(np.uint8))
    picture = Image.fromarray(np.full(size, 40000, np.uint16)) if mode == "I;16" else picture.convert(mode)
    buffer = io.BytesIO()
    for form in ({"jpg": "JPEG", "webp": "WEBP", "gif": "GIF"}.get(path.suffix[1:].lower(), "PNG"), "PNG", "TIFF"):
        buffer = io.BytesIO()
        with contextlib.suppress(OSError, KeyError, ValueError):
            picture.save(buffer, form)
            break
    path.write_bytes(buffer.getvalue())


def oddity(path: Path, what: str) -> None:
    """Something in the place of a picture."""
    if what == "fifo":
        os.mkfifo(path)
    elif what == "dangling":
        path.symlink_to(path.parent / "nowhere")
    elif what == "folder":
        path.mkdir()
    elif what == "larger":
        image(path, "RGB", (9, 7))
    elif what == "cut":
        image(path, "RGB")
        path.write_bytes(path.read_bytes()[:-20])
    elif what != "none":
        content = {
            "text": b"private",
            "empty": b"",
            "html": b"<html>",
            "postscript": b"%!PS-Adobe-3.0\n%%BoundingBox: 0 0 6 6\n",
        }
        path.write_bytes(content[what])


LETTERS = st.one_of(
    st.sampled_from(
        ("good", "bad", " ", "\t", "", "\ufeff", "<pad>", "\u2028", "\x00", "\r", '"', "\\", "\x1b", "1", "01", "label")
    ),
    st.text(max_size=4),
)
LINES = st.lists(st.lists(LETTERS, min_size=1, max_size=4).map("".join), min_size=1, max_size=6)
NAMED = st.sampled_from(("text", "sentence", "label", "x"))
JSONS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("1" * 5000)),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMED, inner, max_size=3),
    max_leaves=4,
)
