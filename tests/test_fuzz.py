"""Inputs that nobody would type, and files that somebody may send: each is done, or refused in one sentence.

By default a few of each kind; about a thousand with `-m slow`. The inputs are the same in every run.
"""

import contextlib
import json
import os
import struct

import numpy as np
import pytest
from fuzzing import (
    DAMAGE,
    ENDINGS,
    HOSTILE_ARRAYS,
    JSONS,
    LINES,
    MODES,
    ODDITIES,
    Place,
    arrays,
    attempt,
    copied,
    damage,
    files,
    fuzz,
    image,
    limit,
    no_work,
    oddity,
    options,
    plain,
)
from hypothesis import given
from hypothesis import strategies as st
from test_pretrained import CONFIG, folder

from dememo_jax import sources
from dememo_jax.cli.configs import COMMANDS
from dememo_jax.errors import BadInput

PLACES = st.floats(0, 1, exclude_max=True)


def sizes(few, many):
    return pytest.mark.parametrize("size", [few, pytest.param(many, marks=pytest.mark.slow)])


def some_of(names, first, few, many):
    """A few inputs of the first, and many of all."""
    return [*((name, few) for name in first), *(pytest.param(name, many, marks=pytest.mark.slow) for name in names)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("fuzz"))


def each(size, strategy, body):
    """`body` of as many inputs."""
    fuzz(size)(given(strategy)(body))()


@contextlib.contextmanager
def standing(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "size"), some_of(COMMANDS, ("quickstart", "train", "unlearn"), 3, 40))
def test_options(command, size, place, no_pictures):
    def one(chosen):
        run = place.fresh() / "run"
        arguments = (*place.basis(command), "--run", run, *(word for words in chosen for word in words))
        with standing(place.root), no_work(command):
            attempt(arguments, run, shown="--plan" in arguments)

    each(size, options(place, command), one)


# --- damaged run folders ------------------------------------------------------------------------------------------

NEXT = {
    "unlearn": ("victim", ("unlearn", "--from", "X", "--forget-class", 0, "--epochs", 1)),
    "certify": ("victim", ("certify", "--from", "X", "--target-class", 1, "--draws", 120, "--strategy", "vmap", "--width", 8)),
    "audit": ("unlearned", ("audit", "--from", "X", "--attack", "sok")),
    "sharpness": ("victim", ("sharpness", "--from", "X", "--solver", "one_step", "--batch", 16)),
    "train": ("protected", ("train", "--from", "X", "--model", "mlp", "--epochs", 1)),
    "report": ("victim", ("report", "X")),
    "join": ("part", ("join", "X")),
}
AGAIN = {  # the same command, on the folder itself
    "train again": ("victim", ("train", "--data", "D", "--model", "mlp", "--epochs", 2, "--every", 1)),
    "sisa again": ("sisa", ("--delete", 5)),
    "sisa deletes": ("sisa", ("--delete", 7)),
    "certify again": ("certified", ()),
    "certify on": ("certified", ("--draws", 160)),
}


def carried_out(place, name, source, run):
    """The next command of a run folder; what it made, if it did."""
    if name in NEXT:
        command = tuple(source if word == "X" else word for word in NEXT[name][1])
        return attempt((*command, "--run", run), run)
    of, more = AGAIN[name]
    command = more if of == "victim" else (*place.basis("certify" if of == "certified" else of), *more)
    return attempt((*(place.data if word == "D" else word for word in command), "--run", source), source)


@pytest.mark.parametrize(("name", "size"), some_of({**NEXT, **AGAIN}, ("unlearn", "report"), 2, 20))
def test_damaged_runs(name, size, place, no_pictures):
    """What is damaged is refused, told and made again, or without consequence: never another result without a word."""
    original = getattr(place, {**NEXT, **AGAIN}[name][0])
    whole = place.fresh()
    expected = carried_out(place, name, copied(original, place.root / f"whole-{whole.name}"), whole / "run")
    assert expected.code == 0, expected.said

    def one(which, how, where):
        here = place.fresh()
        folder = copied(original, place.root / f"copy-{here.name}")
        there = files(folder)
        damage(there[int(which * len(there))], how, where)
        found = carried_out(place, name, folder, here / "run")
        told = any(word in found.said for word in ("warning", "damaged", "missing", "older version"))
        same = plain(found.result) == plain(expected.result)
        assert found.code or same or told, (there[int(which * len(there))], how, where, found.said)

    fuzz(size)(given(PLACES, st.sampled_from(DAMAGE), PLACES)(one))()


# --- hostile data -------------------------------------------------------------------------------------------------


def trained(place, data):
    run = data.parent / "run"
    return attempt(("train", "--data", data, "--model", "mlp", "--epochs", 1, "--run", run), run)


@sizes(3, 60)
def test_hostile_arrays(size, place, no_pictures):
    def one(changed, missing):
        path = place.fresh() / "mine.npz"
        found = {**arrays(), **changed}
        np.savez(path, **{name: value for name, value in found.items() if name != missing})
        trained(place, path)

    fuzz(size)(given(HOSTILE_ARRAYS, st.sampled_from(("", "", "", "y_test", "x_train")))(one))()


@sizes(2, 40)
def test_damaged_arrays(size, place, no_pictures):
    def one(how, where):
        path = place.fresh() / "mine.npz"
        path.write_bytes(place.data.read_bytes())
        damage(path, how, where)
        trained(place, path)

    fuzz(size)(given(st.sampled_from(DAMAGE), PLACES)(one))()


@sizes(2, 60)
def test_hostile_image_folders(size, place, no_pictures):
    def one(mode, ending, what, split, label):
        root = place.fresh() / "images"
        for part in ("train", "test"):
            for name in ("a", "b"):
                (root / part / name).mkdir(parents=True)
                for i in range(4):
                    image(root / part / name / f"{i}.png", mode if i % 2 else "RGB")
        (root / split / label).mkdir(exist_ok=True, parents=True)
        oddity(root / split / label / ending, what)
        trained(place, root)

    labels = st.sampled_from(("a", "a", "b", "c", ".d", "e\u0301", "\x1b[31m"))
    odd = st.sampled_from(MODES), st.sampled_from(ENDINGS), st.sampled_from(ODDITIES), st.sampled_from(("train", "test", "val"))
    fuzz(size)(given(*odd, labels)(one))()


@sizes(2, 60)
def test_hostile_texts(size, place):
    def one(lines, odd, suffix, encoding, split):
        here = place.fresh()
        good = {
            "tsv": [f"{word} film {i}\t{label}" for i in range(3) for word, label in (("good", "pos"), ("bad", "neg"))],
            "jsonl": [json.dumps({"text": f"{word} film", "label": word}) for word in ("good", "bad") for _ in range(3)],
        }[suffix]
        more = lines if suffix == "tsv" else [json.dumps(value) for value in odd]
        for part in ("train", "test"):
            found = [*good, *more] if part == split else good
            (here / f"x_{part}.{suffix}").write_bytes("\n".join(found).encode(encoding, "surrogatepass"))
        data, run = here / f"x_train.{suffix}", here / "run"
        attempt(("protect", "--method", "regtext", "--data", data, "--run", run, "--text.length", 16), run)

    encodings = st.sampled_from(("utf-8", "utf-8", "utf-8-sig", "utf-16"))
    kinds = st.sampled_from(("tsv", "jsonl")), encodings, st.sampled_from(("train", "test"))
    fuzz(size)(given(LINES, st.lists(JSONS, min_size=1, max_size=2), *kinds)(one))()


@sizes(2, 40)
def test_hostile_tokenizers(size, place):
    whole = sources.make_tokenizer(["good film number one", "bad film"], vocab=300).to_str()

    def one(how, where, key, value):
        path = place.fresh()
        known = {**json.loads(whole), **({key: value} if how == "key" else {})}
        (path / "tokenizer.json").write_text(json.dumps(known))
        if how != "key":
            damage(path / "tokenizer.json", how, where)
        run = path / "run"
        how = ("--data", place.texts, "--text.tokenizer", path / "tokenizer.json")
        attempt(("protect", "--method", "regtext", *how, "--run", run), run)

    keys = st.sampled_from(
        ("model", "pre_tokenizer", "decoder", "added_tokens", "normalizer", "truncation", "padding", "version")
    )
    fuzz(size)(given(st.sampled_from(("key", "key", *DAMAGE)), PLACES, keys, JSONS)(one))()


@sizes(2, 50)
def test_hostile_indices(size, place, no_pictures):
    def one(kind, values, dtype, text, how, where):
        here = place.fresh()
        path = here / ("mine.npy" if kind == "npy" else "mine.txt")
        if kind == "npy":
            np.save(path, np.asarray([min(value, 2**62) for value in values], np.int64).astype(dtype))
        else:
            path.write_text(text.join(map(str, values)), encoding="utf-8")
        if how != "none":
            damage(path, how, where)
        attempt(("unlearn", "--from", place.victim, "--forget-index", path, "--epochs", 1, "--run", here / "run"), here / "run")

    values = st.lists(st.integers(-2, 60), max_size=5) | st.just([0, 1] * 24) | st.just(list(range(48))) | st.just([10**30])
    dtypes = st.sampled_from(("i8", "u1", "?", "f8", "U5"))
    separators = st.sampled_from(("\n", "\r\n", ",", " ", "\n\n", "\ufeff"))
    kinds = st.sampled_from(("npy", "txt")), values, dtypes, separators
    fuzz(size)(given(*kinds, st.sampled_from(("none", "none", *DAMAGE)), PLACES)(one))()


# --- hostile models -----------------------------------------------------------------------------------------------


@sizes(6, 100)
def test_hostile_models(size, place):
    """Released models come with their folder: what is read of it is the model, or refused."""

    def one(what, key, value, how, where):
        here = folder(place.fresh())
        if what == "config":
            (here / "config.json").write_text(json.dumps({**CONFIG, key: value}))
        elif what == "header":
            content = (here / "model.safetensors").read_bytes()
            length = int(where * 2**63) if how == "flip" else len(content) - 8
            (here / "model.safetensors").write_bytes(struct.pack("<Q", length) + content[8:])
        else:
            damage(here / what, how, where)
        with limit(60), contextlib.suppress(BadInput):
            assert sources.decoder(here)[1].params

    odd = JSONS | st.sampled_from((-8, 0, 8.5, None, "abc", True, [], {"rope_type": "linear"}, "../x", 3, 16, 40, 2**20))
    keys = st.sampled_from((*CONFIG, "head_dim", "rope_parameters", "hidden_act", "attention_bias", "quantization_config"))
    whats = st.sampled_from(("config", "config", "config.json", "model.safetensors", "header"))
    fuzz(size)(given(whats, keys, odd, st.sampled_from(DAMAGE), PLACES)(one))()
