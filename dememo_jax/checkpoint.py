"""Save, restore, fall back: the only file that knows Orbax.

A checkpoint is a tree of arrays and a JSON note. It is read back once, and then the digest of its values and the digest
of each of its files are written beside them: a checkpoint without its sums was never finished, one that differs from
them is damaged, and neither is restored.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from dememo_jax import files, tree
from dememo_jax.errors import BadInput, require

KEEP = 2  # the newest, and the one before to fall back to
SUMS, DIGEST = "sums.json", "digest"
UNFINISHED = "*.orbax-checkpoint-tmp*"  # what Orbax leaves when it is killed
PATTERN = set("[]\\")  # Orbax looks for its own files by patterns, and finds none below such a folder


class Restored(NamedTuple):
    step: int
    state: Any
    meta: dict
    digest: str | None = None  # of the state's values


def save(directory: str | Path, step: int, state: Any, meta: Mapping | None = None) -> None:
    """Write a checkpoint, read it back, and return when it stands. The two newest are kept; a crash leaves the others.

    Raises OSError when the disk is full or read-only, or what was written cannot be read.
    """
    folder = Path(directory) / str(step)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier process that was killed before it could go on
    for unfinished in Path(directory).glob(UNFINISHED):
        shutil.rmtree(unfinished)
    with _manager(directory, create=True) as manager:
        try:
            manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta or {})))
            )
        except ValueError as error:  # tensorstore reports the operating system's errors as values
            raise OSError(f"could not write the checkpoint of step {step}: {_first_line(error)}") from error
    made = tree.digest(state)
    try:
        found = restore(directory, step, jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else np.asarray(leaf), state))
        back = tree.digest(found.state)
    except BadInput as error:
        back = str(error)
    if back != made:
        raise OSError(f"the checkpoint of step {step} in {directory} cannot be read back ({back}): choose another folder")
    files.write(folder / DIGEST, made)
    files.write(folder / SUMS, json.dumps(_sums(folder)))


def restore(directory: str | Path, step: int, like: Any) -> Restored:
    """One checkpoint; `like` is a tree of arrays or shapes (`jax.eval_shape` of `init`) to fill, None takes what there is.

    Raises BadInput when it holds another tree than `like`.
    """
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore())
    try:
        with _manager(directory) as manager:
            got = manager.restore(step, args=args)
        state = got.state if like is None else jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(got.state))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"checkpoint {step} in {directory} does not hold what is expected: {_first_line(error)}") from error
    written = digest(directory, step)
    same = like is None or written in (None, tree.digest(state))  # Orbax casts another type without a word
    require(same, f"checkpoint {step} in {directory} does not hold what is expected, but arrays of other names or types")
    return Restored(step, state, got.meta, written)


def digest(directory: str | Path, step: int) -> str | None:
    """The digest of a checkpoint's values (`tree.digest`), as it was written; None where an older version wrote it."""
    path = Path(directory) / str(step) / DIGEST
    return path.read_text().strip() if path.exists() else None


def whole(directory: str | Path) -> tuple[int | None, tuple[str, ...]]:
    """The step of the newest checkpoint that is whole, or None; and a sentence for each newer one that is not."""
    faults: list[str] = []
    for step in steps(directory):
        fault = _fault(Path(directory) / str(step))
        if fault is None:
            return step, tuple(faults)
        faults.append(f"checkpoint {step} in {directory} {fault}")
    return None, tuple(faults)


def newest(directory: str | Path, like: Any) -> tuple[Restored | None, tuple[str, ...]]:
    """The newest checkpoint that is whole, or None; and a sentence for each one that was not and was set aside."""
    step, faults = whole(directory)
    found = None if step is None else restore(directory, step, like)
    for step in steps(directory)[: len(faults)]:
        aside = Path(directory).with_name(Path(directory).name + ".damaged")
        shutil.rmtree(aside / str(step), ignore_errors=True)
        aside.mkdir(exist_ok=True)
        shutil.move(Path(directory) / str(step), aside / str(step))
    return found, tuple(f"{fault}: falling back to the one before" for fault in faults)


def steps(directory: str | Path) -> list[int]:
    """Steps with a checkpoint, newest first."""
    folder = Path(directory)
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True) if folder.is_dir() else []


class Store(NamedTuple):
    """Trees under names, a folder each; a tree that does not stand whole counts as not there."""

    load: Callable[[str], Any]  # None when it is not there
    save: Callable[[str, Any], None]
    names: Callable[[], tuple[str, ...]]  # of all folders, whole or not
    remove: Callable[[Iterable[str]], None]


def store(directory: str | Path, like: Any, say: Callable[[str], None]) -> Store:
    """A store of trees with the structure of `like` (arrays or shapes) in a folder.

    load: a tree that is damaged or was never finished is removed, `say` is told in a sentence, and the answer is None.
    save: waits until the tree stands; whoever is killed before leaves one that counts as never finished.
    Names must serve as folder names.
    """
    root = Path(directory)

    def load(name: str) -> Any:
        if not (root / name).is_dir():
            return None
        fault = _fault(root / name / "0")
        if fault is None:
            found = restore(root / name, 0, like)
            if found.meta.get("name", name) == name:
                return found.state
            fault = f"was {found.meta['name']}"
        say(f"{name} in {root} {fault}: it counts as not there")
        shutil.rmtree(root / name)
        return None

    def names() -> tuple[str, ...]:
        return tuple(sorted(path.name for path in root.iterdir() if path.is_dir())) if root.is_dir() else ()

    def remove(unwanted: Iterable[str]) -> None:
        for name in unwanted:
            shutil.rmtree(root / name)

    return Store(load, lambda name, tree: save(root / name, 0, tree, {"name": name}), names, remove)


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns of what is meant here; the level of its logger is the caller's again afterwards."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _manager(directory: str | Path, *, create: bool = False) -> Iterator[ocp.CheckpointManager]:
    options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, create=create, enable_async_checkpointing=False)
    with _quiet(), _plain(Path(directory).absolute()) as path, ocp.CheckpointManager(path, options=options) as manager:
        yield manager


@contextmanager
def _plain(path: Path) -> Iterator[Path]:
    """The path, under another name while Orbax works where its own name would be a pattern."""
    if not PATTERN & set(str(path)):
        yield path
        return
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "run"
        link.symlink_to(path, target_is_directory=True)
        yield link


def _sums(folder: Path) -> dict[str, str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()

    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    return {path.relative_to(folder).as_posix(): digest(path) for path in files}


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint on disk, or None."""
    try:
        expected = json.loads((folder / SUMS).read_text())
    except (OSError, ValueError):
        return "was never finished"
    if not isinstance(expected, dict):
        return f"is damaged ({SUMS} is not as it was written)"
    found = _sums(folder)
    wrong = sorted(name for name in expected if found.get(name) != expected[name])
    return f"is damaged ({wrong[0]} is not as it was written)" if wrong else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
