"""How a prefill call packs its partial results: what is lost of them, and that they fit where they are kept."""

import jax.numpy as jnp
import numpy as np
import pytest

from m3_jax import plan
from pallas_kernels.hopper import DIM, GROUP
from pallas_kernels.sparse_attention import mosaic_gpu
from pallas_kernels.sparse_attention import mosaic_gpu_memory as memory
from pallas_kernels.sparse_attention import mosaic_gpu_partials as packing
from pallas_kernels.sparse_attention import mosaic_gpu_tile as tiles

DTYPES = (jnp.bfloat16, jnp.float16)
# The last of the steps that a row's largest number has.
MOST = {jnp.bfloat16: 511, jnp.float16: 8191}
# A largest number that is a unit as it stands: in float32 all bits behind the fourth of the fraction are set.
UNIT = np.nextafter(np.float32(17 / 16), np.float32(0))


def unpacked(words, unit, dtype) -> np.ndarray:
    groups = packing.unpack(words, dtype, jnp.int32(packing.mask_of(dtype)))
    numbers = np.concatenate([np.asarray(group, np.float64) for group in groups], axis=1)
    with np.errstate(invalid="ignore"):
        return (numbers - packing.middle_of(dtype)) * packing.step_of(dtype) * np.asarray(unit, np.float64)[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_a_step_is_lost(dtype):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((256, DIM)) * 10.0 ** rng.uniform(-25, 30, (256, 1))
    values[:3] = [[0], [1], [-1]]
    values[3] = np.where(np.arange(DIM) == 5, 1e36, 0)
    values = values.astype(np.float32)
    words, unit = packing.pack(jnp.asarray(values), dtype)
    assert words.shape[1] == packing.words_of(dtype)
    error = np.abs(unpacked(words, unit, dtype) - values).max(axis=1)
    largest = np.abs(values).max(axis=1)
    assert (unit >= largest).all()
    assert (np.asarray(unit)[largest > 0] < largest[largest > 0] * 17 / 16).all()
    # In float32, hence a little more.
    np.testing.assert_array_less(error, np.asarray(unit, np.float64) * (0.5 / MOST[dtype] + 1e-6) + 1e-37)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_come_back_as_they_were(dtype):
    most = MOST[dtype]
    values = np.random.default_rng(0).integers(-most, most + 1, (512, DIM))
    values[:, 7] = most
    values[:, 120] = -most
    step = np.float64(UNIT) / most
    words, unit = packing.pack(jnp.asarray(values * step, jnp.float32), dtype)
    np.testing.assert_array_equal(unit, UNIT)
    np.testing.assert_allclose(unpacked(words, unit, dtype) / step, values, atol=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_stays_so(dtype, value):
    values = np.full((2, DIM), UNIT)
    values[1, 100] = value
    words, unit = packing.pack(jnp.asarray(values), dtype)
    assert np.isfinite(unit[0])
    assert np.isnan(unit[1])
    np.testing.assert_allclose(unpacked(words, unit, dtype)[0], UNIT, rtol=1e-5)


def test_statistics():
    """A unit comes back as it was, and a total with 12 bits of its fraction; what is not finite as a NaN."""
    rng = np.random.default_rng(0)
    reference, total, largest = (rng.uniform(1, 2, 999) * 2.0 ** rng.integers(-60, 60, 999) for _ in range(3))
    largest[0], total[1] = np.inf, np.nan
    reference[2] = packing.LOWEST
    reference, total, largest = (x.astype(np.float32) for x in (reference, total, largest))
    _, unit = packing.pack(jnp.asarray(np.repeat(largest[:, None], DIM, axis=1)), jnp.bfloat16)
    words = packing.pack_statistics(jnp.asarray(reference), jnp.asarray(total), unit)
    found = [np.asarray(x) for x in packing.unpack_statistics(*words)]
    np.testing.assert_array_equal(found[0], reference)
    np.testing.assert_allclose(found[1], total, rtol=2.0**-13)
    np.testing.assert_array_equal(found[2], unit)
    assert np.isnan(found[1][1])
    assert np.isnan(found[2][0])


def test_nothing_adds_nothing():
    """Words of zeros, of which no unit counts beside a weight of 1, and no total is taken for one."""
    _, total, unit = packing.unpack_statistics(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    assert 0 <= total[0] < packing.NO_TOTAL
    assert 0 <= unit[0] < packing.NO_TOTAL


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_words_are_finite_numbers(dtype):
    """What an unused slot brings is multiplied by 0."""
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (64, packing.words_of(dtype))).astype(np.int32)
    words[0] = -1
    words[1] = np.float32(np.nan).view(np.int32)
    for numbers in packing.unpack(jnp.asarray(words), dtype, jnp.int32(packing.mask_of(dtype))):
        assert ((numbers >= 1) & (numbers < 2)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_lie_within_their_slot(dtype):
    """Other slots hold queries that have not been multiplied yet."""
    row = 4 * packing.row_words_of(dtype)
    assert packing.words_of(dtype) + 2 <= packing.row_words_of(dtype)
    slot_bytes = 64 * DIM * 2
    for slot in range(memory.WARPGROUPS * memory.TILES):
        first = tiles.first_row(slot, dtype) * row
        assert first % 128 == 0
        assert slot * slot_bytes <= first
        assert first + 64 * row <= (slot + 1) * slot_bytes


def test_the_planner_of_memory_knows_their_size():
    """It has the numbers by itself, since it is there without the kernels."""
    sizes = [4 * GROUP * packing.row_words_of(dtype) for dtype in DTYPES]
    assert sizes == [plan.PARTIAL_BYTES, plan.WIDE_PARTIAL_BYTES]
    assert plan.PARTIALS == mosaic_gpu._PAIRS
    assert plan.COMMON_BLOCKS == mosaic_gpu._MOST_BLOCKS
