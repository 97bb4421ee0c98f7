"""Batches straight from disk, for data sets that do not fit into memory."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dememo_jax.errors import require
from dememo_jax.sources.named import chosen
from dememo_jax.sources.splits import count_classes
from dememo_jax.types import Dataset


class Batches(Protocol):
    def __call__(self, start: int = 0, steps: int | None = None) -> Iterator[Dataset]: ...


@dataclass(frozen=True)
class Stream:
    """What is known of a data set before it is read, and `batches(start, steps)`: an endless iterator without `steps`.

    A batch is a `Dataset` on the host: x [B, H, W, C] as stored, uint8 or float in [0, 1], y [B] int32, index [B] int32, the
    places in the set, by which perturbations and masks join.
    """

    count: int
    classes: int
    shape: tuple[int, ...]  # of one image, [H, W, C]
    digest: str
    batches: Batches


def stream(
    name: str,
    data_dir: str | Path | None = None,
    *,
    batch: int,
    split: str = "train",
    side: int | None = None,
    seed: int = 0,
    threads: int = 16,
) -> Stream:
    """Shuffled passes over one split of what `load` loads, without holding it in memory (grain reads ahead two batches).

    As in `data.shuffled`, a pass has ceil(count / batch) batches and a shuffle of its own, and the last batch is filled up
    from the start of its pass. Batch t depends on (seed, t) alone: `batches(start)` goes on exactly where another process
    stopped. `threads` read at the same time; their number changes nothing else.
    Raises BadInput as `load` does, an unreadable image when it is its turn.
    """
    require(batch >= 1 and threads >= 1, f"need batch >= 1 and threads >= 1, got {batch} and {threads}")
    require(0 <= seed < 2**32, f"the seed of a stream must lie in 0..2^32 - 1, got {seed}")
    source = chosen(name, data_dir, split, side)
    padded = math.ceil(source.count / batch) * batch

    def batches(start: int = 0, steps: int | None = None) -> Iterator[Dataset]:
        import grain

        require(start >= 0, f"a stream starts at step 0 or later, not at {start}")
        order = grain.MapDataset.range(source.count).seed(seed).shuffle().repeat()  # anew in each pass

        def example(position: int) -> Dataset:
            number, place = divmod(position, padded)
            at = order[number * source.count + place % source.count]
            x, y = source.read(at)
            return Dataset(x, np.int32(y), np.int32(at))  # type: ignore[arg-type]

        stop = sys.maxsize if steps is None else (start + steps) * batch
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 2 * batch))
        return iter(grain.MapDataset.range(start * batch, stop).map(example).to_iter_dataset(ahead).batch(batch))

    return Stream(source.count, count_classes(source), source.shape, source.digest, batches)
