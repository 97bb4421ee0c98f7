"""`dememo audit`: every attack by name, its null, what is refused, and cohorts that are interrupted."""

import shutil
from typing import get_args

import numpy as np
import pytest
from commands import inside, result

from dememo_jax import audit, cli
from dememo_jax.cli import configs, memberships, recovering

COMPARED = ("u-lira", "klom", "epsilon", "two-sided", "relative")


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A victim, class 3 forgotten by fine-tuning and by retraining, and a certificate of the former."""
    folder = tmp_path_factory.mktemp("runs")
    victim = ("--from", folder / "victim", "--epochs", 1)
    assert inside("train", "--run", folder / "victim", "--model", "mlp", "--epochs", 2) == 0
    assert inside("unlearn", "--run", folder / "rt", "--method", "retrain", "--forget-class", 3, *victim) == 0
    assert inside("unlearn", "--run", folder / "ft", "--method", "finetune", "--forget-class", 3, *victim) == 0
    np.save(folder / "some.npy", np.arange(0, 1347, 30))
    assert (
        inside("unlearn", "--run", folder / "some", "--method", "retrain", "--forget-index", folder / "some.npy", *victim) == 0
    )
    ask = ("--sigma", 0.05, "--eta", 0.01, "--draws", 130, "--strategy", "map")
    assert inside("certify", "--run", folder / "bound", "--from", folder / "ft", *ask) == 0
    return folder


def audited(root, run, *asked, source="ft"):
    return inside("audit", "--run", run, "--from", root / source, "--epochs", 2, *asked)


def test_one_model_and_its_reference(root, tmp_path, capsys):
    attacks = ("--attack", "sok", "signals", "thresholds", "recovery", "random", "relearn")
    assert audited(root, tmp_path / "a", "--against", root / "rt", *attacks, "--radii", 0.1, 0.4, "--draws", 20) == 0
    values = result(tmp_path / "a")["values"]
    assert values["target"] == "class 3"
    assert set(values["membership"]) == {"correctness", "probability", "entropy"}
    assert {"confidence, this model", "confidence, retrained"} <= set(values["signals"])
    for one in values["signals"].values():
        assert one["area"]["low"] <= one["area"]["value"] <= one["area"]["high"]
        assert one["familiar"][1]["tpr"] is None  # 46 unseen images cannot tell 0.1 %
        assert one["familiar"][1]["needed"] == 1000
    assert [r["radius"] for r in values["recovery"]] == [0.1, 0.4] == [r["radius"] for r in values["recovery_retrained"]]
    assert all(max(r["distance"]) <= r["radius"] * (1 + 1e-5) for r in values["recovery"])
    assert all(r["oracle"] >= r["chosen"] for r in values["random"])
    assert set(values["relearning"]) == {"this model", "retrained"}
    said = capsys.readouterr().out
    section = result(tmp_path / "a")["sections"][0]
    assert section["summary"].startswith(f"class 3: {values['verdict']}; recovery")
    assert section["tables"][0]["title"] == "Recovery in a ball of weights"  # the page leads with it
    (signals,) = [table for table in section["tables"] if table["title"] == "Signals of one model"]
    assert signals["columns"] == ["attack", "model", "area"]  # 46 unseen images are too few for either rate
    assert "46 unseen images, too few for rates at 1.0% and 0.1%, which need 100 and 1,000" in signals["note"]
    (curve,) = [plot for plot in section["plots"] if plot["name"] == "roc-signals"]
    assert min(x for _, xs, _ in curve["series"] for x in xs) >= 1 / 46 - 1e-9
    assert "Thresholds of each class" in said
    assert (tmp_path / "a" / "roc-signals.png").exists()


def test_the_retrained_model_against_itself(root, tmp_path):
    assert audited(root, tmp_path / "a", "--against", root / "rt", "--attack", "sok", "signals", source="rt") == 0
    values = result(tmp_path / "a")["values"]
    assert set(values["membership"].values()) == {0.0}
    assert values["signals"]["confidence, this model"] == values["signals"]["confidence, retrained"]


@pytest.mark.slow
def test_shadow_models_attack(root, tmp_path, capsys):
    assert audited(root, tmp_path / "a", "--against", root / "rt", "--attack", "lira", "rmia", "--shadows", 9) == 0
    values = result(tmp_path / "a")["values"]["shadows"]
    assert set(values) == {f"{attack}, {model}" for attack in ("LiRA", "RMIA") for model in ("this model", "retrained")}
    assert "9 shadow models of the same recipe" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_many_models_and_their_null(root, tmp_path):
    asked = ("--against", root / "rt", "--attack", *COMPARED, "--shadows", 8)
    assert audited(root, tmp_path / "a", *asked) == 0
    found = result(tmp_path / "a")["values"]["distributions"]
    assert set(found) == {"finetune", "no unlearning", "retrained again"}
    null, none = found["retrained again"], found["no unlearning"]
    assert null["klom"]["p_value"] > 0.01
    assert null["quality"]["p_value"] > 0.01
    assert null["u_lira"]["low"] <= 0.5 <= null["u_lira"]["high"]
    assert null["two_sided"]["area"]["low"] <= 0.5 <= null["two_sided"]["area"]["high"]
    assert null["joint"]["epsilon_low"] == null["epsilon"]["largest_low"] == 0
    assert none["two_sided"]["under"] > 0.9  # a class that was never trained on looks strange indeed
    assert none["klom"]["p_value"] < 0.01
    with np.load(tmp_path / "a" / "cohorts.npz", allow_pickle=False) as kept:
        assert kept["retrained"].shape == (16, 137)
        assert kept["unlearned"].shape == (8, 137)
    assert "nearer to retrained: p-value" in (tmp_path / "a" / "result.json").read_text()


@pytest.mark.parametrize("method", [pytest.param(name, marks=pytest.mark.slow) for name in ("ssd", "noisy")])
def test_methods_that_unlearn_one_by_one(root, tmp_path, method):
    how = ("--epochs", 1) if method == "noisy" else ()
    forget = ("unlearn", "--run", tmp_path / method, "--from", root / "victim", "--method", method, "--forget-class", 3)
    assert inside(*forget, *how) == 0
    shutil.copytree(root / "victim", tmp_path / "victim")  # runs are found beside each other
    assert inside("audit", "--run", tmp_path / "a", "--from", tmp_path / method, "--attack", "klom", "--shadows", 8) == 0
    assert set(result(tmp_path / "a")["values"]["distributions"]) == {method, "no unlearning", "retrained again"}


@pytest.mark.slow
def test_interrupted_cohorts_go_on(root, tmp_path, monkeypatch, capsys):
    asked = ("--attack", "lira", "--shadows", 9, "--width", 3)
    assert audited(root, tmp_path / "whole", *asked) == 0
    score, calls = audit.score, []

    def interrupted(*given, **how):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*given, **how)

    monkeypatch.setattr(audit, "score", interrupted)
    assert audited(root, tmp_path / "cut", *asked) == cli.INTERRUPTED
    calls += [1, 1]
    assert audited(root, tmp_path / "cut", *asked) == 0
    assert len(calls) == 2 + 2 + 2  # one group was there: two of three were trained again
    assert "resuming" in capsys.readouterr().out
    assert result(tmp_path / "cut")["values"] == result(tmp_path / "whole")["values"]


@pytest.mark.slow
def test_neighbours_of_attacked_models_keep_to_the_certificate(root, tmp_path):
    asked = ("--attack", "recovery", "--radii", 0.01, 0.2, "--certificate", root / "bound", "--draws", 60)
    assert audited(root, tmp_path / "a", *asked) == 0
    (held,) = result(tmp_path / "a")["values"]["smoothed"]  # the wider attack is beyond the certificate
    assert held["eta"] == 0.01
    assert held["group"] == "class 3"
    assert held["below_high"] >= held["q"]
    assert "no row reaches it" in (tmp_path / "a" / "result.json").read_text()


@pytest.mark.slow
def test_examples_of_all_classes_and_a_whole_training_set(root, tmp_path):
    assert audited(root, tmp_path / "a", "--attack", "signals", "recovery", "--radii", 0.1, source="some") == 0
    values = result(tmp_path / "a")["values"]
    assert values["target"] == "the forgotten examples"
    assert values["target_class"] is None
    assert values["recovery"][0]["hints"] < 45
    asked = ("--attack", "sok", "recovery", "--hints", "test", "--relative", "--only", "Dense_1", "--radii", 0.05)
    assert audited(root, tmp_path / "b", *asked, source="victim") == 0
    values = result(tmp_path / "b")["values"]
    assert values["target"] == "the training set"
    assert values["recovery"][0]["hints"] == 450
    assert values["recovery"][0]["relative"] == 0.05
    assert values["recovery"][0]["only"] == "Dense_1"


def bars(n, seed):
    """Images with a bright bar whose place says the class, one of four."""
    random, labels = np.random.default_rng(seed), np.arange(n) % 4
    x = random.integers(0, 60, (n, 8, 8, 1))
    for image, label in zip(x, labels):
        image[2 * label : 2 * label + 2] += 150
    return x.astype(np.uint8), labels


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """A model that is right on everything and forgot class 3, which has no test images; one with a single test image."""
    folder = tmp_path_factory.mktemp("easy")
    (x, y), (xt, yt) = bars(80, 1), bars(40, 2)
    np.savez(folder / "n.npz", x_train=x, y_train=y, x_test=xt[yt != 3], y_test=yt[yt != 3])
    np.savez(folder / "o.npz", x_train=x, y_train=y, x_test=xt[:1], y_test=yt[:1])
    how = ("--model", "mlp", "--batch", 16)
    assert inside("train", "--data", folder / "n.npz", "--run", folder / "v", "--epochs", 12, *how) == 0
    assert inside("train", "--data", folder / "o.npz", "--run", folder / "o", "--epochs", 1, *how) == 0
    forget = ("--method", "finetune", "--epochs", 1, "--forget-class", 3)
    assert inside("unlearn", "--from", folder / "v", "--run", folder / "u", *forget) == 0
    return folder


@pytest.mark.slow
def test_a_model_that_is_right_on_everything_costs_a_dash(easy, tmp_path):
    asked = ("--attack", "sok", "signals", "thresholds", "--target-class", 0)
    assert inside("audit", "--from", easy / "v", "--run", tmp_path / "a", *asked) == 0
    done = result(tmp_path / "a")
    tables = {table["title"]: table for table in done["sections"][0]["tables"]}
    assert set(tables) == {"Membership inference", "Signals of one model", "Thresholds of each class"}
    rows = {row[0]: row[2:] for row in tables["Thresholds of each class"]["rows"]}
    assert rows["correctness"] == [None, None]
    assert all(None not in rates for name, rates in rows.items() if name != "correctness")


@pytest.mark.parametrize(
    ("source", "asked", "sentence"),
    [
        ("u", "--attack recovery", "class 3 has no test images to measure recovery on"),
        ("u", "--attack random relearn", "class 3 has no test images to measure random, relearn on"),
        ("u", "--attack signals", "class 3 has no test images"),
        ("u", "--attack lira rmia", "class 3 has no test images"),
        ("o", "--attack lira --shadows 8", "lira need two test images or more"),
        (
            "o",
            "--attack recovery --hint-share 0.001",
            "--hint-share 0.001 of 80 examples is no example at all; raise it to 0.0125",
        ),
    ],
)
def test_empty_parts_are_one_sentence_before_any_work(easy, tmp_path, capsys, source, asked, sentence):
    assert inside("audit", "--from", easy / source, "--run", tmp_path / "N", *asked.split()) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "N").exists()


def curve(*accuracy, radius=0.4):
    return audit.Recovery(radius, "ball", "frozen", 10, accuracy, (0.1,) * len(accuracy))


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        ([curve(0.0, 0.2, 0.6)], [curve(0.0, 0.0, 0.4)], "not forgotten: back to 0.5 after 2 epochs at radius 0.4"),
        ([curve(0.0, 0.6, 0.6)], [curve(0.0, 0.0, 0.9)], "not forgotten: back to 0.5 after 1 epoch at radius 0.4"),
        ([curve(0.88, 0.9)], [curve(0.0, 0.9)], "not forgotten: at 0.880 before any attack, retraining at 0.000"),
        ([curve(0.0, 0.1)], [curve(0.0, 0.9)], "harder to bring back than retraining: not in 1 epoch at radius 0.4"),
        ([curve(0.0, 0.9)], [curve(0.0, 0.8)], "as retraining: both back to 0.5 after 1 epoch at radius 0.4"),
        ([curve(0.0, 0.1), curve(0.0, 0.9, radius=0.8)], [curve(0.0, 0.2), curve(0.0, 0.3, radius=0.8)],
         "not forgotten: back to 0.5 after 1 epoch at radius 0.8"),
    ],
)  # fmt: skip
def test_verdict_is_recovery_against_retraining(mine, theirs, expected):
    assert recovering.verdict(mine, theirs, 0.5).startswith(expected)


def test_curves_end_at_one_false_alarm():
    random = np.random.default_rng(0)
    scores, members = np.concatenate([random.normal(1, 1, 300), random.normal(0, 1, 46)]), np.arange(346) < 300
    false, true = memberships._curve(scores, members)
    for x, y in zip(false, true):
        strangers, alarms = np.append(np.sort(scores[~members])[::-1], -np.inf), round(46 * x)
        assert alarms >= 1
        assert y == pytest.approx((scores[members] > strangers[alarms]).mean())
    assert (min(false), max(false), max(true)) == (pytest.approx(1 / 46), 1.0, 1.0)


REFUSED = {
    "attack": ("--attack magic", "magic"),
    "few shadows": ("--attack lira --shadows 4", "--shadows must be at least 8"),
    "no unlearning": ("--from V/victim --attack klom", "--from must be an unlearn run"),
    "retraining": ("--from V/rt --attack relative", "this run is a retraining"),
    "radius": ("--radii 0.4 -1", "--radii must be positive"),
    "radius twice": ("--radii 0.4 0.8 0.4", "--radii names 0.4 twice"),
    "attack twice": ("--attack sok signals sok", "--attack names sok twice"),
    "goal": ("--attack relearn --goal 1.5", "--goal is an accuracy in (0, 1]"),
    "alpha": ("--alpha 1", "--alpha must lie strictly between 0 and 1"),
    "leaf": ("--only nothing", "no leaf matches 'nothing'"),
    "hints": ("--hint-share 0.001", "is no example at all"),
    "certificate of another": ("--from V/rt --certificate V/bound", "certifies another model"),
    "no certificate": ("--certificate V/rt", "is a run of `dememo unlearn`"),
    "certificate, no recovery": ("--attack sok --certificate V/bound", "add recovery to --attack"),
    "certificate, statistics": ("--statistics fit --certificate V/bound", "attack with --statistics frozen"),
    "against other examples": ("--against V/some", "retrained with examples in question"),
    "against another split": ("--against V/other/rt", "of other data, or of another split"),
}


@pytest.fixture(scope="module")
def other(root):
    """A retraining on the same training images, whose test images are others."""
    from dememo_jax import sources

    train, test = sources.load("digits")
    arrays = {"x_train": np.asarray(train.x), "y_train": np.asarray(train.y)}
    np.savez(root / "d.npz", **arrays, x_test=np.asarray(test.x)[::-1], y_test=np.asarray(test.y)[::-1])
    folder = root / "other"
    assert inside("train", "--run", folder / "v", "--data", root / "d.npz", "--model", "mlp", "--epochs", 1) == 0
    forget = ("unlearn", "--run", folder / "rt", "--from", folder / "v", "--method", "retrain", "--forget-class", 3)
    assert inside(*forget, "--epochs", 1) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_sentence_and_writes_nothing(name, root, other, tmp_path, capsys):
    typed, sentence = REFUSED[name]
    words = [word.replace("V/", f"{root}/", 1) for word in typed.split()]
    source = () if "--from" in words else ("--from", root / "ft")
    assert inside("audit", "--run", tmp_path / "N", *source, *words) == 2
    assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "N").exists()


def test_every_attack_is_tested_here():
    tested = {"sok", "signals", "thresholds", "recovery", "random", "relearn", "lira", "rmia", *COMPARED}
    assert tested == set(get_args(configs.Attack))
