"""What a data owner publishes: protected images in 8 bits, as an `.npz` and as PNG files, checked against the budget.

A perturbation is made in floats; what others train on is rounded to 255 grey levels. Everything here is counted after
that rounding.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import numpy as np

from dememo_jax import data as sets
from dememo_jax import files, projected
from dememo_jax.errors import BadInput, require
from dememo_jax.types import Dataset, Perturbation

Form = Literal["signed", "positive_part"]
OURS = ("counts", "shape", "hash", "measured")  # the entries of a manifest that `write` fills in


@dataclass(frozen=True)
class Budget:
    """The largest changes of any image, counted on the 8-bit grid, and what was allowed."""

    linf: int  # grey levels, of 255
    l2: float  # of an image, with pixels in [0, 1]
    pixels: int  # positions of an image with a change in any channel
    outside: int  # images that changed although the mask does not name them
    norm: str | None
    radius: float | None
    allowed: float | None  # in the unit of that norm: grey levels, l2, or pixels; None = unbounded
    holds: bool


# --- 8 bits ------------------------------------------------------------------------------------------------------


def quantise(data: Dataset, perturbation: Perturbation, *, form: Form = "signed", batch: int = 1024) -> np.ndarray:
    """Protected images as uint8 [N, H, W, C]: round(255 clip(x + delta)) where the mask says so, round(255 x) elsewhere.

    Halves go up, and so does what lies 0.0001 of a level below: float noise must not decide. Works on `batch` images
    at a time. Raises BadInput when the perturbation does not cover the data.

    form="positive_part" reproduces a bug of the published code of Huang et al. 2021 (unlearnable examples; their issue
    13): all negative noise is dropped, and the sum is cut down to whole grey levels, not rounded. It is for comparing
    with numbers that were measured with that code; it is never what an owner wants.
    """
    require(form in ("signed", "positive_part"), f"form must be 'signed' or 'positive_part', got {form!r}")
    sets.check_covers(perturbation, data)
    index = np.asarray(data.index)
    rows, mask = np.asarray(perturbation.row)[index], np.asarray(perturbation.mask)[index]
    released = np.empty(data.x.shape, np.uint8)
    for at in _blocks(len(index), batch):
        x = _unit(np.asarray(data.x[at], np.float32))
        noise = np.asarray(perturbation.delta[rows[at]], np.float32)
        if form == "signed":
            moved = _levels(np.clip(x + noise, 0.0, 1.0))
        else:
            moved = np.clip(_levels(x) + np.clip(255 * noise, 0, 255), 0, 255).astype(np.uint8)
        released[at] = np.where(mask[at].reshape(-1, *[1] * (x.ndim - 1)), moved, _levels(x))
    return released


def _unit(x: np.ndarray) -> np.ndarray:
    inside = not x.size or (x.min() >= -1e-6 and x.max() <= 1 + 1e-6)
    require(inside, "a release is of images in [0, 1]: bring others there by data.make(x, y, box=(low, high))")
    return x


def _levels(x: np.ndarray) -> np.ndarray:
    return np.floor(255 * x + 0.5001).astype(np.uint8)


def _blocks(count: int, batch: int) -> Iterator[slice]:
    require(batch >= 1, f"batch must be at least 1, got {batch}")
    return (slice(start, start + batch) for start in range(0, count, batch))


# --- the budget --------------------------------------------------------------------------------------------------


def measure(
    clean, released: np.ndarray, mask, *, norm: str | None = None, radius: float | None = None, batch: int = 1024
) -> Budget:
    """How far `released` uint8 [N, ...] is from `clean` [N, ...] (uint8, or float in [0, 1]), image by image.

    The clean images are rounded as well: a change is the number of grey levels between two 8-bit images. What rounding
    may add to a float budget depends on whether the clean images lie on the 8-bit grid.
    - "linf": floor(255 radius + 0.5) grey levels on the grid; ceil(255 radius) off it, where both ends are rounded.
    - "l2": radius + r sqrt(D) / 255, D values an image; r is 0.5 on the grid and 1 off it.
    - "l0": at most `radius` positions.
    - None: unbounded, only measured.
    In every case nothing outside the mask [N] may change. `holds` says whether all of it is so; `verify` raises.
    """
    require(norm in ("linf", "l2", "l0", None), f"norm must be 'linf', 'l2', 'l0' or None, got {norm!r}")
    require(norm is None or (radius is not None and radius > 0), f"a budget in {norm} needs a positive radius, got {radius}")
    if norm == "l2":
        projected.check_l2(radius or 0.0, released.shape[1:])
    require(released.dtype == np.uint8, f"released images must be uint8, got {released.dtype}")
    require(clean.shape == released.shape, f"clean and released images differ in shape: {clean.shape}, {released.shape}")
    mask = np.asarray(mask)
    require(mask.shape == (len(released),), f"the mask must be [{len(released)}], got {mask.shape}")
    linf, l2, pixels, outside, on_grid = 0, 0.0, 0, 0, True
    for at in _blocks(len(released), batch):
        x = np.asarray(clean[at])
        levels = x if x.dtype == np.uint8 else _levels(_unit(x.astype(np.float32)))
        on_grid &= x.dtype == np.uint8 or bool(np.abs(255 * x.astype(np.float32) - levels).max() < 1e-3)
        change = np.abs(released[at].astype(np.int32) - levels).reshape(len(x), -1, x.shape[-1])
        linf = max(linf, int(change.max()))
        l2 = max(l2, float(np.sqrt(np.square(change).sum(axis=(1, 2)).max())) / 255)
        pixels = max(pixels, int(change.any(axis=2).sum(axis=1).max()))
        outside += int((change.any(axis=(1, 2)) & ~mask[at]).sum())
    allowed = None if radius is None else _allowed(norm, radius, math.prod(released.shape[1:]), on_grid)
    spent = {"linf": linf, "l2": l2, "l0": pixels, None: 0}[norm]
    return Budget(linf, l2, pixels, outside, norm, radius, allowed, outside == 0 and (allowed is None or spent <= allowed))


def _allowed(norm: str | None, radius: float, size: int, on_grid: bool) -> float | None:
    if norm == "linf":
        return math.floor(255 * radius + 0.5001) if on_grid else math.ceil(255 * radius - 1e-4)
    if norm == "l2":
        return radius + (0.5 if on_grid else 1.0) * math.sqrt(size) / 255 + 1e-6
    return None if norm is None else int(radius)


def in_words(budget: Budget) -> str:
    """The radius asked for, what it allows after rounding to 8 bits, and what was measured, side by side.

    Example:
        >>> in_words(Budget(3, 0.1, 9, 0, "linf", 2.525 / 255, 3, True))
        'l-inf radius 0.0099 is 2.525 of 255 grey levels, rounded up to 3; 3 measured'
    """
    if budget.radius is None or budget.allowed is None:
        return f"no budget in a norm; {budget.linf} of 255 grey levels, l2 {budget.l2:.3g} measured"
    if budget.norm == "linf":
        asked = 255 * budget.radius
        way = "rounded up to" if budget.allowed > asked + 1e-3 else "rounded down to" if budget.allowed < asked - 1e-3 else "so"
        levels = f"{asked:.4g} of 255 grey levels, {way} {budget.allowed}"
        return f"l-inf radius {budget.radius:.3g} is {levels}; {budget.linf} measured"
    if budget.norm == "l2":
        allowed = f"rounded up to {budget.allowed:.3g}, since every value may move by rounding"
        return f"l2 radius {budget.radius:.3g}, {allowed}; {budget.l2:.3g} measured"
    return f"{budget.allowed} pixels; {budget.pixels} measured"


def verify(budget: Budget) -> None:
    """BadInput, with the excess, unless the budget holds."""
    require(budget.outside == 0, f"{budget.outside} images outside the mask changed, by up to {budget.linf} grey levels")
    if not budget.holds and budget.allowed is not None:
        spent, unit = {"linf": (budget.linf, "grey levels"), "l2": (budget.l2, "in l2")}.get(
            budget.norm or "", (budget.pixels, "pixels")
        )
        raise BadInput(
            f"an image changed by {spent:.6g} {unit}, {spent - budget.allowed:.6g} more than the {budget.allowed:.6g} that a "
            f"radius of {budget.radius:.6g} allows in 8 bits (the largest change of a pixel is {budget.linf} grey levels)"
        )


# --- the folder --------------------------------------------------------------------------------------------------


def write(
    folder: str | Path,
    data: Dataset,
    test: Dataset,
    perturbation: Perturbation,
    *,
    manifest: Mapping[str, Any],
    norm: str | None = None,
    radius: float | None = None,
    images: bool = False,
    class_names: Sequence[str] = (),
    form: Form = "signed",
    batch: int = 1024,
) -> dict:
    """Write a release into `folder` and return its manifest; the folder is complete when `manifest.json` is there.

    - `released.npz`: x_train uint8 (protected), y_train, x_test uint8, y_test, as `sources.load` reads; `class_names` if given.
    - `images/<label>/<index>.png` when `images`: the training images, grey or RGB. Both names are padded with zeros,
      so that their order as text is their order as numbers: torchvision's ImageFolder gives label k the class k.
    - `manifest.json`: the given entries (method, configuration, seed, ...), then counts, shape, the hash (blake2b, 16
      bytes) of the clean and of the released arrays, and the budget measured on the released images.
    A write that was killed can be repeated, and a release can be written over an older one; nothing else is removed.
    Raises BadInput when the budget does not hold, when the manifest has an absolute path or one of our entries, and
    when `images` in the folder holds anything that is not of a release; OSError when the disk is full.
    """
    folder = Path(folder)
    _check_manifest(manifest)
    require(not images or data.x.shape[-1] in (1, 3), f"PNG files need 1 or 3 channels, got {data.x.shape[-1]}")
    released = quantise(data, perturbation, form=form, batch=batch)
    mask = np.asarray(perturbation.mask)[np.asarray(data.index)]
    budget = measure(data.x, released, mask, norm=norm, radius=radius, batch=batch)
    verify(budget)
    x_test = np.concatenate([_levels(_unit(np.asarray(test.x[at], np.float32))) for at in _blocks(len(test.y), batch)])
    arrays = {"x_train": released, "y_train": np.asarray(data.y), "x_test": x_test, "y_test": np.asarray(test.y)}
    full = {
        **manifest,
        "counts": {"train": len(data.y), "protected": int(mask.sum()), "test": len(test.y)},
        "shape": list(released.shape[1:]),
        "hash": {
            "clean": digest(data.x, data.y, test.x, test.y, batch=batch),
            "released": digest(*arrays.values(), batch=batch),
        },
        "measured": dataclasses.asdict(budget),
    }
    text = json.dumps(full, indent=1, allow_nan=False, default=_plain)
    folder.mkdir(parents=True, exist_ok=True)
    check_folder(folder)
    (folder / "manifest.json").unlink(missing_ok=True)
    names = {"class_names": np.asarray(class_names)} if class_names else {}
    files.write_arrays(folder / "released.npz", **arrays, **names)
    shutil.rmtree(folder / "images", ignore_errors=True)
    if images:
        part = folder / f"images{files.PART}"
        _write_images(part, released, arrays["y_train"])
        part.replace(folder / "images")
    files.write(folder / "manifest.json", text)
    return json.loads(text)


def check_folder(folder: str | Path) -> None:
    """BadInput when a release into `folder` would remove what is not of a release; call it before long work."""
    for strange in itertools.islice(_strangers(Path(folder) / "images"), 1):
        raise BadInput(f"{strange} is not of a release, which would replace that folder: move it away, or choose an empty one")


def digest(*arrays, batch: int = 1024) -> str:
    """The blake2b hash, 32 hexadecimal digits, of the types, shapes and values of arrays."""
    total = hashlib.blake2b(digest_size=16)
    for array in arrays:
        total.update(f"{array.dtype} {list(array.shape)} ".encode())
        for at in _blocks(len(array), batch):
            total.update(np.ascontiguousarray(array[at]).tobytes())
    return total.hexdigest()


def _strangers(folder: Path) -> Iterator[Path]:
    """What lies in a release's folder of images and is not of it."""
    if not folder.is_dir():
        yield from [folder] if folder.exists() else []
        return
    for inner in folder.iterdir():
        if not inner.name.isdecimal() or not inner.is_dir():
            yield inner
            continue
        yield from (path for path in inner.iterdir() if path.suffix != ".png" or not path.stem.isdecimal())


def _write_images(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)  # of a write that was killed
    label_width, index_width = len(str(labels.max())), max(5, len(str(len(labels) - 1)))
    for label in np.unique(labels):
        (folder / f"{label:0{label_width}}").mkdir(parents=True)
    for index, (image, label) in enumerate(zip(images, labels)):
        picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
        picture.save(folder / f"{label:0{label_width}}" / f"{index:0{index_width}}.png")


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    taken = ", ".join(sorted(set(manifest) & set(OURS)))
    require(not taken, f"the manifest has entries that the release fills in: {taken}")
    for name, value in _texts("", manifest):
        absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
        require(not absolute, f"the manifest is published, but its entry {name} is an absolute path: give a name instead")


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every string or path in nested mappings and sequences, with its dotted name."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(f"{name}.{key}".lstrip("."), part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(name, part)
    elif isinstance(value, str | Path):
        yield name, str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"cannot write {type(value).__name__} into a manifest")
