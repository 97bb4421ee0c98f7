"""The membership attacks of `dememo audit`: on one model alone, and with shadow models."""

from typing import Any

import numpy as np

from dememo_jax import audit, bounds, evaluate, keys
from dememo_jax import data as sets
from dememo_jax.cli import cohorts, lineage
from dememo_jax.cli.cohorts import SHADOWED
from dememo_jax.cli.parts import REFERENCE, THIS, Part, limits, models_of
from dememo_jax.errors import require
from dememo_jax.report import Cell, Plot, Table

FPRS = (0.01, 0.001)
SIDES = {"familiar": 1, "strange": -1}
SOK = (
    "Share of the clean training images in question that an attack calls members. No false-positive control: only the gap "
    "to a model retrained without them means anything. A gap above zero says that it remembers, below zero that it over-"
    "forgets; gaps of both signs decide nothing, and correctness is little more than plain accuracy."
)
RANKED = (
    "Area: chance that an example in question looks more like a member than an unseen test image of the same classes; 0.5 "
    "tells nothing. Familiar: share of them above a threshold that so many unseen images pass (too well remembered); "
    "strange: the same at the other end (over-unlearned). Limits at {level:.0%} confidence. Only the gap to the retrained "
    "model means anything."
)


# --- one model ---------------------------------------------------------------------------------------------------


def check(case) -> None:
    """BadInput for parts of the data that are too small for an attack, before any work."""
    asked, target = set(case.config.attack), case.target
    require("sok" not in asked or len(case.base.test.y), "sok needs test images as non-members; there are none")
    ranked, shadowed = (", ".join(sorted(asked & names)) for names in ({"signals", "thresholds", *SHADOWED}, set(SHADOWED)))
    other = "name another --target-class or other attacks"
    unseen = f"{target.name} has no test images, so {ranked} cannot hold its examples against unseen ones; {other}"
    require(not ranked or target.unseen.any(), unseen)
    joined = _joined(len(target.unseen))
    halves = (
        f"{shadowed} need two test images or more, one half for shadow models and one half unseen by all; got {len(joined)}"
    )
    require(not shadowed or not joined.all(), halves)
    even = (
        f"{shadowed} need a test image of {target.name} at an even index, which shadow models may see; there is none; {other}"
    )
    require(not shadowed or (joined & target.unseen).any(), even)


def _joined(count: int) -> np.ndarray:
    """Test images [N'] that shadow models may be trained on, unseen by the models in question; the others are strangers."""
    return np.arange(count) % 2 == 0


def alone(case) -> list[Part]:
    """The attacks that look at nothing but the model's outputs."""
    asked, parts = set(case.config.attack), []
    if not asked & {"sok", "signals", "thresholds"}:
        return []
    outputs = {name: _outputs(model) for name, model in models_of(case).items()}
    if "sok" in asked:
        parts.append(_sok(case, outputs))
    if "signals" in asked:
        parts.append(_signals(case, outputs))
    if "thresholds" in asked:
        parts.append(_thresholds(case, outputs))
    return parts


def _outputs(model: lineage.Trained) -> dict[str, np.ndarray]:
    return {name: np.asarray(evaluate.logits(*model.frozen, getattr(model, name).x)) for name in ("seen", "train", "test")}


def _sok(case, outputs: dict[str, dict[str, np.ndarray]]) -> Part:
    """The three scores of the clean images in question; as gaps where there is a retrained reference."""
    labels, tested = np.asarray(case.base.train.y), np.asarray(case.base.test.y)
    wanted = case.target.mask
    retained = ~wanted if case.base.forget is None else ~case.base.forget
    if not retained.any():  # all of the training set is in question: its own images are the members
        retained = wanted
    found = {}
    for name, out in outputs.items():
        member, target = (out["seen"][retained], labels[retained]), (out["train"][wanted], labels[wanted])
        found[name] = audit.membership_scores(member, (out["test"], tested), target)
    rows: list[tuple[Cell, ...]] = [(name, *scores.values()) for name, scores in found.items()]
    scores = found[THIS]
    if REFERENCE in found:
        scores = audit.membership_gap(scores, found[REFERENCE])
        rows.append(("gap", *scores.values()))
    sign = "+" if REFERENCE in found else ""
    said = f"{'membership gap to retraining' if sign else 'membership scores'}: "
    said += ", ".join(f"{name} {value:{sign}.3f}" for name, value in scores.items())
    if sign and min(scores.values()) < -0.05 and max(scores.values()) > 0.05:
        said += " (of both signs, which decides nothing)"
    return Part({"membership": scores}, (Table("Membership inference", ("model", *scores), tuple(rows), SOK),), (), said)


def _signals(case, outputs: dict[str, dict[str, np.ndarray]]) -> Part:
    labels, tested = np.asarray(case.base.train.y), np.asarray(case.base.test.y)
    mask, unseen = case.target.mask, case.target.unseen
    scores = {
        (signal, name): (values, audit.signals(out["test"][unseen], tested[unseen])[signal])
        for name, out in outputs.items()
        for signal, values in audit.signals(out["seen"][mask], labels[mask]).items()
    }
    order = sorted(scores, key=lambda pair: (list(audit.signals(np.eye(2), np.arange(2))).index(pair[0]), pair[1] != THIS))
    ranked = {pair: scores[pair] for pair in order}
    return _ranked(case, "signals", "Signals of one model", ranked, plot="confidence")


Scored = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]  # (attack, model) -> scores in question, and of unseen images


def _ranked(case, name: str, title: str, scores: Scored, plot: str) -> Part:
    """A table and a ROC of the scores of each attack and model."""
    alpha = case.config.alpha
    rows: list[tuple[Cell, ...]] = []
    values: dict[str, dict[str, Any]] = {}
    curves = []
    counts = [len(part) for part in next(iter(scores.values()))]
    told = [fpr for fpr in FPRS if counts[1] >= 1 / fpr - 1e-9]  # at which the unseen images are enough for a rate
    for (attack, model), (inside, outside) in scores.items():
        both, members = np.concatenate([inside, outside]), np.repeat([True, False], [len(inside), len(outside)])
        if np.ptp(both) == 0:
            rows.append((attack, model, "no two differ", *[None] * (2 * len(told))))
            continue
        area = bounds.auc(both, members, alpha=alpha)
        ends = {side: [bounds.tpr_at(sign * both, members, fpr, alpha=alpha) for fpr in FPRS] for side, sign in SIDES.items()}
        values[f"{attack}, {model}"] = {"area": area, **ends}
        rows.append(
            (attack, model, limits(area), *(_rate(point) for side in ends.values() for point in side if point.fpr in told))
        )
        if attack == plot:
            curves.append((model, *_curve(both, members)))
    columns = ("attack", "model", "area", *(f"{side} at {fpr:.1%}" for side in SIDES for fpr in told))
    note = RANKED.format(level=1 - alpha) + f" {counts[0]:,} examples in question, {counts[1]:,} unseen images"
    missing = [fpr for fpr in FPRS if fpr not in told]
    if missing:
        needed = " and ".join(f"{round(1 / fpr):,}" for fpr in missing)
        note += f", too few for rates at {' and '.join(f'{fpr:.1%}' for fpr in missing)}, which need {needed}"
    note += "."
    roc = Plot(
        f"roc-{name}", f"{title}: {plot}", "false-positive rate", "true-positive rate", tuple(curves),
        f"From a false-positive rate of 1 in {min(counts[1], 1000):,} on: what lies below cannot be told.", scale="roc",
    )  # fmt: skip
    found = {model: values.get(f"{plot}, {model}") for model in (THIS, REFERENCE)}
    said = ", ".join(f"{limits(one['area'])} ({model})" for model, one in found.items() if one)
    plots = (roc,) if curves else ()
    return Part({name: values}, (Table(title, columns, tuple(rows), note),), plots, f"{plot} area {said}" if said else "")


def _rate(point: bounds.Operating) -> Cell:
    return None if point.tpr is None else limits(bounds.Estimate(point.tpr, point.low, point.high))


def _curve(scores: np.ndarray, members: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """At most 200 points of a ROC, evenly spread on the logarithmic axis from one false alarm on."""
    false, true, _ = bounds.roc(scores, members)
    least = max(1e-3, 1 / int((~members).sum()))
    at = np.unique(np.searchsorted(false, np.geomspace(least, 1, 200) * (1 + 1e-9), side="right") - 1)
    at = at[(true[at] > 0) & (false[at] >= least * (1 - 1e-9))]  # what a logarithmic axis can show, and the scores can tell
    return tuple(false[at].tolist()), tuple(true[at].tolist())


def _thresholds(case, outputs: dict[str, dict[str, np.ndarray]]) -> Part:
    """Song and Mittal: thresholds from retained and half of the test images, judged on what is in question and the others."""
    labels, tested = np.asarray(case.base.train.y), np.asarray(case.base.test.y)
    mask = case.target.mask
    retained = ~mask if case.base.forget is None else ~case.base.forget
    if not retained.any():
        retained = mask & (np.arange(len(mask)) % 2 == 0)
    judged = mask & ~retained if (mask & ~retained).any() else mask
    known = np.arange(len(tested)) % 2 == 0
    rows: list[tuple[Cell, ...]] = []
    values = {}
    for name, out in outputs.items():
        fit = (out["seen"][retained], labels[retained]), (out["test"][known], tested[known])
        thresholds = audit.class_thresholds(*fit, case.base.classes)
        rest = case.target.unseen & ~known
        called = audit.called_members(thresholds, (out["seen"][judged], labels[judged]))
        wrongly = audit.called_members(thresholds, (out["test"][rest], tested[rest]))
        for signal, hits in called.items():
            counts = [(0, 0) if part is None else (int(part.sum()), len(part)) for part in (hits, wrongly[signal])]
            rates = [bounds.Estimate(k / n, *bounds.clopper_pearson(k, n, case.config.alpha)) if n else None for k, n in counts]
            values[f"{signal}, {name}"] = rates
            rows.append((signal, name, *(None if rate is None else limits(rate) for rate in rates)))
    note = (
        "A threshold for each class, from retained training images against half of the test images (Song and Mittal 2021). "
        "Called members: of the examples in question, and of the other half of the test images of their classes. A dash: the "
        "signal is the same for all known examples, or there are none to judge."
    )
    columns = ("attack", "model", "called members", "of unseen images")
    return Part({"thresholds": values}, (Table("Thresholds of each class", columns, tuple(rows), note),))


# --- shadow models -----------------------------------------------------------------------------------------------


def with_shadows(case) -> list[Part]:
    """LiRA and RMIA: models of the same recipe, with and without each example, attack this model and the retrained one."""
    asked = [name for name in ("lira", "rmia") if name in case.config.attack]
    if not asked:
        return []
    base, key = case.base, keys.named(case.key, "pool")
    tested = np.asarray(base.test.y)
    joined = _joined(len(tested))
    pool = sets.joined(base.seen, sets.select(base.test, joined))
    strangers = sets.select(base.test, ~joined)
    masks = cohorts.pool_masks(case, len(pool.y), int(joined.sum()))
    scores = cohorts.pool_scores(case, key, pool, masks, strangers)
    counted, stranger = scores[:, : len(pool.y)], scores[:, len(pool.y) :]
    labels, count = np.asarray(pool.y), len(base.train.y)
    inside = np.flatnonzero(case.target.mask)
    outside = count + np.flatnonzero(np.isin(labels[count:], labels[inside]))
    attacked = {}
    for name, model in models_of(case).items():
        own, theirs = (cohorts.margins(model, part) for part in (pool, strangers))
        if "lira" in asked:
            ratios = audit.lira(counted, masks, targets=own[None])[0]
            attacked["LiRA", name] = ratios[inside], ratios[outside]
        if "rmia" in asked:
            a = audit.rmia_interpolation(counted, masks, stranger)
            how: dict[str, Any] = {"targets": own[None], "target_population": theirs[None], "interpolation": a}
            beaten = audit.rmia(counted, masks, stranger, **how)[0]
            attacked["RMIA", name] = beaten[inside], beaten[outside]
    ranked = {pair: attacked[pair] for pair in sorted(attacked, key=lambda pair: (pair[0], pair[1] != THIS))}
    done = _ranked(case, "shadows", "Shadow models", ranked, plot="LiRA" if "lira" in asked else "RMIA")
    out = int((~masks[:, 0]).sum())
    note = f" {case.config.shadows} shadow models of the same recipe; each example was left out of about {out} of them."
    table = done.tables[0]
    return [done._replace(tables=(Table(table.title, table.columns, table.rows, table.note + note),))]
