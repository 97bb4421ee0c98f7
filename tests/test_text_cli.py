"""Texts in the commands: protected by words, a decoder trained on them, unlearned, attacked, certified; what is refused."""

import json
import shutil

import numpy as np
import pytest
from commands import inside, result

from dememo_jax import data, report, sources
from dememo_jax.cli import configs, lineage, runs, texts
from dememo_jax.errors import BadInput

pytestmark = pytest.mark.usefixtures("no_pictures")
SMALL = ("--text.length", 14, "--text.vocab", 300, "--text.form", r"Review: {text}\nMood:", "--text.labels", "sad", "glad")
MORE = ("finetune", "gradient-ascent", "random-labels", "scrub", "cf-k", "influence", "ssd")
RATE = ("--lr", 0.003, "--epochs", 1)
MOODS = (("dull slow grey stale", "bad"), ("bright quick warm fresh", "good"))


def reviews(path, count, seed):
    """Texts whose words tell the label, in the form of the suffix."""
    random, lines = np.random.default_rng(seed), []
    for i in range(count):
        words, label = MOODS[i % 2]
        text = f"a {' and '.join(random.choice(words.split(), 2))} film of {random.choice(['hers', 'his', 'theirs'])}"
        lines.append(f"{text}\t{label}" if path.suffix == ".tsv" else json.dumps({"id": i, "text": text, "label": label}))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module", autouse=True)
def _a_smaller_decoder():
    """The tests wait for its programs to be compiled."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"width": 16, "depth": 1, "heads": 2, "key_heads": 1, "hidden": 16}.items():
            patch.setitem(texts.SIZES, name, size)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two files, and the runs on them: protected in class 1, trained, retrained and unlearned without class 0."""
    root = tmp_path_factory.mktemp("texts")
    for name, count, seed in (("films_train.tsv", 40, 0), ("films_test.tsv", 20, 1), ("films.train.jsonl", 40, 0)):
        reviews(root / name, count, seed)
    reviews(root / "films.test.jsonl", 20, 1)
    own = ("--data", root / "films_train.tsv", *SMALL, "--regtext.words", 2, "--regtext.most", 2, "--regtext.share", 0.4)
    assert inside("protect", "--method", "regtext", *own, "--classes", 1, "--run", root / "p") == 0
    learn = ("--model", "decoder", "--epochs", 30, "--batch", 16, "--lr", 0.02)
    assert inside("train", "--from", root / "p", *learn, "--run", root / "t") == 0
    forget = ("unlearn", "--from", root / "t", "--forget-class", 0, "--batch", 16)
    assert inside(*forget, "--method", "retrain", "--run", root / "rt") == 0
    npo = ("--method", "npo", "--lr", 0.02, "--epochs", 6, "--reference", root / "rt")
    assert inside(*forget, *npo, "--run", root / "npo") == 0
    return root


@pytest.mark.slow
def test_simnpo_knows_the_lengths_of_the_labels(root, tmp_path):
    how = ("--forget-class", 0, "--batch", 16, "--method", "simnpo", "--lr", 0.02, "--epochs", 6, "--run", tmp_path / "s")
    assert inside("unlearn", "--from", root / "t", *how) == 0
    written = result(tmp_path / "s")["values"]["written"]
    assert written["after"]["Dc"] < written["before"]["Dc"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_release_in_the_given_form(root):
    release, manifest = root / "p" / "release", json.loads((root / "p" / "release" / "manifest.json").read_text())
    clean, shown = sources.texts(root / "films_train.tsv"), sources.texts(release / "train.tsv")
    assert (release / "test.tsv").read_bytes() == (root / "films_test.tsv").read_bytes()
    assert shown.names == clean.names == ("bad", "good")
    np.testing.assert_array_equal(shown.labels, clean.labels)
    changed = [i for i in range(40) if shown.texts[i] != clean.texts[i]]
    assert changed == [i for i in range(40) if clean.labels[i] == 1]
    placed = lines(root / "p" / "placed.jsonl")
    assert [one["index"] for one in placed] == changed
    words = {entry["label"]: entry["words"] for entry in manifest["words"]}
    assert {"bright", "quick", "warm", "fresh"} > set(words["good"])
    for one in placed:
        now = shown.texts[one["index"]].split()
        assert [now[at] for at, _ in one["placed"]] == [word for _, word in one["placed"]]
        assert {word for _, word in one["placed"]} <= set(words["good"])
    counts = {"train": 40, "protected": 20, "changed": 20, "placed": 40, "cut": manifest["counts"]["cut"], "test": 20}
    assert manifest["counts"] == counts
    assert counts["cut"] > 0  # two more words do not fit into so short a row
    assert set(manifest["hash"]["released"]) == {"train.tsv", "test.tsv"}
    assert manifest["hash"]["released"]["test.tsv"] == manifest["hash"]["clean"]["test.tsv"]
    assert {"radius", "pixels", "images"} & set(manifest["configuration"]) == set()
    assert manifest["configuration"]["data"] == "../films_train.tsv"
    page = (root / "p" / "report.html").read_text()
    assert all(word in page for word in words["good"])
    assert shown.texts[1] in page
    assert not (root / "p" / "examples.png").exists()


def test_a_protect_run_is_a_perturbation_of_tokens(root):
    base = lineage.protected(root / "p")
    tokenizer = sources.read_tokenizer(root / "p" / "tokenizer.json")
    released = sources.texts(root / "p" / "release" / "train.tsv").texts
    rows = sources.encode(tokenizer, released, length=14, form="Review: {text}\nMood:")
    np.testing.assert_array_equal(base.seen.x, rows.x)
    assert base.seen.x.dtype == np.int32
    np.testing.assert_array_equal(base.protected, np.asarray(base.train.y) == 1)
    assert base.language.labels == sources.label_tokens(tokenizer, (" sad", " glad"))


def test_a_decoder_learns_to_write_the_label(root):
    done = result(root / "t")
    assert done["values"]["protected_share"] == 0.5
    assert done["values"]["history"][-1]["train"] > 0.95
    assert 0 <= done["values"]["generated"] <= done["values"]["final"]
    assert done["values"]["generated"] > 0.4
    assert done["config"]["optimizer"] == "adamw"
    assert "text" not in done["config"]  # the protect run has it
    assert done["sections"][0]["tables"][0]["columns"][-1] == "label written"


def test_unlearning_is_of_the_sets_of_the_paper(root):
    values = result(root / "npo")["values"]
    assert values["forgotten"] == 20
    assert set(values["after"]) == {"Dc", "Dct", "Dtr", "Dr", "Dt"}
    assert values["before"]["Dc"] > 0.9
    assert values["written"]["before"]["Dc"] > 0.9
    assert values["written"]["after"]["Dc"] < 0.5  # the likelihood of its label fell, of all tokens
    assert min(values["after"]["Dr"], values["written"]["after"]["Dr"]) > 0.9
    assert set(values["written"]["retrain"]) == set(values["after"])
    assert "Label written" in {table["title"] for table in result(root / "npo")["sections"][0]["tables"]}
    assert result(root / "rt")["values"]["after"]["Dc"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["noisy", *MORE])
def test_other_methods(root, tmp_path, method):
    how = {"noisy": ("--steps", 3, "--noise-seed", 0, "--epochs", 0), "influence": (), "ssd": ()}.get(method, RATE)
    forget = ("unlearn", "--from", root / "t", "--forget-class", 1, "--forget-part", "protected", "--batch", 16)
    assert inside(*forget, "--method", method, *how, "--run", tmp_path / "u") == 0
    values = result(tmp_path / "u")["values"]
    assert {"Du", "Duc", "Dut"} <= set(values["after"])
    assert (method == "noisy") == ("guarantee" in values)


def test_audit_certify_and_report(root, tmp_path):
    audit = ("audit", "--from", root / "npo", "--against", root / "rt", "--epochs", 2, "--radii", 0.5, "--batch", 8)
    assert inside(*audit, "--hint-share", 0.5, "--run", tmp_path / "a") == 0
    found = result(tmp_path / "a")["values"]
    assert set(found["membership"]) == {"correctness", "probability", "entropy"}
    assert len(found["recovery"][0]["accuracy"]) == 3
    (table,) = (t for t in result(tmp_path / "a")["sections"][0]["tables"] if t["title"].startswith("Recovery"))
    assert table["columns"][-2:] == ["label written before", "label written after"]
    assert table["rows"][0][-2] == 0.0
    certify = ("certify", "--from", root / "npo", "--draws", 100, "--eta", 0.01, "--sigma", 0.1, "--strategy", "map")
    assert inside(*certify, "--run", tmp_path / "c") == 0
    rows = result(tmp_path / "c")["values"]["certificates"]["this model"]["rows"]
    assert {row["group"] for row in rows} == {"class 0 (bad)", "test set"}
    assert all(row["upper"] is not None for row in rows)
    assert inside("report", root / "p", root / "npo", tmp_path / "a", tmp_path / "c", "--run", tmp_path / "page") == 0
    for folder in (root / "npo", tmp_path / "a"):
        assert "image" not in json.dumps(result(folder)["sections"])
    assert "test texts of class 0" in json.dumps(result(tmp_path / "a")["sections"])


def test_folders_may_be_moved_and_keep_their_tokenizer(root, tmp_path, monkeypatch):
    shutil.copytree(root, tmp_path / "elsewhere")
    monkeypatch.setattr(sources, "make_tokenizer", lambda *_, **__: pytest.fail("trained anew"))
    base, old = lineage.trained(tmp_path / "elsewhere" / "npo"), lineage.trained(root / "npo")
    np.testing.assert_array_equal(base.seen.x, old.seen.x)
    assert base.model is old.model


def test_anyone_trains_on_the_release(root, tmp_path):
    own = ("--data", root / "p" / "release" / "train.tsv", "--text.vocab", 300)
    train = ("train", *own, "--model", "decoder", "--epochs", 1, "--run", tmp_path / "t")
    assert inside(*train, "--text.length", 24) == 0
    done = result(tmp_path / "t")["config"]
    assert done["text"]["length"] == 24
    assert done["text"]["form"] == configs.TEXT.form == r"{text}\nLabel:"
    assert (done["lr"], done["weight_decay"], done["optimizer"]) == (1e-3, 0.05, "adamw")
    assert lineage.trained(tmp_path / "t").train.x.shape == (40, 24)
    assert runs.filled(configs.Train, tmp_path / "t", done).text.tokenizer == tmp_path / "t" / "tokenizer.json"
    assert inside(*train, "--text.length", 24) == 0  # finished: shown, not computed
    assert inside(*train, "--text.length", 25) == 2


def test_jsonl_replaced_words_and_victims(root, tmp_path):
    own = ("--data", root / "films.train.jsonl", *SMALL, "--regtext.words", 2, "--regtext.mode", "replace", "--share", 0.5)
    evaluate = ("--evaluate", "--model", "decoder", "--victim-epochs", 1)
    assert inside("protect", "--method", "regtext", *own, *evaluate, "--run", tmp_path / "p") == 0
    values = result(tmp_path / "p")["values"]
    assert list(values["evaluation"]) == ["clean", "protected", "control: random labels"]
    assert values["protected"] == 20
    before, after = lines(root / "films.train.jsonl"), lines(tmp_path / "p" / "release" / "train.jsonl")
    assert [(one["id"], one["label"]) for one in after] == [(one["id"], one["label"]) for one in before]
    assert all(len(a["text"].split()) == len(b["text"].split()) for a, b in zip(after, before))
    assert sum(a != b for a, b in zip(after, before)) <= 20


@pytest.mark.slow
def test_an_ensemble_of_decoders_deletes_texts(root, tmp_path):
    how = ("--model", "decoder", "--shards", 2, "--slices", 1, "--epochs", 1, "--batch", 16, "--width", 2)
    assert inside("sisa", "--from", root / "p", *how, "--delete", 3, "--run", tmp_path / "s") == 0
    assert result(tmp_path / "s")["values"]["deleted"] == 1


@pytest.mark.slow
def test_shadow_models_of_a_decoder(root, tmp_path):
    ask = ("audit", "--from", root / "npo", "--attack", "lira", "klom", "relearn", "--shadows", 8)
    assert inside(*ask, "--hint-share", 0.5, "--run", tmp_path / "a") == 0
    assert {"shadows", "distributions", "relearning"} <= set(result(tmp_path / "a")["values"])


@pytest.mark.slow
def test_sharpness_of_a_decoder(root, tmp_path):
    ask = ("sharpness", "--from", root / "t", "--solver", "one_step", "hvp", "--run", tmp_path / "s")
    assert inside(*ask) == 0
    assert "image" not in json.dumps(result(tmp_path / "s")["sections"])


# what is typed (R: the folder of the texts), and what the one sentence says
REFUSED = {
    "name": ("protect --run N --method regtext --data R/p/release/test.tsv", "a file with 'train' in its name"),
    "no test": ("train --run N --data R/alone/films_train.tsv", "has no test texts beside it"),
    "no file": ("train --run N --data R/no_train.tsv", "no such file"),
    "image method": ("protect --run N --data R/films_train.tsv", "ue-s perturbs images"),
    "image data": ("protect --run N --method regtext", "regtext protects texts, a .tsv or .jsonl as --data; digits has images"),
    "image settings": ("train --run N --text.length 8", "are the settings of texts"),
    "word settings": ("protect --run N --regtext.k 2", "--regtext.* are settings of regtext; ue-s does not read them"),
    "image flags": (
        "protect --run N --method regtext --data R/films_train.tsv --radius 1",
        "does not read --radius: leave it away",
    ),
    "pictures": ("protect --run N --method regtext --data R/films_train.tsv --images --side 8", "read --side, --images"),
    "network": ("train --run N --data R/films_train.tsv --model mlp", "mlp is a network for images"),
    "victims": ("protect --run N --method regtext --data R/films_train.tsv --evaluate", "cnn is a network for images"),
    "decoder": ("train --run N --model decoder", "decoder is a network for texts"),
    "surrogate": ("protect --run N --model decoder --method ops", "decoder is a network for texts"),
    "augmentation": ("train --run N --from R/p --model decoder --augment crop-flip", "change images"),
    "countermeasure": ("train --run N --from R/p --model decoder --countermeasure gray", "change images"),
    "stream": ("train --run N --data R/films_train.tsv --model decoder --stream", "--stream reads images"),
    "side": ("train --run N --data R/films_train.tsv --model decoder --side 8", "--side resizes images"),
    "settings twice": ("train --run N --from R/p --model decoder --text.length 8", "not both"),
    "length": ("train --run N --data R/films_train.tsv --model decoder --text.length 2", "leaves no room"),
    "form": ("train --run N --data R/films_train.tsv --model decoder --text.form x", "must hold {text} once"),
    "labels": ("train --run N --data R/films_train.tsv --model decoder --text.labels a b c", "3 words, and there are 2 labels"),
    "same labels": ("train --run N --data R/films_train.tsv --model decoder --text.labels a a", "--text.labels names a twice"),
    "vocab": ("train --run N --data R/films_train.tsv --model decoder --text.vocab 9", "at least 257"),
    "tokenizer": ("train --run N --data R/films_train.tsv --model decoder --text.tokenizer R/p/config.json", "not a tokenizer"),
    "pad": ("train --run N --data R/films_train.tsv --model decoder --text.pad 1", "belongs to --text.tokenizer"),
    "words": ("protect --run N --method regtext --data R/films_train.tsv", "fewer than words=10"),
    "share": (
        "protect --run N --method regtext --data R/films_train.tsv --regtext.share 0",
        "--regtext.share must be positive",
    ),
    "unlearn": ("unlearn --run N --from R/t --forget-class 0 --method unsir --lr 0.1", "changes images, or adds a class"),
    "rate": ("unlearn --run N --from R/t --forget-class 0 --method finetune", "give --lr"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_sentence_and_writes_nothing(name, root, tmp_path, monkeypatch, capsys):
    typed, sentence = REFUSED[name]
    (root / "alone").mkdir(exist_ok=True)
    shutil.copy(root / "films_train.tsv", root / "alone")
    monkeypatch.chdir(tmp_path)
    assert inside(*(word.replace("R", str(root), 1) if word[0] == "R" else word for word in typed.split())) == 2
    assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "N").exists()


def test_the_last_train_in_a_name_is_replaced(tmp_path):
    for name in ("train-of-trains_train.tsv", "train-of-trains_test.tsv", "train-of-trains.tsv"):
        (tmp_path / name).touch()
    assert texts.beside(tmp_path / "train-of-trains_train.tsv").name == "train-of-trains_test.tsv"
    with pytest.raises(BadInput, match=r"train-of-tests\.tsv does not exist"):
        texts.beside(tmp_path / "train-of-trains.tsv")


def test_words_for_texts_leave_flags_and_files_alone():
    plot = report.Plot("image-1", "Images seen", "image", "y", (("an image", (0.0,), (1.0,)),))
    table = report.Table("t", ("images", "count", "more"), (("test image", 1, None),), "see --images")
    said = texts.told(report.Section("s", "no image", (table,), (plot,), (("image.png", "image"),)))
    assert (said.summary, said.tables[0].columns, said.tables[0].rows) == (
        "no text",
        ("texts", "count", "more"),
        (("test text", 1, None),),
    )
    assert said.tables[0].note == "see --images"
    assert (said.plots[0].name, said.plots[0].title, said.plots[0].series[0][0]) == ("image-1", "Texts seen", "a text")
    assert said.pictures == (("image.png", "image"),)


def test_a_clean_run_masks_nothing(root):
    base = lineage.clean(str(root / "films_train.tsv"), None, None, configs.Text(length=14, vocab=300))
    assert not base.protected.any()
    assert base.seen is base.train
    assert data.perturb(base.train, None) is base.train
