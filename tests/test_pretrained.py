"""Released decoders: logits against PyTorch's `transformers` where it is installed, files by hand, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dememo_jax import models, sources
from dememo_jax.errors import BadInput

CONFIG = {
    "model_type": "mistral", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "tie_word_embeddings": False,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 40, (3, 11)).astype(np.int32)


def tensors():
    random = np.random.default_rng(1)
    layer = {
        "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16), "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24), "input_layernorm": (16,),
        "post_attention_layernorm": (16,),
    }  # fmt: skip
    shapes = {"model.embed_tokens": (40, 16), "model.norm": (16,), "lm_head": (40, 16)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    return {f"{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def folder(path, config=CONFIG, parts=None):
    """A released model's folder; several parts stand under an index."""
    parts = [tensors()] if parts is None else parts
    names = ["model.safetensors"] if len(parts) == 1 else [f"model-{i}.safetensors" for i in range(len(parts))]
    for name, part in zip(names, parts):
        save_file(part, path / name)
    if len(parts) > 1:
        index = {"weight_map": {tensor: name for name, part in zip(names, parts) for tensor in part}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    "how",
    [
        {"kind": "Mistral", "sliding_window": 4},
        {"kind": "Llama", "tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-5},
        {"kind": "Mistral", "sliding_window": None, "head_dim": 6, "rope_theta": 500.0},
    ],
)
def test_logits_are_those_of_transformers(tmp_path, how):
    torch = pytest.importorskip("torch", reason="needs the extra: pip install '.[reference]'")
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install '.[reference]'")
    how = dict(how)
    kind = how.pop("kind")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{k: v for k, v in CONFIG.items() if k != "model_type"} | how)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(std=0.4)
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")  # several files
    net, weights = sources.decoder(tmp_path)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    found = models.from_linen(net).apply(weights, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_every_tensor_comes_to_its_place(tmp_path, count):
    given = tensors()
    names = list(given)
    path = folder(tmp_path, parts=[{name: given[name] for name in names[i::count]} for i in range(count)])
    net, weights = sources.decoder(path)
    np.testing.assert_array_equal(weights.params["embed"]["embedding"], given["model.embed_tokens.weight"])
    np.testing.assert_array_equal(weights.params["head"]["kernel"], given["lm_head.weight"].T)
    down = weights.params["block_1"]["down"]["kernel"]
    np.testing.assert_array_equal(down, given["model.layers.1.mlp.down_proj.weight"].T)
    made = models.from_linen(net).init(jax.random.key(0), jnp.asarray(TOKENS))
    assert jax.tree.structure(made.params) == jax.tree.structure(weights.params)
    assert models.from_linen(net).apply(weights, TOKENS).shape == (3, 11, 40)


def test_parameters_in_bfloat16(tmp_path):
    net, weights = sources.decoder(folder(tmp_path), dtype=jnp.bfloat16, remat=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights.params)} == {jnp.dtype(jnp.bfloat16)}
    assert net.remat


def without(name):
    return {key: value for key, value in tensors().items() if key != name}


@pytest.mark.parametrize(
    ("config", "parts", "says"),
    [
        ({"model_type": "gpt2"}, None, "model_type is 'gpt2', expected one of llama, mistral"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, None, "type 'linear' are not supported"),
        ({"attention_bias": True}, None, "biases are not supported"),
        ({"hidden_act": "gelu"}, None, "hidden_act is 'gelu'"),
        ({"hidden_size": None}, None, "no entry hidden_size"),
        ({"intermediate_size": 32}, None, r"mlp.*is \[.*24.*\], config.json asks for \[.*32.*\]"),
        ({"num_hidden_layers": 1}, None, r"'model.layers.1.*no place in this network of 1 layers"),
        ({}, [without("model.norm.weight")], r"no tensor for \['norm/scale'\] \(1 of 21 are missing\)"),
        ({}, [tensors() | {"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)}], "q_proj.bias.*no place"),
    ],
)
def test_refused(tmp_path, config, parts, says):
    config = {name: value for name, value in (CONFIG | config).items() if value is not None}
    with pytest.raises(BadInput, match=says):
        sources.decoder(folder(tmp_path, config, parts))


def test_refused_files(tmp_path):
    with pytest.raises(BadInput, match=r"config\.json: no such file"):
        sources.decoder(tmp_path)
    path = folder(tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(BadInput, match="not a safetensors file, or cut short"):
        sources.decoder(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"no file model\.safetensors"):
        sources.decoder(path)
    for index, says in (("{", r"index\.json: not JSON"), ("[]", "got a list"), ("{}", r"index\.json: no entry weight_map")):
        (path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(BadInput, match=says):
            sources.decoder(path)
    (path / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"config\.json: not JSON"):
        sources.decoder(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("hidden_size", "num_hidden_layers") for value in ("abc", -8, 8.5, True)),
        ("num_key_value_heads", [2]), ("head_dim", "4"), ("sliding_window", -1), ("max_position_embeddings", 2**40),
        ("rms_norm_eps", "small"), ("rope_theta", 0), ("rope_parameters", "default"), ("rope_scaling", [1]),
    ],
)  # fmt: skip
def test_types_in_a_config_are_refused(tmp_path, name, value):
    with pytest.raises(BadInput, match=name.replace("rope_scaling", "rope_parameters")):
        sources.decoder_net(folder(tmp_path, CONFIG | {name: value}))


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 5000, b'{"a":' * 5000], ids=["not UTF-8", "deep", "deep object"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_files_of_json_are_refused(tmp_path, name, content):
    (folder(tmp_path) / name).write_bytes(content)
    with pytest.raises(BadInput, match="not JSON"):
        sources.decoder(tmp_path)


@pytest.mark.parametrize(
    "places", [["model.safetensors"], {"a": 1}, {"a": "../model.safetensors"}, {"a": "/model.safetensors"}, "x", {"a": ""}]
)
def test_an_index_names_files_of_its_own_folder(tmp_path, places):
    (folder(tmp_path) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(BadInput, match="weight_map"):
        sources.decoder(tmp_path)


def test_a_tensor_of_eight_bits_is_refused(tmp_path):
    path = folder(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    name = next(name for name, tensor in header.items() if tensor.get("shape") == [16, 16])
    header[name] |= {"dtype": "F8_E4M3", "shape": [64, 16]}  # as many bytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
    with pytest.raises(BadInput, match="F8_E4M3"):
        sources.decoder(tmp_path)


def test_rows_longer_than_the_released_model_are_refused(tmp_path):
    net, weights = sources.decoder(folder(tmp_path, CONFIG | {"max_position_embeddings": 10}))
    model = models.from_linen(net)
    with pytest.raises(BadInput, match="11 tokens are longer than the 10"):
        model.apply(weights, TOKENS)
