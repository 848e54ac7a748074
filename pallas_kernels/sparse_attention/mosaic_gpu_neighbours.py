"""Which blocks neighbouring rows of a prefill call have in common, in plain JAX.

The rows of a part of a call are taken in groups of `ROWS`. A block that at least `QUORUM` of a group's rows chose is
common to them. Sets of blocks are bits of words throughout, the first block's the lowest of the first word.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, UInt32

from pallas_kernels.hopper import PAGE_SIZE
from pallas_kernels.rows import at, divided
from pallas_kernels.sparse_attention.mosaic_gpu_plan import TILE_PAIRS

# Rows of a group: a tile for each warpgroup of a CTA.
TILES = 3
ROWS = TILES * TILE_PAIRS
# As the binary digits of a count up to ROWS tell.
_DIGITS = 4
QUORUM = 2 ** (_DIGITS - 1)
# Of a word.
BITS = 32


class Common(NamedTuple):
    """Common blocks.

    bits: u32[T, K, words], those that each row chose. of_groups: the same in groups, of one part after those of
    another, and behind a group's rows all of its common blocks.
    """

    bits: UInt32[Array, "T K words"]
    of_groups: UInt32[Array, "groups rows+1 K words"]


def groups_of(rows: int) -> int:
    """Groups of so many rows."""
    return -(-rows // ROWS)


def find(
    block_ids: Int32[Array, "T K C"],
    sequence: Int32[Array, " T"],
    position: Int32[Array, " T"],
    *,
    table_width: int,
    rows_at_a_time: int,
) -> Common:
    """The common blocks of each group. Rows of another sequence than a group's first have none.

    block_ids: distinct for each row and head. rows_at_a_time: of a part.
    """
    chosen = (block_ids >= 0) & (block_ids <= divided(position, PAGE_SIZE)[:, None, None])
    bit = jnp.where(chosen, jnp.uint32(1) << (block_ids & (BITS - 1)).astype(jnp.uint32), 0)
    in_word = divided(block_ids, BITS)[..., None] == jnp.arange(-(-table_width // BITS))
    bits = jnp.sum(jnp.where(in_word, bit[..., None], 0), axis=2, dtype=jnp.uint32)
    # An array: every row of a group looks at all of them.
    bits = _in_groups(lax.optimization_barrier(bits), rows_at_a_time)
    sequence = _in_groups(sequence, rows_at_a_time)
    bits = jnp.where((sequence == sequence[:, :1])[..., None, None], bits, 0)
    # All blocks are counted at once, a digit of all their counts being a word.
    digits = [jnp.zeros_like(bits[:, 0])] * _DIGITS
    for i in range(ROWS):
        carry = bits[:, i]
        for j, digit in enumerate(digits):
            digits[j], carry = digit ^ carry, digit & carry
    # A row more, of all blocks.
    bits = jnp.pad(bits, ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=~jnp.uint32(0))
    bits = lax.optimization_barrier(bits & digits[-1][:, None])
    return Common(_out_of_groups(bits[:, :ROWS], rows_at_a_time)[: block_ids.shape[0]], bits)


def without(block_ids: Int32[Array, "T K C"], bits: UInt32[Array, "T K words"]) -> Int32[Array, "T K C"]:
    """The chosen blocks, with -1 in the place of those that are among a row's bits."""
    block = jnp.clip(block_ids, 0, bits.shape[2] * BITS - 1)
    word = jnp.take_along_axis(bits, divided(block, BITS), axis=2, mode="promise_in_bounds")
    is_among = (word >> (block & (BITS - 1)).astype(jnp.uint32)) & 1 != 0
    return jnp.where(is_among, -1, block_ids)


def places_with(
    places: Int32[Array, " pairs"], bits: UInt32[Array, "T K words"], first_tile: int
) -> Int32[Array, " pairs"]:
    """The places of a part's pairs, ahead of them that of what a row has of its common blocks, behind them unused ones.

    bits: of the part's rows. first_tile: of the partial results of common blocks.
    """
    rows, kv_heads = bits.shape[:2]
    places = places.reshape(rows, kv_heads, -1)
    row, head = jnp.arange(rows, dtype=jnp.int32)[:, None], jnp.arange(kv_heads, dtype=jnp.int32)
    # Unsigned, since XLA has a shift for such a quotient.
    group = lax.div(row.astype(jnp.uint32), jnp.uint32(ROWS)).astype(jnp.int32)
    # Of a group, whole tiles of one head after those of another.
    place = first_tile * TILE_PAIRS + (group * (kv_heads - 1) + head) * ROWS + row
    has_place = functools.reduce(jnp.bitwise_or, [bits[..., i] for i in range(bits.shape[2])]) != 0
    slot = jnp.arange(places.shape[2], dtype=jnp.int32)
    used = jnp.sum(jnp.where(places >= 0, jnp.uint32(1) << slot.astype(jnp.uint32), 0), axis=2, dtype=jnp.uint32)
    # An array: every slot looks at all of them.
    used = lax.optimization_barrier(used)[..., None]
    number = slot - has_place[..., None]
    place_of_slot = at(places, row[..., None], head[..., None], _set_bit(used, number))
    is_there = number < lax.population_count(used).astype(jnp.int32)
    return jnp.where(number < 0, place[..., None], jnp.where(is_there, place_of_slot, -1)).reshape(-1)


def _in_groups(values: Array, rows_at_a_time: int) -> Array:
    """[T, ...] as [groups, ROWS, ...]: each part has whole groups, filled up with zeros."""
    parts = -(-values.shape[0] // rows_at_a_time)
    rest = [(0, 0)] * (values.ndim - 1)
    values = jnp.pad(values, [(0, parts * rows_at_a_time - values.shape[0]), *rest])
    values = values.reshape(parts, rows_at_a_time, *values.shape[1:])
    values = jnp.pad(values, [(0, 0), (0, groups_of(rows_at_a_time) * ROWS - rows_at_a_time), *rest])
    return values.reshape(-1, ROWS, *values.shape[2:])


def _out_of_groups(values: Array, rows_at_a_time: int) -> Array:
    """What `_in_groups` was given, and rows of zeros behind."""
    values = values.reshape(-1, groups_of(rows_at_a_time) * ROWS, *values.shape[2:])
    return values[:, :rows_at_a_time].reshape(-1, *values.shape[2:])


def _set_bit(word: UInt32[Array, "*n"], number: Int32[Array, "*n"]) -> Int32[Array, "*n"]:
    """Which bit of a word is the set one of that number, from 0 on; the last one where there are not so many."""
    bit = jnp.zeros_like(number)
    for width in (16, 8, 4, 2, 1):
        low = (word >> bit.astype(jnp.uint32)) & jnp.uint32(2**width - 1)
        count = lax.population_count(low).astype(jnp.int32)
        is_behind = number >= count
        bit, number = jnp.where(is_behind, bit + width, bit), jnp.where(is_behind, number - count, number)
    return bit
