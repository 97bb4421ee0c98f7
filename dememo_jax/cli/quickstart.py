"""The whole life of dememorization on scikit-learn's digits: the other commands in order, and one page of all of it."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dememo_jax import certify, files, report
from dememo_jax.cli import (
    auditing,
    certificates,
    certifying,
    console,
    identity,
    protecting,
    runs,
    sharding,
    sharpening,
    unlearning,
    victims,
)
from dememo_jax.cli.configs import Audit, Certify, Forget, Perturb, Protect, Quickstart, Report, Train, Unlearn
from dememo_jax.errors import require
from dememo_jax.report import Plot, Section, Table

PROTECTED, OBSERVED = (0, 1, 2, 3), (8, 9)
SHORT: dict[Forget, str] = {"retrain": "retrain", "finetune": "finetune", "gradient-ascent": "ascent"}
WORK: dict[Any, Any] = {
    **protecting.STAGES,
    **victims.STAGES,
    **unlearning.STAGES,
    **sharding.STAGES,
    **auditing.STAGES,
    **certifying.STAGES,
    **sharpening.STAGES,
}
INTRODUCTION = (
    "1,797 real 8 x 8 images of digits go through the life of dememorization: perturbed so that networks learn little from "
    "them, learned, unlearned, audited, and certified. Every number below was measured in this run."
)


def quickstart(config: Quickstart) -> dict:
    """`dememo quickstart`."""
    started = time.monotonic()
    _check(config)
    described = runs.describe(config)
    if done := runs.begin(config.run, described):
        return done
    values, sections = {}, []
    for heading, parts in story(config):
        console.OUT.rule(f"[bold]{heading}", align="left")
        for part in parts:
            done = WORK[type(part)](part)
            console.announce(done)
            values[part.run.name] = done["values"]
            more, pictures = gather(done, part.run, config.run)
            sections += more
            for path, content in pictures.items():
                files.write(path, content)
    console.OUT.rule("[bold]f. report", align="left")
    return runs.finish(config.run, described, values, [overview(config, values), *sections], started, introduction=INTRODUCTION)


def story(config: Quickstart) -> Iterator[tuple[str, list[Any]]]:
    """The stages, and the commands of each."""
    at = config.run
    often: dict[str, Any] = {"model": config.model, "seed": config.seed, "checkpoint_seconds": config.checkpoint_seconds}
    learned: dict[str, Any] = {"radius": config.radius, "passes": config.passes}
    noise: dict[str, dict[str, Any]] = {"ue-s": learned, "ue-c": learned, "ops": {"pixels": config.pixels}}
    methods: tuple[Perturb, ...] = ("ue-s", "ue-c", "ops")
    yield "a. protect: perturb the training images", [Protect(at / f"protect-{m}", m, **noise[m], **often) for m in methods]
    often["epochs"] = config.epochs
    victims = [Train(at / "train-clean", **often), *(Train(at / f"train-{m}", at / f"protect-{m}", **often) for m in methods)]
    classes = Train(at / "train-classes", at / "protect-ue-s", protected_classes=PROTECTED, **often)
    yield "b. train: what does a victim learn?", [*victims, classes]
    pairs = [(c, method, short) for c in config.forget for method, short in SHORT.items()]
    later: dict[str, Any] = {"seed": config.seed + 1, "checkpoint_seconds": config.checkpoint_seconds}
    yield (
        "c. unlearn: one protected class, one clean class",
        [Unlearn(at / f"unlearn-{s}-{c}", classes.run, m, (c,), observed_classes=OBSERVED, **later) for c, m, s in pairs],
    )
    attack: dict[str, Any] = {"radii": config.radii, "epochs": config.recovery_epochs, "seed": config.seed + 2}
    yield (
        "d. audit: was it forgotten, and does it come back?",
        [Audit(at / f"audit-{s}-{c}", at / f"unlearn-{s}-{c}", at / f"unlearn-retrain-{c}", **attack) for c, _, s in pairs],
    )
    noisy: dict[str, Any] = {"sigma": config.sigma, "eta": config.eta, "draws": config.draws, "seed": config.seed + 1}
    c, clean = config.forget[0], at / "train-clean"
    yield (
        "e. certify: how deep is the forgetting?",
        [Certify(at / f"certify-{s}-{c}", at / f"unlearn-{s}-{c}", clean, **noisy) for s in SHORT.values()],
    )


def _check(config: Quickstart) -> None:
    hidden, open_ = config.forget
    require(hidden in PROTECTED, f"the first class of --forget must be a protected one, {PROTECTED}; got {hidden}")
    require(open_ in range(4, 8), f"the second class of --forget must be a clean one, 4 to 7; got {open_}")
    runs.positive(radius=config.radius, passes=config.passes, epochs=config.epochs, recovery_epochs=config.recovery_epochs)
    require(config.radius <= 1, f"--radius must lie in (0, 1], pixels being in [0, 1]; got {config.radius:g}")
    require(config.pixels <= 64, f"--pixels must be between 1 and 64, which is all that an image has; got {config.pixels}")
    runs.positive(pixels=config.pixels, radii=min(config.radii))
    certify.plan(
        sigma=config.sigma, eta=config.eta, q=Certify.q, alpha=Certify.alpha, draws=config.draws, groups=2, refuse=True
    )


# --- the overview ------------------------------------------------------------------------------------------------


def overview(config: Quickstart, values: dict[str, dict]) -> Section:
    """The tables that the terminal shows, and the first thing on the page."""
    victims = tuple(
        (
            name,
            values[f"protect-{name}"]["budget"] if name != "clean" else "none",
            values[f"train-{name}"]["final"],
            values[f"train-{name}"]["peak"],
        )
        for name in ("clean", "ue-s", "ue-c", "ops")
    )
    tables = [Table("What a victim learns (clean test accuracy)", ("training data", "budget", "final", "peak"), victims)]
    for c in config.forget:
        done = {short: values[f"unlearn-{short}-{c}"] for short in SHORT.values()}
        names = tuple(done["retrain"]["before"])
        rows = (
            ("before", *done["retrain"]["before"].values()),
            *((short, *value["after"].values()) for short, value in done.items()),
        )
        kind = "protected" if c in PROTECTED else "clean"
        note = unlearning.NOTE if c == config.forget[0] else ""
        tables.append(Table(f"Forgetting class {c} ({kind})", ("model", *names), rows, note))
    tables.append(_audits(config, values))
    tables.append(_depths(config, values))
    clean, worst = victims[0][2], max(victims[1:], key=lambda row: row[2])
    summary = f"Clean test accuracy {clean:.3f} without protection, at most {worst[2]:.3f} with it ({worst[0]})."
    return Section("Overview", summary, tuple(tables), _plots(config, values))


def _plots(config: Quickstart, values: dict[str, dict]) -> tuple[Plot, ...]:
    """What a victim learns, and what comes back, each in one picture."""
    histories = {name: values[f"train-{name}"]["history"] for name in ("clean", "ue-s", "ue-c", "ops")}
    learned = tuple((n, tuple(i + 1.0 for i in range(len(h))), tuple(e["test"] for e in h)) for n, h in histories.items())
    plots = [Plot("learning", "What victims learn of clean test images", "epoch", "test accuracy", learned)]
    for c in config.forget:
        curves = tuple(
            (f"{short}, radius {r['radius']:g}", tuple(float(i) for i in range(len(r["accuracy"]))), tuple(r["accuracy"]))
            for short in SHORT.values()
            for r in values[f"audit-{short}-{c}"]["recovery"]
        )
        plots.append(
            Plot(f"recovery-{c}", f"Recovery of class {c} after unlearning", "epoch of the attack", "accuracy", curves)
        )
    return tuple(plots)


def _audits(config: Quickstart, values: dict[str, dict]) -> Table:
    rows = []
    for c in config.forget:
        for short in SHORT.values():
            done = values[f"audit-{short}-{c}"]
            curves = [r["accuracy"] for r in done["recovery"]]
            rows.append((f"{c}, {short}", *done["membership"].values(), curves[0][0], *(max(curve) for curve in curves)))
    columns = ("class, model", "correct.", "probab.", "entropy", "accuracy", *(f"at {r:g}" for r in config.radii))
    note = (
        "Correctness, probability, entropy: membership scores less those of the retrained model. Accuracy on the class's "
        "test images before the recovery attack, and the best reached inside an l2 ball of each radius."
    )
    return Table("Audit", columns, tuple(rows), note)


def _depths(config: Quickstart, values: dict[str, dict]) -> Table:
    by_model = {short: values[f"certify-{short}-{config.forget[0]}"]["certificates"] for short in SHORT.values()}
    columns = {short: c["this model"] for short, c in by_model.items()} | {
        "clean control": by_model["retrain"]["clean control"]
    }
    rows = tuple(
        (row[0]["group"], row[0]["eta"], *(certificates.shown(r["upper"], r["draws_needed"]) for r in row))
        for row in zip(*(certificate["rows"] for certificate in columns.values()))
    )
    note = (
        f"Upper bounds at q = {Certify.q[0]:g}, alpha = {Certify.alpha:g} over all bounds of a model, upper and lower, "
        f"sigma = {config.sigma:g}, {config.draws:,} draws. They bound a quantile over weight noise. {certificates.ABSTAINS}"
    )
    return Table("Certified depth (Theorem 1)", ("group", "eta", *columns), rows, note)


# --- pages of several runs ---------------------------------------------------------------------------------------


def gather(done: dict, folder: Path, into: Path, name: str = "") -> tuple[list[Section], dict[Path, bytes]]:
    """The sections of the finished run in `folder`, and the pictures to put into `into` for them; `name` goes before each."""
    name, sections, pictures = name or folder.name, list[Section](), dict[Path, bytes]()
    for section in report.sections(done):
        pictures |= {into / f"{name}-{file}": report.picture(folder, file) for file, _ in section.pictures}
        named = tuple((f"{name}-{file}", caption) for file, caption in section.pictures)
        plots = tuple(dataclasses.replace(plot, name=f"{name}-{plot.name}") for plot in section.plots)
        sections.append(dataclasses.replace(section, pictures=named, plots=plots))
    return sections, pictures


def report_runs(config: Report) -> dict:
    """`dememo report`."""
    started = time.monotonic()
    require(config.sources, "name at least one finished run folder")
    finished = dict(zip(_names(config.sources), [(folder, runs.result(folder)) for folder in config.sources]))
    sections, pictures = list[Section](), dict[Path, bytes]()
    for name, (folder, found) in finished.items():
        more, drawn = gather(found, folder, config.run, name)
        sections, pictures = sections + more, pictures | drawn
    digests = {f"run_{i}": identity.digest((folder / runs.RESULT).read_bytes()) for i, folder in enumerate(config.sources)}
    described = runs.describe(config, **digests)
    if done := runs.begin(config.run, described):
        return done
    for path, content in pictures.items():
        files.write(path, content)
    values = {name: found["values"] for name, (_, found) in finished.items()}
    return runs.finish(config.run, described, values, sections, started)


def _names(folders: Sequence[Path]) -> list[str]:
    """A name for each run, that of its folder; a number follows where others have the same. BadInput for one given twice."""
    twice = [folder for i, folder in enumerate(folders) if folder.resolve() in [other.resolve() for other in folders[:i]]]
    require(not twice, f"{', '.join(map(str, twice))} is named twice; name each run once")
    names = list[str]()
    for folder in folders:
        name = plain = folder.resolve().name
        for number in range(2, len(folders) + 2):
            if name not in names:
                break
            name = f"{plain}-{number}"
        names.append(name)
    return names


STAGES = {Quickstart: quickstart, Report: report_runs}
