"""Causal attention of a prefill over all cached keys: the dense layers'.

Both paths gather the pages and go through `jax.nn.dot_product_attention`. cuDNN knows no causal mask that starts
inside the keys, so on a GPU a chunk attends twice, to what was cached before it (no mask) and to itself (causal), and
the two are merged by their log-sum-exp. The XLA path materialises its scores, so it walks over tiles of queries.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from m3_jax.cache import LayerCache, Step

# Float32 scores [B, N, tile, L] that one tile of queries may hold.
SCORES_BYTES = 64 * 2**20


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layer: LayerCache,
    step: Step,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v over the keys at or before each query's position; 0 for padded rows.

    `layer` already holds the pass's own `k` and `v`.
    """
    out = _cudnn(q, k, v, layer, step) if cudnn_unsupported(q) is None else _xla(q, layer, step)
    return jnp.where(step.live[:, :, None, None], out, 0)


def cudnn_unsupported(q: Float[Array, "B T N H"]) -> str | None:
    """Why cuDNN's attention cannot take these queries; None where it can."""
    if jax.default_backend() != "gpu":
        return f"the backend is {jax.default_backend()}, not gpu"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the dtype is {q.dtype}, not bfloat16 or float16"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"head_dim={q.shape[-1]} is not a multiple of 8 up to 128"
    return None


def _gather(pages: Float[Array, "P K S H"], step: Step) -> Float[Array, "B L K H"]:
    """Every sequence's cached rows, zero where nothing was written: 0 times a poisoned value would not be 0."""
    num_pages, num_heads, page_size, head_dim = pages.shape
    batch, max_blocks = step.block_table.shape
    rows = pages[jnp.clip(step.block_table, 0, num_pages - 1)]
    rows = rows.swapaxes(2, 3).reshape(batch, max_blocks * page_size, num_heads, head_dim)
    written = jnp.arange(rows.shape[1]) < step.seq_lens[:, None]
    return jnp.where(written[:, :, None, None], rows, 0)


def _xla(q: Float[Array, "B T N H"], layer: LayerCache, step: Step) -> Float[Array, "B T N H"]:
    k, v = _gather(layer.k, step).astype(q.dtype), _gather(layer.v, step).astype(q.dtype)
    batch, num_tokens, num_heads, _ = q.shape
    key_positions = jnp.arange(k.shape[1])

    def attend(tile: tuple[Array, Array]) -> Array:
        queries, positions = tile
        visible = key_positions <= positions[:, :, None]
        return jax.nn.dot_product_attention(queries, k, v, mask=visible[:, None], implementation="xla")

    height = max(1, SCORES_BYTES // (4 * batch * num_heads * k.shape[1]))
    if num_tokens <= height:
        return attend((q, step.positions))
    num_tiles = -(-num_tokens // height)
    padding = num_tiles * height - num_tokens

    def tiles(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(batch, num_tiles, height, *x.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(jax.checkpoint(attend), (tiles(q), tiles(step.positions)))
    return out.swapaxes(0, 1).reshape(batch, num_tiles * height, *q.shape[2:])[:, :num_tokens]


def _cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layer: LayerCache,
    step: Step,
) -> Float[Array, "B T N H"]:
    def attend(keys: Array, values: Array, lengths: Array, is_causal: bool) -> tuple[Array, Array]:
        out, lse = jax.nn.dot_product_attention(
            q,
            keys,
            values,
            is_causal=is_causal,
            query_seq_lengths=step.query_lens,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
            return_residual=True,
        )
        # Rows without a key, and padded rows, hold whatever cuDNN left there.
        some = step.live[:, :, None] & (lengths > 0)[:, None, None]
        return jnp.where(some[..., None], out.astype(jnp.float32), 0), jnp.where(some, lse, -jnp.inf)

    def with_context() -> Array:
        keys, values = _gather(layer.k, step).astype(q.dtype), _gather(layer.v, step).astype(q.dtype)
        before, before_lse = attend(keys, values, step.context_lens, is_causal=False)
        top = jnp.maximum(own_lse, before_lse)
        top = jnp.where(jnp.isfinite(top), top, 0)
        a, b = jnp.exp(own_lse - top)[..., None], jnp.exp(before_lse - top)[..., None]
        return (own * a + before * b) / jnp.maximum(a + b, jnp.finfo(jnp.float32).tiny)

    own, own_lse = attend(k, v, step.query_lens, is_causal=True)
    return jax.lax.cond(jnp.any(step.context_lens > 0), with_context, lambda: own).astype(q.dtype)
