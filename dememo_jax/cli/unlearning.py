"""`dememo unlearn`: check everything, claim the folder, work, write."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dememo_jax import checkpoint, unlearn
from dememo_jax import data as sets
from dememo_jax.cli import artefacts, certified, classes, console, forgetting, identity, lineage, runs, selection
from dememo_jax.cli.configs import Unlearn
from dememo_jax.cli.forgetting import Job
from dememo_jax.errors import require
from dememo_jax.report import Cell, Plot, Section, Table
from dememo_jax.types import CertifiedMethod, Method, Weights

NOTE = (
    "Du: protected training images as the model saw them; Duc: their clean counterparts; Dut: test images of their class. Dc, "
    "Dct: the same for clean ones. Dtr: test images of the observed classes, Dt: all test images, Dr: retained training images."
)

WRITTEN = (
    "Share of the texts after which the label is what the model writes, of all tokens that it knows. Accuracy compares the "
    "likelihoods of the labels with each other, and may stay where a model was made to write none of them."
)


class Outcome(NamedTuple):
    weights: Weights
    history: list[dict]  # accuracies, an entry an epoch
    facts: dict  # of the method
    tables: tuple[Table, ...]
    said: str


def unlearn_data(config: Unlearn) -> dict:
    """`dememo unlearn`."""
    started = runs.clock(config.run)
    base = lineage.trained(config.source)
    config = classes.numbered(config, base)
    forgetting.check_options(config)
    fits = base.language is None or config.method not in forgetting.PICTURED
    require(fits, f"{config.method} changes images, or adds a class, and {config.source} was trained on texts")
    epochs, lr = forgetting.effort(config, base)
    kind = forgetting.KINDS[config.method]
    runs.positive(epochs=None if epochs == 0 and kind.family != "descent" else epochs, lr=lr if kind.family != "step" else None)
    forget = selection.forget_mask(config, base)
    if config.observed_classes:
        sets.of_classes(base.test.y, config.observed_classes)
    reference = None if config.reference is None else _retrained(base, config.reference, forget)
    digests = identity.record("source", base.inputs) | {"forget_digest": identity.digest(forget)}
    if reference:
        digests |= identity.record("reference", reference.inputs)
    described = runs.describe(config, **digests) | {"epochs": epochs, "lr": lr} | classes.kept(base)
    job = Job(config, base, forget, epochs, lr)
    forgetting.check_counts(job)
    finished = (config.run / runs.RESULT).exists()
    makers: dict[str, Callable[[Job], Any]] = {"descent": _descent, "certified": certified.make, "step": lambda job: kind}
    make = makers[kind.family]
    made = None if finished else make(job)  # bad input must show before the folder is claimed
    if done := runs.begin(config.run, described):
        return done
    artefacts.save_forget(config.run, forget)
    parts = lineage.splits(base, forget, config.observed_classes)
    work: dict[str, Callable[..., Outcome]] = {"descent": _descend, "certified": _certify, "step": _step}
    outcome = work[kind.family](job, made or make(job), parts)
    checkpoint.save(config.run / identity.WEIGHTS, 0, outcome.weights)
    values, section = _result(job, outcome, parts, reference, runs.elapsed(started))
    _hint(job, values)
    certified.forget_key(config.run)
    return runs.finish(config.run, described, values, [base.told(section)], started)


def _retrained(base: lineage.Trained, folder: Path, forget: np.ndarray) -> lineage.Trained:
    """The model that never saw the forget set."""
    other = lineage.retrained(base, folder, "--reference")
    same = other.forget is not None and np.array_equal(other.forget, forget)
    require(same, f"--reference {folder} was retrained without other examples than those to forget here")
    asked, there = base.trained["model"], other.trained["model"]
    require(asked == there, f"--reference {folder} is a network {there}, the model in question a {asked}: train both alike")
    return other


# --- work --------------------------------------------------------------------------------------------------------


def _descent(job: Job) -> unlearn.Unlearner:
    """The method; its init is traced, so that what it refuses is refused now."""
    method = forgetting.KINDS[job.config.method].make(job)
    jax.eval_shape(method.init, jax.random.key(0), job.base.weights, job.base.seen, job.mask)
    return method


def _descend(job: Job, method: unlearn.Unlearner, parts: dict) -> Outcome:
    config, base, key = job.config, job.base, jax.random.key(job.config.seed)
    steps = method.steps(*job.counts, job.epochs)
    state, history = runs.resumable(
        config.run, Method(method.init, method.step), key, (key, base.weights, base.seen, job.mask), base.seen,
        title=f"unlearn {config.run.name}", steps=steps, every=forgetting.chunk(steps, job.epochs),
        seconds=config.checkpoint_seconds, record=lambda state, info: lineage.accuracies(base, method.finish(state), parts),
    )  # fmt: skip
    if not config.rewind:
        return Outcome(method.finish(state), history, {}, (), "")
    classes = np.unique(np.asarray(base.train.y)[job.forget])
    found = unlearn.rewind(
        base.model, method, state, sets.select(base.seen, job.forget), sets.select(base.test, np.isin(base.test.y, classes))
    )
    facts = {"epoch": found.epoch, "forget_errors": found.forget_errors, "held_out_error": found.held_out_error}
    said = f"rewound to epoch {found.epoch}, whose forget error {found.forget_errors[found.epoch - 1]:.3f} is nearest to "
    return Outcome(found.weights, history, facts, (), said + f"{found.held_out_error:.3f} on unseen images of the class")


def _step(job: Job, kind: forgetting.Kind, parts: dict) -> Outcome:
    weights, facts = kind.make(job)
    shown = {name: value for name, value in facts.items() if value is not None}
    table = Table("The step", tuple(shown), (tuple(shown.values()),), "length: l2, over all parameters; relative: to theirs.")
    said = f"a step of {facts['relative']:.2%} of the weights' length"
    return Outcome(weights, [lineage.accuracies(job.base, weights, parts)], facts, (table,), said)


def _certify(job: Job, made: tuple[CertifiedMethod, dict], parts: dict) -> Outcome:
    weights, history, promised, table = certified.run(job, *made, lambda now: lineage.accuracies(job.base, now, parts))
    said = f"({promised['epsilon']:.4g}, {promised['delta']:.3g})-certified against {promised['comparator']}"
    return Outcome(weights, history, {"guarantee": promised}, (table,), said)


# --- what came out -----------------------------------------------------------------------------------------------


def _result(
    job: Job, outcome: Outcome, parts: dict, reference: lineage.Trained | None, seconds: float
) -> tuple[dict[str, Any], Section]:
    config, base = job.config, job.base
    whole = parts | {"Dr": ("seen", ~job.forget)}
    models = {"before": base.weights, "after": outcome.weights} | ({"retrain": reference.weights} if reference else {})
    found = {name: lineage.accuracies(base, weights, whole) for name, weights in models.items()}
    rows: list[tuple[Cell, ...]] = [(name, *accuracy.values()) for name, accuracy in found.items()]
    columns: tuple[str, ...] = ("model", *found["after"])
    values: dict[str, Any] = {
        "method": config.method, "forgotten": int(job.forget.sum()), **found, "history": outcome.history, **outcome.facts
    }  # fmt: skip
    shown = ", ".join(f"{name} {found['before'][name]:.3f} -> {found['after'][name]:.3f}" for name in parts)
    named = f" of {', '.join(base.called(k) for k in config.forget_class)}" if base.names and config.forget_class else ""
    summary = f"{config.method} of {values['forgotten']:,} examples{named}: {shown}"
    note = NOTE
    if reference and config.reference:
        gaps = {name: _gap(accuracy, found["retrain"]) for name, accuracy in found.items()}
        values["gap"] = gaps["after"]
        values["retrain_seconds"] = runs.result(config.reference)["measured"]["seconds"]
        rows, columns = [(*row, gap) for row, gap in zip(rows, gaps.values())], (*columns, "gap")
        note += " gap: mean difference to the retrained model, over the columns."
        summary += f"; gap to retraining {gaps['after']:.3f}, in {seconds:.1f} s against {values['retrain_seconds']:.1f} s"
    if outcome.said:
        summary += f"; {outcome.said}"
    tables = (Table("Accuracy", columns, tuple(rows), note), *_written(base, models, whole, values), *outcome.tables)
    span = tuple(float(i) for i in range(len(outcome.history) + 1))
    names = [*parts, "Dt"]
    curves = tuple((n, span, (found["before"][n], *(entry[n] for entry in outcome.history))) for n in names)
    plot = Plot("unlearning", "Accuracy while unlearning", "epoch", "accuracy", curves)
    return values, Section(f"unlearn: {config.run.name}", summary, tables, (plot,))


def _hint(job: Job, values: dict[str, Any]) -> None:
    """Says where the model answers the forgotten examples as before, and retraining, where it is known, does not."""
    forgotten = [name for name in ("Du", "Dc") if name in values["after"]]
    before, after, known = (values.get(which, {}) for which in ("before", "after", "retrain"))
    same = [name for name in forgotten if before[name] == after[name] and known.get(name, None) != after[name]]
    if same and job.config.method != "retrain":
        shown = ", ".join(f"{name} {after[name]:.3f}" for name in same)
        console.warn(
            f"accuracy on the forgotten examples did not move ({shown}). If it should, raise the rate, the epochs "
            "or the strength: the usual ones do not carry over from one data set to another"
        )


def _written(base: lineage.Trained, models: dict[str, Weights], parts: dict, values: dict[str, Any]) -> tuple[Table, ...]:
    """Of texts: a table of how often each model writes the label, which goes into the values as well."""
    found = {name: shares for name, weights in models.items() if (shares := lineage.written(base, weights, parts))}
    if not found:
        return ()
    values["written"] = found
    rows: tuple[tuple[Cell, ...], ...] = tuple((name, *shares.values()) for name, shares in found.items())
    return (Table("Label written", ("model", *found["after"]), rows, WRITTEN),)


def _gap(one: dict[str, float], other: dict[str, float]) -> float:
    return float(np.mean([abs(one[name] - other[name]) for name in one]))


STAGES = {Unlearn: unlearn_data}
