"""The tables of `RESULTS.md`: cells, or numbers as `lab.findings` looks them up, to markdown."""

import re
from collections.abc import Iterable

import numpy as np

from dememo_jax import bounds, sharpness
from dememo_jax.errors import BadInput
from lab import findings, synergy
from lab.classes import class_kind

METHODS = ("Before", "RT", "IF small", "IF large", "FT small", "FT large", "GA small", "GA large")


def markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])) + "\n"


def number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.2f}"


def percent(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{100 * value:.1f}"


def beside(titles: Iterable[str]) -> list[str]:
    return [f"{title}{what}" for title in titles for what in ("", ", paper", ", difference")]


def compared(pairs: Iterable[tuple], full: bool) -> list[str]:
    """Ours; where it is the paper's preset, the paper's and the difference as well."""
    shown = []
    for ours, theirs in pairs:
        known = ours is not None and theirs is not None
        shown += [percent(ours), percent(theirs), percent(ours - theirs if known else None)] if full else [percent(ours)]
    return shown


# --- ours --------------------------------------------------------------------------------------------------------


def efficacy(found: dict[str, dict], how: str) -> dict:
    numbers: dict = {}
    for name, cell in found.items():
        kind, net, augmented = name.split(".")
        if augmented == how and cell["value"]:
            numbers.setdefault((kind,), {})[net] = cell["value"]["test"]
    return numbers


def unlearned(found: dict[str, dict], field: str) -> dict:
    numbers = {}
    for name, cell in found.items():
        kind, label, *forgot = name.split(".")
        for row in cell["value"]:
            if row[field]:
                numbers[kind, label, row["method"], row["scale"], *forgot] = row[field]
    return numbers


# --- tables ------------------------------------------------------------------------------------------------------


def efficacy_table(ours: dict, theirs: dict | None) -> str:
    nets = sorted({net for row in ours.values() for net in row})
    rows = [["training data", *(nets if theirs is None else beside(nets))]]
    for kind, row in ours.items():
        pairs = [(row.get(net), None if theirs is None else theirs[kind].get(net)) for net in nets]
        rows.append([kind[0], *compared(pairs, theirs is not None)])
    return markdown(rows)


def unlearning_table(ours: dict, theirs: dict | None, kind: str, groups: dict[str, tuple]) -> str:
    """Means over the classes of each group; groups: title -> (part, further conditions)."""
    rows = [["", *(groups if theirs is None else beside(groups))]]
    for shown in METHODS:
        method, _, scale = shown.partition(" ")
        key = {"kind": (kind,), "method": (method,), "scale": (scale,)}
        pairs = [
            tuple(None if numbers is None else findings.mean(numbers, part, **key, **how) for numbers in (ours, theirs))
            for part, how in groups.values()
        ]
        rows.append([shown, *compared(pairs, theirs is not None)])
    return markdown(rows)


def verdicts(rules, ours: dict, theirs: dict | None) -> str:
    """Whether each finding holds in our numbers; theirs None: of a figure, for which the paper prints no number."""
    rows = [["table or figure", "finding (the first number is to be the larger)", "paper", "ours", "holds"]]
    for rule in rules:
        mine, paper = rule.sides(ours), None if theirs is None else rule.sides(theirs)
        shown = ["no number" if pair is None else " vs ".join(percent(side) for side in pair) for pair in (paper, mine)]
        holds = "-" if np.isnan(mine).any() else ["no", "yes"][int(round(mine[0] - mine[1], 4) > 0)]
        theirs_too = paper is None or paper[0] > paper[1]
        rows.append([rule.table, rule.says, *shown, holds + ("" if theirs_too else " (the paper's do not)")])
    return markdown(rows)


def tally(page: str) -> tuple[int, int]:
    """How many of the findings on a page hold and do not, as `verdicts` says it."""
    said = re.findall(r"\| (yes|no)\b[^|\n]*\|\n", page)
    return said.count("yes"), said.count("no")


def share_table(found: dict[str, dict]) -> str:
    rows = [["perturbation", "share, %", "test accuracy", "of the clean part alone"]]
    for name, cell in sorted(found.items(), key=lambda pair: (pair[0].split(".")[0], int(pair[0].split(".")[1]))):
        rows.append([*name.split("."), *(percent(cell["value"][what]) for what in ("perturbed", "clean part alone"))])
    return markdown(rows)


def recovery_table(found: dict[str, dict]) -> str:
    """A line a network and radius, means over the cells: before the attack, at its best, and other classes at its end."""
    rows: dict[tuple, list[tuple[float, float, float]]] = {}
    for name, cell in found.items():
        for row in cell["value"]:
            at = (name.split(".")[0], class_kind(name), f"{row['method']} {row['scale']}".strip(), f"{row['radius']:g}")
            rows.setdefault(at, []).append((row["accuracy"][0], max(row["accuracy"]), row["other classes"]))
    head = ["perturbation", "class", "network", "radius", "before", "best of the attack", "other classes at its end", "cells"]
    return markdown([head, *([*at, *(percent(v) for v in np.mean(each, axis=0)), str(len(each))] for at, each in rows.items())])


def depth_table(found: dict[str, dict]) -> str:
    """The largest certified upper bound over the cells; a radius that any of them abstains at has none."""
    rows: dict[tuple, dict[float, list]] = {}
    for name, cell in found.items():
        for row in cell["value"]:
            bounds = rows.setdefault((name.split(".")[0], class_kind(name), f"{row['method']} {row['scale']}".strip()), {})
            for one in row["bounds"] or []:
                bounds.setdefault(one["eta"], []).append(one["upper"])
    etas = sorted({eta for bounds in rows.values() for eta in bounds})
    head = ["perturbation", "class", "network", *(f"eta {eta:g}" for eta in etas)]
    lines = [head]
    for at, bounds in rows.items():
        each = [bounds.get(eta, [None]) for eta in etas]
        lines.append([*at, *map(largest, each)])
    return markdown(lines)


def largest(uppers: list[float | None]) -> str:
    """Of upper bounds, none where one of them abstains."""
    known = [upper for upper in uppers if upper is not None]
    return percent(max(known)) if len(known) == len(uppers) else "abstains"


def radius_table(found: dict[str, dict]) -> str:
    """A line a perturbation: before the attack, and its best at every radius."""
    alive = {kind: cell["value"] for kind, cell in found.items() if cell["value"]}
    radii = [row["radius"] for row in next(iter(alive.values()), [])]
    lines = [["training data", "before", *(f"radius {radius:g}" for radius in radii)]]
    for kind, rows in alive.items():
        lines.append([kind, percent(rows[0]["accuracy"][0]), *(percent(max(row["accuracy"])) for row in rows)])
    return markdown(lines)


def transfer_table(found: dict[str, dict]) -> str:
    """A line a perturbation and class: what the references promise, and what was seen of runs that were made."""
    lines = [[
        "perturbation", "class", "eta", "references below tau", "promised, (epsilon, delta)", "promised, GDP", "runs, seen",
        "radius of the ball", "its bound", "other classes, runs", "other classes, references",
    ]]  # fmt: skip
    for name, cell in found.items():
        value, tau = cell["value"], cell["claim"]["tau"]
        sides = {
            side: [row for row in value["networks"] if row["who"].startswith(side)] for side in ("run", "reference")
        }  # fmt: skip
        others = [percent(float(np.mean([row["others"] for row in sides[side]]))) for side in ("run", "reference")]
        for at, upper in enumerate(value["ball"]["upper"]):
            event, gdp = value["events"][2 * at : 2 * at + 2]
            below = sum(row["upper"][at] is not None and row["upper"][at] <= tau for row in sides["run"])
            known = any(row["upper"][at] is not None for row in sides["reference"])
            told = [f"{event['successes']} of {event['references']}", percent(event["probability"]),
                    percent(gdp["probability"]), f"{below} of {len(sides['run'])}"]  # fmt: skip
            lines.append([
                *name.split("."), f"{event['eta']:g}", *(told if known else ["abstain", "-", "-", "-"]),
                f"{value['ball']['radius']:.2f}", "abstains" if upper is None else percent(upper), *others,
            ])  # fmt: skip
    return markdown(lines)


def attack_table(found: dict[str, dict]) -> str:
    """What the same recovery attack may reach from a certified run, promised by the references, and what it reached."""
    lines = [["perturbation", "class", "attack above", "of references", "promised at most", "of runs, seen"]]
    for name, cell in found.items():
        for one in cell["value"]["attacks"]:
            runs = [row["attack"] for row in cell["value"]["networks"] if row["who"].startswith("run")]
            seen = f"{sum(reached > one['threshold'] for reached in runs)} of {len(runs)}"
            many = f"{one['successes']} of {one['references']}"
            lines.append([*name.split("."), percent(one["threshold"]), many, percent(one["probability"]), seen])
    return markdown(lines)


def distances(found: dict[str, dict]) -> dict[tuple[str, str, str], tuple[float | None, float]]:
    """(kind, network, countermeasure) -> UD against clean data, None where it is undefined, and accuracy at the end."""
    rows = {tuple(name.split(".")): cell["value"] for name, cell in found.items() if cell["value"]}
    sals = {at: [sharpness.from_plain(row["sal"]) for row in each] for at, each in rows.items()}
    out: dict = {}
    for at, each in rows.items():
        clean = sals.get(("clean", *at[1:]))
        try:
            distance = None if clean is None else sharpness.unlearnable_distance(sals[at], clean).distance
        except BadInput:  # no layer of the clean network is learnable
            distance = None
        out[at] = distance, each[-1]["accuracy"]
    return out


def distance_table(found: dict[str, dict]) -> str:
    """UD, and accuracy in brackets; a column a perturbation."""
    known = distances(found)
    kinds = list(dict.fromkeys(at[0] for at in known))
    lines = [["network", "countermeasure", *kinds, "rank correlation of UD with accuracy"]]
    for net, against in dict.fromkeys(at[1:] for at in known):
        row = {kind: known.get((kind, net, against)) for kind in kinds}
        pairs = [pair for pair in row.values() if pair is not None and pair[0] is not None]
        rank = bounds.rank_correlation(*zip(*pairs))[0] if len(pairs) > 2 else None
        shown = ("-" if pair is None else f"{number(pair[0])} ({percent(pair[1])})" for pair in row.values())
        lines.append([net, against, *shown, number(rank)])
    return markdown(lines)


def synergy_table(numbers: dict[str, dict]) -> str:
    """Table 5 by the rules of `lab.synergy`: a line a perturbation and question, a column a method; small, large scale."""
    lines = [["perturbation", "question", *synergy.METHODS]]
    for kind in synergy.kinds(numbers):
        for question, rule in synergy.QUESTIONS.items():
            lines.append([kind, question, *(synergy.signs(rule, numbers, kind, method) for method in synergy.METHODS)])
    return markdown(lines)
