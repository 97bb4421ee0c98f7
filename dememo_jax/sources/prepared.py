"""A data set that TensorFlow Datasets has prepared, read by random access without TensorFlow."""

from pathlib import Path

import numpy as np

from dememo_jax.errors import BadInput, require
from dememo_jax.sources import pictures
from dememo_jax.sources.splits import Split, fingerprint

ELSEWHERE = "a path to an .npz, or a folder of images (train/CLASS/ and test/CLASS/, for sets such as ImageNet-100)"


def opened(name: str, data_dir: Path | str | None, side: int | None) -> tuple[Split, Split]:
    """(train, test); `validation` serves where there is no `test`. BadInput says how to prepare what is not there."""
    builder = _builder(name, data_dir)
    try:
        source = builder.as_data_source()
    except (NotImplementedError, AssertionError, FileNotFoundError, ValueError) as error:
        raise BadInput(
            f"TFDS data set {name!r} is not prepared for random access in {builder.data_dir}: run `tfds build {name} "
            f"--file_format=array_record` (this needs TensorFlow, once), name another --data-dir, or give {ELSEWHERE}"
        ) from error
    test = "test" if "test" in source else "validation"
    for split in ("train", test):
        require(split in source and len(source[split]), f"TFDS data set {name!r} has no split {split!r}, only {_names(source)}")
    pair = _keys(builder)
    labelled = len(pair) == 2 and set(pair) <= set(builder.info.features)
    require(labelled, f"TFDS data set {name!r} has no images with labels, only {_names(builder.info.features)}")
    train, held_out = (_split(name, builder.info, source[split], split, pair, side) for split in ("train", test))
    return train, held_out


def names(name: str, data_dir: Path | str | None) -> list[str]:
    """The classes' names in the order of their numbers, where the data set has them."""
    builder = _builder(name, data_dir)
    return list(getattr(builder.info.features[_keys(builder)[-1]], "names", None) or [])


def _builder(name: str, data_dir: Path | str | None):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir)
    except ValueError:  # an unknown name, version or configuration
        known = f"digits, the name of a data set in TFDS, {ELSEWHERE}"
        raise BadInput(f"unknown data set {name!r}: expected {known}") from None


def _keys(builder) -> tuple:
    return tuple(builder.info.supervised_keys or ("image", "label"))


def _names(mapping) -> str:
    return ", ".join(map(str, mapping))


def _split(name: str, info, source, split: str, pair: tuple, side: int | None) -> Split:
    image, label = pair
    where = f"{name}: {split}"

    def stored(i: int) -> tuple[np.ndarray, int]:
        row = source[i]
        return pictures.cut(np.asarray(row[image]), side), int(row[label])

    shape = tuple(info.features[image].shape)
    if side or None in shape:
        shape = stored(0)[0].shape

    def read(i: int) -> tuple[np.ndarray, int]:
        x, y = stored(i)
        return pictures.require_shape(x, shape, f"{where} {i}"), y

    identity = (info.full_name, split, len(source), info.splits[split].num_bytes, shape)
    classes = getattr(info.features[label], "num_classes", None)
    return Split(where, len(source), classes, shape, read, fingerprint(repr(identity).encode()))
