"""The commands that ask questions of a model: audit and certify."""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import audit, certify, evaluate, keys, train, tree
from dememo_jax import data as sets
from dememo_jax.cli import console, lineage, runs
from dememo_jax.cli.configs import Audit, Certify
from dememo_jax.cli.stages import positive
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


def companion(base: lineage.Trained, folder: Path, flag: str) -> lineage.Trained:
    """Another model of the same data, for comparison."""
    other = lineage.trained(folder)
    same = len(other.train.y) == len(base.train.y) and bool((other.train.y == base.train.y).all())
    require(same, f"{flag} {folder} was trained on other data than the model in question")
    return other


def _retrained(base: lineage.Trained, folder: Path, target: int) -> lineage.Trained:
    """The model that never saw the target class."""
    other = companion(base, folder, "--reference")
    require(other.unlearned == "retrain", f"--reference {folder} must be a run of `dememo unlearn --method retrain`")
    unseen = other.forget is not None and bool(other.forget[np.asarray(base.train.y) == target].all())
    require(unseen, f"--reference {folder} was retrained with examples of class {target}; it must have forgotten all of them")
    return other


def audit_model(config: Audit) -> dict:
    """`dememo audit`."""
    started = time.monotonic()
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


def certify_model(config: Certify) -> dict:
    """`dememo certify`."""
    started = time.monotonic()
    certify.check(sigma=config.sigma, eta=config.eta, q=config.q, alpha=config.alpha, draws=config.draws)
    positive(width=config.width, every=config.every)
    base = lineage.trained(config.source)
    target = target_of(base, config.target_class)
    contexts = {"this model": base}
    if config.control is not None:
        contexts["clean control"] = companion(base, config.control, "--control")
    described = runs.describe(config, **{f"{name.replace(' ', '_')}_digest": c.digest for name, c in contexts.items()})
    if done := runs.begin(config.run, described):
        return done
    labels = np.asarray(base.test.y)
    groups = {f"class {target}": labels == target, "test set": np.ones(len(labels), bool)}
    drawn = {name: _draw(config, context, groups, name) for name, context in contexts.items()}
    np.savez(
        config.run / "scores.npz", allow_pickle=False, **{name.replace(" ", "_"): scores for name, scores in drawn.items()}
    )
    certificates = {
        name: certify.from_scores(
            drawn[name], tuple(groups), sigma=config.sigma, eta=config.eta, params=tree.size(context.weights.params),
            q=config.q, alpha=config.alpha, side=config.side,
        )
        for name, context in contexts.items()
    }  # fmt: skip
    section = _certificate_section(config, certificates)
    values = {"target_class": target, "certificates": {name: dataclasses.asdict(c) for name, c in certificates.items()}}
    return runs.finish(config.run, described, values, [section], started)


def _draw(config: Certify, context: lineage.Trained, groups: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Scores [draws, G] under weight noise, going on from the draws that a checkpoint holds."""
    directory = config.run / runs.CHECKPOINTS / name.replace(" ", "-")
    blank = {"scores": np.full((config.draws, len(groups)), np.nan, np.float32)}
    restored = runs.newest(directory, blank)
    done, scores = (0, blank["scores"]) if restored is None else (restored.step, np.array(restored.state["scores"]))
    if done == config.draws:
        return scores
    offer = runs.saver(directory, config.checkpoint_seconds)
    with console.progress(f"certify {config.run.name}: {name}", config.draws, done) as advance:

        def after(now: int, part: np.ndarray) -> None:
            scores[now - len(part) : now] = part
            offer(now, {"scores": scores}, {}, now == config.draws)
            advance(now)

        certify.draw_scores(
            *context.frozen, context.test, jax.random.key(config.seed), sigma=config.sigma,
            draws=config.draws, start=done, groups=groups, width=config.width, every=config.every, after=after,
        )  # fmt: skip
    return scores


ABSTAINS = "abstains (n): the draws do not support a bound there; n draws would."


def shown(bound: float | None, needed: int | None) -> Cell:
    """A bound, or the abstention with the number of draws that would end it."""
    return bound if bound is not None else f"abstains ({'no count' if needed is None else f'{needed:,}'})"


def _certificate_section(config: Certify, certificates: dict[str, certify.Certificate]) -> Section:
    first = next(iter(certificates.values()))
    rows = tuple(
        (row[0].group, row[0].eta, row[0].eta / config.sigma, *(shown(b.bound, b.draws_needed) for b in row))
        for row in zip(*(c.bounds for c in certificates.values()))
    )
    sign = "<=" if config.side == "upper" else ">="
    covered = 1 - config.q if config.side == "lower_published" else config.q
    note = (
        f"For every move of the weights by at most eta (l2), accuracy under N(0, {config.sigma:g}^2) noise stays {sign} the "
        f"bound with probability {covered:g}, at confidence {1 - config.alpha:g} for all {first.rows} rows of a model; "
        f"{first.draws:,} draws; expected noise length {first.noise_norm:.2f}. It bounds a quantile over noise, not the "
        f"accuracy of one attacked network. {ABSTAINS}"
    )
    table = Table(
        f"Certified {config.side.replace('_', ' ')} bounds on accuracy",
        ("group", "eta", "eta / sigma", *certificates),
        rows,
        note,
    )
    groups = dict.fromkeys(bound.group for bound in first.bounds)
    curves = tuple(
        (f"{group}, {name}", config.eta, tuple(b.bound for b in c.bounds if b.group == group))
        for group in groups
        for name, c in certificates.items()
    )
    plot = Plot(
        "certificate",
        "Certified bound against eta",
        "eta",
        "accuracy bound",
        curves,
        "Where a curve ends the draws do not suffice.",
    )
    best = [b for b in first.bounds if b.bound is not None]
    abstained = len(first.bounds) - len(best)
    last = {b.group: b for b in best}
    claims = (
        "; ".join(f"{group} {sign} {b.bound:.3f} within eta {b.eta:g}" for group, b in last.items())
        or "no row can be certified"
    )
    return Section(
        f"certify: {config.run.name}", f"{claims}; {abstained} of {len(first.bounds)} rows abstain", (table,), (plot,)
    )


STAGES = {Audit: audit_model, Certify: certify_model}
