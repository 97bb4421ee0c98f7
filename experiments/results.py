"""Makes `RESULTS.md` of the cells in `results/`: our tables, the paper's, the difference, and whether its findings hold.

    python experiments/results.py

Cells of the paper's preset stand beside the paper's numbers; those of a reduced preset have tables of their own.
"""

import json
from pathlib import Path

import numpy as np
from table14_class import PROTECTED

from dememo_jax import cells, report
from lab import findings

HERE = Path(__file__).parent
INTRODUCTION = """# The papers' tables

Made by `python experiments/results.py` of the cells in `experiments/results/`. A reduced preset uses small networks and few
images: whether a finding holds can be seen there, its size cannot, and its numbers never stand in a column with the paper's.
`cpu`: a residual network of three blocks and eight kernels (beside it a small DenseNet and ViT), 200 training images of each
class, scales of unlearning of its own. The images are CIFAR-10's, of which 92 in 60,000 were only to be had as good JPEGs.
"""
METHODS = ("Before", "RT", "IF small", "IF large", "FT small", "FT large", "GA small", "GA large")


def markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])) + "\n"


def percent(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{100 * value:.1f}"


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
    head = ["training data", *nets] + ([f"{net}, paper" for net in nets] if theirs else [])
    rows = [head]
    for kind, row in ours.items():
        beside = [percent(theirs[kind].get(net)) for net in nets] if theirs else []
        rows.append([kind[0], *(percent(row.get(net)) for net in nets), *beside])
    return markdown(rows)


def unlearning_table(ours: dict, theirs: dict | None, kind: str, groups: dict[str, tuple]) -> str:
    """Means over the classes of each group; groups: part -> (title, further conditions)."""
    head = ["", *groups] + ([f"{title}, paper" for title in groups] if theirs else [])
    rows = [head]
    for shown in METHODS:
        method, _, scale = shown.partition(" ")
        row = [shown]
        for numbers in (ours, theirs) if theirs else (ours,):
            for part, how in groups.values():
                row.append(percent(findings.mean(numbers, part, kind=(kind,), method=(method,), scale=(scale,), **how)))
        rows.append(row)
    return markdown(rows)


def verdicts(rules, ours: dict, theirs: dict) -> str:
    rows = [["table", "finding (the first number is to be the larger)", "paper", "ours", "holds"]]
    for rule in rules:
        sides = [rule.sides(numbers) for numbers in (theirs, ours)]
        shown = [" vs ".join(percent(side) for side in pair) for pair in sides]
        known = not np.isnan(sides[1]).any()
        holds = ["no", "yes"][int(round(sides[1][0] - sides[1][1], 4) > 0)] if known else "-"
        rows.append([rule.table, rule.says, *shown, holds + ("" if sides[0][0] > sides[0][1] else " (the paper's do not)")])
    return markdown(rows)


def share_table(found: dict[str, dict]) -> str:
    rows = [["perturbation", "share, %", "test accuracy", "of the clean part alone"]]
    for name, cell in sorted(found.items(), key=lambda pair: (pair[0].split(".")[0], int(pair[0].split(".")[1]))):
        rows.append([*name.split("."), *(percent(cell["value"][what]) for what in ("perturbed", "clean part alone"))])
    return markdown(rows)


def recovery_table(found: dict[str, dict]) -> str:
    """A line a network and radius, means over the cells: before the attack, at its best, and other classes at its end."""
    rows: dict[tuple, list[tuple[float, float, float]]] = {}
    for name, cell in found.items():
        kind = "protected" if int(name.split(".")[1]) < PROTECTED else "clean"
        for row in cell["value"]:
            at = (name.split(".")[0], kind, f"{row['method']} {row['scale']}".strip(), f"{row['radius']:g}")
            rows.setdefault(at, []).append((row["accuracy"][0], max(row["accuracy"]), row["other classes"]))
    head = ["perturbation", "class", "network", "radius", "before", "best of the attack", "other classes at its end", "cells"]
    return markdown([head, *([*at, *(percent(v) for v in np.mean(each, axis=0)), str(len(each))] for at, each in rows.items())])


def depth_table(found: dict[str, dict]) -> str:
    """The largest certified upper bound over the cells; a radius that any of them abstains at has none."""
    rows: dict[tuple, dict[float, list]] = {}
    for name, cell in found.items():
        kind = "protected" if int(name.split(".")[1]) < PROTECTED else "clean"
        for row in cell["value"]:
            bounds = rows.setdefault((name.split(".")[0], kind, f"{row['method']} {row['scale']}".strip()), {})
            for one in row["bounds"] or []:
                bounds.setdefault(one["eta"], []).append(one["upper"])
    etas = sorted({eta for bounds in rows.values() for eta in bounds})
    head = ["perturbation", "class", "network", *(f"eta {eta:g}" for eta in etas)]
    lines = [head]
    for at, bounds in rows.items():
        each = [bounds.get(eta, [None]) for eta in etas]
        lines.append([*at, *("abstains" if None in uppers else percent(max(uppers)) for uppers in each)])
    return markdown(lines)


MORE = {
    "figure19": ("Figure 19: clean test accuracy, %, against the share of perturbed images", share_table),
    "figure02": (
        "Figures 2, 10, 11, 13-18: recovery in a ball, accuracy on test images of the class, %",
        recovery_table,
    ),
    "theorem1": ("Theorem 1: certified upper bounds, % (q = 0.9, confidence 0.99), of the class's test images", depth_table),
}
CLASS_PARTS = {
    "Du": ("Du", {}), "Duc": ("Duc", {}), "Dut": ("Dut", {}), "Dc": ("Dc", {}), "Dct": ("Dct", {}), "Dtr": ("Dtr", {}),
}  # fmt: skip
SUBSET_PARTS = {
    f"{part} | {what} forgotten".replace("|", "after"): (part, {"forgot": forgot})
    for what, forgot in (("Du", ("Du", "")), ("Dc", ("Dc", "")))
    for part in ("Du", "Duc", "Dc", "Dt")
}
ATTACKS = {name: (name, {}) for name in ("correctness", "probability", "entropy")}


def section(title: str, found: dict[str, dict]) -> str:
    """What stands under a table's name: how many cells, on what, in how long."""
    measured, first = [cell["measured"] for cell in found.values()], next(iter(found.values()))
    devices = ", ".join(sorted({one["device"] for one in measured}))
    commits = ", ".join(sorted({(cell["commit"] or "unknown")[:9] for cell in found.values()}))
    images, hours = first["images"], sum(one["seconds"] for one in measured) / 3600
    return (
        f"\n### {title}\n\n{len(found)} cells; {images[0]:,} training and {images[1]:,} test images; {devices}, jax "
        f"{measured[0]['jax']}; {hours:.2f} hours in all; seed {first['seed']}; commit {commits}.\n\n"
    )


def by_kind(ours: dict, theirs: dict, full: bool, groups: dict[str, tuple], rules) -> str:
    """A table a perturbation, and whether the paper's findings hold."""
    kinds = dict.fromkeys(key[0] for key in ours)
    tables = (f"{kind}:\n\n{unlearning_table(ours, theirs if full else None, kind, groups)}\n" for kind in kinds)
    return "".join(tables) + verdicts(rules, ours, theirs)


def one_preset(root: Path) -> str:
    full, text = root.name == "paper", f"\n## Preset {root.name}\n"
    known = {table: cells.done(root / table) for table in ("table03", "table14", "table10", *MORE)}
    if found := known["table03"]:
        theirs = findings.published("efficacy", ("perturbation",), "model", "test_accuracy", dataset="cifar10")
        text += section("Table 3 and Figure 4: clean test accuracy, %, CIFAR-10", found)
        sides = {how: efficacy(found, how) for how in ("augmented", "plain")}
        for how, ours in sides.items():
            if ours:
                text += f"{how}:\n\n" + efficacy_table(ours, theirs if full and how == "augmented" else None) + "\n"
        text += verdicts(findings.EFFICACY, sides["augmented"], theirs)
    keys = ("perturbation", "class", "method", "scale")
    if found := known["table14"]:
        theirs = findings.published("class_unlearning", keys, "split", "accuracy")
        text += section("Tables 14-17: unlearning a class, accuracy in % (means over the classes)", found)
        text += by_kind(unlearned(found, "accuracy"), theirs, full, CLASS_PARTS, findings.CLASS)
        theirs = findings.published("membership_inference", keys, "attack", "success_rate", level="class")
        text += "\n### Tables 19, 21, 23, 25: membership inference, success in %\n\nOnly the gap to RT means anything.\n\n"
        text += by_kind(unlearned(found, "membership"), theirs, full, ATTACKS, findings.MEMBERSHIP)
    if found := known["table10"]:
        theirs = findings.published("subset_unlearning", (*keys, "forget_set"), "split", "accuracy")
        text += section("Tables 10-13: unlearning part of a class, accuracy in % (means over the classes)", found)
        text += by_kind(unlearned(found, "accuracy"), theirs, full, SUBSET_PARTS, findings.SUBSET)
    for table, (title, made) in MORE.items():
        if found := known[table]:
            text += section(title, found) + made(found)
    return text


def main(root: Path = HERE / "results", out: Path = HERE / "RESULTS.md") -> str:
    presets = [root / name for name in ("paper", "cpu", "smoke") if (root / name).is_dir()]
    text = INTRODUCTION
    text += "".join(one_preset(folder) for folder in presets)
    report.write_atomic(out, text)
    return text


if __name__ == "__main__":
    print(json.dumps({"characters": len(main())}))
