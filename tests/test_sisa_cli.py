"""`dememo sisa`: requests reach the disk before the work, and whatever happens between, the same networks come out."""

import json

import jax
import numpy as np
import pytest

from dememo_jax import checkpoint, cli
from dememo_jax.cli import configs, deletions, networks, sharding
from dememo_jax.errors import BadInput
from dememo_jax.unlearn import sharded, shards

SMALL = {"model": "mlp", "shards": 3, "slices": 2, "epochs": 3}  # stages of 2 and 2 epochs
ASKED = (3, 17, 1000)


class Crash(RuntimeError):
    pass


def sisa(run, *delete, **how):
    return cli.execute(configs.Sisa(run=run, delete=delete, **{**SMALL, **how}))


def lines(run):
    return [json.loads(line) for line in (run / "requests.jsonl").read_text().splitlines()]


def asked(run):
    return [line["indices"] for line in lines(run) if "request" in line]


def request(run, indices, count):
    """A request that is logged, and no more."""
    log = deletions.read(run / "requests.jsonl", count)
    deletions.request(run / "requests.jsonl", log, np.asarray(indices), count)


def stages(run):
    """Every stage on disk: its name and its arrays."""
    model = networks.model("mlp", 10)
    like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    kept = checkpoint.store(run / "stages", like, pytest.fail)
    return {name: [np.asarray(leaf) for leaf in jax.tree.leaves(kept.load(name))] for name in kept.names()}


def assert_same(run, other):
    one, two = stages(run), stages(other)
    assert one.keys() == two.keys()
    for name, leaves in one.items():
        for a, b in zip(leaves, two[name], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture
def saves(monkeypatch):
    """How many checkpoints were written, and after how many of them to crash."""
    seen = {"count": 0, "most": None}
    save = checkpoint.save

    def counted(*arguments):
        if seen["count"] == seen["most"]:
            raise Crash
        seen["count"] += 1
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", counted)
    return seen


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Trained from nothing without the examples in question."""
    run = tmp_path_factory.mktemp("scratch") / "run"
    done = sisa(run, *ASKED)
    assert done["values"]["rounds"][0]["requests"] == [1]
    return run


def test_training_then_requests(tmp_path, scratch, saves, capsys):
    run = tmp_path / "run"
    first = sisa(run)["values"]
    assert saves["count"] == 6
    assert first["test"] > 0.7
    assert (first["deleted"], first["deleted_accuracy"]) == (0, None)
    assert sum(first["sizes"]) == 1347
    before = stages(run)

    done = sisa(run, *ASKED)
    values, last = done["values"], done["values"]["rounds"][-1]
    assert_same(run, scratch)  # and so nothing stale is left on the disk
    assert saves["count"] == 6 + last["stages"]
    assert last["stages"] == len(stages(run).keys() - before.keys())
    with np.load(run / "plan.npz") as plan:
        assert last["shards"] == sorted({int(plan["shard"][i]) for i in ASKED})
        first_slice = {s: min(int(plan["slice"][i]) for i in ASKED if plan["shard"][i] == s) for s in last["shards"]}
        kept = np.array([i not in ASKED for i in range(1347)])
        sizes = np.array([[((plan["shard"] == s) & (plan["slice"] <= r) & kept).sum() for r in (0, 1)] for s in range(3)])
    assert last["stages"] == sum(2 - part for part in first_slice.values())
    share = sum(2 * sizes[s, r] for s, part in first_slice.items() for r in range(part, 2)) / (2 * sizes.sum())
    assert last["share"] == pytest.approx(share)
    assert (last["requests"], last["examples"], values["deleted"]) == ([1], 3, 3)
    assert values["deleted_accuracy"] * 3 == pytest.approx(round(values["deleted_accuracy"] * 3))
    assert values["test"] == json.loads((scratch / "result.json").read_text())["values"]["test"]
    assert "Networks alone" in (run / "report.html").read_text()

    capsys.readouterr()
    assert sisa(run, 17, 3)["values"] == values  # asked for before: said, and nothing done
    assert "2 of the examples to delete: 3, 17" in capsys.readouterr().err
    assert sisa(run)["values"] == values
    assert saves["count"] == 6 + last["stages"]
    again = sisa(run, 17, 20)["values"]
    assert [entry["requests"] for entry in again["rounds"]] == [[], [1], [2]]
    assert again["rounds"][:2] == values["rounds"]
    assert again["rounds"][2]["examples"] == 1
    assert asked(run) == [[3, 17, 1000], [20]]


def test_a_crash_after_the_request_loses_nothing(tmp_path, scratch, monkeypatch):
    run = tmp_path / "run"
    sisa(run)

    def crash(*arguments, **how):
        raise Crash

    with monkeypatch.context() as broken:
        broken.setattr(sharded, "fit", crash)
        with pytest.raises(Crash):
            sisa(run, *ASKED)
    assert lines(run)[-1]["indices"] == list(ASKED)
    assert not (run / "result.json").exists()  # it told of networks that are gone
    done = sisa(run)["values"]  # no deletion on this command: the open one is carried out
    assert done["rounds"][-1]["requests"] == [1]
    assert_same(run, scratch)


def test_a_crash_between_the_log_and_the_result(tmp_path, scratch, monkeypatch):
    run = tmp_path / "run"
    sisa(run)
    request(run, ASKED, 1347)  # on disk, and nothing else done: result.json is of before
    assert sisa(run)["values"]["rounds"][-1]["requests"] == [1]
    assert_same(run, scratch)
    (run / "result.json").unlink()  # killed before it was written
    again = sisa(run)["values"]
    assert [entry["requests"] for entry in again["rounds"]] == [[], [1]]


def test_killed_in_training_it_goes_on(tmp_path, scratch, saves, capsys):
    run = tmp_path / "run"
    saves["most"] = 3
    with pytest.raises(Crash):
        sisa(run)
    assert len(stages(run)) == 3
    saves["most"] = None
    values = sisa(run, *ASKED)["values"]  # asked for before the training was over: one training for both
    assert [entry["requests"] for entry in values["rounds"]] == [[1]]
    assert "stages are trained already" in capsys.readouterr().out
    assert_same(run, scratch)


def test_a_damaged_stage_is_trained_again(tmp_path, scratch, saves, capsys):
    run = tmp_path / "run"
    sisa(run, *ASKED)
    count = saves["count"]
    (run / "result.json").unlink()
    for sums in list((run / "stages").glob("*/0/sums.json")):
        sums.write_text("{")
    sisa(run)
    said = capsys.readouterr().err
    assert "was never finished" in said
    assert "counts as not there" in said
    assert saves["count"] == 2 * count
    assert_same(run, scratch)


def test_the_store_holds_only_what_is_whole(tmp_path):
    said: list[str] = []
    kept = checkpoint.store(tmp_path / "store", {"w": jax.ShapeDtypeStruct((3,), np.float32)}, said.append)
    assert (kept.names(), kept.load("a")) == ((), None)
    for i, name in enumerate("abc"):
        kept.save(name, {"w": np.arange(3, dtype=np.float32) + i})
    assert kept.names() == ("a", "b", "c")
    np.testing.assert_array_equal(kept.load("b")["w"], [1, 2, 3])
    part = next(path for path in (tmp_path / "store" / "b" / "0" / "state").rglob("*") if path.is_file())
    part.write_bytes(part.read_bytes()[:-1])
    assert kept.load("b") is None
    assert len(said) == 1
    assert "is damaged" in said[0]
    assert kept.names() == ("a", "c")
    kept.save("b", {"w": np.ones(3, np.float32)})
    np.testing.assert_array_equal(kept.load("b")["w"], np.ones(3))
    kept.remove(["a", "b"])
    assert kept.names() == ("c",)
    assert len(said) == 1


def test_a_line_cut_short(tmp_path, capsys):
    log, plan = tmp_path / "requests.jsonl", shards.deal(jax.random.key(0), 10, shards=2, slices=1)
    deletions.begin(tmp_path, plan, None)
    request(tmp_path, [5], 10)
    whole = log.read_text()
    log.write_text(whole + '{"request": 2, "ind')
    _, found = deletions.begin(tmp_path, plan, None)
    assert "never finished" in found.said[0]
    request(tmp_path, [6], 10)
    assert asked(tmp_path) == [[5], [6]]
    log.write_text(log.read_text()[:-1])  # only the end of the line is gone: the request was made
    _, found = deletions.begin(tmp_path, plan, None)
    assert found.said == ()
    request(tmp_path, [7], 10)
    assert asked(tmp_path) == [[5], [6], [7]]
    for spoilt in ("garbage\n" + whole, whole.replace("1", "2", 1)):
        log.write_text(spoilt)
        with pytest.raises(BadInput, match="damaged"):
            deletions.begin(tmp_path, plan, None)


def test_deletions_from_files(tmp_path):
    mask = np.isin(np.arange(1347), ASKED)
    np.save(tmp_path / "mask.npy", mask)
    np.save(tmp_path / "some.npy", np.array([1000, 3, 3], np.uint16))
    (tmp_path / "some.txt").write_text("1000\n\n3\n")
    for name, more, expected in (("mask.npy", (), ASKED), ("some.npy", (17,), ASKED), ("some.txt", (4,), (3, 4, 1000))):
        config = configs.Sisa(run=tmp_path / "run", delete=more, delete_index=tmp_path / name, **SMALL)
        assert sharding._asked(config, 1347).tolist() == list(expected)


def test_refusals_leave_no_folder(tmp_path):
    np.save(tmp_path / "short.npy", np.zeros(5, bool))
    np.save(tmp_path / "float.npy", np.zeros(5))
    (tmp_path / "words.txt").write_text("three")
    wrong = [
        ({"delete": (1347,)}, r"\[1347\]: the training examples are numbered 0..1346"),
        ({"delete": (-1,)}, r"\[-1\]"),
        ({"shards": 100, "slices": 100}, "need 10000 examples"),
        ({"slices": 0}, "at least one shard and one slice"),
        ({"lr": 0.0}, "--lr must be positive"),
        ({"data": "digits", "source": tmp_path}, "not both"),
        *(
            ({"delete_index": tmp_path / name}, "expected a .npy")
            for name in ("short.npy", "float.npy", "words.txt", "none.npy")
        ),
    ]
    for change, sentence in wrong:
        with pytest.raises(BadInput, match=sentence):
            cli.execute(configs.Sisa(run=tmp_path / "run", **{**SMALL, **change}))
    assert not (tmp_path / "run").exists()


def test_refusals_of_a_finished_run(tmp_path):
    run = tmp_path / "run"
    sisa(run)
    with pytest.raises(BadInput, match="cover all data"):
        sisa(run, *range(1347))
    with pytest.raises(BadInput, match=r"width \(there 1, asked 3\)"):
        sisa(run, width=3)
    with pytest.raises(BadInput, match=r"epochs \(there 3, asked 4\)"):
        sisa(run, 3, epochs=4)
    assert [line for line in lines(run) if "request" in line] == []
    assert (run / "result.json").exists()


def test_on_the_command_line(tmp_path):
    arguments = ["sisa", "--run", str(tmp_path), "--shards", "3", "--delete", "3", "17", "--vote", "mean"]
    config = cli.parse(arguments)
    assert (config.delete, config.shards, config.vote) == ((3, 17), 3, "mean")
