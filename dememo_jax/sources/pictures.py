"""Single images: read, brought to one size."""

import struct
import zlib
from pathlib import Path

import numpy as np

from dememo_jax.errors import BadInput, require


def read(path: Path, side: int | None) -> np.ndarray:
    """The image as RGB uint8 [H, W, 3], cut to `side` x `side` where that is given. BadInput when it cannot be read."""
    from PIL import Image

    broken = (OSError, ValueError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError)
    try:
        with Image.open(path) as picture:
            return np.asarray(_cut(picture.convert("RGB"), side))
    except broken as error:
        raise BadInput(f"{path}: not a readable image ({error})") from error


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
