"""Block-sparse attention in plain JAX: exact, float32 inside, the specification of the other implementations.

Every row gathers the pages that were chosen for it. It walks over tiles of rows, so that no more than a
tile's keys and values are held at a time; a tile without live rows costs next to nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels import rows
from pallas_kernels.dispatch import Implementation

# Elements (float32) of keys, values, logits and weights that a tile gathers: 64 MiB, or one row's.
_TILE_ELEMENTS = 2**24


def _supported(*_args, **_kwargs) -> str | None:
    return None


@partial(jax.jit, static_argnames=("scale",))
def _prefill(q, k, v, block_ids, block_table, cu_seqlens, seq_lens, context_lens, *, scale):
    row = rows.prefill_rows(q.shape[0], cu_seqlens, seq_lens, context_lens)
    return _walk(q, k, v, block_ids, block_table, row, scale)


@partial(jax.jit, static_argnames=("scale",))
def _decode(q, k, v, block_ids, block_table, seq_lens, *, scale):
    return _walk(q, k, v, block_ids, block_table, rows.decode_rows(q.shape[0], seq_lens), scale)


def _walk(q, k, v, block_ids, block_table, row: rows.Rows, scale: float):
    num_rows = q.shape[0]
    height = _tile_height(q, k, block_ids)
    num_tiles = -(-num_rows // height)

    def tiled(array, fill):
        widths = [(0, num_tiles * height - num_rows)] + [(0, 0)] * (array.ndim - 1)
        padded = jnp.pad(array, widths, constant_values=fill)
        return padded.reshape(num_tiles, height, *array.shape[1:])

    def tile(inputs):
        queries, ids, sequence, positions = inputs
        pages = block_table.at[sequence[:, None, None], ids].get(mode="clip")
        return _attend(queries, k, v, ids, pages, positions, scale)

    positions = tiled(row.position, -1)
    inputs = (tiled(q, 0), tiled(block_ids, -1), tiled(row.sequence, 0), positions)
    result = rows.map_live(tile, jnp.any(positions >= 0, axis=1), inputs, 0)
    return result.reshape(-1, *q.shape[1:])[:num_rows]


def _attend(
    q: Float[Array, "R N H"],
    k: Float[Array, "P K S H"],
    v: Float[Array, "P K S H"],
    block_ids: Int32[Array, "R K C"],
    pages: Int32[Array, "R K C"],
    positions: Int32[Array, " R"],
    scale: float,
) -> Float[Array, "R N H"]:
    num_rows, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k.shape
    key = block_ids[..., None] * page_size + jnp.arange(page_size, dtype=jnp.int32)
    seen = (block_ids >= 0)[..., None] & (key <= positions[:, None, None, None])
    seen = seen.reshape(num_rows, num_kv_heads, -1)

    # What is not seen becomes 0 before the dot: a NaN in an unused slot must not reach a derivative either.
    def gather(cache):
        heads = jnp.arange(num_kv_heads, dtype=jnp.int32)[:, None]
        chosen = cache.at[pages, heads].get(mode="clip").astype(jnp.float32)
        return jnp.where(seen[..., None], chosen.reshape(*seen.shape, head_dim), 0)

    queries = q.astype(jnp.float32).reshape(num_rows, num_kv_heads, -1, head_dim)
    highest = lax.Precision.HIGHEST
    logits = scale * jnp.einsum("rkgh,rkxh->rkgx", queries, gather(k), precision=highest)
    logits = jnp.where(seen[:, :, None], logits, jnp.finfo(logits.dtype).min)
    largest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(seen[:, :, None], jnp.exp(logits - largest), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    result = jnp.einsum("rkgx,rkxh->rkgh", weights, gather(v), precision=highest)
    result = result / jnp.where(total > 0, total, 1)
    return result.reshape(num_rows, num_heads, head_dim).astype(q.dtype)


def _tile_height(q, k, block_ids) -> int:
    num_rows, num_heads, head_dim = q.shape
    num_keys = block_ids.shape[2] * k.shape[2]
    elements = 2 * num_keys * (k.shape[1] * head_dim + num_heads)
    return max(1, min(_TILE_ELEMENTS // elements, num_rows))


sparse_attention_prefill = Implementation(_supported, _prefill)
sparse_attention_decode = Implementation(_supported, _decode)
