"""`dememo audit`: check everything, claim the folder, run the attacks that were asked for, write."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dememo_jax.cli import classes, cohorts, identity, lineage, memberships, recovering, runs, selection
from dememo_jax.cli.configs import Audit
from dememo_jax.cli.runs import positive
from dememo_jax.cli.selection import Target
from dememo_jax.errors import distinct, require
from dememo_jax.report import Section


class Case(NamedTuple):
    """All that an attack may look at."""

    config: Audit
    base: lineage.Trained
    reference: lineage.Trained | None
    target: Target
    hints: recovering.Hints
    key: jax.Array


def audit_model(config: Audit) -> dict:
    """`dememo audit`."""
    started = runs.clock(config.run)
    case, digests = _case(config)
    described = runs.describe(case.config, **digests) | classes.kept(case.base)
    if done := runs.begin(config.run, described):
        return done
    parts = [part for work in WORK for part in work(case)]
    values: dict[str, Any] = {"target": case.target.name, "gap": case.reference is not None}
    labels = np.unique(np.asarray(case.base.train.y)[case.target.mask])
    values["target_class"] = int(labels[0]) if len(labels) == 1 else None
    for part in parts:
        values |= part.values
    summary = f"{case.target.name}: {'; '.join(part.said for part in parts if part.said)}"
    tables, plots = (tuple(item for part in parts for item in getattr(part, name)) for name in ("tables", "plots"))
    section = case.base.told(Section(f"audit: {config.run.name}", summary, tables, plots))
    return runs.finish(config.run, described, values, [section], started)


def _case(config: Audit) -> tuple[Case, dict[str, str]]:
    """Everything checked, before any work."""
    require(config.attack, "name at least one --attack")
    distinct(attack=config.attack, radii=config.radii)
    for radius in config.radii:
        positive(radii=radius)
    positive(epochs=config.epochs, batch=config.batch, lr=config.lr, draws=config.draws, shadows=config.shadows,
             width=config.width)  # fmt: skip
    require(0 < config.alpha < 1, f"--alpha must lie strictly between 0 and 1, got {config.alpha}")
    require(0 < config.goal <= 1, f"--goal is an accuracy in (0, 1], got {config.goal}")
    base = lineage.trained(config.source)
    config = classes.numbered(config, base)
    mask = selection.target_mask(base, config.target_class)
    reference = None if config.against is None else _retrained(base, config.against, mask)
    key = jax.random.key(config.seed)
    hints = recovering.hints_of(config, base, mask, key)
    target = selection.audited(base, config.target_class, hints.mask if hints.data is base.train else np.zeros_like(mask))
    if config.hints == "test":
        hints = recovering.Hints(target.shown, np.ones(len(target.shown.y), bool), "the very images that are evaluated")
    digests = identity.record("source", base.inputs) | (identity.record("reference", reference.inputs) if reference else {})
    case = Case(config, base, reference, target, hints, key)
    recovering.check(case)
    memberships.check(case)
    cohorts.check(case)
    if config.certificate is not None:
        digests["certificate_digest"] = identity.digest((config.certificate / runs.RESULT).read_bytes())
    return case, digests


def _retrained(base: lineage.Trained, folder: Path, mask: np.ndarray) -> lineage.Trained:
    """The model that never saw the examples in question."""
    other = lineage.retrained(base, folder, "--against")
    unseen = other.forget is not None and bool(other.forget[mask].all())
    require(unseen, f"--against {folder} was retrained with examples in question; it must have forgotten all of them")
    return other


WORK = (recovering.recovered, memberships.alone, memberships.with_shadows, cohorts.distributions)  # as the page has it
STAGES = {Audit: audit_model}
