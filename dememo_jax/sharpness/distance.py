"""Unlearnable Distance (UD): how many layers a poisoned model could still learn through, against a clean one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dememo_jax import bounds
from dememo_jax.errors import require
from dememo_jax.sharpness.results import Measure, Sal

RULES = ("epochs", "pooled", "median")


@dataclass(frozen=True)
class Distance:
    """UD, and what it must be read with. It cannot be ordered: `compared` does that, for one measure only."""

    distance: float  # learnable layers (or parameters) of the poisoned model over those of the clean one; 1: alike
    threshold: float  # beta, nats: above it a layer counts as learnable
    poisoned: tuple[float, ...]  # how many, at every epoch
    clean: tuple[float, ...]
    ratio: float  # mean SAL of the poisoned over that of the clean model: the same question without a threshold
    epochs: int  # T, how many were measured; UD depends on it
    weighting: str
    rule: str
    measure: Measure
    test_accuracy: float | None  # of the poisoned model at the last epoch
    clean_test_accuracy: float | None
    stalled: float  # share of (layer, epoch) whose ascent stalled: low SAL there is no flatness
    clean_stalled: float


@dataclass(frozen=True)
class Compared:
    order: tuple[str, ...]  # from the least learnable
    correlation: float | None  # Spearman's, of UD and test accuracy; None for fewer than three, or equal ones
    p_value: float | None


def two_means(values) -> float:
    """The midpoint between the centres of the best two clusters of numbers, exactly: k-means with k = 2 in one dimension.

    Every split of the sorted values is tried, in float64; no start to choose, no local optimum. Between equally good splits
    the lowest. BadInput for fewer than two values or one that is not finite.
    """
    x = np.sort(np.asarray(values, np.float64).ravel())
    require(len(x) >= 2, f"two clusters need at least two values, got {len(x)}")
    require(np.isfinite(x).all(), "two clusters need finite values")
    if x[0] == x[-1]:
        return float(x[0])  # to the bit, so that none of them lies above it
    x0 = x - x.mean()  # the sums below keep their digits
    left, count = np.cumsum(x0)[:-1], np.arange(1, len(x))
    gain = left**2 / count + (x0.sum() - left) ** 2 / (len(x) - count)  # of squares explained
    at = int(np.argmax(gain))
    return float((x[: at + 1].mean() + x[at + 1 :].mean()) / 2)


def learnable_threshold(clean: Sequence[Sal], *, rule: str = "epochs") -> float:
    """beta of the paper's Definition 2, from the clean model over epochs: above it SAL counts as learnable.

    rule: "epochs", as the published code: the mean over epochs of `two_means` of that epoch; "pooled": `two_means` of all
    epochs together; "median" of all, to see how much the rule matters.
    """
    require(rule in RULES, f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    require(len(clean), "a threshold needs the clean model at one epoch at least")
    _check_measure(clean, clean[0].measure)
    epochs = [np.concatenate([np.ravel(one.value[name]) for name in one.measure.layers]) for one in clean]
    if rule == "epochs":
        return float(np.mean([two_means(values) for values in epochs]))
    together = np.concatenate(epochs)
    return two_means(together) if rule == "pooled" else float(np.median(together))


def unlearnable_distance(
    poisoned: Sequence[Sal],
    clean: Sequence[Sal],
    *,
    weighting: str = "layer",
    rule: str = "epochs",
    decimals: int | None = None,
) -> Distance:
    """UD of a poisoned model, #LP(poisoned) / #LP(clean), each the mean over epochs of how many layers have SAL above beta.

    Ye, Su and Qian, ICLR 2025, Definition 3 and Algorithm 1. Both are measured at the same epochs, one Sal each. Lower:
    less learnable. 1 for the clean model itself; no metric in spite of its name.
    weighting: "layer" counts tensors alike, as the published code; "parameter" counts their scalars. decimals: round SAL
    first (published: 4). rule: as `learnable_threshold`.
    Raises BadInput when the two were measured in different ways or at different numbers of epochs, and when no layer of the
    clean model is learnable: UD is then undefined.
    """
    require(weighting in ("layer", "parameter"), f"weighting must be 'layer' or 'parameter', got {weighting!r}")
    require(len(poisoned) and len(clean), "UD needs both models at one epoch at least")
    lengths = len(poisoned), len(clean)
    require(lengths[0] == lengths[1], f"UD averages over the same epochs of both models, got {lengths[0]} and {lengths[1]}")
    measure = clean[0].measure
    _check_measure([*poisoned, *clean], measure)
    each = measure.granularity == "parameter"
    require(not each or weighting == "parameter", "SAL of parameters has no layers to count: use weighting='parameter'")
    if decimals is not None:
        poisoned, clean = ([_rounded(one, decimals) for one in part] for part in (poisoned, clean))
    beta = learnable_threshold(clean, rule=rule)
    counts = [tuple(_learnable(one, beta, weighting) for one in part) for part in (poisoned, clean)]
    unit = "layer" if weighting == "layer" else "parameter"
    require(
        sum(counts[1]) > 0,
        f"no {unit} of the clean model is learnable: none has SAL above the threshold {beta:g}, so UD is undefined. All alike? "
        "Train it longer, or enlarge the radius",
    )
    means = [np.mean([_mean(one, weighting) for one in part]) for part in (poisoned, clean)]
    stalls = [float(np.mean([len(one.stalled) / len(measure.layers) for one in part])) for part in (poisoned, clean)]
    return Distance(
        distance=sum(counts[0]) / sum(counts[1]), threshold=beta, poisoned=counts[0], clean=counts[1],
        ratio=float(means[0] / means[1]), epochs=lengths[0], weighting=weighting, rule=rule, measure=measure,
        test_accuracy=poisoned[-1].test_accuracy, clean_test_accuracy=clean[-1].test_accuracy, stalled=stalls[0],
        clean_stalled=stalls[1],
    )  # fmt: skip


def compared(distances: Mapping[str, Distance]) -> Compared:
    """Order of several UD and their rank correlation with test accuracy; BadInput unless all are of one kind.

    One kind: measured by one solver with the same settings, at as many epochs, with the same weighting and rule.
    """
    require(len(distances), "there is nothing to compare")
    first, *others = distances.items()
    for other in others:
        kinds = [(d.measure, d.epochs, d.weighting, d.rule) for _, d in (first, other)]
        words = "; ".join(_in_words(*named) for named in (first, other))
        require(kinds[0] == kinds[1], f"UD measured in different ways cannot be compared: {words}")
    order = tuple(sorted(distances, key=lambda name: distances[name].distance))
    known = [(d.distance, d.test_accuracy) for d in distances.values() if d.test_accuracy is not None]
    return Compared(order, *bounds.rank_correlation(*zip(*known)) if len(known) == len(distances) else (None, None))


def _in_words(name: str, d: Distance) -> str:
    how = f"{d.measure.solver}, radius {d.measure.radius:g}, {d.measure.mode} mode on {d.measure.on}"
    return f"{name}: {how}, {d.epochs} epochs, by {d.weighting}, rule {d.rule}"


def _check_measure(parts: Sequence[Sal], measure: Measure) -> None:
    for part in parts:
        names = [f for f in Measure.__dataclass_fields__ if getattr(part.measure, f) != getattr(measure, f)]
        differing = "; ".join(f"{name} {getattr(part.measure, name)!r} and {getattr(measure, name)!r}" for name in names)
        require(not names, f"SAL measured in different ways cannot be compared: {differing}")


def _rounded(one: Sal, decimals: int) -> Sal:
    return Sal(**{**vars(one), "value": {name: np.round(value, decimals) for name, value in one.value.items()}})


def _learnable(one: Sal, beta: float, weighting: str) -> float:
    weights = _weights(one, weighting)
    return float(sum(weights[name] * np.sum(np.asarray(value) > beta) for name, value in one.value.items()))


def _mean(one: Sal, weighting: str) -> float:
    weights = _weights(one, weighting)
    total = sum(weights[name] * np.size(value) for name, value in one.value.items())
    return float(sum(weights[name] * np.sum(value) for name, value in one.value.items()) / total)


def _weights(one: Sal, weighting: str) -> dict[str, int]:
    """Of every number: a layer's number stands for one layer, or for all its scalars; a scalar's for itself."""
    whole = weighting == "parameter" and one.measure.granularity == "layer"
    return {name: one.sizes[name] if whole else 1 for name in one.value}
