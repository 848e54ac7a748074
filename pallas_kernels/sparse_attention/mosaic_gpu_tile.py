"""What prefill attention on Hopper does with one tile: the 16 query heads of 4 pairs, and the keys of one page.

`mosaic_gpu_prefill` says which warpgroup takes which tile, and when.
"""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.hopper import DIM, GROUP, PAGE_SIZE
from pallas_kernels.mosaic import COLUMNS, TILING, folded, full, spread
from pallas_kernels.mosaic_inline import c32, equal, global_address, ptx, shared_address, thread
from pallas_kernels.sparse_attention import mosaic_gpu_partials as packing
from pallas_kernels.sparse_attention.mosaic_gpu_plan import LIMIT_BITS, TILE_PAIRS

ROWS = TILE_PAIRS * GROUP
VALUES = (ROWS, DIM)
_WGMMA = plgpu.Layout.WGMMA
# Weights that are added up at a time: shared memory has not room for as many ones as a page has keys.
_ONES = 64
ONES = (COLUMNS, _ONES)
TOTALS = (ROWS, COLUMNS)
# Of a word that says how many of a page's keys each pair of a tile sees, 0 to PAGE_SIZE.
SEEN_BITS = 8
ALL_SEEN = sum(PAGE_SIZE << (i * SEEN_BITS) for i in range(TILE_PAIRS)) - 2**32
# Set where some are seen, but not all.
PARTLY_SEEN = sum((PAGE_SIZE - 1) << (i * SEEN_BITS) for i in range(TILE_PAIRS))
# Of a warpgroup.
_THREADS = 128
# Where logits in base 2 are nothing but even numbers in float32.
_HUGE = 2.0**24


def first_row(slot: Any, dtype: Any) -> Any:
    """Where a tile's rows of results begin, in an array of such rows, to lie within a slot of the array of queries.

    At the slot's first multiple of the 128 bytes that the copy engine asks for.
    """
    row = 4 * packing.row_words_of(dtype)
    rows = 128 // math.gcd(128, row)
    last = slot * (ROWS * DIM * 2) + (rows * row - 1)
    # Rounded down, a kernel's quotient converts booleans to numbers, which takes long to lower: see `mosaic.cond`.
    return (last // (rows * row) if isinstance(last, int) else lax.div(last, jnp.int32(rows * row))) * rows


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


def masked(logits: Any, limits: Any) -> Any:
    """Without the keys behind the last one that each pair sees. limits: of the plan, LIMIT_BITS for each pair."""
    return _up_to(logits, _of_pairs(limits, LIMIT_BITS, logits.shape, _WGMMA))


def masked_from(logits: Any, seen: Any) -> Any:
    """Without the keys that each pair does not see. seen: how many it sees from the first one on, SEEN_BITS each."""
    return _up_to(logits, _of_pairs(seen, SEEN_BITS, logits.shape, _WGMMA) - 1)


def sees(seen: Any) -> Any:
    """For each row whether its pair sees anything, of a word as `masked_from` takes."""
    return _of_pairs(seen, SEEN_BITS, (ROWS,), _WGMMA.reduce(1)) > 0


def _of_pairs(word: Any, bits: int, shape: tuple[int, ...], layout: Any) -> Any:
    """Of each row's pair its bits of a word."""
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    return lax.shift_right_logical(word, lax.div(row, jnp.int32(GROUP)) * bits) & jnp.int32(2**bits - 1)


def _up_to(logits: Any, limit: Any) -> Any:
    """Without the keys behind a limit of each row, or behind none where it is negative."""
    key = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=_WGMMA)
    # A thread has the same two of each COLUMNS keys, so it compares constants with two numbers of its own.
    bits = jnp.int32(COLUMNS.bit_length() - 1)
    last = lax.shift_right_arithmetic(limit - (key & jnp.int32(COLUMNS - 1)), bits)
    return jnp.where(lax.shift_right_arithmetic(key, bits) <= last, logits, -jnp.inf)


def slope_and_reference(logits: Any, factor: float) -> tuple[Any, Any]:
    """For each row slope and reference: the logits * slope - reference, one instruction, go into exp2.

    factor: what makes them logits in base 2. The reference is the rounded product of the largest one, so that it weighs
    about 1; with a huge one the rounding would be all that there is. There the slope is a power of two, which rounds
    nothing: such logits are so far apart, or equal, that it does not matter by how much. It is not less than the
    factor, so that the order of references is that of the largest logits.
    """
    largest = folded(jnp.maximum, logits).max(axis=1)
    is_huge = jnp.abs(largest) > _HUGE / factor
    slope = jnp.where(is_huge, each(2.0 ** math.ceil(math.log2(factor))), each(factor))
    return slope, largest * slope


def multiply(weights: Any, v: Any, ones: Any, weights_smem: Any, values: Any, totals: Any) -> None:
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


def store(rows: Any, out: Any, values: Any, reference: Any, total: Any, dtype: Any, inline: bool) -> Any:
    """Begin to write a tile's partial results to `out`, by way of `rows` of shared memory; the unit of each row.

    inline: whether by instructions that the interpreter does not know.
    """
    words, unit = packing.pack(values, dtype)
    _begin(rows, out, words, packing.pack_statistics(reference, total, unit), inline)
    return unit


def store_nothing(rows: Any, out: Any, dtype: Any, inline: bool) -> None:
    """As `store`, what says that there is nothing, for unused slots to bring to the merge."""
    words = full((ROWS, packing.words_of(dtype)), 0, jnp.int32, _WGMMA)
    _begin(rows, out, words, packing.pack_statistics(each(packing.LOWEST), each(0.0), each(0.0)), inline)


def _begin(rows: Any, out: Any, words: Any, statistics: Any, inline: bool) -> None:
    rows.at[:, pl.ds(0, words.shape[1])][...] = words
    for k, word in enumerate(statistics, words.shape[1]):
        rows.at[:, k][...] = word
    plgpu.commit_smem()
    (_send if inline else plgpu.copy_smem_to_gmem)(rows, out)


def _send(rows: Any, out: Any) -> None:
    """Begin to copy `rows` to where they are the first to leave the L2 cache.

    Nobody reads them before the merge, by when there have been far more of them than it holds; queries come again.
    """
    num_bytes = math.prod(rows.shape) * 4

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def emit(_ctx, *refs):
        rows, out = refs
        is_first = equal(arith.andi(thread(), c32(_THREADS - 1)), 0)
        policy = ".reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"
        copy = "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [$1], [$2]"
        text = f"{{ {policy} @$0 {copy}, {num_bytes}, policy; @$0 cp.async.bulk.commit_group; }}"
        ptx([], [is_first, global_address(out), shared_address(rows)], text, "b,l,r")

    emit(rows, out)


def any_column(columns: Any, inline: bool) -> Any:
    """For each row what all of its COLUMNS hold. inline: as of `store`."""
    if not inline:
        return columns.max(axis=1)
    layout = _WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(_WGMMA,), return_type=plgpu.ShapeDtypeStruct((columns.shape[0],), columns.dtype, layout=layout)
    )
    def emit(_ctx, *arrays):
        [columns] = arrays
        # Each thread has two columns, and need not ask any other. Its registers are in the order of its rows.
        rows = mgpu.FragmentedArray.splat(arith.constant(columns.mlir_dtype, 0.0), columns.shape[:1], layout.to_mgpu())
        kind, first = rows.registers.flat[0].type, ir.DenseI64ArrayAttr.get([0])
        for i, pair in enumerate(columns.registers.flat):
            rows.registers.flat[i] = vector.broadcast(kind, vector.extract(pair, [], first))
        return rows

    return emit(columns)
