"""`dememo sisa`: an ensemble that forgets exactly, and the log of what it was asked to forget.

requests.jsonl is only ever appended to, and a request is on the disk before any work on it begins. Its lines are
`{"request": number, "indices": [...], "date": ...}`, and after each training `{"done": up to which request, "seconds": ...}`.
"""

import dataclasses
import datetime
import io
import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dememo_jax import checkpoint, files, keys, models, train
from dememo_jax import data as sets
from dememo_jax import evaluate as evaluation
from dememo_jax.cli import console, lineage, networks, runs, selection
from dememo_jax.cli.configs import Sisa
from dememo_jax.errors import BadInput, require
from dememo_jax.report import Section, Table
from dememo_jax.unlearn import ensemble, sharded, shards

LOG, PLAN, KEPT = "requests.jsonl", "plan.npz", "stages"


class Log(NamedTuple):
    """What was asked for, and the trainings that carried it out."""

    requests: list[dict]
    rounds: list[dict]


def sisa(config: Sisa) -> dict:
    """`dememo sisa`: check everything, claim the folder, log the request, work, write."""
    started = time.monotonic()
    runs.positive(epochs=config.epochs, batch=config.batch, lr=config.lr, width=config.width)
    lineage.check_origin(config)
    if config.source is None:
        config = dataclasses.replace(config, data=config.data or "digits")
        base = lineage.clean(config.data or "digits", config.data_dir, config.side, config.text)
    else:
        base = lineage.protected(config.source)
    config = networks.settled(config)
    require(base.language is None or config.augment == "none", "--augment changes images: leave it away with texts")
    base.model_of(config.model)  # bad input must show before the folder is claimed
    count, key = len(base.train.y), jax.random.key(config.seed)
    asked = _asked(config, count)
    plan = shards.deal(keys.named(key, "plan"), count, shards=config.shards, slices=config.slices)
    shards.check_left(plan, config.epochs, selection.mask_of(asked, count))
    everything = runs.describe(config, source_digest=base.digest) | {"width": config.width}
    described = {name: value for name, value in everything.items() if name not in ("delete", "delete_index")}
    done = runs.begin(config.run, described, again=True)
    lineage.keep_tokenizer(config.run, base)
    plan = _frozen(config.run, plan)
    log = _request(config.run, asked, count)
    number = len(log.requests)
    if done and log.rounds and log.rounds[-1]["done"] == number:
        return done
    (config.run / runs.RESULT).unlink(missing_ok=True)  # it tells of networks that are about to go
    begun = runs.read(config.run)["config"]  # maybe by an older version, whose stages keep their names
    tag = runs.digest(json.dumps(begun, sort_keys=True).encode())
    how: dict[str, Any] = {"epochs": config.epochs, "batch": config.batch, "tag": tag, "width": config.width}
    to_train = keys.named(key, "train")

    def named(upto: int) -> sharded.Names:
        return sharded.names(to_train, plan, deleted=_mask(log, upto, count), **how)

    found = _train(config, base, to_train, plan, _mask(log, number, count), named(number), how)
    if not (log.rounds and log.rounds[-1]["done"] == number):
        _append(config.run / LOG, {"done": number, "seconds": round(time.monotonic() - started, 2)})
    rows = _rounds(_read(config.run / LOG), plan, config, named)
    values, section = _learned(config, base, found, _mask(log, number, count), rows)
    return runs.finish(config.run, described, values, [base.told(section)], started)


# --- what to delete ----------------------------------------------------------------------------------------------


def _asked(config: Sisa, count: int) -> np.ndarray:
    """Sorted indices that this call deletes, each once; BadInput for one that is no training example."""
    given = selection.checked(config.delete, count)
    return given if config.delete_index is None else np.union1d(given, selection.indices(config.delete_index, count))


def _request(folder: Path, asked: np.ndarray, count: int) -> Log:
    """The log, with what is newly asked for on disk at the end of it; says which examples were deleted before."""
    log = _read(folder / LOG)
    deleted = _mask(log, len(log.requests), count)
    again, new = asked[deleted[asked]], asked[~deleted[asked]]
    if len(again):
        some = ", ".join(map(str, again[:5])) + (" ..." if len(again) > 5 else "")
        console.warn(f"asked for before, so nothing to do for {len(again):,} of the examples to delete: {some}")
    if not len(new):
        return log
    deleted[new] = True
    shards.check_deleted(deleted, count)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    _append(folder / LOG, {"request": len(log.requests) + 1, "indices": new.tolist(), "date": date})
    return _read(folder / LOG)


def _mask(log: Log, upto: int, count: int) -> np.ndarray:
    """Mask [count] of what the first so many requests delete."""
    mask = np.zeros(count, bool)
    for request in log.requests[:upto]:
        mask[request["indices"]] = True
    return mask


def _read(path: Path) -> Log:
    """The log; a last line that a crash cut short was never confirmed to anyone, and is taken off, aloud."""
    text = path.read_text() if path.exists() else ""
    whole, _, rest = text.rpartition("\n")
    if rest:
        console.warn(f"{path}: its last line was never finished and is taken off; repeat the request that it was to be")
        files.write(path, whole + "\n" if whole else "")
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        log = Log([line for line in lines if "request" in line], [line for line in lines if "done" in line])
        intact = [line["request"] for line in log.requests] == list(range(1, len(log.requests) + 1))
    except (ValueError, TypeError):
        intact = False
    require(intact, f"{path} is damaged: it no longer tells what was to be deleted. Restore it, or train in another --run")
    return log


def _append(path: Path, line: dict) -> None:
    """Add a line and wait until the disk has it, the first time its name in the folder too."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- work --------------------------------------------------------------------------------------------------------


def _frozen(folder: Path, plan: shards.Plan) -> shards.Plan:
    """The plan that the folder was begun with, whatever this version would deal; else this one, from now on."""
    path = folder / PLAN
    if not path.exists():
        buffer = io.BytesIO()
        np.savez(buffer, shard=plan.shard, slice=plan.slice)
        files.write(path, buffer.getvalue())
        return plan
    try:
        with np.load(path, allow_pickle=False) as kept:
            return plan._replace(shard=kept["shard"], slice=kept["slice"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} cannot be read ({error}); train in another --run") from error


def _train(
    config: Sisa, base: lineage.Source, key: jax.Array, plan: shards.Plan, deleted: np.ndarray, names: sharded.Names, how: dict
) -> sharded.Ensemble:  # fmt: skip
    """Purge the weights that saw deleted examples, then train what is missing, with a bar over the stages."""
    model, seen = base.model_of(config.model, precision=config.precision), base.seen
    transform = networks.optimiser(config, "constant")
    method = networks.method(train.sgd, model, transform, loss=base.loss, augment=networks.augmentation(config.augment))
    kept = checkpoint.store(config.run / KEPT, jax.eval_shape(model.init, key, seen.x[:1]), console.warn)
    wanted, there = {name for chain in names.values() for name in chain}, set(kept.names())
    kept.remove(there - wanted)
    ready = len(there & wanted)
    if 0 < ready < len(wanted):
        console.say(f"{ready} of {len(wanted)} stages are trained already")
    with console.progress(f"sisa {config.run.name}", len(wanted), ready, "stages") as advance:

        def save(name: str, weights: Any) -> None:
            nonlocal ready
            kept.save(name, weights)
            ready += 1
            advance(min(ready, len(wanted)))

        return sharded.fit(
            key, plan, seen, model, transform, deleted=deleted, store=sharded.Store(kept.load, save), method=method, **how
        )


# --- what came out -----------------------------------------------------------------------------------------------


def _rounds(log: Log, plan: shards.Plan, config: Sisa, named: Callable[[int], sharded.Names]) -> list[dict]:
    """Of every training so far: which requests, how many examples of which shards, and what was trained for them."""
    count, before, rows = len(plan.shard), None, []
    for entry in log.rounds:
        begun, after = 0 if before is None else before, _mask(log, entry["done"], count)
        new = after & ~_mask(log, begun, count)
        old = set() if before is None else {name for chain in named(before).values() for name in chain}
        anew = [(s, r) for s, chain in named(entry["done"]).items() for r, name in enumerate(chain) if name not in old]
        work = shards.passes(plan, config.epochs, after)
        rows.append(
            {
                "requests": list(range(begun + 1, entry["done"] + 1)),
                "examples": int(new.sum()),
                "shards": np.unique(plan.shard[new]).tolist(),
                "stages": len(anew),
                "stages_of_all": plan.shards * plan.slices,
                "share": float(sum(work[place] for place in anew) / max(1, work.sum())),
                "seconds": entry["seconds"],
            }
        )
        before = entry["done"]
    return rows


def _learned(
    config: Sisa, base: lineage.Source, found: sharded.Ensemble, deleted: np.ndarray, rows: list[dict]
) -> tuple[dict, Section]:
    model = base.model_of(config.model)
    sizes = found.sizes if config.voters == "proportional" else None
    apply, params = ensemble.vote(model, found.weights, how=config.vote, sizes=sizes)
    test = float(evaluation.accuracy(apply, params, base.test))
    forgotten = float(evaluation.accuracy(apply, params, sets.select(base.seen, deleted))) if deleted.any() else None
    each = []
    for place in range(len(found.shards)):
        one = jax.tree.map(lambda leaf, place=place: leaf[place], found.weights)
        each.append(float(evaluation.accuracy(*models.freeze(model, one), base.test)))
    values = {
        "test": test, "deleted_accuracy": forgotten, "deleted": int(deleted.sum()), "shards": list(found.shards),
        "sizes": list(found.sizes), "lost_shards": list(found.lost), "constituents": each, "rounds": rows,
        "expected_cost": shards.expected_cost(config.shards, config.slices, config.epochs),
    }  # fmt: skip
    summary = f"test accuracy {test:.3f} of {len(each)} networks together, {np.mean(each):.3f} on average alone"
    if rows[-1]["requests"]:
        last = f"the last request took {rows[-1]['stages']} of {rows[-1]['stages_of_all']} stages"
        summary += (
            f"; {deleted.sum():,} of {len(deleted):,} examples deleted, {last} and {rows[-1]['share']:.1%} of full training"
        )
    return values, Section(f"sisa: {config.run.name}", summary, _tables(values, len(deleted), config))


def _tables(values: dict, count: int, config: Sisa) -> tuple[Table, ...]:
    row = (values["test"], values["deleted_accuracy"], values["deleted"], count - values["deleted"])
    lost = (
        f" Without examples, or without an example pass, and so without a vote: shards {values['lost_shards']}."
        if values["lost_shards"]
        else ""
    )
    met = "Deleted examples are to these networks what test images are: they never met them." if values["deleted"] else ""
    together = Table(
        "Ensemble", ("test accuracy", "on deleted examples", "deleted", "remaining"), (row,),
        met + lost,
    )  # fmt: skip
    trained = tuple(
        (
            "training" if i == 0 else ", ".join(map(str, done["requests"])), done["examples"],
            ", ".join(map(str, done["shards"])), f"{done['stages']} of {done['stages_of_all']}", done["share"], done["seconds"],
        )
        for i, done in enumerate(values["rounds"])
    )  # fmt: skip
    note = (
        "Share of the example passes of full training; one request for a random example is expected to take "
        f"{values['expected_cost']:.3f}. Exact for requests that do not depend on the models released before."
    )
    columns = ("request", "examples", "in shards", "stages trained", "share", "seconds")
    alone = tuple(zip(values["shards"], values["sizes"], values["constituents"]))
    return (
        together,
        Table("Requests", columns, trained, note),
        Table("Networks alone", ("shard", "remaining examples", "test accuracy"), alone),
    )


STAGES = {Sisa: sisa}
