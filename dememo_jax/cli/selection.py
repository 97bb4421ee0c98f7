"""Which training examples a command is about: classes, shares and parts of them, or a file of indices."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dememo_jax import data as sets
from dememo_jax import files, keys
from dememo_jax.cli import console, lineage
from dememo_jax.cli.configs import Unlearn
from dememo_jax.errors import BadInput, require
from dememo_jax.types import Dataset


def forget_mask(config: Unlearn, base: lineage.Trained) -> np.ndarray:
    """Mask [N] of all that the model is to forget, what it forgot before included; says what is asked for again."""
    labels, before = np.asarray(base.train.y), base.forget
    chosen = _chosen(config, base, labels)
    if before is not None:
        again = int((chosen & before).sum())
        if again:
            console.warn(f"{again:,} of the {chosen.sum():,} examples to forget were forgotten before, in {config.source}")
        chosen = chosen | before
    return sets.check_forget(chosen, len(labels))


def _chosen(config: Unlearn, base: lineage.Trained, labels: np.ndarray) -> np.ndarray:
    if config.forget_index is not None:
        alone = not config.forget_class and config.forget_share == 1 and config.forget_part == "all"
        require(alone, "--forget-index names the examples by itself: give no --forget-class, --forget-share or --forget-part")
        return mask_of(indices(config.forget_index, len(labels)), len(labels))
    require(
        config.forget_class, "the forget set is empty: name classes with --forget-class, or examples with --forget-index FILE"
    )
    mask = sets.of_classes(labels, config.forget_class)
    if config.forget_part != "all":
        mask &= base.protected if config.forget_part == "protected" else ~base.protected
        require(mask.any(), f"classes {list(config.forget_class)} have no {config.forget_part} examples to forget")
    return sets.share_of(keys.named(jax.random.key(config.seed), "forget"), mask, labels, config.forget_share)


def indices(path: Path, count: int) -> np.ndarray:
    """The sorted indices that a file names, each once: .npy of integers or a mask, or text with one a line.

    As many zeros and ones as there are examples are a mask. Says so, and how many indices were named more than once.
    """
    what = f"{path}: expected a .npy of integer indices or with a mask [{count}], or a text file with one index a line"
    require(path.is_file(), f"{what} (No such file, or it is none)")
    require(path.stat().st_size <= 2**16 + 64 * count, f"{what} (larger than {count} indices are)")
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            array = np.array([int(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()], object)
    except files.DAMAGE as error:
        raise BadInput(f"{what} ({error})") from error
    require(isinstance(array, np.ndarray), f"{what}; got an archive of arrays")
    if array.dtype == bool:
        require(array.shape == (count,), f"{what}; got a mask {array.shape}")
        return np.flatnonzero(array)
    whole = array.dtype == object or np.issubdtype(array.dtype, np.integer)
    require(whole and array.ndim == 1, f"{what}; got {array.dtype} {array.shape}")
    if len(array) == count > 2 and np.isin(array, (0, 1)).all():
        console.say(f"{path}: {count:,} zeros and ones are read as a mask, of {int(array.sum()):,} examples")
        return np.flatnonzero(array.astype(bool))
    found = checked(array, count)
    if len(found) < len(array):
        console.warn(f"{path}: {len(array) - len(found):,} of the {len(array):,} indices are named more than once")
    return found


def checked(given, count: int) -> np.ndarray:
    """Sorted indices, each once; BadInput for one that is no training example."""
    outside = [int(i) for i in given if not 0 <= i < count]
    require(not outside, f"there is no example {outside[:1]}: the training examples are numbered 0..{count - 1}")
    return np.unique(np.asarray(given, np.int64))


def mask_of(given: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(count, bool)
    mask[given] = True
    return mask


class Target(NamedTuple):
    """What an audit is about."""

    name: str
    mask: np.ndarray  # [N] training examples in question
    unseen: np.ndarray  # [N'] test images they are held against: of the same classes
    shown: Dataset  # where what comes back is measured
    where: str  # in words


def audited(base: lineage.Trained, asked: int | None, hints: np.ndarray) -> Target:
    """The class asked for, or what was forgotten (of it), or the whole training set; hints are never among what is measured."""
    labels, tested = np.asarray(base.train.y), np.asarray(base.test.y)
    mask = target_mask(base, asked)
    classes = np.unique(labels[mask])
    unseen = np.isin(tested, classes)
    if asked is not None or len(classes) == 1:
        part, what = (base.called(int(classes[0])), sets.select(base.test, unseen))
        return Target(part, mask, unseen, what, f"test images of {part}")
    if base.forget is None:
        return Target("the training set", mask, unseen, base.test, "test images")
    if all((labels == k).sum() == (mask & (labels == k)).sum() for k in classes):
        name = f"classes {', '.join(base.called(int(k)).removeprefix('class ') for k in classes)}"
        return Target(name, mask, unseen, sets.select(base.test, unseen), f"test images of {name}")
    rest = mask & ~hints
    require(rest.any(), "the attacker holds all of the forgotten examples: none is left to measure on; lower --hint-share")
    return Target("the forgotten examples", mask, unseen, sets.select(base.train, rest), "forgotten images, hints left out")


def target_mask(base: lineage.Trained, asked: int | None) -> np.ndarray:
    """Training examples [N] in question: forgotten ones where there are any, of one class if asked."""
    labels = np.asarray(base.train.y)
    mask = np.ones(len(labels), bool) if asked is None else sets.of_classes(labels, [asked])
    forgotten = mask if base.forget is None else mask & base.forget
    return forgotten if forgotten.any() else mask


def target_of(base: lineage.Trained, asked: int | None) -> int:
    """The class in question: the one asked for, or the one that the run forgot."""
    labels = np.asarray(base.train.y)
    if asked is None:
        forgotten = np.unique(labels[base.forget]) if base.forget is not None else np.zeros(0, int)
        require(len(forgotten) == 1, "name the class in question with --target-class: the run did not forget exactly one")
        return int(forgotten[0])
    sets.of_classes(labels, [asked])
    return asked
