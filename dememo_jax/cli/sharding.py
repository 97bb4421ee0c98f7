"""`dememo sisa`: an ensemble that forgets exactly; what it was asked to forget stands in the log of `deletions`."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dememo_jax import checkpoint, keys, models, train
from dememo_jax import data as sets
from dememo_jax import evaluate as evaluation
from dememo_jax.cli import console, deletions, identity, lineage, networks, runs, selection
from dememo_jax.cli.configs import Sisa
from dememo_jax.errors import require
from dememo_jax.report import Section, Table
from dememo_jax.unlearn import ensemble, sharded, shards


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
    everything = runs.describe(config, **identity.record("source", base.inputs)) | {"width": config.width}
    described = {name: value for name, value in everything.items() if name not in ("delete", "delete_index")}
    done = runs.begin(config.run, described, again=True)
    lineage.keep_tokenizer(config.run, base)
    plan, log = deletions.begin(config.run, plan, done)
    for sentence in log.said:
        console.warn(sentence)
    shards.check_left(plan, config.epochs, log.mask(len(log.requests), count) | selection.mask_of(asked, count))
    log = _request(config.run / deletions.LOG, log, asked, count)
    number = len(log.requests)
    if done and log.done == number:
        return done
    (config.run / runs.RESULT).unlink(missing_ok=True)  # it tells of networks that are about to go
    begun = runs.read(config.run)["config"]  # maybe by an older version, whose stages keep their names
    tag = identity.of_json(begun)
    how: dict[str, Any] = {"epochs": config.epochs, "batch": config.batch, "tag": tag, "width": config.width}
    to_train = keys.named(key, "train")

    def named(upto: int) -> sharded.Names:
        return sharded.names(to_train, plan, deleted=log.mask(upto, count), **how)

    found = _train(config, base, to_train, plan, log.mask(number, count), named(number), how)
    if log.done != number:
        log = deletions.finished(config.run / deletions.LOG, log, round(time.monotonic() - started, 2), count)
    rows = _rounds(log, plan, config, named)
    values, section = _learned(config, base, found, log.mask(number, count), rows)
    values["log"] = log.chains[-1]
    return runs.finish(config.run, described, values, [base.told(section)], started)


# --- what to delete ----------------------------------------------------------------------------------------------


def _asked(config: Sisa, count: int) -> np.ndarray:
    """Sorted indices that this call deletes, each once; BadInput for one that is no training example."""
    given = selection.checked(config.delete, count)
    return given if config.delete_index is None else np.union1d(given, selection.indices(config.delete_index, count))


def _request(path: Path, log: deletions.Log, asked: np.ndarray, count: int) -> deletions.Log:
    """The log, with what is newly asked for on disk at the end of it; says which examples were asked for before."""
    deleted = log.mask(len(log.requests), count)
    again, new = asked[deleted[asked]], asked[~deleted[asked]]
    if len(again):
        some = ", ".join(map(str, again[:5])) + (" ..." if len(again) > 5 else "")
        over = bool(log.mask(max(log.done, 0), count)[again].all())
        what = "so nothing to do" if over else "and not carried out yet, which is done now,"
        console.warn(f"asked for before, {what} for {len(again):,} of the examples to delete: {some}")
    if not len(new):
        return log
    return deletions.request(path, log, new, count)


# --- work --------------------------------------------------------------------------------------------------------


def _train(
    config: Sisa, base: lineage.Source, key: jax.Array, plan: shards.Plan, deleted: np.ndarray, names: sharded.Names, how: dict
) -> sharded.Ensemble:  # fmt: skip
    """Purge the weights that saw deleted examples, then train what is missing, with a bar over the stages."""
    model, seen = base.model_of(config.model, precision=config.precision), base.seen
    transform = networks.optimiser(config, "constant")
    method = networks.method(train.sgd, model, transform, loss=base.loss, augment=networks.augmentation(config.augment))
    kept = checkpoint.store(config.run / deletions.STAGES, jax.eval_shape(model.init, key, seen.x[:1]), console.warn)
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


def _rounds(log: deletions.Log, plan: shards.Plan, config: Sisa, named: Callable[[int], sharded.Names]) -> list[dict]:
    """Of every training so far: which requests, how many examples of which shards, and what was trained for them."""
    count, before, rows = len(plan.shard), None, []
    for entry in log.rounds:
        begun, after = 0 if before is None else before, log.mask(entry["done"], count)
        new = after & ~log.mask(begun, count)
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
