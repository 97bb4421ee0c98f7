"""SoK Table 5, whether perturbations and unlearning help each other, computed from cells by stated rules and not judged.

Each rule takes numbers as `lab.findings` looks them up and gives a gain, positive where the two help each other. A sign stands
for a gain of at least five points. The paper's own numbers (Tables 10-17) are asked the same.
"""

import math
from collections.abc import Callable, Mapping

from lab.findings import CLEAR, DARK, Numbers, mean

METHODS, LEAST = ("IF", "FT", "GA"), 0.05
Tables = Mapping[str, Numbers]  # "class", "subset", "recovery"
Rule = Callable[[Tables, str, str, str], float]


def easier(tables: Tables, kind: str, method: str, scale: str) -> float:
    """Class level: how much less than of a clean class is left of a protected one, each over its retrained network."""
    left = {
        part: mean(tables["class"], part, kind=(kind,), method=(method,), scale=(scale,))
        - mean(tables["class"], part, kind=(kind,), method=("RT",))
        for part in ("Du", "Dc")
    }
    return left["Dc"] - left["Du"]


def hidden(tables: Tables, kind: str, method: str, scale: str) -> float:
    """Subset level: how much the clean counterparts of the perturbed images lose while those are forgotten; below zero where
    unlearning brings back what the perturbation hid."""
    numbers, how = tables["subset"], {"kind": (kind,), "forgot": ("Du", "")}
    return mean(numbers, "Duc", method=("Before",), **how) - mean(numbers, "Duc", method=(method,), scale=(scale,), **how)


def cheaper(tables: Tables, kind: str, method: str, scale: str) -> float:
    """Class level: accuracy on the observed classes after a protected class is forgotten, over that after a clean one."""
    after = [
        mean(tables["class"], "Dtr", kind=(kind,), at=at, method=(method,), scale=(scale,)) for at in (DARK, CLEAR)
    ]  # fmt: skip
    return after[0] - after[1]


def deeper(tables: Tables, kind: str, method: str, scale: str) -> float:
    """Recovery at the largest radius: how much less of a protected class than of a clean one comes back."""
    back = [
        mean(tables["recovery"], "back", kind=(kind,), at=at, method=(method,), scale=(scale,)) for at in (CLEAR, DARK)
    ]  # fmt: skip
    return back[0] - back[1]


QUESTIONS: dict[str, Rule] = {
    "protected images are easier to forget": easier,
    "forgetting them takes what they hide along": hidden,
    "forgetting them costs other classes less": cheaper,
    "and less of them can be recovered": deeper,
}


def kinds(tables: Tables) -> list[str]:
    return list(dict.fromkeys(key[0] for numbers in tables.values() for key in numbers))


def signs(rule: Rule, tables: Tables, kind: str, method: str) -> str:
    """ "+", "-" or "0" at the small and the large scale, "." where a number is missing; with the gains in points."""
    return ", ".join(_sign(rule(tables, kind, method, scale)) for scale in ("small", "large"))


def _sign(gain: float) -> str:
    if math.isnan(gain):
        return "."
    gain = round(gain, 4)
    return ("+" if gain >= LEAST else "-" if gain <= -LEAST else "0") + f" ({round(100 * gain):+d})"


def recovered(found: dict[str, dict]) -> Numbers:
    """Cells of `figure02_recovery`: accuracy before the attack, and the best of it, at the largest radius."""
    numbers = {}
    for name, cell in found.items():
        largest = max(row["radius"] for row in cell["value"])
        for row in cell["value"]:
            if row["radius"] == largest:
                numbers[*name.split("."), row["method"], row["scale"]] = {
                    "before": row["accuracy"][0],
                    "back": max(row["accuracy"]),
                }
    return numbers
