"""Block scores of a decode call on Hopper: largest dot product of each query with the keys of each page.

One CTA scores one page. The product is turned round, keys x queries, so that the few queries (tokens x heads) pad the
narrow side of the wgmma, of which the least is 8, instead of the 64 rows. An SM holds five pages at a time: on an H200
that is as quick or quicker than CTAs that walk over several, a few at a time (1 x 128 K 9.8 us and 10.2 with 2 of 4).
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

from pallas_kernels import mosaic
from pallas_kernels.hopper import DIM, PAGE_SIZE, round_up
from pallas_kernels.index_topk.shares import Shares

# A lane has a column; all warps and four lanes have the same.
_BY_COLUMN = plgpu.Layout.TILED(plgpu.Tiling(((8,), (1,))), (plgpu.Replicated(4),), (plgpu.Replicated(4), -2), -1)


@functools.partial(jax.jit, static_argnames=("shares", "num_blocks", "interpret"))
def score_decode(index_q, index_k, block_table, seq_lens, share, *, shares: Shares, num_blocks: int, interpret: Any):
    """Scores f32[B, W, num_blocks] of a share's blocks for columns (token, head), W = Q * K rounded up to 8.

    share: i32[1]. num_blocks: shares.width or more. A block that no query of the sequence sees, and the columns beyond
    Q * K, are left unwritten or hold anything; a block that one query sees and another does not has -inf for the
    latter.
    """
    num_rows, num_heads, _ = index_q.shape
    num_sequences = block_table.shape[0]
    num_pages = index_k.shape[0]
    num_queries = num_rows // num_sequences
    columns = num_queries * num_heads
    width = round_up(columns, 8)
    queries = index_q.reshape(num_sequences, columns, DIM)

    def score(
        q_gmem,
        k_gmem,
        table_gmem,
        lens_gmem,
        share_gmem,
        out_gmem,
        q_smem,
        k_smem,
        out_smem,
        q_barrier,
        k_barrier,
        *narrow_smem,
    ):
        share = shares.of(share_gmem)
        sequence, number = lax.axis_index("sequence"), lax.axis_index("block")
        length = lens_gmem[sequence]
        visible = jnp.minimum(lax.div(length + (PAGE_SIZE - 1), jnp.int32(PAGE_SIZE)), shares.table_width)
        count = shares.count(visible, share)
        block = jnp.minimum(shares.block(number, share), shares.table_width - 1)
        page = jnp.clip(table_gmem[sequence, block], 0, num_pages - 1)
        # Else the compiler reads it behind the condition below, which waits for the length.
        count, page = lax.optimization_barrier((count, page))

        @mosaic.when(number < count)
        def _():
            # Queries first, which else would come behind the keys, and have to be rearranged meanwhile.
            q_from_gmem = narrow_smem[0].at[pl.ds(0, columns)] if narrow_smem else q_smem
            plgpu.copy_gmem_to_smem(q_gmem.at[sequence], q_from_gmem, q_barrier)
            plgpu.copy_gmem_to_smem(k_gmem.at[page], k_smem, k_barrier)
            plgpu.barrier_wait(q_barrier)
            for ref in narrow_smem:
                # The columns beyond hold anything, and no column meets another.
                q_smem[...] = mosaic.load(ref, mosaic.FEW_ROWS)
                plgpu.commit_smem()
            plgpu.barrier_wait(k_barrier)

            def multiply(acc):
                plgpu.wgmma(acc, k_smem, q_smem.T)
                return acc[...]

            dots = pl.run_scoped(multiply, plgpu.ACC((PAGE_SIZE, width), jnp.float32))
            # The first query sees the least; its position decides whether anything has to be masked.
            first_key, first_position = block * PAGE_SIZE, length - num_queries

            def mask(dots):
                layout = plgpu.Layout.WGMMA
                key = plgpu.broadcasted_iota(jnp.int32, (PAGE_SIZE, width), 0, layout=layout)
                column = plgpu.broadcasted_iota(jnp.int32, (PAGE_SIZE, width), 1, layout=layout)
                seen = key + first_key <= first_position + lax.div(column, jnp.int32(num_heads))
                return jnp.where(seen, dots, -jnp.inf)

            dots = mosaic.cond(first_key + (PAGE_SIZE - 1) > first_position, mask, lambda dots: dots, dots)
            # A column's neighbour is as far away as there are blocks, but a thread has pairs of neighbours.
            out_smem[...] = dots.max(axis=0)
            plgpu.commit_smem()
            out_gmem[sequence, :, number] = mosaic.load(out_smem, _BY_COLUMN)

    dtype = index_k.dtype
    return plgpu.kernel(
        score,
        out_type=jax.ShapeDtypeStruct((num_sequences, width, num_blocks), jnp.float32),
        grid=(num_sequences, shares.width),
        grid_names=("sequence", "block"),
        scratch_types=[
            plgpu.SMEM((width, DIM), dtype, transforms=mosaic.TILING),
            plgpu.SMEM((PAGE_SIZE, DIM), dtype, transforms=mosaic.TILING),
            plgpu.SMEM((width,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(),
            # Fewer rows than a tile has cannot be copied into one, but have to be rearranged.
            *([plgpu.SMEM((width, DIM), dtype)] if width > columns else []),
        ],
        # Without a barrier before and behind whatever is written.
        compiler_params=mosaic.compiler_params(unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(queries, index_k, block_table, seq_lens, share)
