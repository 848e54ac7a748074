"""Walking over tiles: each live row in one tile of its own sequence, and nothing computed for the others."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import rows

NUM_ROWS = 40


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10), st.integers(0, 30)), min_size=4, max_size=4),
    height=st.sampled_from([1, 7, 10, 40]),
)
def test_every_live_row_is_in_one_tile_of_its_sequence(widths: list[tuple[int, int, int]], height: int):
    segment, wanted, context = (np.array(column, np.int32) for column in zip(*widths, strict=True))
    cu_seqlens = np.concatenate([[0], np.cumsum(segment)]).astype(np.int32)
    seq_lens, context_lens = context + wanted, context
    sequence, position = oracle.prefill_rows(NUM_ROWS, cu_seqlens, seq_lens, context_lens)
    tiles = rows.prefill_tiles(
        NUM_ROWS, height, *(jnp.asarray(array) for array in (cu_seqlens, seq_lens, context_lens))
    )
    flat_rows, flat_positions = np.asarray(tiles.rows).ravel(), np.asarray(tiles.positions).ravel()
    held = flat_rows[flat_rows < NUM_ROWS]
    np.testing.assert_array_equal(np.sort(held), np.flatnonzero(position >= 0))
    places = np.asarray(tiles.places)
    for row in held:
        assert flat_rows[places[row]] == row
        assert flat_positions[places[row]] == position[row]
        assert tiles.sequence[places[row] // height] == sequence[row]
    assert (flat_positions[flat_rows == NUM_ROWS] == -1).all()
    assert (places[position < 0] == flat_rows.size).all()


def test_nothing_is_computed_for_the_dead():
    computed = []

    def body(x):
        jax.debug.callback(lambda value: computed.append(float(value)), x)
        return jnp.stack([x, -x])

    live = jnp.array([True, False, False, True, False])
    result = rows.map_live(body, live, jnp.arange(5.0), 9)
    jax.effects_barrier()
    np.testing.assert_array_equal(result, [[0, 0], [9, 9], [9, 9], [3, -3], [9, 9]])
    assert sorted(computed) == [0, 3]
