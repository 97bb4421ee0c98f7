"""The scripts of the papers' tables at their smallest preset, their command line, and the page made of their cells."""

import json
import re

import benchmark_ud
import figure02_recovery
import figure09_radius
import figure19_share
import jax
import pytest
import results
import table03_efficacy
import table10_subset
import table14_class
import theorem1_depth
import theorem2_transfer
from kinds import some

from dememo_jax import cells
from lab import findings, models, synergy, table, tables
from lab.presets import PRESETS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("experiments")
    return ["--preset", "smoke", "--results", str(root / "results"), "--work", str(root / "work")], root


SCRIPTS = {
    "table03": (table03_efficacy, ["clean.resnet18.augmented", "ops.resnet18.plain"], 42),
    "table10": (table10_subset, ["ops.1.Du"], 64),
    "table14": (table14_class, ["ops.5"], 32),
    "figure02": (figure02_recovery, ["ops.5"], 32),
    "theorem1": (theorem1_depth, ["ops.5"], 32),
    "theorem2": (theorem2_transfer, ["ops.4"], 8),
    "figure09": (figure09_radius, ["clean"], 7),
    "figure19": (figure19_share, ["ops.40"], 15),
    "ud": (benchmark_ud, ["clean.resnet18.gray", "ops.resnet18.gray"], 14),
}


def shares(name, cell):
    """Everything in a cell that is an accuracy, or a bound of one."""
    rows = [cell["value"]] if name in ("table03", "figure19", "theorem2") else cell["value"]
    kinds = {
        "table03": lambda row: row.values(),
        "figure19": lambda row: row.values(),
        "figure02": lambda row: [*row["accuracy"], row["other classes"]],
        "figure09": lambda row: row["accuracy"],
        "ud": lambda row: [row["accuracy"]],
        "theorem2": lambda row: [one["probability"] for one in (*row["events"], row["ball"], *row["attacks"])],
        "theorem1": lambda row: [bound["upper"] for bound in row["bounds"]],
    }
    return [value for row in rows for value in kinds.get(name, lambda row: row["accuracy"].values())(row)]


@pytest.mark.parametrize("name", some(SCRIPTS, ("table14",)))
def test_smoke(folders, name):
    how, root = folders
    script, asked, count = SCRIPTS[name]
    found = script.main([*how, "--only", *asked])
    assert sorted(found) == sorted(asked)
    world = models.World(PRESETS["smoke"], "digits", root / "work")
    assert len(list(script.names(world))) == len(set(script.names(world))) == count
    for cell in found.values():
        assert cell["configuration"]["name"] == "smoke"
        assert {"seconds", "device", "jax", "commit"} <= cell["measured"].keys()
        assert all(0 <= value <= 1 for value in shares(name, cell))
    if name in ("table10", "table14", "theorem1"):
        shown = [row["method"] for row in found[asked[0]]["value"]]
        assert shown == ["Before", "RT", "FT", "FT", "GA", "GA", "IF", "IF"] + ["Clean control"] * (name == "theorem1")
    before = {path: path.stat().st_mtime_ns for path in (root / "results").rglob("*.json")}
    assert script.main([*how, "--only", *asked]) == found
    assert {path: path.stat().st_mtime_ns for path in before} == before  # a cell done is never done again


@pytest.mark.slow
def test_the_page(folders):
    how, root = folders
    for script, asked, _ in SCRIPTS.values():
        script.main([*how, "--only", *asked])
    text = results.main(root / "results", root / "RESULTS.md")
    assert (root / "RESULTS.md").read_text() == text
    assert "## Preset smoke" in text
    asked = text.count("| yes |\n") + text.count("| no |\n")  # the paper's own findings hold in its numbers
    held, failed = map(int, re.search(r"(\d+) of the papers' findings hold here and (\d+) do not", text).groups())
    assert held + failed == asked > 0
    assert "| ops |" in text
    assert all(f"### {results.TITLES[name]}" in text for name in SCRIPTS)
    assert "### Table 5" in text
    assert {path.name for path in (root / "figures").iterdir()} >= {
        f"smoke-figure{number}.png" for number in ("02", "05", "09", "19")
    }
    assert "paper |" not in text.replace("| paper | ours |", "")  # no column of the paper's beside a reduced preset's


def test_the_tally_counts_every_verdict():
    rules = [findings.Finding("0", "a", lambda n: n["a"]), findings.Finding("0", "b", lambda n: n["b"])]
    nan = float("nan")
    pages = [
        tables.verdicts(rules, {"a": (2, 1), "b": (1, 2)}, {"a": (2, 1), "b": (2, 1)}),
        tables.verdicts(rules, {"a": (1, 2), "b": (nan, 2)}, {"a": (1, 2), "b": (2, 1)}),  # the paper's a does not hold there
    ]
    assert tables.tally("".join(pages)) == (1, 2)


RULES = {
    "efficacy": (findings.EFFICACY, (("perturbation",), "model", "test_accuracy"), {"dataset": "cifar10"}),
    "class_unlearning": (findings.CLASS, (("perturbation", "class", "method", "scale"), "split", "accuracy"), {}),
    "subset_unlearning": (
        findings.SUBSET, (("perturbation", "class", "method", "scale", "forget_set"), "split", "accuracy"), {},
    ),
    **{
        f"membership_inference {level}": (
            findings.MEMBERSHIP[level], (("perturbation", "class", "method", "scale"), "attack", "success_rate"),
            {"level": level},
        )
        for level in ("class", "subset")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_the_papers_numbers_have_the_papers_findings(name):
    rules, (keys, part, value), where = RULES[name]
    theirs = findings.published(name.split()[0], keys, part, value, **where)
    for rule in rules:
        larger, smaller = rule.sides(theirs)
        assert larger > smaller, rule.says


def test_what_the_command_line_refuses(folders, capsys):
    how, root = folders
    with pytest.raises(SystemExit):
        table03_efficacy.main([*how, "--only", "no.such.cell"])
    assert "has no cell no.such.cell" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        table03_efficacy.main([*how, "--data", str(root / "none.npz")])
    assert "no such file" in capsys.readouterr().err
    table03_efficacy.main([*how, "--only", "clean.resnet18.augmented"])
    settings = root / "results" / "smoke" / "table03" / cells.SETTINGS
    whole = settings.read_text()
    settings.write_text(json.dumps(json.loads(whole) | {"batch": 7}))
    with pytest.raises(SystemExit):
        table03_efficacy.main([*how, "--only", "clean.resnet18.augmented"])
    assert "batch (there 7, asked 32)" in capsys.readouterr().err
    settings.write_text(whole)


def test_out_of_memory_halves_the_batch_once(folders, capsys):
    how, _ = folders
    batches = []

    def heavy(world, name):
        batches.append(world.preset.batch)
        if name == "fits" and world.preset.batch < 32:
            return {"value": 1}
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    found = table.main("heavy", "doc", lambda world: ["fits"], heavy, how)
    assert batches == [32, 16]
    assert found["fits"]["value"] == 1
    assert found["fits"]["configuration"]["batch"] == 16
    assert "batches of 32; once more with 16" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        table.main("heavy", "doc", lambda world: ["fits", "too-large"], heavy, how)
    assert "too-large: out of memory with batches of 16 as well" in capsys.readouterr().err
    assert batches[2:] == [32, 16]  # the finished cell stays


def numbers(of):
    """Numbers of one made-up perturbation: (class, method, scale, forgotten) -> parts."""
    return {("p", *key): row for key, row in of.items()}


def test_the_rules_of_the_synergy_table():
    """Every rule on numbers whose gain is known, and a dot where one is missing."""
    classes = numbers({
        ("0", "RT", ""): {"Du": 0.1}, ("4", "RT", ""): {"Dc": 0.0},
        ("0", "FT", "small"): {"Du": 0.3, "Dtr": 0.7}, ("4", "FT", "small"): {"Dc": 0.5, "Dtr": 0.9},
        ("0", "FT", "large"): {"Du": 0.11, "Dtr": 0.5}, ("4", "FT", "large"): {"Dc": 0.0, "Dtr": 0.5},
    })  # fmt: skip
    subset = numbers({
        ("0", "Before", "", ""): {"Duc": 0.6}, ("0", "FT", "small", "Du"): {"Duc": 0.7},
        ("0", "FT", "large", "Du"): {"Duc": 0.2}, ("0", "FT", "small", "Dc"): {"Duc": 0.0},
    })  # fmt: skip
    recovery = numbers({("0", "FT", "small"): {"back": 0.2}, ("4", "FT", "small"): {"back": 0.24}})
    tables = {"class": classes, "subset": subset, "recovery": recovery}
    said = [synergy.signs(rule, tables, "p", "FT") for rule in synergy.QUESTIONS.values()]
    assert said == ["+ (+30), 0 (-1)", "- (-10), + (+40)", "- (-20), 0 (+0)", "0 (+4), ."]
    assert synergy.signs(synergy.easier, tables, "p", "GA") == "., ."


def test_published_presets_stand_beside_the_paper(tmp_path):
    """Paper, difference: only where the preset is the paper's, and of its own data set."""
    cell = {
        "value": {"test": 0.1, "training": 1.0}, "images": [1, 1], "commit": "c", "seed": 0,
        "measured": {"device": "d", "jax": "j", "seconds": 1.0},
    }  # fmt: skip
    folder = tmp_path / "results" / "paper-cifar100" / "table03"
    folder.mkdir(parents=True)
    (folder / "ue-c.resnet18.augmented.json").write_text(json.dumps(cell | {"cell": "ue-c.resnet18.augmented"}))
    text = results.main(tmp_path / "results", tmp_path / "RESULTS.md")
    assert "| training data | resnet18 | resnet18, paper | resnet18, difference |" in text
    assert "| ue-c | 10.0 | 3.8 | 6.2 |" in text
