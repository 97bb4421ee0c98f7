"""The command line under stress: streams that close, signals, locales, two processes in a folder, values that none can use."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import inside, result

from dememo_jax import cli, keys
from dememo_jax.cli import console, failures, lineage, locks, recipes, runs
from dememo_jax.cli.configs import Protect
from dememo_jax.errors import BadInput, NonFinite
from dememo_jax.unlearn import shards

SMALL = ("train", "--model", "mlp", "--epochs", 1)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 tiny images of three classes."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = (rng.integers(0, 60, (60, 6, 6, 1)) + 60 * y[:, None, None, None]).astype(np.uint8)
    np.savez(path, x_train=x[:45], y_train=y[:45], x_test=x[45:], y_test=y[45:])
    return path


@pytest.fixture(scope="module")
def victim(data):
    folder = data.parent / "victim"
    assert inside(*SMALL, "--data", data, "--run", folder) == 0
    return folder


# --- values that no command can use ------------------------------------------------------------------------------

UNUSABLE = {
    "infinity": ("train --run N --momentum inf", "--momentum"),
    "weight decay": ("train --run N --weight-decay inf", "--weight-decay"),
    "too large for 32 bits": ("train --run N --lr 1e39", "--lr"),
    "checkpoint seconds": ("certify --run N --from V --checkpoint-seconds nan", "--checkpoint-seconds"),
    "nan in a list": ("certify --run N --from V --eta 0.1 nan", "--eta"),
    "seed": ("train --run N --seed 18446744073709551616", "--seed"),
    "negative seed": ("train --run N --seed -1", "--seed"),
    "31 digits": ("train --run N --epochs 1000000000000000000000000000000", "--epochs"),
    "batch": ("train --run N --batch 99999999999", "--batch"),
    "the same solver twice": ("sharpness --run N --from V --solver one_step one_step", "one_step twice"),
    "the same q twice": ("certify --run N --from V --q 0.3 0.3", "--q names 0.3 twice"),
    "the same class twice": ("unlearn --run N --from V --forget-class 1 1", "--forget-class names 1 twice"),
    "a setting of texts": ("train --run N --text.length 10000000000", "--text.length"),
    "no folder": ("train --run .", "--run names no folder"),
    "a regular expression": ("certify --run N --from V --target-class 1 --only (", "is no regular expression"),
    "probes": ("sharpness --run N --from V --solver diagonal --probes -1", "--probes"),
    "one probe": ("sharpness --run N --from V --solver diagonal --probes 1", "--probes"),
    "quickstart's radius": ("quickstart --run N --radius 1e30", "--radius"),
    "quickstart's pixels": ("quickstart --run N --pixels 65", "--pixels"),
    "bytes that are no text": ("train --run N --data l\udcc3.npz", "UTF-8"),
    "a zero byte": ("train --run N\0", "zero byte"),
    "a long name": (f"unlearn --run N --forget-class 1 --from {'n' * 300}", "cannot use"),
    "all deleted": ("sisa --run N --data D --shards 2 --slices 2 --model mlp --delete-index all.txt", "cover all data"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_none_can_use_is_refused_before_a_folder_is_claimed(name, data, victim, tmp_path, monkeypatch, capsys):
    typed, word = UNUSABLE[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all.txt").write_text("\n".join(map(str, range(45))))
    names = {"V": str(victim), "D": str(data)}
    assert inside(*(names.get(part, part) for part in typed.split(" "))) in (cli.BAD_INPUT, cli.FAILED)
    said = capsys.readouterr().err
    assert word in said
    assert said.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["all.txt"]


def test_a_link_that_leads_nowhere_is_no_run_folder(tmp_path, capsys):
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for name in ("gone", "a"):
        assert inside(*SMALL, "--run", tmp_path / name) == cli.BAD_INPUT
        assert "leads to no folder" in capsys.readouterr().err


def test_an_empty_name_is_no_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert inside(*SMALL, "--run=") == cli.BAD_INPUT
    assert "--run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- a run folder is claimed by who works in it -------------------------------------------------------------------


def test_a_late_refusal_takes_its_folder_away_again(tmp_path, monkeypatch, data, capsys):
    def late(*_, **__):
        raise BadInput("too late")

    monkeypatch.setattr("dememo_jax.cli.victims.fit", late)
    assert inside(*SMALL, "--data", data, "--run", tmp_path / "new" / "deep") == cli.BAD_INPUT
    assert "too late" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    assert inside(*SMALL, "--data", data, "--run", tmp_path / "old") == cli.BAD_INPUT
    assert (tmp_path / "old").is_dir()  # not ours to take away


def test_what_a_kill_in_the_first_write_leaves_is_no_run(tmp_path, data):
    for name in ("config.json.part", "config.json", ".DS_Store", ".lock"):
        run = tmp_path / name / "run"
        run.mkdir(parents=True)
        (run / name).touch()
        assert runs.begin(run, {"command": "train", "data": "digits"}) is None
        locks.release(run)
        assert runs.read(run)["config"]["data"] == "digits"


WORKER = "import sys, time; from pathlib import Path; from dememo_jax.cli import locks; locks.hold(Path(sys.argv[1])); "


def worker(folder, then):
    process = subprocess.Popen([sys.executable, "-c", WORKER + then, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_has_one_process_at_a_time(tmp_path, data, victim, capsys):
    run = tmp_path / "v"
    run.mkdir()
    process = worker(run, "print('held', flush=True); time.sleep(100)")
    assert inside(*SMALL, "--data", data, "--run", run) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert f"{run} is in use by process {process.pid} on " in said
    process.send_signal(signal.SIGKILL)  # its lock file stays, and holds nothing
    process.wait()
    assert (run / locks.NAME).exists()
    assert inside(*SMALL, "--data", data, "--run", run) == 0
    assert not (run / locks.NAME).exists()
    process = worker(run, "print('held', flush=True); time.sleep(100)")  # readers do not mind
    assert inside(*SMALL, "--data", data, "--run", run) == 0
    assert inside("report", run, "--run", tmp_path / "page") == 0
    process.kill()
    process.wait()


@pytest.mark.slow
def test_deletions_wait_for_who_is_at_work(tmp_path, data, capsys):
    sisa = ("sisa", "--data", data, "--model", "mlp", "--shards", 2, "--slices", 1, "--epochs", 2, "--run", tmp_path / "s")
    assert inside(*sisa) == 0
    process = worker(tmp_path / "s", "print('held', flush=True); time.sleep(100)")
    assert inside(*sisa, "--delete", 3) == cli.BAD_INPUT
    assert "in use" in capsys.readouterr().err
    assert "indices" not in (tmp_path / "s" / "requests.jsonl").read_text()
    process.kill()
    process.wait()
    assert inside(*sisa, "--delete", 3) == 0
    assert result(tmp_path / "s")["values"]["deleted"] == 1


def test_deletions_that_leave_nothing_to_train_are_refused_before_they_are_logged(tmp_path, data, capsys):
    """One epoch over two slices is none of the first and one of both: without the second slice no network takes a step."""
    plan = shards.deal(keys.named(jax.random.key(0), "plan"), 45, shards=2, slices=2)
    sisa = ("sisa", "--data", data, "--model", "mlp", "--shards", 2, "--slices", 2, "--epochs", 1, "--run", tmp_path / "s")
    second = np.flatnonzero(plan.slice == 1)
    assert inside(*sisa, "--delete", *second) == cli.BAD_INPUT
    assert not (tmp_path / "s").exists()
    assert inside(*sisa, "--delete", *second[plan.shard[second] == 0]) == 0
    assert result(tmp_path / "s")["values"]["lost_shards"] == [0]  # its fresh weights do not vote
    log = (tmp_path / "s" / "requests.jsonl").read_bytes()
    assert inside(*sisa, "--delete", *second[plan.shard[second] == 1]) == cli.BAD_INPUT
    assert "no network would be trained" in capsys.readouterr().err
    assert (tmp_path / "s" / "requests.jsonl").read_bytes() == log
    assert inside(*sisa) == 0


def test_a_lock_that_was_removed_in_between_is_made_again(tmp_path, monkeypatch):
    real, calls = fcntl.flock, []

    def removing(descriptor, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / locks.NAME).unlink()
        return real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removing)
    locks.hold(tmp_path)
    assert len(calls) == 2
    assert (tmp_path / locks.NAME).exists()
    locks.hold(tmp_path)  # ours already
    locks.release(tmp_path)
    locks.release(tmp_path)
    assert not (tmp_path / locks.NAME).exists()


# --- what the system refuses -------------------------------------------------------------------------------------


def test_errors_of_the_system_name_what_they_are_about(tmp_path):
    run = tmp_path / "deep" / "run"
    full = OSError(errno.ENOSPC, "No space left on device", str(run / "weights"))
    for error in (full, OSError(errno.ENOSPC, "No space left on device"), OSError("could not write the checkpoint of step 3")):
        assert failures.sentence(error, run).startswith(f"cannot write to {run}: ")
        assert "Free space" in failures.sentence(error, run)
    taken = failures.sentence(PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "deep")), run)
    assert taken.startswith(f"cannot write to {run}: ")
    assert "Free space" not in taken
    other = failures.sentence(PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "data.npz")), run)
    assert other == f"cannot use {tmp_path / 'data.npz'}: Permission denied"
    assert "not enough memory" in failures.sentence(MemoryError("Unable to allocate 596 GiB"), run)
    assert "kept in" not in failures.sentence(NonFinite("loss became nan"), run)
    with pytest.raises(ZeroDivisionError):
        failures.sentence(ZeroDivisionError(), run)


def test_a_platform_that_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    def none():
        raise AssertionError

    monkeypatch.setattr("jax.devices", none)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert inside(*SMALL, "--run", tmp_path / "v") == cli.BAD_INPUT
    assert "JAX_PLATFORMS=cuda" in capsys.readouterr().err
    assert not (tmp_path / "v").exists()


# --- signals and streams -----------------------------------------------------------------------------------------

HEARD = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # the tests may run where it is ignored
AT_WORK = "from dememo_jax.cli import interrupts; interrupts.end_at_once(130, 'stopped'); print('ready', flush=True); "


@pytest.mark.parametrize("often", [1, 2])
@pytest.mark.parametrize(
    "work", ["import time; time.sleep(100)", "import hashlib; hashlib.pbkdf2_hmac('md5', b'', b'', 2**30)"]
)
def test_interrupts_end_in_one_sentence(often, work):
    """Also where the main thread is inside compiled code, and runs no handler of Python's."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HEARD + AT_WORK + work], cwd=ROOT, **pipes)
    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(often):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == cli.INTERRUPTED
    assert said == "stopped"


def test_nothing_heavy_is_imported_before_interrupts_are_handled():
    code = "import sys, dememo_jax.cli; print([name for name in ('jax', 'numpy', 'tyro', 'rich') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


WRITER = """
import sys
from dememo_jax.cli import console
console.prepare()
console.say("first")
input()
console.say("second \\u00e4 \\u4e2d")
console.OUT.rule("third")
lost = console.flush()
console.error(f"lost: {lost}")
"""


def test_a_reader_who_leaves_stops_nothing():
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.stdin.write(b"go\n")
    process.stdin.close()
    assert process.stderr.read() == b"error: lost: \n"
    assert process.wait() == 0


def test_an_output_that_cannot_be_written_is_said_at_the_end():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", WRITER], cwd=ROOT, input=b"go\n", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 0
    assert done.stderr == b"error: lost: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_an_encoding_lacks_are_escaped(encoding):
    known = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", WRITER], cwd=ROOT, input=b"go\n", capture_output=True, env=known)
    assert done.returncode == 0
    assert b"\\u4e2d" in done.stdout


def test_control_characters_of_others_do_not_reach_the_terminal(capsys):
    console.prepare()
    console.say("a\x1b]0;title\x07b\x9b1m\ttab [bold]")
    console.warn("\x1b[31m")
    console.error("\x7f")
    bare = {"title": "\x1bt", "summary": "\x1bs", "tables": [], "plots": [], "pictures": []}
    console.announce({"sections": [bare], "measured": {"seconds": 1.0}})
    shown = "".join(capsys.readouterr())
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\x7f"}
    assert r"\x1b]0;title\x07" in shown
    assert "[bold]" in shown


# --- pages of foreign runs ---------------------------------------------------------------------------------------


def foreign(victim, folder, change):
    """A run folder of somebody else's, its result.json written over."""
    shutil.copytree(victim, folder)
    known = result(folder)
    known.pop("digest", None)  # who writes over a result leaves out what vouches for it
    change(known)
    (folder / "result.json").write_text(json.dumps(known))
    return folder


def test_reports_hold_nothing_from_elsewhere(victim, tmp_path, capsys):
    (tmp_path / "private.png").write_bytes(b"\x89PNG\r\n\x1a\nprivate")
    for number, name in enumerate(("../private.png", str(tmp_path / "private.png"), "link.png")):
        run = foreign(
            victim, tmp_path / f"v{number}", lambda done, name=name: done["sections"][0]["pictures"].append([name, "x"])
        )
        (run / "link.png").symlink_to(tmp_path / "private.png")
        assert inside("report", run, "--run", tmp_path / "page") == cli.BAD_INPUT
        assert "error: " in capsys.readouterr().err
        assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("part", ["sections", "measured", "values", "config"])
def test_results_with_missing_parts_are_refused(part, victim, tmp_path, capsys):
    for number, change in enumerate((lambda done: done.pop(part), lambda done: done.update({part: 3}))):
        run = foreign(victim, tmp_path / f"v{number}", change)
        assert inside("report", run, "--run", tmp_path / "page") == cli.BAD_INPUT
        assert "error: " in capsys.readouterr().err
        assert not (tmp_path / "page").exists()


def test_runs_of_one_name_stand_apart_on_a_page(victim, tmp_path):
    shutil.copytree(victim, tmp_path / "again" / "victim")
    assert inside("report", victim, tmp_path / "again" / "victim", "--run", tmp_path / "page") == 0
    assert list(result(tmp_path / "page")["values"]) == ["victim", "victim-2"]
    assert {path.name for path in (tmp_path / "page").glob("*.png")} == {"victim-training.png", "victim-2-training.png"}
    assert inside("report", victim, victim.parent / "." / "victim", "--run", tmp_path / "twice") == cli.BAD_INPUT
    assert inside("report", tmp_path / "page", "--run", tmp_path / "page of pages") == 0  # a page is whole by itself


def test_a_run_that_stands_on_itself_is_refused(victim, tmp_path, capsys):
    for name, source in (("self", "."), ("one", "../two"), ("two", "../one")):
        shutil.copytree(victim, tmp_path / name)
        for file in ("config.json", "result.json"):
            known = json.loads((tmp_path / name / file).read_text())
            known.pop("digest", None)
            known["config"] |= {"source": source, "data": None, "command": "unlearn", "method": "retrain"}
            (tmp_path / name / file).write_text(json.dumps(known))
    for name in ("self", "one"):
        assert inside("unlearn", "--from", tmp_path / name, "--forget-class", 0, "--run", tmp_path / "u") == cli.BAD_INPUT
        assert "stands on itself" in capsys.readouterr().err


# --- what is said and what is kept -------------------------------------------------------------------------------


def test_a_model_that_still_knows_all_of_it_is_hinted_at(victim, tmp_path, capsys):
    ascent = ("unlearn", "--from", victim, "--method", "gradient-ascent", "--epochs", 1, "--forget-class", 0)
    assert inside(*ascent, "--lr", 1e-9, "--run", tmp_path / "little") == 0
    assert "did not move" in capsys.readouterr().err
    before = result(tmp_path / "little")["values"]
    assert before["before"]["Dc"] == before["after"]["Dc"]


@pytest.mark.parametrize("method", ["gradient-ascent", "finetune"])
def test_weights_that_answer_nothing_are_no_result(method, victim, tmp_path, capsys):
    """The loss is taken before each step: of one step it is that of the given model, whatever the step does."""
    unlearn = ("unlearn", "--from", victim, "--method", method, "--epochs", 1, "--batch", 64, "--forget-class", 0)
    assert inside(*unlearn, "--lr", 1e38, "--run", tmp_path / "u") == cli.FAILED
    assert "NaN" in capsys.readouterr().err
    assert not (tmp_path / "u" / "result.json").exists()


@pytest.mark.parametrize("method", ["ue-s", "tap", "pue", "tue", "pil", "em"])
def test_recipes_are_made_once(method):
    base = lineage.clean("digits", None)
    mask = np.ones(len(base.train.y), bool)
    configs = [Protect(run=Path(name), method=method, model="mlp") for name in "ab"]
    one, other = (recipes.make(config, base, mask, 0.1) for config in configs)
    assert (one.init, one.step) == (other.init, other.step)
