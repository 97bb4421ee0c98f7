"""The command that attacks a model: audit."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import audit, evaluate, keys, train
from dememo_jax import data as sets
from dememo_jax.cli import lineage, runs
from dememo_jax.cli.configs import Audit
from dememo_jax.cli.runs import positive
from dememo_jax.errors import require
from dememo_jax.report import Cell, Plot, Section, Table
from dememo_jax.types import Weights


def target_of(base: lineage.Trained, asked: int | None) -> int:
    """The class in question: the one asked for, or the one that the run forgot."""
    labels = np.asarray(base.train.y)
    if asked is None:
        forgotten = np.unique(labels[base.forget]) if base.forget is not None else np.zeros(0, int)
        require(len(forgotten) == 1, "name the class in question with --target-class: the run did not forget exactly one")
        return int(forgotten[0])
    sets.of_classes(labels, [asked])
    return asked


def _retrained(base: lineage.Trained, folder: Path, target: int) -> lineage.Trained:
    """The model that never saw the target class."""
    other = lineage.retrained(base, folder)
    unseen = other.forget is not None and bool(other.forget[np.asarray(base.train.y) == target].all())
    require(unseen, f"--reference {folder} was retrained with examples of class {target}; it must have forgotten all of them")
    return other


def audit_model(config: Audit) -> dict:
    """`dememo audit`."""
    started = runs.clock(config.run)
    for radius in config.radii:
        positive(radii=radius)
    positive(epochs=config.epochs, batch=config.batch, lr=config.lr)
    base = lineage.trained(config.source)
    target = target_of(base, config.target_class)
    reference = None if config.reference is None else _retrained(base, config.reference, target)
    labels = np.asarray(base.train.y)
    key = jax.random.key(config.seed)
    hints = sets.share_of(keys.named(key, "hints"), labels == target, labels, config.hint_share)
    require(hints.any(), f"--hint-share {config.hint_share} of class {target} is no example at all; raise it")
    digests = {"source_digest": base.digest} | ({"reference_digest": reference.digest} if reference else {})
    described = runs.describe(config, **digests)
    if done := runs.begin(config.run, described):
        return done
    membership, scores = _membership(base, reference, target)
    recoveries = [_recover(config, base, radius, hints, target, key) for radius in config.radii]
    shown = ", ".join(f"{name} {value:+.3f}" if reference else f"{name} {value:.3f}" for name, value in scores.items())
    back = ", ".join(f"{r.accuracy[0]:.3f} -> {max(r.accuracy):.3f} at radius {r.radius:g}" for r in recoveries)
    what = "membership gap to retraining" if reference else "membership scores"
    summary = f"class {target}: {what}: {shown}; recovery {back}"
    span = tuple(float(i) for i in range(config.epochs + 1))
    curves = tuple((f"radius {r.radius:g}", span, r.accuracy) for r in recoveries)
    note = f"{hints.sum()} clean examples of class {target} as hints; {config.shape}, batch-norm statistics {config.statistics}"
    plot = Plot("recovery", f"Recovery of class {target}", "epoch of the attack", "test accuracy on the class", curves, note)
    rows = tuple((r.radius, r.accuracy[0], r.accuracy[-1], max(r.accuracy), r.distance[-1]) for r in recoveries)
    recovery = Table("Recovery in a ball of weights", ("l2 radius", "before", "after", "peak", "distance used"), rows, note)
    values = {
        "target_class": target,
        "membership": scores,
        "gap": reference is not None,
        "recovery": [dataclasses.asdict(r) for r in recoveries],
    }
    section = Section(f"audit: {config.run.name}", summary, (membership, recovery), (plot,))
    return runs.finish(config.run, described, values, [section], started)


def _membership(base: lineage.Trained, reference: lineage.Trained | None, target: int) -> tuple[Table, dict[str, float]]:
    """The three scores of the target class's clean images; as gaps where there is a retrained reference."""
    wanted = np.asarray(base.train.y) == target
    retained = ~wanted if base.forget is None else ~base.forget
    own = _membership_scores(base, retained, wanted)
    note = (
        "Share of the class's clean training images that an attack calls members. No false-positive control: only the gap "
        "to a model retrained without them means anything."
    )
    if reference is None:
        return Table("Membership inference", ("model", *own), (("this model", *own.values()),), note), own
    theirs = _membership_scores(reference, retained, wanted)
    gap = audit.membership_gap(own, theirs)
    rows: tuple[tuple[Cell, ...], ...] = (
        ("this model", *own.values()),
        ("retrained", *theirs.values()),
        ("gap", *gap.values()),
    )
    return Table("Membership inference", ("model", *own), rows, note), gap


def _membership_scores(base: lineage.Trained, retained: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    seen, clean, test = (np.asarray(evaluate.logits(*base.frozen, part.x)) for part in (base.seen, base.train, base.test))
    labels, test_labels = np.asarray(base.train.y), np.asarray(base.test.y)
    return audit.membership_scores((seen[retained], labels[retained]), (test, test_labels), (clean[wanted], labels[wanted]))


def _recover(
    config: Audit, base: lineage.Trained, radius: float, hints: np.ndarray, target: int, key: jax.Array
) -> audit.Recovery:
    where = {"target": ("test", np.asarray(base.test.y) == target)}

    def measure(weights: Weights) -> float:
        return lineage.accuracies(base, weights, where)["target"]

    transform = train.clipped_sgd(config.lr, 0.9, 5e-4)
    method = audit.attack(base.model, transform, shape=config.shape, statistics=config.statistics)
    each = sets.steps(int(hints.sum()), config.batch, 1)
    _, history = runs.resumable(
        config.run, method, keys.named(key, "recovery"), (base.weights, radius), base.train,
        title=f"recover {config.run.name} at {radius:g}", steps=each * config.epochs, every=each, seconds=20.0,
        record=lambda state, info: {"accuracy": measure(state.inner.weights), "distance": float(info["distance"][-1])},
        batch=config.batch, mask=jnp.asarray(hints),
    )  # fmt: skip
    accuracy = (measure(base.weights), *(entry["accuracy"] for entry in history))
    distance = (0.0, *(entry["distance"] for entry in history))
    return audit.Recovery(radius, config.shape, config.statistics, int(hints.sum()), accuracy, distance)


STAGES = {Audit: audit_model}
