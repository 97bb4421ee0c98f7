"""Data from disk: what loads, and that everything else is refused with a reason."""

import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dememo_jax import sources
from dememo_jax.errors import BadInput
from dememo_jax.sources import splits


def test_digits_are_a_stratified_quarter():
    train, test = sources.load("digits")
    assert train.x.shape == (1347, 8, 8, 1)
    assert test.x.shape == (450, 8, 8, 1)
    images, labels = load_digits(return_X_y=True)
    x, y = np.concatenate([train.x, test.x]), np.concatenate([train.y, test.y])
    assert x.min() == 0
    assert x.max() == 1
    got = sorted((int(label), *(16 * image).ravel().tolist()) for image, label in zip(x, y))
    assert got == sorted((int(label), *image.tolist()) for image, label in zip(images, labels))  # each image once, its label
    share = np.bincount(test.y) / np.bincount(labels)
    assert np.abs(share - 0.25).max() < 0.005
    np.testing.assert_array_equal(test.x, sources.load("digits")[1].x)  # the same split every time
    np.testing.assert_array_equal(train.index, np.arange(1347))
    assert sources.classes(train) == 10


def arrays(**changes):
    rng = np.random.default_rng(0)
    good = {
        "x_train": rng.integers(0, 256, (12, 4, 3, 2), np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": rng.integers(0, 256, (6, 4, 3, 2), np.uint8),
        "y_test": np.arange(6) % 3,
    }
    return good | changes


def stored(tmp_path, **changes):
    np.savez(tmp_path / "set.npz", **{name: array for name, array in arrays(**changes).items() if array is not None})
    return str(tmp_path / "set.npz")


@pytest.mark.parametrize("labels", [np.int64, np.uint8, np.int32])
def test_npz_of_bytes(tmp_path, labels):
    given = arrays()
    train, test = sources.load(stored(tmp_path, y_train=given["y_train"].astype(labels)))
    np.testing.assert_allclose(train.x, given["x_train"] / 255.0, rtol=1e-6)
    np.testing.assert_allclose(test.x, given["x_test"] / 255.0, rtol=1e-6)
    np.testing.assert_array_equal(train.y, given["y_train"])
    np.testing.assert_array_equal(test.y, given["y_test"])
    assert train.x.dtype == np.float32
    assert train.y.dtype == np.int32
    assert sources.classes(train) == 3


def test_npz_of_floats_is_taken_as_it_is(tmp_path):
    x = np.linspace(0, 1, 12 * 24).reshape(12, 4, 3, 2)
    train, _ = sources.load(stored(tmp_path, x_train=x, x_test=x[:6].astype(np.float32)))
    np.testing.assert_allclose(train.x, x, rtol=1e-6)


FLOATS = np.full((12, 4, 3, 2), 0.5)


def with_pixel(value):
    x = FLOATS.copy()
    x[3, 1, 2, 0] = value
    return x


Y = np.arange(12) % 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"y_test": None}, "missing y_test"),
        ({"x_train": None, "y_train": None}, "missing x_train, y_train"),
        ({"x_train": FLOATS[..., 0]}, "rank 4"),
        ({"x_test": FLOATS[:0]}, "no images"),
        ({"x_test": FLOATS[:6, :3]}, "differ in shape"),
        ({"x_train": FLOATS[:11]}, "one label an image"),
        ({"y_train": Y[:, None]}, "one label an image"),
        ({"y_train": Y / 1.0}, "integers"),
        ({"y_train": Y - 1}, "out of range"),
        ({"y_train": Y + 1}, "out of range: up to 3"),
        ({"y_train": np.where(Y == 1, 7, Y)}, "out of range: up to 7"),
        ({"y_train": np.where(Y == 0, 0, 127).astype(np.int8)}, "out of range: up to 127"),  # 127 + 1 does not fit the type
        ({"y_train": np.where(Y == 0, 0, 255).astype(np.uint8)}, "out of range: up to 255"),
        ({"y_train": np.where(Y == 0, 0, 2**62)}, "out of range: up to"),  # and must not be counted up to either
        ({"y_train": np.zeros(12, int)}, "single class"),
        ({"y_test": np.arange(6) % 4}, "y_test has labels out of range"),
        ({"x_train": with_pixel(-0.01)}, "negative pixels"),
        ({"x_train": with_pixel(np.nan)}, "NaN pixels"),
        ({"x_train": with_pixel(1.01)}, "above 1"),
        ({"x_train": with_pixel(np.inf)}, "above 1"),
        ({"x_train": (255 * FLOATS).astype(np.int64)}, "uint8 or float"),
        ({"x_train": FLOATS.astype(complex)}, "uint8 or float"),
        ({"x_train": FLOATS > 0.2}, "uint8 or float"),
    ],
)
def test_npz_refusals(tmp_path, changes, says):
    # The float images stand with float tests, so that nothing but the named fault is wrong.
    floats = {"x_test": FLOATS[:6]} if "x_train" in changes else {}
    with pytest.raises(BadInput, match=says):
        sources.load(stored(tmp_path, **{**floats, **changes}))


class Bomb:
    """Unpickling it makes a folder: the trace of code that must not run."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_pickles_are_never_opened(tmp_path):
    marker = tmp_path / "exploded"
    objects = np.empty(12, object)
    objects[:] = [Bomb(marker)] * 12
    with pytest.raises(BadInput):
        sources.load(stored(tmp_path, y_train=objects))
    bare = tmp_path / "bare.npz"
    bare.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(BadInput):
        sources.load(str(bare))
    assert not marker.exists()
    pickle.loads(bare.read_bytes())
    assert marker.exists()  # the bomb works


def broken(tmp_path, kind):
    path = Path(stored(tmp_path))
    whole = path.read_bytes()
    plain = io.BytesIO()
    np.save(plain, np.zeros(3))
    if kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("x_train,y_train\n1,2\n")
    elif kind == "npy":
        path.write_bytes(plain.getvalue())
    elif kind == "flipped":
        at = whole.index(b"\x93NUMPY") + 200
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    elif kind == "deflate":
        np.savez_compressed(path, **arrays(x_train=FLOATS))
        with zipfile.ZipFile(path) as file:
            at = file.getinfo("x_train.npy").header_offset + 60
        whole = path.read_bytes()
        path.write_bytes(whole[:at] + bytes(255 - b for b in whole[at : at + 20]) + whole[at + 20 :])
    elif kind == "not arrays":
        with zipfile.ZipFile(path, "w") as file:
            for key in ("x_train", "y_train", "x_test", "y_test"):
                file.writestr(key + ".npy", b"no array at all")
    return str(path)


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "npy", "flipped", "deflate", "not arrays"])
def test_damaged_files_are_refused(tmp_path, kind):
    with pytest.raises(BadInput, match=r"set\.npz"):
        sources.load(broken(tmp_path, kind))


def test_names_that_lead_nowhere(tmp_path):
    for name in ("no_such_set_anywhere", str(tmp_path / "none.npz"), str(tmp_path / "data.csv"), "data.csv"):
        with pytest.raises(BadInput, match=Path(name).name):
            sources.load(name, data_dir=tmp_path)
    for name in (str(tmp_path / "nowhere"), "./nowhere", "data/nowhere"):
        with pytest.raises(BadInput, match=r"nowhere.*folder"):
            sources.load(name)
    for name in ("cifar10", "cifar100"):  # known, but not prepared here: says what to do
        with pytest.raises(BadInput, match=rf"tfds build {name} .*\.npz, or a folder of images.*ImageNet-100"):
            sources.load(name, data_dir=tmp_path)


def prepare(folder, name, given, test="test", **features):
    """A prepared TFDS set, of Tensor features unless others are given: writing those needs no TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    plain = {
        "image": tfds.features.Tensor(shape=given["x_train"].shape[1:], dtype=np.uint8),
        "label": tfds.features.Tensor(shape=(), dtype=np.int64),
    }

    def info(self):
        described = tfds.features.FeaturesDict(plain | features)
        return tfds.core.DatasetInfo(builder=self, features=described, supervised_keys=("image", "label"))

    def rows(split):
        for i, (image, label) in enumerate(zip(given[f"x_{split}"], given[f"y_{split}"])):
            yield i, {"image": image, "label": label}

    parts = {
        "VERSION": tfds.core.Version("1.0.0"),
        "__module__": __name__,
        "_info": info,
        "_split_generators": lambda self, manager: {"train": rows("train"), test: rows("test")},
        "_generate_examples": lambda self: None,
    }
    made = type(name, (tfds.core.GeneratorBasedBuilder,), parts)
    made(data_dir=folder, file_format="array_record").download_and_prepare()


def examples(x, y):
    return sorted((int(label), np.round(255 * np.asarray(image)).astype(int).tolist()) for image, label in zip(x, y))


def test_tfds_of_tensors(tmp_path):
    given = arrays(x_train=np.random.default_rng(1).integers(0, 256, (9, 6, 6, 1), np.uint8), y_train=np.arange(9) % 3)
    given |= {"x_test": given["x_train"][:4] // 2, "y_test": given["y_train"][:4]}
    prepare(tmp_path, "DememoToySquares", given, test="validation")
    train, test = sources.load("dememo_toy_squares", data_dir=tmp_path)
    for got, part in ((train, "train"), (test, "test")):
        assert examples(got.x, got.y) == examples(given[f"x_{part}"] / 255, given[f"y_{part}"])
    assert sources.stream("dememo_toy_squares", tmp_path, batch=3).classes == 3  # counted: no feature says it
    small = sources.load("dememo_toy_squares", data_dir=tmp_path, side=3)[0]
    assert small.x.shape == (9, 3, 3, 1)
    np.testing.assert_allclose(small.x.mean(), train.x.mean(), atol=0.05)


def test_tfds_as_cifar_100(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    rng = np.random.default_rng(2)
    given = {"x_train": rng.integers(0, 256, (100, 32, 32, 3), np.uint8), "y_train": rng.permutation(100)}
    given |= {"x_test": given["x_train"][:7], "y_test": given["y_train"][:7]}
    prepare(tmp_path, "DememoToyHundred", given, label=tfds.features.ClassLabel(num_classes=100))
    train, test = sources.load("dememo_toy_hundred", data_dir=tmp_path)
    assert sources.classes(train) == 100
    assert examples(test.x, test.y) == examples(given["x_test"] / 255, given["y_test"])
    stream = sources.stream("dememo_toy_hundred", tmp_path, batch=40)
    assert (stream.count, stream.classes, stream.shape) == (100, 100, (32, 32, 3))
    for batch in stream.batches(0, 3):
        np.testing.assert_array_equal(batch.x, np.round(255 * train.x[batch.index]))
        np.testing.assert_array_equal(batch.y, train.y[batch.index])


def test_tfds_images_of_differing_sizes_need_a_side(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    rng = np.random.default_rng(3)
    rows = [{"image": rng.integers(0, 256, (20 + i, 30, 3), np.uint8), "label": i % 2} for i in range(4)]

    class Prepared:
        class info:
            features: ClassVar = {
                "image": tfds.features.Tensor(shape=(None, None, 3), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=2),
            }
            supervised_keys, full_name = ("image", "label"), "toy/1.0.0"
            splits: ClassVar = {name: SimpleNamespace(num_bytes=1) for name in ("train", "validation")}

        def as_data_source(self):
            return {"train": rows, "validation": rows[:2]}

    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: Prepared())
    with pytest.raises(BadInput, match=r"toy: train 1.*--side"):
        sources.load("toy")
    assert sources.load("toy", side=8)[0].x.shape == (4, 8, 8, 3)
    assert next(sources.stream("toy", side=8, batch=4).batches()).x.shape == (4, 8, 8, 3)


# --- folders of images -------------------------------------------------------------------------------------------


def pictures(root, sizes=((40, 30),), names=("ant", "bee"), parts=("train", "val")):
    """PNG and JPEG by turns; the images of a class have one colour, and on the left a white band that a crop cuts off."""
    for part in parts:
        for label, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for i, (width, height) in enumerate(sizes):
                image = np.full((height, width, 3), 60 + 100 * label, np.uint8)
                image[:, : (width - height) // 2] = 255
                Image.fromarray(image).save(root / part / name / f"{i}.{('png', 'JPG')[i % 2]}")
    return root


def test_a_folder_of_images(tmp_path):
    root = pictures(tmp_path, sizes=((40, 30), (64, 48), (33, 33)), names=("bee", "ant"))
    train, test = sources.load(str(root), side=16)
    assert train.x.shape == test.x.shape == (6, 16, 16, 3)
    assert train.y.tolist() == [0, 0, 0, 1, 1, 1]  # ant, bee: sorted
    colours = np.where(np.asarray(train.y) == 0, 160 / 255, 60 / 255)[:, None, None, None]
    middle = train.x[:, :, 2:]  # JPEG spreads the band by some pixels
    np.testing.assert_allclose(middle, np.broadcast_to(colours, middle.shape), atol=0.04)


def test_a_folder_of_one_size_needs_no_side(tmp_path, monkeypatch):
    root = pictures(tmp_path / "images", parts=("train", "val", "test"))
    (root / "test" / "ant" / ".DS_Store").write_bytes(b"")
    (root / "train" / "names.csv").write_text("ant, bee")
    Image.new("L", (40, 30), 200).save(root / "test" / "bee" / "grey.webp", lossless=True)
    train, test = sources.load(str(root))
    assert train.x.shape == (2, 30, 40, 3)
    assert len(test.y) == 3  # test/, not val/
    np.testing.assert_allclose(test.x[2], 200 / 255)
    monkeypatch.chdir(tmp_path)
    assert sources.load("images")[0].x.shape == train.x.shape


def cut_short(path):
    path.write_bytes(path.read_bytes()[:60])


FAULTS = {
    "there is no train/": lambda root: shutil.rmtree(root / "train"),
    "neither test/ nor val/": lambda root: shutil.rmtree(root / "val"),
    "at least two": lambda root: shutil.rmtree(root / "train" / "bee"),
    "no class wasp": lambda root: (root / "val" / "wasp").mkdir(),
    "cow: a class without images": lambda root: (root / "train" / "cow").mkdir(),
    "outside a class folder": lambda root: shutil.copy(root / "train" / "ant" / "0.png", root / "train"),
    r"notes\.txt: not an image": lambda root: (root / "train" / "ant" / "notes.txt").write_text("x"),
    r"0\.png: not a readable image": lambda root: cut_short(root / "val" / "bee" / "0.png"),
    r"1\.png.*give --side": lambda root: Image.new("RGB", (9, 9)).save(root / "train" / "bee" / "1.png"),
    r"val.bee.0\.png.*give --side": lambda root: Image.new("RGB", (9, 9)).save(root / "val" / "bee" / "0.png"),
}


@pytest.mark.parametrize("says", FAULTS)
def test_folders_that_are_refused(tmp_path, says):
    FAULTS[says](pictures(tmp_path))
    with pytest.raises(BadInput, match=says):
        sources.load(str(tmp_path))


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    pictures(tmp_path)
    monkeypatch.setattr(splits, "memory", lambda: 4 * 30 * 30 * 3 * 4)  # bytes: exactly the four images as float32
    with pytest.raises(BadInput, match="--stream"):
        sources.load(str(tmp_path), side=30)
    assert len(sources.load(str(tmp_path), side=29)[0].y) == 2
    assert len(sources.load_split(str(tmp_path), side=30).y) == 2  # half of it fits
    monkeypatch.undo()
    assert splits.memory() > 2**28


def test_side_is_for_images(tmp_path):
    for name in ("digits", stored(tmp_path)):
        with pytest.raises(BadInput, match="have one size"):
            sources.load(name, side=8)
    for side in (0, -3):
        with pytest.raises(BadInput, match="positive"):
            sources.load(str(pictures(tmp_path / str(side))), side=side)
