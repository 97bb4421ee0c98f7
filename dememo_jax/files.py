"""Files that are whole or not there, and what a folder remembers beside what is asked of it."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dememo_jax.errors import require


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside and rename, so that a reader or a crash never meets half a file, whoever else writes it."""
    part = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # there only when the disk is full


def same(known: Mapping[str, Any], asked: Mapping[str, Any], *, holds: str, remedy: str) -> None:
    """BadInput naming the settings that differ between those of a folder and those asked for."""
    names = sorted(known.keys() | asked.keys())
    differing = [f"{n} (there {known.get(n)!r}, asked {asked.get(n)!r})" for n in names if known.get(n) != asked.get(n)]
    require(not differing, f"{holds}: {'; '.join(differing)}. {remedy}")
