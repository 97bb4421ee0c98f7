"""The scripts of the papers' tables at their smallest preset, their command line, and the page made of their cells."""

import json

import figure02_recovery
import figure19_share
import jax
import pytest
import results
import table03_efficacy
import table10_subset
import table14_class
import theorem1_depth

from dememo_jax import cells
from lab import findings, models, table
from lab.presets import PRESETS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("experiments")
    return ["--preset", "smoke", "--results", str(root / "results"), "--work", str(root / "work")], root


@pytest.fixture(autouse=True)
def _cache_of_the_tests():
    """The command line moves the cache of compiled programs to the work folder."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


SCRIPTS = {
    "table03": (table03_efficacy, ["clean.resnet18.augmented", "ops.resnet18.plain"], 42),
    "table10": (table10_subset, ["ops.1.Du"], 64),
    "table14": (table14_class, ["ops.5"], 32),
    "figure02": (figure02_recovery, ["ops.5"], 32),
    "theorem1": (theorem1_depth, ["ops.5"], 32),
    "figure19": (figure19_share, ["ops.40"], 15),
}


def shares(name, cell):
    """Everything in a cell that is an accuracy, or a bound of one."""
    rows = [cell["value"]] if name in ("table03", "figure19") else cell["value"]
    kinds = {
        "table03": lambda row: row.values(),
        "figure19": lambda row: row.values(),
        "figure02": lambda row: [*row["accuracy"], row["other classes"]],
        "theorem1": lambda row: [bound["upper"] for bound in row["bounds"]],
    }
    return [value for row in rows for value in kinds.get(name, lambda row: row["accuracy"].values())(row)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_smoke(folders, name):
    how, root = folders
    script, some, count = SCRIPTS[name]
    found = script.main([*how, "--only", *some])
    assert sorted(found) == sorted(some)
    world = models.World(PRESETS["smoke"], "digits", root / "work")
    assert len(list(script.names(world))) == len(set(script.names(world))) == count
    for cell in found.values():
        assert cell["configuration"]["name"] == "smoke"
        assert {"seconds", "device", "jax", "commit"} <= cell["measured"].keys()
        assert all(0 <= value <= 1 for value in shares(name, cell))
    if name not in ("table03", "figure02", "figure19"):
        shown = [row["method"] for row in found[some[0]]["value"]]
        assert shown == ["Before", "RT", "FT", "FT", "GA", "GA", "IF", "IF"] + ["Clean control"] * (name == "theorem1")
    before = {path: path.stat().st_mtime_ns for path in (root / "results").rglob("*.json")}
    assert script.main([*how, "--only", *some]) == found
    assert {path: path.stat().st_mtime_ns for path in before} == before  # a cell done is never done again


def test_the_page(folders):
    how, root = folders
    for script, some, _ in SCRIPTS.values():
        script.main([*how, "--only", *some])
    text = results.main(root / "results", root / "RESULTS.md")
    assert (root / "RESULTS.md").read_text() == text
    assert "## Preset smoke" in text
    assert "| ops |" in text
    assert "paper |" not in text.replace("| paper | ours |", "")  # no column of the paper's beside a reduced preset's


RULES = {
    "efficacy": (findings.EFFICACY, (("perturbation",), "model", "test_accuracy"), {"dataset": "cifar10"}),
    "class_unlearning": (findings.CLASS, (("perturbation", "class", "method", "scale"), "split", "accuracy"), {}),
    "subset_unlearning": (
        findings.SUBSET, (("perturbation", "class", "method", "scale", "forget_set"), "split", "accuracy"), {},
    ),
    "membership_inference": (
        findings.MEMBERSHIP, (("perturbation", "class", "method", "scale"), "attack", "success_rate"), {"level": "class"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_the_papers_numbers_have_the_papers_findings(name):
    rules, (keys, part, value), where = RULES[name]
    theirs = findings.published(name, keys, part, value, **where)
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
