"""The commands that make something: protect, train, unlearn. Check everything, claim the folder, work, write."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import checkpoint, evaluate, keys, models, protect, report, train, unlearn
from dememo_jax import data as sets
from dememo_jax.cli import lineage, runs
from dememo_jax.cli.configs import Protect, Train, Unlearn
from dememo_jax.errors import BadInput, require
from dememo_jax.report import Plot, Section, Table
from dememo_jax.types import Perturbation

RADIUS, DIGITS_RADIUS = 8 / 255, 0.2
# Epochs and learning rate of each method; the rates are the SoK's for CIFAR-10, larger for the tiny net on digits.
UNLEARN = {"finetune": (10, 0.015), "gradient-ascent": (5, 1e-4)}
UNLEARN_DIGITS = {"finetune": (10, 0.1), "gradient-ascent": (5, 1e-3)}


def positive(**values: float | None) -> None:
    """BadInput naming the first value that is not a positive finite number."""
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        require(value is None or (np.isfinite(value) and value > 0), f"{flag} must be positive, got {value}")


def protect_data(config: Protect) -> dict:
    """`dememo protect`."""
    started = time.monotonic()
    base = lineage.clean(config.data, config.data_dir)
    radius = (DIGITS_RADIUS if config.data == "digits" else RADIUS) if config.radius is None else config.radius
    positive(radius=radius, pixels=config.pixels, passes=config.passes, batch=config.batch)
    require(radius <= 1, f"--radius is in pixels of [0, 1], got {radius}")
    labels = np.asarray(base.train.y)
    everyone = sets.of_classes(labels, config.classes or range(base.classes))
    mask = sets.share_of(keys.named(jax.random.key(config.seed), "share"), everyone, labels, config.share)
    require(mask.any(), "--share leaves no example to protect; raise it")
    described = runs.describe(config, data_digest=base.digest) | {"radius": radius}
    if done := runs.begin(config.run, described):
        return done
    if config.method == "ops":
        perturbation = protect.one_pixel(base.train, mask, classes=base.classes, pixels=config.pixels)
        history, budget = list[dict](), f"{config.pixels} pixels overwritten"
    else:
        perturbation, history = _error_minimizing(config, base, radius, mask)
        budget = f"l-inf budget {radius:.3g}"
    np.savez(config.run / lineage.NOISE, allow_pickle=False, **{n: np.asarray(v) for n, v in perturbation._asdict().items()})
    report.write_atomic(config.run / "examples.png", _examples(base.train, perturbation, labels, mask))
    learned = f", {len(history)} passes, training error {history[-1]['error']:.1%}" if history else ""
    summary = f"{mask.sum():,} of {len(mask):,} images, {budget}{learned}"
    moved = np.asarray(sets.perturb(base.train, perturbation).x - base.train.x)[mask]
    values: dict[str, Any] = {
        "method": config.method, "protected": int(mask.sum()), "budget": budget, "history": history,
        "largest_change": float(np.abs(moved).max()), "mean_l2": float(np.sqrt((moved**2).sum(axis=(1, 2, 3))).mean()),
    }  # fmt: skip
    row = (
        config.method,
        values["protected"],
        budget,
        values["largest_change"],
        values["mean_l2"],
        history[-1]["error"] if history else None,
    )
    columns = ("method", "images", "budget", "largest change", "mean l2", "surrogate error")
    section = Section(
        f"protect: {config.method}", summary, (Table("Perturbation", columns, (row,)),), (), (("examples.png", "examples"),)
    )
    return runs.finish(config.run, described, values, [section], started)


def _error_minimizing(
    config: Protect, base: lineage.Source, radius: float, mask: np.ndarray
) -> tuple[Perturbation, list[dict]]:
    method = protect.error_minimizing(
        lineage.model(config.model, base.classes),
        train.clipped_sgd(0.1, 0.9, 5e-4),
        radius=radius,
        stride=radius / 10,
        classes=base.classes,
        granularity={"ue-s": "sample", "ue-c": "class"}[config.method],
        learner_steps=config.learner_steps or max(1, round(len(mask) / 10 / config.batch)),
        batch=config.batch,
    )
    key = jax.random.key(config.seed)
    state, history = runs.resumable(
        config.run, method, key, (key, base.train, jnp.asarray(mask)), base.train,
        title=f"protect {config.method}", steps=config.passes, every=1, seconds=config.checkpoint_seconds,
        record=lambda _, info: {name: float(value[-1]) for name, value in info.items()},
        stop=lambda entry: entry["error"] <= 0.01,
    )  # fmt: skip
    return state.perturbation, history


def _examples(data, perturbation: Perturbation, labels: np.ndarray, mask: np.ndarray) -> bytes:
    """The first protected image of each class, clean and protected, and the change around grey at full contrast."""
    shown = [int(np.flatnonzero(mask & (labels == c))[0]) for c in np.unique(labels[mask])][:10]
    clean = sets.take(data, jnp.asarray(shown))
    noisy = np.asarray(sets.perturb(clean, perturbation).x)
    change = noisy - np.asarray(clean.x)
    change = 0.5 + change / (2 * max(float(np.abs(change).max()), 1e-9))
    return report.image_grid(
        [("clean", np.asarray(clean.x)), ("protected", noisy), ("change", change)], [str(labels[i]) for i in shown]
    )


def train_victim(config: Train) -> dict:
    """`dememo train`."""
    started = time.monotonic()
    require(
        config.source is None or config.data is None, "give --from (a protect run, which knows its data) or --data, not both"
    )
    positive(epochs=config.epochs, batch=config.batch, lr=config.lr)
    if config.source is not None:
        base = lineage.protected(config.source)
    else:
        data = config.data or "digits"
        config = dataclasses.replace(config, data=data)
        base = lineage.clean(data, config.data_dir)
    perturbation = lineage.narrowed(base, config.protected_classes)
    described = runs.describe(config, source_digest=base.digest)
    if done := runs.begin(config.run, described):
        return done
    model, per_epoch = lineage.model(config.model, base.classes), sets.steps(len(base.train.y), config.batch, 1)
    steps = per_epoch * config.epochs
    transform = train.clipped_sgd(config.lr, config.momentum, config.weight_decay, steps)
    method = lineage.method(train.sgd, model, transform, augment=lineage.augmentation(config.augment))
    key = jax.random.key(config.seed)

    def record(state, info):
        test = evaluate.accuracy(*models.freeze(model, state.weights), base.test)
        return {"loss": float(info["loss"].mean()), "train": float(info["accuracy"].mean()), "test": float(test)}

    state, history = runs.resumable(
        config.run, method, key, (key, base.train.x[:1]), base.train,
        title=f"train {config.run.name}", steps=steps, every=per_epoch, seconds=config.checkpoint_seconds,
        record=record, batch=config.batch, perturbation=perturbation,
    )  # fmt: skip
    checkpoint.save(config.run / lineage.WEIGHTS, 0, state.weights)
    test = [entry["test"] for entry in history]
    peak = int(np.argmax(test))
    share = 0.0 if perturbation is None else float(np.mean(perturbation.mask))
    accuracy = f"clean test accuracy {test[-1]:.3f} final, {test[peak]:.3f} peak (epoch {peak + 1})"
    summary = f"{accuracy}; {share:.0%} of the training set protected"
    values = {"final": test[-1], "peak": test[peak], "peak_epoch": peak + 1, "protected_share": share, "history": history}
    epochs = tuple(float(i + 1) for i in range(len(history)))
    curves = tuple((name, epochs, tuple(entry[name] for entry in history)) for name in ("train", "test"))
    row = (config.model, share, values["final"], values["peak"], values["peak_epoch"])
    table = Table("Victim", ("network", "protected share", "final test", "peak test", "peak epoch"), (row,))
    section = Section(
        f"train: {config.run.name}",
        summary,
        (table,),
        (Plot("training", "Accuracy while training", "epoch", "accuracy", curves),),
    )
    return runs.finish(config.run, described, values, [section], started)


def unlearn_data(config: Unlearn) -> dict:
    """`dememo unlearn`."""
    started = time.monotonic()
    base = lineage.trained(config.source, expected=("train",))
    defaults: dict[str, Any] = {"retrain": (base.trained["epochs"], base.trained["lr"])} | (
        UNLEARN_DIGITS if base.name == "digits" else UNLEARN
    )
    epochs, lr = defaults[config.method]
    epochs = epochs if config.epochs is None else config.epochs
    lr = lr if config.lr is None else config.lr
    positive(epochs=epochs, lr=lr, batch=config.batch)
    forget = _forget_mask(config, base)
    if config.observed_classes:
        sets.of_classes(base.test.y, config.observed_classes)
    described = runs.describe(config, source_digest=base.digest, forget_digest=runs.digest(forget)) | {
        "epochs": epochs,
        "lr": lr,
    }
    if done := runs.begin(config.run, described):
        return done
    np.save(config.run / lineage.FORGET, forget)
    count = {"retrain": len(forget), "finetune": (~forget).sum(), "gradient-ascent": forget.sum()}[config.method]
    per_epoch = sets.steps(int(count), config.batch, 1)
    momentum, decay = base.trained["momentum"], base.trained["weight_decay"]
    transform = train.clipped_sgd(lr, momentum, decay, per_epoch * epochs if config.method == "retrain" else None)
    recipe = {"retrain": unlearn.retrain, "finetune": unlearn.finetune, "gradient-ascent": unlearn.gradient_ascent}[
        config.method
    ]
    augment = lineage.augmentation(base.trained["augment"])
    method = lineage.method(recipe, base.model, transform, batch=config.batch, augment=augment)
    key, parts = jax.random.key(config.seed), lineage.splits(base, forget, config.observed_classes)
    state, history = runs.resumable(
        config.run, method, key, (key, base.weights, base.seen, forget), base.seen,
        title=f"unlearn {config.run.name}", steps=per_epoch * epochs, every=per_epoch, seconds=config.checkpoint_seconds,
        record=lambda state, info: lineage.accuracies(base, state.weights, parts),
    )  # fmt: skip
    checkpoint.save(config.run / lineage.WEIGHTS, 0, state.weights)
    before, after = lineage.accuracies(base, base.weights, parts), history[-1]
    summary = f"{config.method} of {forget.sum():,} examples: " + ", ".join(
        f"{n} {before[n]:.3f} -> {after[n]:.3f}" for n in parts
    )
    table = Table("Accuracy", ("model", *before), (("before", *before.values()), ("after", *after.values())), NOTE)
    span = tuple(float(i) for i in range(len(history) + 1))
    curves = tuple((name, span, (before[name], *(entry[name] for entry in history))) for name in before)
    plot = Plot("unlearning", "Accuracy while unlearning", "epoch", "accuracy", curves)
    values = {"method": config.method, "forgotten": int(forget.sum()), "before": before, "after": after, "history": history}
    return runs.finish(
        config.run, described, values, [Section(f"unlearn: {config.run.name}", summary, (table,), (plot,))], started
    )


NOTE = (
    "Du: forgotten protected training images as the model saw them; Duc: their clean counterparts; Dut: test images of "
    "their class. Dc, Dct: the same for a clean class. Dtr: test images of the observed classes."
)


def _forget_mask(config: Unlearn, base: lineage.Trained) -> np.ndarray:
    labels = np.asarray(base.train.y)
    if config.forget_mask is not None:
        require(not config.forget_classes, "give --forget-classes or --forget-mask, not both")
        return sets.check_forget(read_mask(config.forget_mask), len(labels))
    require(
        config.forget_classes, "the forget set is empty: name classes with --forget-classes, or examples with --forget-mask"
    )
    key = keys.named(jax.random.key(config.seed), "forget")
    chosen = sets.share_of(key, sets.of_classes(labels, config.forget_classes), labels, config.forget_share)
    return sets.check_forget(chosen, len(labels))


def read_mask(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path}: not a readable .npy with a boolean array [N] ({error})") from error


STAGES = {Protect: protect_data, Train: train_victim, Unlearn: unlearn_data}
