"""The numbers of pairs among those of their key, by bits and by sorting, beside counting one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_attention.mosaic_gpu_numbering import by_bits, by_sorting

WAYS = ("by bits", "by sorting")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("num_rows", "num_keys"),
    [
        pytest.param(1, 1, id="one"),
        pytest.param(31, 5, id="less than a word"),
        pytest.param(257, 40, id="two groups of words"),
        # More keys than are compared with each other at once.
        pytest.param(1000, 2100, id="2,048 keys and more"),
        pytest.param(40, 70_000, id="65,536 keys and more"),
    ],
)
def test_numbers(num_rows: int, num_keys: int, way: str) -> None:
    rng = np.random.default_rng(num_keys)
    per_row = min(num_keys, 8)
    row = np.repeat(np.arange(num_rows, dtype=np.int32), per_row)
    key = np.concatenate([rng.choice(num_keys, per_row, replace=False) for _ in range(num_rows)]).astype(np.int32)
    # A key that every row has, in any of its places; it fills whole words.
    key.reshape(num_rows, per_row)[~(key.reshape(num_rows, per_row) == 0).any(1), 0] = 0
    key = rng.permuted(key.reshape(num_rows, per_row), axis=1).reshape(-1)
    takes_part = (rng.random(key.size) < 0.9) | (key == 0)
    starts = rng.integers(0, 10**6, num_keys).astype(np.int32)

    expected, counts = np.zeros(key.size, np.int32), np.zeros(num_keys, np.int32)
    for pair in np.flatnonzero(takes_part):
        expected[pair] = starts[key[pair]] + counts[key[pair]]
        counts[key[pair]] += 1

    @jax.jit
    def find(key, row, takes_part, starts):
        key = jnp.where(takes_part, key, num_keys)
        if way == "by bits":
            found = by_bits(key, row, takes_part, num_keys=num_keys, num_rows=num_rows)
        else:
            found = by_sorting(key, num_keys=num_keys)
        return found.counts, found.numbers_from(starts)

    found_counts, found = find(key, row, takes_part, starts)
    np.testing.assert_array_equal(found_counts, counts)
    np.testing.assert_array_equal(np.asarray(found)[takes_part], expected[takes_part])
