"""Batches from disk: the same ones at any start, every example once a pass, and training on them."""

import json
from collections import Counter

import jax
import numpy as np
import optax
import pytest
from commands import inside, result
from PIL import Image

from dememo_jax import data as sets
from dememo_jax import loop, models, nets, sources, train
from dememo_jax.cli import victims
from dememo_jax.errors import BadInput

KEY = jax.random.key(3)
CLASSES = ("n01440764", "n02102040", "n03000684")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Like ImageNet-100, with three classes: PNG and JPEG of differing sizes; a class shows in the colour of the middle."""
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 60, (70 + 9 * i, 100 - 7 * i, 3), np.uint8)
                image[20:50, 20:60, label] += 180
                Image.fromarray(image).save(root / part / name / (f"{i}.png" if i % 2 else f"{i}.JPEG"))
    return root


def drawn(batches):
    return [np.asarray(batch.index).tolist() for batch in batches]


def test_batches_depend_on_the_seed_and_the_step_alone(folder):
    stream = sources.stream(str(folder), side=16, batch=7, seed=5)
    assert (stream.count, stream.classes, stream.shape) == (18, 3, (16, 16, 3))
    whole = list(stream.batches(0, 9))
    again = list(sources.stream(str(folder), side=16, batch=7, seed=5, threads=2).batches(4, 5))
    jax.tree.map(np.testing.assert_array_equal, whole[4:], again)
    endless = stream.batches(8)
    assert drawn([next(endless)]) == drawn(whole[8:])
    assert drawn(sources.stream(str(folder), side=16, batch=7, seed=6).batches(0, 9)) != drawn(whole)


def test_a_pass_has_every_example_once(folder):
    passes = np.asarray(drawn(sources.stream(str(folder), side=16, batch=7).batches(0, 9))).reshape(3, 21)
    for one in passes:
        assert sorted(one[:18]) == list(range(18))
        assert one[18:].tolist() == one[:3].tolist()  # the last batch is filled up from the start of its pass
    assert len({tuple(one) for one in passes}) == 3


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_stream_has_the_examples_of_load(folder, split):
    whole = sources.load(str(folder), side=16)[("train", "test").index(split)]
    for batch in sources.stream(str(folder), split=split, side=16, batch=4).batches(0, 5):
        assert batch.x.dtype == np.uint8
        assert batch.y.dtype == batch.index.dtype == np.int32
        np.testing.assert_array_equal(np.asarray(sets.floats(batch.x)), whole.x[batch.index])
        np.testing.assert_array_equal(batch.y, whole.y[batch.index])


def test_a_set_smaller_than_a_batch_repeats_within_it(folder):
    (batch,) = sources.stream(str(folder), split="test", side=8, batch=14).batches(2, 1)
    assert set(Counter(batch.index.tolist()).values()) == {2, 3}


def test_arrays_stream_as_well():
    train_set, _ = sources.load("digits")
    stream = sources.stream("digits", batch=5)
    batch = next(stream.batches(100))
    np.testing.assert_array_equal(batch.x, train_set.x[batch.index])
    assert stream.classes == 10


def test_a_hundred_classes_as_an_npz(tmp_path):
    rng, y = np.random.default_rng(1), np.arange(200) % 100  # as CIFAR-100
    x = rng.integers(0, 256, (200, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "c.npz", x_train=x, y_train=y, x_test=x[:100], y_test=y[:100])
    stream = sources.stream(str(tmp_path / "c.npz"), batch=50)
    assert (stream.count, stream.classes, stream.shape) == (200, 100, (32, 32, 3))
    batch = next(stream.batches(3))
    np.testing.assert_array_equal(batch.x, x[batch.index])
    assert sources.classes(sources.load(str(tmp_path / "c.npz"))[0]) == 100


def test_what_a_stream_refuses(folder, tmp_path):
    for how, says in (
        ({"batch": 0}, "batch >= 1"),
        ({"batch": 4, "seed": -1}, "seed"),
        ({"batch": 4, "split": "val"}, "'train' or 'test'"),
        ({"batch": 4, "side": 0}, "--side"),
    ):
        with pytest.raises(BadInput, match=says):
            sources.stream(str(folder), **{"side": 8, **how})
    with pytest.raises(BadInput, match="step 0"):
        sources.stream(str(folder), side=8, batch=4).batches(-1)
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"0\.png: not a readable image"):
        list(sources.stream(str(tmp_path), side=8, batch=4).batches(0, 1))  # found when it is read


# --- training on it ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "net",
    [
        pytest.param(nets.ViT(3, patch=16, width=24, depth=2, heads=2), id="vit"),
        pytest.param(nets.ResNet(3, (1, 1, 1, 1), width=8, stem="large"), id="large stem", marks=pytest.mark.slow),
    ],
)
def test_networks_for_large_images_learn_from_the_stream(folder, net):
    stream = sources.stream(str(folder), side=64, batch=18)
    learner = train.sgd(models.from_linen(net), optax.adam(1e-3))
    state, losses = learner.init(KEY, np.zeros((1, *stream.shape), np.float32)), []
    loop.stream(learner, KEY, state, stream.batches, steps=3, every=3, after=lambda *call: losses.extend(call[2]["loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def asked(folder, run, *flags):
    small = ("--model", "cnn", "--epochs", 2, "--batch", 6, "--checkpoint-seconds", 0)
    return inside("train", "--data", folder, "--side", 16, *small, "--run", run, *flags)


def test_the_command_in_memory_and_streamed(folder, tmp_path, capsys, no_pictures, monkeypatch):
    assert asked(folder, tmp_path / "memory") == 0
    assert asked(folder, tmp_path / "straight", "--stream") == 0
    history = result(tmp_path / "straight")["values"]["history"]
    assert len(history) == 2
    assert history[1]["loss"] < history[0]["loss"]
    assert result(tmp_path / "straight")["config"]["side"] == 16
    assert not result(tmp_path / "straight")["config"]["data"].startswith("/")  # relative to the run folder

    calls, accuracy = [], victims.evaluation.accuracy

    def killed(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return accuracy(*given)

    monkeypatch.setattr(victims.evaluation, "accuracy", killed)
    assert asked(folder, tmp_path / "cut", "--stream") == 130
    assert asked(folder, tmp_path / "cut", "--stream") == 0
    assert "resuming train-cut from step 3" in capsys.readouterr().out
    assert result(tmp_path / "cut")["values"]["history"] == history

    # the next command finds the folder and the side by itself
    finetune = ("--method", "finetune", "--forget-class", 0, "--epochs", 1)
    assert inside("unlearn", "--from", tmp_path / "straight", "--run", tmp_path / "forgot", *finetune) == 0


def test_a_folder_older_than_the_flags_is_known_again(tmp_path, capsys, no_pictures):
    asked = ("train", "--model", "mlp", "--epochs", 1, "--run", tmp_path / "old")
    assert inside(*asked) == 0
    for name in ("config.json", "result.json"):
        known = json.loads((tmp_path / "old" / name).read_text())
        del known["config"]["side"], known["config"]["stream"]
        known = {entry: value for entry, value in known.items() if entry not in ("digest", "files")}
        (tmp_path / "old" / name).write_text(json.dumps(known))
    before = result(tmp_path / "old")
    assert inside(*asked) == 0
    assert result(tmp_path / "old") == before  # shown, not computed again
    (tmp_path / "old" / "result.json").unlink()
    assert inside(*asked) == 0
    assert inside(*asked, "--stream") == 2
    assert "stream (there False, asked True)" in capsys.readouterr().err


def test_flags_that_a_stream_cannot_serve(folder, tmp_path, capsys):
    for flags in (("--random-labels",), ("--protected-classes", 1), ("--countermeasure", "orthogonal")):
        assert asked(folder, tmp_path / "run", "--stream", *flags) == 2
        assert "memory" in capsys.readouterr().err
    small = ("--stream", "--run", tmp_path / "run")
    assert inside("train", "--from", tmp_path / "noise", *small) == 2
    assert "--from" in capsys.readouterr().err
    assert inside("train", "--data", "digits", "--side", 16, *small) == 2
    assert "digits have one size" in capsys.readouterr().err
    assert inside("train", "--from", tmp_path / "noise", "--side", 16, "--run", tmp_path / "run") == 2
    assert not (tmp_path / "run").exists()
