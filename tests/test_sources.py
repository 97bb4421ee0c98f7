"""Data from disk: what loads, and that everything else is refused with a reason."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dememo_jax import sources
from dememo_jax.errors import BadInput


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
    with pytest.raises(BadInput, match=r"tfds build cifar10"):  # known, but not prepared here: says what to do
        sources.load("cifar10", data_dir=tmp_path)


def test_tfds_of_tensors(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    given = arrays(x_train=np.random.default_rng(1).integers(0, 256, (9, 6, 6, 1), np.uint8), y_train=np.arange(9) % 3)
    given |= {"x_test": given["x_train"][:4] // 2, "y_test": given["y_train"][:4]}

    class DememoToySquares(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(6, 6, 1), dtype=np.uint8),
                    "label": tfds.features.Tensor(shape=(), dtype=np.int64),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

        def _split_generators(self, manager):
            return {"train": self._generate_examples("train"), "test": self._generate_examples("test")}

        def _generate_examples(self, split):
            for i, (image, label) in enumerate(zip(given[f"x_{split}"], given[f"y_{split}"])):
                yield i, {"image": image, "label": label}

    DememoToySquares(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    train, test = sources.load("dememo_toy_squares", data_dir=tmp_path)
    for got, part in ((train, "train"), (test, "test")):
        want = sorted((int(y), x.tolist()) for x, y in zip(given[f"x_{part}"], given[f"y_{part}"]))
        assert sorted((int(y), np.round(255 * x).astype(int).tolist()) for x, y in zip(np.asarray(got.x), got.y)) == want
