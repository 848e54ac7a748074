"""Which queries meet at which page: the choice of a prefill call turned inside out, in plain JAX.

A pair is a (token, KV head, slot) that chose a block. Pairs of one KV head that chose the same page are
gathered in tiles of `TILE_PAIRS`, so that the page is read once for all of them. A run is the row of tiles of one
page, of the pairs of some consecutive rows: a window, whose queries are so met again while they are still near by.
Some windows are a part, of which partial results are held at a time; all parts are planned at once.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.hopper import PAGE_SIZE
from pallas_kernels.rows import at, divided
from pallas_kernels.sparse_attention import mosaic_gpu_numbering as numbering

TILE_PAIRS = 4
# For the last key of a block that is seen, 0 to 127.
LIMIT_BITS = 7
# For each pair, in a table of bits by which pairs are numbered; with more of them sorting is as quick.
_MOST_WORDS = 4


class Plan(NamedTuple):
    """Tiles and runs of a call's pairs; pair (token * K + head) * C + slot.

    units: TILE_PAIRS times i32[tiles], the token * K + head of a pair of each tile. limits: i32[tiles], the last key of
    its block that each pair sees, LIMIT_BITS each, the first pair's lowest. tile_run: i32[tiles], a tile's run << 1 |
    whether any of its pairs does not see all of its block. A tile that is not full has its first pair once more. head,
    page, tail: i32[tiles], of a tile's run, the last one the sequence that ends within the page, or -1. Tiles behind
    the last may be anything. ends: i32[parts * keys], how many tiles there are up to each key; the last one of a part's
    is where the tiles of the part end. places: i32[T * K * C], tile * TILE_PAIRS + number in it of each pair, -1 of one
    that takes no part.
    """

    units: tuple[Int32[Array, " tiles"], ...]
    limits: Int32[Array, " tiles"]
    tile_run: Int32[Array, " tiles"]
    head: Int32[Array, " tiles"]
    page: Int32[Array, " tiles"]
    tail: Int32[Array, " tiles"]
    ends: Int32[Array, " parts*keys"]
    places: Int32[Array, " pairs"]


class Items(NamedTuple):
    """What pairs may meet at: the blocks of all sequences, or the pages, of which there may be fewer.

    by_block: whether an item is sequence * M + block; else it is a page. page: i32[items]. tail: i32[items], the
    sequence that ends within the item, or -1.
    """

    by_block: bool
    page: Int32[Array, " items"]
    tail: Int32[Array, " items"]


def items_of(
    v: Float[Array, "P K S H"], block_table: Int32[Array, "B M"], seq_lens: Int32[Array, " B"]
) -> tuple[Items, Float[Array, "B K S H"]]:
    """The items of a call, and each sequence's last page of values with 0 in every slot that no sequence sees.

    The values are needed because a weight of 0 does not silence a NaN in an unused slot.
    """
    num_pages = v.shape[0]
    num_sequences, table_width = block_table.shape
    by_block = num_sequences * table_width <= num_pages
    table = jnp.clip(block_table, 0, num_pages - 1)
    first_keys = jnp.arange(table_width, dtype=jnp.int32) * PAGE_SIZE
    fill = jnp.clip(seq_lens[:, None] - first_keys, 0, PAGE_SIZE)
    last = jnp.clip(divided(seq_lens - 1, PAGE_SIZE), 0, table_width - 1)
    sequence = jnp.arange(num_sequences, dtype=jnp.int32)
    if by_block:
        is_last = jnp.arange(table_width, dtype=jnp.int32) == last[:, None]
        last_page, last_fill = at(table, sequence, last), at(fill, sequence, last)
        page = table.reshape(-1)
        tail = jnp.where(is_last & (last_fill < PAGE_SIZE)[:, None], sequence[:, None], -1).reshape(-1)
    else:
        # A page may be one sequence's last and another's full one.
        page = jnp.arange(num_pages, dtype=jnp.int32)
        fill = jnp.zeros((num_pages,), jnp.int32).at[jnp.where(fill > 0, table, num_pages)].max(fill, mode="drop")
        last_page = at(table, sequence, last)
        last_fill = at(fill, last_page)
        tail = jnp.full((num_pages,), -1, jnp.int32)
        tail = tail.at[jnp.where(last_fill < PAGE_SIZE, last_page, num_pages)].max(sequence, mode="drop")
    slot = jnp.arange(PAGE_SIZE, dtype=jnp.int32)
    seen = (slot < last_fill[:, None])[:, None, :, None]
    return Items(by_block, page, tail), jnp.where(seen, at(v, last_page), 0)


def most_tiles(num_pairs: int, num_keys: int) -> int:
    """Tiles that so many pairs may need, with so many keys that they may have."""
    return (num_pairs + (TILE_PAIRS - 1) * min(num_pairs, num_keys)) // TILE_PAIRS


def plan(
    block_ids: Int32[Array, "T K C"],
    sequence: Int32[Array, " T"],
    position: Int32[Array, " T"],
    block_table: Int32[Array, "B M"],
    items: Items,
    *,
    window: int,
    rows_at_a_time: int,
) -> Plan:
    """Put the pairs in the order of (part, KV head, window of so many rows, item) and cut each such run into tiles.

    block_ids: distinct for each row and head. rows_at_a_time: of a part; a multiple of the window, if there are
    several. T * K * C is below 2**24.
    """
    num_rows, kv_heads, top_k = block_ids.shape
    parts = -(-num_rows // rows_at_a_time)
    num_items, num_windows = items.page.shape[0], -(-rows_at_a_time // window)
    num_pairs, num_keys = block_ids.size, parts * kv_heads * num_windows * num_items
    max_tiles = most_tiles(num_pairs, num_keys)

    own = divided(position, PAGE_SIZE)[:, None, None]  # negative where the position is
    used = (block_ids >= 0) & (block_ids <= own)
    block = jnp.where(used, block_ids, 0)
    if items.by_block:
        item = sequence[:, None, None] * block_table.shape[1] + block
    else:
        item = jnp.clip(block_table[sequence[:, None, None], block], 0, num_items - 1)
    head = jnp.arange(kv_heads, dtype=jnp.int32)[:, None]
    # Unsigned, since XLA has a shift for such a quotient.
    row = jnp.arange(num_rows, dtype=jnp.uint32)[:, None, None]
    part, row = lax.div(row, jnp.uint32(rows_at_a_time)), lax.rem(row, jnp.uint32(rows_at_a_time))
    row_window, row = lax.div(row, jnp.uint32(window)), lax.rem(row, jnp.uint32(window))
    key = ((part.astype(jnp.int32) * kv_heads + head) * num_windows + row_window.astype(jnp.int32)) * num_items + item
    key = jnp.where(used, key, num_keys).reshape(-1)
    limit = jnp.minimum(position[:, None, None] - block * PAGE_SIZE, PAGE_SIZE - 1).reshape(-1)
    row = jnp.broadcast_to(row.astype(jnp.int32), used.shape).reshape(-1)
    used = used.reshape(-1)
    # By pages a row may have a key twice, since two of its blocks may be one page.
    if items.by_block and numbering.words_of_bits(num_keys, window) <= _MOST_WORDS * num_pairs:
        counts, numbers_from = numbering.by_bits(key, row, used, num_keys=num_keys, num_rows=window)
    else:
        counts, numbers_from = numbering.by_sorting(key, num_keys=num_keys)
    tiles_of = divided(counts + (TILE_PAIRS - 1), TILE_PAIRS)
    # Of both at once.
    ends, runs_up_to = numbering.running_sum(jnp.stack([tiles_of, (counts > 0).astype(jnp.int32)]))
    begins = (ends - tiles_of) * TILE_PAIRS
    places = jnp.where(used, numbers_from(begins), -1)

    number = jnp.arange(num_pairs, dtype=jnp.int32)
    where = jnp.where(used, places, max_tiles * TILE_PAIRS + number)
    words = lax.empty((max_tiles * TILE_PAIRS,), jnp.int32)
    words = words.at[where].set((number << LIMIT_BITS) | limit, mode="drop", unique_indices=True)
    of_pairs = [words[i::TILE_PAIRS] for i in range(TILE_PAIRS)]
    # Every tile that is needed has a first pair.
    key_of_tile = at(key, jnp.clip(of_pairs[0] >> LIMIT_BITS, 0, num_pairs - 1))
    key_of_tile = jnp.minimum(key_of_tile, num_keys - 1)
    left = at(begins + counts, key_of_tile) - jnp.arange(max_tiles, dtype=jnp.int32) * TILE_PAIRS
    of_pairs = [jnp.where(i < left, word, of_pairs[0]) for i, word in enumerate(of_pairs)]
    limits = [word & (PAGE_SIZE - 1) for word in of_pairs]
    is_cut = functools.reduce(jnp.minimum, limits) < PAGE_SIZE - 1

    item = lax.rem(key_of_tile, jnp.int32(num_items))
    return Plan(
        units=tuple(lax.div(word >> LIMIT_BITS, jnp.int32(top_k)) for word in of_pairs),
        limits=functools.reduce(jnp.bitwise_or, [limit << (i * LIMIT_BITS) for i, limit in enumerate(limits)]),
        tile_run=(at(runs_up_to - 1, key_of_tile) << 1) | is_cut,
        head=lax.rem(lax.div(key_of_tile, jnp.int32(num_windows * num_items)), jnp.int32(kv_heads)),
        page=at(items.page, item),
        tail=at(items.tail, item),
        ends=ends,
        places=places,
    )


def places_of(plan: Plan, part: int, *, parts: int, pairs: int) -> Int32[Array, " pairs"]:
    """The places of a part's pairs from its first tile on; less than 0 that of one that takes no part.

    pairs: of a part, of which the last may have fewer.
    """
    places = plan.places[part * pairs : (part + 1) * pairs]
    return places - plan.ends[part * plan.ends.shape[0] // parts - 1] * TILE_PAIRS if part > 0 else places
