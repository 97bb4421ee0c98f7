"""A folder of images, `train/CLASS/*` and `test/CLASS/*`; `val/` serves where there is no `test/`."""

import os
from pathlib import Path

import numpy as np

from dememo_jax.errors import BadInput, require
from dememo_jax.sources import pictures, words
from dememo_jax.sources.splits import Split, fingerprint

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
LAYOUT = f"expected train/CLASS/ and test/CLASS/ or val/CLASS/ with images ({', '.join(SUFFIXES)})"


def opened(folder: Path, side: int | None) -> tuple[Split, Split]:
    """(train, test). The classes are the names of the folders in train, numbered from 0 in the order of `names`.

    BadInput names the path and what is wrong with it: a part that is missing, an image outside a class, a test class that
    train lacks, an empty class, a file that is no image. Images are opened only when they are read.
    """
    train, test = _parts(folder)
    known = names(folder)
    files = _files(train, known)
    shape = (side, side, 3) if side else pictures.read(train / files[0][0], None).shape
    return _split(train, files, len(known), shape, side), _split(test, _files(test, known), len(known), shape, side)


def names(folder: Path) -> list[str]:
    """The classes' names, in the order of their numbers: sorted, as numbers where all are whole numbers."""
    train, test = _parts(folder)
    found = words.ordered(_classes(train), str(train))
    require(len(found) > 1, f"{train}: {len(found)} class folders, at least two are needed; {LAYOUT}")
    foreign = ", ".join(sorted(set(_classes(test)) - set(found)))
    require(not foreign, f"{test}: train/ has no class {foreign}; class folders must have the same names in both")
    return found


def _parts(folder: Path) -> tuple[Path, Path]:
    require(folder.is_dir(), f"{folder}: no such folder; {LAYOUT}, or a path to an .npz")
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    require((folder / "train").is_dir(), f"{folder}: there is no train/; {LAYOUT}")
    if test is None:
        raise BadInput(f"{folder}: there is neither test/ nor val/; {LAYOUT}")
    return folder / "train", test


def _classes(part: Path) -> dict[str, str]:
    """Folder of each class's name; the file system may spell the name in another Unicode form."""
    entries = [entry for entry in sorted(part.iterdir()) if not entry.name.startswith(".")]
    loose = [entry for entry in entries if entry.suffix.lower() in SUFFIXES and not entry.is_dir()]
    require(not loose, f"{loose[0] if loose else part}: an image outside a class folder; {LAYOUT}")
    found: dict[str, str] = {}
    for entry in filter(Path.is_dir, entries):
        name = words.composed(entry.name)
        require(name not in found, f"{part}: two folders are named {name}, in two Unicode forms; put them together")
        found[name] = entry.name
    return found


def _files(part: Path, names: list[str]) -> list[tuple[str, int, int]]:
    """(path below the part, label, bytes) of every image, class by class, in the order of their names."""
    found, folders = [], _classes(part)
    for label, name in enumerate(names):
        if name not in folders:
            continue  # a class that the test split does not have
        below = part / folders[name]
        with os.scandir(below) as entries:
            inside = sorted((entry.name, entry) for entry in entries if not entry.name.startswith("."))
        require(inside, f"{below}: a class without images; {LAYOUT}")
        for file, entry in inside:
            require(file.lower().endswith(SUFFIXES), f"{below / file}: not an image; {LAYOUT}")
            require(entry.is_file(), f"{below / file}: no file (a broken link, a folder or a pipe); {LAYOUT}")
            found.append((f"{folders[name]}/{file}", label, entry.stat().st_size))
    require(found, f"{part}: no images; {LAYOUT}")
    return found


def _split(part: Path, files: list[tuple[str, int, int]], classes: int, shape: tuple[int, ...], side: int | None) -> Split:
    paths, labels = [path for path, _, _ in files], np.asarray([label for _, label, _ in files])

    def read(i: int) -> tuple[np.ndarray, int]:
        path = part / paths[i]
        return pictures.require_shape(pictures.read(path, side), shape, str(path)), int(labels[i])

    digest = fingerprint(repr((files, shape)).encode())
    return Split(str(part), len(files), classes, shape, read, digest)
