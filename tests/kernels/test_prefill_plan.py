"""The plan of a prefill call's attention: every pair once, beside pairs of its own page, and nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.sparse_attention.mosaic_gpu_plan import LIMIT_BITS, TILE_PAIRS, Items, places_of, plan

PAGE = 128


@pytest.mark.parametrize(("window", "rows_at_a_time"), [(1, 50), (16, 50), (64, 50), (8, 16)])
@pytest.mark.parametrize(
    ("sequences", "width", "num_pages"),
    [
        pytest.param(3, 9, 40, id="by block"),
        pytest.param(3, 9, 20, id="by page"),
        # More keys than are summed up by comparing each with each.
        pytest.param(4, 400, 1700, id="2,048 keys and more"),
        # More than 16 bits of them.
        pytest.param(5, 9000, 50_000, id="65,536 keys and more"),
    ],
)
def test_plan(
    monkeypatch: pytest.MonkeyPatch, sequences: int, width: int, num_pages: int, window: int, rows_at_a_time: int
) -> None:
    rng = np.random.default_rng(width)
    # What is not written may hold anything.
    anything = np.iinfo(np.int32)
    monkeypatch.setattr(
        lax, "empty", lambda shape, dtype: jnp.asarray(rng.integers(anything.min, anything.max, shape), dtype)
    )
    rows, heads, top_k = 50, 2, 4
    sequence = np.sort(rng.integers(0, sequences, rows)).astype(np.int32)
    position = rng.integers(-1, width * PAGE, rows).astype(np.int32)
    position[rng.random(rows) < 0.2] = -1
    table = rng.integers(0, num_pages, (sequences, width)).astype(np.int32)
    block_ids = np.full((rows, heads, top_k), -1, np.int32)
    for row, head in np.ndindex(rows, heads):
        count = rng.integers(0, top_k + 1)
        # Blocks behind the row's own among them, holes anywhere, and one that most rows chose.
        some = [0, *(1 + rng.choice(width - 1, top_k - 1, replace=False))][:count]
        block_ids[row, head, rng.permutation(top_k)[:count]] = some
    by_block = table.size <= num_pages
    tail = rng.integers(-1, sequences, table.size if by_block else num_pages).astype(np.int32)
    pages = table.reshape(-1) if by_block else np.arange(num_pages, dtype=np.int32)
    items = Items(by_block, jnp.asarray(pages), jnp.asarray(tail))

    rows_of = (jnp.asarray(block_ids), jnp.asarray(sequence), jnp.asarray(position))
    found = plan(*rows_of, jnp.asarray(table), items, window=window, rows_at_a_time=rows_at_a_time)

    limits, tile_run, places = (np.asarray(x) for x in (found.limits, found.tile_run, found.places))
    units = np.stack(found.units, axis=1).reshape(-1)
    num_tiles = found.ends[-1]
    pages_of_tiles = np.stack([found.head, found.page, found.tail], axis=1)
    met, members, parts_of_tiles = [], [], []
    for pair, place in enumerate(places):
        row, head, slot = np.unravel_index(pair, block_ids.shape)
        block = block_ids[row, head, slot]
        own = position[row] // PAGE if position[row] >= 0 else -1
        assert (place >= 0) == (0 <= block <= own)
        if place < 0:
            continue
        tile, number = divmod(place, TILE_PAIRS)
        assert units[place] == row * heads + head
        limit = (limits[tile] >> (number * LIMIT_BITS)) & (PAGE - 1)
        assert limit == min(position[row] - block * PAGE, PAGE - 1)
        run, is_cut = divmod(tile_run[tile], 2)
        assert is_cut or limit == PAGE - 1
        item = sequence[row] * width + block if by_block else table[sequence[row], block]
        assert list(pages_of_tiles[tile]) == [head, pages[item], tail[item]]
        part, row = divmod(row, rows_at_a_time)
        met.append((run, (part, head, row // window, item)))
        parts_of_tiles.append((part, tile))
        members.append(place)
    assert len(set(members)) == len(members)
    # One run for each page of a part, a head and a window, in their order, and no more tiles than their pairs fill.
    assert sorted(set(met)) == list(enumerate(sorted({where for _, where in met})))
    sizes = np.bincount([run for run, _ in met])
    assert num_tiles == np.sum(-(-sizes // TILE_PAIRS))
    assert set(np.array(members) // TILE_PAIRS) == set(range(num_tiles))
    # The tiles of a part follow one another, and its places count from the first of them.
    parts = -(-rows // rows_at_a_time)
    pairs = rows_at_a_time * heads * top_k
    part_ends = [0, *np.asarray(found.ends).reshape(parts, -1)[:, -1]]
    for part, tile in parts_of_tiles:
        assert part_ends[part] <= tile < part_ends[part + 1]
    for part in range(parts):
        expected = places[part * pairs : (part + 1) * pairs]
        own = np.asarray(places_of(found, part, parts=parts, pairs=pairs))
        np.testing.assert_array_equal(own[expected >= 0], expected[expected >= 0] - part_ends[part] * TILE_PAIRS)
        assert (own[expected < 0] < 0).all()
