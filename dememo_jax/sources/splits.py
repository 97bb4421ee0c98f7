"""One split of a data set on disk, example by example, and how it comes into memory."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dememo_jax.errors import require


@dataclass(frozen=True)
class Split:
    """`read(i)` gives image i, [H, W, C] of this shape, and its label; it may be called from many threads at once."""

    name: str  # for messages
    count: int
    classes: int | None  # None: not known before the labels are read
    shape: tuple[int, ...]
    read: Callable[[int], tuple[np.ndarray, int]]
    digest: str


def fingerprint(*parts: bytes) -> str:
    """A short digest of what tells one data set from another."""
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()


def gather(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, C] as they are stored and labels [N], read by a pool of threads."""
    x = np.empty((split.count, *split.shape), split.read(0)[0].dtype)
    y = np.empty(split.count, np.int64)

    def put(i: int) -> None:
        x[i], y[i] = split.read(i)

    for _ in _each(put, split.count):
        pass
    return x, y


def count_classes(split: Split) -> int:
    """K; where the data set does not say, by reading all labels once."""
    return split.classes or 1 + max(_each(lambda i: int(split.read(i)[1]), split.count))


def _each(work: Callable[[int], int | None], count: int) -> Iterator:
    with ThreadPoolExecutor() as pool:
        yield from pool.map(work, range(count))


def require_memory(*splits: Split) -> None:
    """BadInput when the images do not fit into this machine's memory as float32."""
    need, have = sum(4 * split.count * math.prod(split.shape) for split in splits), memory()
    require(
        need < have,
        f"{splits[0].name}: the images need {need / 1e9:,.1f} GB in memory and this machine has {have / 1e9:,.1f} GB: "
        f"train straight from disk (--stream, sources.stream), or choose a smaller --side",
    )


def memory() -> int:
    """Bytes of physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
