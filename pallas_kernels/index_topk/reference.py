"""The block indexer in plain JAX: exact, float32 inside, the specification of the other implementations.

It walks over tiles of rows of one sequence, and within a tile over chunks of that sequence's pages. Chunks
that no row of the tile sees, and tiles without rows, cost next to nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import rows
from pallas_kernels.dispatch import Implementation

# Keys of a chunk, and dot products (float32) that a tile holds at a time: 16 MiB, whatever the context.
_CHUNK_KEYS = 4096
_TILE_ELEMENTS = 2**22


def _supported(*_args, **_kwargs) -> str | None:
    return None


@jax.jit
def _score_prefill(index_q, index_k, block_table, cu_seqlens, seq_lens, context_lens):
    height = _tile_height(index_q, index_k, block_table)
    tiles = rows.prefill_tiles(index_q.shape[0], height, cu_seqlens, seq_lens, context_lens)
    return _walk(lambda scores, _: scores, -jnp.inf, tiles, index_q, index_k, block_table)


@jax.jit
def _score_decode(index_q, index_k, block_table, seq_lens):
    tiles = rows.decode_tiles(index_q.shape[0], seq_lens)
    return _walk(lambda scores, _: scores, -jnp.inf, tiles, index_q, index_k, block_table)


@partial(jax.jit, static_argnames=("top_k", "init_blocks", "local_blocks"))
def _topk_prefill(
    index_q,
    index_k,
    block_table,
    cu_seqlens,
    seq_lens,
    context_lens,
    *,
    top_k,
    init_blocks,
    local_blocks,
):
    index_q, index_k = lax.stop_gradient((index_q, index_k))
    choose = partial(
        _choose, page_size=index_k.shape[1], top_k=top_k, init_blocks=init_blocks, local_blocks=local_blocks
    )
    height = _tile_height(index_q, index_k, block_table)
    tiles = rows.prefill_tiles(index_q.shape[0], height, cu_seqlens, seq_lens, context_lens)
    return _walk(choose, -1, tiles, index_q, index_k, block_table)


@partial(jax.jit, static_argnames=("top_k", "init_blocks", "local_blocks"))
def _topk_decode(index_q, index_k, block_table, seq_lens, *, top_k, init_blocks, local_blocks):
    index_q, index_k = lax.stop_gradient((index_q, index_k))
    choose = partial(
        _choose, page_size=index_k.shape[1], top_k=top_k, init_blocks=init_blocks, local_blocks=local_blocks
    )
    tiles = rows.decode_tiles(index_q.shape[0], seq_lens)
    return _walk(choose, -1, tiles, index_q, index_k, block_table)


def _walk(finish, fill, tiles: rows.Tiles, index_q, index_k, block_table):
    """finish(scores [height, K, M], positions [height]) of every tile, put back in the order of the rows."""

    def tile(inputs):
        sequence, row, positions = inputs
        queries = index_q.at[row].get(mode="fill", fill_value=0)
        return finish(_block_scores(queries, index_k, block_table[sequence], positions), positions)

    live = jnp.any(tiles.positions >= 0, axis=1)
    results = rows.map_live(tile, live, (tiles.sequence, tiles.rows, tiles.positions), fill)
    flat = results.reshape(-1, *results.shape[2:])
    return flat.at[tiles.places].get(mode="fill", fill_value=fill)


def _block_scores(
    queries: Float[Array, "R K I"],
    index_k: Float[Array, "P S I"],
    pages: Int32[Array, " M"],
    positions: Int32[Array, " R"],
) -> Float32[Array, "R K M"]:
    """Scores of one sequence's blocks for rows of that sequence; -inf where a block is invisible."""
    num_pages, page_size = pages.shape[0], index_k.shape[1]
    width = _chunk_pages(num_pages, page_size)
    num_chunks = -(-num_pages // width)
    pages = jnp.pad(pages, (0, num_chunks * width - num_pages)).reshape(num_chunks, width)
    first_keys = jnp.arange(num_chunks, dtype=jnp.int32) * (width * page_size)
    last = jnp.max(positions)
    queries = queries.astype(jnp.float32)

    def chunk(inputs):
        chunk_pages, first_key = inputs
        key = first_key + jnp.arange(width * page_size, dtype=jnp.int32).reshape(width, page_size)
        keys = index_k.at[chunk_pages].get(mode="clip").astype(jnp.float32)
        # Before the dot: a NaN in an unused slot must not reach a derivative either.
        keys = jnp.where((key <= last)[..., None], keys, 0)
        dots = jnp.einsum("rki,wsi->rkws", queries, keys, precision=lax.Precision.HIGHEST)
        return jnp.max(jnp.where(key <= positions[:, None, None, None], dots, -jnp.inf), axis=-1)

    scores = rows.map_live(chunk, first_keys <= last, (pages, first_keys), -jnp.inf)
    scores = jnp.moveaxis(scores, 0, 2)
    return scores.reshape(*queries.shape[:2], num_chunks * width)[..., :num_pages]


def _choose(
    scores: Float32[Array, "R K M"],
    positions: Int32[Array, " R"],
    *,
    page_size: int,
    top_k: int,
    init_blocks: int,
    local_blocks: int,
) -> Int32[Array, "R K C"]:
    num_blocks = scores.shape[-1]
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    position = positions[:, None, None]
    visible = block * page_size <= position
    forced = (block < init_blocks) | (block > position // page_size - local_blocks)
    # Finite, so that an overflowed score neither displaces a forced block nor counts as invisible, and
    # with one zero, because a sort by total order would put -0 after +0.
    lowest = jnp.finfo(scores.dtype).min
    scores = jnp.nan_to_num(scores, nan=lowest)
    scores = jnp.where(scores == 0, 0.0, scores)
    scores = jnp.where(visible, jnp.where(forced, jnp.inf, scores), -jnp.inf)
    values, ids = lax.top_k(scores, min(top_k, num_blocks))
    ids = jnp.where(values > -jnp.inf, ids.astype(jnp.int32), -1)
    return jnp.pad(ids, ((0, 0), (0, 0), (0, top_k - ids.shape[-1])), constant_values=-1)


def _chunk_pages(num_pages: int, page_size: int) -> int:
    return min(num_pages, max(1, _CHUNK_KEYS // page_size))


def _tile_height(index_q, index_k, block_table) -> int:
    """Rows of a tile: as many as the memory allows, but not more than an even share of the batch."""
    num_rows, num_heads, _ = index_q.shape
    num_sequences, num_pages = block_table.shape
    page_size = index_k.shape[1]
    width = _chunk_pages(num_pages, page_size) * page_size
    allowed = _TILE_ELEMENTS // (num_heads * max(width, num_pages))
    return max(1, min(allowed, -(-num_rows // num_sequences)))


index_score_prefill = Implementation(_supported, _score_prefill)
index_topk_prefill = Implementation(_supported, _topk_prefill)
index_score_decode = Implementation(_supported, _score_decode)
index_topk_decode = Implementation(_supported, _topk_decode)
