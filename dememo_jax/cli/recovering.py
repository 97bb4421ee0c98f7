"""The recovery part of `dememo audit`: attacks in a ball, random search, relearning, neighbours against a certificate."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import audit, evaluate, keys, models, train
from dememo_jax import data as sets
from dememo_jax.cli import console, identity, lineage, runs, texts
from dememo_jax.cli.configs import Audit
from dememo_jax.cli.parts import THIS, Part, models_of
from dememo_jax.errors import require
from dememo_jax.report import Cell, Plot, Table
from dememo_jax.types import Dataset, Weights

ATTACKS = {"recovery", "random", "relearn"}
MOST, EVERY = 2000, 5  # relearning: steps, and how often it is looked at


class Hints(NamedTuple):
    """What the attacker holds."""

    data: Dataset
    mask: np.ndarray
    words: str


class Covered(NamedTuple):
    """A row of a certificate that reaches an attack's radius."""

    eta: float
    q: float
    sigma: float
    bound: float


def hints_of(config: Audit, base: lineage.Trained, mask: np.ndarray, key: jax.Array) -> Hints:
    labels = np.asarray(base.train.y)
    wanted = mask if config.hints == "target" else np.ones(len(labels), bool)
    held = sets.share_of(keys.named(key, "hints"), wanted, labels, config.hint_share)
    needed, count = ATTACKS & set(config.attack), int(wanted.sum())
    few = f"--hint-share {config.hint_share} of {count:,} examples is no example at all"
    require(not needed or held.any(), f"{few}; raise it to {1 / max(1, count):.3g} or more")
    whose = "in question" if config.hints == "target" else "of all classes"
    return Hints(base.train, held, f"{int(held.sum()):,} clean training examples {whose}")


def check(case) -> None:
    config = case.config
    needed = ", ".join(sorted(ATTACKS & set(config.attack)))
    nothing = f"{case.target.name} has no test images to measure {needed} on; name another --target-class or other attacks"
    require(not needed or len(case.target.shown.y), nothing)
    if config.relative or config.only:
        audit.absolute_radius(case.base.weights.params, 1.0, config.only)  # BadInput for leaves that are not there, or all zero
    if config.certificate is None:
        return
    require("recovery" in config.attack, "--certificate is held against attacked models: add recovery to --attack")
    require(config.statistics == "frozen", "a certificate holds batch-norm statistics fixed: attack with --statistics frozen")
    known = runs.result(config.certificate)["config"]
    require(known["command"] == "certify", f"--certificate {config.certificate} is a run of `dememo {known['command']}`")
    same = (config.certificate / known["source"]).resolve() == config.source.resolve()
    require(same, f"--certificate {config.certificate} certifies another model than {config.source}")
    identity.check(config.certificate, known, "this_model", case.base.inputs)
    plain = not known["relative"] and known["only"] is None and known["statistics"] == "frozen" and known["tau"] is None
    require(plain, "--certificate must bound plain noise on all weights, statistics frozen; this one has --relative, --only, "
            "--statistics batch or --tau")  # fmt: skip


def recovered(case) -> list[Part]:
    asked, parts = case.config.attack, []
    if "recovery" in asked:
        parts.append(_recovery(case))
    if "random" in asked:
        parts.append(_random(case))
    if "relearn" in asked:
        parts.append(_relearn(case))
    return parts


# --- in a ball ---------------------------------------------------------------------------------------------------


def _recovery(case) -> Part:
    config, target = case.config, case.target
    attacked = {n: m for n, m in models_of(case).items() if n == THIS or m.digest != case.base.digest}
    jobs = [(name, model, share) for name, model in attacked.items() for share in config.radii]
    done = [(name, *_recover(case, name, model, share)) for name, model, share in jobs]
    mine = [recovery for name, recovery, _ in done if name == THIS]
    span = tuple(float(i) for i in range(config.epochs + 1))
    curves = tuple((f"{name}: radius {r.radius:.3g}", span, r.accuracy) for name, r, _ in done)
    what = "" if config.only is None else f"; only {config.only}"
    note = (
        f"{case.hints.words} as hints; {config.shape}, rate {config.schedule}, batch-norm statistics {config.statistics}{what}"
    )
    plot = Plot("recovery", f"Recovery of {target.name}", "epoch of the attack", f"accuracy on {target.where}", curves, note)
    others = np.flatnonzero(~target.unseen)  # an attack that makes a network call everything one class shows here
    rest = sets.take(case.base.test, jnp.asarray(others)) if len(others) else None

    def elsewhere(weights: Weights) -> float | None:
        return None if rest is None else float(evaluate.accuracy(*models.freeze(case.base.model, weights), rest))

    rows: list[tuple[Cell, ...]] = [
        (n, r.radius, r.accuracy[0], r.accuracy[-1], max(r.accuracy), r.distance[-1], elsewhere(weights))
        for n, r, weights in done
    ]
    columns: tuple[str, ...] = ("model", "l2 radius", "before", "after", "peak", "distance used", "other classes after")
    if (language := case.base.language) is not None:  # a model may have been made to write no label at all
        ends = [[float(texts.written(language, w, target.shown).mean()) for w in (attacked[n].weights, w)] for n, _, w in done]
        columns += ("label written before", "label written after")
        rows = [(*row, *pair) for row, pair in zip(rows, ends)]
    tables: tuple[Table, ...] = (Table("Recovery in a ball of weights", columns, tuple(rows), note),)
    values: dict[str, Any] = {"recovery": [dataclasses.asdict(r) for r in mine]}
    if case.reference:
        values["recovery_retrained"] = [dataclasses.asdict(r) for name, r, _ in done if name != THIS]
    if config.certificate is not None:
        table, values["smoothed"] = _smoothed(case, [(r, weights) for name, r, weights in done if name == THIS])
        tables += (table,)
    back = ", ".join(f"{r.accuracy[0]:.3f} -> {max(r.accuracy):.3f} at radius {r.radius:.3g}" for r in mine)
    values["verdict"] = (
        verdict(mine, [r for name, r, _ in done if name != THIS] or mine, config.goal) if _compared(case) else None
    )
    said = (f"{values['verdict']}; " if values["verdict"] else "") + f"recovery {back}"
    return Part(values, tables, (plot,), said if case.reference else f"{said} (not held against retraining: give --against)")


def _compared(case) -> bool:
    """Whether this is about forgetting, and there is a retrained model to hold it against."""
    return case.base.forget is not None and case.reference is not None


def verdict(mine: list[audit.Recovery], theirs: list[audit.Recovery], goal: float) -> str:
    """One sentence on recovery against that of the retrained model, radius by radius; one model of each, so no confidence."""
    reached = [(_back(one, goal), _back(other, goal)) for one, other in zip(mine, theirs)]
    for one, other, (at, retrained) in zip(mine, theirs, reached):
        if at == 0 and retrained != 0:
            return f"not forgotten: at {one.accuracy[0]:.3f} before any attack, retraining at {other.accuracy[0]:.3f}"
        if at is not None and (retrained is None or at < retrained):
            than = _epochs(other, retrained)
            return f"not forgotten: back to {goal:g} {_epochs(one, at)} at radius {one.radius:.3g}, retraining {than}"
    for one, other, (at, retrained) in zip(mine, theirs, reached):
        if at != retrained:
            than = _epochs(other, retrained)
            return f"harder to bring back than retraining: {_epochs(one, at)} at radius {one.radius:.3g}, retraining {than}"
    where = ", ".join(f"{_epochs(one, at)} at radius {one.radius:.3g}" for one, (at, _) in zip(mine, reached))
    return f"as retraining: both back to {goal:g} {where}"


def _back(recovery: audit.Recovery, goal: float) -> int | None:
    """The first epoch after which the accuracy reaches the goal; 0 is before the attack."""
    return next((epoch for epoch, accuracy in enumerate(recovery.accuracy) if accuracy >= goal), None)


def _epochs(recovery: audit.Recovery, at: int | None) -> str:
    count = len(recovery.accuracy) - 1 if at is None else at
    return f"{'not in' if at is None else 'after'} {count} epoch{'' if count == 1 else 's'}"


def _recover(case, name: str, model: lineage.Trained, share: float) -> tuple[audit.Recovery, Weights]:
    config, shown, hints = case.config, case.target.shown, case.hints

    def measure(weights: Weights) -> float:
        return float(evaluate.accuracy(*models.freeze(model.model, weights), shown))

    radius = audit.absolute_radius(model.weights.params, share, config.only) if config.relative else share
    each = sets.steps(int(hints.mask.sum()), config.batch, 1)
    transform = audit.recovery.default_tx(config.lr, schedule=config.schedule, epochs=config.epochs, per_epoch=each)
    method = audit.attack(
        model.model, transform, shape=config.shape, statistics=config.statistics, only=config.only, loss=model.loss
    )
    of = "" if name == THIS else f" {name}"
    state, history = runs.resumable(
        config.run, method, keys.named(case.key, "recovery"), (model.weights, radius), hints.data,
        title=f"recover{of} {config.run.name} at {share:g}", steps=each * config.epochs, every=each, seconds=20.0,
        record=lambda state, info: {"accuracy": measure(state.inner.weights), "distance": float(info["distance"][-1])},
        batch=config.batch, mask=jnp.asarray(hints.mask),
    )  # fmt: skip
    accuracy = (measure(model.weights), *(entry["accuracy"] for entry in history))
    distance = (0.0, *(entry["distance"] for entry in history))
    known = config.shape, config.statistics, int(hints.mask.sum())
    found = audit.Recovery(radius, *known, accuracy, distance, share if config.relative else None, config.only)
    return found, state.inner.weights


# --- a certificate -----------------------------------------------------------------------------------------------


def _smoothed(case, attacked: list[tuple[audit.Recovery, Weights]]) -> tuple[Table, list[dict]]:
    """The neighbours of each attacked model, held against the bound of the certificate that reaches it."""
    rows: list[tuple[Cell, ...]] = []
    values = []
    for recovery, weights in attacked:
        distance = max(recovery.distance[-1], 1e-12)
        group, row = _covering(case, distance)
        if row is None:
            rows.append((recovery.radius, recovery.accuracy[-1], distance, "no row reaches it", *[None] * 4))
            continue
        labels = np.asarray(case.base.test.y)
        shown = case.base.test if group == "test set" else sets.select(case.base.test, labels == int(group.split()[-1]))
        apply, _ = models.freeze(case.base.model, case.base.weights)
        found = audit.smoothed(
            apply, weights.params, shown, keys.named(case.key, f"neighbours {recovery.radius:g}"), sigma=row.sigma, q=row.q,
            bound=row.bound, draws=case.config.draws, alpha=case.config.alpha,
        )  # fmt: skip
        values.append(
            {"radius": recovery.radius, "eta": row.eta, "bound": row.bound, "group": group, **dataclasses.asdict(found)}
        )
        limits = "-" if found.low is None or found.high is None else f"[{found.low:.3f}, {found.high:.3f}]"
        kept = f"{found.below:.3f} [{found.below_low:.3f}, {found.below_high:.3f}]"
        refuted = found.below_high is not None and found.below_high < row.q
        verdict = "refuted" if refuted else "holds"
        rows.append((recovery.radius, recovery.accuracy[-1], distance, f"{row.bound:.3f} ({group}, eta {row.eta:g})",
                     f"{found.quantile:.3f} {limits}", kept, row.q, verdict))  # fmt: skip
    columns = (
        "l2 radius",
        "attacked accuracy",
        "distance",
        "certified bound",
        "smoothed quantile",
        "neighbours within",
        "q",
        "bound",
    )
    note = (
        "A certificate bounds a quantile of accuracy over Gaussian neighbours of any centre within eta, not the accuracy of "
        "one attacked network, which may lie above it. So what is compared is the quantile of the neighbours of the attacked "
        "model, and the share of them that keeps to the bound, which must be at least q."
    )
    return Table("Attacked models against the certificate", columns, tuple(rows), note), values


def _covering(case, distance: float) -> tuple[str, Covered | None]:
    """The certified upper bound with the least eta that reaches so far; of the class if it is bounded, else of the test set."""
    done = runs.result(case.config.certificate)
    found = done["values"]["certificates"]["this model"]["rows"]
    known = [row for row in found if row["upper"] is not None and row["eta"] >= distance * (1 - 1e-6)]
    for group in (case.target.name, "test set"):
        rows = sorted((row for row in known if row["group"] == group), key=lambda row: row["eta"])
        if rows:
            return group, Covered(rows[0]["eta"], rows[0]["q"], done["config"]["sigma"], rows[0]["upper"])
    return "", None


# --- baselines ---------------------------------------------------------------------------------------------------


def _hinted(case) -> dict[str, Any]:
    return {"hints": jnp.asarray(case.hints.mask)}


def _random(case) -> Part:
    config, rows, values = case.config, [], []
    for share in config.radii:
        radius = audit.absolute_radius(case.base.weights.params, share, config.only) if config.relative else share
        with console.progress(f"random {config.run.name} at {share:g}", config.draws, 0, "draws") as advance:
            found = audit.random_search(
                case.base.model, case.base.weights, case.hints.data, case.target.shown, case.key, radius=radius,
                draws=config.draws, only=config.only, every=max(1, config.draws // 20),
                after=lambda done, scores, advance=advance: advance(done), **_hinted(case),
            )  # fmt: skip
        rows.append((radius, found.before, found.chosen, found.oracle))
        values.append(dataclasses.asdict(found))
    note = (
        f"{config.draws:,} random points at each distance; the best by {case.hints.words}, and the best by the measure itself."
    )
    columns = ("l2 distance", "before", "best by hints", "best of all")
    return Part({"random": values}, (Table("Random search", columns, tuple(rows), note),))


def _relearn(case) -> Part:
    config, rows, values = case.config, [], {}
    curves = []
    for name, model in models_of(case).items():
        found = audit.relearn(
            model.model, model.weights, case.hints.data, case.target.shown, case.key, goal=config.goal, most=MOST, every=EVERY,
            batch=config.batch, tx=train.clipped_sgd(config.lr, 0.9, 5e-4), statistics=config.statistics,
            loss=model.loss, **_hinted(case),
        )  # fmt: skip
        rows.append(
            (name, found.accuracy[0], "never" if found.steps is None else found.steps, found.accuracy[-1], found.looks[-1])
        )
        values[name] = dataclasses.asdict(found)
        curves.append((name, tuple(float(look) for look in found.looks), found.accuracy))
    where = case.target.where
    note = (
        f"Training on {case.hints.words}, without a ball, until accuracy on {where} is {config.goal:g}; at most {MOST} steps."
    )
    columns = ("model", "before", "steps to the goal", "accuracy at the end", "steps taken")
    plot = Plot("relearning", f"Relearning {case.target.name}", "step", f"accuracy on {where}", tuple(curves))
    said = f"relearned to {config.goal:g} after {rows[0][2]} steps" + (f" ({rows[1][2]} retrained)" if len(rows) > 1 else "")
    return Part({"relearning": values}, (Table("Relearning", columns, tuple(rows), note),), (plot,), said)
