"""The random configurations and prompts of the parity tests; NumPy alone, see `parity_checkpoint`."""

from __future__ import annotations

from typing import Any

import numpy as np

NUM_CASES = 14
NEW_TOKENS = 8

# Lists of 0 and 1 a layer, sparse attention and MoE drawn apart. The first rows hold the pairings that a model which
# ties one list to the other gets wrong.
LAYER_LISTS = (
    ([0, 1, 1], [0, 0, 1]),  # a sparse layer with a dense MLP
    ([1, 0], [0, 1]),  # exact opposites
    ([1, 1, 1], [0, 0, 1]),  # sparse from the first layer on, dense MLPs first
    ([0, 0, 1], [1, 1, 1]),  # dense attention with experts
    ([1, 1], [1, 1]),
    ([0, 1, 0], [1, 0, 1]),
    ([0, 1, 1], [0, 1, 1]),  # the released pattern
)


def cases() -> list[dict[str, Any]]:
    """All cases; the same list in every process."""
    return [_draw_case(number) for number in range(NUM_CASES)]


def _draw_case(number: int) -> dict[str, Any]:
    state = np.random.RandomState(7000 + number)

    def pick(*values: Any) -> Any:
        return values[state.randint(len(values))]

    attention, moe = LAYER_LISTS[number % len(LAYER_LISTS)]
    kv_heads = pick(1, 2, 3, 4)
    groups = [group for group in (2, 3, 4, 5, 6) if group != kv_heads and group * kv_heads <= 15]
    heads = kv_heads * (1 if number == 8 else pick(*groups))
    block = pick(4, 8, 8, 16)
    topk = pick(*(count for count in (2, 3, 4, 5) if count != kv_heads))
    per_token = pick(*(count for count in (1, 2, 3, 4) if count not in (kv_heads, topk)))
    head_dim = pick(12, 20, 24, 32)
    rotary = pick(*(size for size in (4, 6, 8, 10, 12, head_dim) if size <= head_dim))
    index_dim = pick(*(size for size in (12, 18, 22, 28, 36) if size != head_dim and size >= rotary))
    experts = pick(*(count for count in (5, 6, 7, 9, 11) if count > per_token))
    width = pick(40, 48, 56, 72)
    expert_width, shared_width, dense_width = (pick(*sizes) for sizes in ((14, 26, 30), (10, 34, 38), (44, 52, 60)))
    text = {
        "vocab_size": pick(67, 83, 97, 101),
        "hidden_size": width,
        "intermediate_size": expert_width,
        "dense_intermediate_size": dense_width,
        "shared_intermediate_size": shared_width,
        "num_hidden_layers": len(attention),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rotary_dim": rotary,
        "rope_theta": pick(1e4, 5e5, 5e6),
        "rms_norm_eps": pick(1e-6, 1e-5),
        "max_position_embeddings": 1024,
        "num_local_experts": experts,
        "num_experts_per_tok": per_token,
        "routed_scaling_factor": round(state.uniform(0.7, 2.9), 3),
        "swiglu_alpha": round(state.uniform(1.1, 2.3), 3),
        # Half of the cases clamp often, the other half seldom.
        "swiglu_limit": round(state.uniform(0.6, 1.6), 3) if number % 2 else round(state.uniform(4.0, 9.0), 3),
        "index_n_heads": kv_heads,
        "index_head_dim": index_dim,
        "index_block_size": block,
        "index_topk_blocks": topk,
        "index_local_blocks": min(number % 3, topk),
        "attention_layer_freq": attention,
        "moe_layer_freq": moe,
        "tie_word_embeddings": number % 4 == 3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    # Every length is above 3 x topk x block, and together they leave every remainder by the block size.
    shortest = 3 * topk * block + 1 + int(state.randint(block))
    lengths = [shortest + extra for extra in range(block)]
    tokens = state.randint(3, text["vocab_size"] - 2, size=(block, lengths[-1]))
    return {
        "name": f"case{number:02}",
        "seed": 100 + number,
        "form": "released" if number % 3 == 1 else "flat",
        "dtype": "bfloat16" if number % 4 in (1, 2) else "float32",
        "float32_router": number % 8 != 2,
        "sharded": number % 5 == 4,
        "text": text,
        "vision": {
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_channels": 3,
            "image_size": 12,
            "patch_size": 6,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "layer_norm_eps": 1e-5,
            "projector_hidden_size": 18,
        },
        "prompts": [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)],
        # Logits at all positions for these prompts: the longest passes every offset of a block boundary itself.
        "logits_of": [0, block - 1],
        "new_tokens": NEW_TOKENS,
    }
