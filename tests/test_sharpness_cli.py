"""`dememo sharpness`: epochs that training kept, UD with controls, landscapes, what is refused, and a run that is cut off."""

import shutil

import numpy as np
import pytest
from commands import inside, result

from dememo_jax import cli, sharpness
from dememo_jax.cli import lineage, sharpening
from dememo_jax.errors import BadInput

SMALL = ("--images", 128, "--batch", 64, "--rounds", 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train = ("train", "--model", "mlp", "--epochs", 5, "--every", 2)
    assert inside("protect", "--run", folder / "noise", "--method", "lsp") == 0
    assert inside(*train, "--run", folder / "clean") == 0
    assert inside(*train, "--run", folder / "poisoned", "--from", folder / "noise") == 0
    assert inside(*train, "--run", folder / "labels", "--random-labels") == 0
    assert inside("train", "--model", "mlp", "--epochs", 2, "--run", folder / "short") == 0
    return folder


def asked(root, run, *more, source="poisoned"):
    return inside("sharpness", "--run", run, "--from", root / source, *SMALL, *more)


@pytest.mark.slow
def test_training_keeps_epochs(root):
    base = lineage.trained(root / "clean")
    kept = lineage.kept(root / "clean", base)
    assert list(kept) == [2, 4, 5]
    for one, other in zip(np.ravel(kept[5].params["Dense_0"]["kernel"]), np.ravel(base.weights.params["Dense_0"]["kernel"])):
        assert one == other
    assert list(lineage.kept(root / "short", lineage.trained(root / "short"))) == [2]


@pytest.mark.slow
def test_distances_with_controls_and_landscapes(root, tmp_path, capsys):
    solvers = ("--solver", "ball", "diagonal")
    scenes = ("--landscape", "trajectory", "random", "top", "--points", 3)
    how = ("--clean", root / "clean", "--control", root / "labels", *solvers, *scenes)
    assert asked(root, tmp_path / "s", *how) == 0
    values, said = result(tmp_path / "s")["values"], capsys.readouterr().out
    assert set(values["distances"]) == {"ball", "diagonal"}
    for solver, by in values["distances"].items():
        assert list(by) == ["this model", "clean", "labels"]
        assert by["clean"]["distance"] == 1
        assert by["clean"]["epochs"] == 3
        assert by["this model"]["measure"]["solver"] == solver
        assert len(values["sal"][solver]["labels"]) == 3
    again = sharpness.from_plain(values["sal"]["ball"]["this model"][0])
    assert again.measure.layers == ("Dense_0/kernel", "Dense_1/kernel")
    assert again.measure.examples == 128
    for kind in ("trajectory", "random", "top"):
        assert np.shape(values["landscapes"][kind]["loss"]) == (3, 3)
        assert (tmp_path / "s" / f"landscape-{kind}.png").stat().st_size > 1000
    middle = values["landscapes"]["random"]
    assert middle["accuracy"][1][1] == pytest.approx(values["sal"]["ball"]["this model"][-1]["accuracy"], abs=1e-6)
    assert len(values["landscapes"]["trajectory"]["trajectory"]) == 4  # the start, and three epochs
    assert "Unlearnable Distance, diagonal" in said
    assert (tmp_path / "s" / "sal-diagonal.png").exists()
    # the control was measured on the labels that it learned
    accuracy = values["sal"]["ball"]["labels"][-1]["accuracy"]
    assert accuracy > values["sal"]["ball"]["labels"][-1]["test_accuracy"]


@pytest.mark.slow
def test_alone_on_other_data_and_in_mixed_mode(root, tmp_path):
    assert asked(root, tmp_path / "a", "--on", "test", "--solver", "one_step", source="short") == 0
    done = result(tmp_path / "a")
    assert done["values"]["distances"] == {}
    assert "so no UD" in done["sections"][0]["summary"]
    assert done["values"]["sal"]["one_step"]["this model"][0]["measure"]["on"] == "test"
    assert asked(root, tmp_path / "b", "--mode", "mixed", "--solver", "one_step", "--clean", root / "clean") == 0
    sals = result(tmp_path / "b")["values"]["sal"]["one_step"]["this model"]
    history = result(root / "poisoned")["values"]["history"]
    assert [one["loss"] for one in sals] == [history[epoch - 1]["loss"] for epoch in (2, 4, 5)]
    assert sals[0]["measure"]["mode"] == "mixed"


@pytest.mark.slow
def test_a_run_that_is_cut_off_goes_on(root, tmp_path, monkeypatch):
    how = ("--solver", "one_step", "normalized", "--clean", root / "clean")
    assert asked(root, tmp_path / "whole", *how) == 0
    count, real = [], sharpening._sal

    def dies(*arguments):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sharpening, "_sal", dies)
    assert asked(root, tmp_path / "cut", *how) == cli.INTERRUPTED
    monkeypatch.setattr(sharpening, "_sal", lambda *arguments: count.append(1) or real(*arguments))
    assert asked(root, tmp_path / "cut", *how) == 0
    assert len(count) == 5 + 12 - 4  # four were kept
    assert result(tmp_path / "cut")["values"] == result(tmp_path / "whole")["values"]


def test_bad_input(root, tmp_path, capsys):
    def refused(*more, source="poisoned"):
        assert asked(root, tmp_path / "no", *more, source=source) == cli.BAD_INPUT
        assert not (tmp_path / "no").exists()
        return " ".join(capsys.readouterr().err.split())

    clean = ("--clean", root / "clean")
    assert "--radius must be positive" in refused("--radius", 0)
    assert "has [2, 4, 5]" in refused("--clean", root / "short")
    assert "not trained on clean data" in refused("--clean", root / "labels")
    assert "against a --clean run" in refused("--control", root / "labels")
    assert "different names" in refused(*clean, "--control", root / "labels", root / "labels")
    assert "no leaf matches 'conv'" in refused("--only", "conv")
    assert "128 images are less than one --batch of 256" in refused("--batch", 256)
    assert "three kept epochs" in refused("--landscape", "trajectory", source="short")
    assert "is a run of `dememo protect`" in refused("--control", root / "noise", *clean)
    assert inside("train", "--run", tmp_path / "no", "--every", 0) == cli.BAD_INPUT


def test_a_damaged_epoch_is_refused_by_name(root, tmp_path):
    shutil.copytree(root / "clean", tmp_path / "clean")
    base = lineage.trained(tmp_path / "clean")
    file = next(path for path in (tmp_path / "clean" / "epochs" / "00004").rglob("*") if path.is_file() and path.stat().st_size)
    file.write_bytes(b"damaged")
    with pytest.raises(BadInput, match=r"its epochs/00004 cannot be read .* is damaged"):
        lineage.kept(tmp_path / "clean", base)
