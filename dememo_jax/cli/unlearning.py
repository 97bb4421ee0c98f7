"""`dememo unlearn`: check everything, claim the folder, work, write."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dememo_jax import checkpoint, keys, train, unlearn
from dememo_jax import data as sets
from dememo_jax.cli import lineage, runs
from dememo_jax.cli.configs import Unlearn
from dememo_jax.errors import BadInput, require
from dememo_jax.report import Plot, Section, Table

# Epochs and learning rate of each method; the rates are the SoK's for CIFAR-10, larger for the tiny net on digits.
UNLEARN = {"finetune": (10, 0.015), "gradient-ascent": (5, 1e-4)}
UNLEARN_DIGITS = {"finetune": (10, 0.1), "gradient-ascent": (5, 1e-3)}


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
    runs.positive(epochs=epochs, lr=lr, batch=config.batch)
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


STAGES = {Unlearn: unlearn_data}
