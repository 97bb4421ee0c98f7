"""Draws spread over two processes are the draws of one, whatever their clocks say."""

import hashlib
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

JOIN = """
import sys, jax
rank = int(sys.argv[1])
jax.distributed.initialize("localhost:" + sys.argv[2], 2, rank)
assert (jax.device_count(), jax.local_device_count(), jax.process_count()) == (4, 2, 2)
"""

CLOUD = """
import hashlib
import jax, numpy as np
from dememo_jax import certify, data, mesh, models, nets
random = np.random.default_rng(0)
examples = data.make(random.random((40, 8, 8, 1), np.float32), np.arange(40) % 4)
net = models.from_linen(nets.mlp(4, (16,)))
apply, params = models.freeze(net, net.init(jax.random.key(0), examples.x[:1]))
groups = {"all": np.ones(40, bool), "class 1": np.asarray(examples.y) == 1}
cloud = certify.cloud(apply, params, examples, jax.random.key(1), sigma=0.3, groups=groups)
def say(name, draws):
    print("said", name, draws.start, len(draws.scores), hashlib.sha256(draws.scores.tobytes()).hexdigest(), flush=True)
"""

TOGETHER = """
everything = mesh.mesh()
say("map", certify.draw(cloud, draws=21, over=everything, strategy="map"))
say("vmap", certify.draw(cloud, draws=21, over=everything, strategy="vmap", width=2, every=5))
prior = certify.draw(cloud, draws=10, over=everything)
say("more", certify.draw(cloud, draws=21, over=everything, prior=prior))
ticks = iter(range(10**6))  # a clock that runs a thousand times faster in one process, where no draw looks long
clock = lambda: next(ticks) * [1.0, 0.001][rank]
print("said", certify.calibrate(cloud, over=everything, clock=clock), flush=True)
say("auto", certify.draw(cloud, draws=45, over=everything, strategy="auto", every=20))
"""

PARTS = """
a, b = [(0, 4), (4, 45)][rank]  # the first is too short for a calibration
local = mesh.mesh(devices=jax.local_devices())  # the processes need not wait for one another
part = certify.draw(cloud, start=a, draws=b, over=local)
np.save(sys.argv[3] + str(rank) + ".npy", part.scores)
say("part", part)
"""


def two(code, *more):
    """What each of two processes said; those that hang are ended, and fail."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN + CLOUD + code, str(rank), port, *more],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        done = [each.communicate(timeout=120) for each in running]
    finally:
        for each in running:
            each.kill()
            each.wait()
    for each, (_, errors) in zip(running, done):
        assert each.returncode == 0, errors[-2000:]
    return [[line for line in out.splitlines() if line.startswith("said")] for out, _ in done]


@pytest.fixture(scope="module")
def alone():
    """Digests of the first 21 and all 45 draws of one process on one device."""
    names = {}
    exec(CLOUD, names)
    scores = names["certify"].draw(names["cloud"], draws=45, strategy="map").scores
    assert scores.shape == (45, 2)
    assert scores.std(axis=0).min() > 0
    return [hashlib.sha256(part.tobytes()).hexdigest() for part in (scores[:21], scores)]


@pytest.mark.slow
def test_two_processes_give_the_draws_of_one(alone):
    first, second = two(TOGETHER)
    assert first == second
    assert first[3].startswith("said Speed(")  # their clocks differ, and both believe the first
    assert [line.split() for line in (*first[:3], first[4])] == [
        ["said", "map", "0", "21", alone[0]],
        ["said", "vmap", "0", "21", alone[0]],
        ["said", "more", "0", "21", alone[0]],
        ["said", "auto", "0", "45", alone[1]],
    ]


@pytest.mark.slow
def test_processes_that_draw_parts_of_their_own(alone, tmp_path):
    lines = two(PARTS, str(tmp_path / "part"))
    assert [line.split()[2:4] for (line,) in lines] == [["0", "4"], ["4", "41"]]
    joined = np.concatenate([np.load(tmp_path / f"part{rank}.npy") for rank in (0, 1)])
    assert hashlib.sha256(joined.tobytes()).hexdigest() == alone[1]
