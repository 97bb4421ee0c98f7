"""What a run was made of and what it left, as digests that are compared whenever either is read again.

config.json holds the digests of what went in (`record`), result.json those of the files that later commands read
(`left`), and one of its own content (`sealed`). Older folders lack some of them: what was not recorded is not compared.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dememo_jax import checkpoint, files
from dememo_jax.errors import BadInput, require

NOISE, FORGET, TOKENIZER = "perturbation.npz", "forget.npy", "tokenizer.json"  # files that later commands read
WEIGHTS, EPOCHS, DRAWS = "weights", "epochs", "draws"  # and checkpoints
SEAL, LEFT = "digest", "files"  # entries of result.json
YOUNGER = ("perturbation_digest", "test_digest", "weights_digest")  # which older configurations lack


class Named(NamedTuple):
    """An input as messages call it, and its digest."""

    what: str | Path
    digest: str


Inputs = Mapping[str, Named]  # "digest" of the whole, and where it has parts "weights_digest" and the like


def digest(*arrays: Any) -> str:
    """A short fingerprint of arrays or bytes."""
    total = hashlib.blake2b(digest_size=8)
    for array in arrays:
        total.update(array if isinstance(array, bytes) else np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def of_json(value: Any) -> str:
    """The digest of what JSON says, however it is laid out."""
    return digest(json.dumps(value, sort_keys=True).encode())


def record(name: str, inputs: Inputs) -> dict[str, str]:
    """Entries for a configuration, such as source_digest and source_weights_digest."""
    return {f"{name}_{part}": found.digest for part, found in inputs.items()}


def younger(name: str) -> bool:
    """Whether an entry of a configuration is a digest that older versions did not record."""
    return any(part in name for part in YOUNGER)


def check(run: Path, config: dict, name: str, inputs: Inputs) -> None:
    """BadInput, naming the input and both digests, unless the run was made from these very inputs."""
    for part, found in inputs.items():
        same(found.what, config.get(f"{name}_{part}"), found.digest, f"{run} was made from")


def same(what: str | Path, recorded: str | None, found: str | None, role: str) -> None:
    """BadInput unless a recorded digest is the one that was found; what was not recorded passes."""
    shown = os.path.relpath(Path(what).resolve()) if ".." in Path(what).parts else what  # from a run to what it was made from
    require(
        recorded is None or recorded == found,
        f"{shown} is not what {role}: recorded was the digest {recorded}, found is {found or 'none'}. Restore it, or run what "
        "was made from it again in a new folder",
    )


# --- what a run leaves -------------------------------------------------------------------------------------------


def left(folder: Path) -> dict[str, str]:
    """Digests of all that a finished run leaves for others to read, by its name in the folder."""
    found = {name: files.digest(folder / name) for name in (NOISE, FORGET, TOKENIZER) if (folder / name).is_file()}
    kept = [folder / WEIGHTS, *sorted((folder / EPOCHS).glob("*")), *sorted((folder / DRAWS).glob("*"))]
    for path in kept:
        known = [checkpoint.digest(path, step) for step in checkpoint.steps(path)[:1]]
        found |= {path.relative_to(folder).as_posix(): one for one in known if one is not None}
    return found


def intact(folder: Path, done: dict, name: str) -> Path:
    """The path of a file that the run left. Raises BadInput unless it is there and as it was."""
    path = folder / name
    require(path.is_file(), f"{path} is missing; restore it, or run {folder} again in a new folder")
    same(path, done.get(LEFT, {}).get(name), files.digest(path), f"{folder} left there")
    return path


def restored(folder: Path, done: dict, name: str, like: Any) -> checkpoint.Restored:
    """The checkpoint of that name that the run left; nothing in its folder is touched.

    Raises BadInput when it is missing, damaged, another run's, or of another network.
    """
    step, faults = checkpoint.whole(folder / name)
    if step is None:
        why = "; ".join(faults) or "there is none"
        raise BadInput(f"{folder}: its {name} cannot be read ({why}); restore it, or run it again in a new folder")
    same(folder / name, done.get(LEFT, {}).get(name), checkpoint.digest(folder / name, step), f"{folder} left there")
    return checkpoint.restore(folder / name, step, like)


# --- JSON that says whether it is whole --------------------------------------------------------------------------


def sealed(value: dict, of: str = "") -> dict:
    """Plain JSON with a digest of its content; `of` says whose it is, where that is not part of the content."""
    return {**value, SEAL: of_json([of, value])}


def opened(path: Path, of: str = "") -> dict:
    """The content of a sealed JSON file, without its seal; of an older result that has none as it stands.

    Raises BadInput when it cannot be read, or is not what was written.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        require(isinstance(found, dict), f"{path} is damaged: it holds no JSON object")
    except BadInput:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: {str(error).splitlines()[0][:160]}") from error
    seal = found.pop(SEAL, None)
    now = of_json([of, found])
    older = seal is None and not of and LEFT not in found
    require(older or seal == now, f"{path} is not as it was written: its digest says {seal}, its content gives {now}")
    return found
