"""The whole life of dememorization on scikit-learn's digits: the other commands in order, and one page of all of it."""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dememo_jax import report
from dememo_jax.cli import checks, console, runs, stages
from dememo_jax.cli.configs import Audit, Certify, Protect, Quickstart, Report, Train, Unlearn
from dememo_jax.errors import require
from dememo_jax.report import Section, Table

PROTECTED, OBSERVED = (0, 1, 2, 3), (8, 9)
SHORT = {"retrain": "retrain", "finetune": "finetune", "gradient-ascent": "ascent"}
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
    made: dict[str, dict] = {}

    def stage(work: Callable[[Any], dict], kind: type, name: str, **fields: Any) -> Path:
        folder = config.run / name
        made[name] = work(kind(run=folder, **fields))
        stages.announce(made[name], folder)
        return folder

    often = {"seed": config.seed, "checkpoint_seconds": config.checkpoint_seconds}
    _heading("a. protect: perturb the training images")
    noise = {
        method: stage(stages.protect_data, Protect, f"protect-{method}", method=method, radius=config.radius, pixels=config.pixels, passes=config.passes, **often)
        for method in ("ue-s", "ue-c", "ops")
    }
    _heading("b. train: what does a victim learn?")
    common = {"epochs": config.epochs, **often}
    clean = stage(stages.train_victim, Train, "train-clean", **common)
    for method, folder in noise.items():
        stage(stages.train_victim, Train, f"train-{method}", source=folder, **common)
    victim = stage(stages.train_victim, Train, "train-classes", source=noise["ue-s"], protected_classes=PROTECTED, **common)
    _heading("c. unlearn: one protected class, one clean class")
    forgotten = {
        (method, c): stage(stages.unlearn_data, Unlearn, f"unlearn-{short}-{c}", source=victim, method=method, forget_classes=(c,), observed_classes=OBSERVED,
                           seed=config.seed + 1, checkpoint_seconds=config.checkpoint_seconds)
        for c in config.forget for method, short in SHORT.items()
    }  # fmt: skip
    _heading("d. audit: was it forgotten, and does it come back?")
    for (method, c), folder in forgotten.items():
        stage(checks.audit_model, Audit, f"audit-{SHORT[method]}-{c}", source=folder, reference=forgotten["retrain", c],
              radii=config.radii, epochs=config.recovery_epochs, seed=config.seed + 2)  # fmt: skip
    _heading("e. certify: how deep is the forgetting?")
    for method, short in SHORT.items():
        c = config.forget[0]
        stage(checks.certify_model, Certify, f"certify-{short}-{c}", source=forgotten[method, c], control=clean, sigma=config.sigma,
              eta=config.eta, draws=config.draws, seed=config.seed + 3, checkpoint_seconds=config.checkpoint_seconds)  # fmt: skip
    _heading("f. report")
    sections = [overview(config, {name: done["values"] for name, done in made.items()})]
    for name in made:
        sections += gather(config.run / name, config.run)
    values = {name: done["values"] for name, done in made.items()}
    return runs.finish(config.run, described, values, sections, started, introduction=INTRODUCTION)


def _check(config: Quickstart) -> None:
    hidden, open_ = config.forget
    require(hidden in PROTECTED, f"the first class of --forget must be a protected one, {PROTECTED}; got {hidden}")
    require(open_ in range(4, 8), f"the second class of --forget must be a clean one, 4 to 7; got {open_}")
    stages.positive(radius=config.radius, passes=config.passes, epochs=config.epochs, recovery_epochs=config.recovery_epochs)
    stages.positive(pixels=config.pixels, draws=config.draws, sigma=config.sigma, **{"radii": min(config.radii)})
    for eta in config.eta:
        stages.positive(eta=eta)


def _heading(text: str) -> None:
    console.OUT.rule(f"[bold]{text}", align="left")


# --- the overview ------------------------------------------------------------------------------------------------


def overview(config: Quickstart, values: dict[str, dict]) -> Section:
    """The tables that the terminal shows, and the first thing on the page."""
    victims = tuple(
        (name, values[f"protect-{name}"]["budget"] if name != "clean" else "none", values[f"train-{name}"]["final"], values[f"train-{name}"]["peak"])
        for name in ("clean", "ue-s", "ue-c", "ops")
    )
    tables = [Table("What a victim learns (clean test accuracy)", ("training data", "budget", "final", "peak"), victims)]
    for c in config.forget:
        done = {short: values[f"unlearn-{short}-{c}"] for short in SHORT.values()}
        names = tuple(done["retrain"]["before"])
        rows = (("before", *done["retrain"]["before"].values()), *((short, *value["after"].values()) for short, value in done.items()))
        kind = "protected" if c in PROTECTED else "clean"
        tables.append(Table(f"Forgetting class {c} ({kind})", ("model", *names), rows, stages.NOTE))
    tables.append(_audits(config, values))
    tables.append(_certificates(config, values))
    clean, worst = victims[0][2], max(victims[1:], key=lambda row: row[2])
    summary = f"Clean test accuracy {clean:.3f} without protection, at most {worst[2]:.3f} with it ({worst[0]})."
    return Section("Overview", summary, tuple(tables))


def _audits(config: Quickstart, values: dict[str, dict]) -> Table:
    rows = []
    for c in config.forget:
        for short in SHORT.values():
            done = values[f"audit-{short}-{c}"]
            found = done["recovery"]
            curves = [r["accuracy"] for r in found]
            rows.append((f"{c}, {short}", *done["membership"].values(), curves[0][0], *(max(curve) for curve in curves)))
    columns = ("class, model", *(f"{n} gap" for n in ("correctness", "probability", "entropy")), "before attack", *(f"back at {r:g}" for r in config.radii))
    note = "Gaps to the retrained model; recovery: best test accuracy on the class while attacked in an l2 ball of that radius."
    return Table("Audit", columns, tuple(rows), note)


def _certificates(config: Quickstart, values: dict[str, dict]) -> Table:
    by_model = {short: values[f"certify-{short}-{config.forget[0]}"]["certificates"] for short in SHORT.values()}
    columns = {short: c["this model"] for short, c in by_model.items()} | {"clean control": by_model["retrain"]["clean control"]}
    rows = tuple(
        (row[0]["group"], row[0]["eta"], *(checks.shown(bound["bound"], bound["draws_needed"]) for bound in row))
        for row in zip(*(certificate["bounds"] for certificate in columns.values()))
    )
    note = f"Upper bounds at q = 0.9, alpha = 0.01 over each model's rows, sigma = {config.sigma:g}; they bound a quantile over weight noise."
    return Table("Certified depth (Theorem 1)", ("group", "eta", *columns), rows, note)


# --- pages of several runs ---------------------------------------------------------------------------------------


def gather(folder: Path, into: Path) -> list[Section]:
    """The sections of a finished run, their pictures found from the folder `into`."""
    sections = []
    for plain in runs.result(folder)["sections"]:
        section = report.section(plain)
        pictures = tuple((os.path.relpath(folder / name, into), caption) for name, caption in section.pictures)
        plots = tuple(dataclasses.replace(plot, name=f"{folder.name}-{plot.name}") for plot in section.plots)
        sections.append(dataclasses.replace(section, pictures=pictures, plots=plots))
    return sections


def report_runs(config: Report) -> dict:
    """`dememo report`."""
    started = time.monotonic()
    require(config.sources, "name at least one finished run folder")
    sections = [section for folder in config.sources for section in gather(folder, config.run)]
    digests = {f"run_{i}": runs.digest((folder / runs.RESULT).read_bytes()) for i, folder in enumerate(config.sources)}
    described = runs.describe(config, **digests)
    if done := runs.begin(config.run, described):
        return done
    values = {folder.name: runs.result(folder)["values"] for folder in config.sources}
    return runs.finish(config.run, described, values, sections, started)


STAGES = {Quickstart: quickstart, Report: report_runs}
