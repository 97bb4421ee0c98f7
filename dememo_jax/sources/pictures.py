"""Single images: read as what they show, brought to one size."""

import struct
import zlib
from pathlib import Path

import numpy as np

from dememo_jax.errors import BadInput, require

FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow knows many more, some of which run programs
PLAIN = ("1", "L", "P", "RGB", "CMYK")  # modes that `convert("RGB")` keeps the meaning of
OPAQUE = {"LA": "L", "PA": "RGB", "RGBA": "RGB", "RGBX": "RGB"}  # and those with transparency, where none is used


def read(path: Path, side: int | None) -> np.ndarray:
    """The image as it is shown, RGB uint8 [H, W, 3], cut to `side` x `side` where that is given.

    EXIF orientation is applied; grey images of 16 bits are brought to 8. Raises BadInput, naming the file, for one that
    cannot be read or is of another format, for transparent pixels (what they show depends on what lies behind), several
    frames, and modes of pixels that are neither grey nor colours.
    """
    from PIL import Image, ImageOps

    broken = (OSError, ValueError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError)
    try:
        with Image.open(path, formats=FORMATS) as picture:
            require(getattr(picture, "n_frames", 1) == 1, f"{path}: an image of several frames; store one frame a file")
            return np.asarray(_cut(_shown(ImageOps.exif_transpose(picture), path), side))
    except BadInput:
        raise
    except broken as error:
        raise BadInput(f"{path}: not a readable image ({error})") from error


def _shown(picture, path: Path):
    """The picture in RGB, or BadInput where that would be a guess."""
    from PIL import Image

    mode = picture.mode
    if mode in OPAQUE or "transparency" in picture.info:
        alpha = picture.convert("RGBA").getchannel("A").getextrema()[0]
        require(alpha == 255, f"{path}: has transparent pixels; put it onto a background and store it without transparency")
        return picture.convert(OPAQUE.get(mode, "RGB")).convert("RGB")
    if mode == "I" or mode.startswith("I;16"):
        deep = np.asarray(picture).astype(np.int64)
        require(deep.min() >= 0 and deep.max() <= 65535, f"{path}: grey levels of more than 16 bits; store 8 or 16")
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8)).convert("RGB")
    require(mode in PLAIN, f"{path}: pixels of mode {mode!r}; store it as grey or RGB")
    return picture.convert("RGB")


def cut(image: np.ndarray, side: int | None) -> np.ndarray:
    """An image uint8 [H, W, C], grey or RGB, cut to `side` x `side`."""
    from PIL import Image

    if side is None or image.shape[:2] == (side, side):
        return image
    plain = image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] in (1, 3)
    require(plain, f"--side takes grey or RGB images of bytes, got {image.dtype} {list(image.shape)}")
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return np.asarray(_cut(picture, side)).reshape(side, side, -1)


def _cut(picture, side: int | None):
    """The largest square in the middle, resized by antialiased bilinear interpolation: the shorter side becomes `side`."""
    from PIL import Image, ImageOps

    return picture if side is None else ImageOps.fit(picture, (side, side), Image.Resampling.BILINEAR)


def require_shape(image: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    """The image; BadInput when it has another shape than the rest."""
    require(
        image.shape == shape,
        f"{where}: an image of {list(image.shape)} among others of {list(shape)}; give --side to bring all to one size",
    )
    return image
