"""Windows of a prefill call of the indexer, and the blocks that they see in closed form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.index_topk.mosaic_gpu_tiles import Cut, blocks_up_to, windows

PAGE, TABLE_WIDTH, NUM_ROWS = 128, 50, 2048


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_blocks_up_to_is_the_running_sum_of_what_windows_see(heads):
    cut = Cut(256 // heads, 8 // heads, PAGE, TABLE_WIDTH)

    @jax.jit
    def compute(*lengths):
        seen = windows(NUM_ROWS, cut, *lengths).num_blocks
        return seen, [blocks_up_to(seen.shape[0], *about, cut, *lengths) for about in about_windows]

    about_windows = ((0, 1), (1, 2), (3, 1))
    rng = np.random.default_rng(heads)
    for num_sequences in (1, 1, 4, 4, 4, 4, 4, 4):
        rows = rng.integers(0, NUM_ROWS // 4, num_sequences) * (rng.random(num_sequences) > 0.2)
        context = rng.integers(0, 1500, num_sequences) * (rng.random(num_sequences) > 0.3)
        dead = rng.integers(0, 9, num_sequences) * (rng.random(num_sequences) > 0.7)
        cu_seqlens = np.concatenate([[0], np.cumsum(rows)])
        lengths = (cu_seqlens, np.maximum(context + rows - dead, 0), context)
        seen, found = compute(*(jnp.asarray(values, jnp.int32) for values in lengths))
        for (skipped, extra), got in zip(about_windows, found, strict=True):
            expected = np.cumsum(np.where(seen > 0, np.maximum(seen - skipped, 0) + extra, 0))
            np.testing.assert_array_equal(got, expected)


def test_windows_of_numpy_arrays():
    lengths: list[Any] = [np.array(values, np.int32) for values in ([0, 700, 705], [700, 1205], [0, 1200])]
    cut = Cut(64, 2, PAGE, TABLE_WIDTH)
    expected = jax.jit(lambda *lengths: windows(NUM_ROWS, cut, *lengths))(*lengths)
    jax.tree.map(np.testing.assert_array_equal, windows(NUM_ROWS, cut, *lengths), expected)
