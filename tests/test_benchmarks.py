"""The benchmark that a machine with a GPU runs first: resumable steps, in processes that need few packages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ABSENT = ("tensorflow_datasets", "grain", "tyro", "dp_accounting")  # on the machines that it is made for


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accelerator

    return accelerator


def test_shares_of_published_peaks_and_of_unknown_ones(accelerator):
    assert accelerator.share(989e12, 2.0, "NVIDIA H100 80GB HBM3", "bfloat16") == 0.5
    assert accelerator.peak("NVIDIA H100 PCIe", "tf32") == 378e12
    assert accelerator.peak("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12
    assert accelerator.share(1.0, 1.0, "cpu", "float32") is None


def test_steps_that_are_there_are_not_run_again(accelerator, tmp_path, monkeypatch, capsys):
    run = []

    def measured(name, configuration, limit):
        run.append(name)
        status = {"train": "out of time", "torch-tf32": "skipped"}.get(name, "done")
        return {"step": name, "configuration": configuration, "status": status, "commit": accelerator.commit()}

    monkeypatch.setattr(accelerator, "measured", measured)
    asked = ["--out", str(tmp_path), "--only", "certify-tf32", "train", "torch-tf32"]
    assert accelerator.main(asked) == accelerator.main(asked) == 1
    assert run == ["certify-tf32", "train", "torch-tf32", "train"]  # what was not done in time is tried again
    assert accelerator.main([*asked, "--small"]) == 1  # other sizes are another measurement
    assert run[4:] == ["certify-tf32", "train", "torch-tf32"]
    assert "certify-tf32: known" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "certify-tf32.json").read_text())["configuration"]["sizes"]["images"]
        == accelerator.SMALL["images"]
    )


def test_a_step_ends_at_its_limit(accelerator):
    found = accelerator.measured("train", {"sizes": accelerator.SMALL, "budget": 1}, 0.2)
    assert (found["status"], found["reason"]) == ("out of time", "not done after 0.2 s")


def test_what_is_absent_there_is_not_imported():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import accelerator, train, certify\n"
        "from dememo_jax import audit, augment, certify, evaluate, loop, models, nets, sharpness, train\n"
        "print(len(accelerator.STEPS), accelerator.surroundings()['device'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["11", "cpu"], done.stderr[-2000:]


@pytest.mark.slow
def test_a_dry_run(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "accelerator.py"), "--out", str(tmp_path), "--small", "--budget", "1"]
    for said in ("done", "known"):
        done = subprocess.run([*command, "--limit", "900"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:]
        assert f"certify-bfloat16: {said}" in done.stdout
    parts = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(parts) == 11
    for name, part in parts.items():
        assert part["device"] == "cpu"
        assert {"commit", "versions", "configuration", "wall_seconds"} <= set(part)
        assert part["status"] == "done" or (name.startswith("torch") and part["reason"])
    assert parts["certify-bfloat16"]["result"]["draws"] == 3
    assert parts["train"]["result"]["share_of_peak"] is None
