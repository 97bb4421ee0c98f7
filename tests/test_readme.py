"""The README's Python runs as it stands there, and its commands parse."""

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from dememo_jax import audit, bounds, cli, sharpness, unlearn
from dememo_jax.cli import configs, flags, forgetting, recipes
from dememo_jax.protect import countermeasures

README = Path(__file__).parent.parent / "README.md"
CERTIFICATION = README.parent / "docs" / "certification.md"
PROTECT = README.parent / "docs" / "protect.md"
UNLEARN = README.parent / "docs" / "unlearn.md"
AUDIT = README.parent / "docs" / "audit.md"
SHARPNESS = README.parent / "docs" / "sharpness.md"
TEXT = README.parent / "docs" / "text.md"
MODELS = README.parent / "docs" / "models.md"
PAGES = (README, CERTIFICATION, PROTECT, UNLEARN, AUDIT, SHARPNESS, TEXT, MODELS)


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


FEW = (("steps=440", "steps=44"), ("steps=100", "steps=10"), ("draws=500", "draws=100"))


def test_python_runs(capsys):
    """With fewer steps and draws, and a smaller network, than are written there."""
    (code,) = blocks("python")
    for usual, few in (*FEW, ("nets.cnn(10)", "nets.cnn(10, (4, 8))")):
        assert usual in code
        code = code.replace(usual, few)
    exec(compile(code, "README.md", "exec"), {})
    assert re.fullmatch(r"\[\(0\.01, .*\), \(0\.05, .*\)\] [01]\.\d+\n", capsys.readouterr().out)


@pytest.mark.slow
def test_python_of_certification_runs(capsys):
    """The first block with a small network; the second is a whole program for a cluster, which test_processes runs."""
    code, _ = blocks("python", CERTIFICATION)
    code = code.replace("draws=1000", "draws=200").replace("draws=10_000, prior", "draws=300, prior")
    setup = """
import jax, dememo_jax as dm
train, test = dm.sources.load("digits")
model, key, save = dm.models.from_linen(dm.nets.mlp(10, (8,))), jax.random.key(0), lambda draws: None
apply, params = dm.models.freeze(model, model.init(key, test.x[:1]))
"""
    names: dict = {}
    exec(compile(setup + code, "certification.md", "exec"), names)
    assert names["depth"].draws == 300
    assert "draws_needed" in capsys.readouterr().out


@pytest.mark.slow
def test_python_of_protect_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # it writes a release
    ranges, code, text = blocks("python", PROTECT)
    names: dict = {}
    exec(compile(ranges, "protect.md", "exec"), names)
    assert names["scaled"].x.max() == 1
    assert names["as_it_is"].x.max() > 2
    exec(compile(code, "protect.md", "exec"), {})
    assert "'protected, mixup'" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "release").iterdir()) == ["images", "manifest.json", "released.npz"]
    (tmp_path / "reviews.tsv").write_text("a b c d e f g h i j k l\t0\nm n o p q r s t u v w x\t1\n")
    exec(compile(text.replace("found.labels)  # ten", "found.labels, stop=())  # ten"), "protect.md", "exec"), {})
    assert "[[11  0]\n [ 0 11]]" in capsys.readouterr().out


@pytest.mark.slow
def test_python_of_text_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    lines = [f"{who} was {how}\t{label}" for who in "abcdefghij" for label, how in enumerate(("dull, sad", "fun, warm"))]
    (tmp_path / "reviews.tsv").write_text("\n".join(lines))
    code, _ = blocks("python", TEXT)  # the second is of a large model: test_sharding runs it on a small one
    exec(compile(code, "text.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "0 tokens cut from a text at most" in shown
    assert "accuracy 1.0" in shown
    assert re.search(r"\[\(0\.002, [01]\.\d+\)\]", shown)


@pytest.mark.slow
def test_python_of_unlearn_runs(capsys):
    (code,) = blocks("python", UNLEARN)
    exec(compile(code, "unlearn.md", "exec"), {})
    assert "within a factor e^2 " in capsys.readouterr().out


@pytest.mark.slow
def test_python_of_audit_runs(capsys):
    (code,) = blocks("python", AUDIT)
    exec(compile(code, "audit.md", "exec"), {})
    assert "TwoSided(under=" in capsys.readouterr().out


@pytest.mark.slow
def test_python_of_sharpness_runs(capsys):
    (code,) = blocks("python", SHARPNESS)
    exec(compile(code, "sharpness.md", "exec"), {})
    assert "(2, 3, 2)" in capsys.readouterr().out


def test_solvers_of_the_page_are_those_of_the_library():
    rows = re.findall(r"^\| `([a-z_]+)` \| [^|]* \| [^|]* \| [^|]* \|$", SHARPNESS.read_text(), flags=re.MULTILINE)
    assert tuple(rows) == sharpness.SOLVERS == get_args(flags.Solver)


def test_attacks_of_the_page_are_those_of_the_command():
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (`[^|]*) \| [^|]* \| [^|]* \|$", AUDIT.read_text(), flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(get_args(configs.Attack))
    functions = [name for _, row in rows for name in re.findall(r"`([a-z0-9_.]+)`", row)]
    assert all(hasattr(bounds if "." in name else audit, name.rpartition(".")[2]) for name in functions)


def test_unlearning_methods_of_the_page_are_those_of_the_command():
    rows = re.findall(r"^\| (`[^|]*) \| (`[^|]*) \| [^|]* \| [^|]* \|$", UNLEARN.read_text(), flags=re.MULTILINE)
    named = [name for row, _ in rows for name in re.findall(r"`([a-z0-9-]+)`", row)]
    assert sorted(named) == sorted(forgetting.KINDS) == sorted(get_args(configs.Forget))
    functions = [name for _, row in rows for name in re.findall(r"`([a-z0-9_]+)`", row)]
    assert all(hasattr(unlearn, name) for name in functions)


def test_methods_of_the_page_are_those_of_the_command():
    rows = re.findall(r"^\| (`[^|]*) \| [^|]* \| [^|]* \|$", PROTECT.read_text(), flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([a-z-]+)`", row)]
    assert sorted(name for name in named if name != "--method") == sorted(get_args(configs.Perturb))
    assert {*recipes.KINDS, "regtext"} == set(get_args(configs.Perturb))
    assert set(countermeasures.NAMES) == set(get_args(configs.Counter))


def test_commands_parse():
    lines = [
        line for page in PAGES for block in blocks("sh", page) for line in block.splitlines() if line.startswith("dememo ")
    ]
    assert len(lines) == 47
    for line in lines:
        cli.parse(shlex.split(line, comments=True)[1:])


def test_files_it_names_exist():
    for page in PAGES:
        for name in re.findall(r"(?<![\w/])(?:benchmarks|docs|experiments|tests)/[\w./-]+\w", page.read_text()):
            assert (README.parent / name).exists(), name
