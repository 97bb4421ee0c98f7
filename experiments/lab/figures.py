"""The pictures of `RESULTS.md`: cells to line plots."""

from collections.abc import Callable

import numpy as np

from dememo_jax.report import Plot
from lab import tables, text_tables
from lab.classes import class_kind

Cells = dict[str, dict]


def share(found: Cells) -> Plot:
    """Figure 19."""
    curves: dict[str, dict[float, list[float]]] = {}
    for name, cell in found.items():
        kind, share = name.split(".")
        for label, value in ((kind, cell["value"]["perturbed"]), ("clean part alone", cell["value"]["clean part alone"])):
            if value is not None:
                curves.setdefault(label, {}).setdefault(float(share), []).append(value)
    return Plot("figure19", "Share of perturbed images", "share, %", "test accuracy", means(curves))


def means(curves: dict[str, dict[float, list[float]]]) -> tuple:
    """Series of a plot: the mean of what each curve has at each place."""
    return tuple((label, tuple(sorted(at)), tuple(float(np.mean(at[x])) for x in sorted(at))) for label, at in curves.items())


def radius(found: Cells) -> Plot:
    """Figure 9."""
    series = tuple(
        (kind, (0.0, *(row["radius"] for row in cell["value"])),
         (cell["value"][0]["accuracy"][0], *(max(row["accuracy"]) for row in cell["value"])))
        for kind, cell in found.items() if cell["value"]
    )  # fmt: skip
    return Plot("figure09", "Recovery of what perturbations hide", "radius", "test accuracy, best", series)


def recovery(found: Cells) -> Plot:
    """Figures 2, 10, 11, 13-18 in one: curves of the attack at the largest radius, means over perturbations and classes."""
    curves: dict[str, list] = {}
    largest = max(row["radius"] for cell in found.values() for row in cell["value"])
    for name, cell in found.items():
        for row in cell["value"]:
            if row["radius"] == largest and row["scale"] != "large":
                curves.setdefault(f"{row['method']}: {class_kind(name)}", []).append(row["accuracy"])
    series = tuple(
        (label, tuple(float(i) for i in range(len(each[0]))), tuple(float(y) for y in np.mean(each, axis=0)))
        for label, each in sorted(curves.items())
    )
    return Plot(
        "figure02", f"Recovery of a class, radius {largest:g}, small scales", "epoch of the attack", "class accuracy", series
    )


def augmented(found: Cells) -> Plot | None:
    """Figure 4: ViT with and without augmentation."""
    ours = {how: tables.efficacy(found, how) for how in ("augmented", "plain")}
    kinds = [
        kind
        for kind in ours["augmented"]
        if "vit_tiny" in ours["augmented"][kind] and "vit_tiny" in ours["plain"].get(kind, {})
    ]
    if not kinds:
        return None
    at = tuple(float(i) for i in range(len(kinds)))
    series = tuple((how, at, tuple(each[kind]["vit_tiny"] for kind in kinds)) for how, each in ours.items())
    return Plot(
        "figure04", "ViT: " + ", ".join(kind[0] for kind in kinds), "training data, in this order", "test accuracy", series
    )


def membership(found: Cells) -> Plot:
    """Figures 5-8: success of the probability attack over the retrained network's, by class, means over perturbations."""
    gaps: dict[str, dict[float, list[float]]] = {}
    for name, cell in found.items():
        label = float(name.split(".")[1])
        scores = {(row["method"], row["scale"]): row["membership"] for row in cell["value"]}
        for (method, scale), score in scores.items():
            if score and method not in ("RT",) and scale != "large" and scores["RT", ""]:
                gap = score["probability"] - scores["RT", ""]["probability"]
                gaps.setdefault(method, {}).setdefault(label, []).append(gap)
    return Plot("figure05", "Membership over retraining", "class", "success of the probability attack, gap", means(gaps))


DRAWN: dict[str, tuple[Callable[[Cells], Plot | None], ...]] = {
    "table03": (augmented,), "table14": (membership,), "figure02": (recovery,), "figure09": (radius,), "figure19": (share,),
    "figure12": (text_tables.curves,),
}  # fmt: skip
