"""Scores of blocks as a Triton kernel: a tile of (token, head) rows against the pages of its sequence, one by one."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax_triton  # pyright: ignore[reportMissingImports]
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import triton_support
from pallas_kernels.index_topk.shares import Shares

# Rows of a tile of a prefill call, (token, head) pairs.
_ROWS = 128
# Keys of one matrix product: a page, or a part of a large one.
_KEYS = 128


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut.

    splits: programs that share the blocks of a tile. least: fewest blocks worth a program.
    """

    splits: int
    least: int = 1
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def for_decode(cls, num_sequences: int, table_width: int) -> "TuningConfig":
        """Programs for several waves, since few of them fill the memory's pipeline, and lengths differ."""
        splits = min(256, max(1, 4096 // num_sequences), table_width)
        return cls(splits)

    @classmethod
    def for_prefill(cls, num_tiles: int, table_width: int) -> "TuningConfig":
        """Enough programs that the last ones, which see most, do not run alone."""
        least = 16
        splits = min(max(1, 4096 // num_tiles), -(-table_width // least))
        return cls(splits, least, num_warps=8)


@triton.jit
def count_own(blocks, share, SHARES: tl.constexpr):
    """How many of the first `blocks` blocks are the share's (see `shares.Shares`)."""
    return (tl.maximum(blocks - share, 0) + SHARES - 1) // SHARES


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _score_blocks(
    q,
    index_k_ptr,
    pages_ptr,
    scores_ptrs,
    position,
    valid,
    first,
    end,
    share,
    SHARES: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    key = tl.arange(0, KEYS)
    channel = tl.arange(0, DIM)
    for own in range(first, end):
        block = own * SHARES + share
        page = tl.load(pages_ptr + block).to(tl.int64)
        score = tl.full([q.shape[0]], float("-inf"), tl.float32)
        for piece in tl.static_range(PAGE // KEYS):
            slot = piece * KEYS + key
            keys = tl.load(index_k_ptr + page * (PAGE * DIM) + slot[None, :] * DIM + channel[:, None])
            dots = tl.dot(q, keys)
            if MASKED:
                dots = tl.where(block * PAGE + slot[None, :] <= position[:, None], dots, float("-inf"))
            score = _larger(score, tl.reduce(dots, 1, _larger))
        tl.store(scores_ptrs + own, score, mask=valid)


@triton.jit
def _score(
    index_q_ptr,  # [T, HEADS, DIM]
    index_k_ptr,  # [P, PAGE, DIM]
    table_ptr,  # [B, table_width]
    sequences_ptr,  # [tiles] of a prefill call
    tokens_ptr,  # [tiles, HEIGHT] of a prefill call
    positions_ptr,  # [tiles, HEIGHT] of a prefill call, sequences' lengths [B] of a decode call
    share_ptr,  # [1], read if there are several shares
    scores_ptr,  # [tiles, HEIGHT, HEADS, width]
    table_width,
    width,
    SHARES: tl.constexpr,
    QUERIES: tl.constexpr,  # tokens a sequence of a decode call, of which a tile is a sequence; else 0
    HEIGHT: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.arange(0, ROWS)
    place = row // HEADS
    inside = place < HEIGHT
    if QUERIES:
        sequence = tile
        token = tile * HEIGHT + place
        position = tl.load(positions_ptr + tile) - QUERIES + place
    else:
        sequence = tl.load(sequences_ptr + tile)
        token = tl.load(tokens_ptr + tile * HEIGHT + place, mask=inside, other=0)
        position = tl.load(positions_ptr + tile * HEIGHT + place, mask=inside, other=-1)
    live = inside & (position >= 0)

    last = tl.max(tl.where(live, position, -1), 0)
    share = tl.load(share_ptr) if SHARES > 1 else 0
    num_blocks = count_own((last + PAGE) // PAGE, share, SHARES)
    part = tl.maximum((num_blocks + SPLITS - 1) // SPLITS, LEAST)
    first = tl.program_id(1) * part
    end = tl.minimum(first + part, num_blocks)
    if first >= end:
        return
    # Of the blocks before this one every live row sees all keys.
    whole = count_own((tl.min(tl.where(live, position, last), 0) + 1) // PAGE, share, SHARES)
    middle = tl.maximum(tl.minimum(whole, end), first)

    channel = tl.arange(0, DIM)
    q_row = token.to(tl.int64) * HEADS + row % HEADS
    q = tl.load(index_q_ptr + q_row[:, None] * DIM + channel[None, :], mask=live[:, None], other=0.0)
    scores_ptrs = scores_ptr + (tile.to(tl.int64) * (HEIGHT * HEADS) + row) * width
    pages_ptr = table_ptr + sequence.to(tl.int64) * table_width
    _score_blocks(
        q,
        index_k_ptr,
        pages_ptr,
        scores_ptrs,
        position,
        live,
        first,
        middle,
        share,
        SHARES,
        DIM,
        PAGE,
        KEYS,
        MASKED=False,
    )
    _score_blocks(
        q,
        index_k_ptr,
        pages_ptr,
        scores_ptrs,
        position,
        live,
        middle,
        end,
        share,
        SHARES,
        DIM,
        PAGE,
        KEYS,
        MASKED=True,
    )


def tile_height(num_heads: int) -> int:
    """Tokens of a tile of a prefill call."""
    return max(1, _ROWS // num_heads)


def score_decode(
    index_q: Float[Array, "T K I"],
    index_k: Float[Array, "P S I"],
    block_table: Int32[Array, "B M"],
    seq_lens: Int32[Array, " B"],
    share: Int32[Array, " 1"],
    *,
    shares: Shares,
    config: TuningConfig,
) -> Float32[Array, "T K width"]:
    """Scores of the share's blocks; those that a row does not see may be anything."""
    num_sequences = block_table.shape[0]
    num_queries = index_q.shape[0] // num_sequences
    scores = _call(
        index_q,
        index_k,
        block_table,
        (seq_lens, seq_lens, seq_lens),
        share,
        shares=shares,
        num_tiles=num_sequences,
        height=num_queries,
        num_queries=num_queries,
        config=config,
    )
    return scores.reshape(*index_q.shape[:2], -1)


def score_prefill(
    index_q: Float[Array, "T K I"],
    index_k: Float[Array, "P S I"],
    block_table: Int32[Array, "B M"],
    sequence: Int32[Array, " tiles"],
    rows: Int32[Array, "tiles height"],
    positions: Int32[Array, "tiles height"],
    share: Int32[Array, " 1"],
    *,
    shares: Shares,
    config: TuningConfig,
) -> Float32[Array, "tiles height K width"]:
    """Scores of the share's blocks for the rows of tiles (see `pallas_kernels.rows.Tiles`), of `tile_height` rows.

    Those of blocks that a row does not see, and of places without a row, may be anything.
    """
    num_tiles, height = rows.shape
    return _call(
        index_q,
        index_k,
        block_table,
        (sequence, rows, positions),
        share,
        shares=shares,
        num_tiles=num_tiles,
        height=height,
        num_queries=0,
        config=config,
    )


def _call(index_q, index_k, block_table, tiles, share, *, shares, num_tiles, height, num_queries, config) -> Array:
    num_heads, dim = index_q.shape[1:]
    return jax_triton.triton_call(
        index_q,
        index_k,
        block_table,
        *tiles,
        share,
        kernel=_score,
        out_type=jax.ShapeDtypeStruct((num_tiles, height, num_heads, shares.width), jnp.float32),
        table_width=shares.table_width,
        width=shares.width,
        grid=(num_tiles, config.splits),
        name="index_score",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        SHARES=shares.number,
        QUERIES=num_queries,
        HEIGHT=height,
        HEADS=num_heads,
        ROWS=max(triton_support.LEAST_ROWS, triton_support.power_of_two(height * num_heads)),
        DIM=dim,
        PAGE=index_k.shape[1],
        KEYS=min(index_k.shape[1], _KEYS),
        SPLITS=config.splits,
        LEAST=config.least,
    )
