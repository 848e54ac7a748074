"""Block scores of a prefill call on Hopper: largest dot product of each query with the keys of each page.

A CTA takes a window of rows of one sequence and a share of the blocks that they see. Two warpgroups of 128
(token, head) rows each multiply with the pages that a third one brings into a ring of shared memory. A
page's maxima go straight from registers to memory, one row of scores a page.
"""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import DIM, PAGE_SIZE
from pallas_kernels.mosaic import TILING

_WARPGROUPS = 2
_ROWS = 128
# (token, head) rows of a window, and what its first one must be a multiple of, as rows are copied in tiles.
WIDTH = _WARPGROUPS * _ROWS
ALIGNMENT = 8


@dataclass(frozen=True)
class TuningConfig:
    """shares: CTAs that a window's blocks are split over. stages: of the ring of pages, 32 KiB each."""

    CANDIDATES: ClassVar = {"shares": (1, 2, 3, 4, 6, 8), "stages": (3, 4)}

    shares: int = 4
    stages: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.stages <= 4:
            raise ValueError(f"stages={self.stages} must be 1 to 4")
        if self.shares < 1:
            raise ValueError(f"shares={self.shares} must be at least 1")

    @classmethod
    def heuristic(cls, num_windows: int) -> "TuningConfig":
        """Several CTAs for each SM, so that windows of unequal length even out."""
        return cls(shares=4 if num_windows < 512 else 2 if num_windows < 1024 else 1)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def score_prefill(
    index_q,
    index_k,
    block_table,
    sequence,
    first_row,
    first_position,
    blocks,
    *,
    config: TuningConfig,
    interpret: Any,
):
    """Scores f32[windows, M, WIDTH] of columns (token, head).

    sequence, first_row, first_position, blocks: i32[windows]; first_row * K is a multiple of ALIGNMENT.
    A block from blocks[w] on is left unwritten, and one that a row of the window does not see is -inf for it.
    """
    num_rows, num_heads, _ = index_q.shape
    num_pages = index_k.shape[0]
    num_windows = sequence.shape[0]
    parts, stages = config.shares, config.stages

    def score(
        q_gmem,
        k_gmem,
        table_gmem,
        sequence_gmem,
        row_gmem,
        position_gmem,
        blocks_gmem,
        out_gmem,
        q_smem,
        k_smem,
        q_barrier,
        k_barrier,
        free_barrier,
    ):
        wg = lax.axis_index("wg")
        # The later windows of a sequence see more: they start first.
        window = (num_windows - 1) - lax.axis_index("window")
        visible = blocks_gmem[window]
        part = lax.div(visible + (parts - 1), jnp.int32(parts))
        first_block = lax.axis_index("part") * part
        count = jnp.clip(visible - first_block, 0, part)

        @pl.when(wg == _WARPGROUPS)
        def _produce():
            plgpu.set_max_registers(40, action="decrease")
            sequence = sequence_gmem[window]

            def step(i, _):
                slot = lax.rem(i, jnp.int32(stages))

                @pl.when(i >= stages)
                def _():
                    plgpu.barrier_wait(free_barrier.at[slot])

                page = jnp.clip(table_gmem[sequence, first_block + i], 0, num_pages - 1)
                plgpu.copy_gmem_to_smem(k_gmem.at[page], k_smem.at[slot], k_barrier.at[slot])

            lax.fori_loop(0, count, step, None)

            # Every completion of a barrier has to be awaited.
            def drain(i, _):
                plgpu.barrier_wait(free_barrier.at[lax.rem(i, jnp.int32(stages))])

            lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, None)

        @pl.when(jnp.logical_and(wg < _WARPGROUPS, count > 0))
        def _consume():
            plgpu.set_max_registers(232, action="increase")
            first = pl.multiple_of(row_gmem[window] * num_heads + wg * _ROWS, ALIGNMENT)
            plgpu.copy_gmem_to_smem(q_gmem.at[pl.ds(first, _ROWS)], q_smem.at[wg], q_barrier.at[wg])
            position = position_gmem[window] + wg * (_ROWS // num_heads)
            plgpu.barrier_wait(q_barrier.at[wg])

            def step(i, _):
                slot = lax.rem(i, jnp.int32(stages))
                plgpu.barrier_wait(k_barrier.at[slot])

                def multiply(acc):
                    plgpu.wgmma(acc, q_smem.at[wg], k_smem.at[slot].T)
                    return acc[...]

                dots = pl.run_scoped(multiply, plgpu.ACC((_ROWS, PAGE_SIZE), jnp.float32))
                plgpu.barrier_arrive(free_barrier.at[slot])
                first_key = (first_block + i) * PAGE_SIZE

                def mask(dots):
                    row = plgpu.broadcasted_iota(jnp.int32, dots.shape, 0, layout=plgpu.Layout.WGMMA)
                    key = plgpu.broadcasted_iota(jnp.int32, dots.shape, 1, layout=plgpu.Layout.WGMMA)
                    seen = key + first_key <= position + lax.div(row, jnp.int32(num_heads))
                    return jnp.where(seen, dots, -jnp.inf)

                dots = lax.cond(first_key + (PAGE_SIZE - 1) > position, mask, lambda dots: dots, dots)
                out_gmem[window, first_block + i, pl.ds(wg * _ROWS, _ROWS)] = dots.max(axis=1)

            lax.fori_loop(0, count, step, None)

    dtype = index_k.dtype
    return plgpu.kernel(
        score,
        out_type=jax.ShapeDtypeStruct((num_windows, block_table.shape[1], WIDTH), jnp.float32),
        grid=(num_windows, parts),
        grid_names=("window", "part"),
        num_threads=_WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((_WARPGROUPS, _ROWS, DIM), dtype, transforms=TILING),
            plgpu.SMEM((stages, PAGE_SIZE, DIM), dtype, transforms=TILING),
            plgpu.Barrier(num_barriers=_WARPGROUPS),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=stages),
        ],
        **({} if interpret is None else {"interpret": interpret}),
    )(
        index_q.reshape(num_rows * num_heads, DIM),
        index_k,
        block_table,
        sequence,
        first_row,
        first_position,
        blocks,
    )
