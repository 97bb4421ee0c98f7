"""The scripts of Table 4, Figure 12 and Theorem 1 for text at their smallest preset, and their part of the page."""

import figure12_text
import numpy as np
import pytest
import results
import table04_text
import theorem1_text

from dememo_jax import cells
from lab import findings, text_tables, texts

CELL = "page.regtext"


def lines(labels, count, seed):
    """Sentences of words that belong to a label, and of others."""
    random = np.random.default_rng(seed)
    for i in range(count):
        label = labels[i % len(labels)]
        own = [f"{'quvz'[i % len(labels)]}{letter}" for letter in "abcdefghijklmnop"]
        words = random.choice([*own, "and", "the", "of", "thing", "other", "more"], 8)
        yield f"{' '.join(words)}\t{label}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    for file, labels in (("sst2", ("0", "1")), ("agnews", ("Business", "Sci/Tech", "Sports", "World"))):
        for seed, split in enumerate(("train", "test")):
            (root / f"{file}_{split}.tsv").write_text("\n".join(lines(labels, 120, seed)) + "\n")
    return root, {name: run(root, script) for name, script in {"table04": table04_text, "figure12": figure12_text}.items()}


def run(root, script):
    how = ["--preset", "smoke", "--data", str(root), "--work", str(root / "work"), "--results", str(root / "results")]
    return script.main([*how, "--only", CELL])[CELL]


def test_every_network_has_its_row(made):
    _, found = made
    assert [(row["method"], row["form"]) for row in found["table04"]["value"]] == [
        ("Before", "full"), ("RT", "full"), ("NPO", "full"), ("NPO", "adapter"),
    ]  # fmt: skip
    assert all(0 <= value <= 1 for row in found["table04"]["value"] for value in row["accuracy"].values())
    assert all(0 <= value <= 1 for row in found["table04"]["value"] for value in row["membership"].values())
    assert [len(row["accuracy"]) for row in found["figure12"]["value"]] == [2] * 4  # before the attack, and its only epoch


def test_bounds_of_whole_networks_and_adapters(made):
    root, _ = made
    rows = run(root, theorem1_text)["value"]
    sizes = {row["form"]: row["parameters"] for row in rows}
    assert sizes["adapter"] < sizes["full"]
    assert all(bound["reason"] is None and 0 <= bound["upper"] <= 1 for row in rows for bound in row["bounds"])
    assert results.TITLES["theorem1_text"] in results.main(root / "results", root / "RESULTS.md")


def test_tasks_share_no_texts_and_labels_are_numbered_through(made):
    root, _ = made
    world = texts.TextWorld(texts.PRESETS["smoke"], str(root), root / "work" / "smoke")
    training, test = world.sets
    assert [len(part.texts) for part in texts.corpus(world)[0]] == [24, 48, 24]
    assert sorted(set(np.asarray(training.y).tolist())) == list(range(8))
    parts = {part.task: set(part.texts) for part in texts.corpus(world)[0]}
    assert not parts["topics"] & parts["page"]
    own = texts.of_task(world, "page", test)
    assert sorted(set(np.asarray(own.y).tolist())) == [0, 1]
    seen, changed = texts.seen_by(world, "regtext"), 0
    for part in texts.corpus(world)[0]:
        mine = np.isin(np.asarray(training.y), texts.labels_of(world, part.task))
        changed += int((np.asarray(seen.x)[mine] != np.asarray(training.x)[mine]).any(axis=1).sum())
    assert changed > 0.9 * len(training.y)


def test_the_page(made):
    root, _ = made
    text = results.main(root / "results", root / "RESULTS.md")
    for table in ("table04", "figure12"):
        assert f"### {results.TITLES[table]}" in text
        assert sorted(cells.done(root / "results" / "smoke" / table)) == [CELL]
    assert "96 training and 48 test texts" in text
    assert "| 1 | 89.2 | 78.8 | 69.3 | 68.7 | 65.1 | 75.6 |" in text  # the paper's, in a table of its own
    assert (root / "figures" / "smoke-figure12.png").exists()


def test_the_papers_numbers_have_the_papers_findings():
    for rule in findings.TEXT:
        larger, smaller = rule.sides(text_tables.published())
        assert larger > smaller, rule.says


def test_missing_files_are_named(made, capsys, tmp_path):
    with pytest.raises(SystemExit):
        table04_text.main(["--preset", "smoke", "--data", str(tmp_path), "--work", str(tmp_path), "--results", str(tmp_path)])
    assert "sst2_train.tsv: no such file" in capsys.readouterr().err
