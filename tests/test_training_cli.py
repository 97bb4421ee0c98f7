"""How a victim is trained: the flags of `dememo train`, the runs that follow it, folders from before the flags."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import inside, result

from dememo_jax import cli, nets, train
from dememo_jax.cli import configs, forgetting, lineage, networks, runs, victims

YOUNG = ("optimizer", "schedule", "precision")  # fields that older folders do not have
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """A victim in half precision by AdamW."""
    run = tmp_path_factory.mktemp("runs") / "victim"
    how = ("--optimizer", "adamw", "--schedule", "step", "--precision", "bfloat16", "--lr", 0.005)
    assert inside("train", "--run", run, "--model", "mlp", "--epochs", 3, *how) == 0
    return run


def strip(folder):
    """Make the folder one of a version without those flags."""
    for name in ("config.json", "result.json"):
        if (folder / name).exists():
            kept = json.loads((folder / name).read_text())
            kept["config"] = {n: v for n, v in kept["config"].items() if n not in YOUNG}
            kept = {n: v for n, v in kept.items() if n not in ("digest", "files")}
            (folder / name).write_text(json.dumps(kept))


def test_a_victim_by_adamw_in_bfloat16(halved):
    done = result(halved)
    assert done["values"]["final"] > 0.85
    assert {n: done["config"][n] for n in ("optimizer", "schedule", "precision", "lr", "weight_decay")} == {
        "optimizer": "adamw", "schedule": "step", "precision": "bfloat16", "lr": 0.005, "weight_decay": 0.05,
    }  # fmt: skip
    base = lineage.trained(halved)
    assert {leaf.dtype for leaf in jax.tree.leaves(base.weights)} == {jnp.dtype("float32")}
    x = base.test.x[:64]
    ours, theirs = (net.apply(base.weights, x) for net in (base.trainee, base.model))
    assert ours.dtype == theirs.dtype == jnp.float32
    assert 0 < float(jnp.abs(ours - theirs).max()) < 0.05 * float(jnp.abs(theirs).max())


def test_what_follows_trains_as_the_victim_did(halved, tmp_path, capsys):
    base = lineage.trained(halved)
    config = configs.Unlearn(run=tmp_path / "rt", source=halved, method="retrain", forget_class=(0,))
    epochs, lr = forgetting.effort(config, base)
    assert (epochs, lr) == (3, 0.005)
    job = forgetting.Job(config, base, np.asarray(base.train.y) == 0, epochs, lr)
    assert job.usual(57) is train.usual("adamw", "step", 0.005, 0.9, 0.05, 57)
    assert base.trainee is networks.model("mlp", 10, (8, 8), "bfloat16")
    assert inside("unlearn", "--run", tmp_path / "rt", "--from", halved, "--method", "retrain", "--forget-class", 0) == 0
    after = result(tmp_path / "rt")["values"]["after"]
    assert after["Dc"] == 0
    assert after["Dr"] > 0.85
    tune = ("unlearn", "--run", tmp_path / "ft", "--from", halved, "--method", "finetune", "--forget-class", 0, "--epochs", 1)
    assert inside(*tune) == 2
    assert "is for sgd" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "ft").exists()
    assert inside(*tune, "--lr", 0.001) == 0


def test_shadows_train_as_the_victim_did(halved, monkeypatch):
    asked = []
    monkeypatch.setattr(victims.victim, "learner", lambda model, transform, steps, **how: asked.append((model, transform)))
    base = lineage.trained(halved)
    known = json.loads((halved / "config.json").read_text())["config"]
    victims.learner(runs.filled(configs.Train, halved, known), base, 128)
    assert asked == [(base.trainee, train.usual("adamw", "step", 0.005, 0.9, 0.05, 6))]


# --- older folders -----------------------------------------------------------------------------------------------


def test_older_folders_are_read_and_go_on(tmp_path, capsys):
    run = tmp_path / "old"
    ask = ("train", "--run", run, "--model", "mlp", "--epochs", 1)
    assert inside(*ask) == 0
    date = result(run)["measured"]["date"]
    strip(run)
    assert inside(*ask) == 0
    assert "is of an older version" in " ".join(capsys.readouterr().out.split())
    assert result(run)["measured"]["date"] == date  # shown, not computed
    base = lineage.trained(run)
    assert [base.trained[name] for name in YOUNG] == ["sgd", "cosine", "float32"]
    assert base.trainee is base.model
    assert inside("unlearn", "--run", tmp_path / "rt", "--from", run, "--method", "retrain", "--forget-class", 0) == 0
    assert inside(*ask, "--optimizer", "adamw", "--lr", 0.1, "--weight-decay", 5e-4) == 2
    assert "optimizer (there 'sgd', asked 'adamw')" in " ".join(capsys.readouterr().err.split())
    (run / "result.json").unlink()
    assert inside(*ask) == 0  # as if killed before the end
    assert not set(YOUNG) & set(json.loads((run / "config.json").read_text())["config"])


def test_stages_of_older_ensembles_keep_their_names(tmp_path, monkeypatch):
    run, begin = tmp_path / "run", runs.begin
    config = configs.Sisa(run=run, model="mlp", shards=2, slices=1, epochs=1)

    def older(folder, described, **how):
        return begin(folder, {name: value for name, value in described.items() if name not in YOUNG}, **how)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "begin", older)
        cli.execute(config)
    (run / "result.json").unlink()

    def stages():
        return {path: path.stat().st_mtime_ns for path in (run / "stages").rglob("*") if path.is_file()}

    before = stages()
    assert before
    cli.execute(config)
    assert stages() == before
    assert (run / "result.json").exists()


# --- images and networks -----------------------------------------------------------------------------------------


def test_large_images_meet_the_networks_for_them():
    assert [networks._net(name, 5, (96, 128), "float32").stem for name in networks.STEMMED] == ["large"] * 4
    assert [networks._net(name, 5, (32, 32), "float32").stem for name in networks.STEMMED] == ["small"] * 4
    assert networks._net("vit-tiny", 5, (224, 224), "bfloat16") == nets.vit_tiny(5, 16, dtype=jnp.bfloat16)
    assert networks._net("vit-tiny", 5, (64, 64), "float32") == nets.vit_tiny(5, 4)


def images(path, side, count=12):
    random = np.random.default_rng(0)
    x, y = random.integers(0, 256, (count, side, side, 3), np.uint8), np.arange(count) % 3
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    return path


def test_large_images_through_the_command_line(tmp_path, capsys):
    data = images(tmp_path / "large.npz", 96)
    train_on = ("train", "--data", data, "--model", "cnn", "--batch", 6, "--epochs", 1, "--precision", "bfloat16")
    assert inside(*train_on, "--augment", "resized-crop-flip-jitter", "--run", tmp_path / "run") == 0
    assert np.isfinite(result(tmp_path / "run")["values"]["history"][0]["loss"])
    capsys.readouterr()
    for command in ("train", "sisa"):
        data = images(tmp_path / "odd.npz", 30)
        assert inside(command, "--data", data, "--model", "vit-tiny", "--run", tmp_path / "odd") == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "vit-tiny cuts images of 30 x 30 into patches of 4, which does not divide them" in said
        assert not (tmp_path / "odd").exists()
