"""Draws spread over devices are the draws of one device."""

import os
import subprocess
import sys

CODE = """
import jax, numpy as np
from dememo_jax import certify, data, mesh, models, nets
assert jax.device_count() == 8
random = np.random.default_rng(0)
examples = data.make(random.random((40, 8, 8, 1), np.float32), np.arange(40) % 4)
net = models.from_linen(nets.mlp(4, (16,)))
apply, params = models.freeze(net, net.init(jax.random.key(0), examples.x[:1]))
groups = {"all": np.ones(40, bool), "class 1": np.asarray(examples.y) == 1}
cloud = certify.cloud(apply, params, examples, jax.random.key(1), sigma=0.3, groups=groups)
ask = lambda **how: certify.draw(cloud, draws=21, **how).scores
one, eight = ask(), ask(over=mesh.mesh())
assert one.shape == (21, 2) and one.std(axis=0).min() > 0, one
np.testing.assert_array_equal(one, eight)
np.testing.assert_array_equal(one, ask(over=mesh.mesh(), every=5, strategy="vmap", width=2))
three = mesh.mesh(devices=jax.devices()[:3])
np.testing.assert_array_equal(one, ask(over=three, strategy="map"))
np.testing.assert_array_equal(one[4:], ask(over=three, start=4, every=4, strategy="vmap"))
auto = certify.draw(cloud, draws=45, over=mesh.mesh("other name"), every=20).scores  # calibrates
np.testing.assert_array_equal(one, auto[:21])
np.testing.assert_array_equal(auto, certify.draw(cloud, draws=45, strategy="map").scores)
print("equal")
"""


def test_eight_devices_give_the_samples_of_one():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": flags}, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
