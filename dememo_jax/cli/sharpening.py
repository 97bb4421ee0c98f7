"""`dememo sharpness`: SAL of every kept epoch by every solver, UD with its controls, the loss around the model."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import data as sets
from dememo_jax import files, keys, models, report, sharpness
from dememo_jax.cli import console, landscapes, lineage, runs, victims
from dememo_jax.cli.configs import Sharpness, Train
from dememo_jax.errors import require
from dememo_jax.report import Cell, Plot, Section, Table
from dememo_jax.sharpness import Distance, Sal
from dememo_jax.types import Dataset, Weights

THIS, CLEAN = "this model", "clean"
SEARCHES = ("ball", "normalized")


class Subject(NamedTuple):
    """A model over its kept epochs, and the images whose loss is measured."""

    base: lineage.Trained
    epochs: dict[int, Weights]
    images: Dataset
    running: tuple[float, ...]  # training loss of each epoch, where it is known


def measure_sharpness(config: Sharpness) -> dict:
    """`dememo sharpness`."""
    started = runs.clock(config.run)
    subjects = _subjects(config)
    digests = {f"{part}_{i}": n.digest for i, one in enumerate(subjects.values()) for part, n in one.base.inputs.items()}
    described = runs.describe(config, **digests)
    if done := runs.begin(config.run, described):
        return done
    found = _measured(config, subjects, started)
    against: dict[str, dict[str, Distance]] = {}
    if config.clean is not None:
        against = {solver: _distances(config, found[solver]) for solver in config.solver}
    tables = [_table(config, solver, against[solver], found[solver]) for solver in against]
    tables += [_layers(config, solver, found[solver]) for solver in config.solver]
    pictures, values = _heat(config, subjects, found, against), {}
    if config.landscape:
        drawn, values["landscapes"] = landscapes.drawn(config, subjects[THIS])
        pictures += drawn
    _warn(config, found)
    values |= {
        "sal": {
            solver: {name: [dataclasses.asdict(s) for s in each] for name, each in by.items()} for solver, by in found.items()
        },
        "distances": {s: {name: dataclasses.asdict(d) for name, d in by.items()} for s, by in against.items()},
    }
    section = Section(
        f"sharpness: {config.run.name}",
        _summary(config, found, against),
        tuple(tables),
        _plots(config, subjects, against),
        pictures,
    )
    return runs.finish(config.run, described, values, [subjects[THIS].base.told(section)], started)


# --- what is measured --------------------------------------------------------------------------------------------


def _subjects(config: Sharpness) -> dict[str, Subject]:
    """Every model, checked; the clean one and the controls beside this one."""
    require(config.solver, "name at least one --solver")
    runs.positive(radius=config.radius, images=config.images, rounds=config.rounds, lr=config.lr, batch=config.batch,
                  points=config.points, span=config.span, width=config.width)  # fmt: skip
    few = config.probes is not None and (config.probes < 0 or config.probes == 1)
    require(not few, f"--probes must be 2 or more, whose spread gives the error, or 0 for exact curvature; got {config.probes}")
    require(not config.control or config.clean is not None, "--control stands beside UD, which is against a --clean run")
    base = lineage.trained(config.source)
    others = {} if config.clean is None else {CLEAN: config.clean}
    for folder in config.control:
        require(
            folder.name not in (*others, THIS), f"two runs are named {folder.name}; --control needs folders of different names"
        )
        others[folder.name] = folder
    found = {THIS: _subject(config, base, config.source)}
    for name, folder in others.items():
        other = lineage.companion(base, folder, "--clean" if name == CLEAN else "--control")
        same = other.trained["model"] == base.trained["model"]
        require(
            same, f"{folder} is a {other.trained['model']}, {config.source} a {base.trained['model']}: UD compares one network"
        )
        found[name] = _subject(config, other, folder)
        here, there = list(found[THIS].epochs), list(found[name].epochs)
        unlike = f"UD averages over the same epochs: {config.source} has {here}, {folder} {there}"
        require(here == there, f"{unlike}. Train both with the same --epochs and --every")
    if config.clean is not None:
        bare = found[CLEAN].base.perturbation is None and not found[CLEAN].base.trained["random_labels"]
        require(bare, f"--clean {config.clean} was not trained on clean data: UD is against a model that was")
    if "trajectory" in config.landscape:
        count = len(found[THIS].epochs)
        require(count >= 3, f"a trajectory needs three kept epochs at least, {config.source} has {count}: train with --every")
    return found


def _subject(config: Sharpness, base: lineage.Trained, folder: Path) -> Subject:
    known = runs.result(folder)
    plain = known["config"]["command"] == "train"
    running = tuple(entry["loss"] for entry in known["values"]["history"]) if plain else ()
    require(
        config.mode == "evaluation" or plain,
        f"--mode mixed needs the training loss of each epoch, and {folder} is no train run",
    )
    if config.on == "train":
        seen, noise = victims.shown(runs.filled(Train, folder, base.trained), base, base.perturbation)
        images = sets.perturb(seen, noise)
    else:
        images = base.train if config.on == "clean" else base.test
    order = np.asarray(jax.random.permutation(keys.named(jax.random.key(config.seed), "images"), len(images.y)))
    images = sets.take(images, jnp.asarray(np.sort(order[: config.images])))
    fits = "ball" not in config.solver or len(images.y) >= config.batch
    require(fits, f"{len(images.y):,} images are less than one --batch of {config.batch}; lower it or measure more --images")
    subject = Subject(base, lineage.kept(folder, base), images, running)
    _names(config, subject)  # BadInput for leaves that are not there
    return subject


def _names(config: Sharpness, subject: Subject) -> list[str]:
    return sharpness.learnable_layers(*subject.base.frozen, subject.images.x[:1], config.only)


def _measured(config: Sharpness, subjects: dict[str, Subject], started: float) -> dict[str, dict[str, list[Sal]]]:
    """solver -> model -> SAL of every epoch; each is saved as it ends."""
    directory = config.run / runs.CHECKPOINTS / "sal"
    jobs = [(solver, name, epoch) for solver in config.solver for name, one in subjects.items() for epoch in one.epochs]
    found: dict[str, dict[str, list[Sal]]] = {solver: {name: [] for name in subjects} for solver in config.solver}
    layers = len(_names(config, subjects[THIS]))
    with console.progress(f"sharpness {config.run.name}", layers * len(jobs), 0, "layers") as advance:
        for number, (solver, name, epoch) in enumerate(jobs):
            file = directory / f"{solver}-{name.replace(' ', '-')}-{epoch}.json"

            def after(done: int, _: int, begun: int = layers * number) -> None:
                advance(begun + done)

            measure = functools.partial(_sal, config, solver, subjects[name], epoch, after)
            found[solver][name].append(sharpness.from_plain(runs.once(file, measure)))
            files.write(config.run / runs.CHECKPOINTS / runs.SECONDS, f"{runs.elapsed(started):.3f}")
            advance(layers * (number + 1))
    return found


def _sal(config: Sharpness, solver: str, subject: Subject, epoch: int, after) -> Sal:
    apply, params = models.freeze(subject.base.model, subject.epochs[epoch])
    mixed = config.mode == "mixed" and solver in (*SEARCHES, "one_step")
    return sharpness.sal(
        apply, params, subject.images, solver=solver, granularity="layer", radius=config.radius, only=config.only,
        key=keys.at(jax.random.key(config.seed), epoch), rounds=config.rounds, lr=config.lr, probes=config.probes,
        running_loss=subject.running[epoch - 1] if mixed else None, on=config.on, test=subject.base.test, batch=config.batch,
        width=config.width, after=after,
    )  # fmt: skip


# --- what is shown -----------------------------------------------------------------------------------------------


def _distances(config: Sharpness, found: dict[str, list[Sal]]) -> dict[str, Distance]:
    def distance(each: list[Sal]) -> Distance:
        return sharpness.unlearnable_distance(each, found[CLEAN], weighting=config.weighting, rule=config.rule)

    return {name: distance(each) for name, each in found.items()}


def _layers(config: Sharpness, solver: str, by: dict[str, list[Sal]]) -> Table:
    """SAL of every layer at the last epoch."""
    last = {name: by[name][-1] for name in (THIS, CLEAN) if name in by}
    searched = solver in SEARCHES
    columns = ["layer", "parameters"]
    series: list[Any] = []
    for name, sal in last.items():
        columns += [name, "of the radius"] if searched else [name]
        series += [sal.value, sal.radius_fraction] if searched else [sal.value]
    measure, sizes = last[THIS].measure, last[THIS].sizes
    rows: list[tuple[Cell, ...]] = [(name, sizes[name], *(float(part[name]) for part in series)) for name in measure.layers]
    return Table(f"Learnability of the layers (SAL), {solver}", tuple(columns), tuple(rows), _words(config, searched))


def _words(config: Sharpness, searched: bool) -> str:
    what = {"train": "the training images as each model met them", "clean": "clean training images", "test": "test images"}
    used = (
        "Of the radius: what the ascent used; where that is little, gradients vanished: low SAL is then no flatness."
        if searched
        else "From derivatives at the point itself: a step (one_step), a quadratic model (hvp), single parameters (diagonal)."
    )
    return (
        f"At the last epoch, in nats: how far the loss on {what[config.on]} moves while one tensor moves by "
        f"{config.radius:g} of its length. {used}"
    )


def _table(config: Sharpness, solver: str, against: dict[str, Distance], found: dict[str, list[Sal]]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name, d in against.items():
        stalled = d.stalled if solver in SEARCHES else None
        learnable = float(np.mean(d.poisoned))
        rows.append((name, d.distance, learnable, d.ratio, d.test_accuracy, found[name][-1].loss, stalled))
    one = against[THIS]
    unit = "layers" if config.weighting == "layer" else "parameters"
    counted = "layers" if config.weighting == "layer" else "parameters in learnable layers"
    note = (
        f"Learnable {counted} over those of the clean model, mean of {one.epochs} epoch(s), threshold {one.threshold:.3g} "
        f"nats, {one.measure.mode} mode. Lower is less learnable, 1 as clean. Read it beside accuracy, never beside another "
        "solver's."
    )
    known = sharpness.compared(against)
    if len(against) >= 5 and known.correlation is not None:
        note += f" Rank correlation with test accuracy: {known.correlation:.2f} (p = {known.p_value:.2g})."
    columns = ("model", "UD", f"learnable {unit}", "SAL / clean", "test accuracy", "loss", "stalled")
    return Table(f"Unlearnable Distance, {solver}", columns, tuple(rows), note)


def _heat(config: Sharpness, subjects: dict[str, Subject], found: dict, against: dict) -> tuple[tuple[str, str], ...]:
    """One picture a solver: SAL, layer by epoch, of every model."""
    pictures = []
    for solver, by in found.items():
        epochs = [str(epoch) for epoch in subjects[THIS].epochs]
        panels = [(name, sharpness.tracked(each)) for name, each in by.items()]
        layers = next(iter(by.values()))[0].measure.layers
        above = against[solver][THIS].threshold if solver in against else None
        file = f"sal-{solver}.png"
        files.write(config.run / file, report.heat_maps(panels, list(layers), epochs, "SAL, nats", above))
        dots = "" if above is None else f"; a dot: learnable, above {above:.3g}"
        pictures.append((file, f"SAL by {solver}, layer by epoch{dots}"))
    return tuple(pictures)


def _plots(config: Sharpness, subjects: dict[str, Subject], against: dict[str, dict[str, Distance]]) -> tuple[Plot, ...]:
    """How many layers are learnable, epoch by epoch, by the first solver."""
    if not against:
        return ()
    by, epochs = against[config.solver[0]], tuple(float(epoch) for epoch in subjects[THIS].epochs)
    curves = tuple((name, epochs, d.poisoned) for name, d in by.items())
    unit = "layers" if config.weighting == "layer" else "parameters"
    return (Plot("learnable", f"Learnable {unit} while training, {config.solver[0]}", "epoch", f"learnable {unit}", curves),)


def _summary(config: Sharpness, found: dict, against: dict[str, dict[str, Distance]]) -> str:
    epochs = len(next(iter(found.values()))[THIS])
    if not against:
        return f"SAL of {epochs} epoch(s) by {', '.join(config.solver)}; no --clean run, so no UD"
    said = ", ".join(f"UD {by[THIS].distance:.3f} by {solver}" for solver, by in against.items())
    one = next(iter(against.values()))[THIS]
    accuracy = f"clean test accuracy {one.test_accuracy:.3f} (clean model {one.clean_test_accuracy:.3f})"
    return f"{said}; {epochs} epoch(s); {accuracy}"


def _warn(config: Sharpness, found: dict) -> None:
    for solver in (s for s in config.solver if s in SEARCHES):
        for name, each in found[solver].items():
            stalled = np.mean([len(one.stalled) / len(one.measure.layers) for one in each])
            if stalled > 0.5:
                console.warn(
                    f"{name}: {stalled:.0%} of the ascents of {solver} used less than half of the radius. Gradients vanish, so "
                    "low SAL there is no flatness; compare --solver normalized"
                )


STAGES = {Sharpness: measure_sharpness}
