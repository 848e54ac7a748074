"""Dense attention to a paged cache in plain JAX: exact, float32 inside, the specification of the other implementation.

It walks over the sequences, and over chunks of each one's pages; what the chunks leave is merged by their maxima.
Chunks that no row sees, and sequences without rows, cost next to nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import rows
from pallas_kernels.dispatch import Implementation

# Elements (float32) of keys, values and logits that a chunk gathers: 16 MiB, or one page's.
_CHUNK_ELEMENTS = 2**22
_LOWEST = float(jnp.finfo(jnp.float32).min)


def _supported(*_args, **_kwargs) -> str | None:
    return None


@partial(jax.jit, static_argnames=("scale",))
def _decode(q, k, v, block_table, seq_lens, *, scale):
    tiles = rows.decode_tiles(q.shape[0], seq_lens)

    def tile(inputs):
        sequence, row, positions = inputs
        queries = q.at[row].get(mode="fill", fill_value=0)
        return _attend(queries, k, v, block_table[sequence], positions, scale)

    live = jnp.any(tiles.positions >= 0, axis=1)
    result = rows.map_live(tile, live, (tiles.sequence, tiles.rows, tiles.positions), 0)
    return result.reshape(q.shape)


def _attend(
    q: Float[Array, "R N H"],
    k: Float[Array, "P K S H"],
    v: Float[Array, "P K S H"],
    pages: Int32[Array, " M"],
    positions: Int32[Array, " R"],
    scale: float,
) -> Float[Array, "R N H"]:
    """Attention of one sequence's rows to its pages; 0 where the position is negative."""
    num_rows, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k.shape
    width = _chunk_pages(q, k, pages.shape[0])
    num_chunks = -(-pages.shape[0] // width)
    pages = jnp.pad(pages, (0, num_chunks * width - pages.shape[0])).reshape(num_chunks, width)
    first_keys = jnp.arange(num_chunks, dtype=jnp.int32) * (width * page_size)
    last = jnp.max(positions)
    queries = q.astype(jnp.float32).reshape(num_rows, num_kv_heads, -1, head_dim)
    highest = lax.Precision.HIGHEST

    def chunk(inputs):
        chunk_pages, first_key = inputs
        key = first_key + jnp.arange(width * page_size, dtype=jnp.int32).reshape(width, page_size)

        # What no row sees becomes 0 before the dot: a NaN in an unused slot must not reach a derivative either.
        def gather(cache):
            chosen = cache.at[chunk_pages].get(mode="clip").astype(jnp.float32)
            return jnp.where((key <= last)[:, None, :, None], chosen, 0)

        seen = (key <= positions[:, None, None])[:, None, None]
        logits = scale * jnp.einsum("rkgh,wksh->rkgws", queries, gather(k), precision=highest)
        logits = jnp.where(seen, logits, _LOWEST)
        largest = lax.stop_gradient(jnp.max(logits, axis=(3, 4)))
        weights = jnp.where(seen, jnp.exp(logits - largest[..., None, None]), 0)
        total = jnp.sum(weights, axis=(3, 4))
        result = jnp.einsum("rkgws,wksh->rkgh", weights, gather(v), precision=highest)
        return jnp.concatenate([result, total[..., None], largest[..., None]], axis=-1)

    chunks: Float32[Array, "chunks R K G H+2"] = rows.map_live(chunk, first_keys <= last, (pages, first_keys), 0)
    result, total, largest = chunks[..., :-2], chunks[..., -2], chunks[..., -1]
    largest = lax.stop_gradient(jnp.where(total > 0, largest, _LOWEST))
    decay = jnp.exp(largest - jnp.max(largest, axis=0))
    total = jnp.sum(total * decay, axis=0)[..., None]
    result = jnp.sum(result * decay[..., None], axis=0) / jnp.where(total > 0, total, 1)
    return result.reshape(num_rows, num_heads, head_dim).astype(q.dtype)


def _chunk_pages(q, k, num_pages: int) -> int:
    num_rows, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k.shape
    elements = page_size * 2 * (num_kv_heads * head_dim + num_rows * num_heads)
    return max(1, min(_CHUNK_ELEMENTS // elements, num_pages))


paged_attention_decode = Implementation(_supported, _decode)
