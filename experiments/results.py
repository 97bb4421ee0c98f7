"""Makes `RESULTS.md` of the cells in `results/`: our tables, the paper's, the difference, and whether its findings hold.

    python experiments/results.py

Cells of the paper's preset stand beside the paper's numbers; those of a reduced preset have tables of their own.
"""

import json
from pathlib import Path

from dememo_jax import cells, files, report
from lab import figures, findings, synergy, tables, text_tables
from lab.presets import PRESETS

HERE = Path(__file__).parent
INTRODUCTION = """# The papers' tables

Made by `python experiments/results.py` of the cells in `experiments/results/`. A reduced preset uses small networks and few
images: whether a finding holds can be seen there, its size cannot, and its numbers never stand in a column with the paper's.
`cpu`: a residual network of three blocks and eight kernels (beside it a small DenseNet and ViT), 200 training images of each
class, four classes to forget, scales of unlearning of its own. So small, TUE protects without augmentation only, and where four
of ten classes are protected, TUE, PUE and OPS hide little (Duc before unlearning); twenty images of a class are too few to be
learned (Dc after retraining without Du). The images are CIFAR-10's, of which 92 in 60,000 were only to be had as good JPEGs.
Text: a decoder of two blocks of width 48, trained from nothing on three tasks: sentiment (SST-2, phrases of six words or more),
topics and page (AG News: four topics; business or sport, of other articles and in other words); it writes label words.
"""

SYNERGY = """Whether a perturbation and a method of unlearning help each other: + by at least five points, - harm by as much,
0 neither, at the small and the large scale; in brackets the gain in points.
"""
TITLES = {
    "table03": "Table 3 and Figure 4: clean test accuracy, %",
    "figure19": "Figure 19: clean test accuracy, %, against the share of perturbed images",
    "figure09": "Figure 9: test accuracy, %, after recovery in a ball",
    "table14": "Tables 14-17: unlearning a class, accuracy in % (means over the classes)",
    "table10": "Tables 10-13: unlearning part of a class, accuracy in % (means over the classes)",
    "figure02": "Figures 2, 10, 11, 13-18: recovery in a ball, accuracy on test images of the class, %",
    "theorem1": "Theorem 1: certified upper bounds, % (q = 0.9, confidence 0.99), of the class's test images",
    "theorem2": "Theorem 2: what references promise of certified-unlearned networks, %",
    "table04": "Table 4: text, accuracy in % on the test texts of the task that was forgotten",
    "figure12": "Figure 12: text, recovery in a ball, accuracy on the task, %",
    "theorem1_text": "Theorem 1 for text: certified upper bounds, % (q = 0.9, confidence 0.99), on the task's test texts",
    "ud": "Unlearnable Distance, by the paper's solver, and clean test accuracy, % (in brackets)",
}
NOTES = {
    "figure09": """
Test accuracy at the best moment of the attack; a radius is a distance in the space of all weights.
""",
    "figure02": """
The attack moves the weights within the radius on a tenth of the class's images; it is scored at its best moment.
Other classes: what they have left when it ends, so that a network that answers one class to everything is seen.
""",
    "theorem1": """
For every move of the weights by at most eta, accuracy stays at or below the bound with probability q under the noise.
The largest of a row's cells; it abstains where the bound needs more draws of noise than were made.
""",
    "theorem2": """
Several references were made by certified unlearning and bounded as in Theorem 1, and then a few runs more.
Below tau: references with a bound of at most 10 %. Promised: the probability that any other run has such a bound too, by
(epsilon, delta) and, sharper, by Gaussian DP. Runs, seen: those that were made and have it. The ball lies around one reference
and holds the others. In the second table the probability is that the recovery attack gets above the threshold. Confidence 0.98.
""",
    "ud": """
UD: layers that a network trained on the perturbed images can still learn through, over those of one trained on clean images
(1: as many; 0: none). Layers are tensors that activations are multiplied by; ViT's attention biases, positions and class
token were measured beside them in November 2026 and are left out.
""",
}
MORE = {
    "figure19": tables.share_table, "figure09": tables.radius_table,
    "figure02": lambda found: (
        tables.recovery_table(found) + "\n" + tables.verdicts(findings.RECOVERY, synergy.recovered(found), None)
    ),
    "table04": text_tables.unlearning, "figure12": text_tables.recovery, "theorem1_text": text_tables.depth,
    "theorem1": tables.depth_table, "ud": tables.distance_table,
    "theorem2": lambda found: tables.transfer_table(found) + "\n" + tables.attack_table(found),
}  # fmt: skip
CLASS_PARTS = {part: (part, {}) for part in ("Du", "Duc", "Dut", "Dc", "Dct", "Dtr")}
SUBSET_PARTS = {
    f"{part} after {what} forgotten": (part, {"forgot": (what, "")})
    for what in ("Du", "Dc")
    for part in ("Du", "Duc", "Dc", "Dt")
}
ATTACKS = {name: (name, {}) for name in ("correctness", "probability", "entropy")}
LEVELS = {
    "table14": ("class", CLASS_PARTS, findings.CLASS, "Tables 19, 21, 23, 25: membership inference, success in %"),
    "table10": ("subset", SUBSET_PARTS, findings.SUBSET,
                "Tables 18, 20, 22, 24: membership inference on clean counterparts of forgotten Du, success in %"),
}  # fmt: skip


def section(title: str, found: dict[str, dict], note: str = "") -> str:
    """What stands under a table's name: how many cells, on what, in how long."""
    measured, first = [cell["measured"] for cell in found.values()], next(iter(found.values()))
    devices = ", ".join(sorted({one["device"] for one in measured}))
    commits = ", ".join(sorted({(cell["commit"] or "unknown")[:9] for cell in found.values()}))
    what = "images" if "images" in first else "texts"
    count, hours = first[what], sum(one["seconds"] for one in measured) / 3600
    return (
        f"\n### {title}\n\n{len(found)} cells; {count[0]:,} training and {count[1]:,} test {what}; {devices}, jax "
        f"{measured[0]['jax']}; {hours:.2f} hours in all; seed {first['seed']}; commit {commits}.\n{note}\n"
    )


def by_kind(ours: dict, theirs: dict, full: bool, groups: dict[str, tuple], rules) -> str:
    """A table a perturbation, and whether the paper's findings hold."""
    kinds = dict.fromkeys(key[0] for key in ours)
    made = (f"{kind}:\n\n{tables.unlearning_table(ours, theirs if full else None, kind, groups)}\n" for kind in kinds)
    return "".join(made) + tables.verdicts(rules, ours, theirs)


def efficacy(found: dict[str, dict], dataset: str, full: bool) -> str:
    theirs = findings.published("efficacy", ("perturbation",), "model", "test_accuracy", dataset=dataset)
    text, sides = "", {how: tables.efficacy(found, how) for how in ("augmented", "plain")}
    for how, ours in sides.items():
        if ours:
            text += f"{how}:\n\n" + tables.efficacy_table(ours, theirs if full and how == "augmented" else None) + "\n"
    return text + tables.verdicts(findings.EFFICACY, sides["augmented"], theirs)


def memberships(found: dict[str, dict], level: str, full: bool) -> str:
    """Of the subset level those where Du is forgotten, as in the paper."""
    theirs, rules = published(level)["membership"], findings.MEMBERSHIP[level]
    ours = {key[:4]: row for key, row in tables.unlearned(found, "membership").items() if key[4:] != ("Dc",)}
    return "Only the gap to RT means anything.\n\n" + by_kind(ours, theirs, full, ATTACKS, rules)


def published(level: str) -> dict[str, dict]:
    """The paper's numbers of a level: accuracy and membership."""
    keys, more = ("perturbation", "class", "method", "scale"), ("forget_set",) if level == "subset" else ()
    return {
        "accuracy": findings.published(f"{level}_unlearning", (*keys, *more), "split", "accuracy"),
        "membership": findings.published("membership_inference", keys, "attack", "success_rate", level=level),
    }


def synergies(known: dict[str, dict]) -> str:
    theirs = {level: published(level)["accuracy"] for level in ("class", "subset")} | {"recovery": {}}
    ours = {
        "class": tables.unlearned(known["table14"], "accuracy"),
        "subset": tables.unlearned(known["table10"], "accuracy"),
        "recovery": synergy.recovered(known["figure02"]),
    }
    rules = "".join(f"- {question}: {' '.join(rule.__doc__.split())}\n" for question, rule in synergy.QUESTIONS.items())
    text = f"\n### Table 5: synergy, computed\n\n{SYNERGY}\n{rules}\nOf our cells:\n\n{tables.synergy_table(ours)}"
    return text + f"\nOf the paper's Tables 10-17, by the same rules:\n\n{tables.synergy_table(theirs)}"


def one_preset(root: Path, pictures: Path) -> str:
    full, text = root.name.startswith("paper"), ""
    known = {table: cells.done(root / table) for table in TITLES}
    for table, found in known.items():
        if not found:
            continue
        text += section(TITLES[table], found, NOTES.get(table, ""))
        if table == "table03":
            text += efficacy(found, PRESETS[root.name].dataset if full else "cifar10", full)
        elif table in LEVELS:
            level, parts, rules, membership = LEVELS[table]
            text += by_kind(tables.unlearned(found, "accuracy"), published(level)["accuracy"], full, parts, rules)
            text += f"\n### {membership}\n\n" + memberships(found, level, full)
        else:
            text += MORE[table](found)
        text += "".join(picture(draw(found), root.name, pictures) for draw in figures.DRAWN.get(table, ()))
    if known["table14"] and known["table10"]:
        text += synergies(known)
    held, failed = tables.tally(text)
    summary = f"{held} of the papers' findings hold here and {failed} do not, each under its table."
    return f"\n## Preset {root.name}\n\n{summary}\n{text}"


def picture(plot: report.Plot | None, preset: str, folder: Path) -> str:
    if plot is None:
        return ""
    name = f"{preset}-{plot.name}.png"
    folder.mkdir(exist_ok=True)
    files.write(folder / name, report.draw(plot))
    return f"\n![{plot.title}]({folder.name}/{name})\n"


def main(root: Path = HERE / "results", out: Path = HERE / "RESULTS.md") -> str:
    presets = [root / name for name in [*(name for name in PRESETS if name.startswith("paper")), "cpu", "smoke"]]
    text = INTRODUCTION + "".join(one_preset(folder, out.parent / "figures") for folder in presets if folder.is_dir())
    files.write(out, text)
    return text


if __name__ == "__main__":
    print(json.dumps({"characters": len(main())}))
