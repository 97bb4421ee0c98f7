"""`dememo unlearn`: every method by name, which examples are forgotten, what is refused, promised, and resumed."""

import functools
import stat
from contextlib import contextmanager
from types import SimpleNamespace
from typing import get_args

import jax
import numpy as np
import pytest
from commands import inside, result
from kinds import some
from scipy.stats import norm

from dememo_jax import cli, sources, unlearn
from dememo_jax.cli import certified, configs, console, forgetting, lineage, runs, selection

N = 1347
HIDDEN = (0, 1)  # classes of which nine in ten are protected


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A victim of partly protected data, and its retrained reference without class 0."""
    folder = tmp_path_factory.mktemp("runs")
    assert inside("protect", "--run", folder / "ops", "--method", "ops", "--share", 0.9, "--classes", *HIDDEN) == 0
    assert inside("train", "--run", folder / "victim", "--from", folder / "ops", "--model", "mlp", "--epochs", 2) == 0
    assert forget(folder, "retrain", "--method", "retrain", "--forget-class", 0, "--epochs", 1) == 0
    np.save(folder / "ints.npy", np.asarray([7, 3, 7, 1346, 3], np.int16))
    np.save(folder / "mask.npy", np.isin(np.arange(N), (3, 7, 1346)))
    (folder / "lines.txt").write_text("7\n3\n\n 7\n1346\n")
    return folder


def forget(root, run, *asked, source="victim"):
    return inside("unlearn", "--run", root / run, "--from", root / source, *asked)


@functools.cache
def weights(folder):
    return jax.tree.map(np.asarray, lineage.trained(folder).weights)


def leaves(folder):
    return jax.tree.leaves(weights(folder))


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


# --- every method, and what it forgets -----------------------------------------------------------------------------

# What is asked, and which of the training examples that is; SETS: what the accuracies are then of.
CLASS = "--forget-class 0"
ASKED = {
    "class": (CLASS, lambda y, hidden: y == 0),
    "protected": (f"{CLASS} --forget-part protected", lambda y, hidden: (y == 0) & hidden),
    "clean": (f"{CLASS} --forget-part clean", lambda y, hidden: (y == 0) & ~hidden),
    "clean class": ("--forget-class 5", lambda y, hidden: y == 5),
    "two": ("--forget-class 1 5 --observed-classes 8 9", lambda y, hidden: (y == 1) | (y == 5)),
    "ints": ("--forget-index R/ints.npy", lambda y, hidden: np.isin(np.arange(N), (3, 7, 1346))),
    "mask": ("--forget-index R/mask.npy", lambda y, hidden: np.isin(np.arange(N), (3, 7, 1346))),
    "lines": ("--forget-index R/lines.txt", lambda y, hidden: np.isin(np.arange(N), (3, 7, 1346))),
}
SETS = {
    "class": {"Du", "Duc", "Dut", "Dc", "Dct", "Dtr", "Dr", "Dt"},
    "protected": {"Du", "Duc", "Dut", "Dc", "Dtr", "Dr", "Dt"},
    "clean": {"Du", "Duc", "Dc", "Dct", "Dtr", "Dr", "Dt"},
    "clean class": {"Dc", "Dct", "Dtr", "Dr", "Dt"},
    "two": {"Du", "Duc", "Dut", "Dc", "Dct", "Dtr", "Dr", "Dt"},
    **{way: {"Dc", "Dct", "Dtr", "Dr", "Dt"} for way in ("ints", "mask", "lines")},
}
# method -> (which examples, what else)
METHODS = {
    "retrain": ("class", "--epochs 1"),
    "finetune": ("protected", "--epochs 1"),
    "gradient-ascent": ("class", "--epochs 1 --reference R/retrain"),
    "neggrad-plus": ("clean", "--epochs 1 --retain-weight 0.8"),
    "npo": ("class", "--epochs 1 --hold kl --beta 0.2"),
    "simnpo": ("mask", "--epochs 1 --beta 2"),
    "random-labels": ("two", "--epochs 1"),
    "salun": ("protected", "--epochs 1 --share 0.3"),
    "scrub": ("class", "--epochs 2 --rewind"),
    "bad-teacher": ("class", "--epochs 1"),
    "l1-sparse": ("clean", "--epochs 1 --strength 1e-4"),
    "boundary-shrink": ("ints", "--epochs 1"),
    "boundary-expand": ("class", "--epochs 1"),
    "unsir": ("class", "--epochs 1"),
    "cf-k": ("mask", "--epochs 1 --statistics frozen"),
    "eu-k": ("clean class", "--epochs 1"),
    "ssd": ("lines", ""),
    "influence": ("class", "--inverse identity"),
    "noisy": ("class", "--epochs 1 --steps 2 --epsilon 2"),
    "noisy-clip": ("class", "--epochs 1 --steps 2 --reference R/retrain"),
    "output-noise": ("clean class", "--epochs 1 --centre zero --comparator from_centre"),
}


def typed(words, root):
    return [word.replace("R/", f"{root}/", 1) for word in words.split()]


def unlearned(root, method):
    """Exit code of the run of `METHODS`, which is made once."""
    which, how = METHODS[method]
    return forget(root, method, "--method", method, *typed(ASKED[which][0], root), *typed(how, root))


def guessed(folder, x):
    """The classes that the saved network of two dense layers puts first, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights(folder).params)
    hidden = np.maximum(np.reshape(np.asarray(x, np.float64), (len(x), -1)) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"], 0)
    return (hidden @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]).argmax(axis=1)


@functools.cache
def right(root, folder):
    """Which images the saved network gets right, and which training images are protected."""
    train, test = sources.load("digits")
    with np.load(root / "ops" / "perturbation.npz") as noise:
        delta, hidden = noise["delta"][noise["row"]], noise["mask"]
    seen = np.where(hidden[:, None, None, None], np.clip(np.asarray(train.x) + delta, 0, 1), np.asarray(train.x))
    found = {where: guessed(folder, x) == np.asarray(train.y) for where, x in (("clean", train.x), ("seen", seen))}
    return found | {"test": guessed(folder, test.x) == np.asarray(test.y)}, hidden


def by_hand(root, folder, mask, observed):
    """Accuracies of the saved network, and of how many images, on each of the sets of the paper that are not empty."""
    found, hidden = right(root, folder)
    y, y_test = (np.asarray(part.y) for part in sources.load("digits"))
    touched = np.isin(y, y[mask])
    du = mask & hidden if (mask & hidden).any() else touched & hidden
    dc = mask & ~hidden if (mask & ~hidden).any() else touched & ~hidden
    rest = np.isin(y_test, observed) if observed else ~np.isin(y_test, y[mask])
    parts = {
        "Du": ("seen", du), "Duc": ("clean", du), "Dut": ("test", np.isin(y_test, y[mask & hidden])),
        "Dc": ("clean", dc), "Dct": ("test", np.isin(y_test, y[mask & ~hidden])), "Dtr": ("test", rest),
        "Dr": ("seen", ~mask), "Dt": ("test", np.ones(len(y_test), bool)),
    }  # fmt: skip
    return {name: (found[where][at].mean(), at.sum()) for name, (where, at) in parts.items() if at.any()}


def test_methods_are_those_of_the_configuration():
    assert set(get_args(configs.Forget)) == set(forgetting.KINDS) == set(METHODS)
    fields = set(configs.Unlearn.__dataclass_fields__)
    assert set(forgetting.OPTIONS) <= fields
    assert {name for kind in forgetting.KINDS.values() for name in kind.options} == set(forgetting.OPTIONS)


# One of a kind: the recipes and the options of the command line have tests of their own.
QUICK = ("gradient-ascent", "cf-k", "influence", "output-noise", "retrain", "noisy")


@pytest.mark.parametrize("method", some(METHODS, QUICK))
def test_every_method_forgets_what_was_asked(method, root):
    which, how = METHODS[method]
    assert unlearned(root, method) == 0
    folder, done = root / method, result(root / method)
    values, y = done["values"], np.asarray(sources.load("digits")[0].y)
    with np.load(root / "ops" / "perturbation.npz") as noise:
        wanted = ASKED[which][1](y, noise["mask"])
    np.testing.assert_array_equal(np.load(folder / "forget.npy"), wanted)
    assert values["forgotten"] == wanted.sum() > 0
    assert set(values["before"]) == set(values["after"]) == SETS[which]
    observed = (8, 9) if which == "two" else ()
    for name, trained in {"before": "victim", "after": method}.items():
        found = by_hand(root, root / trained, wanted, observed)
        assert found.keys() == values[name].keys()
        for part, (accuracy, count) in found.items():  # float32 may settle one tie otherwise
            assert values[name][part] == pytest.approx(accuracy, abs=1.5 / count), part
    assert not equal(folder, root / "victim")
    table = done["sections"][0]["tables"][0]
    compared = "--reference" in how
    assert table["columns"] == ["model", *values["after"], *(["gap"] if compared else [])]
    assert [row[0] for row in table["rows"]] == ["before", "after", *(["retrain"] if compared else [])]
    assert ("gap" in values) == ("retrain_seconds" in values) == compared
    assert "<h2" in (folder / "report.html").read_text()
    assert not (folder / "checkpoints").exists()


def test_gap_is_the_mean_difference_to_the_retrained_model(root):
    assert unlearned(root, "gradient-ascent") == 0
    done = result(root / "gradient-ascent")
    values, reference = done["values"], result(root / "retrain")
    assert values["retrain"] == reference["values"]["after"]
    gaps = {n: np.mean([abs(values[n][k] - values["retrain"][k]) for k in values["retrain"]]) for n in ("before", "after")}
    assert values["gap"] == pytest.approx(gaps["after"], rel=1e-6)
    assert [row[-1] for row in done["sections"][0]["tables"][0]["rows"]] == pytest.approx([*gaps.values(), 0], rel=1e-6)
    assert values["retrain_seconds"] == reference["measured"]["seconds"]
    assert f"gap to retraining {values['gap']:.3f}, in" in done["sections"][0]["summary"]


@pytest.mark.slow
def test_scrub_goes_back_to_the_epoch_that_errs_as_on_test_images(root):
    assert unlearned(root, "scrub") == 0
    values = result(root / "scrub")["values"]
    assert len(values["forget_errors"]) == len(values["history"]) == 2
    apart = [abs(error - values["held_out_error"]) for error in values["forget_errors"]]
    assert values["epoch"] == 1 + int(np.argmin(apart))
    for name, value in values["history"][values["epoch"] - 1].items():
        assert values["after"][name] == pytest.approx(value, abs=1e-6)
    assert 1 - values["held_out_error"] == pytest.approx(values["history"][-1]["Dut"], abs=1e-6)


@pytest.mark.slow
def test_forgetting_more_forgets_the_union(root, capsys):
    assert unlearned(root, "finetune") == 0
    more = ("--method", "finetune", "--epochs", 1)
    assert forget(root, "more", *more, "--forget-class", 0, 5, source="finetune") == 0
    before, after = np.load(root / "finetune" / "forget.npy"), np.load(root / "more" / "forget.npy")
    y = np.asarray(sources.load("digits")[0].y)
    np.testing.assert_array_equal(after, (y == 0) | (y == 5))
    said = f"{before.sum()} of the {after.sum()} examples to forget were forgotten before"
    assert said in capsys.readouterr().err
    assert result(root / "more")["values"]["before"]["Dt"] == result(root / "finetune")["values"]["after"]["Dt"]
    again = ("--forget-class", 0, "--forget-part", "protected")  # nothing new, from a third generation
    assert forget(root, "again", *more, *again, source="more") == 0
    assert f"{before.sum()} of the {before.sum()} examples" in capsys.readouterr().err
    np.testing.assert_array_equal(np.load(root / "again" / "forget.npy"), after)


def test_a_share_of_the_classes(root):
    base = lineage.trained(root / "victim")
    asked = configs.Unlearn(root / "share", root / "victim", forget_class=(1, 5), forget_share=0.3)
    y, mask = np.asarray(base.train.y), selection.forget_mask(asked, base)
    assert [mask[y == c].sum() for c in range(10)] == [round(0.3 * (y == c).sum()) if c in (1, 5) else 0 for c in range(10)]


@pytest.mark.slow
def test_audit_and_certify_take_what_unlearn_left(root, tmp_path):
    assert unlearned(root, "noisy") == unlearned(root, "boundary-expand") == 0
    attack = ("--epochs", 1, "--radii", 0.1, "--against", root / "retrain")
    assert inside("audit", "--run", tmp_path / "audit", "--from", root / "boundary-expand", *attack) == 0
    assert result(tmp_path / "audit")["values"]["target_class"] == 0
    bound = ("--draws", 100, "--eta", 0.01, "--side", "lower", "--strategy", "map")
    assert inside("certify", "--run", tmp_path / "bound", "--from", root / "noisy", *bound) == 0
    assert len(result(tmp_path / "bound")["values"]["certificates"]["this model"]["rows"]) == 2


# --- what is promised ------------------------------------------------------------------------------------------------


def delta_of(mu, epsilon):
    """Gaussian differential privacy, Dong et al. 2022, Corollary 2.13."""
    return norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)


def test_the_guarantee_of_noisy_descent(root):
    assert unlearned(root, "noisy") == unlearned(root, "output-noise") == 0
    kept = {"clip_init": 0.01, "delta": 1e-5, "comparator": "same_procedure"}
    noisy = result(root / "noisy")["values"]["guarantee"]
    asked = kept | {"steps": 2, "lr": 0.001, "clip_grad": 1.0, "weight_decay": 0.0, "free_epochs": 1}
    assert {name: noisy[name] for name in asked} == asked
    assert noisy["epsilon"] == pytest.approx(2, abs=1e-6)
    assert noisy["sigma"] == unlearn.calibrate(2.0, 1e-5, steps=2, lr=0.001, clip_init=0.01, clip_grad=1.0)
    mu = 2 * (0.01 + 0.001 * 1.0 * 2) / (np.sqrt(2) * noisy["sigma"])
    assert noisy["mu"] == pytest.approx(mu, rel=1e-9)
    assert delta_of(mu, 2.0) == pytest.approx(1e-5, rel=1e-6)
    once = result(root / "output-noise")["values"]["guarantee"]
    assert once["epsilon"] == pytest.approx(1, abs=1e-6)
    assert delta_of(1 * 0.01 / once["sigma"], 1.0) == pytest.approx(1e-5, rel=1e-6)  # one end is the centre itself
    page = (root / "noisy" / "report.html").read_text().replace("&#x27;", "'")
    assert noisy["words"] in page
    assert all(one in page for one in noisy["assumptions"])
    assert certified.PROTECTED in noisy["assumptions"]  # this run's data carry one-pixel noise, which was made on the whole set
    assert "e^2" in noisy["words"]
    assert "1e-05" in noisy["words"]


def test_the_guarantee_of_model_clipping(root):
    assert unlearned(root, "noisy-clip") == 0
    promised = result(root / "noisy-clip")["values"]["guarantee"]
    assert promised["sigma"] == unlearn.calibrate_model_clipping(1.0, 1e-5, steps=2, clip_model=0.1)
    assert (promised["epsilon"], promised["mu"]) == (1.0, None)
    assert 0.999e-5 < promised["delta"] <= 1e-5


NOISY = ("--method", "noisy", "--epochs", 1, "--steps", 2, "--epsilon", 2, "--forget-class", 0, "--checkpoint-seconds", 0)
ONCE = ("--method", "output-noise", "--epochs", 1, "--forget-class", 0)


@pytest.mark.slow
def test_noise_is_secret_and_fresh_unless_its_seed_is_given(root, monkeypatch):
    seen = []
    resumable = runs.resumable

    def looking(folder, *arguments, **how):
        key = folder / "noise.key"
        seen.append((stat.S_IMODE(key.stat().st_mode), key.read_text().split()[0]) if key.exists() else None)
        return resumable(folder, *arguments, **how)

    monkeypatch.setattr(runs, "resumable", looking)
    for name, seed in {"one": (), "two": (), "three": ("--noise-seed", 3), "four": ("--noise-seed", 3)}.items():
        assert forget(root, name, *ONCE, *seed) == 0
        assert not (root / name / "noise.key").exists()
    assert [at and at[0] for at in seen] == [0o600] * 4 + [None] * 4
    assert seen[0] == seen[1] != seen[2] == seen[3]  # one key for all of a run, another for the next
    assert not equal(root / "one", root / "two")
    assert equal(root / "three", root / "four")
    assert not equal(root / "one", root / "three")
    secret, open_ = (result(root / name)["values"]["guarantee"]["assumptions"] for name in ("one", "three"))
    assert not any("seed" in line for line in secret)
    assert any("drawn from the seed 3: nothing holds against who knows it" in line for line in open_)
    assert "drawn from the seed 3" in (root / "three" / "report.html").read_text()
    for name in ("one", "two"):  # nor is the secret told anywhere else
        told = seen[0 if name == "one" else 2][1].encode()
        assert all(told not in path.read_bytes() for path in (root / name).rglob("*") if path.is_file())


# --- interrupted -----------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt(n)`: Ctrl-C after the n-th checkpoint from now on; `interrupt(None)` never."""
    left = [None]
    progress = console.progress

    @contextmanager
    def counting(*arguments, **how):
        with progress(*arguments, **how) as advance:

            def counted(now):
                left[0] = None if left[0] is None else left[0] - 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                advance(now)

            yield counted

    monkeypatch.setattr(console, "progress", counting)
    return lambda count: left.__setitem__(0, count)


def test_an_interrupted_secret_run_goes_on_with_its_own_noise(root, tmp_path, interrupt, monkeypatch, capsys):
    monkeypatch.setattr(certified.secrets, "token_hex", lambda size: "0123456789abcdef"[: 2 * size])
    assert forget(root, "straight", *NOISY) == 0
    for stop in (1, 2):  # amid the noise, after the training
        interrupt(stop)
        assert forget(root, tmp_path / "cut", *NOISY) == cli.INTERRUPTED
        assert (tmp_path / "cut" / "noise.key").read_text().split()[0] == "0123456789abcdef"
        assert stat.S_IMODE((tmp_path / "cut" / "checkpoints").stat().st_mode) == 0o700
        monkeypatch.setattr(certified.secrets, "token_hex", lambda size: pytest.fail("a second key"))
    interrupt(None)
    key = tmp_path / "cut" / "noise.key"
    text = key.read_text()
    for spoilt in (text.replace("3", "2", 1), "xyz", text[:-1], "\udcff"):
        key.write_text(spoilt, errors="surrogateescape")
        assert forget(root, tmp_path / "cut", *NOISY) == 2
        assert "noise.key is damaged" in " ".join(capsys.readouterr().err.split())
    key.unlink()
    assert forget(root, tmp_path / "cut", *NOISY) == 2
    assert "noise.key is missing" in " ".join(capsys.readouterr().err.split())
    key.write_text(text.split()[0])  # as an older version wrote it
    assert forget(root, tmp_path / "cut", *NOISY) == 0
    assert equal(root / "straight", tmp_path / "cut")
    assert result(root / "straight")["values"] == result(tmp_path / "cut")["values"]
    assert not (tmp_path / "cut" / "noise.key").exists()


def test_the_key_goes_even_if_the_run_was_cut_off_at_its_end(root, monkeypatch):
    def interrupted(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(certified, "forget_key", interrupted)
        assert forget(root, "late", *ONCE) == cli.INTERRUPTED
    assert forget(root, "late", *ONCE) == 0
    assert not (root / "late" / "noise.key").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stops"), [("finetune", (2, 1)), ("output-noise", (1, 2))])
def test_seconds_are_those_of_all_processes(method, stops, root, tmp_path, interrupt, monkeypatch):
    """A clock that only setting up (50 s) and measuring accuracies (10 s) move on; interrupted right after checkpoints."""
    now = [1000.0]
    trained, accuracies = lineage.trained, lineage.accuracies

    def later(function, seconds):
        def wrapped(*arguments, **named):
            now[0] += seconds
            return function(*arguments, **named)

        return wrapped

    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(lineage, "trained", later(trained, 50))
    monkeypatch.setattr(lineage, "accuracies", later(accuracies, 10))
    command = ("--method", method, "--forget-class", 0, "--epochs", 4, "--checkpoint-seconds", 0)
    for stop in (*stops, None):
        interrupt(stop)
        code = forget(root, tmp_path / "run", *command)
        assert code == (0 if stop is None else cli.INTERRUPTED)
    assert result(tmp_path / "run")["measured"]["seconds"] == pytest.approx(now[0] - 1000)


# --- what is refused -------------------------------------------------------------------------------------------------

# what is typed after `unlearn --run N --from R/victim --method`, and what the one sentence says
REFUSED = {
    "another's option": (f"finetune {CLASS} --beta 0.1", "--beta belongs to npo, simnpo; finetune does not read it"),
    "another's flag": (f"npo {CLASS} --rewind", "--rewind belongs to scrub"),
    "another's default": (f"finetune {CLASS} --delta 1e-3", "--delta belongs to noisy, noisy-clip, output-noise"),
    "another's comparator": (f"ssd {CLASS} --comparator from_centre", "--comparator belongs to noisy"),
    "another's noise": (f"output-noise {CLASS} --steps 2", "--steps belongs to noisy, noisy-clip"),
    "epochs of a step": (f"ssd {CLASS} --epochs 1", "ssd is one step"),
    "rate of a step": (f"influence {CLASS} --lr 0.1", "influence is one step"),
    "statistics of a step": (f"ssd {CLASS} --statistics frozen", "--statistics belongs to methods that descend"),
    "epochs": (f"finetune {CLASS} --epochs 0", "--epochs must be positive"),
    "epochs after noise": (f"noisy {CLASS} --epochs -1", "--epochs must be positive"),
    "rate nan": (f"finetune {CLASS} --lr nan", "--lr must be a finite number"),
    "rate inf": (f"noisy {CLASS} --lr inf", "--lr must be a finite number"),
    "batch": (f"finetune {CLASS} --batch 0", "--batch must be positive"),
    "retain weight": (f"neggrad-plus {CLASS} --retain-weight 1", "retain is the share of the retain loss, in (0, 1)"),
    "retain weight nan": (f"npo {CLASS} --retain-weight nan", "--retain-weight must be a finite number"),
    "share": (f"salun {CLASS} --share 1.5", "in (0, 1]; got 1.5"),
    "forget rounds": (f"scrub {CLASS} --forget-rounds 0", "--forget-rounds must be positive"),
    "radius": (f"boundary-shrink {CLASS} --radius nan", "--radius must be a finite number"),
    "damping": (f"influence {CLASS} --damping nan", "--damping must be a finite number"),
    "layers 0": (f"eu-k {CLASS} --layers 0", "--layers must be positive"),
    "epsilon 0": (f"noisy {CLASS} --epsilon 0", "--epsilon must be positive"),
    "epsilon inf": (f"noisy-clip {CLASS} --epsilon inf", "--epsilon must be a finite number"),
    "delta 0": (f"noisy {CLASS} --delta 0", "--delta must be positive"),
    "delta 1": (f"noisy {CLASS} --delta 1", "delta must lie in (0, 1)"),
    "delta 1 clipped": (f"noisy-clip {CLASS} --delta 1", "delta must lie in (0, 1)"),
    "delta -1": (f"output-noise {CLASS} --delta -1", "--delta must be positive"),
    "delta nan": (f"noisy {CLASS} --delta nan", "--delta must be a finite number"),
    "no solution": (f"noisy {CLASS} --lr 0.5 --noise-decay 2", "lr * weight_decay must stay below 1, got 1"),
    "noise decay": (f"noisy {CLASS} --noise-decay -1", "must not be negative"),
    "clip": (f"noisy {CLASS} --clip-init 0", "--clip-init must be positive"),
    "no share": (f"finetune {CLASS} --forget-share 0", "share must lie in (0, 1]"),
    "hardly a share": (f"finetune {CLASS} --forget-share 0.001", "the forget set is empty"),
    "no such part": ("finetune --forget-class 5 --forget-part protected", "classes [5] have no protected examples to forget"),
    "file and class": (f"finetune {CLASS} --forget-index R/ints.npy", "give no --forget-class"),
    "file and share": ("finetune --forget-index R/ints.npy --forget-share 0.5", "give no --forget-class, --forget-share"),
    "no file": ("finetune --forget-index R/nowhere.npy", "No such file"),
    "reference of nothing": (f"finetune {CLASS} --reference R/nowhere", "no such folder"),
    "reference that trained": (f"finetune {CLASS} --reference R/victim", "must be a run of `dememo unlearn --method retrain`"),
    "reference of protection": (f"finetune {CLASS} --reference R/ops", "is a run of `dememo protect`"),
    "reference of another class": ("finetune --forget-class 5 --reference R/retrain", "without other examples than those"),
    "reference of more": (f"ssd {CLASS} --forget-part clean --reference R/retrain", "without other examples than those"),
}
# Options in range of the flag, out of range of the method or the network: to be seen before the folder is claimed.
LATE = {
    "ssd alpha": (f"ssd {CLASS} --alpha 0", "alpha must be"),
    "ssd alpha nan": (f"ssd {CLASS} --alpha nan", "alpha must be"),
    "influence alpha nan": (f"influence {CLASS} --alpha nan", "alpha must be"),
    "samples": (f"influence {CLASS} --samples 100000", "samples"),
    "layers": (f"cf-k {CLASS} --layers 99", "the network has 2 layers"),
    "decay of model clipping": (f"noisy-clip {CLASS} --noise-decay -1 --epochs 0", "must not be negative"),
    "decay of model clipping nan": (
        f"noisy-clip {CLASS} --noise-decay nan --epochs 0",
        "--noise-decay must be a finite number",
    ),
}


def refused(words, sentence, root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert inside("unlearn", "--run", "N", "--from", root / "victim", "--method", *typed(words, root)) == cli.BAD_INPUT
    said = " ".join(capsys.readouterr().err.split())
    assert sentence in said
    assert said.count("error:") == 1
    assert not (tmp_path / "N").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_claims_no_folder(name, root, tmp_path, monkeypatch, capsys):
    refused(*REFUSED[name], root, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("name", LATE)
def test_what_the_method_cannot_use_claims_no_folder(name, root, tmp_path, monkeypatch, capsys):
    refused(*LATE[name], root, tmp_path, monkeypatch, capsys)


def archive(path):
    np.savez(path.with_suffix(".npz"), np.arange(3))
    path.with_suffix(".npz").rename(path)


def saved(*values, **how):
    return lambda path: np.save(path, np.array(*values, **how))


def text(content):
    return lambda path: path.write_text(content)


# file name -> (how it is made, what the one sentence says)
FILES = {
    "beyond.npy": (saved([0, N]), f"there is no example [{N}]"),
    "negative.npy": (saved([5, -1]), "there is no example [-1]"),
    "negative.txt": (text("4\n-3\n"), "there is no example [-3]"),
    "short mask.npy": (saved([True, False, True]), "got a mask (3,)"),
    "floats.npy": (saved([1.0, 2.0]), "got float64 (2,)"),
    "matrix.npy": (saved([[1, 2]]), "got int64 (1, 2)"),
    "scalar.npy": (saved(3), "got int64 ()"),
    "objects.npy": (saved([{}], dtype=object), "expected a .npy of integer indices"),
    "rubbish.npy": (text("not an array"), "expected a .npy of integer indices"),
    "nothing.npy": (text(""), "expected a .npy of integer indices"),
    "archive.npy": (archive, "expected a .npy of integer indices"),
    "folder.npy": (lambda path: path.mkdir(), "expected a .npy of integer indices"),
    "words.txt": (text("three\n"), "text file with one index a line"),
    "floats.txt": (text("1.0\n"), "text file with one index a line"),
    "bytes.txt": (lambda path: path.write_bytes(b"\x80\xff"), "text file with one index a line"),
    "huge.txt": (text("3\n" + "9" * 30), "example"),
    "empty.txt": (text("\n"), "the forget set is empty"),
    "none.npy": (saved([False] * N), "the forget set is empty"),
    "all.npy": (saved([True] * N), "covers all data"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files_claim_no_folder(name, root, tmp_path, monkeypatch, capsys):
    make, sentence = FILES[name]
    make(tmp_path / name)
    base = ("unlearn", "--run", tmp_path / "N", "--from", root / "victim", "--forget-index", tmp_path / name)
    assert inside(*base) == cli.BAD_INPUT
    said = " ".join(capsys.readouterr().err.split())
    assert sentence in said
    assert said.count("error:") == 1
    assert not (tmp_path / "N").exists()


@pytest.mark.slow
def test_a_reference_of_another_network_is_refused(root, tmp_path, capsys):
    """A model retrained on the same data, but of another network."""
    asked = ("train", "--run", tmp_path / "cnn", "--from", root / "ops", "--model", "cnn", "--epochs", 1)
    assert inside(*asked) == 0
    retrain = ("--run", tmp_path / "retrain", "--method", "retrain", "--forget-class", 0, "--epochs", 1)
    assert inside("unlearn", "--from", tmp_path / "cnn", *retrain) == 0
    how = ("--forget-class", 0, "--reference", tmp_path / "retrain")
    assert forget(root, tmp_path / "N", *how) == cli.BAD_INPUT
    assert "is a network cnn, the model in question a mlp" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "N").exists()
