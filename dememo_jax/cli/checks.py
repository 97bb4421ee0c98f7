"""What no command can use, whatever it does: checked before anything is read, computed or written."""

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dememo_jax.cli.flags import RegText, Text
from dememo_jax.errors import BadInput, require

SEEDS, WHOLE = 2**32, 2**31  # keys are made of 32 bits, and devices count in 32
LARGEST = float(np.finfo(np.float32).max)


def check(config: Any) -> None:
    """BadInput naming the flag of the first value that no command can use.

    Numbers must be finite and fit into 32 bits, seeds be 32-bit and not negative, lists name everything once, paths be text
    that can be written as UTF-8, and `--run` must name a folder.
    """
    for flag, value in _flags(config):
        items = value if isinstance(value, tuple) else (value,)
        for item in items:
            _check_one(flag, item)
        twice = [item for i, item in enumerate(items) if item in items[:i] and not isinstance(item, Path)]
        require(not twice, f"{flag} names {', '.join(map(str, twice[:1]))} twice; name each once")
    _check_folder(config.run)


def first_line(error: BaseException) -> str:
    """What an error of another library says, in short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _flags(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every flag of a command with its value."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Text | RegText):
            yield from _flags(value, f"{field.name}.")
        elif field.name == "source":
            yield "--from", value
        else:
            yield f"--{prefix}{field.name.replace('_', '-')}", value


def _check_one(flag: str, value: Any) -> None:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, float):
        require(math.isfinite(value), f"{flag} must be a finite number, got {value}")
        require(abs(value) <= LARGEST, f"{flag} must be a number that 32 bits can hold, up to {LARGEST:.2e}; got {value:g}")
    elif isinstance(value, int) and flag.endswith("seed"):
        require(0 <= value < SEEDS, f"{flag} must be a whole number from 0 to {SEEDS - 1}, got {_short(value)}")
    elif isinstance(value, int):
        require(abs(value) < WHOLE, f"{flag} must be less than {WHOLE:,}, got {_short(value)}")
    else:
        _check_text(flag, value)


def _short(value: int) -> str:
    """A number in decimal, unless Python refuses to write so long a one."""
    return str(value) if value.bit_length() < 200 else f"one of {value.bit_length():,} bits"


def _check_text(flag: str, value: str | Path) -> None:
    try:
        str(value.absolute() if isinstance(value, Path) else value).encode("utf-8")
    except UnicodeEncodeError:
        said = f"{flag} {str(value)!a}: a name that is not UTF-8, or that an ASCII locale cannot read"
        raise BadInput(f"{said}; rename it, or run with PYTHONUTF8=1") from None
    require("\0" not in str(value), f"{flag} {str(value)!a}: no name holds a zero byte")


def _check_folder(run: Path) -> None:
    require(str(run) != ".", "--run names no folder: it is empty, or the current directory. Name a folder of its own")
    try:
        run.resolve(strict=True)
    except (OSError, RuntimeError):  # not there yet, or a link that leads nowhere
        require(not os.path.islink(run), f"--run {run} is a link that leads to no folder: remove it, or choose another --run")
