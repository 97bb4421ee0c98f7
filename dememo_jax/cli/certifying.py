"""The commands that bound what a model's neighbourhood can know: certify, and join for draws made in parts."""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dememo_jax import certify, checkpoint, files, mesh, models, tree
from dememo_jax.cli import certificates, classes, console, identity, lineage, runs
from dememo_jax.cli.certificates import CONTROL, THIS, Lengths
from dememo_jax.cli.configs import Certify, Join
from dememo_jax.cli.runs import positive
from dememo_jax.cli.selection import target_of
from dememo_jax.errors import BadInput, require
from dememo_jax.report import Section, Table

RECALIBRATION = 512  # training images whose batch-norm statistics are re-estimated under each noise


def certify_model(config: Certify) -> dict:
    """`dememo certify`."""
    started = time.monotonic()
    positive(sigma=config.sigma, width=config.width, images=config.images)
    require(
        0 <= config.checkpoint_seconds < math.inf, f"--checkpoint-seconds must be a number, got {config.checkpoint_seconds}"
    )
    certify.check(sigma=config.sigma, eta=config.eta, q=config.q, alpha=config.alpha, draws=config.draws, tau=config.tau or 0.0)
    first = config.first or 0
    require(
        config.first is None or 0 <= first < config.draws,
        f"--first must be less than --draws, {config.draws}; got {config.first}",
    )
    require(config.tau is None or config.first is None, "--tau asks in the order of the draws; it takes no --first")
    _plan(config, groups=2, refuse=config.first is None and not config.plan)
    base = lineage.trained(config.source)
    config = classes.numbered(config, base)
    target = target_of(base, config.target_class)
    contexts = (
        {THIS: base} if config.control is None else {THIS: base, CONTROL: lineage.companion(base, config.control, "--control")}
    )
    labels = np.asarray(base.test.y)
    groups = {base.called(target): labels == target, "test set": np.ones(len(labels), bool)}
    clouds = {name: _cloud(config, context, groups) for name, context in contexts.items()}
    if config.plan:
        return _tell(config, clouds[THIS], len(clouds), started)
    digests = {k: v for name, c in contexts.items() for k, v in identity.record(name.replace(" ", "_"), c.inputs).items()}
    described = runs.describe(config, **digests)
    if done := runs.begin(config.run, described, grows="draws"):
        return done
    earlier = _looks(config.run)
    if not earlier and any((config.run / identity.DRAWS).glob("*/*")):
        console.warn("there are draws and no result of them: if one was looked at and is missing, that look is not counted")
    drawn = {name: _draw(config, source, name) for name, source in clouds.items()}
    return _conclude(config, described, drawn, [*earlier, config.draws], _lengths(config, base, clouds[THIS]), started)


def join_parts(config: Join) -> dict:
    """`dememo join`."""
    started = time.monotonic()
    require(config.parts, "name the run folders of the parts to join")
    finished = [runs.result(folder) for folder in config.parts]
    known = [done["config"] for done in finished]
    for folder, part in zip(config.parts, known):
        require(part["command"] == "certify", f"{folder} is a run of `dememo {part['command']}`; expected one of certify")
        shared = part.keys() & known[0].keys() - {"first", "draws", "source", "control"}
        apart = {n for n in shared if part[n] != known[0][n]}
        require(
            not apart, f"{folder} was certified otherwise than {config.parts[0]}: they differ in {', '.join(sorted(apart))}"
        )
    names = [name for name in (THIS, CONTROL) if name == THIS or known[0]["control"] is not None]
    parts = list(zip(config.parts, finished))
    joined = {name: certify.join(*(_made(folder, done, name) for folder, done in parts)) for name in names}
    drawn = {name: joined[name] for name in names}
    fields = {f.name: known[0][f.name] for f in dataclasses.fields(Certify) if f.name in known[0]}
    draws = drawn[THIS].start + len(drawn[THIS].scores)
    like = Certify(
        **{**fields, "run": config.run, "eta": tuple(fields["eta"]), "q": tuple(fields["q"]), "draws": draws, "first": None}
    )
    digests = {f"part_{i}": identity.digest((folder / runs.RESULT).read_bytes()) for i, folder in enumerate(config.parts)}
    described = runs.describe(config, **digests)
    if done := runs.begin(config.run, described):
        return done
    lengths = Lengths(**finished[0]["values"].get("lengths", {}))
    return _conclude(like, described, drawn, [draws], lengths, started)


# --- draws -------------------------------------------------------------------------------------------------------


def _cloud(config: Certify, context: lineage.Trained, groups: Mapping[str, np.ndarray]) -> certify.Cloud:
    apply, params = context.frozen
    prepare = None
    if config.statistics == "batch":
        apply, params, prepare = models.recalibrated(context.model, context.weights, context.seen.x[:RECALIBRATION])
    sigma = tree.scales(params, config.sigma, only=config.only, relative=True) if config.relative else config.sigma
    return certify.cloud(
        apply, params, context.test, jax.random.key(config.seed), sigma=sigma, groups=groups, prepare=prepare,
        only=None if config.relative else config.only, precision=config.precision, images=config.images,
    )  # fmt: skip


def _draw(config: Certify, source: certify.Cloud, name: str) -> certify.Draws:
    """The draws of one model, going on from those that the folder holds; every chunk is saved when it ends."""
    directory = config.run / _kept(name)
    restored = runs.newest(directory, None)
    prior = None if restored is None else _draws(restored, directory)
    if prior is not None:
        _check_own(config, directory, prior, source.blank)
    begun = (config.first or 0) if prior is None else prior.start + len(prior.scores)
    if prior is not None and begun >= config.draws and config.tau is None:
        return prior
    over = mesh.mesh() if jax.device_count() > 1 else None
    width, seconds = (
        _speed(config, source, over, name) if restored is None else (restored.meta["width"], restored.meta["seconds"])
    )
    unit = width * jax.device_count()  # a chunk fills every device
    every = max(1, round(config.checkpoint_seconds / seconds / unit)) * unit
    engine: dict[str, Any] = {"strategy": "vmap", "width": width, "over": over, "every": min(every, config.draws - begun)}
    with console.progress(f"certify {config.run.name}: {name}", config.draws, begun, "draws") as advance:

        def after(made: certify.Draws) -> None:
            kept = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name != "scores"}
            meta = {**kept, "fingerprint": dict(made.fingerprint), "width": width, "seconds": seconds}
            now = made.start + len(made.scores)
            checkpoint.save(directory, now, {"scores": made.scores}, meta)
            advance(now)

        if config.tau is None:
            return certify.draw(source, draws=config.draws, start=config.first or 0, prior=prior, after=after, **engine)
        return certify.ask(
            source, tau=config.tau, eta=config.eta, q=config.q, alpha=config.alpha, most=config.draws, prior=prior,
            after=after, **engine,
        )[1]  # fmt: skip


def _speed(config: Certify, source: certify.Cloud, over: Any, name: str = THIS) -> tuple[int, float]:
    """Networks in one vmap, and seconds for a draw."""
    found = certify.calibrate(source, over=over, width=1 if config.strategy == "map" else config.width)
    width = {"map": 1, "vmap": config.width or 32, "auto": found.width}[config.strategy]
    console.say(
        f"{name}: {found.seconds * 1e3:.3g} ms a draw, {'one network after another' if width == 1 else f'{width} in one vmap'}"
    )
    return width, found.seconds


def _kept(name: str) -> str:
    """Where a run folder keeps the draws of a model."""
    return f"{identity.DRAWS}/{name.replace(' ', '-')}"


def _draws(restored: checkpoint.Restored, directory: Path) -> certify.Draws:
    meta = restored.meta
    try:
        known: dict[str, Any] = {n: meta[n] for n in ("sigma", "start", "noise_norm", "precision", "fingerprint")}
        known |= {n: None if meta[n] is None else tuple(tuple(pair) for pair in meta[n]) for n in ("scales", "images")}
        return certify.Draws(scores=np.asarray(restored.state["scores"]), groups=tuple(meta["groups"]), **known)
    except (KeyError, TypeError) as error:
        raise BadInput(f"{directory} holds a checkpoint that is no draws; run it again in a new folder") from error


def _check_own(config: Certify, directory: Path, prior: certify.Draws, blank: certify.Draws) -> None:
    """BadInput for draws that this run did not make: others than it would make, or of another cloud."""
    first, last = prior.start, prior.start + len(prior.scores)
    own = first == (config.first or 0) and last <= config.draws
    asked = f"this run makes {config.first or 0} to {config.draws}"
    require(own, f"{directory} holds the draws {first} to {last}, and {asked}: they are another run's. Remove them")
    for what in sorted(blank.fingerprint):
        role = f"the draws in {directory} were made from"
        identity.same(f"{what} of this run", prior.fingerprint.get(what), blank.fingerprint[what], role)


def _made(folder: Path, done: dict, name: str) -> certify.Draws:
    """The draws of a finished part."""
    found = _draws(identity.restored(folder, done, _kept(name), None), folder / _kept(name))
    first, last = done["config"]["first"] or 0, done["config"]["draws"]
    there = found.start, found.start + len(found.scores)
    whole = there == (first, last) or (done["config"]["tau"] is not None and there[0] == first)
    require(whole, f"{folder / _kept(name)} holds the draws {there[0]} to {there[1]}; its run made {first} to {last}")
    return found


def _looks(folder: Path) -> list[int]:
    """After how many draws this folder's certificate was looked at before."""
    try:
        return json.loads((folder / runs.RESULT).read_text())["values"]["looks"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


# --- plan --------------------------------------------------------------------------------------------------------


def _plan(config: Certify, *, groups: int, refuse: bool = False, seconds: float | None = None) -> certify.Plan:
    side = config.side if config.tau is None else "upper"
    return certify.plan(
        sigma=None if config.relative else config.sigma, eta=config.eta, q=config.q, alpha=config.alpha,
        draws=config.draws - (config.first or 0), groups=groups, side=side, form=config.form,
        subset=config.images is not None, seconds_per_draw=seconds, refuse=refuse,
    )  # fmt: skip


def _tell(config: Certify, source: certify.Cloud, count: int, started: float) -> dict:
    """What the certificate would take: a table for the terminal, and nothing on disk."""
    seconds = _speed(config, source, mesh.mesh() if jax.device_count() > 1 else None)[1] * count
    found = _plan(config, groups=len(source.blank.groups), seconds=seconds)
    rows = tuple(
        (d.q, d.eta, d.shift, d.needed, None if d.needed is None else d.needed * seconds, "yes" if _enough(d, found) else "no")
        for d in found.rows
    )
    columns = ("q", "eta", "eta / sigma", "draws needed", "seconds", f"within {found.draws:,} draws")
    reach = ", ".join(
        f"{'no eta' if r is None else f'eta {r:.4g}'} at q = {q:g}" for q, r in zip(config.q, found.largest_eta, strict=True)
    )
    note = f"Seconds predicted from a calibration: {seconds * 1e3:.3g} ms a draw, models counted: {count}."
    summary = f"{found.draws:,} draws take about {found.seconds:,.0f} s and reach {reach}"
    section = Section(f"plan: {config.run.name}", summary, (Table("What the rows need", columns, rows, note),))
    return {"sections": [dataclasses.asdict(section)], "measured": runs.measured(started)}


def _enough(demand: certify.Demand, found: certify.Plan) -> bool:
    return demand.needed is not None and found.draws is not None and found.draws >= demand.needed


# --- what came out -----------------------------------------------------------------------------------------------


def _lengths(config: Certify, base: lineage.Trained, source: certify.Cloud) -> Lengths:
    """How long the noised weights are, and how far unlearning moved them."""
    scales = [np.asarray(s, np.float64) for s in tree.leaf_scales(source.scale, base.weights.params)]

    def length(others: Any) -> float | None:
        moves = [np.asarray(b, np.float64) - a for a, b in zip(map(np.asarray, jax.tree.leaves(base.weights.params)), others)]
        spread = [np.broadcast_to(scale, move.shape) for scale, move in zip(scales, moves)]
        if any(np.any(move[scale == 0]) for move, scale in zip(moves, spread)):
            return None  # leaves without noise differ: eta does not measure this
        square = sum(float(np.sum(np.square(move[scale > 0] / scale[scale > 0]))) for move, scale in zip(moves, spread))
        return math.sqrt(square) * (source.blank.sigma or 1.0)

    leaves = jax.tree.leaves(base.weights.params)
    weights = length([np.where(np.broadcast_to(scale, leaf.shape) > 0, 0.0, leaf) for scale, leaf in zip(scales, leaves)])
    if base.unlearned is None:
        return Lengths(weights)
    before = lineage.trained(config.source / runs.read(config.source)["config"]["source"])
    return Lengths(weights, length(jax.tree.leaves(before.weights.params)))


def _conclude(
    config: Certify, described: dict, drawn: dict[str, certify.Draws], looks: list[int], lengths: Lengths, started: float
) -> dict:
    arrays: dict[str, Any] = {name.replace(" ", "_"): made.scores for name, made in drawn.items()}
    files.write_arrays(config.run / "scores.npz", **arrays)
    if config.tau is None:
        bounds = {
            name: certify.bound(
                made, eta=config.eta, q=config.q, alpha=config.alpha, side=config.side, form=config.form
            )
            for name, made in drawn.items()
        }  # fmt: skip
        section = certificates.certified(config, bounds, looks, lengths)
        values: dict[str, Any] = {"certificates": {name: dataclasses.asdict(c) for name, c in bounds.items()}}
    else:
        found = {
            name: certify.answers(made, tau=config.tau, eta=config.eta, q=config.q, alpha=config.alpha)
            for name, made in drawn.items()
        }
        section = certificates.answered(config, found, lengths)
        values = {"answers": {name: [dataclasses.asdict(a) for a in each] for name, each in found.items()}}
    return runs.finish(
        config.run, described, {**values, "looks": looks, "lengths": dataclasses.asdict(lengths)}, [section], started
    )


STAGES = {Certify: certify_model, Join: join_parts}
