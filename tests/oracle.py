"""The model's mathematics in plain NumPy float64: the judge of every implementation.

Written from the description of the model alone, with loops over rows where a loop is the clearest
statement, and without jax, so that it shares neither code nor rounding with what it judges. It reads no
key that a row does not see.

Letters: T rows or tokens, N query heads, K KV (and index) heads, G = N / K, H head dim, I index dim,
P pages, S page size, M pages of a sequence's table, C chosen blocks, D model width, E experts, F expert
width, V vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray


def prefill_rows(num_rows: int, cu_seqlens: Array, seq_lens: Array, context_lens: Array) -> tuple[Array, Array]:
    """Sequence and position of each row of a ragged batch; a dead row has position -1."""
    sequence, position = np.zeros(num_rows, int), np.full(num_rows, -1)
    for b in range(len(seq_lens)):
        for i in range(int(cu_seqlens[b + 1]) - int(cu_seqlens[b])):
            if i < int(seq_lens[b]) - int(context_lens[b]):
                sequence[int(cu_seqlens[b]) + i] = b
                position[int(cu_seqlens[b]) + i] = int(context_lens[b]) + i
    return sequence, position


def decode_rows(num_rows: int, seq_lens: Array) -> tuple[Array, Array]:
    """Sequence and position of each row when a call holds the last T / B tokens of every sequence."""
    sequence, position = np.zeros(num_rows, int), np.full(num_rows, -1)
    num_queries = num_rows // len(seq_lens)
    for row in range(num_rows):
        sequence[row] = row // num_queries
        position[row] = max(-1, int(seq_lens[sequence[row]]) - num_queries + row % num_queries)
    return sequence, position


def index_scores(index_q: Array, index_k: Array, block_table: Array, sequence: Array, position: Array) -> Array:
    """Largest dot product of each row's index query with the keys of each block that it sees: [T, K, M].

    index_q [T,K,I], index_k [P,S,I], block_table [B,M]; -inf where a block is invisible.
    """
    page_size = index_k.shape[1]
    scores = np.full((*index_q.shape[:2], block_table.shape[1]), -np.inf)
    for row in range(len(index_q)):
        query = index_q[row].astype(np.float64)
        for block in range(block_table.shape[1]):
            num_seen = min(page_size, position[row] - block * page_size + 1)
            if num_seen > 0:
                keys = index_k[block_table[sequence[row], block], :num_seen].astype(np.float64)
                scores[row, :, block] = (query @ keys.T).max(axis=-1)
    return scores


def choose_blocks(
    scores: Array, position: Array, *, page_size: int, top_k: int, init_blocks: int, local_blocks: int
) -> Array:
    """Block numbers for each row and head, forced ones first, then by (score descending, number): [T, K, C].

    A NaN score counts as -inf.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    ids = np.full((*scores.shape[:2], top_k), -1, np.int32)
    for row in range(scores.shape[0]):
        if position[row] < 0:
            continue
        own = int(position[row]) // page_size
        forced = {b for b in range(own + 1) if b < init_blocks or own - local_blocks < b <= own}
        for head in range(scores.shape[1]):
            rest = [b for b in range(own + 1) if b not in forced]
            rest.sort(key=lambda b: (-scores[row, head, b], b))
            chosen = (sorted(forced) + rest)[:top_k]
            ids[row, head, : len(chosen)] = chosen
    return ids


def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    block_ids: Array,
    block_table: Array,
    sequence: Array,
    position: Array,
    scale: float | None = None,
) -> Array:
    """Attention of each row to the tokens that it sees of its chosen blocks: [T, N, H].

    q [T,N,H], k and v [P,K,S,H], block_ids [T,K,C] with -1 where unused, block_table [B,M].
    """
    num_rows, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k.shape
    group = num_heads // num_kv_heads
    factor = head_dim**-0.5 if scale is None else scale
    result = np.zeros((num_rows, num_heads, head_dim))
    for row in range(num_rows):
        for kv_head in range(num_kv_heads):
            keys, values = [], []
            for block in block_ids[row, kv_head]:
                num_seen = min(page_size, position[row] - block * page_size + 1)
                if block >= 0 and num_seen > 0:
                    page = block_table[sequence[row], block]
                    keys.append(k[page, kv_head, :num_seen].astype(np.float64))
                    values.append(v[page, kv_head, :num_seen].astype(np.float64))
            if keys:
                heads = slice(kv_head * group, (kv_head + 1) * group)
                logits = factor * (q[row, heads].astype(np.float64) @ np.concatenate(keys).T)
                result[row, heads] = softmax(logits) @ np.concatenate(values)
    return result


def softmax(logits: Array) -> Array:
    """Softmax over the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def causal_attention(q: Array, k: Array, v: Array, scale: float | None = None) -> Array:
    """Dense causal attention of one sequence: q [T,N,H], k and v [T,K,H] -> [T,N,H]."""
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    factor = head_dim**-0.5 if scale is None else scale
    result = np.zeros((num_tokens, num_heads, head_dim))
    for token in range(num_tokens):
        for head in range(num_heads):
            keys = k[: token + 1, head // group].astype(np.float64)
            values = v[: token + 1, head // group].astype(np.float64)
            result[token, head] = softmax(factor * (keys @ q[token, head].astype(np.float64))) @ values
    return result


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * (1 + weight) over the last axis."""
    x = x.astype(np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * (1.0 + weight.astype(np.float64))


def rope(x: Array, position: Array, rotary_dim: int, theta: float) -> Array:
    """Rotate channel c with channel c + rotary_dim/2, for c < rotary_dim/2, by position * theta^(-2c/rotary_dim).

    x [T, heads, dim], position [T]; the channels from rotary_dim on pass unchanged.
    """
    half = rotary_dim // 2
    result = x.astype(np.float64)
    for channel in range(half):
        angle = position.astype(np.float64)[:, None] * theta ** (-2.0 * channel / rotary_dim)
        low, high = x[..., channel].astype(np.float64), x[..., channel + half].astype(np.float64)
        result[..., channel] = low * np.cos(angle) - high * np.sin(angle)
        result[..., channel + half] = high * np.cos(angle) + low * np.sin(angle)
    return result


def swiglu_oai(gate: Array, up: Array, *, alpha: float, limit: float, beta: float) -> Array:
    """(up + beta) * gate * sigmoid(alpha * gate), gate clamped from above and up on both sides by limit."""
    gate = np.minimum(gate, limit)
    up = np.clip(up, -limit, limit)
    return (up + beta) * gate * sigmoid(alpha * gate)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return np.where(x >= 0, 1.0 / (1.0 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1.0 + np.exp(-np.abs(x))))


def mlp(x: Array, gate_up: Array, down: Array, *, alpha: float, limit: float, beta: float) -> Array:
    """SwiGLU-OAI MLP: x [..., D], gate_up [2,F,D] (gate, up), down [D,F] -> [..., D]."""
    gate, up = (x @ matrix.astype(np.float64).T for matrix in gate_up)
    return swiglu_oai(gate, up, alpha=alpha, limit=limit, beta=beta) @ down.astype(np.float64).T


def route(x: Array, gate: Array, bias: Array, *, num_chosen: int, scaling: float) -> tuple[Array, Array]:
    """Experts of each token, best first, and their weights: x [T,D], gate [E,D], bias [E] -> [T,X], [T,X].

    The bias takes part in the choice alone; the weights are the chosen sigmoids with sum 1, times scaling.
    """
    probabilities = sigmoid(x.astype(np.float64) @ gate.astype(np.float64).T)
    experts = np.zeros((len(x), num_chosen), int)
    weights = np.zeros((len(x), num_chosen))
    for token in range(len(x)):
        ranked = sorted(range(len(gate)), key=lambda e: (-(probabilities[token, e] + float(bias[e])), e))
        experts[token] = ranked[:num_chosen]
        chosen = probabilities[token, experts[token]]
        weights[token] = chosen / chosen.sum() * scaling
    return experts, weights


def moe(
    x: Array,
    *,
    gate: Array,
    bias: Array,
    experts_gate_up: Array,
    experts_down: Array,
    shared_gate_up: Array,
    shared_down: Array,
    num_chosen: int,
    scaling: float,
    alpha: float,
    limit: float,
    beta: float,
) -> Array:
    """Weighted sum of the chosen experts plus the shared one.

    x [T,D], gate [E,D], bias [E], experts_gate_up [E,2,F,D], experts_down [E,D,F], shared_gate_up [2,F,D],
    shared_down [D,F] -> [T,D].
    """
    activation = {"alpha": alpha, "limit": limit, "beta": beta}
    experts, weights = route(x, gate, bias, num_chosen=num_chosen, scaling=scaling)
    result = mlp(x, shared_gate_up, shared_down, **activation)
    for token in range(len(x)):
        for expert, weight in zip(experts[token], weights[token], strict=True):
            result[token] += weight * mlp(x[token], experts_gate_up[expert], experts_down[expert], **activation)
    return result


def forward(config: Any, weights: Mapping[str, Array], tokens: Array) -> Array:
    """Logits [T, V] of the whole text model for one sequence of token ids [T].

    config has the attributes of M3Config; weights maps paths such as "layers.0.self_attn.q_proj.weight" to
    arrays, matrices as [out, in].
    """
    embedding = weights["embed_tokens.weight"].astype(np.float64)
    hidden = embedding[np.asarray(tokens)]
    for number in range(config.num_hidden_layers):
        prefix = f"layers.{number}."
        layer = {path[len(prefix) :]: value for path, value in weights.items() if path.startswith(prefix)}
        normed = rms_norm(hidden, layer["input_layernorm.weight"], config.rms_norm_eps)
        hidden = hidden + _attention_layer(config, layer, normed, config.sparse_attention_layers[number])
        normed = rms_norm(hidden, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        hidden = hidden + _mlp_layer(config, layer, normed, config.moe_layers[number])
    hidden = rms_norm(hidden, weights["norm.weight"], config.rms_norm_eps)
    head = embedding if config.tie_word_embeddings else weights["lm_head.weight"].astype(np.float64)
    return hidden @ head.T


def _attention_layer(config: Any, layer: Mapping[str, Array], x: Array, sparse: bool) -> Array:
    position = np.arange(len(x))

    def heads(name: str, norm: str | None) -> Array:
        projected = np.einsum("td,nhd->tnh", x, layer[f"self_attn.{name}.weight"].astype(np.float64))
        if norm is None:
            return projected
        projected = rms_norm(projected, layer[f"self_attn.{norm}.weight"], config.rms_norm_eps)
        return rope(projected, position, config.rotary_dim, config.rope_theta)

    q, k, v = heads("q_proj", "q_norm"), heads("k_proj", "k_norm"), heads("v_proj", None)
    if not sparse:
        attended = causal_attention(q, k, v)
    else:
        choice = config.sparse_attention
        index_q = heads("indexer.q_proj", "indexer.q_norm")
        index_k = np.einsum("td,id->ti", x, layer["self_attn.indexer.k_proj.weight"].astype(np.float64))
        index_k = rms_norm(index_k, layer["self_attn.indexer.k_norm.weight"], config.rms_norm_eps)
        index_k = rope(index_k[:, None], position, config.rotary_dim, config.rope_theta)[:, 0]
        table = np.arange(math.ceil(len(x) / choice.block_size))[None]
        sequence = np.zeros(len(x), int)
        scores = index_scores(index_q, _pages(index_k, choice.block_size), table, sequence, position)
        ids = choose_blocks(
            scores,
            position,
            page_size=choice.block_size,
            top_k=choice.topk_blocks,
            init_blocks=choice.init_blocks,
            local_blocks=choice.local_blocks,
        )
        k_pages = _pages(k, choice.block_size).swapaxes(1, 2)
        v_pages = _pages(v, choice.block_size).swapaxes(1, 2)
        attended = sparse_attention(q, k_pages, v_pages, ids, table, sequence, position)
    return np.einsum("tnh,dnh->td", attended, layer["self_attn.o_proj.weight"].astype(np.float64))


def _mlp_layer(config: Any, layer: Mapping[str, Array], x: Array, sparse: bool) -> Array:
    activation = {"alpha": config.swiglu_alpha, "limit": config.swiglu_limit, "beta": config.swiglu_beta}
    if not sparse:
        return mlp(x, layer["mlp.gate_up_proj.weight"], layer["mlp.down_proj.weight"], **activation)
    return moe(
        x,
        gate=layer["mlp.gate.weight"],
        bias=layer["mlp.gate.e_score_correction_bias"],
        experts_gate_up=layer["mlp.experts.gate_up_proj.weight"],
        experts_down=layer["mlp.experts.down_proj.weight"],
        shared_gate_up=layer["mlp.shared_experts.gate_up_proj.weight"],
        shared_down=layer["mlp.shared_experts.down_proj.weight"],
        num_chosen=config.num_experts_per_tok,
        scaling=config.routed_scaling_factor,
        **activation,
    )


def _pages(tokens: Array, page_size: int) -> Array:
    """[T, ...] as [ceil(T / S), S, ...], NaN in the slots that hold no token."""
    num_pages = math.ceil(len(tokens) / page_size)
    pages = np.full((num_pages * page_size, *tokens.shape[1:]), np.nan)
    pages[: len(tokens)] = tokens
    return pages.reshape(num_pages, page_size, *tokens.shape[1:])
