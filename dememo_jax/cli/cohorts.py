"""Many models of a run's own recipe: shadow models, unlearned and retrained ones, trained group by group and kept as scores."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import audit, evaluate, files, keys, losses, mesh
from dememo_jax import data as sets
from dememo_jax.cli import certified, console, forgetting, lineage, runs, victims
from dememo_jax.cli.configs import Train, Unlearn
from dememo_jax.cli.parts import Part, limits
from dememo_jax.errors import require
from dememo_jax.report import Cell, Table
from dememo_jax.types import Dataset, Key, Method, Weights

SHADOWED = ("lira", "rmia")
COMPARED = ("u-lira", "klom", "epsilon", "two-sided", "relative")
LEAST = 8  # models of a kind
NOTE = (
    "{models} models of this recipe that unlearned the examples by this method, against as many retrained without them; their "
    "log-odds on {examples:,} forgotten examples. Retrained again: as many further retrained models in the place of the "
    "unlearned, the null: each of its p-values is below 0.05 in one audit of twenty. By chance: what two samples of one "
    "distribution show (mean over relabellings), and the p-value against it. Limits of U-LiRA's area are those of models that "
    "had no part in its fit. epsilon, at delta 1e-5: a lower limit at {level:.0%} confidence, of any guarantee that could hold."
)


def check(case) -> None:
    """BadInput for models that cannot be trained by the dozen."""
    asked = set(case.config.attack)
    if asked & {*SHADOWED, *COMPARED}:
        least = case.config.shadows
        require(least >= LEAST, f"--shadows must be at least {LEAST}, got {least}: attacks by distribution need models to fit")
    if not asked & set(COMPARED):
        return
    named = ", ".join(sorted(asked & set(COMPARED)))
    require(case.base.forget is not None, f"{named} compare unlearned models: --from must be an unlearn run")
    config = _unlearning(case)
    require(runs.read(config.source)["config"]["command"] == "train", f"{named} need an unlearn run made from a train run")
    require(not config.rewind, f"{named} cannot follow --rewind, which looks at test images of each model")
    require("relative" not in asked or config.method != "retrain", "relative asks whether unlearning is nearer to retraining "
            "than to the original; this run is a retraining")  # fmt: skip


# --- the recipes -------------------------------------------------------------------------------------------------


def _training(case) -> Train:
    folder = case.config.source
    while runs.read(folder)["config"]["command"] != "train":
        folder = folder / runs.read(folder)["config"]["source"]
    return runs.filled(Train, folder, runs.read(folder)["config"])


def _unlearning(case) -> Unlearn:
    return runs.filled(Unlearn, case.config.source, runs.read(case.config.source)["config"])


def margins(model: lineage.Trained, data: Dataset) -> np.ndarray:
    return np.asarray(losses.margin(evaluate.logits(*model.frozen, data.x), data.y))


# --- training ----------------------------------------------------------------------------------------------------


def _kept(
    case, title: str, key: Key, method: Method, data: Dataset, masks: np.ndarray, config: Train,
    outputs: dict[str, Callable[[audit.Group], np.ndarray]], columns: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Scores [M, columns] of each of the outputs, saved as each group ends; finished groups are never trained again."""
    over = mesh.mesh() if jax.device_count() > 1 else None
    directory = case.config.run / runs.CHECKPOINTS / title.replace(" ", "-")
    state = {name: np.zeros((len(masks), columns), np.float32) for name in outputs} | {"done": np.zeros(len(masks), bool)}
    restored = runs.newest(directory, state)
    width = case.config.width
    if restored is not None:
        state, width = jax.tree.map(np.array, restored.state), restored.meta["width"]
    if state["done"].all():
        return state
    model = case.base.trainee
    if width is None:
        width = audit.usual_width(key, model, method, data, masks, batch=config.batch, over=over)
    offer = runs.saver(directory, 20.0)
    how: dict[str, Any] = {"passes": config.epochs, "batch": config.batch, "width": width, "over": over}
    with console.progress(title, len(masks), int(state["done"].sum()), "models") as advance:
        skip = np.flatnonzero(state["done"]).tolist()
        for group in audit.train_shadows(key, model, method, data, masks, skip=skip, **how):
            for name, output in outputs.items():
                state[name][group.rows] = output(group)
            state["done"][group.rows] = True
            done = int(state["done"].sum())
            offer(done, state, {"width": width}, done == len(masks))
            advance(done)
    return state


def _score(case, config: Train, group: audit.Group, data: Dataset) -> np.ndarray:
    model = case.base.model
    width = audit.usual_lanes(group.weights.params, len(group.rows), stacked=True)
    return audit.score(model, group.weights, data, width=width)


def pool_masks(case, count: int, fresh: int) -> np.ndarray:
    """Which shadow trains on what: each sees about as many examples of the pool as the model in question was trained on."""
    parts = int(np.clip(count // max(1, fresh), 2, case.config.shadows // 3))
    return audit.folds(keys.named(case.key, "folds"), case.config.shadows, count, parts)


def pool_scores(case, key: Key, pool: Dataset, masks: np.ndarray, strangers: Dataset) -> np.ndarray:
    config = _training(case)
    method = victims.learner(config, case.base, int(masks[0].sum()))
    shown = sets.joined(pool, strangers)
    outputs = {"scores": lambda group: _score(case, config, group, shown)}
    return _kept(case, f"shadows {case.config.run.name}", key, method, pool, masks, config, outputs, len(shown.y))["scores"]


# --- distributions -----------------------------------------------------------------------------------------------


def distributions(case) -> list[Part]:
    """U-LiRA, KLoM, epsilon-hat, both sides and the relative test: the method itself, by many models of either kind."""
    if not set(case.config.attack) & set(COMPARED):
        return []
    config, forgetter, base = _training(case), _unlearning(case), case.base
    seen, noise = victims.shown(config, base, base.perturbation)
    seen = sets.perturb(seen, noise)
    forget, count = np.asarray(base.forget), case.config.shadows
    asked = sets.select(seen, case.target.mask)
    key, retrain = keys.named(case.key, "worlds"), forgetter.method == "retrain"
    scored = functools.partial(_score, case, config, data=asked)
    masks = np.tile(~forget, (2 * count, 1))
    method = victims.learner(config, base, int((~forget).sum()))
    outputs: dict[str, Any] = {"scores": scored}
    title = f"retrained {case.config.run.name}"
    retrained = _kept(case, title, keys.named(key, "retrained"), method, seen, masks, config, outputs, len(asked.y))["scores"]
    found = {"retrained again": audit.compare(retrained[count:], retrained[:count], alpha=case.config.alpha)}
    if not retrain:
        then = _forgetter(case, config, forgetter, seen, keys.named(key, "unlearn"))
        outputs = {"original": scored, "unlearned": lambda group: scored(then(group))}
        method = victims.learner(config, base, len(forget))
        title, masks = f"unlearned {case.config.run.name}", np.ones((count, len(forget)), bool)
        made = _kept(case, title, keys.named(key, "original"), method, seen, masks, config, outputs, len(asked.y))
        original = made["original"]
        found = {
            forgetter.method: audit.compare(made["unlearned"], retrained[:count], original, alpha=case.config.alpha),
            "no unlearning": audit.compare(original, retrained[:count], alpha=case.config.alpha),
            **found,
        }
        files.write_arrays(case.config.run / "cohorts.npz", **made, retrained=retrained)
    return [_told(case, found)]


def _forgetter(case, config: Train, forgetter: Unlearn, seen: Dataset, key: Key) -> Callable[[audit.Group], audit.Group]:
    """What makes a group of models unlearn as the run in question did."""
    base = dataclasses.replace(case.base, forget=None)
    forget = np.asarray(case.base.forget)
    job = forgetting.Job(forgetter, base, forget, forgetter.epochs or 0, forgetter.lr or 0.0)
    kind = forgetting.KINDS[forgetter.method]
    if kind.family == "descent":
        method = kind.make(job)
        then = audit.descended(method, method.steps(*job.counts, job.epochs))
        masks = np.ones((case.config.shadows, len(forget)), bool)

        def together(group: audit.Group) -> audit.Group:
            width = audit.usual_lanes(group.weights.params, len(group.rows), stacked=True)
            return audit.then_unlearn(key, group, then, seen, masks, forget, width=width)

        return together

    made = certified.make(job) if kind.family == "certified" else None

    def one(row: int, weights: Weights) -> Weights:
        own = dataclasses.replace(job, base=dataclasses.replace(base, weights=weights))
        return kind.make(own)[0] if made is None else certified.once(own, *made, keys.at(key, row))

    def one_by_one(group: audit.Group) -> audit.Group:
        each = [one(int(row), jax.tree.map(lambda leaf, i=i: leaf[i], group.weights)) for i, row in enumerate(group.rows)]
        return audit.Group(group.rows, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))

    return one_by_one


def _told(case, found: dict[str, audit.Verdict]) -> Part:
    asked = case.config.attack
    lines: dict[str, tuple[str, Callable[[audit.Verdict], Cell]]] = {
        "U-LiRA area, half of the models against the others": ("u-lira", lambda v: limits(v.u_lira)),
        "U-LiRA area, every model": ("u-lira", lambda v: v.u_lira_all.value),
        "U-LiRA area by chance": ("u-lira", lambda v: v.u_lira_all.null),
        "p-value of the U-LiRA area": ("u-lira", lambda v: v.u_lira_all.p_value),
        "U-LiRA, found at 0.01": ("u-lira", lambda v: v.u_lira_tpr[0].tpr),
        "U-LiRA, found at 0.001": ("u-lira", lambda v: v.u_lira_tpr[1].tpr),
        "KLoM, mean": ("klom", lambda v: v.klom.value),
        "KLoM by chance": ("klom", lambda v: v.klom.null),
        "p-value of KLoM": ("klom", lambda v: v.klom.p_value),
        "KLoM, 95th percentile": ("klom", lambda v: v.klom_95),
        "epsilon-hat, median": ("epsilon", lambda v: float(np.median(v.epsilon.examples))),
        "forgetting quality F": ("epsilon", lambda v: v.epsilon.score),
        "F by chance": ("epsilon", lambda v: 1 - v.quality.null),
        "p-value of F": ("epsilon", lambda v: v.quality.p_value),
        "epsilon of an example, at least": ("epsilon", lambda v: v.epsilon.largest_low),
        "epsilon of all together, at least": ("epsilon", lambda v: v.joint.epsilon_low),
        "too familiar": ("two-sided", lambda v: v.two_sided.under),
        "too strange": ("two-sided", lambda v: v.two_sided.over),
        "area, unlearned above retrained": ("two-sided", lambda v: limits(v.two_sided.area)),
        "nearer to retrained: p-value": ("relative", lambda v: v.relative.p_nearer_first if v.relative else None),
        "nearer to original: p-value": ("relative", lambda v: v.relative.p_nearer_second if v.relative else None),
    }
    rows = tuple((name, *(show(v) for v in found.values())) for name, (of, show) in lines.items() if of in asked)
    first = next(iter(found.values()))
    note = NOTE.format(models=first.models[0], examples=first.examples, level=1 - case.config.alpha)
    name = next(iter(found))
    said = f"{name} against retraining: U-LiRA area {limits(first.u_lira)}, F {first.epsilon.score:.3f} "
    said += f"({1 - first.quality.null:.3f} by chance, p {first.quality.p_value:.3f})"
    table = Table("Unlearned models against retrained ones", ("test", *found), rows, note)
    values = {"distributions": {n: dataclasses.asdict(v) for n, v in found.items()}}
    return Part(values, (table,), (), said)
