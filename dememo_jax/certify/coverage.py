"""How far given weights lie from what a certificate covers, so that no one claims more than it does."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from dememo_jax import bounds, montecarlo, tree
from dememo_jax.certify.draws import number
from dememo_jax.certify.neighbourhood import DepthCertificate
from dememo_jax.errors import require
from dememo_jax.types import Params


@dataclass(frozen=True)
class Coverage:
    """Where one set of weights lies. A cloud centred there is covered by rows of at least this eta that have bounds."""

    name: str
    distance: float  # as eta measures it; infinite when leaves without noise differ
    l2: float  # over all leaves
    shift: float  # distance in standard deviations of the noise
    covered: bool | None  # by a row of the certificate that has its bounds; None without a certificate
    beyond: float | None  # how much further than the largest such row it lies, 0 when covered
    draws_needed: int | None  # fewest draws of one upper bound that covers it; None where no float64 count would do


def coverage(
    params: Params,
    others: Mapping[str, Params],
    *,
    sigma: float | Params,
    certificate: DepthCertificate | None = None,
    q: float = 0.9,
    alpha: float = 0.01,
    only: str | None = None,
) -> tuple[Coverage, ...]:
    """The distance of each of `others` from `params`, whether a certificate of `params` covers it, and the draws it takes.

    Certificates are local: two training runs of one recipe lie tens of standard deviations apart, and no number of draws
    covers that.

    Args:
        params: the weights that the cloud is centred at.
        others: name -> weights of the same structure.
        sigma: of the noise, one number or a scale for each leaf; as the certificate was made.
        certificate: of `params`. Rows that abstained cover nothing, however large their eta; without a certificate nothing
            is said to be covered.
        q: share of the noise; of a certificate, the rows with this q.
        alpha: chance of failure of one upper bound, for `draws_needed`.
        only: regular expression of the leaves that the noise falls on; as the certificate was made.

    Returns:
        A `Coverage` for each of `others`.

    Raises:
        BadInput: for weights of another structure, and a certificate of another sigma or without rows at q.

    Example:
        >>> depth = certify.bound(draws, eta=(0.05, 1.0))  # say that eta = 1 abstained
        >>> certify.coverage(params, {"far": other}, sigma=0.1, certificate=depth)[0].covered  # 0.866 away
        False
    """
    scalar = number(sigma)
    require(only is None or scalar is not None, "give `only` with one number as sigma")
    montecarlo.check_sigma(params, sigma)
    scale = sigma if only is None or scalar is None else tree.scales(params, scalar, only=only)
    scales = [np.asarray(s, np.float64) for s in tree.leaf_scales(scale, params)]
    largest = None if certificate is None else _reach(certificate, q, scalar, tree.digest(scales))

    return tuple(_measured(name, params, other, scales, scalar, largest, q, alpha) for name, other in others.items())


def _measured(
    name: str,
    params: Params,
    other: Params,
    scales: list[np.ndarray],
    sigma: float | None,
    largest: float | None,
    q: float,
    alpha: float,
) -> Coverage:
    """Where one set of weights lies; `scales` of the noise on each leaf, `largest` the eta that is certified."""
    same = [(n, np.shape(a)) for n, a in zip(tree.names(params), jax.tree.leaves(params))] == [
        (n, np.shape(b)) for n, b in zip(tree.names(other), jax.tree.leaves(other))
    ]
    require(same, f"the weights {name!r} have another structure than the certified ones")
    moves = [np.asarray(b, np.float64) - np.asarray(a, np.float64) for a, b in zip(*map(jax.tree.leaves, (params, other)))]
    spread = [np.broadcast_to(scale, move.shape) for move, scale in zip(moves, scales, strict=True)]
    held = any(np.any(move[scale == 0]) for move, scale in zip(moves, spread))
    square = sum(np.sum(np.square(move[scale > 0] / scale[scale > 0])) for move, scale in zip(moves, spread))
    shift = np.inf if held else float(np.sqrt(square))
    distance = shift * (1.0 if sigma is None else sigma)
    tail = 0.0 if held else bounds.shifted_tail(q, shift)
    needed = None if tail == 0.0 else bounds.min_draws(1 - tail, alpha, tail=tail)
    l2 = float(np.sqrt(sum(np.sum(np.square(move)) for move in moves)))
    covered, beyond = (None, None) if largest is None else (distance <= largest, max(0.0, distance - max(largest, 0.0)))
    return Coverage(name, distance, l2, shift, covered, beyond, needed)


def _reach(certificate: DepthCertificate, q: float, sigma: float | None, noise: str) -> float:
    """The largest eta of the rows at q that have the bounds which were asked for; -1 where all of them abstained."""
    same = certificate.sigma == sigma and certificate.fingerprint.get("sigma", noise) == noise
    require(same, f"the certificate is of another noise (sigma = {certificate.sigma}) than sigma = {sigma}")
    rows = [row for row in certificate.rows if row.q == q]
    require(rows, f"the certificate has no row at q = {q}; its q are {sorted({row.q for row in certificate.rows})}")
    sides = ("upper", "lower") if certificate.side == "both" else (certificate.side,)
    return max((row.eta for row in rows if all(getattr(row, side) is not None for side in sides)), default=-1.0)
