"""The commands as a user types them: the whole story in a reduced form, chains of runs, refusals."""

import errno
import json
import shutil

import numpy as np
import optax
import pytest
from commands import inside, result
from kinds import some

from dememo_jax import cli, protect, report
from dememo_jax.cli import recipes


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A small protected victim: one protect run, one train run on its classes 0-3, one unlearn run."""
    root = tmp_path_factory.mktemp("runs")
    assert inside("protect", "--run", root / "ops", "--method", "ops") == 0
    train = ("train", "--run", root / "victim", "--from", root / "ops", "--model", "mlp", "--epochs", 2)
    assert inside(*train, "--protected-classes", 0, 1, 2, 3) == 0
    for method, folder in (("finetune", "ft"), ("retrain", "rt")):
        unlearn = ("unlearn", "--run", root / folder, "--from", root / "victim", "--method", method)
        assert inside(*unlearn, "--forget-class", 0, "--epochs", 1) == 0
    return root


@pytest.mark.slow
def test_quickstart_reduced(tmp_path, capsys, monkeypatch):
    draw = report.draw  # one picture of many
    monkeypatch.setattr(report, "draw", lambda plot: draw(plot) if plot.name == "learning" else b"\x89PNG")
    small = ("--model", "mlp", "--passes", 1, "--epochs", 1, "--recovery-epochs", 2, "--draws", 130, "--eta", 0.005, 0.2)
    assert inside("quickstart", "--run", tmp_path / "story", *small) == 0
    said = capsys.readouterr().out
    for heading in ("a. protect", "b. train", "c. unlearn", "d. audit", "e. certify", "f. report", "Certified depth"):
        assert heading in said
    values = result(tmp_path / "story")["values"]
    assert set(values["unlearn-ascent-0"]["after"]) == {"Du", "Duc", "Dut", "Dtr", "Dr", "Dt"}
    assert set(values["unlearn-ascent-5"]["after"]) == {"Dc", "Dct", "Dtr", "Dr", "Dt"}
    assert set(values["audit-finetune-5"]["membership"]) == {"correctness", "probability", "entropy"}
    assert set(values["audit-retrain-0"]["membership"].values()) == {0.0}  # the gap of the reference to itself
    assert [len(r["accuracy"]) for r in values["audit-finetune-0"]["recovery"]] == [3, 3]
    rows = values["certify-finetune-0"]["certificates"]["this model"]["rows"]
    abstained = {(row["eta"], row["lower"] is None, row["upper"] is None) for row in rows}
    assert abstained == {(0.005, False, False), (0.2, True, True)}
    assert all(row["draws_needed"] > 130 for row in rows if row["upper"] is None)
    page = (tmp_path / "story" / "report.html").read_text()
    assert "<img" in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    assert (tmp_path / "story" / "learning.png").read_bytes().startswith(b"\x89PNG")
    assert inside("quickstart", "--run", tmp_path / "story", *small) == 0  # finished: shown, not computed
    assert "a. protect" not in capsys.readouterr().out
    assert inside("quickstart", "--run", tmp_path / "story", *small, "--seed", 7) == 2
    assert "seed (there 0, asked 7)" in capsys.readouterr().err


def test_help_names_every_command_and_method(capsys):
    assert inside("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("quickstart", "protect", "train", "unlearn", "audit", "certify", "join", "report"))
    assert inside("protect", "--help") == 0
    text = "".join(capsys.readouterr().out.split())
    assert "{ue-s,ue-c,em,gray,aue,rem,sem,lock,tap,tap-untargeted," in text.replace("│", "")
    assert inside("unlearn", "--help") == 0
    text = "".join(capsys.readouterr().out.split())
    assert "{retrain,finetune,gradient-ascent,neggrad-plus,npo," in text.replace("│", "")


def test_a_run_is_the_input_of_the_next(victim, tmp_path):
    target = ("--epochs", 2, "--against", victim / "rt", "--radii", 0.1)
    assert inside("audit", "--run", tmp_path / "audit", "--from", victim / "ft", *target) == 0
    assert result(tmp_path / "audit")["values"]["target_class"] == 0  # the class that the run forgot
    ask = ("--draws", 100, "--target-class", 3, "--side", "lower", "--strategy", "map")
    assert inside("certify", "--run", tmp_path / "bound", "--from", victim / "victim", *ask) == 0
    with np.load(tmp_path / "bound" / "scores.npz", allow_pickle=False) as scores:
        assert scores["this_model"].shape == (100, 2)
    assert inside("report", tmp_path / "audit", tmp_path / "bound", "--run", tmp_path / "page") == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert "certify: bound" in page
    assert "audit: audit" in page


def certified(victim, run, *asked):
    return inside("certify", "--from", victim / "ft", "--run", run, "--eta", 0.01, "--strategy", "map", *asked)


def scores(folder):
    with np.load(folder / "scores.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file}


@pytest.mark.slow
def test_more_draws_go_on_from_those_made(victim, tmp_path, capsys):
    assert certified(victim, tmp_path / "c", "--control", victim / "victim", "--draws", 150) == 0
    first = scores(tmp_path / "c")
    assert set(first) == {"this_model", "clean_control"}
    assert certified(victim, tmp_path / "c", "--control", victim / "victim", "--draws", 200) == 0
    grown = scores(tmp_path / "c")
    assert "resuming this-model from step 150" in capsys.readouterr().out
    values = result(tmp_path / "c")["values"]
    assert values["looks"] == [150, 200]
    assert "at most 2 alpha = 0.02" in result(tmp_path / "c")["sections"][0]["tables"][0]["note"]
    said = result(tmp_path / "c")["sections"][0]["summary"]
    assert "accuracy on class 0 under noise sigma 0.05: at most" in said
    assert "in 90 % of draws, for any move of length <= 0.01 (" in said
    assert "% of the weights' length" in said
    assert "% of what unlearning moved them); on the test set at most" in said
    assert "the clean control is" in said
    for name in first:
        np.testing.assert_array_equal(grown[name][:150], first[name])
    assert certified(victim, tmp_path / "whole", "--draws", 200) == 0
    np.testing.assert_array_equal(scores(tmp_path / "whole")["this_model"], grown["this_model"])
    capsys.readouterr()
    assert certified(victim, tmp_path / "c", "--control", victim / "victim", "--draws", 150) == 2
    assert "draws (there 200, asked 150)" in capsys.readouterr().err


@pytest.mark.slow
def test_parts_are_joined(victim, tmp_path, capsys):
    assert certified(victim, tmp_path / "b", "--first", 120, "--draws", 200) == 0
    assert certified(victim, tmp_path / "a", "--first", 0, "--draws", 120) == 0
    assert inside("join", tmp_path / "b", tmp_path / "a", "--run", tmp_path / "all") == 0
    assert certified(victim, tmp_path / "whole", "--draws", 200) == 0
    np.testing.assert_array_equal(scores(tmp_path / "all")["this_model"], scores(tmp_path / "whole")["this_model"])
    joined, whole = (result(tmp_path / name)["values"]["certificates"] for name in ("all", "whole"))
    assert joined == whole
    capsys.readouterr()
    assert inside("join", tmp_path / "b", tmp_path / "b", "--run", tmp_path / "no") == 2
    assert "draws 120..200 are in two parts" in capsys.readouterr().err
    assert certified(victim, tmp_path / "seed", "--first", 0, "--draws", 120, "--seed", 9) == 0
    assert inside("join", tmp_path / "b", tmp_path / "seed", "--run", tmp_path / "no") == 2
    assert "they differ in seed" in capsys.readouterr().err
    assert inside("join", tmp_path / "b", victim / "ft", "--run", tmp_path / "no") == 2
    assert not (tmp_path / "no").exists()


def test_the_sequential_question_and_the_plan(victim, tmp_path, capsys):
    assert certified(victim, tmp_path / "plan", "--plan", "--draws", 150) == 0
    text = capsys.readouterr().out
    assert "What the rows need" in text
    assert "150 draws take about" in text
    assert not (tmp_path / "plan").exists()
    assert certified(victim, tmp_path / "ask", "--tau", 1.0, "--draws", 150, "--checkpoint-seconds", 0) == 0
    answers = result(tmp_path / "ask")["values"]["answers"]["this model"]
    assert [(a["verdict"], a["stopped"]) for a in answers] == [("below", 74), ("below", 74)]  # alpha / 2, shift 0.2
    assert len(scores(tmp_path / "ask")["this_model"]) == 74
    assert all((a["draws"], a["exceedances"], a["sigma"]) == (74, 0, 0.05) for a in answers)
    said = result(tmp_path / "ask")["sections"][0]["summary"]
    assert "accuracy on class 0 under noise sigma 0.05: shown to be at most 1 in 90 % of draws, for any move of length" in said
    slower = tmp_path / "slower"  # another speed of the machine: all draws in one chunk
    assert certified(victim, slower, "--tau", 1.0, "--draws", 150, "--checkpoint-seconds", 1000) == 0
    assert result(slower)["values"] == result(tmp_path / "ask")["values"]
    np.testing.assert_array_equal(scores(slower)["this_model"], scores(tmp_path / "ask")["this_model"])


@pytest.mark.slow
def test_other_noise_statistics_and_precision(victim, tmp_path):
    how = ("--relative", "--only", "kernel", "--precision", "bfloat16", "--images", 200, "--statistics", "batch")
    assert certified(victim, tmp_path / "c", "--draws", 150, *how) == 0
    certificate = result(tmp_path / "c")["values"]["certificates"]["this model"]
    assert certificate["precision"] == "bfloat16"
    assert certificate["images"][1] == [200, 450]
    scales = dict(certificate["scales"])
    assert all((scales[name] > 0) == ("kernel" in name) for name in scales)
    assert "Sigma" in certificate["radius"]


@pytest.mark.slow
def test_protect_releases_and_evaluates(tmp_path, capsys):
    ask = (
        "protect",
        "--run",
        tmp_path / "p",
        "--method",
        "lsp",
        "--images",
        "--evaluate",
        "--model",
        "mlp",
        "--victim-epochs",
        2,
    )
    assert inside(*ask, "--countermeasures", "mixup", "jpeg", "--classes", 1, 2) == 0
    found = result(tmp_path / "p")["values"]
    names = ["clean", "protected", "protected, mixup", "protected, jpeg", "control: random noise", "control: random labels"]
    assert list(found["evaluation"]) == names
    assert all(len(one["test"]) == 2 and one["peak"] == max(one["test"]) for one in found["evaluation"].values())
    manifest = json.loads((tmp_path / "p" / "release" / "manifest.json").read_text())
    assert manifest["budget"]["norm"] == "l2"
    assert manifest["measured"]["holds"]
    assert manifest["counts"]["protected"] == found["protected"] < manifest["counts"]["train"]
    assert len(list((tmp_path / "p" / "release" / "images").rglob("*.png"))) == 1347
    train = ("train", "--run", tmp_path / "t", "--data", tmp_path / "p" / "release" / "released.npz", "--model", "mlp")
    assert inside(*train, "--epochs", 1, "--countermeasure", "gray", "mixup", "--augment", "crop-flip") == 0
    assert "against it: gray, mixup" in capsys.readouterr().out


MORE = ("pue", "tue", "em", "tap", "lock", "ntga", "pil", "ar", "cuda", "random-class")


@pytest.mark.parametrize("method", some(MORE, ("tue",)))
def test_methods_by_name(method, tmp_path):
    """Those whose arguments the command line makes in a way of its own."""
    few = {
        "em": ("--epochs", 1), "tap": ("--epochs", 1, "--restarts", 2, "--inner-steps", 2),
        "pue": ("--draws", 2, "--passes", 1), "pil": ("--epochs", 1),
        "tue": ("--passes", 1), "ntga": ("--passes", 1), "lock": ("--passes", 1),
    }  # fmt: skip
    assert inside("protect", "--run", tmp_path, "--method", method, "--model", "mlp", *few.get(method, ())) == 0
    found = result(tmp_path)["values"]["measured"]
    assert found["holds"]
    assert found["linf"] > 0


@pytest.mark.slow
def test_non_finite_noise_keeps_what_was_made(tmp_path, monkeypatch, capsys):
    def exploding(job):
        rate = optax.piecewise_constant_schedule(0.1, {4: 1e38})
        how = {"learner_steps": 2, "batch": 128, "radius": 0.2, "stop": None}
        return protect.error_minimizing(job.model, optax.sgd(rate), **how)

    monkeypatch.setitem(recipes.KINDS, "ue-s", recipes.KINDS["ue-s"]._replace(make=exploding))
    assert inside("protect", "--run", tmp_path / "p", "--model", "mlp") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "at outer iteration 2" in said
    assert "perturbation-partial.npz" in said
    with np.load(tmp_path / "p" / "perturbation-partial.npz", allow_pickle=False) as kept:
        assert 0 < np.abs(kept["delta"]).max() <= 0.2
    assert not (tmp_path / "p" / "result.json").exists()


def test_killed_between_weights_and_result(victim, tmp_path):
    shutil.copytree(victim, tmp_path / "copy")
    train = ("train", "--from", tmp_path / "copy" / "ops", "--run", tmp_path / "copy" / "victim", "--model", "mlp")
    (tmp_path / "copy" / "victim" / "result.json").unlink()
    assert inside(*train, "--epochs", 2, "--protected-classes", 0, 1, 2, 3) == 0
    assert result(tmp_path / "copy" / "victim")["values"] == result(victim / "victim")["values"]


def test_run_folders_may_be_moved_together(victim, tmp_path):
    shutil.copytree(victim, tmp_path / "elsewhere")
    run = ("unlearn", "--run", tmp_path / "elsewhere" / "ga", "--from", tmp_path / "elsewhere" / "victim")
    assert inside(*run, "--method", "gradient-ascent", "--forget-class", 4, "--epochs", 1) == 0


@pytest.mark.slow
def test_npz_data_and_forget_masks(tmp_path):
    random = np.random.default_rng(0)
    x, y = random.integers(0, 256, (60, 6, 6, 3), np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x[:30], y_test=y[:30])
    train = ("train", "--run", tmp_path / "v", "--data", tmp_path / "own.npz", "--model", "mlp", "--epochs", 1)
    assert inside(*train) == 0
    np.save(tmp_path / "mask.npy", np.arange(60) < 7)
    unlearn = ("unlearn", "--run", tmp_path / "u", "--from", tmp_path / "v", "--method", "retrain")
    assert inside(*unlearn, "--forget-index", tmp_path / "mask.npy") == 0
    assert result(tmp_path / "u")["values"]["forgotten"] == 7
    changed = x.copy()
    changed[0, 0, 0, 0] ^= 1  # one bit of the data: not the same run any more
    np.savez(tmp_path / "own.npz", x_train=changed, y_train=y, x_test=x[:30], y_test=y[:30])

    assert inside(*train) == cli.BAD_INPUT


# what is typed (V: the victim's folder), and what the one sentence says
REFUSED = {
    "method": ("protect --run N --method magic", "magic"),
    "data set": ("train --run N --data no_such_data", "unknown data set 'no_such_data'"),
    "npz": ("train --run N --data nowhere.npz", "no such file"),
    "budget": ("protect --run N --radius 0", "--radius must be positive"),
    "budget nan": ("protect --run N --radius nan", "--radius must be a finite number"),
    "budget in range": ("protect --run N --radius 1.5", "must lie in (0, 1]"),
    "no budget": ("protect --run N --method ops --radius 0.1", "ops has no budget in a norm"),
    "pixels": ("protect --run N --method ops --pixels 65", "pixels must be between 1 and 64"),
    "sharpness": ("protect --run N --method tue --sharpness 0.1", "tue looks at no weights"),
    "restarts": ("protect --run N --method tap --restarts 0", "--restarts must be positive"),
    "two adversaries": ("train --run N --countermeasure at at-l2", "two countermeasures have an entry for 'adversary'"),
    "countermeasure": ("train --run N --countermeasure magic", "magic"),
    "share": ("protect --run N --share 0", "share must lie in (0, 1]"),
    "protect class": ("protect --run N --classes 12", "class 12 does not exist"),
    "forget class": ("unlearn --run N --from V/victim --forget-class 10", "class 10 does not exist"),
    "forget nothing": ("unlearn --run N --from V/victim", "the forget set is empty"),
    "forget all": ("unlearn --run N --from V/victim --forget-class 0 1 2 3 4 5 6 7 8 9", "covers all data"),
    "observed class": ("unlearn --run N --from V/victim --forget-class 1 --observed-classes 77", "class 77 does not exist"),
    "eta": ("certify --run N --from V/ft --eta 0.1 -0.1", "eta must be positive"),
    "sigma": ("certify --run N --from V/ft --sigma 0", "sigma must be positive"),
    "q": ("certify --run N --from V/ft --q 1", "q must lie strictly between 0 and 1"),
    "q twice": ("certify --run N --from V/ft --q 0.3 0.3", "q names 0.3 twice"),
    "eta twice": ("certify --run N --from V/ft --eta 0.1 0.2 0.1 --plan", "eta names 0.1 twice"),
    "loud": ("certify --run N --from V/ft --sigma 1e308", "sigma must be"),
    "loud shares": ("certify --run N --from V/ft --relative --sigma 1e308", "sigma must be"),
    "tau nan": ("certify --run N --from V/ft --tau nan", "tau must be a finite number"),
    "tau inf": ("certify --run N --from V/ft --tau inf", "tau must be a finite number"),
    "tau 1e400": ("certify --run N --from V/ft --tau 1e400", "tau must be a finite number"),
    "eta nan": ("certify --run N --from V/ft --eta nan", "eta must be a finite number"),
    "chunks": ("certify --run N --from V/ft --checkpoint-seconds inf", "--checkpoint-seconds"),
    "alpha": ("certify --run N --from V/ft --alpha 0", "alpha must lie strictly between 0 and 1"),
    "draws": ("certify --run N --from V/ft --draws 0", "draws must be at least 1"),
    "few draws": ("certify --run N --from V/ft --draws 20", "20 draws can certify none of the rows asked for; 88 would do"),
    "first": ("certify --run N --from V/ft --first 1000", "--first must be less than --draws"),
    "no leaf": ("certify --run N --from V/ft --only nothing", "no leaf matches 'nothing'"),
    "parts": ("join V/ft --run N", "expected one of certify"),
    "target": ("certify --run N --from V/victim", "--target-class"),
    "target class": ("audit --run N --from V/ft --target-class 11", "class 11 does not exist"),
    "reference": ("audit --run N --from V/ft --against V/ft", "must be a run of `dememo unlearn --method retrain`"),
    "reference class": ("audit --run N --from V/victim --target-class 2 --against V/rt", "must have forgotten all of them"),
    "radii": ("audit --run N --from V/ft --radii 0.4 0", "--radii must be positive"),
    "kind of run": ("unlearn --run N --from V/ops --forget-class 1", "is a run of `dememo protect`; expected"),
    "no run folder": ("unlearn --run N --from nowhere --forget-class 1", "no such folder"),
    "not a run folder": ("train --run V", "not a run folder"),
    "from and data": ("train --run N --from V/ops --data digits", "not both"),
    "protected classes": ("train --run N --protected-classes 1", "needs a protect run"),
    "quickstart classes": ("quickstart --run N --forget 5 6", "must be a protected one"),
    "quickstart eta": ("quickstart --run N --eta 0", "eta must be positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_sentence_and_writes_nothing(name, victim, tmp_path, monkeypatch, capsys):
    typed, sentence = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    before = sorted(victim.rglob("*"))
    assert inside(*(word.replace("V", str(victim), 1) if word[0] == "V" else word for word in typed.split())) == 2
    assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "N").exists()
    assert sorted(victim.rglob("*")) == before


def test_another_configuration_is_refused_by_field(victim, capsys):
    again = ("train", "--run", victim / "victim", "--from", victim / "ops", "--model", "mlp")
    before = (victim / "victim" / "result.json").read_bytes()
    assert inside(*again, "--epochs", 3, "--protected-classes", 0, 1, 2, 3) == 2
    said = capsys.readouterr().err
    assert "epochs (there 2, asked 3)" in said
    assert "lr" not in said
    assert (victim / "victim" / "result.json").read_bytes() == before


def test_an_unfinished_run_is_no_input(victim, tmp_path, capsys):
    shutil.copytree(victim / "ops", tmp_path / "ops")
    (tmp_path / "ops" / "result.json").unlink()
    assert inside("train", "--run", tmp_path / "v", "--from", tmp_path / "ops") == 2
    assert "is not finished" in capsys.readouterr().err


def test_non_finite_loss_names_step_and_quantity(tmp_path, capsys):
    diverging = ("train", "--run", tmp_path / "v", "--model", "mlp", "--epochs", 1, "--lr", 1e38)
    assert inside(*diverging) == 1
    said = capsys.readouterr().err
    assert "loss became" in said
    assert "at step" in said
    assert not (tmp_path / "v" / "result.json").exists()


def test_full_and_read_only_disks(tmp_path, monkeypatch, capsys):
    train = ("train", "--model", "mlp", "--epochs", 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert inside(*train, "--run", tmp_path / "a") == 1
    assert "are free on its disk" in capsys.readouterr().err
    monkeypatch.undo()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dememo_jax.checkpoint.save", full)
    assert inside(*train, "--run", tmp_path / "b") == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert inside(*train, "--run", tmp_path / "b") == 0  # space again: the same command goes on
    (tmp_path / "file").write_text("")
    assert inside(*train, "--run", tmp_path / "file" / "run") == 1
    assert "cannot write" in capsys.readouterr().err
