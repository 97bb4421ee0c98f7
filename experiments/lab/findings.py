"""What the paper found, as rules that are asked of its numbers and of ours alike: who is above whom, what rises, what falls.

Numbers are looked up as {(perturbation, network or class, method, scale): {set or attack: share in 0..1}}.
"""

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

PAPER = Path(__file__).parent.parent / "paper"
Numbers = Mapping[tuple[str, ...], Mapping[str, float]]


class Finding(NamedTuple):
    """`sides(numbers)` gives two numbers, of which the first is to be the larger."""

    table: str
    says: str
    sides: Callable[[Numbers], tuple[float, float]]


def published(file: str, keys: tuple[str, ...], part: str, value: str, **where: str) -> dict:
    """Numbers of one of the paper's tables."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    scale = 1.0 if value == "success_rate" else 100.0
    with (PAPER / f"{file}.csv").open() as rows:
        for row in csv.DictReader(rows):
            if row[value] and all(row[name] == wanted for name, wanted in where.items()):
                key = tuple(row[name].lower() if name == "perturbation" else row[name] for name in keys)
                found.setdefault(key, {})[row[part]] = float(row[value]) / scale
    return found


def mean(numbers: Numbers, part: str, **wanted: Iterable[str]) -> float:
    """Mean of a part over the rows whose key has one of the wanted words at each named place; NaN where there are none."""
    places = {"kind": 0, "at": 1, "method": 2, "scale": 3, "forgot": 4}
    rows = [
        row[part] for key, row in numbers.items()
        if part in row and all(len(key) > places[name] and key[places[name]] in words for name, words in wanted.items())
    ]  # fmt: skip
    return float(np.mean(rows)) if rows else float("nan")


def best(numbers: Numbers, kinds: Iterable[str]) -> float:
    """The largest accuracy of the residual network; NaN, which gives no verdict, while one of them is not there yet."""
    return float(np.max([mean(numbers, "resnet18", kind=(kind,)) for kind in kinds]))


PERTURBED = ("ue-c", "pue", "ops", "ue-s", "tue", "tap")
DARK, CLEAR = ("0", "1", "2", "3"), ("4", "5", "6", "7")

EFFICACY = (
    Finding("3", "Networks learn less from any perturbed set than from clean data (clean; the best perturbed)",
            lambda n: (mean(n, "resnet18", kind=("clean",)), best(n, PERTURBED))),
    Finding("3", "PUE holds back residual networks and not ViT (ViT under PUE; ResNet-18 under PUE)",
            lambda n: (mean(n, "vit_tiny", kind=("pue",)), mean(n, "resnet18", kind=("pue",)))),
    Finding("3", "OPS is the weakest of the six on ResNet-18 (OPS; the best other)",
            lambda n: (mean(n, "resnet18", kind=("ops",)),
                       best(n, [k for k in PERTURBED if k != "ops"]))),
)  # fmt: skip

CLASS = (
    Finding("14-17", "A protected class is known by its perturbation only (Du before; Duc before)",
            lambda n: (mean(n, "Du", method=("Before",)), mean(n, "Duc", method=("Before",)))),
    Finding("14-17", "Retraining leaves nothing of the class (0.01; Dut and Dct after retraining)",
            lambda n: (0.01, float(np.max([mean(n, part, method=("RT",)) for part in ("Dut", "Dct")])))),
    Finding("14-17", "At the small scale perturbed images are harder to forget than clean ones (Du; Dc; mean of IF, FT, GA)",
            lambda n: (mean(n, "Du", scale=("small",)), mean(n, "Dc", scale=("small",)))),
    Finding("14-17", "The large scale forgets more of them (Du at the small; at the large scale)",
            lambda n: (mean(n, "Du", scale=("small",)), mean(n, "Du", scale=("large",)))),
    Finding("14-17", "and costs the observed classes more (Dtr at the small; at the large scale)",
            lambda n: (mean(n, "Dtr", scale=("small",)), mean(n, "Dtr", scale=("large",)))),
    Finding("14-17", "Influence functions cost the observed classes more than fine-tuning (Dtr after FT; after IF, large)",
            lambda n: (mean(n, "Dtr", method=("FT",), scale=("large",)), mean(n, "Dtr", method=("IF",), scale=("large",)))),
)  # fmt: skip

SUBSET = (
    Finding("10-13", "Retraining without Du keeps Dc (Dc; Du after retraining without Du)",
            lambda n: (mean(n, "Dc", method=("RT",), forgot=("Du",)), mean(n, "Du", method=("RT",), forgot=("Du",)))),
    Finding("10-13", "Retraining without Dc takes the clean form of the class away (Duc without Du; without Dc)",
            lambda n: (mean(n, "Duc", method=("RT",), forgot=("Du",)), mean(n, "Duc", method=("RT",), forgot=("Dc",)))),
    Finding("10-13", "Large scales forget more of Du (Du at the small; at the large scale, forgetting Du)",
            lambda n: (mean(n, "Du", scale=("small",), forgot=("Du",)), mean(n, "Du", scale=("large",), forgot=("Du",)))),
    Finding("10-13", "Large scales cost test accuracy (Dt at the small; at the large scale)",
            lambda n: (mean(n, "Dt", scale=("small",)), mean(n, "Dt", scale=("large",)))),
)  # fmt: skip

_CLASS_MEMBERSHIP = (
    Finding("19-25", "A class that retraining never saw is called a member all the same (probability attack after RT; 0.25)",
            lambda n: (mean(n, "probability", method=("RT",)), 0.25)),
    Finding("19-25", "At the small scale clean classes are remembered more than protected ones (correctness of 4-7; of 0-3)",
            lambda n: (mean(n, "correctness", at=CLEAR, method=("Before",)),
                       mean(n, "correctness", at=DARK, method=("Before",)))),
)  # fmt: skip
_SUBSET_MEMBERSHIP = (
    Finding("18-24", "Retraining without Du leaves its clean counterparts members (probability after RT; half of Before)",
            lambda n: (mean(n, "probability", method=("RT",)), mean(n, "probability", method=("Before",)) / 2)),
    Finding("18-24", "Large scales take membership below the retrained network's (probability after RT; at the large scale)",
            lambda n: (mean(n, "probability", method=("RT",)), mean(n, "probability", scale=("large",)))),
)  # fmt: skip
MEMBERSHIP = {"class": _CLASS_MEMBERSHIP, "subset": _SUBSET_MEMBERSHIP}

RECOVERY = (
    Finding("2, 10-18", "An unlearned class comes back in the ball (small scales: best of the attack; before)",
            lambda n: (mean(n, "back", scale=("small",)), mean(n, "before", scale=("small",)))),
    Finding("2, 10-18", "and further than from the retrained network (small scales; RT)",
            lambda n: (mean(n, "back", scale=("small",)), mean(n, "back", method=("RT",)))),
    Finding("2, 10-18", "Large scales are forgotten more deeply (small; large scales)",
            lambda n: (mean(n, "back", scale=("small",)), mean(n, "back", scale=("large",)))),
)  # fmt: skip

TEXT = (
    Finding("4", "RegText takes accuracy from the tasks (clean; RegText)",
            lambda n: (mean(n, "clean"), mean(n, "regtext"))),
    Finding("4", "Retraining without a task leaves less of it (RegText; retrained)",
            lambda n: (mean(n, "regtext"), mean(n, "retrain"))),
    Finding("4", "Fine-tuning forgets least (FT; the better of GA and NPO)",
            lambda n: (mean(n, "ft"), float(np.max([mean(n, "ga"), mean(n, "npo")])))),
    Finding("4", "GA and NPO leave more than retraining (the lesser of them; retrained)",
            lambda n: (float(np.min([mean(n, "ga"), mean(n, "npo")])), mean(n, "retrain"))),
)  # fmt: skip

TEXT_RECOVERY = (
    Finding("12", "A modest ball brings an unlearned task back (NPO: best of the attack; before)",
            lambda n: (mean(n, "back", kind=("NPO",)), mean(n, "before", kind=("NPO",)))),
    Finding("12", "and further than from the retrained network (mean of FT, GA, NPO; RT)",
            lambda n: (mean(n, "back", kind=("FT", "GA", "NPO")), mean(n, "back", kind=("RT",)))),
)  # fmt: skip
