"""A folder of images, `train/CLASS/*` and `test/CLASS/*`; `val/` serves where there is no `test/`."""

import os
from pathlib import Path

import numpy as np

from dememo_jax.errors import BadInput, require
from dememo_jax.sources import pictures
from dememo_jax.sources.splits import Split, fingerprint

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
LAYOUT = f"expected train/CLASS/ and test/CLASS/ or val/CLASS/ with images ({', '.join(SUFFIXES)})"


def opened(folder: Path, side: int | None) -> tuple[Split, Split]:
    """(train, test). The classes are the sorted names of the folders in train, numbered from 0.

    BadInput names the path and what is wrong with it: a part that is missing, an image outside a class, a test class that
    train lacks, an empty class, a file that is no image. Images are opened only when they are read.
    """
    require(folder.is_dir(), f"{folder}: no such folder; {LAYOUT}, or a path to an .npz")
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    require((folder / "train").is_dir(), f"{folder}: there is no train/; {LAYOUT}")
    if test is None:
        raise BadInput(f"{folder}: there is neither test/ nor val/; {LAYOUT}")
    names = _classes(folder / "train")
    require(len(names) > 1, f"{folder / 'train'}: {len(names)} class folders, at least two are needed; {LAYOUT}")
    foreign = ", ".join(sorted(set(_classes(test)) - set(names)))
    require(not foreign, f"{test}: train/ has no class {foreign}; class folders must have the same names in both")
    files = _files(folder / "train", names)
    shape = (side, side, 3) if side else pictures.read(folder / "train" / files[0][0], None).shape
    return _split(folder / "train", files, len(names), shape, side), _split(test, _files(test, names), len(names), shape, side)


def _classes(part: Path) -> list[str]:
    entries = [entry for entry in part.iterdir() if not entry.name.startswith(".")]
    loose = sorted(entry for entry in entries if entry.suffix.lower() in SUFFIXES and entry.is_file())
    require(not loose, f"{loose[0] if loose else part}: an image outside a class folder; {LAYOUT}")
    return sorted(entry.name for entry in entries if entry.is_dir())


def _files(part: Path, names: list[str]) -> list[tuple[str, int, int]]:
    """(path below the part, label, bytes) of every image, class by class, in the order of their names."""
    found = []
    for label, name in enumerate(names):
        if not (part / name).is_dir():
            continue  # a class that the test split does not have
        with os.scandir(part / name) as entries:
            inside = sorted((entry.name, entry.stat().st_size) for entry in entries if not entry.name.startswith("."))
        require(inside, f"{part / name}: a class without images; {LAYOUT}")
        for file, size in inside:
            require(file.lower().endswith(SUFFIXES), f"{part / name / file}: not an image; {LAYOUT}")
            found.append((f"{name}/{file}", label, size))
    require(found, f"{part}: no images; {LAYOUT}")
    return found


def _split(part: Path, files: list[tuple[str, int, int]], classes: int, shape: tuple[int, ...], side: int | None) -> Split:
    paths, labels = [path for path, _, _ in files], np.asarray([label for _, label, _ in files])

    def read(i: int) -> tuple[np.ndarray, int]:
        path = part / paths[i]
        return pictures.require_shape(pictures.read(path, side), shape, str(path)), int(labels[i])

    digest = fingerprint(repr((files, shape)).encode())
    return Split(str(part), len(files), classes, shape, read, digest)
