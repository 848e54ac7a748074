"""Merge of the shares of a decode call on Hopper: a weighted mean over the shares of each query head's blocks.

A CTA takes one query head of one row. Shares are the rows of a tile of shared memory, 64 at a time, so that the mean
is a sum down its columns.
"""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import DIM

# Shares of a tile: statistics have room for whole ones.
TILE = 64
_WGMMA = plgpu.Layout.WGMMA
_LOWEST = float(jnp.finfo(jnp.float32).min)


@functools.partial(jax.jit, static_argnames=("group", "factor", "interpret"))
def merge_decode(partials, stats, *, group: int, factor: float, interpret: Any):
    """Results [T, K, group, H] from partial ones [T, K, shares, 2, G, H], each the sum of two numbers.

    stats: f32[T, K, shares rounded up to TILE, 2, G], the largest logit of a share and the sum of its weights,
    2^((logit - largest) * factor). Behind the shares they may hold anything.
    """
    num_rows, kv_heads, shares, _, _, _ = partials.shape
    dtype = partials.dtype

    def merge(partials_gmem, stats_gmem, out_gmem, partials_smem, out_smem, barrier):
        row, head, query = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("query")
        # The only layout: it settles the others, and the compiler would try out each that it is told.
        share_of_row = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=_WGMMA.reduce(1))

        def load(first):
            count = min(TILE, shares - first)
            for half in range(2):
                where = partials_gmem.at[row, head, pl.ds(first, count), half, query]
                plgpu.copy_gmem_to_smem(where, partials_smem.at[half, pl.ds(0, count)], barrier)

        def stat(first, which, otherwise):
            stats = plgpu.load(stats_gmem.at[row, head, pl.ds(first, TILE), which, query], optimized=False)
            return jnp.where(share_of_row < shares - first, stats, otherwise)

        largest, total = jnp.float32(_LOWEST), jnp.float32(0)
        acc = jnp.zeros((DIM,), jnp.float32)
        for first in range(0, shares, TILE):
            load(first)
            maxima = stat(first, 0, _LOWEST)
            new_largest = jnp.maximum(largest, maxima.max(axis=0))
            decay = jnp.exp2((largest - new_largest) * factor)
            weights = stat(first, 1, 0.0) * jnp.exp2((maxima - new_largest) * factor)
            plgpu.barrier_wait(barrier)
            high, low = (plgpu.load(partials_smem.at[half], optimized=False).astype(jnp.float32) for half in range(2))
            spread = lax.broadcast_in_dim(weights, high.shape, [0])
            # Behind the shares the tile holds anything, also a NaN.
            products = jnp.where(spread > 0, (high + low) * spread, 0.0)
            acc = acc * decay + products.sum(axis=0)
            total = total * decay + weights.sum(axis=0)
            largest = new_largest
            if first + TILE < shares:
                # The reads have to be over before the copy engine writes there again.
                plgpu.commit_smem()
        inverse = jnp.where(total > 0, 1.0 / total, 0.0)
        out_smem[...] = (acc * inverse).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[row, head, query])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        merge,
        out_type=jax.ShapeDtypeStruct((num_rows, kv_heads, group, DIM), dtype),
        grid=(num_rows, kv_heads, group),
        grid_names=("row", "head", "query"),
        scratch_types=[
            plgpu.SMEM((2, TILE, DIM), dtype),
            plgpu.SMEM((DIM,), dtype),
            plgpu.Barrier(num_arrivals=2),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(partials, stats)
