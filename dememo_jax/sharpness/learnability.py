"""Sharpness-Aware Learnability (SAL): how far the loss can be moved through one tensor, or through one parameter."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import curvature, evaluate, keys, losses, models, tree
from dememo_jax.errors import NonFinite, require
from dememo_jax.sharpness import local, search
from dememo_jax.sharpness.results import Measure, Sal
from dememo_jax.types import Apply, Dataset, Key, Loss, Params

SOLVERS = ("ball", "normalized", "one_step", "hvp", "diagonal")
STALL = 0.5  # an ascent that used less of the radius than this has stalled


def sal(
    apply: Apply,
    params: Params,
    data: Dataset,
    *,
    solver: str = "ball",
    granularity: str | None = None,
    radius: float = 0.05,
    only: str | None = None,
    key: Key | None = None,
    rounds: int = 10,
    lr: float = 0.1,
    stride: float = 0.25,
    probes: int | None = None,
    of: str = "hessian",
    running_loss: float | None = None,
    on: str = "train",
    test: Dataset | None = None,
    loss: Loss = losses.cross_entropy,
    batch: int = 256,
    width: int | None = None,
    after: Callable[[int, int], None] | None = None,
) -> Sal:
    """SAL of every weight tensor (kernel), or those that the regular expression `only` matches, on `data`, in nats.

    SAL(l) = max over |d| <= r_l of |L(theta + d in tensor l) - L(theta)|, r_l = radius * |theta_l|, all other tensors
    fixed (Ye, Su and Qian, ICLR 2025, Definition 1). L is the mean loss in evaluation mode. Solvers:

    "ball": the paper's and the default for UD: plain SGD, up and down, `rounds` passes with the gradient as it is and rate
        `lr`, projected onto the ball after each pass; best of the passes. Gradients vanish where the loss does, and the
        ascent then never reaches the ball: `stalled` names such layers, whose low value is no flatness. As published, the
        examples that fill no whole batch are left out of a pass, in a new order each time.
    "normalized": the stronger maximiser of the same definition: `rounds` steps of stride * r_l along the whole gradient.
    "one_step": the form of SAM (Foret et al. 2021): one step of length r_l along the gradient and one against it.
    "hvp": the quadratic model r_l |g_l| + r_l^2 |v^T H_ll v| / 2, v = g_l / |g_l|, by Hessian-vector products; exact, or
        from so many sign `probes` with standard errors. (The paper itself uses no Hessian.)
    "diagonal": of every scalar, rho_i |g_i| + rho_i^2 |H_ii| / 2, rho_i = radius |theta_i|; H_ii from `probes` (16), or
        exactly with probes=0 for small trees. Absolute values of noisy H_ii are biased upwards by about the error.

    granularity: "layer" or "parameter"; only "diagonal" has the latter, its default, and its layers are means over scalars.
    of: "hessian", or "ggn" for the Gauss-Newton matrix, in "hvp" and "diagonal".
    running_loss: the published mixed mode: changes are counted from this loss, the mean of training mode over the epoch
        just finished, instead of from L(theta). It puts the progress within that epoch into SAL.
    on: what `data` are, for the record: the training data as the model saw them, their clean counterpart, the test set.
    test: examples for `test_accuracy`. key: of the order of batches and of probes; by default jax.random.key(0).
    width: layers (or probes) in one vmap; by default one after another for convolutions, all for dense networks.
    after(done, layers): progress of the two searches.
    Raises BadInput for a radius that is not positive, no such tensors, a tensor that is all zero (it has no relative
    radius), or fewer examples than one batch for "ball"; NonFinite, naming the tensor, when a loss is no number.
    """
    granularity = ("parameter" if solver == "diagonal" else "layer") if granularity is None else granularity
    _check(solver, granularity, radius, rounds, lr, stride, probes, running_loss, len(data.y), batch)
    tree.check_floating(params, "params")
    apply, key = models.as_apply(apply), jax.random.key(0) if key is None else key
    layers = learnable_layers(apply, params, data.x[:1], only)
    names = tree.names(params)
    chosen = tuple(name in layers for name in names)
    kept = [name for name in names if name in layers]  # in tree order
    norms = _norms(params, chosen, kept)
    settings: dict[str, float | int | str] = {"batch": batch}
    settings |= {"ball": {"rounds": rounds, "lr": lr}, "normalized": {"rounds": rounds, "stride": stride}}.get(solver, {})  # type: ignore[dict-item]
    with jax.default_matmul_precision("highest"):
        before, right = _state(apply, params, data, loss, batch)
        baseline = before if running_loss is None else float(running_loss)
        common = {"chosen": chosen, "loss": loss, "batch": min(batch, len(data.y))}
        if solver in ("ball", "normalized"):
            how = search.How(solver, rounds, lr, stride, min(batch, len(data.y)), loss)
            width = _usual(params, len(kept)) if width is None else width
            found = _searched(apply, params, data, key, radius * norms, baseline, chosen, how, width, after)
        elif solver == "one_step":
            width = _usual(params, 2 * len(kept)) if width is None else width
            one = local.one_step(apply, params, data, radius * norms, baseline, width=width, **common)
            found = _by_change(np.asarray(one.change), np.tile(1.0 - np.asarray(one.still), (2, 1)))
        else:
            probes = (16 if solver == "diagonal" else None) if probes is None else (probes or None)
            settings |= {"probes": probes or 0, "of": of}
            reach, work = (radius * norms, local.quadratic) if solver == "hvp" else (radius, local.of_parameters)
            one = work(apply, params, data, reach, keys.named(key, "probes"), probes=probes, width=width or 4, of=of, **common)
            found = {"value": one.value, "error": one.error, "stalled": np.asarray(one.still)}
    on_test = None if test is None else float(evaluate.accuracy(apply, params, test))
    mode = "evaluation" if running_loss is None else "mixed"
    measure = Measure(solver, granularity, float(radius), tuple(settings.items()), mode, on, len(data.y), tuple(layers))
    sizes = {name: int(leaf.size) for name, leaf in zip(names, jax.tree.leaves(params))}
    return _result(measure, kept, found, baseline, right, sizes, on_test)


def learnable_layers(apply: Apply, params: Params, x, only: str | None = None) -> list[str]:
    """Names of the weight tensors that `sal` looks at, in the order in which the network uses them on images x [B, ...].

    Tensors of rank two and more (no biases, no batch norm), or those that the regular expression `only` matches. BadInput
    when there are none.
    """
    names, leaves = tree.names(params), jax.tree.leaves(params)
    wanted = tree.matching(params, only) if only is not None else [leaf.ndim >= 2 for leaf in leaves]
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


def _norms(params: Params, chosen, kept) -> np.ndarray:
    leaves = [leaf for leaf, keep in zip(jax.tree.leaves(params), chosen) if keep]
    norms = np.array([float(tree.norm(leaf)) for leaf in leaves])
    zero = [name for name, norm in zip(kept, norms) if norm == 0]
    require(not zero, f"{', '.join(zero)}: all zero, so a radius relative to its length would be 0; leave it out with only=")
    return norms.astype(np.float32)


def _usual(params: Params, lanes: int) -> int:
    """A vmap over weights turns convolutions into grouped ones, which are slow."""
    return 1 if any(leaf.ndim > 2 for leaf in jax.tree.leaves(params)) else lanes


def _state(apply, params, data, loss, batch) -> tuple[float, float]:
    before = float(jax.jit(curvature.mean_loss, static_argnames=("loss", "batch"))(apply, params, data, loss=loss, batch=batch))
    if not np.isfinite(before):
        raise NonFinite(f"the loss of the network is {before} before any perturbation; check weights and data")
    return before, float(evaluate.accuracy(apply, params, data))


def _searched(apply, params, data, key, radii, baseline, chosen, how, width, after) -> dict:
    places = [i for i, keep in enumerate(chosen) if keep]
    parts = []
    for begin in range(0, len(places), width):
        here = places[begin : begin + width]
        if width == 1:
            found = search.one_layer(apply, params, data, key, radii[begin], baseline, at=here[0], how=how)
            parts.append(np.asarray(found)[:, None])
        else:
            padded = here + here[-1:] * (width - len(here))
            reach = jnp.asarray(radii)[jnp.asarray([places.index(i) for i in padded])]
            at = jnp.asarray(padded)
            found = search.many_layers(apply, params, data, key, reach, baseline, at, how=how, width=width)
            parts.append(np.asarray(found)[:, : len(here)])
        if after is not None:
            after(begin + len(here), len(places))
    change, fraction = np.concatenate(parts, axis=1).transpose(0, 2, 1)
    return _by_change(change, fraction)


def _by_change(change: np.ndarray, fraction: np.ndarray) -> dict:
    """change and fraction [2, L]."""
    both = {"rise": change[0], "fall": change[1], "radius_fraction": fraction[0], "fall_fraction": fraction[1]}
    return {"value": change.max(axis=0), **both, "stalled": fraction[0] < STALL}


def _result(measure: Measure, kept: list[str], found: dict, loss: float, right: float, sizes: dict, on_test) -> Sal:
    arrays = {name: values for name, values in found.items() if name != "stalled" and values is not None}
    each = {name: {k: np.asarray(v, np.float64) for k, v in zip(kept, values)} for name, values in arrays.items()}
    for name, by_layer in each.items():
        bad = [layer for layer, v in by_layer.items() if not (np.isfinite(v).all() or name == "error")]
        if bad:
            raise NonFinite(f"the {name} of {bad[0]} is not finite: the search left the numbers; lower lr or the radius")
    if measure.granularity == "layer":
        # Signs of neighbouring errors are unknown: their mean is an upper limit of the mean's error.
        each = {name: {k: float(np.mean(v)) for k, v in by_layer.items()} for name, by_layer in each.items()}
    ordered = {name: {k: by_layer[k] for k in measure.layers} for name, by_layer in each.items()}
    stalled = tuple(k for k in measure.layers if found["stalled"][kept.index(k)])
    own = {k: sizes[k] for k in measure.layers}
    return Sal(measure, loss=loss, accuracy=right, sizes=own, test_accuracy=on_test, stalled=stalled, **ordered)
