"""The run folder: what was asked (config.json), how far it got (checkpoints), what came out (result.json)."""

import dataclasses
import datetime
import functools
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dememo_jax import __version__, callbacks, checkpoint, files, loop, report, sources
from dememo_jax.cli import configs, console, identity, locks
from dememo_jax.cli.checks import first_line
from dememo_jax.cli.identity import TOKENIZER
from dememo_jax.errors import BadInput, require
from dememo_jax.types import Dataset, Key, Method

CONFIG, RESULT, CHECKPOINTS = "config.json", "result.json", "checkpoints"
SECONDS = "seconds"  # beside the checkpoints: of work before the last one
OLDER = {"optimizer": "sgd"}  # what folders that do not say were run with, where the flag's default is None
# These do not change what is computed, so a run may go on with other values.
FREE = ("run", "checkpoint_seconds", "strategy", "width", "plan")
MARGIN = 50 * 2**20  # bytes that must be free before a run starts


def positive(**values: float | None) -> None:
    """BadInput naming the first value that is not a positive finite number."""
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        require(value is None or (np.isfinite(value) and value > 0), f"{flag} must be positive, got {value}")


def start_devices() -> None:
    """BadInput when jax finds none of the devices that it was told to use."""
    try:
        jax.devices()
    except Exception as error:  # what kind depends on the platform and on its plugin
        asked = os.environ.get("JAX_PLATFORMS", "")
        on = f" on JAX_PLATFORMS={asked}, which is not to be had here" if asked else ""
        raise BadInput(f"jax cannot start{on} ({first_line(error)}): unset JAX_PLATFORMS, or install jax for it") from error


def describe(config: Any, **digests: str) -> dict:
    """What a run folder remembers of its configuration; paths are kept relative to the folder, settings of texts with texts."""
    folder = config.run.resolve()

    def plain(value):
        if isinstance(value, Path):
            return os.path.relpath(value.resolve(), folder)
        if isinstance(value, configs.Text | configs.RegText):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    fields = {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name not in FREE}
    if not sources.is_texts(str(fields.get("data", ""))):
        fields = {name: value for name, value in fields.items() if name not in ("text", "regtext")}
    if sources.is_path(str(fields.get("data", ""))):
        fields["data"] = plain(Path(config.data))
    return {"command": type(config).__name__.lower(), **fields, **digests}


def begin(folder: Path, config: dict, *, grows: str | None = None, again: bool = False) -> dict | None:
    """Claim the folder for a configuration, and hold it until `finish`. Returns the result if it is already there.

    grows: a field that may be larger than the folder's; the run then goes on from there. again: hold a folder whose result
    is there too, for more work on it. BadInput when the folder is no run folder, holds another configuration, or is in use
    by another process; OSError when it cannot be written.
    """
    require(not folder.exists() or folder.is_dir(), f"{folder} is a file; --run takes a folder")
    done, _ = _standing(folder, config, grows)
    if done is not None and not again:
        return done
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    locks.hold(folder)
    _NEW.extend(new)
    done, written = _standing(folder, config, grows)  # another process may have been at work in between
    if done is not None:
        return done
    free = shutil.disk_usage(folder).free
    if free < MARGIN:
        raise OSError(f"{folder}: only {free / 2**20:.0f} MiB are free on its disk, a run wants at least {MARGIN / 2**20:.0f}")
    files.write(folder / CONFIG, report.to_json({"config": written}))
    return None


def _standing(folder: Path, config: dict, grows: str | None) -> tuple[dict | None, dict]:
    """The result that a folder holds, if it does, and the configuration to write; BadInput when it holds another."""
    if not folder.is_dir() or all(_leftover(path) for path in folder.iterdir()):
        return None, config
    known = begun = read(folder)["config"]
    written = {name: config[name] for name in config if name in known}  # a field younger than the folder stays out of it
    known = _completed(known, config)
    names = sorted(known.keys() | config.keys())
    if grows is not None and known.get(grows, 0) < config[grows]:
        known = {**known, grows: config[grows]}
    differing = [f"{n} (there {known.get(n)!r}, asked {config.get(n)!r})" for n in names if known.get(n) != config.get(n)]
    require(not differing, f"{folder} holds a run with another configuration: {'; '.join(differing)}. Choose another --run")
    if (folder / RESULT).exists():
        done = _opened(folder)
        if _completed(done["config"], config) == json.loads(report.to_json(config)):
            return done, written
        _agree(folder, begun, done, grows)
    return None, written


def _leftover(path: Path) -> bool:
    """Whether a file says nothing: hidden, or what a write that was killed leaves."""
    cut = path.name.endswith(files.PART) or (path.name == CONFIG and path.stat().st_size == 0)
    return cut or path.name.startswith(".")


_NEW: list[Path] = []  # folders that commands of this process made, the innermost first
CLAIM = (CONFIG, TOKENIZER, f"{CONFIG}{files.PART}")  # what is in a folder before any work


def leave(*, refused: bool) -> None:
    """A command has ended: its folders are free again; those that it made are taken away if it was refused before any work."""
    locks.release_all()
    for folder in _NEW if refused else ():
        if all(path.name in CLAIM for path in folder.iterdir()):
            shutil.rmtree(folder)
    _NEW.clear()


def _completed(known: dict, config: dict) -> dict:
    """What a folder knows; flags that are younger than the folder stand at their defaults, younger digests as they are."""
    fields = dataclasses.fields(configs.COMMANDS[config["command"]])
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING} | OLDER
    younger = {name: defaults[name] for name in config if name not in known and name in defaults}
    younger |= {name: config[name] for name in config if name not in known and identity.younger(name)}
    return {**known, **json.loads(report.to_json(younger))}


def _opened(folder: Path) -> dict:
    """result.json as it was written; BadInput when it is damaged."""
    try:
        done = identity.opened(folder / RESULT)
    except BadInput as error:
        raise BadInput(f"{error}. Restore it; or remove it, and the same command makes it again") from None
    whole = all(isinstance(done.get(part), dict) for part in ("config", "measured", "values"))
    require(whole, f"{folder / RESULT} is damaged: parts of it are missing. Remove it, and the same command makes it again")
    if identity.LEFT not in done and folder.resolve() not in _OLDER:
        _OLDER.add(folder.resolve())
        console.say(f"{folder} is of an older version, which recorded no digests of its files: they are taken as they are")
    return done


_OLDER: set[Path] = set()  # folders of which that has been said


def _agree(folder: Path, known: dict, done: dict, grows: str | None = None) -> None:
    """BadInput unless the configuration that a folder was begun with is the one its result tells of."""
    there = done["config"]
    names = sorted((known.keys() & there.keys()) - {grows})
    apart = "; ".join(f"{name} ({known[name]!r} and {there[name]!r})" for name in names if known[name] != there[name])
    require(not apart, f"{folder}: {CONFIG} and {RESULT} tell of different runs: {apart}. Restore the one that is wrong")


def read(folder: Path) -> dict:
    """config.json of a run folder; BadInput when it is not one."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if found["config"]["command"] in configs.COMMANDS:
            return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    what = "no such folder" if not folder.exists() else f"not a run folder (it has no readable {CONFIG})"
    raise BadInput(f"{folder}: {what}; expected the --run folder of an earlier dememo command")


def filled(kind: type, folder: Path, known: dict) -> Any:
    """The command that a run folder remembers."""
    fields = {f.name: known[f.name] for f in dataclasses.fields(kind) if f.name in known}
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    paths = {name: folder / plain[name] for name in ("source", "reference", "forget_index") if plain.get(name)}
    texts = {"text": wording(folder, plain)} if "text" in plain else {}
    return kind(**{**plain, **paths, **texts, "run": folder})


def wording(folder: Path, known: dict) -> configs.Text:
    """How the texts of a run became rows of tokens; with the tokenizer that its folder keeps, if it does."""
    asked = known.get("text") or {}
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in asked.items()}
    if (folder / TOKENIZER).exists():
        return configs.Text(**{**fields, "tokenizer": folder / TOKENIZER, "vocab": configs.TEXT.vocab})
    given = fields.get("tokenizer")
    return configs.Text(**{**fields, "tokenizer": None if given is None else folder / given})


def result(folder: Path) -> dict:
    """result.json of a finished run; BadInput when there is none yet, or it is not what the run wrote."""
    config = read(folder)["config"]
    _check_origin(folder)
    unfinished = f"{folder}: its `dememo {config['command']}` is not finished; run the same command again first"
    require((folder / RESULT).exists(), unfinished)
    done = _opened(folder)
    grown = config["command"] == "certify" and config.get("draws", 0) > done["config"].get("draws", 0)
    require(not grown, unfinished)
    _agree(folder, config, done)
    return done


def _check_origin(folder: Path) -> None:
    """BadInput for a run whose --from, or that of the run behind it, leads back to where it was."""
    seen = list[Path]()
    while (folder / CONFIG).exists():
        require(folder.resolve() not in seen, f"{folder} stands on itself: the run that it was made from leads back to it")
        seen.append(folder.resolve())
        source = read(folder)["config"].get("source")
        if not isinstance(source, str):
            return
        folder = folder / source


def clock(folder: Path) -> float:
    """When this run began on the monotonic clock, earlier processes of it counted as far as their last checkpoint."""
    try:
        earlier = float((folder / CHECKPOINTS / SECONDS).read_text())
    except (OSError, ValueError):
        earlier = 0.0
    _BEGAN[folder] = time.monotonic() - earlier
    return _BEGAN[folder]


_BEGAN: dict[Path, float] = {}  # of the runs of this process, for the savers inside them


def elapsed(started: float) -> float:
    return time.monotonic() - started


def finish(
    folder: Path, config: dict, values: dict, sections: Sequence[report.Section], started: float, *, introduction: str = ""
) -> dict:
    """Write the pictures, the page and, last of all, result.json; the checkpoints are no longer needed."""
    made = {"config": config, "measured": measured(started)}
    for section in sections:
        for plot in section.plots:
            files.write(folder / f"{plot.name}.png", report.draw(plot))
    title = f"dememo {config['command']}"
    files.write(folder / "report.html", report.page(title, introduction, sections, folder, made))
    done = {**made, "values": values, "sections": [dataclasses.asdict(section) for section in sections]}
    done[identity.LEFT] = identity.left(folder)
    files.write(folder / RESULT, report.to_json(identity.sealed(json.loads(report.to_json(done)))))
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    locks.release(folder)
    return done


def measured(started: float) -> dict:
    """Where and when: device, versions, commit, seconds of the run."""
    return {
        "seconds": round(time.monotonic() - started, 2),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
        "dememo_jax": __version__,
        "commit": _commit(),
    }


@functools.lru_cache
def _commit() -> str | None:
    """The commit of a checkout that the package runs from; None when installed without one."""
    here = Path(__file__).resolve().parent
    asked = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None if asked.returncode == 0 else None


def resumable(
    folder: Path,
    method: Method,
    key: Key,
    init: tuple,
    data: Dataset | loop.Batches,
    *,
    title: str,
    steps: int,
    every: int,
    seconds: float,
    record: Callable[[Any, dict], dict],
    stop: Callable[[dict], bool] = lambda entry: False,
    drive: Callable[..., Any] = loop.run,
    **how: Any,
) -> tuple[Any, list[dict]]:
    """`loop.run` from `method.init(*init)`, with a bar, a history of `record(state, info)` a chunk, and checkpoints.

    drive: another driver of the same steps, such as `loop.stream`.
    The history is part of every checkpoint, so a resumed run ends with the whole of it.
    """
    directory = folder / CHECKPOINTS / title.replace(" ", "-")
    restored = newest(directory, jax.eval_shape(method.init, *init))
    state, start, history = (
        (jax.jit(method.init)(*init), 0, []) if restored is None else (restored.state, restored.step, restored.meta["history"])
    )
    if history and stop(history[-1]):
        return state, history
    offer = saver(directory, seconds)
    with console.progress(title, steps, start) as advance:

        def after(done: int, current: Any, info: dict) -> callbacks.Answer:
            history.append(record(current, info))
            over = done >= steps or stop(history[-1])
            offer(done, current, {"history": history}, over)
            advance(done)
            return loop.STOP if over else None

        state = drive(method, key, state, data, steps=steps, every=every, start=start, after=after, **how)
    return state, history


def _whose(directory: Path) -> str | None:
    """What a checkpoint of this run says of itself: a digest of the run's configuration."""
    folder = directory.parent.parent
    return identity.of_json(read(folder)["config"]) if (folder / CONFIG).exists() else None


def newest(directory: Path, like: Any) -> checkpoint.Restored | None:
    """The newest checkpoint to go on from; damaged ones are passed over aloud. BadInput for one of another run."""
    restored, passed_over = checkpoint.newest(directory, like)
    for sentence in passed_over:
        console.warn(sentence)
    if restored is not None:
        identity.same(directory / str(restored.step), restored.meta.get("run"), _whose(directory), "this run saved")
        console.say(f"resuming {directory.name} from step {restored.step}")
    return restored


def once(path: Path, make: Callable[[], Any]) -> Any:
    """`make()` as plain JSON, kept among the checkpoints as soon as it is there; a damaged one is made again, aloud."""
    of = f"{_whose(path.parent)} {path.stem}"
    if path.exists():
        try:
            return identity.opened(path, of)
        except BadInput as error:
            console.warn(f"{error}: it is made again")
    path.parent.mkdir(parents=True, exist_ok=True)
    made = json.loads(report.to_json(make()))
    files.write(path, report.to_json(identity.sealed(made, of)))
    return made


def saver(directory: Path, seconds: float) -> Callable[[int, Any, dict, bool], None]:
    """`offer(step, state, meta, last)`, which saves the first time, and then not more often than every so many seconds."""
    saved = -math.inf  # a disk that cannot be written shows at once
    folder, whose = directory.parent.parent, _whose(directory)
    begun = _BEGAN[folder] if folder in _BEGAN else clock(folder)

    def offer(step: int, state: Any, meta: dict, last: bool) -> None:
        nonlocal saved
        if last or time.monotonic() - saved >= seconds:
            checkpoint.save(directory, step, state, {**meta, "run": whose})
            files.write(directory.parent / SECONDS, f"{elapsed(begun):.3f}")
            saved = time.monotonic()

    return offer
