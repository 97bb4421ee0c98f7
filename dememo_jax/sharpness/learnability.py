"""Sharpness-Aware Learnability (SAL): how far the loss can be moved through one weight tensor, or through one parameter.

SAL(l) = max over |d| <= r_l of |L(theta + d in tensor l) - L(theta)| with r_l = radius * |theta_l|, all other tensors fixed:
Ye, Su and Qian, ICLR 2025 (arXiv 2509.08058), Definition 1. L is the mean loss of the data in evaluation mode. Solvers:

"ball": the paper's, and the default for UD: plain SGD, up and down, `rounds` passes with the gradient as it is and rate `lr`,
    projected onto the ball after each pass; the best of the passes. Gradients vanish where the loss does, and the ascent then
    never reaches the ball: `stalled` names such layers, whose low value is no flatness. As published, the examples that fill no
    whole batch are left out of a pass, in a new order each time; pass augmented images as data where they are wanted.
"normalized": a stronger maximiser of the same definition: `rounds` steps of stride * r_l along the gradient of the whole mean.
"one_step": the form of SAM (Foret et al. 2021): one step of length r_l along the gradient, and one against it.
"hvp": the quadratic model r_l |g_l| + r_l^2 |v^T H_ll v| / 2 with v = g_l / |g_l|, by Hessian-vector products: exact, or from
    so many sign `probes` with standard errors. (The paper itself uses no Hessian.)
"diagonal": of every scalar, rho_i |g_i| + rho_i^2 |H_ii| / 2 with rho_i = radius |theta_i|; H_ii from `probes` (16), or exact
    with probes=0 for small trees. The absolute value of a noisy H_ii is biased upwards by about its error.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import arithmetic, callbacks, evaluate, keys, losses, models, tree
from dememo_jax.errors import NonFinite, require
from dememo_jax.sharpness import local, search
from dememo_jax.sharpness.landscape import loss_and_accuracy
from dememo_jax.sharpness.results import Measure, Sal
from dememo_jax.types import Apply, Dataset, Key, Loss, Params

SOLVERS = ("ball", "normalized", "one_step", "hvp", "diagonal")
STALL = 0.5  # an ascent that used less of the radius than this has stalled


class Case(NamedTuple):
    """What a solver is given."""

    apply: Apply
    params: Params
    data: Dataset
    key: Key
    radius: float
    norms: np.ndarray  # lengths of the chosen tensors, in tree order
    chosen: tuple[bool, ...]  # of the leaves
    baseline: float
    loss: Loss
    batch: int
    width: int | None
    after: Callable[[int, int], None] | None


def sal(
    apply: Apply, params: Params, data: Dataset,
    *, solver: str = "ball", granularity: str | None = None, radius: float = 0.05, only: str | None = None,
    key: Key | None = None, rounds: int = 10, lr: float = 0.1, stride: float = 0.25, probes: int | None = None,
    of: str = "hessian", running_loss: float | None = None, on: str = "train", test: Dataset | None = None,
    loss: Loss = losses.cross_entropy, batch: int = 256, width: int | None = None,
    after: Callable[[int, int], None] | None = None,
) -> Sal:  # fmt: skip
    """SAL in nats of every weight tensor (kernel), or of those that the regular expression `only` matches, on `data`.

    solver, with rounds, lr, stride, probes: as this module's docstring says.
    granularity: "layer" or "parameter"; only "diagonal" has the latter, its default, and its layers are means over scalars.
    of: "hessian", or "ggn" for the Gauss-Newton matrix, in "hvp" and "diagonal".
    running_loss: the published mixed mode: changes are counted from this loss, the mean of training mode over the epoch
        just finished, instead of from L(theta). It puts the progress within that epoch into SAL.
    on: what `data` are, for the record: the training data as the model saw them, their clean counterpart, the test set.
    test: examples for `test_accuracy`. key: of the order of batches and of probes; by default jax.random.key(0).
    width: layers (or probes) in one vmap; by default one after another for convolutions, all for dense networks.
    after(done, layers): progress of the two searches.
    Weights stored in half precision are raised to float32: what a small move does to the loss would be rounded away.
    Raises BadInput for a radius that is not positive, no such tensors, a tensor that is all zero (it has no relative
    radius), or fewer examples than one batch for "ball"; NonFinite, naming the tensor, when a loss is no number.
    """
    granularity = ("parameter" if solver == "diagonal" else "layer") if granularity is None else granularity
    _check(solver, granularity, radius, rounds, lr, stride, probes, running_loss, len(data.y), batch)
    tree.check_floating(params, "params")
    apply, params = models.as_apply(apply), tree.widened(params)
    layers, names = learnable_layers(apply, params, data.x[:1], only), tree.names(params)
    chosen = tuple(name in layers for name in names)
    norms = _norms(params, chosen, names)
    with jax.default_matmul_precision("highest"):
        before, right = _state(apply, params, data, loss, batch)
        baseline = before if running_loss is None else float(running_loss)
        key, batch = jax.random.key(0) if key is None else key, min(batch, len(data.y))
        case = Case(apply, params, data, key, radius, norms, chosen, baseline, loss, batch, width, after)
        if solver == "one_step":
            settings, found = _one_step(case)
        elif solver in ("ball", "normalized"):
            settings, found = _searched(case, search.How(solver, rounds, lr, stride, batch, loss))
        else:
            settings, found = _quadratic(case, solver, probes, of)
    mode = "evaluation" if running_loss is None else "mixed"
    measure = Measure(solver, granularity, float(radius), settings, mode, on, len(data.y), tuple(layers))
    on_test = None if test is None else float(evaluate.accuracy(apply, params, test))
    sizes = {name: int(leaf.size) for name, leaf in zip(names, jax.tree.leaves(params))}
    return _result(measure, [name for name in names if name in layers], found, baseline, right, sizes, on_test)


def learnable_layers(apply: Apply, params: Params, x, only: str | None = None) -> list[str]:
    """Names of the weight tensors that `sal` looks at, in the order in which the network uses them on images x [B, ...].

    Weights are told by what they do: tensors of rank two and more that the network multiplies its activations by, in a matrix
    product or a convolution, or looks rows up in (embeddings). So biases are none, whatever their shape (those of Flax's
    attention are [heads, d]), nor are norms, added positions and class tokens. A function without such products has all tensors
    of rank two and more. Or those that the regular expression `only` matches. BadInput when there are none.
    """
    names, leaves = tree.names(params), jax.tree.leaves(params)
    if only is not None:
        wanted = tree.matching(params, only)
    else:
        factors = frozenset().union(*(product.parameters for product in arithmetic.products(apply, params, x)))
        wanted = [leaf.ndim >= 2 and (name in factors or not factors) for name, leaf in zip(names, leaves)]
    require(any(wanted), f"there is no weight tensor of rank two or more; name leaves with only=: {', '.join(names)}")
    used = [name for group in models.layers(apply, params, x) for name in group]
    rank = {name: i for i, name in enumerate(used)}
    chosen = [name for name, keep in zip(names, wanted) if keep]
    return sorted(chosen, key=lambda name: rank.get(name, len(rank)))


def _check(solver, granularity, radius, rounds, lr, stride, probes, running_loss, count, batch) -> None:
    require(solver in SOLVERS, f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    require(granularity in ("layer", "parameter"), f"granularity must be 'layer' or 'parameter', got {granularity!r}")
    require(
        granularity == "layer" or solver == "diagonal",
        f"solver {solver!r} moves whole tensors: it has one number a layer; for one a parameter use solver='diagonal'",
    )
    require(0 < radius < float("inf"), f"the radius, a share of a tensor's length, must be positive and finite, got {radius}")
    require(rounds >= 1 and lr > 0 and stride > 0, f"need rounds >= 1, lr > 0 and stride > 0, got {rounds}, {lr}, {stride}")
    require(probes is None or probes >= 0, f"probes must be a count, or 0 for exact curvature; got {probes}")
    require(batch >= 1 and count >= 1, f"need at least one example and one in a batch, got {count} and {batch}")
    fits = solver != "ball" or count >= batch
    require(fits, f"the data hold {count} examples, less than one batch of {batch}: a pass would make no step; lower batch")
    compares = running_loss is None or solver in ("ball", "normalized", "one_step")
    require(compares, f"solver {solver!r} compares no losses: a running_loss (the mixed mode) means nothing to it")
    finite = running_loss is None or np.isfinite(running_loss)
    require(finite, f"the running_loss must be a number, got {running_loss}")


def _norms(params: Params, chosen: tuple[bool, ...], names: list[str]) -> np.ndarray:
    found = [(name, float(tree.norm(leaf))) for name, leaf, keep in zip(names, jax.tree.leaves(params), chosen) if keep]
    zero = [name for name, norm in found if norm == 0]
    require(not zero, f"{', '.join(zero)}: all zero, so a radius relative to its length would be 0; leave it out with only=")
    return np.array([norm for _, norm in found], np.float32)


_call = jax.jit(lambda metric, params, data: metric(params, data))


def _state(apply, params, data, loss, batch) -> tuple[float, float]:
    """Mean loss and accuracy, in one pass."""
    before, right = map(float, _call(loss_and_accuracy(apply, loss=loss, batch=batch), params, data))
    if not np.isfinite(before):
        raise NonFinite(f"the loss of the network is {before} before any perturbation; check weights and data")
    return before, right


# --- solvers: the settings for the record, and what was found for every chosen tensor in tree order ------------------

Settings = tuple[tuple[str, float | int | str], ...]


def _width(case: Case, lanes: int) -> int:
    """As asked, or one for convolutions: a vmap over weights turns them into grouped ones, which are slow."""
    convolutional = any(leaf.ndim > 2 for leaf in jax.tree.leaves(case.params))
    return case.width or (1 if convolutional else lanes)


def _searched(case: Case, how: search.How) -> tuple[Settings, dict[str, Any]]:
    places = np.flatnonzero(case.chosen)
    width, parts = _width(case, len(places)), []
    given = case.apply, case.params, case.data, case.key
    radii = jnp.asarray(case.radius * case.norms)
    for begin in range(0, len(places), width):
        if width == 1:
            found = search.one_layer(*given, radii[begin], case.baseline, at=int(places[begin]), how=how)
            parts.append(np.asarray(found)[:, None])
        else:
            rows = np.minimum(np.arange(begin, begin + width), len(places) - 1)  # always as many: one compiled program
            at = jnp.asarray(places[rows])
            found = search.many_layers(*given, radii[rows], case.baseline, at, how=how, width=width)
            parts.append(np.asarray(found)[:, : len(places) - begin])
        if case.after is not None:
            callbacks.reports(case.after(min(begin + width, len(places)), len(places)))
    change, fraction = np.concatenate(parts, axis=1).transpose(0, 2, 1)
    own = ("lr", how.lr) if how.solver == "ball" else ("stride", how.stride)
    return (("batch", how.batch), ("rounds", how.rounds), own), _by_change(change, fraction)


def _one_step(case: Case) -> tuple[Settings, dict[str, Any]]:
    found = local.one_step(
        case.apply, case.params, case.data, case.radius * case.norms, case.baseline,
        chosen=case.chosen, loss=case.loss, batch=case.batch, width=_width(case, 2 * len(case.norms)),
    )  # fmt: skip
    return (), _by_change(np.asarray(found.change), np.tile(1.0 - np.asarray(found.still), (2, 1)))


def _quadratic(case: Case, solver: str, probes: int | None, of: str) -> tuple[Settings, dict[str, Any]]:
    probes = (16 if solver == "diagonal" else 0) if probes is None else probes
    work, reach = (local.quadratic, case.radius * case.norms) if solver == "hvp" else (local.of_parameters, case.radius)
    found = work(
        case.apply, case.params, case.data, reach, keys.named(case.key, "probes"), chosen=case.chosen, loss=case.loss,
        batch=case.batch, probes=probes or None, width=case.width or 4, of=of,
    )  # fmt: skip
    stalled = np.asarray(found.still)
    return (("probes", probes), ("of", of)), {"value": found.value, "error": found.error, "stalled": stalled}


def _by_change(change: np.ndarray, fraction: np.ndarray) -> dict[str, Any]:
    """change and fraction [2, L]: by ascent, by descent."""
    both = {"rise": change[0], "fall": change[1], "radius_fraction": fraction[0], "fall_fraction": fraction[1]}
    return {"value": change.max(axis=0), **both, "stalled": fraction[0] < STALL}


def _result(measure: Measure, kept: list[str], found: dict, loss: float, right: float, sizes: dict, on_test) -> Sal:
    each: dict[str, Any] = {}
    for what, values in found.items():
        if what == "stalled" or values is None:
            continue
        each[what] = {layer: np.asarray(values[kept.index(layer)], np.float64) for layer in measure.layers}
        bad = [layer for layer, v in each[what].items() if what != "error" and not np.isfinite(v).all()]
        if bad:
            raise NonFinite(f"the {what} of {bad[0]} is not finite: the search left the numbers; lower lr or the radius")
        if measure.granularity == "layer":  # the mean of errors is the most that the error of a mean can be
            each[what] = {layer: float(np.mean(v)) for layer, v in each[what].items()}
    stalled = tuple(layer for layer in measure.layers if found["stalled"][kept.index(layer)])
    own = {layer: sizes[layer] for layer in measure.layers}
    return Sal(measure, loss=loss, accuracy=right, sizes=own, test_accuracy=on_test, stalled=stalled, **each)
