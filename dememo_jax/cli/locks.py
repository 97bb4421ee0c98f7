"""One process to a run folder: a lock that the system frees when its process ends, however it ends."""

import fcntl
import os
import socket
from pathlib import Path

from dememo_jax.errors import BadInput

NAME = ".lock"
_HELD: dict[Path, tuple[int, int]] = {}  # lock file -> (its descriptor, the process that opened it)


def hold(folder: Path) -> None:
    """Keep a run folder to this process until `release`, or its end.

    A file left by a dead process holds nothing and is taken over. On a file system without locks nothing is held. Raises
    BadInput, naming the process, when another one is at work in the folder, OSError when the folder cannot be written.
    """
    path = folder.resolve() / NAME
    if path in _HELD and _HELD[path][1] == os.getpid():
        return
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise BadInput(f"{folder} is in use by {owner}: wait until that ends, or choose another --run") from None
        except OSError:
            os.close(descriptor)
            return
        if _is(path, descriptor):
            break
        os.close(descriptor)  # its last owner removed it in between
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    _HELD[path] = descriptor, os.getpid()


def release(folder: Path) -> None:
    """Give a folder back; nothing happens where this process does not hold it."""
    path = folder.resolve() / NAME
    descriptor, process = _HELD.pop(path, (-1, -1))
    if process == os.getpid():
        path.unlink(missing_ok=True)
        os.close(descriptor)


def release_all() -> None:
    """Give back whatever this process holds."""
    for path in list(_HELD):
        release(path.parent)


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
