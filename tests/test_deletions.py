"""The log of deletions: whatever happens to it, nothing that was deleted comes back unseen."""

import json
import shutil

import jax
import numpy as np
import pytest

from dememo_jax.cli import deletions, identity
from dememo_jax.errors import BadInput
from dememo_jax.unlearn import shards

COUNT = 12
PLAN = shards.deal(jax.random.key(0), COUNT, shards=2, slices=2)


def result(log):
    """What a result of these trainings says of the log."""
    values = {"deleted": int(log.mask(max(log.done, 0), COUNT).sum()), "rounds": [{}] * len(log.rounds), "log": log.chains[-1]}
    return {"values": values}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder after a training, a request for 5 and 7, and its training; and its result."""
    folder = tmp_path_factory.mktemp("log")
    path = folder / deletions.LOG
    _, log = deletions.begin(folder, PLAN, None)
    log = deletions.finished(path, log, 1.5, COUNT)
    log = deletions.request(path, log, np.array([5, 7]), COUNT)
    log = deletions.finished(path, log, 0.5, COUNT)
    (folder / deletions.STAGES).mkdir()
    return folder, result(log)


@pytest.fixture
def folder(begun, tmp_path):
    shutil.copytree(begun[0], tmp_path / "run")
    return tmp_path / "run"


def edit(folder, change):
    path = folder / deletions.LOG
    path.write_bytes(change(path.read_bytes()))


def test_what_was_written_is_read(folder, begun):
    plan, log = deletions.begin(folder, PLAN, begun[1])
    np.testing.assert_array_equal(plan.shard, PLAN.shard)
    assert (log.done, log.said) == (1, ())
    assert np.flatnonzero(log.mask(1, COUNT)).tolist() == [5, 7]
    assert not log.mask(0, COUNT).any()


def test_every_flipped_bit_is_found(folder, begun):
    """Beside a result and without one."""
    content = (folder / deletions.LOG).read_bytes()
    lines = content.count(b"\n")
    for place in range(len(content)):
        edit(folder, lambda _, at=place: content[:at] + bytes([content[at] ^ 1 << at % 7]) + content[at + 1 :])
        done = begun[1] if place % 2 else None
        if place == len(content) - 1:  # the end of the last line, which itself is whole
            _, log = deletions.begin(folder, PLAN, done)
            assert len(log.chains) == lines
            continue
        with pytest.raises(BadInput, match=r"requests\.jsonl is (damaged|not the log)"):
            deletions.begin(folder, PLAN, done)


@pytest.mark.parametrize("with_result", [True, False])
@pytest.mark.parametrize("loss", ["deleted", "empty", "half a line"])
def test_a_lost_log_is_refused(loss, with_result, folder, begun):
    if loss == "deleted":
        (folder / deletions.LOG).unlink()
    else:
        edit(folder, lambda content: content[: {"empty": 0, "half a line": 9}[loss]])
    for _ in range(2):  # refusing changes nothing
        with pytest.raises(BadInput, match=r"requests\.jsonl is (missing|empty) beside plan\.npz, stages"):
            deletions.begin(folder, PLAN, begun[1] if with_result else None)


def test_lost_lines_are_refused_beside_the_result(folder, begun):
    lines = (folder / deletions.LOG).read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines)):
        edit(folder, lambda _, kept=kept: b"".join(lines[:kept]))
        with pytest.raises(BadInput, match="not the log that the result was made from"):
            deletions.begin(folder, PLAN, begun[1])
    for dropped in range(len(lines) - 1):  # from the middle, result or not
        edit(folder, lambda _, dropped=dropped: b"".join(lines[:dropped] + lines[dropped + 1 :]))
        with pytest.raises(BadInput, match="damaged in line"):
            deletions.begin(folder, PLAN, None)


def test_another_log_is_refused(folder, begun, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    _, log = deletions.begin(other, PLAN, None)
    log = deletions.finished(other / deletions.LOG, log, 1.5, COUNT)
    log = deletions.request(other / deletions.LOG, log, np.array([4, 7]), COUNT)
    deletions.finished(other / deletions.LOG, log, 0.5, COUNT)
    shutil.copy(other / deletions.LOG, folder / deletions.LOG)
    with pytest.raises(BadInput, match="not the log"):
        deletions.begin(folder, PLAN, begun[1])


SPOILT = {
    "name of an entry": lambda e: {("iNdices" if k == "indices" else k): v for k, v in e.items()},
    "beyond the data": lambda e: {**e, "indices": [917]} if "request" in e else e,
    "from the end": lambda e: {**e, "indices": [-5]} if "request" in e else e,
    "a text": lambda e: {**e, "indices": ["5"]} if "request" in e else e,
    "nothing": lambda e: {**e, "indices": []} if "request" in e else e,
    "its number": lambda e: {**e, "request": 2} if "request" in e else e,
    "another kind of line": lambda e: {"dong": 0} if "done" in e else e,
    "a training of what was not asked": lambda e: {**e, "done": 9} if "done" in e else e,
}


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("chained", [True, False])
def test_impossible_lines_are_refused(what, chained, folder):
    """Even where the digests fit, or an older version wrote none."""
    path, before, out = folder / deletions.LOG, "", []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        entry.pop("chain")
        if not chained and "begun" in entry:
            continue
        entry = SPOILT[what](entry)
        before = identity.of_json([before, entry])
        out.append(json.dumps(entry | ({"chain": before} if chained else {})))
    path.write_text("\n".join(out) + "\n")
    with pytest.raises(BadInput, match="damaged in line"):
        deletions.begin(folder, PLAN, None)


@pytest.mark.parametrize("content", [b"\xff\xfe{}\n", b"[]\n", b"null\n", b"[" * 100_000 + b"\n", b'{"chain": 3}\n'])
def test_what_is_no_log_is_refused(content, folder):
    edit(folder, lambda _: content)
    with pytest.raises(BadInput, match="damaged"):
        deletions.begin(folder, PLAN, None)


def older(folder):
    """Make the log one of a version without digests."""
    entries = [json.loads(line) for line in (folder / deletions.LOG).read_text().splitlines()]
    kept = [{k: v for k, v in entry.items() if k != "chain"} for entry in entries if "begun" not in entry]
    (folder / deletions.LOG).write_text("".join(json.dumps(entry) + "\n" for entry in kept))


def test_an_older_log_is_read_and_goes_on(folder, begun):
    older(folder)
    done = {"values": {name: value for name, value in begun[1]["values"].items() if name != "log"}}
    _, log = deletions.begin(folder, PLAN, done)
    assert "older version" in log.said[0]
    assert np.flatnonzero(log.mask(1, COUNT)).tolist() == [5, 7]
    deletions.request(folder / deletions.LOG, log, np.array([2]), COUNT)
    _, log = deletions.begin(folder, PLAN, done)
    assert log.said == ()  # from now on every line counts
    edit(folder, lambda content: content.replace(b"[5, 7]", b"[4, 7]"))
    with pytest.raises(BadInput, match="damaged in line 4"):
        deletions.begin(folder, PLAN, done)


def test_an_older_log_must_fit_the_result(folder, begun):
    older(folder)
    edit(folder, lambda content: content.replace(b"[5, 7]", b"[5]"))
    done = {"values": {name: value for name, value in begun[1]["values"].items() if name != "log"}}
    with pytest.raises(BadInput, match=r"1 deleted examples.*the result of 2"):
        deletions.begin(folder, PLAN, done)


def test_a_changed_plan_is_refused(folder, begun):
    plan = PLAN._replace(shard=PLAN.shard[::-1].copy())
    other = folder.parent / "other"
    other.mkdir()
    deletions.begin(other, plan, None)
    shutil.copy(other / deletions.PLAN, folder / deletions.PLAN)
    with pytest.raises(BadInput, match=r"plan\.npz is not what .*recorded was the digest"):
        deletions.begin(folder, PLAN, begun[1])
    (folder / deletions.PLAN).write_bytes(b"")
    with pytest.raises(BadInput, match=r"plan\.npz is damaged"):
        deletions.begin(folder, PLAN, begun[1])
    (folder / deletions.PLAN).unlink()
    deletions.begin(folder, PLAN, begun[1])  # the same would be dealt again
    (folder / deletions.PLAN).unlink()
    with pytest.raises(BadInput, match=r"plan\.npz is missing"):
        deletions.begin(folder, plan, begun[1])


def test_killed_at_once_it_starts_again(tmp_path):
    (tmp_path / deletions.LOG).write_text('{"beg')
    _, log = deletions.begin(tmp_path, PLAN, None)
    assert (log.done, log.requests) == (-1, [])
