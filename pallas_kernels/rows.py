"""Flat token rows: whose they are, where they stand, and how to walk over them in tiles.

A row is one query token. It belongs to one sequence, stands at one position of it, and sees the keys at
positions 0 to its own. A row that belongs to no sequence, or that is padding, is dead: position -1, so
that it sees nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32, PyTree, Shaped


class Rows(NamedTuple):
    """Sequence and position of every row; a dead row has position -1 and some sequence in range."""

    sequence: Int32[Array, " T"]
    position: Int32[Array, " T"]


class Tiles(NamedTuple):
    """Rows in tiles of equal height, each of one sequence.

    sequence: i32[tiles]; rows: i32[tiles, height], row number, or T in a place without a live row;
    positions: i32[tiles, height], -1 in such a place; places: i32[T], the flat place in [tiles * height] that
    holds a row's result; a dead row's is one without a row, or tiles * height.
    """

    sequence: Int32[Array, " tiles"]
    rows: Int32[Array, "tiles height"]
    positions: Int32[Array, "tiles height"]
    places: Int32[Array, " T"]


def prefill_rows(
    num_rows: int,
    cu_seqlens: Int32[Array, " B+1"],
    seq_lens: Int32[Array, " B"],
    context_lens: Int32[Array, " B"],
) -> Rows:
    """Rows of a prefill call.

    Row r belongs to sequence b when cu_seqlens[b] <= r < cu_seqlens[b+1]. With i = r - cu_seqlens[b] it is
    live when i < seq_lens[b] - context_lens[b], and its position is context_lens[b] + i.
    """
    row = jnp.arange(num_rows, dtype=jnp.int32)
    last = seq_lens.shape[0] - 1
    sequence = jnp.clip(count_up_to(cu_seqlens, row) - 1, 0, last)
    offset = row - cu_seqlens[sequence]
    live = (offset >= 0) & (offset < live_counts(cu_seqlens, seq_lens, context_lens)[sequence])
    return Rows(sequence, jnp.where(live, context_lens[sequence] + offset, -1))


def decode_rows(num_rows: int, seq_lens: Int32[Array, " B"]) -> Rows:
    """Rows of a decode call: Q = T // B a sequence, row b * Q + i at position seq_lens[b] - Q + i."""
    num_queries = num_rows // seq_lens.shape[0]
    row = jnp.arange(num_rows, dtype=jnp.int32)
    sequence = row // num_queries
    position = seq_lens[sequence] - num_queries + row % num_queries
    return Rows(sequence, jnp.maximum(position, -1))


def prefill_tiles(
    num_rows: int,
    height: int,
    cu_seqlens: Int32[Array, " B+1"],
    seq_lens: Int32[Array, " B"],
    context_lens: Int32[Array, " B"],
) -> Tiles:
    """Cut the live rows of a prefill call into tiles of one sequence each, `height` rows at most.

    The number of tiles is static, T // height + B (a sequence wastes less than one tile), but at most T;
    the tiles beyond those needed hold no rows.
    """
    num_sequences = seq_lens.shape[0]
    num_tiles = min(num_rows // height + num_sequences, num_rows)
    rows = prefill_rows(num_rows, cu_seqlens, seq_lens, context_lens)
    counts = live_counts(cu_seqlens, seq_lens, context_lens)
    tiles_of = (counts + height - 1) // height
    ends = jnp.cumsum(tiles_of, dtype=jnp.int32)
    starts = ends - tiles_of

    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    sequence = count_up_to(ends, tile)
    sequence = jnp.minimum(sequence, num_sequences - 1)
    offset = (tile - starts[sequence])[:, None] * height + jnp.arange(height, dtype=jnp.int32)
    row = jnp.where(offset < counts[sequence][:, None], cu_seqlens[sequence][:, None] + offset, num_rows)

    offset_of = jnp.arange(num_rows, dtype=jnp.int32) - cu_seqlens[rows.sequence]
    places = starts[rows.sequence] * height + offset_of
    return Tiles(
        sequence=sequence,
        rows=row,
        positions=rows.position.at[row].get(mode="fill", fill_value=-1),
        places=jnp.where(rows.position >= 0, places, num_tiles * height),
    )


def decode_tiles(num_rows: int, seq_lens: Int32[Array, " B"]) -> Tiles:
    """One tile a sequence: its Q = T // B rows."""
    num_sequences = seq_lens.shape[0]
    row = jnp.arange(num_rows, dtype=jnp.int32)
    position = decode_rows(num_rows, seq_lens).position
    return Tiles(
        sequence=jnp.arange(num_sequences, dtype=jnp.int32),
        rows=jnp.where(position >= 0, row, num_rows).reshape(num_sequences, -1),
        positions=position.reshape(num_sequences, -1),
        places=row,
    )


def map_live(
    body: Callable[..., Shaped[Array, "..."]],
    live: Bool[Array, " n"],
    inputs: PyTree,
    fill: float,
) -> Shaped[Array, "n ..."]:
    """Stack body(x) for each x of `inputs` along their first axis, one after the other.

    Where `live` is false the result is `fill` and nothing is computed. Derivatives recompute the body, so
    that they keep no more than one step's intermediates either.
    """

    def step(args):
        is_live, x = args
        result = jax.eval_shape(body, x)
        return lax.cond(is_live, body, lambda _: jnp.full(result.shape, fill, result.dtype), x)

    return lax.map(jax.checkpoint(step, prevent_cse=False), (live, inputs))


def count_up_to(ends: Int32[Array, " n"], values: Int32[Array, " m"]) -> Int32[Array, " m"]:
    """How many of the ascending `ends` are at most each value; by comparisons, since a search is a loop of kernels."""
    return jnp.searchsorted(ends, values, side="right", method="compare_all").astype(jnp.int32)


def at(values: Shaped[Array, "..."], *index: Int32[Array, "..."]) -> Shaped[Array, "..."]:
    """values[index] without a case for what is out of bounds, of which there must be nothing: less code to compile."""
    return jnp.asarray(values).at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def divided(values: Int32[Array, "*n"], divisor: int) -> Int32[Array, "*n"]:
    """Quotients rounded down, by a power of two: a shift, of which XLA has far less to compile than of a division."""
    return values >> (divisor.bit_length() - 1)


def live_counts(cu_seqlens: Array, seq_lens: Array, context_lens: Array) -> Int32[Array, " B"]:
    """Live rows of each sequence of a prefill call."""
    return jnp.clip(seq_lens - context_lens, 0, jnp.maximum(cu_seqlens[1:] - cu_seqlens[:-1], 0))
