"""The kernels' sorted lists, which are plain jax.numpy: against Python's sort."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.index_topk import keys
from pallas_kernels.index_topk.mosaic_gpu_lists import insert, nothing

COLUMNS = 200


def best(key: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest keys of each column, and their rows; of equal ones the upper."""
    order = np.argsort(-key, axis=0, kind="stable")[:length]
    return np.take_along_axis(key, order, 0), order


@pytest.mark.parametrize("length", [1, 4, 8])
@pytest.mark.parametrize("count", [3, 20])
def test_insert(length: int, count: int):
    """Few different keys into lists that are full of nothing."""
    key = np.random.default_rng(length).integers(-3, 4, (count, COLUMNS)).astype(np.int32)
    found = nothing(length * COLUMNS)
    for number in range(count):
        found = insert(found, jnp.asarray(key[number]), number)
    filled = min(length, count)
    for got, wanted, rest in zip(found, best(key, length), (keys.INVISIBLE, -1), strict=True):
        got = np.asarray(got).reshape(length, COLUMNS)
        np.testing.assert_array_equal(got[:filled], wanted)
        assert (got[filled:] == rest).all()
