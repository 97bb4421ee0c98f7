"""The words of the house: data, weights, models, methods.

Letters fixed everywhere: `N` examples, `B` batch, `K` classes, `M` models, `S` Monte-Carlo samples, `P` parameters.
An example is its index: perturbations and masks are arrays beside the data, joined to it at the last moment.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

Array = jax.Array
Key = jax.Array  # a typed key, jax.random.key
Params = Any  # any nest of arrays: what noise, Hessian-vector products and clipping act on
Info = dict[str, Array]  # what a step reports; never needed to resume
Apply = Callable[[Params, Array], Array]  # [B, ...] -> [B, K], evaluation mode, pure
Loss = Callable[[Array, Array], Array]  # logits [B, K], labels [B] -> [B]


def _shapes(arrays: Any) -> str:
    """Types and shapes instead of thousands of numbers."""
    parts = [
        f"{name}={part.dtype}{list(part.shape)}" if hasattr(part, "shape") and hasattr(part, "dtype") else f"{name}={part!r}"
        for name, part in arrays._asdict().items()
    ]
    return f"{type(arrays).__name__}({', '.join(parts)})"


class Dataset(NamedTuple):
    """Examples, or a batch of them: the same type. `index` is each example's place in the full set."""

    x: Array  # [N, ...] float in [0, 1], or tokens [N, L] int32
    y: Array  # [N] int32
    index: Array  # type: ignore[assignment]  # [N] int32; hides tuple.index, which nobody asks of data

    def __repr__(self) -> str:
        return _shapes(self)


class Perturbation(NamedTuple):
    """What is added to protected examples: `clip(x + delta[row], 0, 1)` where `mask`, else `x`.

    Sample-wise noise has one row an example, class-wise noise one row a class. Amplitude 1 overwrites: it
    saturates a pixel in [0, 1] whatever stood there. Of a text it is the difference of its tokens, added unclipped.
    """

    delta: Array  # [R, ...] float, of tokens int32
    row: Array  # [N] int32, the row of delta that belongs to each example
    mask: Array  # [N] bool, which examples are protected

    def __repr__(self) -> str:
        return _shapes(self)


class Weights(NamedTuple):
    params: Params
    stats: Params  # running statistics of batch norm and the like: never noised, never clipped


class Model(NamedTuple):
    """A network as three pure functions."""

    init: Callable[[Key, Array], Weights]  # key, x [B, ...]
    apply: Callable[[Weights, Array], Array]  # evaluation mode -> logits [B, K]
    fit: Callable[[Weights, Array, Key], tuple[Array, Weights]]  # training mode -> logits, weights with new stats


class Method(NamedTuple):
    """A resumable procedure: `init` makes a state of arrays only, `step(key, state, data)` advances it.

    The data of a step is a batch, or the whole set for methods that draw batches of their own.
    `check(state, data)` raises BadInput for data that the method cannot learn from; drivers call it before any step, outside
    jit. `finish(state)` gives the weights to use, where they are not `state.weights`.
    """

    init: Callable[..., Any]
    step: Callable[[Key, Any, Dataset], tuple[Any, Info]]
    check: Callable[[Any, Dataset], None] | None = None
    finish: Callable[[Any], Weights] | None = None


@dataclass(frozen=True)
class Guarantee:
    """What certified unlearning promises of the released model, against what, and provided what.

    Both directions of `P[released in S] <= e^epsilon P[comparator's in S] + delta`, for every set S of models.
    """

    epsilon: float
    delta: float
    mu: float | None  # of Gaussian differential privacy, where the accounting gives the whole trade-off
    comparator: str  # "same_procedure", "from_centre", "data_independent" or "retraining"
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class Heuristic:
    """A published claim of the same form that is not proved to hold: no `Guarantee`, and nothing composes with it."""

    epsilon: float  # as claimed
    delta: float
    comparator: str
    reason: str  # why it is no guarantee
    assumptions: tuple[str, ...]


class CertifiedMethod(NamedTuple):
    """A method whose promise can be asked for: `guarantee(steps)` of a run of so many steps."""

    init: Callable[..., Any]
    step: Callable[[Key, Any, Dataset], tuple[Any, Info]]
    guarantee: Callable[[int], Guarantee]
