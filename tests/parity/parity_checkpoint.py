"""Random checkpoints in MiniMax-M3's released layout, from NumPy alone.

Both sides of the parity tests import this file: the interpreter with torch and transformers, and ours. Names and
shapes are written down here a second time on purpose, apart from `checkpoints_convert`: a name that our table gets
wrong must not be wrong in the test as well. `np.random.RandomState` is a frozen stream (NEP 19), so a seed gives the
same weights with any NumPy, and the stored goldens need no weights beside them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "language_model.model."


def text_shapes(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the text model's tensors, released layout. `text` is a case's flat configuration."""
    width, head_dim, index_dim = text["hidden_size"], text["head_dim"], text["index_head_dim"]
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        MODEL + "embed_tokens.weight": (text["vocab_size"], width),
        MODEL + "norm.weight": (width,),
    }
    if not text["tie_word_embeddings"]:
        shapes["language_model.lm_head.weight"] = (text["vocab_size"], width)
    for layer in range(text["num_hidden_layers"]):
        prefix = f"{MODEL}layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (width,)
        shapes[prefix + "post_attention_layernorm.weight"] = (width,)
        shapes[prefix + "self_attn.q_proj.weight"] = (heads * head_dim, width)
        shapes[prefix + "self_attn.k_proj.weight"] = (kv_heads * head_dim, width)
        shapes[prefix + "self_attn.v_proj.weight"] = (kv_heads * head_dim, width)
        shapes[prefix + "self_attn.o_proj.weight"] = (width, heads * head_dim)
        shapes[prefix + "self_attn.q_norm.weight"] = (head_dim,)
        shapes[prefix + "self_attn.k_norm.weight"] = (head_dim,)
        if text["attention_layer_freq"][layer]:
            shapes[prefix + "self_attn.index_q_proj.weight"] = (text["index_n_heads"] * index_dim, width)
            shapes[prefix + "self_attn.index_k_proj.weight"] = (index_dim, width)
            shapes[prefix + "self_attn.index_q_norm.weight"] = (index_dim,)
            shapes[prefix + "self_attn.index_k_norm.weight"] = (index_dim,)
        if text["moe_layer_freq"][layer]:
            moe, expert = prefix + "block_sparse_moe.", text["intermediate_size"]
            shapes[moe + "gate.weight"] = (text["num_local_experts"], width)
            shapes[moe + "e_score_correction_bias"] = (text["num_local_experts"],)
            for number in range(text["num_local_experts"]):
                shapes[f"{moe}experts.{number}.w1.weight"] = (expert, width)
                shapes[f"{moe}experts.{number}.w2.weight"] = (width, expert)
                shapes[f"{moe}experts.{number}.w3.weight"] = (expert, width)
            mlp, inner = moe + "shared_experts.", text["shared_intermediate_size"]
        else:
            mlp, inner = prefix + "mlp.", text["dense_intermediate_size"]
        shapes[mlp + "gate_proj.weight"] = (inner, width)
        shapes[mlp + "up_proj.weight"] = (inner, width)
        shapes[mlp + "down_proj.weight"] = (width, inner)
    return shapes


def vision_shapes(vision: dict[str, Any], text_width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the vision tower, the projector and the patch merger, released layout."""
    width, inner, projector = vision["hidden_size"], vision["intermediate_size"], vision["projector_hidden_size"]
    patch, merged = vision["patch_size"], text_width * vision["spatial_merge_size"] ** 2
    tower = "vision_tower.vision_model."
    channels = (vision["num_channels"], vision["temporal_patch_size"], patch, patch)
    shapes: dict[str, tuple[int, ...]] = {tower + "embeddings.patch_embedding.weight": (width, *channels)}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[name + ".weight"] = (rows, columns)
        shapes[name + ".bias"] = (rows,)

    def layer_norm(name: str) -> None:
        shapes[name + ".weight"] = (width,)
        shapes[name + ".bias"] = (width,)

    layer_norm(tower + "pre_layrnorm")
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"{tower}encoder.layers.{layer}."
        layer_norm(prefix + "layer_norm1")
        layer_norm(prefix + "layer_norm2")
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{prefix}self_attn.{projection}", width, width)
        linear(prefix + "mlp.fc1", inner, width)
        linear(prefix + "mlp.fc2", width, inner)
    linear("multi_modal_projector.linear_1", projector, width)
    linear("multi_modal_projector.linear_2", text_width, projector)
    linear("patch_merge_mlp.linear_1", projector, merged)
    linear("patch_merge_mlp.linear_2", text_width, projector)
    return shapes


def _scale(name: str, shape: tuple[int, ...], tied: bool) -> float:
    """The standard deviation of a tensor, so that every part of the model shows in the logits."""
    if name.endswith("e_score_correction_bias"):
        return 0.1
    if len(shape) == 1:
        return 0.2
    part = name.split(".")[-2]
    if part == "embed_tokens":
        # A tied head with large embeddings only ever repeats the last token.
        return 0.25 if tied else 1.0
    base = 1 / math.sqrt(math.prod(shape[1:]))
    return base * GAIN.get(part, 1.0)


# Attention averages many values and would drown in the residual stream at gain 1; narrow MLPs likewise.
GAIN = {"v_proj": 2.0, "o_proj": 2.0, "w1": 1.5, "w3": 1.5, "gate_proj": 1.5, "up_proj": 1.5, "lm_head": 3.0}


def draw(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """The weights of a case, float32, in sorted order of the released names.

    A case with bfloat16 files gets values that bfloat16 holds exactly (round to nearest, ties to even), except
    those tensors that its files keep in float32.
    """
    shapes = text_shapes(case["text"]) | vision_shapes(case["vision"], case["text"]["hidden_size"])
    state = np.random.RandomState(case["seed"])
    weights = {}
    for name in sorted(shapes):
        values = state.standard_normal(shapes[name]) * _scale(name, shapes[name], case["text"]["tie_word_embeddings"])
        values = values.astype(np.float32)
        weights[name] = values if file_dtype(name, case) == "float32" else bfloat16_to_float32(to_bfloat16(values))
    return weights


def file_dtype(name: str, case: dict[str, Any]) -> str:
    """The dtype of a tensor in the files of a case: the released files keep the router in float32."""
    router = name.endswith((".block_sparse_moe.gate.weight", ".e_score_correction_bias"))
    return "float32" if router and case["float32_router"] else case["dtype"]


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to the upper half of its bits, rounded to nearest even; uint16, finite values only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The inverse of `to_bfloat16`, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def flat_config(case: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers writes it: per-layer lists of names, `index_*`, `rope_parameters`."""
    text, vision = case["text"], case["vision"]
    same = {key: value for key, value in text.items() if key not in _NOT_FLAT}
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "dtype": case["dtype"],
        "image_token_index": text["vocab_size"] - 2,
        "video_token_index": text["vocab_size"] - 1,
        "projector_hidden_size": vision["projector_hidden_size"],
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": same
        | {
            "model_type": "minimax_m3_vl_text",
            "hidden_act": "silu",
            "layer_types": ["minimax_m3_sparse" if bit else "full_attention" for bit in text["attention_layer_freq"]],
            "mlp_layer_types": ["sparse" if bit else "dense" for bit in text["moe_layer_freq"]],
            "rope_parameters": {
                "rope_theta": text["rope_theta"],
                "rope_type": "default",
                "partial_rotary_factor": text["rotary_dim"] / text["head_dim"],
            },
        },
        "vision_config": {key: value for key, value in vision.items() if key != "projector_hidden_size"}
        | {
            "model_type": "minimax_m3_vl_vision",
            "hidden_act": "gelu",
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
        },
    }


_NOT_FLAT = ("attention_layer_freq", "moe_layer_freq", "rope_theta")


def released_config(case: dict[str, Any]) -> dict[str, Any]:
    """config.json as MiniMax publishes it: `sparse_attention_config`, 0/1 lists, nested patch merging."""
    text, vision = case["text"], case["vision"]
    merge = {
        "image_token_compression_method": "patch_merge",
        "spatial_merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
    }
    nested = ("projector_hidden_size", "spatial_merge_size", "temporal_patch_size")
    same = {key: value for key, value in text.items() if key not in _NOT_RELEASED}
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "text_config": same
        | {
            "architectures": ["MiniMaxM3SparseForCausalLM"],
            "use_gemma_norm": True,
            "attention_output_gate": False,
            "partial_rotary_factor": text["rotary_dim"] / text["head_dim"],
            "hidden_act": "swigluoai",
            "use_qk_norm": True,
            "qk_norm_type": "per_head",
            "n_shared_experts": 1,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "num_mtp_modules": 7,
            "num_nextn_predict_layers": 1,
            "sparse_attention_config": {
                "use_sparse_attention": True,
                "sparse_index_dim": text["index_head_dim"],
                "sparse_num_index_heads": text["index_n_heads"],
                "sparse_topk_blocks": text["index_topk_blocks"],
                "sparse_block_size": text["index_block_size"],
                "sparse_disable_index_value": text["attention_layer_freq"],
                "sparse_score_type": "max",
                "sparse_init_block": 0,
                "sparse_local_block": text["index_local_blocks"],
                "sparse_attention_freq": text["attention_layer_freq"],
            },
        },
        "vision_config": {key: value for key, value in vision.items() if key not in nested}
        | {
            "model_type": "clip_vision_model",
            "projection_dim": text["hidden_size"],
            "position_embedding_type": "rope",
            "rope_mode": "3d",
            "rope_theta": 10000.0,
            "hidden_act": "gelu",
            "img_token_compression_config": merge,
            "vision_segment_max_frames": 4,
        },
        "img_token_compression_config": merge,
        "image_token_index": text["vocab_size"] - 2,
        "video_token_index": text["vocab_size"] - 1,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": vision["projector_hidden_size"],
        "torch_dtype": case["dtype"],
    }


_NOT_RELEASED = (
    "attention_layer_freq",
    "index_n_heads",
    "index_head_dim",
    "index_block_size",
    "index_topk_blocks",
    "index_local_blocks",
    "bos_token_id",
    "eos_token_id",
)


def config_json(case: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a case, in the form that the case asks for."""
    return released_config(case) if case["form"] == "released" else flat_config(case)


def write_checkpoint(folder: Path, case: dict[str, Any]) -> None:
    """Writes config.json and the weights; in two shards with an index when the case asks for it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(case), indent=2))
    weights = draw(case)
    names = sorted(weights)
    if not case["sharded"]:
        _write_file(folder / "model.safetensors", names, weights, case)
        return
    half = len(names) // 2
    parts = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for file, part in parts.items():
        _write_file(folder / file, part, weights, case)
    index = {
        "metadata": {"total_size": sum(weights[name].nbytes for name in names)},
        "weight_map": {name: file for file, part in parts.items() for name in part},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_file(path: Path, names: list[str], weights: dict[str, np.ndarray], case: dict[str, Any]) -> None:
    # By hand (a length, a JSON header, the bytes): the library's own entry for bfloat16 without ml_dtypes or torch has
    # changed its signature between 0.7 and 0.8. Four-byte tensors come first, so that every tensor is aligned.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks, end = [], 0
    for name in sorted(names, key=lambda name: file_dtype(name, case) != "float32"):
        whole = file_dtype(name, case) == "float32"
        chunk = (weights[name] if whole else to_bfloat16(weights[name])).tobytes()
        header[name] = {
            "dtype": "F32" if whole else "BF16",
            "shape": list(weights[name].shape),
            "data_offsets": [end, end + len(chunk)],
        }
        chunks.append(chunk)
        end += len(chunk)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(b"".join([len(encoded).to_bytes(8, "little"), encoded, *chunks]))
