"""Releases with random weights, written by a few lines that share nothing with the code under test."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from click.testing import CliRunner, Result

from checkpoints_convert.cli import main
from m3_jax import M3Config
from m3_jax.config import VisionConfig

NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8", "float8_e4m3fn": "F8_E4M3"}
LM = "language_model.model."


def config_with_vision(**changes: Any) -> M3Config:
    """The tiny preset with a vision tower whose sizes all differ."""
    vision = VisionConfig(
        hidden_size=26,
        intermediate_size=46,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_channels=3,
        image_size=28,
        patch_size=7,
        temporal_patch_size=2,
        spatial_merge_size=2,
        projector_hidden_size=36,
    )
    return dataclasses.replace(M3Config.tiny(), vision=vision, **changes)


def shapes(config: M3Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the released layout, spelled out from the description of the release."""
    c, s = config, config.sparse_attention
    d, heads, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    out: dict[str, tuple[int, ...]] = {f"{LM}embed_tokens.weight": (c.vocab_size, d), f"{LM}norm.weight": (d,)}
    if not c.tie_word_embeddings:
        out["language_model.lm_head.weight"] = (c.vocab_size, d)
    for n in range(c.num_hidden_layers):
        layer = f"{LM}layers.{n}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{layer}{norm}.weight"] = (d,)
        attn = f"{layer}self_attn."
        out |= {f"{attn}q_proj.weight": (heads, d), f"{attn}k_proj.weight": (kv, d)}
        out |= {f"{attn}v_proj.weight": (kv, d), f"{attn}o_proj.weight": (d, heads)}
        out |= {f"{attn}q_norm.weight": (c.head_dim,), f"{attn}k_norm.weight": (c.head_dim,)}
        if c.sparse_attention_layers[n]:
            out |= {f"{attn}index_q_proj.weight": (s.num_index_heads * s.index_dim, d)}
            out |= {f"{attn}index_k_proj.weight": (s.index_dim, d)}
            out |= {f"{attn}index_q_norm.weight": (s.index_dim,), f"{attn}index_k_norm.weight": (s.index_dim,)}
        if c.moe_layers[n]:
            moe, f = f"{layer}block_sparse_moe.", c.moe_intermediate_size
            out |= {f"{moe}gate.weight": (c.num_experts, d), f"{moe}e_score_correction_bias": (c.num_experts,)}
            for e in range(c.num_experts):
                out |= {f"{moe}experts.{e}.w1.weight": (f, d), f"{moe}experts.{e}.w2.weight": (d, f)}
                out[f"{moe}experts.{e}.w3.weight"] = (f, d)
            out |= _mlp(f"{moe}shared_experts.", c.shared_intermediate_size, d)
        else:
            out |= _mlp(f"{layer}mlp.", c.dense_intermediate_size, d)
    if c.vision is not None:
        out |= _vision(c.vision, d)
    return out


def _mlp(prefix: str, f: int, d: int) -> dict[str, tuple[int, ...]]:
    names = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    return {f"{prefix}{name}.weight": shape for name, shape in names.items()}


def _vision(v: VisionConfig, d: int) -> dict[str, tuple[int, ...]]:
    size, tower = v.hidden_size, "vision_tower.vision_model."
    out: dict[str, tuple[int, ...]] = {
        f"{tower}embeddings.patch_embedding.weight": (
            *(size, v.num_channels, v.temporal_patch_size),
            *(v.patch_size, v.patch_size),
        ),
        f"{tower}pre_layrnorm.weight": (size,),
        f"{tower}pre_layrnorm.bias": (size,),
    }
    linears = {f"self_attn.{p}_proj": (size, size) for p in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (v.intermediate_size, size), "mlp.fc2": (size, v.intermediate_size)}
    for n in range(v.num_hidden_layers):
        for norm in ("layer_norm1", "layer_norm2"):
            out |= {f"{tower}encoder.layers.{n}.{norm}.{kind}": (size,) for kind in ("weight", "bias")}
        for name, shape in linears.items():
            out[f"{tower}encoder.layers.{n}.{name}.weight"] = shape
            out[f"{tower}encoder.layers.{n}.{name}.bias"] = shape[:1]
    hidden = v.projector_hidden_size
    merged = d * v.spatial_merge_size**2
    for name, shape in {
        "multi_modal_projector.linear_1": (hidden, size),
        "multi_modal_projector.linear_2": (d, hidden),
        "patch_merge_mlp.linear_1": (hidden, merged),
        "patch_merge_mlp.linear_2": (d, hidden),
    }.items():
        out |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return out


def random_tensors(config: M3Config, dtype: Any = ml_dtypes.bfloat16, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values; the router and the patch embedding in float32 as in the release."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        kept = re.search(r"moe\.gate\.|correction_bias|patch_embedding", name)
        tensors[name] = rng.standard_normal(shape, np.float32).astype(np.float32 if kept else dtype)
    return tensors


def write_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file."""
    header, position = {}, 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_release(
    folder: Path,
    config: M3Config,
    tensors: dict[str, np.ndarray],
    *,
    shards: int = 1,
    quantization: dict[str, Any] | None = None,
) -> Path:
    """A folder in the released layout, with a tokenizer's files beside the weights."""
    folder.mkdir(parents=True)
    raw = config.to_hf() | {"dtype": "bfloat16"}
    if quantization is not None:
        raw["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "modeling_m3.py").write_text("raise SystemExit('code of a checkpoint was run')")
    if shards == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    weight_map = {}
    for n in range(shards):
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[n::shards]
        write_file(folder / file, {name: tensors[name] for name in chosen})
        weight_map |= dict.fromkeys(chosen, file)
    # As in the release, total_size is wrong.
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_release(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor, read by the safetensors library."""
    out = {}
    for path in folder.glob("*.safetensors"):
        for name, entry in safetensors.deserialize(path.read_bytes()):
            out[name] = entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])
    return out


def as_release(tensors: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The same of arrays."""
    return {name: (NAMES[a.dtype.name], a.shape, a.tobytes()) for name, a in tensors.items()}


def m3_convert(*arguments: object) -> Result:
    """Runs the command in this process, whose own choice of a JAX platform it does not change for good."""
    return CliRunner().invoke(main, list(map(str, arguments)), env={"JAX_PLATFORMS": "cpu"})


def start(*arguments: object) -> subprocess.Popen[str]:
    """Starts the command in a process of its own."""
    command = [sys.executable, "-m", "checkpoints_convert.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def converted(src: Path, dst: Path, *options: str) -> Path:
    """Converts, which must succeed without a word."""
    result = m3_convert("convert", src, dst, *options)
    assert result.exit_code == 0, result.output
    assert result.output == ""
    assert sorted(path.name for path in dst.parent.glob(f"{dst.name}*")) == [dst.name]
    return dst


def refused(result: Result) -> str:
    """The message of a command that must have failed with one line and without a traceback."""
    assert result.exit_code == 1, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr
