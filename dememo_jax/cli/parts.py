"""What the attacks of `dememo audit` share: what one has to say, whose models they look at, how limits are written."""

from typing import Any, NamedTuple

from dememo_jax import bounds
from dememo_jax.cli import lineage
from dememo_jax.report import Plot, Table

THIS, REFERENCE = "this model", "retrained"


class Part(NamedTuple):
    """What an attack has to say."""

    values: dict[str, Any]
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    said: str = ""


def models_of(case) -> dict[str, lineage.Trained]:
    """The model in question, and the retrained one where there is one."""
    return {THIS: case.base} | ({REFERENCE: case.reference} if case.reference else {})


def limits(estimate: bounds.Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
