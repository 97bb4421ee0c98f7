"""The log of what an ensemble was asked to forget: only ever appended to, and every line vouches for those before it.

requests.jsonl begins with `{"begun": digest of the plan}`. Then stand `{"request": number, "indices": [...], "date": ...}`,
each on the disk before any work on it begins, and after each training `{"done": up to which request, "seconds": ...}`.
`chain` in a line is a digest of it and of the chain so far. Logs of older versions have no chain and no first line.
"""

import datetime
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dememo_jax import files
from dememo_jax.cli import identity, runs
from dememo_jax.errors import BadInput, require
from dememo_jax.unlearn import shards

LOG, PLAN, STAGES, CHAIN = "requests.jsonl", "plan.npz", "stages", "chain"
ENTRIES = ({"begun"}, {"request", "indices", "date"}, {"done", "seconds"})
LOST = "it no longer tells what was to be deleted"
REMEDY = "Restore it, or train in another --run"


class Log(NamedTuple):
    """What was asked for, and the trainings that carried it out."""

    requests: list[dict]
    rounds: list[dict]
    plan: str | None  # the digest of the plan that it began with
    chains: tuple[str, ...]  # after each line
    chained: bool  # whether the lines carry them
    said: tuple[str, ...] = ()  # what the user is to know of it
    text: str = ""  # of its whole lines

    @property
    def done(self) -> int:
        """Up to which request the last training went."""
        return self.rounds[-1]["done"] if self.rounds else -1

    def mask(self, upto: int, count: int) -> np.ndarray:
        """Mask [count] of what the first so many requests delete."""
        mask = np.zeros(count, bool)
        for request in self.requests[:upto]:
            mask[request["indices"]] = True
        return mask


def begin(folder: Path, plan: shards.Plan, done: dict | None) -> tuple[shards.Plan, Log]:
    """The plan that the folder was begun with, whatever this version would deal, and its log; both are begun in a new folder.

    done: the result of the last training, where there is one. Raises BadInput for a log that is missing beside work that it
    should tell of, or damaged, or at odds with the plan or the result.
    """
    path, count = folder / LOG, len(plan.shard)
    if not path.exists() or b"\n" not in path.read_bytes():  # not one whole line
        beside = [name for name in (PLAN, STAGES, runs.RESULT) if (folder / name).exists()]
        lost = f"{path} is {'empty' if path.exists() else 'missing'} beside {', '.join(beside)}"
        require(not beside, f"{lost}: nothing else tells what was to be deleted. {REMEDY}")
        path.unlink(missing_ok=True)
        _append(path, {"begun": of_plan(plan)}, "")
    log = read(path, count)
    if not (folder / PLAN).exists() and log.plan == of_plan(plan):  # killed between the two
        files.write_arrays(folder / PLAN, shard=plan.shard, slice=plan.slice)
    plan = _plan(folder / PLAN, plan)
    identity.same(folder / PLAN, log.plan, of_plan(plan), f"{path} began with")
    if done is not None:
        _agree(path, log, done["values"], count)
    if path.read_text(encoding="utf-8") != log.text:
        files.write(path, log.text)
    return plan, log


def request(path: Path, log: Log, indices: np.ndarray, count: int) -> Log:
    """The log with a request at its end, on the disk."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    _append(path, {"request": len(log.requests) + 1, "indices": indices.tolist(), "date": date}, log.chains[-1])
    return read(path, count)


def finished(path: Path, log: Log, seconds: float, count: int) -> Log:
    """The log after a training that carried out all its requests."""
    _append(path, {"done": len(log.requests), "seconds": seconds}, log.chains[-1])
    return read(path, count)


def of_plan(plan: shards.Plan) -> str:
    return identity.digest(np.asarray(plan.shard, np.int32), np.asarray(plan.slice, np.int32))


# --- reading -----------------------------------------------------------------------------------------------------


def read(path: Path, count: int) -> Log:
    """The log of an ensemble of so many examples. Raises BadInput for a line that is not what was written.

    A last line that a crash cut short was never confirmed to anyone, and does not count; `said` tells of it.
    """
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is damaged at byte {error.start}: {LOST}. {REMEDY}") from None
    log = Log([], [], None, (), False)
    for number, line in enumerate(lines, 1):
        try:
            log = _with(log, line, count)
        except (ValueError, TypeError, RecursionError):
            raise BadInput(f"{path} is damaged in line {number}: {LOST}. {REMEDY}") from None
    said = []
    if rest:
        try:
            rest = rest[: json.JSONDecoder().raw_decode(rest)[1]]
            log = _with(log, rest, count, chained=True)
            lines.append(rest)  # whole but for the end of the line
        except (ValueError, TypeError, RecursionError):
            said.append(f"{path}: its last line was never finished and does not count; repeat the request that it was to be")
    require(log.chains, f"{path} is damaged: it holds no whole line. {REMEDY}")
    if not log.chained:
        said.append(f"{path} is of an older version: its lines carry no digests, and are taken as they are")
    return log._replace(said=tuple(said), text="".join(f"{line}\n" for line in lines))


def _with(log: Log, line: str, count: int, *, chained: bool = False) -> Log:
    """The log with one more line, checked. Raises what a line that was not written by this module leads to."""
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise TypeError("no object")
    chain = entry.pop(CHAIN, None)
    now = _link(log.chains[-1] if log.chains else "", entry)
    if chain != now and (chain is not None or log.chained or chained):
        raise ValueError("the chain is broken")
    if set(entry) not in ENTRIES:
        raise ValueError("an unknown line")
    log = log._replace(chains=(*log.chains, now), chained=log.chained or chain is not None)
    if "begun" in entry:
        right = len(log.chains) == 1
        log = log._replace(plan=str(entry["begun"]))
    elif "request" in entry:
        at = entry["indices"]
        right = entry["request"] == len(log.requests) + 1 and len(at) > 0
        right &= all(type(i) is int and 0 <= i < count for i in at)
        log = log._replace(requests=[*log.requests, entry])
    else:
        right = type(entry["done"]) is int and max(log.done, 0) <= entry["done"] <= len(log.requests)
        right &= float(entry["seconds"]) >= 0
        log = log._replace(rounds=[*log.rounds, entry])
    if not right:
        raise ValueError("an impossible line")
    return log


def _link(before: str, entry: dict) -> str:
    return identity.of_json([before, entry])


def _agree(path: Path, log: Log, values: dict[str, Any], count: int) -> None:
    """BadInput unless the log still holds what the result was made from."""
    found, there = int(log.mask(max(log.done, 0), count).sum()), values["deleted"]
    same = len(log.rounds) == len(values["rounds"]) and found == there and values.get("log") in (None, *log.chains)
    require(
        same,
        f"{path} is not the log that the result was made from: it tells of {found} deleted examples in {len(log.rounds)} "
        f"trainings, the result of {there} in {len(values['rounds'])}, after the line with the digest {values.get('log')}; "
        f"the last here has {log.chains[-1]}. {REMEDY}",
    )


def _plan(path: Path, dealt: shards.Plan) -> shards.Plan:
    arrays = files.read_arrays(path, ("shard", "slice"))
    for name, most in (("shard", dealt.shards), ("slice", dealt.slices)):
        array = arrays[name]
        right = array.shape == dealt.shard.shape and np.issubdtype(array.dtype, np.integer)
        right = right and array.min() >= 0 and array.max() < most
        require(right, f"{path} is damaged: {name} is no number of 0..{most - 1} for each of {len(dealt.shard):,} examples")
    return dealt._replace(shard=arrays["shard"], slice=arrays["slice"])


# --- writing -----------------------------------------------------------------------------------------------------


def _append(path: Path, entry: dict, before: str) -> None:
    """Add a line and wait until the disk has it, the first time its name in the folder too."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**entry, CHAIN: _link(before, entry)}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
