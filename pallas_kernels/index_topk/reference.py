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
from pallas_kernels.index_topk import keys

# Keys of a chunk, and dot products (float32) that a tile holds at a time: 16 MiB, whatever the context.
_CHUNK_KEYS = 4096
_TILE_ELEMENTS = 2**22


def _supported(*_args, **_kwargs) -> str | None:
    return None


@jax.jit
def _score_prefill(index_q, index_k, block_table, cu_seqlens, seq_lens, context_lens):
    tiles = _prefill_tiles(index_q, index_k, block_table, cu_seqlens, seq_lens, context_lens)
    return _walk(lambda scores, _: scores, -jnp.inf, tiles, index_q, index_k, block_table, _all_blocks(block_table))


@jax.jit
def _score_decode(index_q, index_k, block_table, seq_lens):
    tiles = rows.decode_tiles(index_q.shape[0], seq_lens)
    return _walk(lambda scores, _: scores, -jnp.inf, tiles, index_q, index_k, block_table, _all_blocks(block_table))


@partial(jax.jit, static_argnames=("top_k", "init_blocks", "local_blocks"))
def _topk_prefill(index_q, index_k, block_table, cu_seqlens, seq_lens, context_lens, **choice):
    tiles = _prefill_tiles(index_q, index_k, block_table, cu_seqlens, seq_lens, context_lens)
    return _choice(tiles, index_q, index_k, block_table, **choice)


@partial(jax.jit, static_argnames=("top_k", "init_blocks", "local_blocks"))
def _topk_decode(index_q, index_k, block_table, seq_lens, **choice):
    return _choice(rows.decode_tiles(index_q.shape[0], seq_lens), index_q, index_k, block_table, **choice)


@partial(jax.jit, static_argnames=("num_shares", "top_k", "init_blocks", "local_blocks"))
def _candidates_prefill(
    index_q, index_k, block_table, cu_seqlens, seq_lens, context_lens, share, *, num_shares, **choice
):
    tiles = _prefill_tiles(index_q, index_k, block_table, cu_seqlens, seq_lens, context_lens)
    return _candidates(tiles, index_q, index_k, block_table, share, num_shares, **choice)


@partial(jax.jit, static_argnames=("num_shares", "top_k", "init_blocks", "local_blocks"))
def _candidates_decode(index_q, index_k, block_table, seq_lens, share, *, num_shares, **choice):
    tiles = rows.decode_tiles(index_q.shape[0], seq_lens)
    return _candidates(tiles, index_q, index_k, block_table, share, num_shares, **choice)


def _choice(tiles: rows.Tiles, index_q, index_k, block_table, *, top_k, init_blocks, local_blocks):
    index_q, index_k = lax.stop_gradient((index_q, index_k))
    blocks = _all_blocks(block_table)

    def choose(scores, positions):
        return _best(scores, positions, blocks, index_k.shape[1], top_k, init_blocks, local_blocks)[1]

    return _walk(choose, -1, tiles, index_q, index_k, block_table, blocks)


def _candidates(
    tiles: rows.Tiles, index_q, index_k, block_table, share, num_shares, *, top_k, init_blocks, local_blocks
):
    index_q, index_k = lax.stop_gradient((index_q, index_k))
    width = -(-block_table.shape[1] // num_shares)
    table = jnp.pad(block_table, ((0, 0), (0, width * num_shares - block_table.shape[1])))
    table = table.reshape(-1, width, num_shares)[:, :, share]
    blocks = jnp.arange(width, dtype=jnp.int32) * num_shares + share
    # What the padding added is not there for anybody.
    blocks = jnp.where(blocks < block_table.shape[1], blocks, jnp.iinfo(jnp.int32).max // index_k.shape[1])

    def choose(scores, positions):
        values, ids = _best(scores, positions, blocks, index_k.shape[1], top_k, init_blocks, local_blocks)
        key = keys.keys_of(values)
        key = jnp.where(values == jnp.inf, keys.FORCED, jnp.where(values == -jnp.inf, keys.INVISIBLE, key))
        return jnp.stack([key, ids], axis=-2)

    found = _walk(choose, -1, tiles, index_q, index_k, table, blocks)
    # Rows of tiles that were passed over.
    return found.at[:, :, 0].set(jnp.where(found[:, :, 1] < 0, keys.INVISIBLE, found[:, :, 0]))


def _prefill_tiles(index_q, index_k, block_table, *lengths) -> rows.Tiles:
    return rows.prefill_tiles(index_q.shape[0], _tile_height(index_q, index_k, block_table), *lengths)


def _all_blocks(block_table) -> Int32[Array, " M"]:
    return jnp.arange(block_table.shape[1], dtype=jnp.int32)


def _walk(finish, fill, tiles: rows.Tiles, index_q, index_k, block_table, blocks):
    """finish(scores [height, K, M], positions [height]) of every tile, put back in the order of the rows.

    blocks: i32[M], ascending numbers of the blocks that the columns of `block_table` hold.
    """

    def tile(inputs):
        sequence, row, positions = inputs
        queries = index_q.at[row].get(mode="fill", fill_value=0)
        return finish(_block_scores(queries, index_k, block_table[sequence], blocks, positions), positions)

    live = jnp.any(tiles.positions >= 0, axis=1)
    results = rows.map_live(tile, live, (tiles.sequence, tiles.rows, tiles.positions), fill)
    flat = results.reshape(-1, *results.shape[2:])
    return flat.at[tiles.places].get(mode="fill", fill_value=fill)


def _block_scores(
    queries: Float[Array, "R K I"],
    index_k: Float[Array, "P S I"],
    pages: Int32[Array, " M"],
    blocks: Int32[Array, " M"],
    positions: Int32[Array, " R"],
) -> Float32[Array, "R K M"]:
    """Scores of one sequence's blocks for rows of that sequence; -inf where a block is invisible."""
    num_pages, page_size = pages.shape[0], index_k.shape[1]
    width = _chunk_pages(num_pages, page_size)
    num_chunks = -(-num_pages // width)
    padding = (0, num_chunks * width - num_pages)
    pages = jnp.pad(pages, padding).reshape(num_chunks, width)
    first_keys = jnp.pad(blocks * page_size, padding, mode="edge").reshape(num_chunks, width)
    last = jnp.max(positions)
    queries = queries.astype(jnp.float32)

    def chunk(inputs):
        chunk_pages, first_keys = inputs
        key = first_keys[:, None] + jnp.arange(page_size, dtype=jnp.int32)
        keys = index_k.at[chunk_pages].get(mode="clip").astype(jnp.float32)
        # Before the dot: a NaN in an unused slot must not reach a derivative either.
        keys = jnp.where((key <= last)[..., None], keys, 0)
        dots = jnp.einsum("rki,wsi->rkws", queries, keys, precision=lax.Precision.HIGHEST)
        return jnp.max(jnp.where(key <= positions[:, None, None, None], dots, -jnp.inf), axis=-1)

    scores = rows.map_live(chunk, first_keys[:, 0] <= last, (pages, first_keys), -jnp.inf)
    scores = jnp.moveaxis(scores, 0, 2)
    return scores.reshape(*queries.shape[:2], num_chunks * width)[..., :num_pages]


def _best(
    scores: Float32[Array, "R K M"],
    positions: Int32[Array, " R"],
    blocks: Int32[Array, " M"],
    page_size: int,
    top_k: int,
    init_blocks: int,
    local_blocks: int,
) -> tuple[Float32[Array, "R K C"], Int32[Array, "R K C"]]:
    """Scores of the best blocks, infinite where forced and -inf where there are none, and their numbers or -1."""
    position = positions[:, None, None]
    visible = blocks * page_size <= position
    forced = (blocks < init_blocks) | (blocks > position // page_size - local_blocks)
    # Finite, so that an overflowed score neither displaces a forced block nor counts as invisible, and
    # with one zero, because a sort by total order would put -0 after +0.
    lowest = jnp.finfo(scores.dtype).min
    scores = jnp.nan_to_num(scores, nan=lowest)
    scores = jnp.where(scores == 0, 0.0, scores)
    scores = jnp.where(visible, jnp.where(forced, jnp.inf, scores), -jnp.inf)
    values, places = lax.top_k(scores, min(top_k, blocks.shape[0]))
    ids = jnp.where(values > -jnp.inf, blocks[places], -1)
    missing = ((0, 0), (0, 0), (0, top_k - ids.shape[-1]))
    return jnp.pad(values, missing, constant_values=-jnp.inf), jnp.pad(ids, missing, constant_values=-1)


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
index_candidates_prefill = Implementation(_supported, _candidates_prefill)
index_candidates_decode = Implementation(_supported, _candidates_decode)
