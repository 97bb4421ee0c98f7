"""How far given weights lie from what a certificate covers, so that no one claims more than it does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from dememo_jax import bounds, montecarlo, tree
from dememo_jax.certify.draws import number
from dememo_jax.errors import require
from dememo_jax.types import Params


@dataclass(frozen=True)
class Coverage:
    """Where one set of weights lies. A cloud centred there is covered by rows with at least this eta, and by no others."""

    name: str
    distance: float  # as eta measures it; infinite when leaves without noise differ
    l2: float  # over all leaves
    shift: float  # distance in standard deviations of the noise
    covered: bool  # by the largest eta certified
    beyond: float  # how much further than that eta it lies, 0 when covered
    draws_needed: int | None  # fewest draws of one upper bound that covers it; None where no float64 count would do


def coverage(
    params: Params,
    others: Mapping[str, Params],
    *,
    sigma: float | Params,
    eta: float | Sequence[float],
    q: float = 0.9,
    alpha: float = 0.01,
    only: str | None = None,
) -> tuple[Coverage, ...]:
    """The distance of each of `others` from the certified ball around `params`, and the draws that would reach it.

    Certificates are local: two training runs of one recipe lie tens of standard deviations apart, and no number of draws
    covers that. sigma, eta, only: as the certificate was made. Raises BadInput for trees of another shape.
    """
    largest = float(np.max(eta))
    scalar = number(sigma)
    require(only is None or scalar is not None, "give `only` with one number as sigma")
    montecarlo.check_sigma(params, sigma)
    scale = sigma if only is None or scalar is None else tree.scales(params, scalar, only=only)
    scales = [np.asarray(s, np.float64) for s in tree.leaf_scales(scale, params)]

    def one(name: str, other: Params) -> Coverage:
        same = [(n, np.shape(a)) for n, a in zip(tree.names(params), jax.tree.leaves(params))] == [
            (n, np.shape(b)) for n, b in zip(tree.names(other), jax.tree.leaves(other))
        ]
        require(same, f"the weights {name!r} have another structure than the certified ones")
        moves = [np.asarray(b, np.float64) - np.asarray(a, np.float64) for a, b in zip(*map(jax.tree.leaves, (params, other)))]
        spread = [np.broadcast_to(scale, move.shape) for move, scale in zip(moves, scales, strict=True)]
        held = any(np.any(move[scale == 0]) for move, scale in zip(moves, spread))
        square = sum(np.sum(np.square(move[scale > 0] / scale[scale > 0])) for move, scale in zip(moves, spread))
        shift = np.inf if held else float(np.sqrt(square))
        distance = shift * (1.0 if scalar is None else scalar)
        tail = 0.0 if held else bounds.shifted_tail(q, shift)
        needed = None if tail == 0.0 else bounds.min_draws(1 - tail, alpha, tail=tail)
        l2 = float(np.sqrt(sum(np.sum(np.square(move)) for move in moves)))
        return Coverage(name, distance, l2, shift, distance <= largest, max(0.0, distance - largest), needed)

    return tuple(one(name, other) for name, other in others.items())
