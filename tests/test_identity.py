"""Whatever a run was made from or left is compared when it is read again: refused by name, before work, touching nothing."""

import json
import shutil

import numpy as np
import pytest
from commands import inside, result

from dememo_jax import certify, checkpoint, files, tree
from dememo_jax.cli import certifying, configs, identity, lineage, runs
from dememo_jax.errors import BadInput

MLP = ("--model", "mlp")


def bars(count, seed):
    """Images of three classes, a bright row each."""
    random, y = np.random.default_rng(seed), np.arange(count) % 3
    x = random.integers(0, 60, (count, 6, 6, 1))
    for image, label in zip(x, y):
        image[2 * label : 2 * label + 2] += 150
    return x.astype(np.uint8), y


def save(path, *arrays):
    np.savez(path, **dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays)))


@pytest.fixture(scope="module")
def made(tmp_path_factory, no_pictures):
    """Finished runs of every command that others start from, in a folder to be copied."""
    root = tmp_path_factory.mktemp("made")
    save(root / "tiny.npz", *bars(60, 1), *bars(30, 2))
    data = ("--data", root / "tiny.npz")
    once = ("--epochs", 1, *MLP)
    small = ("--shards", 2, "--slices", 1, *once)
    bound = ("--from", root / "u", "--target-class", 0, "--draws", 200, "--eta", 0.005, "--strategy", "vmap", "--width", 50)
    for command in (
        ("protect", "--run", root / "p", *data, "--method", "random", *MLP),
        ("protect", "--run", root / "p2", *data, "--method", "random", *MLP, "--seed", 1),
        ("train", "--run", root / "v", *data, *once, "--every", 1),
        ("train", "--run", root / "v2", *data, *once, "--every", 1, "--seed", 1),
        ("train", "--run", root / "cnn", *data, "--epochs", 1, "--model", "cnn"),
        ("train", "--run", root / "vp", "--from", root / "p", *once),
        ("train", "--run", root / "vs", *data, *once, "--stream"),
        ("unlearn", "--run", root / "u", "--from", root / "v", "--method", "finetune", "--forget-class", 1, "--epochs", 1),
        ("unlearn", "--run", root / "u2", "--from", root / "v", "--method", "finetune", "--forget-class", 2, "--epochs", 1),
        ("sisa", "--run", root / "s", *data, *small),
        ("sisa", "--run", root / "s", *data, *small, "--delete", 5, 17),
        ("certify", "--run", root / "c", *bound),
        ("certify", "--run", root / "part", *bound, "--first", 100),
    ):
        assert inside(*command) == 0, command
    return root


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def read(root, name):
    """The command that reads a run, as arguments."""
    new = ("--run", root / "new")
    return {
        "unlearn": ("unlearn", *new, "--from", root / "v", "--method", "finetune", "--forget-class", 0, "--epochs", 1),
        "audit": ("audit", *new, "--from", root / "v", "--target-class", 0, "--attack", "signals"),
        "certify": ("certify", *new, "--from", root / "v", "--target-class", 0, "--draws", 200, "--eta", 0.005),
        "sharpness": ("sharpness", *new, "--from", root / "v", "--batch", 8, "--solver", "one_step"),
        "report": ("report", root / "v", *new),
        "audit of u": ("audit", *new, "--from", root / "u", "--attack", "signals"),
        "unlearn of u": ("unlearn", *new, "--from", root / "u", "--method", "finetune", "--forget-class", 2, "--epochs", 1),
        "train of p": ("train", *new, "--from", root / "p", *MLP, "--epochs", 1),
        "sisa of p": ("sisa", *new, "--from", root / "p", *MLP, "--shards", 2, "--slices", 1, "--epochs", 1),
        "audit of vp": ("audit", *new, "--from", root / "vp", "--target-class", 0, "--attack", "signals"),
        "unlearn of vs": ("unlearn", *new, "--from", root / "vs", "--method", "finetune", "--forget-class", 0, "--epochs", 1),
        "join": ("join", root / "c", *new),
        "join of a part": ("join", root / "part", *new),
        "train again": ("train", "--run", root / "v", "--data", root / "tiny.npz", "--epochs", 1, *MLP, "--every", 1),
        "certificate": ("audit", *new, "--from", root / "u", "--attack", "recovery", "--certificate", root / "c"),
        "sisa again": (
            "sisa", "--run", root / "s", "--data", root / "tiny.npz", "--shards", 2, "--slices", 1, "--epochs", 1, *MLP,
            "--delete", 40,
        ),
    }[name]  # fmt: skip


def refused(root, name, capsys, *words):
    """The command ends with exit code 2 and one sentence with these words, and touches nothing."""
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert inside(*read(root, name)) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    for word in words:
        assert word in said.replace("\n", "")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


# --- data --------------------------------------------------------------------------------------------------------


def rotated(x, y, xt, yt):
    return x, y, xt, (yt + 1) % 3


def reordered(x, y, xt, yt):
    return x[::-1], y[::-1], xt, yt


def fewer(x, y, xt, yt):
    return x[:45], y[:45], xt, yt


READERS = (
    "unlearn", "audit", "certify", "sharpness", "audit of u", "unlearn of u", "train of p", "sisa of p", "audit of vp",
    "unlearn of vs", "certificate",
)  # fmt: skip


@pytest.mark.parametrize("change", [rotated, reordered, fewer])
@pytest.mark.parametrize("name", READERS)
def test_changed_data_are_refused(name, change, root, capsys):
    save(root / "tiny.npz", *change(*bars(60, 1), *bars(30, 2)))
    refused(root, name, capsys, "tiny.npz is not what", "recorded was the digest", "found is")


def test_a_streamed_set_keeps_digests_of_its_own(root, capsys):
    assert inside(*read(root, "unlearn of vs")) == 0
    config = json.loads((root / "vs" / "config.json").read_text())["config"]
    assert config["source_digest"] != json.loads((root / "v" / "config.json").read_text())["config"]["source_digest"]
    shutil.rmtree(root / "new")
    save(root / "tiny.npz", *rotated(*bars(60, 1), *bars(30, 2)))
    refused(root, "unlearn of vs", capsys, "the test set of", "tiny.npz is not what")


def test_one_process_reads_what_is_there_now(root):
    """Not what it read before."""
    before = lineage.clean(str(root / "tiny.npz"), None)
    assert lineage.clean(str(root / "tiny.npz"), None) is before
    save(root / "tiny.npz", *reordered(*bars(60, 1), *bars(30, 2)))
    assert lineage.clean(str(root / "tiny.npz"), None).digest != before.digest


def test_test_images_that_were_trained_on_are_counted(root, tmp_path, capsys):
    x, y = bars(60, 1)
    xt, yt = bars(30, 2)
    save(root / "leak.npz", x, y, np.concatenate([x[:12], xt[12:]]), np.concatenate([y[:12], yt[12:]]))
    words = "12 of the 30 test examples are training examples too"
    assert inside("train", "--run", tmp_path / "v", "--data", root / "leak.npz", *MLP, "--epochs", 1) == 0
    assert words in capsys.readouterr().err.replace("\n", "")
    ask = ("audit", "--run", tmp_path / "a", "--from", tmp_path / "v", "--target-class", 0, "--attack", "signals")
    assert inside(*ask) == 0
    for run in ("v", "a"):
        assert words in result(tmp_path / run)["sections"][0]["tables"][0]["note"]
    assert not lineage.clean("digits", None).repeated


# --- files of runs -----------------------------------------------------------------------------------------------


def delete(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path):
    path.write_bytes(np.random.default_rng(0).bytes(300))


def empty(path):
    path.write_bytes(b"")


def flip(place):
    def flipped(path):
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 1
        path.write_bytes(content)

    return flipped


DAMAGES = {
    "deleted": delete,
    "truncated": truncate,
    "garbage": garbage,
    "empty": empty,
    "late": flip(0.7),
    "early": flip(0.3),
}
FILES = {
    "p/perturbation.npz": ("train of p", "sisa of p", "audit of vp"),
    "u/forget.npy": ("audit of u", "unlearn of u"),
    "v/result.json": ("unlearn", "report", "audit of u"),
    "c/result.json": ("join", "certificate"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in FILES.items() for name in names])
def test_damaged_files_are_refused_by_name(file, name, damage, root, capsys):
    DAMAGES[damage](root / file)
    words = ("is not finished",) if damage == "deleted" and file.endswith("result.json") else (file.split("/")[1],)
    refused(root, name, capsys, file.split("/")[0], *words)


@pytest.mark.parametrize("damage", ["deleted", "truncated", "garbage", "empty"])
@pytest.mark.parametrize("name", ["unlearn", "report", "audit of u"])
def test_a_damaged_configuration_is_no_run_folder(name, damage, root, capsys):
    DAMAGES[damage](root / "v" / "config.json")
    refused(root, name, capsys, "not a run folder", "config.json")


@pytest.mark.parametrize("content", ["[]", "{}", '{"config": []}', '{"config": {"command": ["x"]}}', "[" * 100_000])
def test_json_of_another_kind_is_refused(content, root, capsys):
    (root / "v" / "config.json").write_text(content)
    refused(root, "unlearn", capsys, "not a run folder")
    shutil.copy(root / "v2" / "config.json", root / "v" / "config.json")
    (root / "v" / "result.json").write_text(content)
    refused(root, "unlearn", capsys, "result.json is damaged")


@pytest.mark.parametrize("name", ["unlearn", "audit of u", "report", "train again"])
@pytest.mark.parametrize("file", ["config.json", "result.json"])
def test_changed_numbers_steer_nothing(file, name, root, capsys):
    path = root / "v" / file
    changed = path.read_text().replace('"lr": 0.1', '"lr": 0.9')
    assert changed != path.read_text()
    path.write_text(changed)
    words = ("lr (there 0.9, asked 0.1)",) if (file, name) == ("config.json", "train again") else (file,)
    refused(root, name, capsys, *words)


def test_every_byte_of_a_result_counts(tmp_path):
    """Where it is content: white space may change."""
    path = tmp_path / "result.json"
    value = {"config": {"lr": 0.1, "seed": 3}, "values": {"test": 0.25}, "files": {"weights": "ab12"}}
    path.write_text(json.dumps(identity.sealed(value)))
    content = path.read_bytes()
    assert identity.opened(path) == value
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 7]) + content[place + 1 :])
        try:
            assert identity.opened(path) == value
        except BadInput:
            continue
        assert content[place : place + 1].isspace()


@pytest.mark.parametrize("name", ["unlearn", "audit of u", "train again"])
def test_the_result_of_another_run_is_refused(name, root, capsys):
    shutil.copy(root / "v2" / "result.json", root / "v" / "result.json")
    refused(root, name, capsys, "config.json and result.json tell of different runs", "seed")


@pytest.mark.parametrize("kept", ["weights", "epochs/00001"])
@pytest.mark.parametrize("damage", ["deleted", "truncated", "late", "another run's", "another network's", "half"])
def test_weights_that_are_not_the_run_s_are_refused(kept, damage, root, capsys):
    place, name = root / "v" / kept, "sharpness" if kept.startswith("epochs") else "unlearn"
    if damage == "another run's":
        shutil.rmtree(place)
        shutil.copytree(root / "v2" / kept, place)
        words = "is not what", "recorded was the digest"
    elif damage == "another network's":
        shutil.rmtree(place)
        shutil.copytree(root / "cnn" / "weights", place)
        words = ("is not what",)
    elif damage == "half":
        (place / "0" / "sums.json").unlink()
        words = "cannot be read", "was never finished"
    elif damage == "deleted":
        shutil.rmtree(place)
        words = "cannot be read", "there is none"
    else:
        largest = max((path for path in place.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        DAMAGES[damage](largest)
        words = "cannot be read", "is damaged"
    refused(root, name, capsys, f"{kept}", *words)


def test_weights_are_compared_with_what_later_runs_recorded(root, capsys):
    """Weights and result of another run of the same configuration fit each other, but not what was made from them."""
    config = json.loads((root / "u" / "config.json").read_text())["config"]
    assert config["source_weights_digest"] == checkpoint.digest(root / "v" / "weights", 0)
    shutil.rmtree(root / "v" / "weights")
    shutil.copytree(root / "v2" / "weights", root / "v" / "weights")
    done = identity.opened(root / "v" / "result.json")
    done["files"]["weights"] = checkpoint.digest(root / "v" / "weights", 0)
    (root / "v" / "result.json").write_text(json.dumps(identity.sealed(done)))
    assert inside(*read(root, "unlearn")) == 0
    shutil.rmtree(root / "new")
    refused(root, "audit of u", capsys, "v/weights is not what", "u was made from")


def noise(root, **changes):
    path = root / "p" / "perturbation.npz"
    arrays = files.read_arrays(path, ("delta", "row", "mask"))
    files.write_arrays(path, **{name: changes.get(name, lambda a: a)(array) for name, array in arrays.items()})


NOISES = {
    "beyond the tables": {"row": lambda row: row + len(row)},
    "negative": {"row": lambda row: row - 1},
    "too few": {"row": lambda row: row[:-1]},
    "floats": {"row": lambda row: row.astype(float)},
    "no mask": {"mask": lambda mask: mask.astype(int)},
    "not finite": {"delta": lambda delta: delta * np.nan},
    "sign turned": {"delta": lambda delta: -delta},
}


@pytest.mark.parametrize("what", NOISES)
def test_other_noise_is_refused(what, root, capsys):
    noise(root, **NOISES[what])
    refused(root, "train of p", capsys, "perturbation.npz is not what", "recorded was the digest")
    strip(root / "p")  # an older run recorded none: what cannot be noise is refused all the same
    if what != "sign turned":
        refused(root, "train of p", capsys, "perturbation.npz is not the noise of 60 examples")


def test_noise_of_another_run_is_refused(root, capsys):
    shutil.copy(root / "p2" / "perturbation.npz", root / "p" / "perturbation.npz")
    refused(root, "train of p", capsys, "perturbation.npz is not what")
    done = identity.opened(root / "p" / "result.json")
    done["files"]["perturbation.npz"] = files.digest(root / "p" / "perturbation.npz")
    (root / "p" / "result.json").write_text(json.dumps(identity.sealed(done)))
    refused(root, "audit of vp", capsys, "perturbation.npz is not what", "vp was made from")


MASKS = {
    "another class": lambda mask: np.roll(mask, 1),
    "integers": lambda mask: mask.astype(int),
    "empty": np.zeros_like,
    "everything": np.ones_like,
    "shorter": lambda mask: mask[:-1],
}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("what", MASKS)
def test_another_forget_mask_is_refused(what, older, root, capsys):
    path = root / "u" / "forget.npy"
    np.save(path, MASKS[what](np.load(path)))
    if older:  # which recorded the digest of the mask all the same
        strip(root / "u")
    refused(root, "audit of u", capsys, "forget.npy is")


def test_what_a_run_was_made_from_is_compared_in_every_generation(root, capsys):
    """u was made from v, which was another run."""
    shutil.rmtree(root / "v")
    shutil.copytree(root / "v2", root / "v")
    refused(root, "audit of u", capsys, "v/config.json is not what", "u was made from")


# --- draws -------------------------------------------------------------------------------------------------------


def test_draws_of_another_run_are_refused(root, capsys):
    shutil.rmtree(root / "c" / "draws")
    shutil.copytree(root / "part" / "draws", root / "c" / "draws")
    refused(root, "join", capsys, "draws/this-model is not what")
    more = ("certify", "--run", root / "c", "--from", root / "u", "--target-class", 0, "--eta", 0.005)
    assert inside(*more, "--draws", 300, "--strategy", "vmap", "--width", 50) == 2
    assert "holds the draws 100 to 200" in capsys.readouterr().err.replace("\n", "")


def test_draws_of_another_model_are_refused(root):
    blank = certify.Draws(np.zeros((2, 1)), ("a",), 0.1, fingerprint={"weights": "1", "data": "2"})
    other = certify.Draws(np.zeros((2, 1)), ("a",), 0.1, fingerprint={"weights": "3", "data": "2"})
    config = configs.Certify(run=root / "c", source=root / "u", draws=2)
    certifying._check_own(config, root / "c", blank, blank)
    with pytest.raises(BadInput, match="weights of this run is not what"):
        certifying._check_own(config, root / "c", other, blank)


def test_a_certificate_of_other_weights_is_refused(root, capsys):
    shutil.rmtree(root / "u")
    shutil.copytree(root / "u2", root / "u")
    refused(root, "certificate", capsys, "is not what", "c was made from")


# --- kept on the way ---------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(tmp_path):
    """Two folders that hold no more than a configuration."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"config": {"command": "train", "run": name}}))
    return tmp_path


SPOILT = [truncate, empty, garbage, flip(0.5), lambda path: path.write_text("[]"), "another's", "b's"]


@pytest.mark.parametrize("spoilt", SPOILT)
def test_kept_measurements_are_those_of_the_run(spoilt, unfinished, capsys):
    path = unfinished / "a" / "checkpoints" / "sal" / "ball-1.json"
    assert runs.once(path, lambda: {"sal": [1.5, 2.5]}) == {"sal": [1.5, 2.5]}
    assert runs.once(path, lambda: pytest.fail("measured again")) == {"sal": [1.5, 2.5]}
    other = path.with_name("ball-2.json") if spoilt == "another's" else unfinished / "b" / "checkpoints" / "sal" / path.name
    if callable(spoilt):
        spoilt(path)
    else:
        runs.once(other, lambda: {"sal": [9.5, 9.5]})
        shutil.copy(other, path)
    assert runs.once(path, lambda: {"sal": [3.5]}) == {"sal": [3.5]}
    assert "ball-1.json" in capsys.readouterr().err.replace("\n", "")


def test_a_checkpoint_of_another_run_is_refused(unfinished):
    kept = [unfinished / name / "checkpoints" / "train" for name in ("a", "b")]
    for directory in kept:
        runs.saver(directory, 0.0)(3, {"w": np.arange(3.0)}, {}, True)
        assert runs.newest(directory, {"w": np.zeros(3)}).step == 3
    shutil.rmtree(kept[0])
    shutil.copytree(kept[1], kept[0])
    with pytest.raises(BadInput, match=r"train/3 is not what this run saved"):
        runs.newest(kept[0], {"w": np.zeros(3)})


def test_a_changed_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    done = {"config": {"data": "films_train.tsv", "data_dir": None}, "files": identity.left(tmp_path)}
    assert list(done["files"]) == ["tokenizer.json"]
    (tmp_path / "tokenizer.json").write_text("{ }")
    with pytest.raises(BadInput, match=r"tokenizer\.json is not what"):
        lineage._located(tmp_path, done)


# --- what a folder may hold --------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [(), (".DS_Store",), ("config.json.part",), ("config.json",), ("config.json", ".x", "a.part")])
def test_leftovers_are_no_run(left, root, tmp_path):
    run = tmp_path / "fresh"
    run.mkdir()
    for name in left:
        (run / name).write_bytes(b"")
    assert inside("train", "--run", run, "--data", root / "tiny.npz", *MLP, "--epochs", 1) == 0


def test_files_of_the_user_are(root, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_bytes(b"")
    assert inside("train", "--run", tmp_path / "mine", "--data", root / "tiny.npz", *MLP, "--epochs", 1) == 2
    assert "not a run folder" in capsys.readouterr().err.replace("\n", "")


def test_a_release_removes_nothing_of_the_user_s(root, tmp_path, capsys):
    ask = ("protect", "--run", tmp_path / "p", "--data", root / "tiny.npz", "--method", "random", *MLP, "--images")
    assert inside(*ask) == 0
    (tmp_path / "p" / "result.json").unlink()
    mine = tmp_path / "p" / "release" / "images" / "0" / "mine.txt"
    mine.write_text("mine")
    assert inside(*ask) == 2
    assert "mine.txt is not of a release" in capsys.readouterr().err.replace("\n", "")
    mine.unlink()
    assert inside(*ask) == 0


def test_paths_with_brackets_keep_their_weights(root, tmp_path):
    run = tmp_path / "runs [v2]" / "a\\b"
    assert inside("train", "--run", run, "--data", root / "tiny.npz", *MLP, "--epochs", 1) == 0
    assert tree.digest(lineage.trained(run).weights) == tree.digest(lineage.trained(root / "v").weights)


# --- older folders and moved ones --------------------------------------------------------------------------------


def strip(folder):
    """Make the folder one of a version without these digests."""
    for name in ("config.json", "result.json"):
        kept = json.loads((folder / name).read_text())
        config = {n: v for n, v in kept["config"].items() if not identity.younger(n)}
        kept = {**{n: v for n, v in kept.items() if n not in ("digest", "files")}, "config": config}
        (folder / name).write_text(json.dumps(kept))
    for path in folder.rglob("digest"):
        path.unlink()
        sums = path.with_name("sums.json")
        known = json.loads(sums.read_text())
        del known["digest"]
        sums.write_text(json.dumps(known))


def test_older_folders_are_read(root, capsys):
    names = ("p", "v", "vp", "u", "c")
    for folder in names:
        strip(root / folder)
        # What was made from a configuration file must find it as it was; here it was rewritten.
        for child, parent in (("u", "v"), ("vp", "p"), ("c", "u")):
            for file in ("config.json", "result.json"):
                kept = json.loads((root / child / file).read_text())
                digest = identity.digest((root / parent / "config.json").read_bytes())
                kept["config"]["this_model_digest" if child == "c" else "source_digest"] = digest
                (root / child / file).write_text(json.dumps(kept))
    for _ in range(2):
        assert lineage.trained(root / "u").inputs["weights_digest"].digest == tree.digest(lineage.trained(root / "u").weights)
        assert len(lineage.kept(root / "v", lineage.trained(root / "v"))) == 1
        assert lineage.trained(root / "vp").perturbation is not None
        assert len(certifying._made(root / "c", runs.result(root / "c"), "this model").scores) == 200
    said = capsys.readouterr().out.replace("\n", "")
    assert said.count("is of an older version") == len(names)


def test_folders_may_be_moved_together(root, tmp_path):
    root.rename(tmp_path / "elsewhere")
    assert inside(*read(tmp_path / "elsewhere", "audit of u")) == 0


def test_a_colleague_s_folder_is_only_read(root, capsys):
    """A damaged one is refused without a change in it; a whole one serves without a write."""
    before = {path: path.stat().st_mtime_ns for path in (root / "v").rglob("*")}
    lineage.kept(root / "v", lineage.trained(root / "v"))
    assert {path: path.stat().st_mtime_ns for path in (root / "v").rglob("*")} == before
