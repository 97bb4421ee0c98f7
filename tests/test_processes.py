"""Draws spread over two processes are the draws of one, whatever their clocks say."""

import os
import socket
import subprocess
import sys

import pytest

SETUP = """
import sys, jax
rank, port = int(sys.argv[1]), sys.argv[2]
if port != "alone":
    jax.distributed.initialize("localhost:" + port, 2, rank)
    assert (jax.device_count(), jax.local_device_count(), jax.process_count()) == (4, 2, 2)
import hashlib, time
import numpy as np
from dememo_jax import certify, data, mesh, models, montecarlo, nets
random = np.random.default_rng(0)
examples = data.make(random.random((40, 8, 8, 1), np.float32), np.arange(40) % 4)
net = models.from_linen(nets.mlp(4, (16,)))
apply, params = models.freeze(net, net.init(jax.random.key(0), examples.x[:1]))
groups = {"all": np.ones(40, bool), "class 1": np.asarray(examples.y) == 1}
cloud = certify.cloud(apply, params, examples, jax.random.key(1), sigma=0.3, groups=groups)
def say(name, draws):
    assert draws.scores.shape[1] == 2 and draws.scores.std(axis=0).min() > 0
    print("said", name, draws.start, len(draws.scores), hashlib.sha256(draws.scores.tobytes()).hexdigest(), flush=True)
"""

TOGETHER = """
everything = mesh.mesh()
say("map", certify.draw(cloud, draws=21, over=everything, strategy="map"))
say("vmap", certify.draw(cloud, draws=21, over=everything, strategy="vmap", width=2, every=5))
prior = certify.draw(cloud, draws=10, over=everything)
say("more", certify.draw(cloud, draws=21, over=everything, prior=prior))
"""

CLOCKS = """
ticks = iter(range(10**6))  # a clock that runs a hundred times faster in one process, where a draw looks long
clock = lambda: next(ticks) * [1.0, 0.01][rank]
print("said", certify.calibrate(cloud, over=mesh.mesh(), clock=clock), flush=True)
say("auto", certify.draw(cloud, draws=45, over=mesh.mesh(), strategy="auto", every=20))
"""

PARTS = """
from dememo_jax import certify
a, b = [(0, 8), (8, 21)][rank]
local = mesh.mesh(devices=jax.local_devices())  # the processes need not wait for one another
part = certify.draw(cloud, start=a, draws=b, over=local, strategy="map")
np.save(sys.argv[3] + str(rank) + ".npy", part.scores)
say("part", part)
"""


def started(code, rank, port, *more):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    return subprocess.Popen(
        [sys.executable, "-c", SETUP + code, str(rank), port, *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )  # fmt: skip


def said(code, ports, *more):
    """What each process said, all of them at once; one that hangs is ended, and fails."""
    running = [started(code, rank, port, *more) for rank, port in enumerate(ports)]
    try:
        done = [each.communicate(timeout=60) for each in running]
    finally:
        for each in running:
            each.kill()
            each.wait()
    for each, (_, errors) in zip(running, done):
        assert each.returncode == 0, errors[-2000:]
    return [[line for line in out.splitlines() if line.startswith("said")] for out, _ in done]


def two(code, *more):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    return said(code, [port, port], *more)


@pytest.fixture(scope="module")
def alone():
    """The digest of the draws of one process on one device."""
    (lines,) = said(
        'say("21", certify.draw(cloud, draws=21, strategy="map")); say("45", certify.draw(cloud, draws=45, strategy="map"))',
        ["alone"],
    )
    return [line.split()[-1] for line in lines]


def test_two_processes_give_the_draws_of_one(alone):
    for lines in two(TOGETHER):
        assert [line.split()[1] for line in lines] == ["map", "vmap", "more"]
        assert {tuple(line.split()[2:]) for line in lines} == {("0", "21", alone[0])}


def test_two_processes_whose_clocks_differ_go_the_same_way(alone):
    (first, auto), (second, same) = two(CLOCKS)
    assert "Speed(" in first
    assert first == second  # both believe the first process
    assert auto == same == f"said auto 0 45 {alone[1]}"


def test_processes_that_draw_parts_of_their_own(alone, tmp_path):
    import hashlib

    import numpy as np

    lines = two(PARTS, str(tmp_path / "part"))
    assert [line.split()[2:4] for (line,) in lines] == [["0", "8"], ["8", "13"]]
    joined = np.concatenate([np.load(tmp_path / f"part{rank}.npy") for rank in (0, 1)])
    assert hashlib.sha256(joined.tobytes()).hexdigest() == alone[0]
