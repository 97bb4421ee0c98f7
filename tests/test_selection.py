"""Which examples and classes the flags name: masks and indices from files, classes by number and by name."""

import json
import os

import numpy as np
import pytest
from commands import inside, result
from PIL import Image

from dememo_jax import sources
from dememo_jax.cli import classes, lineage, selection
from dememo_jax.errors import BadInput

COUNT = 20
MASK = np.arange(COUNT) % 4 == 3


PLACES = np.flatnonzero(MASK)


def numbers(values):
    return "\n".join(str(int(value)) for value in values) + "\n"


def index_file(tmp_path, content):
    path = tmp_path / ("m.npy" if isinstance(content, np.ndarray) else "m.txt")
    np.save(path, content) if isinstance(content, np.ndarray) else path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        MASK,
        MASK.astype(int),
        MASK.astype(np.uint8),
        numbers(MASK).encode(),
        PLACES,
        PLACES[::-1].astype(">i8"),
        numbers(PLACES).encode(),
        b"\xef\xbb\xbf" + numbers(PLACES).encode(),
    ],
)
def test_masks_and_indices(tmp_path, content):
    np.testing.assert_array_equal(selection.indices(index_file(tmp_path, content), COUNT), np.flatnonzero(MASK))


def test_what_a_file_is_read_as_is_said(tmp_path, capsys):
    selection.indices(index_file(tmp_path, MASK.astype(int)), COUNT)
    assert "read as a mask, of 5 examples" in " ".join(capsys.readouterr().out.split())
    np.testing.assert_array_equal(selection.indices(index_file(tmp_path, b"3\n3\n7\n3\n"), COUNT), [3, 7])
    assert "2 of the 4 indices are named more than once" in " ".join(capsys.readouterr().err.split())
    np.testing.assert_array_equal(selection.indices(index_file(tmp_path, np.array([0, 1, 1])), COUNT), [0, 1])  # indices


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (np.array([-1]), r"no example \[-1\]"),
        (b"-5\n", r"no example \[-5\]"),
        (np.array([COUNT]), r"no example \[20\]"),
        (b"1" * 30 + b"\n", "no example"),
        (b"9" * 5000 + b"\n", "one index a line"),
        (np.array([0.0, 1.0]), "float64"),
        (MASK[:7], "mask"),
        (MASK[:, None].astype(int), "mask"),
        (b"text\n1\n", "one index a line"),
        (b"\xff\xfe", "one index a line"),
        (bytes(10**6), "larger than"),
    ],
)
def test_index_files_that_are_refused(tmp_path, content, says):
    with pytest.raises(BadInput, match=says):
        selection.indices(index_file(tmp_path, content), COUNT)


def test_only_files_are_index_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none.npy", "/dev/zero"):
        with pytest.raises(BadInput, match="No such file"):
            selection.indices(type(tmp_path)(path), COUNT)


# --- classes by name ---------------------------------------------------------------------------------------------


def known(names, count=None):
    count = len(names) if count is None else count
    return lineage.Known(name="set", test=None, classes=count, inputs={}, names=tuple(names))


NUMBERS = known(["10", "2", "1"])  # a list of names may have any order


@pytest.mark.parametrize(
    ("base", "given", "expected"),
    [
        (known(["cat", "dog", "three"]), "three", 2),
        (known(["cat", "dog", "three"]), 1, 1),
        (known(["cat", "dog", "three"]), "1", 1),
        (known(["cat", "dog", "three"]), "name:dog", 1),
        (known(["caf\u00e9", "bar"]), "cafe\u0301", 0),
        (known(["0", "1", "2"]), 2, 2),
        (known([], 5), 4, 4),
        (NUMBERS, 10, 0),
        (NUMBERS, 0, 0),
        (NUMBERS, "name:2", 1),
        (NUMBERS, "number:2", 2),
        (NUMBERS, "name:1", 2),
    ],
)
def test_numbers_of_classes(base, given, expected):
    assert classes.number(given, base) == expected


@pytest.mark.parametrize(
    ("base", "given", "says"),
    [
        (known(["cat", "dog"]), "bird", r"class bird does not exist; there are class 0 \(cat\), class 1 \(dog\)"),
        (known(["cat", "dog"]), 2, "class 2 does not exist"),
        (known(["cat", "dog"]), -1, "class -1 does not exist"),
        (known([], 3), "cat", "class 0, class 1, class 2"),
        (NUMBERS, 2, r"class 1 \(2\) or class 2 \(1\): say name:2 or number:2"),
        (NUMBERS, "name:0", "does not exist"),
        (NUMBERS, "9" * 5000, "does not exist"),
    ],
)
def test_classes_that_are_refused(base, given, says):
    with pytest.raises(BadInput, match=says):
        classes.number(given, base)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of images of three classes, and a run on it."""
    folder = tmp_path_factory.mktemp("named")
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        for k, name in enumerate(("zebra", "ant", "bee")):
            (folder / "set" / part / name).mkdir(parents=True)
            for i in range(count):
                image = random.integers(0, 60, (6, 6, 3), np.uint8)
                image[:, k] += 150
                Image.fromarray(image).save(folder / "set" / part / name / f"{i}.png")
    assert inside("train", "--data", folder / "set", "--model", "mlp", "--epochs", 1, "--run", folder / "v") == 0
    return folder


def configuration(run):
    return json.loads((run / "config.json").read_text())["config"]


def test_names_in_flags_tables_and_configurations(trained, tmp_path, capsys, no_pictures):
    assert configuration(trained / "v")["class_names"] == ["ant", "bee", "zebra"]
    how = ("--method", "finetune", "--epochs", 1, "--from", trained / "v", "--run", tmp_path / "u")
    assert inside("unlearn", *how, "--forget-class", "zebra") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "forget-class: class 2 (zebra)" in said
    assert "of 6 examples of class 2 (zebra)" in said
    assert configuration(tmp_path / "u")["forget_class"] == [2]
    np.testing.assert_array_equal(np.load(tmp_path / "u" / "forget.npy"), np.repeat([False, False, True], 6))
    assert inside("unlearn", *how, "--forget-class", 2) == 0  # the same run
    assert inside("unlearn", *how[:-1], tmp_path / "w", "--forget-class", "horse") == 2
    assert "there are class 0 (ant), class 1 (bee), class 2 (zebra)" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "w").exists()
    audit = ("--attack", "signals", "--from", tmp_path / "u", "--run", tmp_path / "a")
    assert inside("audit", *audit, "--target-class", "bee") == 0
    assert "class 1 (bee)" in result(tmp_path / "a")["sections"][0]["summary"]


def test_a_release_keeps_the_names(trained, tmp_path, no_pictures):
    data = ("--data", trained / "set", "--method", "random", "--model", "mlp")
    assert inside("protect", *data, "--run", tmp_path / "p", "--classes", "bee") == 0
    released = tmp_path / "p" / "release" / "released.npz"
    assert sources.class_names(str(released)) == ("ant", "bee", "zebra")
    assert json.loads((released.parent / "manifest.json").read_text())["configuration"]["classes"] == [1]
    note = result(tmp_path / "p")["sections"][0]["tables"][0]["note"]
    assert "8 of 255 grey levels, so 8; 8 measured" in note


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_any_number_of_channels_is_protected_and_drawn(tmp_path, channels):
    random = np.random.default_rng(channels)
    arrays = {f"x_{part}": random.integers(0, 256, (6, 6, 6, channels), np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "set.npz", **arrays, y_train=np.arange(6) % 2, y_test=np.arange(6) % 2)
    data = ("protect", "--data", tmp_path / "set.npz", "--method", "random", "--run", tmp_path / "p")
    assert inside(*data, "--images") == 2
    assert not (tmp_path / "p").exists()
    assert inside(*data) == 0
    assert (tmp_path / "p" / "examples.png").stat().st_size > 1000
    assert f"{channels} channels" in result(tmp_path / "p")["sections"][0]["pictures"][0][1]


def test_a_budget_beyond_the_longest_change(tmp_path, capsys):
    assert inside("protect", "--method", "lsp", "--radius", 500, "--run", tmp_path / "p") == 2
    assert "longest possible change is 8" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "p").exists()
