"""The kernels' sorted lists, which are plain jax.numpy: against Python's sort."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.index_topk import keys
from pallas_kernels.index_topk.mosaic_gpu_lists import insert

COLUMNS = 200


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Few different keys of blocks in ascending order, [count, COLUMNS]."""
    rng = np.random.default_rng(seed)
    return rng.integers(-3, 4, (count, COLUMNS)).astype(np.int32), np.arange(count, dtype=np.int32)[:, None] + np.zeros(
        (count, COLUMNS), np.int32
    )


def best(key: np.ndarray, number: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((number, -key), axis=0)[:length]
    return np.take_along_axis(key, order, 0), np.take_along_axis(number, order, 0)


def empty(length: int) -> tuple:
    nothing = jnp.zeros(COLUMNS, jnp.int32)
    return (nothing + keys.INVISIBLE,) * length, (nothing - 1,) * length


@pytest.mark.parametrize("length", [1, 4, 7])
@pytest.mark.parametrize("count", [3, 20])
def test_insert(length: int, count: int):
    """From an empty list on, and from one that is full of nothing."""
    key, number = drawn(count, length)
    expected = best(key, number, length)
    for start in (((), ()), empty(length)):
        found = start
        for i in range(count):
            found = insert(found, jnp.asarray(key[i]), jnp.asarray(number[i]), length)
        filled = min(length, count)
        for got, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(np.stack(got)[:filled], wanted)
        assert all((np.asarray(rest) == keys.INVISIBLE).all() for rest in found[0][filled:])
