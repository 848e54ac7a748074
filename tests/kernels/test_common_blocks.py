"""Blocks that neighbouring rows of a prefill call have in common: which they are, and where their results lie."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_attention import mosaic_gpu
from pallas_kernels.sparse_attention import mosaic_gpu_memory as memory
from pallas_kernels.sparse_attention import mosaic_gpu_neighbours as neighbours
from pallas_kernels.sparse_attention.mosaic_gpu_plan import TILE_PAIRS

PAGE = 128


def random_rows(rows: int, heads: int, top_k: int, sequences: int, width: int) -> tuple[np.ndarray, ...]:
    """Rows that mostly choose alike: block ids [T, K, C] with holes, also behind a row's own; sequences; positions."""
    rng = np.random.default_rng(rows + width)
    sequence = np.sort(rng.integers(0, sequences, rows)).astype(np.int32)
    position = rng.integers(width * PAGE // 2, width * PAGE, rows).astype(np.int32)
    position[rng.random(rows) < 0.1] = -1
    ids = np.full((rows, heads, top_k), -1, np.int32)
    wanted = rng.permutation(width)
    for row, head in np.ndindex(rows, heads):
        some = wanted if rng.random() < 0.8 else rng.permutation(width)
        count = min(width, top_k) if rng.random() < 0.8 else rng.integers(0, min(width, top_k) + 1)
        ids[row, head, rng.permutation(top_k)[:count]] = some[:count]
    return ids, sequence, position


def common_blocks(ids: np.ndarray, sequence: np.ndarray, position: np.ndarray, rows_at_a_time: int):
    """For each row and head its common blocks, and for each group and head all of them, by counting."""
    of_rows: dict[tuple[int, int], set[int]] = {}
    of_groups: dict[tuple[int, int], set[int]] = {}
    group = 0
    for part in range(0, len(ids), rows_at_a_time):
        for first in range(part, part + rows_at_a_time, neighbours.ROWS):
            rows = range(first, min(first + neighbours.ROWS, part + rows_at_a_time, len(ids)))
            for head in range(ids.shape[1]):
                chose: dict[int, list[int]] = {}
                for row in rows:
                    of_rows[row, head] = set()
                    for block in ids[row, head]:
                        if sequence[row] == sequence[rows[0]] and 0 <= block <= position[row] // PAGE:
                            chose.setdefault(int(block), []).append(row)
                common = {block: who for block, who in chose.items() if len(who) >= neighbours.QUORUM}
                of_groups[group, head] = set(common)
                for block, who in common.items():
                    for row in who:
                        of_rows[row, head].add(block)
            group += 1
    return of_rows, of_groups


def blocks_in(words: np.ndarray) -> set[int]:
    return {word * 32 + bit for word, bits in enumerate(words) for bit in range(32) if int(bits) >> bit & 1}


@pytest.mark.parametrize(
    ("rows", "heads", "top_k", "sequences", "width", "rows_at_a_time"),
    [
        pytest.param(100, 2, 4, 3, 9, 100, id="one word"),
        pytest.param(100, 1, 16, 2, 40, 100, id="two words"),
        pytest.param(70, 4, 8, 1, 64, 32, id="parts that are no whole groups"),
        pytest.param(60, 2, 32, 4, 33, 24, id="32 slots"),
        pytest.param(40, 2, 4, 40, 9, 40, id="sequences of a row"),
    ],
)
def test_common_blocks(rows: int, heads: int, top_k: int, sequences: int, width: int, rows_at_a_time: int):
    ids, sequence, position = random_rows(rows, heads, top_k, sequences, width)
    of_rows, of_groups = common_blocks(ids, sequence, position, rows_at_a_time)
    assert any(of_groups.values()) == (sequences < rows)

    batch = (jnp.asarray(ids), jnp.asarray(sequence), jnp.asarray(position))
    common = neighbours.find(*batch, table_width=width, rows_at_a_time=rows_at_a_time)

    parts, groups = -(-rows // rows_at_a_time), neighbours.groups_of(rows_at_a_time)
    bits, in_groups = (np.asarray(words) for words in common)
    assert in_groups.shape[:3] == (parts * groups, neighbours.ROWS + 1, heads)
    for row, head in np.ndindex(rows, heads):
        part, within = divmod(row, rows_at_a_time)
        group, place = divmod(within, neighbours.ROWS)
        assert blocks_in(bits[row, head]) == of_rows[row, head]
        assert blocks_in(in_groups[part * groups + group, place, head]) == of_rows[row, head]
        assert blocks_in(in_groups[part * groups + group, -1, head]) == of_groups[part * groups + group, head]
    others = np.where([[np.isin(ids[r, h], list(of_rows[r, h])) for h in range(heads)] for r in range(rows)], -1, ids)
    np.testing.assert_array_equal(neighbours.without(batch[0], common.bits), others)

    # Where what is merged lies: some of the other blocks' places, of a part of the rows.
    rng = np.random.default_rng(0)
    for part in range(parts):
        of_part = slice(part * rows_at_a_time, min((part + 1) * rows_at_a_time, rows))
        places = np.where(others[of_part] < 0, -1, rng.integers(-1, 1000, others[of_part].shape)).astype(np.int32)
        first_tile = 300
        found = neighbours.places_with(jnp.asarray(places.reshape(-1)), common.bits[of_part], first_tile)
        found = np.asarray(found).reshape(places.shape)
        for row, head in np.ndindex(places.shape[:2]):
            expected = [place for place in places[row, head] if place >= 0]
            if of_rows[of_part.start + row, head]:
                group, within = divmod(row, neighbours.ROWS)
                tile, number = divmod(within, TILE_PAIRS)
                tile += first_tile + (group * heads + head) * neighbours.TILES
                expected.insert(0, tile * TILE_PAIRS + number)
            np.testing.assert_array_equal(found[row, head], (expected + [-1] * top_k)[:top_k])


def test_a_group_is_a_tile_for_each_warpgroup():
    assert neighbours.TILES == memory.WARPGROUPS


@pytest.mark.parametrize(
    ("tokens", "kv_heads", "width", "looks"),
    [(8192, 4, 64, True), (8192, 4, 65, False), (8192, 1, 64, False), (2048, 4, 16, True), (1024, 4, 8, False)],
)
def test_looked_for_where_it_pays(tokens: int, kv_heads: int, width: int, looks: bool):
    assert mosaic_gpu._looks_for_common(tokens * kv_heads, width) == looks
