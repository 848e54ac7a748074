"""Block scores of a decode call on Hopper: largest dot product of each query with the keys of each page.

One CTA scores a few pages of one sequence. The product is turned round, keys x queries, so that the few
queries (tokens x heads) pad the narrow side of the wgmma, of which the least is 8, instead of the 64 rows.
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

from pallas_kernels import mosaic
from pallas_kernels.hopper import DIM, PAGE_SIZE, round_up
from pallas_kernels.index_topk.shares import Shares


@dataclass(frozen=True)
class TuningConfig:
    """pages: scored by a CTA. stages: of the ring of pages, 32 KiB each; several CTAs share an SM."""

    CANDIDATES: ClassVar = {"pages": (1, 2, 4), "stages": (1, 2)}

    pages: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.stages <= 6:
            raise ValueError(f"stages={self.stages} must be 1 to 6")
        if self.pages not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"pages={self.pages} must be a power of two up to 32")
        if self.stages > self.pages:
            raise ValueError(f"stages={self.stages} must be at most pages={self.pages}")

    @classmethod
    def heuristic(cls, num_entries: int) -> "TuningConfig":
        """For a table of so many entries: as many pages a CTA as leave work for every SM."""
        return cls(pages=1, stages=1) if num_entries <= 512 else cls()


@functools.partial(jax.jit, static_argnames=("shares", "num_blocks", "config", "interpret"))
def score_decode(
    index_q,
    index_k,
    block_table,
    seq_lens,
    share,
    *,
    shares: Shares,
    num_blocks: int,
    config: TuningConfig,
    interpret: Any,
):
    """Scores f32[B, num_blocks, W] of a share's blocks for columns (token, head), W = Q * K rounded up to 8.

    share: i32[1]. num_blocks: shares.width rounded up by the caller, a multiple of config.pages. A block that no
    query of the sequence sees, and the columns beyond Q * K, are left unwritten or hold anything; a block that one
    query sees and another does not has -inf for the latter.
    """
    num_rows, num_heads, _ = index_q.shape
    num_sequences = block_table.shape[0]
    num_pages = index_k.shape[0]
    num_queries = num_rows // num_sequences
    columns = num_queries * num_heads
    width = round_up(columns, 8)
    queries = index_q.reshape(num_sequences, columns, DIM)
    stages = config.stages

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
        sequence, chunk = lax.axis_index("sequence"), lax.axis_index("chunk")
        length = lens_gmem[sequence]
        first_block = chunk * config.pages
        visible = jnp.minimum(lax.div(length + (PAGE_SIZE - 1), jnp.int32(PAGE_SIZE)), shares.table_width)
        count = jnp.clip(shares.count(visible, share) - first_block, 0, config.pages)

        def page_of(i):
            """Read before anybody knows whether there is such a page: it takes as long as the page's first bytes."""
            block = jnp.minimum(shares.block(first_block + i, share), shares.table_width - 1)
            return jnp.clip(table_gmem[sequence, block], 0, num_pages - 1)

        def load(page, slot):
            plgpu.copy_gmem_to_smem(k_gmem.at[page], k_smem.at[slot], k_barrier.at[slot])

        first_pages = [page_of(jnp.int32(i)) for i in range(stages + 1)]
        # Else the compiler reads them behind the condition below, which waits for the length.
        count, *first_pages = lax.optimization_barrier((count, *first_pages))

        def step(i, page):
            slot = lax.rem(i, jnp.int32(stages))
            plgpu.barrier_wait(k_barrier.at[slot])

            def multiply(acc):
                plgpu.wgmma(acc, k_smem.at[slot], q_smem.T)
                return acc[...]

            dots = pl.run_scoped(multiply, plgpu.ACC((PAGE_SIZE, width), jnp.float32))

            @mosaic.when(i + stages < count)
            def _():
                plgpu.commit_smem()  # every warp has read the page
                load(page, slot)

            page = page_of(i + stages + 1)
            first_key = shares.block(first_block + i, share) * PAGE_SIZE
            # The first query sees the least; its position decides whether anything has to be masked.
            first_position = length - num_queries

            def mask(dots):
                layout = plgpu.Layout.WGMMA
                key = plgpu.broadcasted_iota(jnp.int32, (PAGE_SIZE, width), 0, layout=layout)
                column = plgpu.broadcasted_iota(jnp.int32, (PAGE_SIZE, width), 1, layout=layout)
                seen = key + first_key <= first_position + lax.div(column, jnp.int32(num_heads))
                return jnp.where(seen, dots, -jnp.inf)

            dots = mosaic.cond(first_key + (PAGE_SIZE - 1) > first_position, mask, lambda dots: dots, dots)
            out_smem[i] = dots.max(axis=0)
            return page

        @mosaic.when(count > 0)
        def _():
            q_from_gmem = narrow_smem[0].at[pl.ds(0, columns)] if narrow_smem else q_smem
            plgpu.copy_gmem_to_smem(q_gmem.at[sequence], q_from_gmem, q_barrier)
            for i in range(stages):

                @mosaic.when(i < count)
                def _(i=i):
                    load(first_pages[i], i)

            plgpu.barrier_wait(q_barrier)
            for ref in narrow_smem:
                # The columns beyond hold anything, and no column meets another.
                q_smem[...] = mosaic.load(ref, mosaic.FEW_ROWS)
                plgpu.commit_smem()
            lax.fori_loop(0, count, step, first_pages[stages])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[sequence, pl.ds(first_block, config.pages)])
            plgpu.wait_smem_to_gmem(0)

    dtype = index_k.dtype
    return plgpu.kernel(
        score,
        out_type=jax.ShapeDtypeStruct((num_sequences, num_blocks, width), jnp.float32),
        grid=(num_sequences, num_blocks // config.pages),
        grid_names=("sequence", "chunk"),
        scratch_types=[
            plgpu.SMEM((width, DIM), dtype, transforms=mosaic.TILING),
            plgpu.SMEM((stages, PAGE_SIZE, DIM), dtype, transforms=mosaic.TILING),
            plgpu.SMEM((config.pages, width), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=stages),
            # Fewer rows than a tile has cannot be copied into one, but have to be rearranged.
            *([plgpu.SMEM((width, DIM), dtype)] if width > columns else []),
        ],
        # Without a barrier before and behind whatever is written.
        compiler_params=mosaic.compiler_params(unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(queries, index_k, block_table, seq_lens, share)
