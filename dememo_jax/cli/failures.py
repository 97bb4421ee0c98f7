"""Failures that a user can cause, each in one sentence: what happened, to what, and what to do."""

import errno
import os
from pathlib import Path

import jax

from dememo_jax import cli
from dememo_jax.cli.checks import first_line
from dememo_jax.errors import BadInput, NonFinite

EXPECTED = (BadInput, NonFinite, OSError, MemoryError, jax.errors.JaxRuntimeError)
FULL = (errno.ENOSPC, errno.EDQUOT)


def code(error: BaseException) -> int:
    return cli.BAD_INPUT if isinstance(error, BadInput) else cli.FAILED


def sentence(error: BaseException, run: Path) -> str:
    """What to tell of an expected failure of a command with this run folder; raises what is none."""
    if isinstance(error, NonFinite):
        kept = f". The last good checkpoint is kept in {run}" if run.is_dir() else ""
        return f"{error}{kept}"
    if isinstance(error, OSError):
        return _of_system(error, run)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return f"not enough memory: {first_line(error)}. Lower --batch or --width, or take smaller data or a smaller network"
    if isinstance(error, BadInput):
        return str(error)
    raise error


def _of_system(error: OSError, run: Path) -> str:
    """Of the operating system: what cannot be written to the run folder, or which other path cannot be used."""
    named = error.filename if isinstance(error.filename, str | bytes) else None
    if named is not None and not _belongs(Path(os.fsdecode(named)), run):
        return f"cannot use {os.fsdecode(named)}: {error.strerror}"
    if named is None and error.errno not in (*FULL, None):
        return f"the system refused: {error}"
    free = "Free space or choose" if error.errno in (*FULL, None) else "Choose"
    return f"cannot write to {run}: {error}. {free} another --run; the same command then goes on"


def _belongs(path: Path, run: Path) -> bool:
    """Whether a path is of the run folder, or one of the folders that it lies in."""
    try:
        path, run = path.resolve(), run.resolve()
    except (OSError, RuntimeError):
        return False
    return path.is_relative_to(run) or run.is_relative_to(path)
