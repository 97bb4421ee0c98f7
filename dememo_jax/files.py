"""Files that are whole or not there: written beside and renamed, read back with a sentence for what is wrong.

The doors may use this module. A name that is a link is replaced, never written through.
"""

import hashlib
import lzma
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from dememo_jax.errors import BadInput, require

PART = ".part"  # what is being written; what a killed process leaves
# What numpy, zipfile and those who unpack for them raise for bytes that are no arrays, or no archive of arrays.
DAMAGE = (
    OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, SyntaxError, NotImplementedError, RuntimeError,
    MemoryError, OverflowError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one piece: a reader, a crash or a power cut meets the old content or the new, never half of it."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write an `.npz` of plain arrays in one piece."""
    with replacing(path) as file:
        np.savez(file, allow_pickle=False, **{name: np.asarray(value) for name, value in arrays.items()})


def write_array(path: Path, array: Any) -> None:
    """Write an `.npy` in one piece."""
    with replacing(path) as file:
        np.save(file, np.asarray(array), allow_pickle=False)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends well; it is on the disk before it has the name."""
    part = path.with_name(path.name + PART)
    part.unlink(missing_ok=True)  # left by a killed process, or a link to somewhere else
    with part.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of those names in an `.npz`. Raises BadInput when it is missing, damaged, or has others."""
    require(path.is_file(), f"{path} is missing")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = sorted(file)
            require(found == sorted(names), f"{path} holds {', '.join(found)}; expected {', '.join(names)}")
            return {name: file[name] for name in names}
    except BadInput:
        raise
    except DAMAGE as error:
        raise BadInput(f"{path} is damaged: {_first_line(error)}") from error


def read_array(path: Path) -> np.ndarray:
    """The array of an `.npy`. Raises BadInput when it is missing or damaged."""
    require(path.is_file(), f"{path} is missing")
    try:
        found = np.load(path, allow_pickle=False)
    except DAMAGE as error:
        raise BadInput(f"{path} is damaged: {_first_line(error)}") from error
    require(isinstance(found, np.ndarray), f"{path} is damaged: it is no single array")
    return found


def digest(path: Path) -> str:
    """The blake2b digest of a file's bytes, 16 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
