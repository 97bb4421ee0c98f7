"""`dememo protect`: make the noise, release it, and on request measure what victims learn from the release."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import data as sets
from dememo_jax import files, keys, protect, release, report, sources
from dememo_jax.cli import artefacts, classes, identity, injecting, lineage, recipes, runs, victims
from dememo_jax.cli.configs import REGTEXT, Protect
from dememo_jax.errors import NonFinite, require
from dememo_jax.report import Section, Table
from dememo_jax.types import Method, Perturbation

PARTIAL = "perturbation-partial.npz"


def protect_data(config: Protect) -> dict:
    """`dememo protect`."""
    if sources.is_texts(config.data):
        return injecting.protect_texts(config)
    require(config.method != "regtext", f"regtext protects texts, a .tsv or .jsonl as --data; {config.data} has images")
    require(config.regtext == REGTEXT, f"--regtext.* are settings of regtext; {config.method} does not read them")
    started = runs.clock(config.run)
    base = lineage.clean(config.data, config.data_dir, config.side, config.text)
    base.model_of(config.model)
    config = classes.numbered(config, base)
    channels = base.train.x.shape[-1]
    drawable = not config.images or channels in (1, 3)
    require(drawable, f"--images writes PNG files of 1 or 3 channels; {config.data} has {channels}")
    runs.positive(
        radius=config.radius, pixels=config.pixels, passes=config.passes, batch=config.batch, epochs=config.epochs,
        inner_steps=config.inner_steps, restarts=config.restarts, draws=config.draws, learner_steps=config.learner_steps,
        victim_epochs=config.victim_epochs, attack_steps=config.attack_steps,
    )  # fmt: skip
    labels = np.asarray(base.train.y)
    everyone = sets.of_classes(labels, config.classes or range(base.classes))
    mask = sets.share_of(keys.named(jax.random.key(config.seed), "share"), everyone, labels, config.share)
    require(mask.any(), "--share leaves no example to protect; raise it")
    budget = recipes.radius(config, base)
    described = runs.describe(config, **identity.record("data", base.inputs)) | {"radius": budget} | classes.kept(base)
    made = None
    if not (config.run / runs.RESULT).exists():  # bad input must show before the folder is claimed
        release.check_folder(config.run / "release")
        made = recipes.make(config, base, mask, budget)
        if isinstance(made, protect.Recipe):
            protect.check(made, base.train, mask)
    if done := runs.begin(config.run, described):
        return done
    made = recipes.make(config, base, mask, budget) if made is None else made
    perturbation, history = (made, list[dict]()) if isinstance(made, Perturbation) else _run(config, base, mask, made)
    artefacts.save_perturbation(config.run / identity.NOISE, perturbation)
    manifest = _release(config, base, perturbation, described, budget)
    files.write(config.run / "examples.png", _examples(base, perturbation, labels, mask))
    section, values = _result(config, base.train.x.shape[-1], budget, mask, history, manifest["measured"])
    if config.evaluate:
        tables, plot, values["evaluation"] = victims.evaluate(config, base, perturbation)
        section = Section(section.title, section.summary, (*section.tables, *tables), (plot,), section.pictures)
    return runs.finish(config.run, described, values, [section], started)


def _run(config: Protect, base: lineage.Source, mask: np.ndarray, recipe: protect.Recipe) -> tuple[Perturbation, list[dict]]:
    key = jax.random.key(config.seed)
    try:
        state, history = runs.resumable(
            config.run, Method(recipe.init, recipe.step), key, (key, base.train, jnp.asarray(mask)), base.train,
            title=f"protect {config.method}", steps=recipe.steps, every=1, seconds=config.checkpoint_seconds,
            record=lambda _, info: {name: float(value[-1]) for name, value in info.items()},
            stop=lambda entry: protect.finished(recipe, entry),
        )  # fmt: skip
    except NonFinite as error:
        artefacts.save_perturbation(config.run / PARTIAL, recipe.finish(error.kept, base.train))
        named = str(error).replace("at step", "at outer iteration")
        raise NonFinite(f"{named} The noise before it is {config.run / PARTIAL}", kept=error.kept) from error
    return recipe.finish(state, base.train), history


def _release(config: Protect, base: lineage.Source, perturbation: Perturbation, described: dict, budget: float | None) -> dict:
    kind = recipes.KINDS[config.method]
    size = float(config.pixels) if kind.norm == "l0" else budget
    manifest = {
        "method": config.method,
        "configuration": described,
        "seed": config.seed,
        "budget": {"norm": kind.norm, "size": size},
        "dememo_jax": runs.__version__,
    }
    return release.write(
        config.run / "release", base.train, base.test, perturbation,
        manifest=manifest, norm=kind.norm, radius=size, images=config.images, class_names=base.names,
    )  # fmt: skip


def _result(
    config: Protect, channels: int, budget: float | None, mask: np.ndarray, history: list[dict], measured: dict
) -> tuple[Section, dict]:
    norm = recipes.KINDS[config.method].norm
    said = {
        "linf": f"l-inf budget {budget:.3g}" if budget else "",
        "l2": f"l2 budget {budget:.3g}" if budget else "",
        "l0": f"{config.pixels} pixels overwritten",
    }.get(norm or "", "no budget in a norm")
    error = history[-1].get("error") if history else None
    learned = "" if error is None else f", {len(history)} iterations, surrogate wrong on {error:.1%} of them"
    summary = f"{mask.sum():,} of {len(mask):,} images{learned}, {said}; at most {measured['linf']} of 255 grey levels changed"
    values: dict[str, Any] = {
        "method": config.method, "protected": int(mask.sum()), "budget": said, "history": history, "measured": measured,
    }  # fmt: skip
    odd = {1: "", 2: ", the first of 2 channels", 3: ""}
    drawn = f"examples{odd.get(channels, f', the first three of {channels} channels')}"
    row = (config.method, values["protected"], said, measured["linf"], measured["l2"], measured["pixels"], error)
    columns = ("method", "images", "budget", "grey levels", "l2", "pixels", "surrogate error")
    note = "The largest change of any image, counted after rounding to 8 bits: grey levels, l2, pixels touched. "
    note += f"{release.in_words(release.Budget(**measured))}."
    table = Table("Perturbation", columns, (row,), note)
    return Section(f"protect: {config.method}", summary, (table,), (), (("examples.png", drawn),)), values


def _examples(base: lineage.Source, perturbation: Perturbation, labels: np.ndarray, mask: np.ndarray) -> bytes:
    """The first protected image of each class, clean and protected, and the change around grey at full contrast."""
    shown = [int(np.flatnonzero(mask & (labels == c))[0]) for c in np.unique(labels[mask])][:10]
    clean = sets.take(base.train, jnp.asarray(shown))
    noisy = np.asarray(sets.perturb(clean, perturbation).x)
    change = noisy - np.asarray(clean.x)
    times = 0.5 / max(float(np.abs(change).max()), 1e-9)
    rows = [("clean", np.asarray(clean.x)), ("protected", noisy), (f"change x {times:.3g}", 0.5 + times * change)]
    return report.image_grid(rows, [base.called(int(labels[i])).removeprefix("class ") for i in shown])


STAGES = {Protect: protect_data}
