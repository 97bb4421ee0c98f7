"""Which shadow model trains on what: masks [M, N], from one key."""

from typing import Any

import jax
import numpy as np

from dememo_jax import keys
from dememo_jax.errors import require
from dememo_jax.types import Key


def halves(key: Key, models: int, count: int) -> np.ndarray:
    """Masks [M, N]: model 2i trains on a random half of the examples, model 2i + 1 on the others.

    Every example is in half of the models, whichever even number of them is looked at, and pair i depends on `(key, i)` only.
    Raises BadInput for an odd number of models.
    """
    require(models >= 2 and models % 2 == 0, f"halves come in pairs: an even number of models, at least two; got {models}")
    return folds(key, models, count, 2)


def folds(key: Key, models: int, count: int, parts: int) -> np.ndarray:
    """Masks [M, N]: of each `parts` models in a row, every one leaves out another of as many random parts of the examples.

    For shadow models that are to see nearly as much data as the model they stand for. Turn i depends on `(key, i)` only.
    Raises BadInput for fewer than two parts, more parts than examples, or fewer models than parts.
    """
    require(2 <= parts <= count, f"need at least two parts and an example for each, got {parts} parts of {count} examples")
    require(models >= parts, f"{parts} parts need as many models or more, so that each example is left out; got {models}")
    masks, edges = np.ones((models, count), bool), np.arange(parts + 1) * count // parts
    for turn in range(-(-models // parts)):
        order = np.asarray(jax.random.permutation(keys.at(key, turn), count))
        for place in range(min(parts, models - turn * parts)):
            masks[turn * parts + place, order[edges[parts - 1 - place] : edges[parts - place]]] = False
    return masks


def groups(masks: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows that train together: models with equally many examples, at most `size`, in order."""
    counts = np.asarray(masks).sum(axis=1)
    alike = [np.flatnonzero(counts == count) for count in dict.fromkeys(counts.tolist())]
    return [rows[i : i + size] for rows in alike for i in range(0, len(rows), size)]


def check_masks(masks: Any, count: int) -> np.ndarray:
    """Masks as bool [M, N]; BadInput when they have another shape or type, or a model has no example."""
    masks = np.asarray(masks)
    require(masks.ndim == 2 and masks.shape[1] == count, f"expected masks [M, {count}], one row a model; got {masks.shape}")
    require(
        masks.dtype == bool and len(masks), f"masks must be boolean and of one model or more, got {masks.dtype} {masks.shape}"
    )
    empty = np.flatnonzero(~masks.any(axis=1))
    require(not len(empty), f"model {empty[:1].tolist()} has no example to train on")
    return masks
