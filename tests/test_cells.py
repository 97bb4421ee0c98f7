"""A table on disk: shared by processes, resumed after a kill, refused for other settings."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dememo_jax import cells
from dememo_jax.errors import BadInput

NAMES = [f"cell-{i}" for i in range(6)]


def cell(name):
    return {"value": int(name.split("-")[1]) ** 2, "commit": "a"}


def test_fills_resumes_and_reports(tmp_path):
    asked, counts = [], []

    def compute(name):
        if name == "cell-3" and len(asked) < 4:
            asked.append(name)
            raise RuntimeError("out of luck")
        asked.append(name)
        return cell(name)

    cells.begin(tmp_path / "t", {"epochs": 3}, commit="a")
    with pytest.raises(RuntimeError, match="luck"):
        cells.fill(tmp_path / "t", NAMES, compute, after=counts.append)
    assert sorted(cells.done(tmp_path / "t")) == NAMES[:3]  # what was there stays
    assert not list((tmp_path / "t").glob("*.lock"))
    cells.begin(tmp_path / "t", {"epochs": 3}, commit="a")
    found = cells.fill(tmp_path / "t", NAMES, compute, after=counts.append)
    assert found == {name: cell(name) for name in NAMES}
    assert asked == [*NAMES[:4], *NAMES[3:]]  # a cell done is never done again
    assert counts == [1, 2, 3, 4, 5, 6]


def test_other_settings_commits_and_folders_are_refused(tmp_path):
    folder = tmp_path / "t"
    cells.begin(folder, {"epochs": 3, "preset": "cpu"}, commit="a")
    cells.fill(folder, NAMES[:1], cell)
    with pytest.raises(BadInput, match=r"epochs \(there 3, asked 5\)"):
        cells.begin(folder, {"epochs": 5, "preset": "cpu"}, commit="a")
    with pytest.raises(BadInput, match=r"another commit \(a\).*--mixed"):
        cells.begin(folder, {"epochs": 3, "preset": "cpu"}, commit="b")
    cells.begin(folder, {"epochs": 3, "preset": "cpu"}, commit="b", mixed=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        cells.begin(tmp_path / "file", {})
    with pytest.raises(BadInput, match=r"no settings\.json"):
        cells.begin(tmp_path, {})
    (folder / "cell-0.json").write_text("{")
    with pytest.raises(BadInput, match=r"cell-0\.json is damaged"):
        cells.done(folder)


def lock_of(path, machine, process, age):
    path.write_text(json.dumps({"machine": machine, "process": process}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_locks_of_the_dead_and_of_the_living(tmp_path):
    said, here = [], cells.socket.gethostname()
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    cases = {
        "dead": (here, int(gone.stdout), 1, True),
        "living": (here, os.getpid(), 1, False),
        "elsewhere": ("another", 1, 1, False),
        "silent": ("another", 1, 5000, True),
    }
    for name, (machine, process, age, taken) in cases.items():
        path = lock_of(tmp_path / name, machine, process, age)
        with cells.claim(path, say=said.append) as mine:
            assert mine == taken, name
        assert path.exists() != taken  # given back, or left to its owner
    assert len(said) == 2
    assert "dead: its owner, process" in said[0]
    with cells.claim(tmp_path / "once") as first, cells.claim(tmp_path / "once") as second:
        assert (first, second) == (True, False)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"process": "x", "machine": "y"}', '{"machine": "y"}', "\0\0"])
def test_half_a_lock_does_not_hold_for_long(content, tmp_path):
    path = tmp_path / "lock"
    path.write_text(content)
    with cells.claim(path, say=str) as mine:
        assert not mine  # its owner may be writing it
    os.utime(path, (time.time() - 10,) * 2)
    with cells.claim(path, say=str) as mine:
        assert mine
    assert not list(tmp_path.iterdir())


def test_a_disk_without_links(tmp_path, monkeypatch):
    def refused(*paths):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    with cells.claim(tmp_path / "lock") as first, cells.claim(tmp_path / "lock") as second:
        assert (first, second) == (True, False)
    assert not list(tmp_path.iterdir())


def test_a_holder_gives_signs_of_life(tmp_path):
    with cells.claim(tmp_path / "lock", patience=0.2):
        os.utime(tmp_path / "lock", (0, 0))
        time.sleep(0.2)
        assert time.time() - (tmp_path / "lock").stat().st_mtime < 1


WORKER = """
import sys, time
from pathlib import Path
from dememo_jax import cells
folder, log = Path(sys.argv[1]), Path(sys.argv[2])
def compute(name):
    with log.open("a") as file: file.write(name + "\\n")
    time.sleep(0.15)
    return {"value": int(name.split("-")[1]) ** 2, "commit": "a"}
cells.begin(folder, {}, commit="a")
cells.fill(folder, [f"cell-{i}" for i in range(6)], compute, poll=0.05)
"""


def worker(folder, log):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(log)])


def test_two_processes_share_and_a_killed_one_is_finished(tmp_path):
    folder, log = tmp_path / "t", tmp_path / "log"
    cells.begin(folder, {}, commit="a")
    both = [worker(folder, log), worker(folder, log)]
    assert [one.wait(60) for one in both] == [0, 0]
    assert sorted(log.read_text().split()) == NAMES  # each of them once
    assert {name: row["value"] for name, row in cells.done(folder).items()} == {n: cell(n)["value"] for n in NAMES}

    other, killed = tmp_path / "u", tmp_path / "killed"
    first = worker(other, killed)
    while not killed.exists() or len(killed.read_text().split()) < 3:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert len(cells.done(other)) < 6
    assert worker(other, tmp_path / "rest").wait(60) == 0
    assert sorted(cells.done(other)) == NAMES
    assert not list(other.glob("*.lock"))
