"""What prefill attention on Hopper does with one tile: the 16 query heads of 4 pairs, and the keys of one page.

`mosaic_gpu_prefill` says which warpgroup takes which tile, and when.
"""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import DIM, GROUP, PAGE_SIZE, round_up
from pallas_kernels.mosaic import COLUMNS, TILING, full, halved, spread
from pallas_kernels.sparse_attention import mosaic_gpu_partials as packing
from pallas_kernels.sparse_attention.mosaic_gpu_plan import TILE_PAIRS

ROWS = TILE_PAIRS * GROUP
_WGMMA = plgpu.Layout.WGMMA
# Weights that are added up at a time: shared memory has not room for as many ones as a page has keys.
_ONES = 64
ONES = (COLUMNS, _ONES)
# Where logits in base 2 are nothing but even numbers in float32.
_HUGE = 2.0**24


def first_row(slot, dtype: Any):
    """Where a tile's rows of results begin, in an array of such rows, to lie within a slot of the array of queries.

    At a multiple of the 128 bytes that the copy engine asks for.
    """
    row = 4 * packing.row_words_of(dtype)
    return slot * round_up(-(-ROWS * DIM * 2 // row), 128 // math.gcd(128, row))


def queries_and_results(slots: int, dtype: Any) -> tuple[Any, Any]:
    """The shared memory of so many tiles' queries, and of their results, in the same place."""
    return (
        plgpu.SMEM((slots, ROWS, DIM), dtype, transforms=TILING),
        plgpu.SMEM((first_row(slots - 1, dtype) + ROWS, packing.row_words_of(dtype)), jnp.int32),
    )


def each(value: Any, dtype: Any = jnp.float32) -> Any:
    """One value for each row."""
    return full((ROWS,), value, dtype, _WGMMA.reduce(1))


def along(rows: Any) -> Any:
    """A value of each row for each of its keys or channels."""
    return spread(rows, (ROWS, PAGE_SIZE), 0, _WGMMA)


def masked(logits: Any, limits: Sequence[Any]) -> Any:
    """Without the keys behind the last one that each pair sees."""
    row, key = (plgpu.broadcasted_iota(jnp.int32, logits.shape, axis, layout=_WGMMA) for axis in range(2))
    limit = limits[-1]
    for r in range(TILE_PAIRS - 2, -1, -1):
        limit = jnp.where(row < (r + 1) * GROUP, limits[r], limit)
    return jnp.where(key <= limit, logits, -jnp.inf)


def slope_and_reference(logits: Any, factor: float) -> tuple[Any, Any]:
    """For each row slope and reference: the logits * slope - reference, one instruction, go into exp2.

    factor: what makes them logits in base 2. The reference is the rounded product of the largest one, so that it weighs
    about 1; with a huge one the rounding would be all that there is. There the slope is a power of two, which rounds
    nothing: such logits are so far apart, or equal, that it does not matter by how much. It is not less than the
    factor, so that the order of references is that of the largest logits.
    """
    largest = halved(jnp.maximum, logits).max(axis=1)
    is_huge = jnp.abs(largest) > _HUGE / factor
    slope = jnp.where(is_huge, each(2.0 ** math.ceil(math.log2(factor))), each(factor))
    return slope, largest * slope


def multiply(weights: Any, v: Any, ones: Any, values: Any, totals: Any, weights_smem: Any) -> None:
    """Add the products of weights with v to values, and their sums to each of the totals.

    The sum is of what is multiplied, so that the rounding of equal weights cancels.
    weights_smem: a Ref to multiply from, for the interpreter, which does not from anywhere else; else None.
    """
    firsts = range(0, PAGE_SIZE, _ONES)
    if weights_smem is None:
        parts = [weights[:, first : first + _ONES] for first in firsts]
    else:
        weights_smem[...] = weights
        plgpu.commit_smem()
        weights, parts = weights_smem, [weights_smem.at[:, pl.ds(first, _ONES)] for first in firsts]
    for part in parts:
        plgpu.wgmma(totals, part, ones.T)
    plgpu.wgmma(values, weights, v)


def store(rows: Any, out: Any, values: Any, reference: Any, total: Any, dtype: Any) -> Any:
    """Begin to write a tile's partial results to `out`, by way of `rows` of shared memory; the unit of each row."""
    words, unit = packing.pack(values, dtype)
    rows.at[:, pl.ds(0, words.shape[1])][...] = words
    for k, statistic in enumerate((reference, total, unit), words.shape[1]):
        rows.at[:, k][...] = lax.bitcast_convert_type(statistic, jnp.int32)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(rows, out)
    return unit
