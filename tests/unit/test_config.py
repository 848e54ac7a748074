"""config.json in both forms, and what is refused."""

import copy
import json
import math
from typing import Any

import pytest

from m3_jax.config import ConfigError, M3Config, SparseAttentionConfig, VisionConfig

# The flat form as transformers writes it, with the keys that describe the model.
FLAT: dict[str, Any] = {
    "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
    "model_type": "minimax_m3_vl",
    "projector_hidden_size": 36,
    "image_token_index": 95,
    "video_token_index": 96,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "minimax_m3_vl_text",
        "vocab_size": 97,
        "hidden_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rotary_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "dense_intermediate_size": 56,
        "intermediate_size": 24,
        "shared_intermediate_size": 28,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.0,
        "hidden_act": "silu",
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "index_n_heads": 2,
        "index_head_dim": 20,
        "index_block_size": 9,
        "index_topk_blocks": 4,
        "index_local_blocks": 1,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "eos_token_id": [7, 8],
        "pad_token_id": None,
    },
    "vision_config": {
        "model_type": "minimax_m3_vl_vision",
        "hidden_act": "gelu",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 28,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 20000.0},
        "spatial_merge_size": 3,
    },
}

# The released, nested form of the same model.
NESTED: dict[str, Any] = {
    **{k: v for k, v in FLAT.items() if k != "tie_word_embeddings"},
    "text_config": {
        **{k: v for k, v in FLAT["text_config"].items() if not k.startswith("index_")},
        "layer_types": None,
        "mlp_layer_types": None,
        "rope_parameters": None,
        "rope_theta": 5_000_000,
        "partial_rotary_factor": 0.5,
        "hidden_act": "swigluoai",
        "moe_layer_freq": [1, 0, 1],
        "qk_norm_type": "per_head",
        "use_gemma_norm": True,
        "attention_output_gate": False,
        "scoring_func": "sigmoid",
        "n_shared_experts": 1,
        "num_mtp_modules": 7,
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_attention_freq": [0, 1, 1],
            "sparse_disable_index_value": [0, 1, 1],
            "sparse_num_index_heads": 2,
            "sparse_index_dim": 20,
            "sparse_block_size": 9,
            "sparse_topk_blocks": 4,
            "sparse_init_block": 0,
            "sparse_local_block": 1,
            "sparse_score_type": "max",
        },
    },
    "vision_config": {
        **{k: v for k, v in FLAT["vision_config"].items() if k not in ("rope_parameters", "spatial_merge_size")},
        "rope_theta": 20000.0,
        "img_token_compression_config": {"spatial_merge_size": 3, "temporal_patch_size": 2},
    },
}

EXPECTED = M3Config(
    vocab_size=97,
    hidden_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rotary_dim=8,
    rope_theta=5e6,
    rms_norm_eps=1e-6,
    max_position_embeddings=512,
    dense_intermediate_size=56,
    moe_intermediate_size=24,
    shared_intermediate_size=28,
    num_experts=5,
    num_experts_per_tok=3,
    routed_scaling_factor=2.0,
    swiglu_alpha=1.702,
    swiglu_limit=7.0,
    swiglu_beta=1.0,
    sparse_attention=SparseAttentionConfig(2, 20, 9, 4, 0, 1),
    sparse_attention_layers=(False, True, True),
    moe_layers=(True, False, True),
    eos_token_ids=(7, 8),
    vision=VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        spatial_merge_size=3,
        rope_theta=20000.0,
        projector_hidden_size=36,
    ),
    image_token_id=95,
    video_token_id=96,
)


@pytest.mark.parametrize("form", [FLAT, NESTED], ids=["flat", "nested"])
def test_both_forms_are_read(form: dict[str, Any]) -> None:
    assert M3Config.from_hf(form) == EXPECTED


@pytest.mark.parametrize("config", [EXPECTED, M3Config.m3(), M3Config.tiny()], ids=["read", "m3", "tiny"])
def test_to_hf_round_trip(config: M3Config) -> None:
    assert M3Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_tiny_has_no_two_equal_sizes() -> None:
    """Sizes that differ tell dimensions apart; index heads equal KV heads by definition."""
    c = M3Config.tiny()
    s = c.sparse_attention
    sizes = [c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rotary_dim, s.index_dim]
    sizes += [c.dense_intermediate_size, c.moe_intermediate_size, c.shared_intermediate_size, c.num_experts]
    sizes += [c.num_experts_per_tok, s.block_size, s.topk_blocks, c.vocab_size]
    assert len(sizes) == len(set(sizes))
    assert c.sparse_attention_layers != c.moe_layers


def test_rotary_factor_survives_truncation() -> None:
    """Readers compute int(head_dim * partial_rotary_factor); the written factor must give the dimension back."""
    for head_dim, rotary_dim in [(98, 90), (110, 58), (128, 64), (186, 170)]:
        hf = {**FLAT, "text_config": {**FLAT["text_config"], "head_dim": head_dim, "rotary_dim": rotary_dim}}
        hf["text_config"] |= {"index_head_dim": 200, "rope_parameters": None, "rope_theta": 1e4}
        written = M3Config.from_hf(hf).to_hf()["text_config"]
        assert int(head_dim * written["partial_rotary_factor"]) == rotary_dim


def put(key: str, value: Any) -> dict[str, Any]:
    form = copy.deepcopy(NESTED)
    target = form
    *path, last = key.split(".")
    for name in path:
        target = target[name]
    target[last] = value
    return form


BAD = {
    "architecture": ("architectures", ["LlamaForCausalLM"], "MiniMaxM3SparseForConditionalGeneration"),
    "model type": ("model_type", "llama", "minimax_m3_vl"),
    "no text config": ("text_config", None, "is required"),
    "text config no object": ("text_config", [1], "must be an object"),
    "activation": ("text_config.hidden_act", "gelu", "'swigluoai', 'silu'"),
    "score type": ("text_config.sparse_attention_config.sparse_score_type", "lse", "'max'"),
    "rope type": ("text_config.rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "'default'"),
    "scaled rope": ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}, "None"),
    "router": ("text_config.scoring_func", "softmax", "'sigmoid'"),
    "norm": ("text_config.use_gemma_norm", False, "True"),
    "qk norm": ("text_config.qk_norm_type", "per_layer", "'per_head'"),
    "output gate": ("text_config.attention_output_gate", True, "False"),
    "shared experts": ("text_config.n_shared_experts", 2, "1"),
    "index value": ("text_config.sparse_attention_config.sparse_disable_index_value", [0, 0, 1], "value branch"),
    "forced tokens": ("text_config.sparse_attention_config.sparse_init_tokens", 64, "blocks"),
    "freq length": ("text_config.sparse_attention_config.sparse_attention_freq", [0, 1], "num_hidden_layers=3"),
    "freq values": ("text_config.sparse_attention_config.sparse_attention_freq", [0, 1, 2], "0 and 1"),
    "moe length": ("text_config.moe_layer_freq", [1, 1, 1, 1], "num_hidden_layers=3"),
    "heads": ("text_config.num_attention_heads", 5, "multiple of num_key_value_heads=2"),
    "index heads": ("text_config.sparse_attention_config.sparse_num_index_heads", 3, "num_key_value_heads=2"),
    "forced above top-k": ("text_config.sparse_attention_config.sparse_init_block", 4, "topk_blocks=4"),
    "rotary above head": ("text_config.rotary_dim", 18, "contradicts rotary_dim=18"),
    "index dim below rotary": ("text_config.sparse_attention_config.sparse_index_dim", 6, "rotary_dim=8"),
    "experts": ("text_config.num_experts_per_tok", 6, "num_experts=5"),
    "missing": ("text_config.swiglu_alpha", None, "is required"),
    "no integer": ("text_config.hidden_size", 40.5, "an integer > 0"),
    "bool": ("text_config.num_hidden_layers", True, "num_hidden_layers=True"),
    "negative": ("text_config.vocab_size", -1, "an integer > 0"),
    "limit": ("text_config.swiglu_limit", 0, "a number > 0"),
    "vision heads": ("vision_config.num_attention_heads", 5, "must divide"),
    "vision activation": ("vision_config.hidden_act", "relu", "'gelu'"),
}


@pytest.mark.parametrize(("key", "value", "message"), BAD.values(), ids=BAD.keys())
def test_refusals_name_key_value_and_requirement(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        M3Config.from_hf(put(key, value))
    text = str(error.value)
    assert message in text
    assert key.rsplit(".", 1)[-1].removeprefix("sparse_").rstrip("s")[:6] in text or "num_" in text


GARBAGE = [None, "16", -3, 0, 1.5, float("nan"), float("inf"), 10**400, True, [], [1, "a"], {}, {"rope_type": 3}]


@pytest.mark.parametrize("form", [FLAT, NESTED], ids=["flat", "nested"])
def test_any_value_of_any_key_is_read_or_refused(form: dict[str, Any]) -> None:
    """No other error than ours, whatever stands where."""

    def paths(value: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        nested = [paths(v, (*prefix, k)) for k, v in value.items() if isinstance(v, dict)]
        return [(*prefix, k) for k in value] + [path for group in nested for path in group]

    refused = 0
    for path in paths(form):
        for value in GARBAGE:
            damaged = copy.deepcopy(form)
            target = damaged
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = value
            try:
                M3Config.from_hf(damaged)
            except ConfigError:
                refused += 1
    assert refused > 300


def test_flat_lists_are_checked() -> None:
    form = copy.deepcopy(FLAT)
    form["text_config"]["layer_types"][0] = "sliding_attention"
    with pytest.raises(ConfigError, match=r"text_config.layer_types=.*'minimax_m3_sparse' and 'full_attention'"):
        M3Config.from_hf(form)


def test_defaults_of_the_released_model() -> None:
    c = M3Config.m3()
    assert math.prod((c.num_attention_heads, c.head_dim)) == 8192
    assert (c.sparse_attention.block_size, c.sparse_attention.topk_blocks) == (128, 16)
    assert sum(c.sparse_attention_layers) == sum(c.moe_layers) == 57
