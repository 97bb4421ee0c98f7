"""A decoder whose weights and batches are cut over eight devices, which are fake, does what it does on one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from dememo_jax import mesh, models, nets
from dememo_jax.errors import BadInput

TEXT = Path(__file__).parent.parent / "docs" / "text.md"
CODE = """
import json, re, sys
from functools import partial
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from safetensors.numpy import save_file
import dememo_jax
from dememo_jax import data, errors, likelihood, loop, losses, mesh, models, nets, sources, train, tree
assert jax.device_count() == 8
random, key, folder = np.random.default_rng(0), jax.random.key(0), Path(sys.argv[1])
scan = jax.jit(loop.scan, static_argnames=("method", "steps", "batch"))

config = {
    "model_type": "llama", "vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
}
layer = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32), "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48), "input_layernorm": (32,),
    "post_attention_layernorm": (32,),
}
shapes = {"model.embed_tokens": (24, 32), "model.norm": (32,), "lm_head": (24, 32)}
shapes |= {f"model.layers.0.{name}": shape for name, shape in layer.items()}
save_file({f"{n}.weight": random.normal(0, 0.3, s).astype(np.float32) for n, s in shapes.items()}, folder / "model.safetensors")
(folder / "config.json").write_text(json.dumps(config))
x = random.integers(1, 24, (24, 5)).astype(np.int32)
x[:4, :2] = 0
rows = data.rows(x, random.integers(0, 2, 24))
forget = np.asarray(rows.y) == 0

# what a device holds of each leaf where `model` has four devices; the others are whole
PART = {
    "query/kernel": (32, 8), "key/kernel": (16 * 2, 4), "value/kernel": (32, 4), "gate/kernel": (32, 12), "up/kernel": (32, 12),
    "head/kernel": (32, 6), "out/kernel": (8, 32), "down/kernel": (12, 32), "embed/embedding": (6, 32),
    "query/kernel/up": (2, 8), "out/kernel/down": (8, 2),
}
def cut(weights, count=None):
    found = 0
    for name, leaf in zip(tree.names(weights), jax.tree.leaves(weights)):
        wanted = next((part for end, part in PART.items() if name.endswith("/" + end)), leaf.shape)
        found += wanted != leaf.shape
        assert {shard.data.shape for shard in leaf.addressable_shards} == {wanted}, (name, leaf.sharding)
        assert len(leaf.addressable_shards) == 8, name
    assert count in (None, found), found

def close(one, other, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), one, other)

over, seen = mesh.grid(2, 4), []
net, whole = sources.decoder(folder)
cuts = nets.decoder_cuts(net, 4)
def place(name, tensor):
    assert isinstance(tensor, np.ndarray)
    seen.append(name)
    return mesh.placed(name, tensor, over, cuts)
net, weights = sources.decoder(folder, place=place)
assert sorted(seen) == sorted(tree.names(whole.params))
cut(weights, 9)
close(mesh.laid(whole, over, cuts), weights, 0)
plain = models.from_linen(net)
many = mesh.sharded(plain, over, cuts)

# logits of both grids, and of a batch that does not divide
logits = jax.jit(plain.apply)(whole, x[:8])
found = jax.jit(many.apply)(weights, x[:8])
assert {shard.data.shape[0] for shard in found.addressable_shards} == {4}
close(found, logits, 1e-5)
other, halves = mesh.grid(4, 2), nets.decoder_cuts(net, 2)
found = jax.jit(mesh.sharded(plain, other, halves).apply)(mesh.laid(whole, other, halves), x[:7])
close(found, logits[:7], 1e-5)
try:
    jax.eval_shape(many.fit, weights, x[:7], key)
    raise SystemExit("not refused")
except errors.BadInput as error:
    assert "a batch of 7 does not divide over the 2 devices" in str(error)

# fresh weights are those of one device, and are born cut; so is the optimizer's state
labels = ((3,), (7,))
one, eight = (likelihood.of_labels(model, labels) for model in (plain, many))
begun = eight.init(key, x[:1])
cut(begun, 9)
close(begun, one.init(key, x[:1]), 1e-6)

# training the whole
def trained(model, weights):
    tx = optax.adam(0.01)
    learner = train.sgd(model, tx, loss=losses.label_nll)
    return scan(learner, key, train.start(tx, weights), rows, steps=3, batch=8)

(a, said), (b, heard) = trained(one, whole), trained(eight, weights)
cut(b.weights, 9)
cut(b.opt, 18)
assert np.abs(np.asarray(a.weights.params["head"]["kernel"]) - whole.params["head"]["kernel"]).max() > 0.01
close(heard, said, 1e-4)
close(b.weights, a.weights, 1e-4)

# forgetting by an adapter, in the page's own code
def page(code):
    names = {"dm": dememo_jax, "jax": jax, "optax": optax, "train": rows, "forget": forget, "labels": labels, "key": key}
    exec(compile(code, "text.md", "exec"), names)
    return names

told = sys.argv[2].replace('"mistral-7b"', repr(sys.argv[1]))
for usual, small in (("bfloat16", "float32"), ("rank=16", "rank=2"), ("batch=16", "batch=8"), ("steps=100", "steps=3"),
                     ("1e-4", "0.05"), ("query|value", "query|out")):
    assert usual in told
    told = told.replace(usual, small)
found = page(told)
assert "all-gather" not in found["forgotten"].lower(found["base"], rows, forget).compile().as_text()  # no weight is sent
cut(found["base"], 9)
cut(found["params"], 2)
whole_part = told.replace("dm.mesh.sharded(dm.models.from_linen(net), over, cuts)", "dm.models.from_linen(net)")
wanted = page(re.sub(r", place=partial.*?cuts=cuts\\)", "", whole_part))
close(found["params"], wanted["params"], 1e-4)
assert all(np.abs(one).max() > 0.04 for one in jax.tree.leaves(wanted["params"]))
print("equal")
"""


@pytest.mark.slow
def test_eight_devices_do_what_one_does(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    _, page = re.findall(r"```python\n(.*?)```", TEXT.read_text(), flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), page], capture_output=True, text=True, check=False,
        env={**os.environ, "XLA_FLAGS": flags},
    )  # fmt: skip
    assert done.stdout.endswith("equal\n"), done.stderr[-2000:]


NET = nets.Decoder(24, 32, 1, 8, 4, 48)
FAKE = AbstractMesh((2, 4), ("data", "model"))
CUTS = nets.decoder_cuts(NET, 4)


def test_cuts_name_every_matrix_of_a_decoder():
    shapes = jax.eval_shape(models.from_linen(NET).init, jax.random.key(0), np.ones((1, 3), np.int32))
    sharded = {
        name: mesh._spec(name, leaf.shape, FAKE, CUTS) for name, leaf in zip(mesh.trees.names(shapes), jax.tree.leaves(shapes))
    }
    whole = {name for name, spec in sharded.items() if "model" not in spec}
    assert whole == {"params/block_0/attention_norm/scale", "params/block_0/gated_norm/scale", "params/norm/scale"}
    assert mesh._spec("block_0/down/kernel/up", (2, 32), FAKE, CUTS) == jax.P()
    assert mesh._spec("block_0/up/kernel/up", (2, 48), FAKE, CUTS) == jax.P(None, "model")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: mesh.grid(3, 5), "do not make a grid of 3 .data. x 5 .model."),
        (lambda: mesh.grid(0, 1), "do not make a grid"),
        (lambda: nets.decoder_cuts(NET, 8), "4 key heads do not divide over 8 devices"),
        (lambda: nets.decoder_cuts(NET, 3), "8 heads do not divide over 3 devices"),
        (lambda: mesh.sharded(models.from_linen(NET), mesh.mesh(), CUTS), r"expected a mesh\.grid with the axes"),
        (lambda: mesh.placed("head/kernel", np.ones((4, 6)), FAKE, CUTS), "head/kernel: dimension 1 has 6, which 4 devices"),
        (lambda: mesh.placed("head/kernel", np.ones(4), FAKE, CUTS), r"head/kernel of shape \[4\] has no dimension 1"),
        (lambda: mesh.laid({"dense": np.ones(4)}, FAKE, CUTS), "no leaf is cut by .*; the leaves are dense"),
    ],
)
def test_refused(call, says):
    with pytest.raises(BadInput, match=says):
        call()
