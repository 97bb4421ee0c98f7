"""`dememo train`, and the victims of `dememo protect --evaluate`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dememo_jax import checkpoint, keys, loop, models, projected, sources
from dememo_jax import data as sets
from dememo_jax import evaluate as evaluation
from dememo_jax.cli import classes, console, identity, lineage, networks, recipes, runs, texts
from dememo_jax.cli.configs import Protect, Train
from dememo_jax.errors import require
from dememo_jax.protect import Countermeasure, combine, countermeasure, victim
from dememo_jax.report import Cell, Plot, Section, Table
from dememo_jax.sources import Stream
from dememo_jax.types import Dataset, Method, Model, Perturbation, Weights


def fit(
    folder: Path, title: str, model: Model, method: Method, seed: int, seen: Dataset | Stream, test: Dataset, *,
    epochs: int, batch: int, seconds: float, perturbation: Perturbation | None = None,
    keep: Callable[[int, Weights], None] = lambda epoch, weights: None,
) -> tuple[Any, list[dict]]:  # fmt: skip
    """Train with progress and checkpoints; the history has loss, training and clean test accuracy of each epoch.

    keep(epoch, weights) is told of every epoch, again where a killed run goes on from before it.
    """
    key, per_epoch = jax.random.key(seed), sets.steps(_count(seen), batch, 1)

    def record(state, info):
        keep(int(state.step) // per_epoch, state.weights)
        test_accuracy = evaluation.accuracy(*models.freeze(model, state.weights), test)
        return {"loss": float(info["loss"].mean()), "train": float(info["accuracy"].mean()), "test": float(test_accuracy)}

    how: dict[str, Any] = {
        "title": title, "steps": per_epoch * epochs, "every": per_epoch, "seconds": seconds, "record": record,
        "perturbation": perturbation,
    }  # fmt: skip
    if isinstance(seen, Stream):  # it makes its own batches
        image = np.zeros((1, *seen.shape), np.float32)
        return runs.resumable(folder, method, key, (key, image), seen.batches, drive=loop.stream, **how)
    return runs.resumable(folder, method, key, (key, seen.x[:1]), seen, batch=batch, **how)


def _count(seen: Dataset | Stream) -> int:
    return seen.count if isinstance(seen, Stream) else len(seen.y)


def train_victim(config: Train) -> dict:
    """`dememo train`."""
    started = runs.clock(config.run)
    lineage.check_origin(config)
    whole = config.source is not None or config.protected_classes or config.random_labels
    require(
        not (config.stream and whole),
        "--stream reads the clean data from disk; --from, --protected-classes and --random-labels need them in memory",
    )
    runs.positive(epochs=config.epochs, batch=config.batch, lr=config.lr, every=config.every)
    if config.source is None:
        config = dataclasses.replace(config, data=config.data or "digits")
    config = networks.settled(config)
    base = _base(config)
    config = classes.numbered(config, base)
    perturbation = None if isinstance(base, lineage.Streamed) else lineage.narrowed(base, config.protected_classes)
    model, against = base.model_of(config.model), against_it(config, base)
    in_place = against.prepare is None or not config.stream
    require(in_place, "a countermeasure that prepares the whole training set needs it in memory: leave --stream away")
    described = runs.describe(config, **identity.record("source", base.inputs)) | classes.kept(base)
    if done := runs.begin(config.run, described):
        return done
    lineage.keep_tokenizer(config.run, base)
    share = 0.0 if perturbation is None else float(np.mean(perturbation.mask))
    seen: Dataset | Stream
    if isinstance(base, lineage.Streamed):
        seen = base.stream
    else:
        seen, perturbation = shown(config, base, perturbation)
    method = learner(config, base, _count(seen))
    state, history = fit(
        config.run, f"train {config.run.name}", model, method, config.seed, seen, base.test,
        epochs=config.epochs, batch=config.batch, seconds=config.checkpoint_seconds, perturbation=perturbation,
        keep=_keeper(config),
    )  # fmt: skip
    checkpoint.save(config.run / identity.WEIGHTS, 0, state.weights)
    written = None if base.language is None else float(texts.written(base.language, state.weights, base.test).mean())
    values, section = _learned(config, history, share, written)
    return runs.finish(config.run, described, values, [base.qualified(section)], started)


def _base(config: Train) -> lineage.Source | lineage.Streamed:
    if config.source is not None:
        return lineage.protected(config.source)
    data = config.data or "digits"
    if config.stream:
        require(not sources.is_texts(data), "--stream reads images; texts are small, and lie in memory: leave it away")
        return lineage.streamed(data, config.data_dir, config.side, batch=config.batch, seed=config.seed)
    return lineage.clean(data, config.data_dir, config.side, config.text)


def _keeper(config: Train) -> Callable[[int, Weights], None]:
    """Saves the weights of every so many epochs, and of the last, where that was asked for."""

    def keep(epoch: int, weights: Weights) -> None:
        if config.every is not None and (epoch % config.every == 0 or epoch == config.epochs):
            checkpoint.store(config.run / identity.EPOCHS, weights, console.warn).save(f"{epoch:05d}", weights)

    return keep


def against_it(config: Train, base: lineage.Known) -> Countermeasure:
    """What the victim does against protection. BadInput for what is done to images where there are texts."""
    plain = config.augment == "none" and not config.countermeasure
    require(base.language is None or plain, "--augment and --countermeasure change images: leave them away with texts")
    return combine(*(countermeasure(name, scale=recipes.scale(base)) for name in config.countermeasure))


def shown(config: Train, base: lineage.Source, perturbation: Perturbation | None) -> tuple[Dataset, Perturbation | None]:
    """The training set as the victim meets it, and the noise that is still to be joined to it."""
    seen, key, against = base.train, jax.random.key(config.seed), against_it(config, base)
    if config.random_labels:
        seen = victim.random_labels(keys.named(key, "labels"), seen)
    if against.prepare is None:
        return seen, perturbation
    return against.prepare(keys.named(key, "prepare"), victim.released(seen, perturbation)), None


def learner(config: Train, base: lineage.Known, examples: int) -> Method:
    """How the victim trains on so many examples."""
    steps = sets.steps(examples, config.batch, config.epochs)
    transform, augment = networks.optimiser(config, config.schedule, steps), networks.augmentation(config.augment)
    model = base.model_of(config.model, precision=config.precision)
    against = against_it(config, base)._replace(prepare=None)
    return victim.learner(model, transform, steps, augment=augment, against=against, loss=base.loss)


def _learned(config: Train, history: list[dict], share: float, written: float | None) -> tuple[dict, Section]:
    test = [entry["test"] for entry in history]
    peak = int(np.argmax(test))
    accuracy = f"clean test accuracy {test[-1]:.3f} final, {test[peak]:.3f} peak (epoch {peak + 1})"
    against = f"; against it: {', '.join(config.countermeasure)}" if config.countermeasure else ""
    summary = f"{accuracy}; {share:.0%} of the training set protected{against}"
    values: dict[str, Any] = {
        "final": test[-1],
        "peak": test[peak],
        "peak_epoch": peak + 1,
        "protected_share": share,
        "history": history,
    }
    epochs = tuple(float(i + 1) for i in range(len(history)))
    curves = tuple((name, epochs, tuple(entry[name] for entry in history)) for name in ("train", "test"))
    row: tuple[Cell, ...] = (config.model, share, values["final"], values["peak"], values["peak_epoch"])
    columns: tuple[str, ...] = ("network", "protected share", "final test", "peak test", "peak epoch")
    note = ""
    if written is not None:
        values["generated"], row, columns = written, (*row, written), (*columns, "label written")
        summary += f"; it writes the label of {written:.3f} of the test texts"
        note = (
            "Accuracy compares the likelihoods of the labels; label written: share of the test texts after which the label is "
            "what the model writes, of all tokens that it knows."
        )
    table = Table("Victim", columns, (row,), note)
    plot = Plot("training", "Accuracy while training", "epoch", "accuracy", curves)
    return values, Section(f"train: {config.run.name}", summary, (table,), (plot,))


# --- the victims of one release ----------------------------------------------------------------------------------


def evaluate(
    config: Protect, base: lineage.Source, perturbation: Perturbation
) -> tuple[tuple[Table, ...], Plot, dict[str, dict]]:
    """Victims on clean and protected data, under each countermeasure, and on the controls: a table, curves, numbers."""
    key, budget = jax.random.key(config.seed), recipes.radius(config, base)
    makers = {"linf": projected.linf, "l2": projected.l2, "l0": lambda _: projected.l0(config.pixels), None: lambda _: None}
    ball = makers[recipes.KINDS[config.method].norm](budget or 0.0)
    against: dict[str, Countermeasure] = {
        name: countermeasure(name, scale=recipes.scale(base)) for name in config.countermeasures
    }
    jobs = victim.trials(key, base.train, perturbation, against=against, ball=ball)
    batch = 64 if base.name == "digits" else 128
    steps, augment = sets.steps(len(base.train.y), batch, config.victim_epochs), networks.augmentation(config.victim_augment)
    how: dict[str, Any] = {"augment": augment, "loss": base.loss}
    return _measured(config, base, jobs, victim.VICTIM_SGD(steps), batch, "the released 8-bit images", how)


def evaluate_texts(
    config: Protect, base: lineage.Source, perturbation: Perturbation
) -> tuple[tuple[Table, ...], Plot, dict[str, dict]]:
    """The same of texts, with no countermeasures: decoders trained as `dememo train` does by default."""
    noisy, key = sets.perturb(base.train, perturbation), keys.named(jax.random.key(config.seed), "labels")
    shown = {"clean": base.train, "protected": noisy, "control: random labels": victim.random_labels(key, base.train)}
    jobs = {name: (seen, Countermeasure()) for name, seen in shown.items()}
    usual = Train(run=config.run, model=config.model)
    steps = sets.steps(len(base.train.y), usual.batch, config.victim_epochs)
    transform = networks.optimiser(usual, usual.schedule, steps)
    return _measured(config, base, jobs, transform, usual.batch, "the released texts", {"loss": base.loss})


def _measured(
    config: Protect, base: lineage.Source, jobs: dict[str, tuple[Dataset, Countermeasure]], transform: Any, batch: int,
    release: str, how: dict[str, Any],
) -> tuple[tuple[Table, ...], Plot, dict[str, dict]]:  # fmt: skip
    """A victim of each job, and what they learned of the clean test set."""
    key, model = jax.random.key(config.seed), base.model_of(config.model)
    steps, found = sets.steps(len(base.train.y), batch, config.victim_epochs), {}
    for name, (seen, one) in jobs.items():
        if one.prepare is not None:
            seen = one.prepare(keys.named(key, "prepare"), seen)
        method = victim.learner(model, transform, steps, against=one._replace(prepare=None), **how)
        title = f"victim {name.replace(': ', ' ').replace(', ', ' ')}"
        _, history = fit(
            config.run, title, model, method, config.seed, seen, base.test,
            epochs=config.victim_epochs, batch=batch, seconds=config.checkpoint_seconds,
        )  # fmt: skip
        test = [entry["test"] for entry in history]
        found[name] = {"final": test[-1], "peak": max(test), "train": history[-1]["train"], "test": test}
    rows = tuple((name, one["final"], one["peak"], one["train"]) for name, one in found.items())
    note = (
        f"Clean test accuracy of {config.model} after {config.victim_epochs} epochs on {release}, and the best "
        "of any epoch, which early stopping would find; accuracy on the training data as the victim saw it."
    )
    table = Table("What victims learn", ("training data", "final", "peak", "training"), rows, note)
    epochs = tuple(float(i + 1) for i in range(config.victim_epochs))
    curves = tuple((name, epochs, tuple(one["test"])) for name, one in found.items())
    return (table,), Plot("victims", "What victims learn of clean test images", "epoch", "test accuracy", curves), found


STAGES = {Train: train_victim}
