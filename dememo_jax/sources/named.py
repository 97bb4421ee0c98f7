"""Which data set a name means, and the whole of it, or of one split, in memory."""

from pathlib import Path

from dememo_jax import data as sets
from dememo_jax.errors import require
from dememo_jax.sources import arrays, folder, prepared
from dememo_jax.sources.labelled import is_texts
from dememo_jax.sources.splits import Split, gather, require_memory
from dememo_jax.types import Dataset

SPLITS = ("train", "test")


def load(name: str, data_dir: str | Path | None = None, *, side: int | None = None) -> tuple[Dataset, Dataset]:
    """(train, test) of `"digits"`, of a path to an `.npz` or to a folder of images, or of a TFDS name.

    digits: 1,797 real 8 x 8 images, a quarter of every class for testing, the same split every time.
    .npz: x_train, y_train, x_test, y_test (or train_images, train_labels, test_images, test_labels); images [N, H, W, C], or
    greys [N, H, W], uint8 or float in [0, 1]; labels 0..K-1.
    folder: train/CLASS/ and test/CLASS/ (or val/CLASS/) with PNG, JPEG or WebP files, read as RGB. The sorted names of the
    classes in train, as numbers where all are, have the labels 0..K-1 (`class_names` lists them); the examples are numbered
    class by class, in the order of their file names.
    TFDS: splits `train` and `test` (or `validation`) of a data set already prepared under `data_dir`; reading needs no
    TensorFlow.

    side: pixels. Images of a folder or of TFDS are resized so that the shorter side has so many (bilinear, antialiased),
    and the middle square is kept. Without it all images must have one size.
    Raises BadInput with what was expected, before it reads images that would not fit into memory.
    """
    if _is_arrays(name):
        _check_side(name, side)
        found = arrays.read(name)
    else:
        splits = opened(name, data_dir, side)
        require_memory(*splits)
        (x, y), (x_test, y_test) = (gather(split) for split in splits)
        found = x, y, x_test, y_test
    arrays.check(*found, where=name)
    return sets.make(*found[:2]), sets.make(*found[2:])


def load_split(name: str, data_dir: str | Path | None = None, *, split: str = "test", side: int | None = None) -> Dataset:
    """One split of what `load` loads, read alone: for the test images of a set that is trained on as a stream.

    Raises BadInput as `load` does.
    """
    found = chosen(name, data_dir, split, side)
    require_memory(found)
    return sets.make(*gather(found))


def classes(train: Dataset) -> int:
    """K, the number of classes."""
    return int(train.y.max()) + 1


def class_names(name: str, data_dir: str | Path | None = None) -> tuple[str, ...]:
    """The names of classes 0..K-1 of what `load` loads, or () where it has none.

    They are the folders' names, the `class_names` of an `.npz`, or those that TFDS knows.
    """
    if _is_arrays(name):
        return tuple(arrays.names(name))
    return tuple(folder.names(Path(name)) if is_path(name) else prepared.names(name, data_dir))


def is_path(name: str) -> bool:
    """Whether the data set of that name is a file or a folder of the user's."""
    path = Path(name)
    inside = "/" in name or (path / "train").is_dir()
    return path.suffix == ".npz" or is_texts(name) or path.is_absolute() or name.startswith(".") or (path.is_dir() and inside)


def opened(name: str, data_dir: str | Path | None, side: int | None) -> tuple[Split, Split]:
    """(train, test), of which nothing is read before it is asked for, except the files that hold plain arrays."""
    _check_side(name, side)
    if _is_arrays(name):
        found = arrays.read(name)
        arrays.check(*found, where=name)
        return arrays.split(name, *found[:2]), arrays.split(name, *found[2:])
    train, test = folder.opened(Path(name), side) if is_path(name) else prepared.opened(name, data_dir, side)
    require(
        train.shape == test.shape,
        f"{name}: train and test images differ in shape, {list(train.shape)} and {list(test.shape)}; give --side",
    )
    return train, test


def chosen(name: str, data_dir: str | Path | None, split: str, side: int | None) -> Split:
    """The split of that name, `"train"` or `"test"`."""
    require(split in SPLITS, f"split must be 'train' or 'test', got {split!r}")
    return opened(name, data_dir, side)[SPLITS.index(split)]


def _is_arrays(name: str) -> bool:
    path = Path(name)
    return name == "digits" or (bool(path.suffix) and not path.is_dir())


def _check_side(name: str, side: int | None) -> None:
    require(side is None or side >= 1, f"--side must be a positive number of pixels, got {side}")
    resizable = side is None or not _is_arrays(name)
    require(resizable, f"--side is for folders of images and TFDS sets; the arrays of {name} have one size")
