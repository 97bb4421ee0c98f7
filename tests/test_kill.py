"""State that survives: SIGKILL in the middle of each long stage, and damage to the newest checkpoint."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import inside
from kinds import some

from dememo_jax.cli import lineage

DEMEMO = str(Path(sys.executable).with_name("dememo"))

# stage -> (arguments, the file whose arrays must be equal to the bit)
STAGES = {
    "protect": ("protect --method ue-s --radius 0.02 --passes 25 --model mlp --checkpoint-seconds 0", "perturbation.npz"),
    "unlearn": (
        "unlearn --from victim --method noisy --noise-seed 3 --forget-class 0 --steps 40 --epochs 3 --checkpoint-seconds 0",
        None,
    ),
    "certify": ("certify --from victim --target-class 1 --draws 2500 --checkpoint-seconds 0.02", "scores.npz"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    assert inside("train", "--run", folder / "victim", "--model", "mlp", "--epochs", 1) == 0
    return folder


def checkpoints(folder):
    return sorted(int(path.parent.name) for path in folder.glob("*/*/*/sums.json"))


def kill_midway(command, folder, root):
    """Start, wait for the second checkpoint, SIGKILL."""
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(checkpoints(folder)) < 2:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "result.json").exists()


def outcome(folder, arrays):
    values = json.loads((folder / "result.json").read_text())["values"]
    if arrays is None:
        return values, [np.asarray(leaf) for leaf in jax.tree.leaves(lineage.trained(folder).weights)]
    with np.load(folder / arrays, allow_pickle=False) as file:
        return values, [file[name] for name in file]


# Protection keeps its state as unlearning does; draws that go on are in test_cli as well.
@pytest.mark.parametrize("stage", some(STAGES, ("certify",)))
def test_killed_and_restarted_ends_bit_for_bit_the_same(stage, root, monkeypatch):
    arguments, arrays = STAGES[stage]
    command = [DEMEMO, *arguments.split()]
    straight, killed = root / f"{stage}-straight", root / f"{stage}-killed"
    monkeypatch.chdir(root)
    assert inside(*command[1:], "--run", straight) == 0
    kill_midway([*command, "--run", killed], killed, root)
    if stage == "unlearn":  # damage the newest as well: the one before must do
        newest = max(checkpoints(killed))
        victim = next(path for path in killed.glob(f"checkpoints/*/{newest}/state/**/*") if path.is_file())
        victim.write_bytes(victim.read_bytes()[:-1])
    done = subprocess.run([*command, "--run", killed], cwd=root, capture_output=True, text=True, check=True)
    assert "resuming" in done.stdout
    if stage == "unlearn":
        assert f"checkpoint {newest}" in done.stderr
        assert "falling back" in done.stderr
    values, leaves = outcome(killed, arrays)
    expected_values, expected = outcome(straight, arrays)
    assert values == expected_values
    assert len(leaves) == len(expected) > 0
    for leaf, other in zip(leaves, expected):
        np.testing.assert_array_equal(leaf, other)
