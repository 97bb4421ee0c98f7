"""Released language models from disk, in the layout of the `transformers` library: `config.json` beside safetensors files."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dememo_jax import nets, tree
from dememo_jax.errors import BadInput, require
from dememo_jax.types import Params, Weights

FAMILIES = ("llama", "mistral")
COUNTS = {
    "vocab": "vocab_size", "width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
    "hidden": "intermediate_size",
}  # fmt: skip
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
_OUTER = {"model.embed_tokens": "embed/embedding", "model.norm": "norm/scale", "lm_head": "head/kernel"}
_INNER = {
    "self_attn.q_proj": "query/kernel", "self_attn.k_proj": "key/kernel", "self_attn.v_proj": "value/kernel",
    "self_attn.o_proj": "out/kernel", "mlp.gate_proj": "gate/kernel", "mlp.up_proj": "up/kernel",
    "mlp.down_proj": "down/kernel", "input_layernorm": "attention_norm/scale", "post_attention_layernorm": "gated_norm/scale",
}  # fmt: skip


def decoder(
    folder: str | Path, *, dtype: Any = jnp.float32, place: Callable[[str, np.ndarray], jax.Array] | None = None, **how: Any
) -> tuple[nets.Decoder, Weights]:
    """The network and the weights of a released model: `models.from_linen(net)` makes a Model of the first.

    folder: of a model of the families Llama and Mistral: config.json and model.safetensors, or several of them under an
    index. Nothing is unpickled and nothing is downloaded. dtype: of the parameters in memory. how: what `nets.Decoder` is to
    have otherwise: `dtype` of the arithmetic goes by `net.clone(dtype=...)`, remat=True here.
    place(name, tensor): where a parameter is to lie, such as `partial(mesh.placed, over=..., cuts=...)`; it is called for one
    tensor after the other, on the host and in its dtype already, under the name it has in the network (`block_0/out/kernel`),
    so that neither a device nor the host ever holds more than its part of the model and one tensor. Default: one device.
    Raises BadInput for a folder or file that is not there, another family, what the network does not have (scaled rotary
    positions, biases, another activation), and, naming the first, tensors that are missing, too many, or of other shapes.
    """
    folder, net = Path(folder), decoder_net(folder, **how)
    wanted = _shapes(net)
    found: dict[str, jax.Array] = {}
    for file in _files(folder):
        for name, value in _tensors(file):
            if name.endswith("rotary_emb.inv_freq") or (net.tied and name == "lm_head.weight"):
                continue  # computed here; the same as the embedding
            at = _place(name)
            require(at in wanted, f"{file.name}: tensor {name!r} has no place in this network of {net.depth} layers")
            value = value.T if at.endswith("kernel") else value
            require(
                value.shape == wanted[at],
                f"{file.name}: tensor {name!r} is {_told(value.shape, at)}, config.json asks for {_told(wanted[at], at)}",
            )
            value = np.ascontiguousarray(value, dtype)
            found[at] = jnp.asarray(value) if place is None else place(at, value)
    missing = [at for at in wanted if at not in found]
    require(not missing, f"{folder.name}: no tensor for {missing[:1]} ({len(missing)} of {len(wanted)} are missing)")
    return net, Weights(_nested(found), {})


def decoder_net(folder: str | Path, **how: Any) -> nets.Decoder:
    """The network of a released model by its config.json alone, as `decoder` makes it: what to know before weights are read."""
    return nets.Decoder(**_read(Path(folder)) | how)


def _read(folder: Path) -> dict[str, Any]:
    """Arguments of `nets.Decoder`."""
    path = folder / "config.json"
    require(path.is_file(), f"{path}: no such file; expected the folder of a released model")
    config = _json(path)
    family = config.get("model_type")
    require(family in FAMILIES, f"{path}: model_type is {family!r}, expected one of {', '.join(FAMILIES)}")
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    require(isinstance(rotary, dict), f"{path}: rope_parameters must be an object, got {rotary!r:.60}")
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    require(kind == "default", f"{path}: rotary positions of type {kind!r} are not supported, only 'default'")
    require(not config.get("attention_bias") and not config.get("mlp_bias"), f"{path}: biases are not supported")
    activation = config.get("hidden_act", "silu")
    require(activation == "silu", f"{path}: hidden_act is {activation!r}, expected 'silu'")
    needed = (*COUNTS.values(), "rms_norm_eps")
    missing = [name for name in needed if name not in config]
    require(not missing, f"{path}: no entry {', '.join(missing)}")
    heads = {"num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"]}
    optional = {name: config.get(name) for name in ("head_dim", "max_position_embeddings", "sliding_window")}
    whole = {
        **{name: config[name] for name in COUNTS.values()},
        **heads,
        **{k: v for k, v in optional.items() if v is not None},
    }
    for name, value in whole.items():
        right = type(value) is int and 0 < value < 2**31
        require(right, f"{path}: {name} must be a positive whole number, got {value!r:.60}")
    base = rotary.get("rope_theta", config.get("rope_theta", 10_000.0))
    for name, value in {"rms_norm_eps": config["rms_norm_eps"], "rope_theta": base}.items():
        right = type(value) in (int, float) and 0 < value < float("inf")
        require(right, f"{path}: {name} must be a positive number, got {value!r:.60}")
    return {ours: whole[theirs] for ours, theirs in COUNTS.items()} | {
        "epsilon": float(config["rms_norm_eps"]),
        "key_heads": whole["num_key_value_heads"],
        "head": optional["head_dim"],
        "window": optional["sliding_window"] if family == "mistral" else None,
        "tied": bool(config.get("tie_word_embeddings", False)),
        "longest": optional["max_position_embeddings"],
        "base": float(base),
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8, and thousands of brackets
        raise BadInput(f"{path}: not JSON ({getattr(error, 'msg', error)})") from None
    require(isinstance(found, dict), f"{path}: expected a JSON object, got a {type(found).__name__}")
    return found


def _files(folder: Path) -> list[Path]:
    names = [WHOLE]
    if (folder / INDEX).is_file():
        places = _json(folder / INDEX).get("weight_map", {})
        require(places, f"{folder / INDEX}: no entry weight_map, which says in which file a tensor is")
        named = isinstance(places, dict) and all(isinstance(name, str) for name in places.values())
        require(named, f"{folder / INDEX}: weight_map must name a file for each tensor, got {str(places)[:60]}")
        names = sorted(set(places.values()))
        outside = [name for name in names if not name or Path(name).name != name or "\\" in name]
        require(not outside, f"{folder / INDEX}: weight_map names {outside[:1]}, which is no file of this folder")
    missing = [name for name in names if not (folder / name).is_file()]
    require(not missing, f"{folder}: no file {', '.join(missing)}")
    return [folder / name for name in names]


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors, one read after the other has been taken."""
    import safetensors

    try:
        file = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise BadInput(f"{path}: not a safetensors file, or cut short ({error})") from None
    with file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            try:
                yield name, file.get_tensor(name)
            except (TypeError, ValueError, KeyError, AttributeError, safetensors.SafetensorError) as error:
                kind = file.get_slice(name).get_dtype()
                cure = f"type {kind} cannot be read ({error}); store float32 or bfloat16"
                raise BadInput(f"{path}: tensor {name!r} of {cure}") from None


def _shapes(net: nets.Decoder) -> dict[str, tuple[int, ...]]:
    made = jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 1), jnp.int32))["params"]
    return {name: leaf.shape for name, leaf in zip(tree.names(made), jax.tree.leaves(made))}


def _place(name: str) -> str:
    """Our name of a tensor; what we do not have keeps its own."""
    inner = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if inner and inner[2] in _INNER:
        return f"block_{inner[1]}/{_INNER[inner[2]]}"
    return _OUTER.get(name.removesuffix(".weight"), name)


def _told(shape: tuple[int, ...], at: str) -> list[int]:
    """A shape as it stands in the file."""
    return list(shape[::-1] if at.endswith("kernel") else shape)


def _nested(flat: dict[str, jax.Array]) -> Params:
    found: dict[str, Any] = {}
    for at, value in flat.items():
        *parents, last = at.split("/")
        inner = found
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return found
