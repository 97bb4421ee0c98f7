"""Data sets from disk to memory: scikit-learn's digits, an `.npz` file, or TensorFlow Datasets. Nothing is unpickled."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from dememo_jax import data as sets
from dememo_jax.errors import BadInput, require
from dememo_jax.types import Dataset

KEYS = ("x_train", "y_train", "x_test", "y_test")


def load(name: str, data_dir: str | Path | None = None) -> tuple[Dataset, Dataset]:
    """(train, test) of `"digits"`, of a path to an `.npz`, or of a TFDS name.

    digits: 1,797 real 8 x 8 images, a quarter of every class for testing, the same split every time.
    .npz: x_train, y_train, x_test, y_test; images [N, H, W, C], uint8 or float in [0, 1]; labels 0..K-1.
    TFDS: splits `train` and `test` of a data set already prepared under `data_dir`; reading needs no TensorFlow.
    Raises BadInput with what was expected.
    """
    if name == "digits":
        arrays = _digits()
    elif name.endswith(".npz") or Path(name).suffix or "/" in name:
        arrays = _npz(Path(name))
    else:
        arrays = _tfds(name, data_dir)
    check(*arrays, where=name)
    return sets.make(*arrays[:2]), sets.make(*arrays[2:])


def classes(train: Dataset) -> int:
    """K, the number of classes."""
    return int(train.y.max()) + 1


def check(x_train, y_train, x_test, y_test, *, where: str) -> None:
    """Raise BadInput unless the arrays are a classification set of images as `load` promises."""
    for x, y, part in ((x_train, y_train, "train"), (x_test, y_test, "test")):
        name = f"{where}: x_{part}"
        require(x.ndim == 4, f"{name} must have rank 4, [N, H, W, C]; got shape {list(x.shape)}")
        require(len(x) > 0, f"{name} has no images")
        floats = np.issubdtype(x.dtype, np.floating)
        require(x.dtype == np.uint8 or floats, f"{name} must be uint8 or float in [0, 1], got {x.dtype}")
        if floats:
            require(not np.isnan(x).any(), f"{name} has NaN pixels; every pixel must be a number in [0, 1]")
            require(x.min() >= 0, f"{name} has negative pixels (least {x.min():g}); expected floats in [0, 1]")
            require(x.max() <= 1, f"{name} has floats above 1 (largest {x.max():g}); divide by 255 or store uint8")
        name = f"{where}: y_{part}"
        require(y.ndim == 1 and len(y) == len(x), f"{name} must be [{len(x)}], one label an image; got {list(y.shape)}")
        require(np.issubdtype(y.dtype, np.integer), f"{name} must be integers, got {y.dtype}")
        require(y.min() >= 0, f"{name} has labels out of range: {y.min()} is negative, expected 0..K-1")
    require(
        x_train.shape[1:] == x_test.shape[1:],
        f"{where}: train and test images differ in shape, {list(x_train.shape[1:])} and {list(x_test.shape[1:])}",
    )
    present = np.unique(y_train)
    gaps = np.flatnonzero(present != np.arange(len(present)))
    require(len(present) > 1, f"{where}: y_train has a single class; at least two are needed")
    if len(gaps):
        raise BadInput(
            f"{where}: y_train has labels out of range: up to {present[-1]} but none is {gaps[0]}; renumber them 0..K-1"
        )
    require(y_test.max() <= present[-1], f"{where}: y_test has labels out of range: {y_test.max()}, expected 0..{present[-1]}")


def _digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    images = (x / 16).reshape(-1, 8, 8, 1).astype(np.float32)  # sixteen grey levels
    x_train, x_test, y_train, y_test = train_test_split(images, y, test_size=0.25, stratify=y, random_state=0)
    return x_train, y_train, x_test, y_test


def _npz(path: Path):
    require(path.suffix == ".npz", f"{path}: data files must be .npz, got {path.suffix or 'no suffix'!r}")
    require(path.is_file(), f"{path}: no such file; --data takes digits, a TFDS name or a path to an .npz")
    require(zipfile.is_zipfile(path), f"{path}: not a readable .npz of plain arrays (it is no zip archive, or a truncated one)")
    try:
        with np.load(path, allow_pickle=False) as file:
            found, arrays = list(file), {key: file[key] for key in KEYS if key in file}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{path}: not a readable .npz of plain arrays ({error})") from error
    missing = [key for key in KEYS if key not in arrays]
    require(not missing, f"{path}: missing {', '.join(missing)}; expected {', '.join(KEYS)}, found {', '.join(found)}")
    plain = all(isinstance(array, np.ndarray) for array in arrays.values())
    require(plain, f"{path}: not a readable .npz of plain arrays (a member is no array)")
    return tuple(arrays[key] for key in KEYS)


def _tfds(name: str, data_dir: str | Path | None):
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except ValueError:  # an unknown name, version or configuration
        known = "digits, a path to an .npz, or the name of a data set in TFDS"
        raise BadInput(f"unknown data set {name!r}: expected {known}") from None
    try:
        source = builder.as_data_source()
    except (NotImplementedError, AssertionError, FileNotFoundError, ValueError) as error:
        raise BadInput(
            f"TFDS data set {name!r} is not prepared for random access in {builder.data_dir}: run `tfds build {name} "
            f"--file_format=array_record` (this needs TensorFlow, once), name another folder, or convert it to an .npz"
        ) from error
    for split in ("train", "test"):
        require(split in source, f"TFDS data set {name!r} has no split {split!r}, only {', '.join(source)}")
    image, label = builder.info.supervised_keys or ("image", "label")
    arrays = []
    for split in ("train", "test"):
        rows = [source[split][i] for i in range(len(source[split]))]
        arrays += [np.stack([row[image] for row in rows]), np.asarray([row[label] for row in rows])]
    return tuple(arrays)
