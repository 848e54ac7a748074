"""The skinny matmul as a Pallas:Mosaic GPU kernel for Hopper.

A CTA takes 64 channels of one of the matrices, and walks over the channels that are contracted, or over a part of
them: then the CTAs of a cluster, one for each part, add what they have. The product is turned round, channels x rows,
so that the few rows are the narrow side of a wgmma, of which the least is 8. As a rule all CTAs run at once, and read
equally much, so that memory is busy to the end.
"""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, mosaic, tuned
from pallas_kernels.derivatives import with_derivative_of
from pallas_kernels.dispatch import Implementation
from pallas_kernels.skinny_matmul import reference

# Channels out of a CTA: the least rows of a wgmma. Channels in of a step.
CHANNELS, DEPTHS = 64, (256, 128)
MOST_ROWS = 64
_WGMMA = plgpu.Layout.WGMMA
# Shared memory of a CTA, less what results take.
_RING_BYTES = 200 * 1024


@dataclass(frozen=True)
class TuningConfig:
    """parts: CTAs that share 64 channels out. depth: channels in of a step. stages: of the ring of steps."""

    CANDIDATES: ClassVar = {"parts": (1, 2, 4), "stages": (2, 3, 4), "depth": (128, 256)}

    parts: int
    stages: int
    depth: int

    def __post_init__(self) -> None:
        if not 1 <= self.parts <= hopper.MOST_CLUSTERED:
            raise ValueError(f"parts={self.parts} must be 1 to {hopper.MOST_CLUSTERED}")
        if self.stages < 1:
            raise ValueError(f"stages={self.stages} must be at least 1")
        if self.depth not in DEPTHS:
            raise ValueError(f"depth={self.depth} must be one of {', '.join(map(str, DEPTHS))}")

    @classmethod
    def heuristic(cls, num_rows: int, channels: int) -> "TuningConfig":
        """For products of so many rows and channels out.

        No more parts than leave each CTA an SM of its own, and about as many bytes on their way to an SM however many
        CTAs share it.
        """
        tiles, parts = channels // CHANNELS, 1
        while 2 * parts * tiles <= hopper.NUM_SMS and 2 * parts <= hopper.MOST_CLUSTERED:
            parts *= 2
        if tiles <= hopper.NUM_SMS:
            return cls(parts, 4, 256 if num_rows <= MOST_ROWS // 2 else 128)
        if tiles <= 2 * hopper.NUM_SMS and num_rows <= MOST_ROWS // 2:
            return cls(parts, 2, 256)
        return cls(parts, 3, 128)

    def fitted(self, num_rows: int, channels_in: int) -> "TuningConfig":
        """With steps that divide so many channels in, and find room: what was tuned serves a bucket of sizes."""
        depth = next(depth for depth in DEPTHS if depth <= self.depth and channels_in % depth == 0)
        width = hopper.round_up(num_rows, mosaic.COLUMNS)
        step = 2 * depth * (CHANNELS + width * (1 if num_rows == width else 2))
        return replace(self, stages=min(self.stages, _RING_BYTES // step), depth=depth)


def _supported(rows, *matrices) -> str | None:
    if str(rows.dtype) not in hopper.DTYPES:
        return f"the dtype is {rows.dtype}, not one of {', '.join(hopper.DTYPES)}"
    if rows.shape[0] > MOST_ROWS:
        return f"there are {rows.shape[0]} rows, more than {MOST_ROWS}"
    if rows.shape[1] % DEPTHS[-1]:
        return f"{rows.shape[1]} channels go in, not a multiple of {DEPTHS[-1]}"
    for matrix in matrices:
        if matrix.shape[0] % CHANNELS:
            return f"{matrix.shape[0]} channels come out, not a multiple of {CHANNELS}"
    return hopper.why_not_here()


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def multiply(rows, *matrices, config: TuningConfig, interpret: Any = None):
    """Products [T, O] of rows [T, I] with each of the matrices [O, I], side by side."""
    num_rows, channels_in = rows.shape
    dtype = rows.dtype
    width = hopper.round_up(num_rows, mosaic.COLUMNS)
    depth = config.depth
    steps = channels_in // depth
    parts = min(config.parts, steps)
    stages = min(config.stages, -(-steps // parts))
    # Of each matrix its first tile; and how many there are.
    *first_tiles, num_tiles = itertools.accumulate((matrix.shape[0] // CHANNELS for matrix in matrices), initial=0)

    def multiply_rows(rows_gmem, *refs):
        matrices_gmem, (out_gmem, *refs) = refs[: len(matrices)], refs[len(matrices) :]
        exchange_gmem, refs = (refs[0], refs[1:]) if parts > 1 and interpret is not None else (None, refs)
        matrix_smem, rows_smem, out_smem, barrier, *refs = refs
        narrow_smem, refs = (refs[0], refs[1:]) if num_rows < width else (None, refs)
        tile, part = lax.axis_index("tile"), lax.axis_index("part") if parts > 1 else jnp.int32(0)
        first = lax.div(part * steps, jnp.int32(parts))
        count = lax.div((part + 1) * steps, jnp.int32(parts)) - first
        which = sum(((tile >= begin).astype(jnp.int32) for begin in first_tiles[1:]), start=jnp.int32(0))

        def load(i):
            slot = lax.rem(i, jnp.int32(stages))
            channels = pl.ds((first + i) * depth, depth)

            def load_matrix(number):
                where = pl.ds((tile - first_tiles[number]) * CHANNELS, CHANNELS)
                source = matrices_gmem[number].at[where, channels]
                plgpu.copy_gmem_to_smem(source, matrix_smem.at[slot], barrier.at[slot])

            loads = [functools.partial(load_matrix, number) for number in range(len(matrices))]
            lax.switch(which, loads) if len(loads) > 1 else loads[0]()
            where = rows_smem.at[slot] if narrow_smem is None else narrow_smem.at[slot, pl.ds(0, num_rows)]
            plgpu.copy_gmem_to_smem(rows_gmem.at[:, channels], where, barrier.at[slot])

        for i in range(stages):
            mosaic.when(i < count)(functools.partial(load, jnp.int32(i)))

        def product(acc):
            def step(i, _):
                slot = lax.rem(i, jnp.int32(stages))
                plgpu.barrier_wait(barrier.at[slot])
                if narrow_smem is not None:
                    # The rows beyond hold anything, and no row meets another.
                    rows_smem.at[slot][...] = mosaic.load(narrow_smem.at[slot], mosaic.FEW_ROWS)
                    plgpu.commit_smem()
                plgpu.wgmma(acc, matrix_smem.at[slot], rows_smem.at[slot].T)
                plgpu.wgmma_wait(0)

                @mosaic.when(i + stages < count)
                def _():
                    plgpu.commit_smem()  # every warp has multiplied
                    load(i + stages)

            lax.fori_loop(0, count, step, None)
            return acc[...]

        def store(acc):
            column = plgpu.broadcasted_iota(jnp.int32, (CHANNELS, mosaic.COLUMNS), 1, layout=_WGMMA)
            for row in range(num_rows):
                first = row // mosaic.COLUMNS * mosaic.COLUMNS
                columns = acc[:, first : first + mosaic.COLUMNS]
                channels = jnp.where(column == row - first, columns, jnp.zeros_like(columns)).sum(axis=1)
                out_smem.at[row][...] = channels.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[:, pl.ds(tile * CHANNELS, CHANNELS)])
            plgpu.wait_smem_to_gmem(0)

        acc = pl.run_scoped(product, plgpu.ACC((CHANNELS, width), jnp.float32))
        if parts == 1:
            store(acc)
            return
        if exchange_gmem is None:
            own_smem, cluster_barrier = refs
            of_parts = [plgpu.cluster_ref(own_smem, {"part": jnp.int32(i)}) for i in range(parts)]
        else:
            (cluster_barrier,) = refs
            own_smem, of_parts = exchange_gmem.at[tile, part], [exchange_gmem.at[tile, i] for i in range(parts)]

        own_smem[...] = acc
        mosaic.meet(cluster_barrier)

        @mosaic.when(part == 0)
        def _():
            store(functools.reduce(jnp.add, [mosaic.load(ref, _WGMMA) for ref in of_parts]))

        # Nobody leaves before what it has was taken.
        mosaic.meet(cluster_barrier)

    out = [jax.ShapeDtypeStruct((num_rows, num_tiles * CHANNELS), dtype)]
    scratch = [
        plgpu.SMEM((stages, CHANNELS, depth), dtype, transforms=mosaic.TILING),
        plgpu.SMEM((stages, width, depth), dtype, transforms=mosaic.TILING),
        plgpu.SMEM((num_rows, CHANNELS), dtype),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        # Fewer rows than a tile has cannot be copied into one, but have to be rearranged.
        *([plgpu.SMEM((stages, width, depth), dtype)] if num_rows < width else []),
    ]
    cluster = {}
    if parts > 1:
        cluster = {"cluster": (parts,), "cluster_names": ("part",)}
        if interpret is None:
            scratch.append(plgpu.SMEM((CHANNELS, width), jnp.float32))
        else:  # it knows clusters, but not the shared memory of others
            out.append(jax.ShapeDtypeStruct((num_tiles, parts, CHANNELS, width), jnp.float32))
        scratch.append(plgpu.ClusterBarrier(collective_axes=("part",)))
    product, *_ = plgpu.kernel(
        multiply_rows,
        out_type=out,
        grid=(num_tiles,),
        grid_names=("tile",),
        **cluster,
        scratch_types=scratch,
        # Without a barrier before and behind whatever is written.
        compiler_params=mosaic.compiler_params(unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(rows, *matrices)
    return product


def _run(rows, *matrices):
    channels = [matrix.shape[0] for matrix in matrices]
    sizes = {"rows": rows.shape[0], "depth": rows.shape[1], "channels": sum(channels)}
    config = tuned.config("skinny_matmul", TuningConfig.heuristic(rows.shape[0], sum(channels)), **sizes)
    product = multiply(rows, *matrices, config=config.fitted(*rows.shape))
    return jnp.split(product, list(itertools.accumulate(channels))[:-1], axis=1)


skinny_matmul = Implementation(_supported, with_derivative_of(reference.skinny_matmul.run, _run))
