"""Norm, rotation and cache write as one Pallas:Mosaic GPU kernel for Hopper.

A CTA takes one row's heads of one projection, up to 64 of them: a tile of shared memory whose rows are heads. The
caches are written in place.
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

from pallas_kernels import hopper
from pallas_kernels.dispatch import Implementation
from pallas_kernels.hopper import DIM

_TILE_HEADS = 64
# Channels that a register of the tile's layout holds side by side, over a row of lanes.
_CHANNELS = 8
_WGMMA = plgpu.Layout.WGMMA


def _supported(heads, cos, _sin, _pages, _slots, *, eps) -> str | None:
    dtypes = {str(array.dtype) for one in heads for array in one if array is not None}
    if len(dtypes) > 1 or not dtypes <= set(hopper.DTYPES):
        return f"the dtypes are {', '.join(sorted(dtypes))}, not one of {', '.join(hopper.DTYPES)}"
    for one in heads:
        if one.x.shape[2] != DIM:
            return f"a head dim is {one.x.shape[2]}, not {DIM}"
    if cos.shape[1] % _CHANNELS:
        return f"{cos.shape[1]} pairs of channels are rotated, not a multiple of {_CHANNELS}"
    return hopper.why_not_here()


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def _run(heads, cos, sin, pages, slots, *, eps: float, interpret: Any = None):
    num_rows, half = cos.shape
    dtype = heads[0].x.dtype
    caches = [jax.new_ref(one.cache) for one in heads if one.cache is not None]
    norms = [one.norm for one in heads if one.norm is not None]
    # Side by side, as one matmul for all of them may have made them: then this is no operation, if the heads are flat.
    x = jnp.concatenate([one.x.reshape(num_rows, -1) for one in heads], axis=1).reshape(num_rows, -1, DIM)
    before = [sum(one.x.shape[1] for one in heads[:which]) for which in range(len(heads))]
    # (which of the heads, first head, how many) of each CTA of a row.
    tiles = [
        (which, first, min(_TILE_HEADS, one.x.shape[1] - first))
        for which, one in enumerate(heads)
        for first in range(0, one.x.shape[1], _TILE_HEADS)
    ]

    def write(x_gmem, *refs):
        given = iter(refs)
        norm_gmem = [None if one.norm is None else next(given) for one in heads]
        cos_gmem, sin_gmem, pages_gmem, slots_gmem = (next(given) for _ in range(4))
        cache_gmem = [None if one.cache is None else next(given) for one in heads]
        out_gmem = [next(given) if one.cache is None else None for one in heads]
        x_smem, *parts_smem, norm_smem, barrier = given
        row, tile = lax.axis_index("row"), lax.axis_index("tile")
        page, slot = pages_gmem[row], slots_gmem[row]

        def store(source, which, first, count, channels):
            if cache_gmem[which] is None:
                plgpu.copy_smem_to_gmem(source, out_gmem[which].at[row, pl.ds(first, count), channels])
                return

            @pl.when(jnp.logical_and(page >= 0, page < heads[which].cache.shape[0]))
            def _():
                plgpu.copy_smem_to_gmem(source, cache_gmem[which].at[page, pl.ds(first, count), slot, channels])

        has_norm = jnp.bool_(False)
        for number, (which, first, count) in enumerate(tiles):
            if norm_gmem[which] is not None:
                has_norm = jnp.logical_or(has_norm, tile == number)

            @pl.when(tile == number)
            def _(which=which, first=first, count=count):
                source = x_gmem.at[row, pl.ds(before[which] + first, count)]
                plgpu.copy_gmem_to_smem(source, x_smem.at[pl.ds(0, count)], barrier)
                norm = norm_gmem[which]
                # Every tile's barrier sees two copies: without a norm, of something that nobody looks at.
                norm = x_gmem.at[row, 0] if norm is None else norm
                plgpu.copy_gmem_to_smem(norm, norm_smem, barrier)

        by_channel = _WGMMA.reduce(0)
        # They arrive while the copies do.
        cosine, sine = (plgpu.load(ref.at[row], layout=by_channel, optimized=False) for ref in (cos_gmem, sin_gmem))
        plgpu.barrier_wait(barrier)

        @pl.when(has_norm)
        def _():
            def spread(vector, width):
                return lax.broadcast_in_dim(vector, (_TILE_HEADS, width), [1])

            x = plgpu.load(x_smem, layout=_WGMMA, optimized=False).astype(jnp.float32)
            squares = jnp.sum(x * x, axis=1)
            factor = lax.rsqrt(squares * (1.0 / DIM) + eps)
            weight = 1.0 + plgpu.load(norm_smem, layout=by_channel).astype(jnp.float32)
            x = x * lax.broadcast_in_dim(factor, x.shape, [0]) * spread(weight, DIM)
            # As far as two operations would round.
            x = x.astype(dtype).astype(jnp.float32)
            cos, sin = spread(cosine, half), spread(sine, half)
            x1, x2 = x[:, :half], x[:, half : 2 * half]
            parts = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]
            if 2 * half < DIM:
                parts.append(x[:, 2 * half :])
            for part_smem, part in zip(parts_smem, parts, strict=True):
                part_smem[...] = part.astype(dtype)

        plgpu.commit_smem()
        for number, (which, first, count) in enumerate(tiles):

            @pl.when(tile == number)
            def _(which=which, first=first, count=count):
                if heads[which].norm is None:
                    store(x_smem.at[pl.ds(0, count)], which, first, count, pl.ds(0, DIM))
                    return
                for part_smem, start in zip(parts_smem, (0, half, 2 * half), strict=False):
                    channels = pl.ds(start, part_smem.shape[1])
                    store(part_smem.at[pl.ds(0, count)], which, first, count, channels)

        plgpu.wait_smem_to_gmem(0)

    outs = plgpu.kernel(
        write,
        out_type=[jax.ShapeDtypeStruct(one.x.shape, dtype) for one in heads if one.cache is None],
        grid=(num_rows, len(tiles)),
        grid_names=("row", "tile"),
        scratch_types=[
            plgpu.SMEM((_TILE_HEADS, DIM), dtype),
            # One for each part of the channels: Mosaic chooses the swizzle of what has no transforms, and stores
            # wrongly into a slice that is not aligned with it.
            *(plgpu.SMEM((_TILE_HEADS, width), dtype) for width in (half, half, DIM - 2 * half) if width),
            plgpu.SMEM((DIM,), dtype),
            plgpu.Barrier(num_arrivals=2),
        ],
        **({} if interpret is None else {"interpret": interpret}),
    )(x, *norms, cos, sin, pages, slots, *caches)
    outs, written = iter(outs), iter(caches)
    return [next(outs) if one.cache is None else jax.freeze(next(written)) for one in heads]


norm_rope_cache = Implementation(_supported, _run)
