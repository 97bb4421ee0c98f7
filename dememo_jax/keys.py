"""Key discipline: sample i and step t get `at(key, i)`, whatever the chunk, the device or the restart."""

import zlib

import jax

from dememo_jax.types import Array, Key


def at(key: Key, index: int | Array) -> Key:
    """The key of one step, sample or example."""
    return jax.random.fold_in(key, index)


def named(key: Key, name: str) -> Key:
    """The key of a named part of a run; the same name gives the same key on every machine."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
