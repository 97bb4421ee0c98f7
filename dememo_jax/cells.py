"""A table that many processes fill: one JSON and one lock for each cell, in a plain folder that machines may share.

A lock only saves work. A cell is a function of its name and of the table's settings and is written in one piece, so that two
processes that compute the same cell write the same value.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dememo_jax.errors import require

SETTINGS = "settings.json"
PATIENCE = 600.0  # seconds without a sign of life, after which a lock counts as left behind
Say = Callable[[str], None]


def begin(folder: str | Path, settings: Mapping[str, Any], *, commit: str | None = None, mixed: bool = False) -> None:
    """Claim a folder for a table's settings.

    BadInput when it holds a table of other settings, naming those that differ; or cells of another commit than the one given,
    unless `mixed` lets them stand: every cell says its own.
    """
    folder = Path(folder)
    require(not folder.exists() or folder.is_dir(), f"{folder} is a file; results go to a folder")
    asked, path = json.loads(_text(settings)), folder / SETTINGS
    strange = f"{folder} holds files but no {SETTINGS}: name an empty folder, or one of this table"
    require(path.exists() or not folder.is_dir() or not any(folder.iterdir()), strange)
    if path.exists():
        known = json.loads(path.read_text())
        names = sorted(known.keys() | asked.keys())
        differing = [f"{n} (there {known.get(n)!r}, asked {asked.get(n)!r})" for n in names if known.get(n) != asked.get(n)]
        require(not differing, f"{folder} holds cells of other settings: {'; '.join(differing)}. Name another folder")
        others = {cell.get("commit") for cell in done(folder).values()} - {commit}
        shown = ", ".join(sorted(str(other)[:12] for other in others))
        remedy = "name another folder, or keep them beside new ones with --mixed"
        require(mixed or not others, f"{folder} holds cells of another commit ({shown}): {remedy}")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, settings)


def done(folder: str | Path) -> dict[str, dict]:
    """name -> what was written, of all cells that are there; BadInput for one that cannot be read."""
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        if path.name == SETTINGS:
            continue
        try:
            found[path.stem] = json.loads(path.read_text())
        except ValueError:
            require(False, f"{path} is damaged: remove it, and run the table again")
    return found


def fill(
    folder: str | Path, names: Sequence[str], compute: Callable[[str], Mapping[str, Any]], *, say: Say = print,
    after: Callable[[int], None] = lambda count: None, patience: float = PATIENCE, poll: float = 2.0,
) -> dict[str, dict]:  # fmt: skip
    """Compute every cell of `names` that nobody has, and wait for those that others are at; returns all of them.

    `compute(name)` gives what JSON can hold; ValueError for NaN, which has to be null with a reason beside it.
    A cell is kept as soon as it is there. `after(count)` is told how many of the names are there, whoever computed them.
    What `compute` raises ends this process's part and frees its lock; the cells that are there stay.
    """
    folder = Path(folder)
    while left := [name for name in names if not (folder / f"{name}.json").exists()]:
        worked = False
        for name in left:
            path = folder / f"{name}.json"
            if path.exists():
                continue
            with claim(path.with_suffix(".lock"), say=say, patience=patience) as mine:
                if mine and not path.exists():
                    _write(path, compute(name))
                    worked = True
            after(sum((folder / f"{other}.json").exists() for other in names))
        if not worked:
            time.sleep(poll)
    found = done(folder)
    return {name: found[name] for name in names}


@contextmanager
def turn(path: str | Path, *, say: Say = print, patience: float = PATIENCE, poll: float = 0.5) -> Iterator[None]:
    """Hold a lock, after waiting for whoever has it."""
    while True:
        with claim(path, say=say, patience=patience) as mine:
            if mine:
                yield
                return
        time.sleep(poll)


@contextmanager
def claim(path: str | Path, *, say: Say = print, patience: float = PATIENCE) -> Iterator[bool]:
    """Try to hold the lock file `path`; yields whether it is ours.

    A lock that a dead process of this machine left, or one whose owner has given no sign of life for `patience` seconds, is
    taken over, and `say` is told. Clocks of machines that share a folder must agree to within a part of that.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _create(path) and not (_left_behind(path, say, patience) and _create(path)):
        yield False
        return
    over = threading.Event()

    def live() -> None:
        while not over.wait(patience / 10):
            try:
                os.utime(path)
            except OSError:
                return  # removed by someone who thought us dead: the work goes on, and is written all the same

    threading.Thread(target=live, daemon=True).start()
    try:
        yield True
    finally:
        over.set()
        path.unlink(missing_ok=True)


def _text(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False)


def _write(path: Path, value: Any) -> None:
    """In one piece, so that a reader or a crash never meets half a cell."""
    part = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    part.write_text(_text(value))
    part.replace(path)


def _create(path: Path) -> bool:
    """Take the lock, in one piece where the disk has links: whoever dies on the way leaves none, or one with a name on it."""
    mine = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
    mine.write_text(json.dumps({"machine": socket.gethostname(), "process": os.getpid()}))
    try:
        os.link(mine, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # a disk without links
        try:
            with path.open("x") as file:
                file.write(mine.read_text())
            return True
        except FileExistsError:
            return False
    finally:
        mine.unlink(missing_ok=True)


def _owner(path: Path) -> dict[str, Any]:
    """What a lock says of its owner; nothing where it is empty or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return {}
    whole = isinstance(found, dict) and isinstance(found.get("machine"), str) and type(found.get("process")) is int
    return found if whole else {}


def _left_behind(path: Path, say: Say, patience: float) -> bool:
    """Whether the lock's owner is gone; the lock is then removed."""
    try:
        owner, silent = _owner(path), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return True  # given back just now
    here = owner.get("machine") == socket.gethostname()
    gone = not _alive(owner["process"]) if here else not owner and silent > patience / 100  # one without a name is half a lock
    if silent < patience and not gone:
        return False
    whose = f"process {owner.get('process', 'unknown')} on {owner.get('machine', 'an unknown machine')}"
    say(f"{path.name}: its owner, {whose}, is gone (no sign of life for {silent:.0f} s): taken over")
    path.unlink(missing_ok=True)
    return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True
