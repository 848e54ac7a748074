"""What a CTA of prefill attention on Hopper has in shared memory, and the barriers by which its warps wait for it.

Three warpgroups multiply tiles: each has a ring of two for its queries, and all a ring of two for pages. A fourth one
brings what they need.
"""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import DIM, GROUP, PAGE_SIZE
from pallas_kernels.mosaic import FEW_ROWS, TILING, compiler_params, full, warp_when, when
from pallas_kernels.sparse_attention import mosaic_gpu_tile as tiles
from pallas_kernels.sparse_attention.mosaic_gpu_attempts import Attempts, attempts
from pallas_kernels.sparse_attention.mosaic_gpu_plan import TILE_PAIRS

WARPGROUPS = 3
# Pages in flight, and tiles of queries in flight for each warpgroup.
PAGES, TILES = 2, 2


class Memory(NamedTuple):
    """Shared memory and barriers. A slot of queries, which results leave from, is warpgroup * TILES + one of TILES."""

    queries_and_rows: Any
    k: Any
    v: Any
    q_arrived: Any
    k_arrived: Any
    v_arrived: Any
    k_free: Any
    v_free: Any
    q_free: Any
    ones: Any
    ones_written: Any
    weights: Any
    attempts: Attempts

    @property
    def queries(self) -> Any:
        """[slots, 4 * G, H]."""
        return self.queries_and_rows[0]

    def rows(self, first: Any) -> Any:
        """The rows of a tile's results from the first on, of `mosaic_gpu_tile.first_row`."""
        return self.queries_and_rows[1].at[pl.ds(first, tiles.ROWS)]

    def rows_by_turn(self, warpgroup: Any) -> Callable[[Any], Any]:
        """Where a warpgroup's results of each turn leave from."""
        # Found once: it takes a quotient.
        firsts = [tiles.first_row(warpgroup * TILES + i, self.queries.dtype) for i in range(TILES)]

        def rows_of(turn: Any) -> Any:
            first = firsts[turn] if isinstance(turn, int) else jnp.where(lax.rem(turn, jnp.int32(TILES)) == 0, *firsts)
            return self.rows(first)

        return rows_of

    def write_ones(self, warpgroup: Any) -> None:
        """One warpgroup does, and all that multiply wait for it."""

        @when(warpgroup == 0)
        def _():
            self.ones[...] = full(tiles.ONES, 1, self.ones.dtype, FEW_ROWS)
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.ones_written)

        plgpu.barrier_wait(self.ones_written)

    def bring_queries(self, warpgroup: Any, turn: Any, queries: Any, units: Sequence[Any]) -> None:
        """Begin to bring the queries [G, H] of a tile's units, a warpgroup's tile of that turn, once there is room."""
        slot = slot_of(warpgroup, turn)

        @warp_when(turn >= TILES)
        def _():
            plgpu.barrier_wait(self.q_free.at[slot])

        for i, unit in enumerate(units):
            where = self.queries.at[slot, pl.ds(i * GROUP, GROUP)]
            plgpu.copy_gmem_to_smem(queries.at[unit], where, self.q_arrived.at[slot])

    def bring_page(self, visit: Any, keys: Any, values: Any, ends: Any, page: Any, head: Any, tail: Any) -> None:
        """Begin to bring the page of a visit, once its place is free. tail: a sequence that ends in it, of `ends`."""
        slot = lax.rem(visit, jnp.int32(PAGES))

        @warp_when(visit >= PAGES)
        def _():
            plgpu.barrier_wait(self.k_free.at[slot])

        plgpu.copy_gmem_to_smem(keys.at[page, head], self.k.at[slot], self.k_arrived.at[slot])

        @warp_when(visit >= PAGES)
        def _():
            plgpu.barrier_wait(self.v_free.at[slot])

        @warp_when(tail < 0)
        def _():
            plgpu.copy_gmem_to_smem(values.at[page, head], self.v.at[slot], self.v_arrived.at[slot])

        @warp_when(tail >= 0)
        def _():
            plgpu.copy_gmem_to_smem(ends.at[tail, head], self.v.at[slot], self.v_arrived.at[slot])

    def await_free_pages(self, first: Any, end: Any) -> None:
        """Of visits that nobody waited for: every completion of a barrier has to be awaited."""

        def wait(visit, _):
            slot = lax.rem(visit, jnp.int32(PAGES))
            plgpu.barrier_wait(self.k_free.at[slot])
            plgpu.barrier_wait(self.v_free.at[slot])

        lax.fori_loop(first, end, wait, None)


def slot_of(warpgroup: Any, turn: Any) -> Any:
    """The slot of a warpgroup's tile of that turn."""
    return warpgroup * TILES + lax.rem(turn, jnp.int32(TILES))


def assign(warpgroup: Any, bring: Sequence[Callable[[], None]], multiply: Callable[[], None]) -> None:
    """What each warpgroup does: the last one brings, each task by a warp of its own, and leaves registers to others."""

    @when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(32, action="decrease")

        @pl.core_map(plgpu.WarpMesh(axis_name="warp"))
        def _():
            warp = lax.axis_index("warp")
            for number, task in enumerate(bring):
                warp_when(warp == number)(task)

    @when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(160, action="increase")
        multiply()


def launch(body: Callable[..., None], *, out_type: Any, dtype: Any, ctas: int, interpret: Any) -> Callable[..., Any]:
    """A kernel of so many CTAs, whose body is given Memory behind what it reads and writes."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=[_memory(dtype, inline=interpret is None)],
        # Without a barrier before and behind whatever is written: a warp writes where it alone has read.
        compiler_params=compiler_params(approx_math=True, reduction_scratch_bytes=0, unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )


def _memory(dtype: Any, *, inline: bool) -> Memory:
    """What `plgpu.kernel` is to allocate. inline: not for the interpreter, which needs some things otherwise.

    It takes a union as a whole for one or the other, not each slot for itself, and multiplies from shared memory only.
    """
    page = plgpu.SMEM((PAGES, PAGE_SIZE, DIM), dtype, transforms=TILING)
    queries_and_rows = tiles.queries_and_results(WARPGROUPS * TILES, dtype)
    weights = [] if inline else plgpu.SMEM((WARPGROUPS, tiles.ROWS, PAGE_SIZE), dtype, transforms=TILING)
    return Memory(
        queries_and_rows=plgpu.RefUnion(*queries_and_rows) if inline else queries_and_rows,
        k=page,
        v=page,
        q_arrived=plgpu.Barrier(num_arrivals=TILE_PAIRS, num_barriers=WARPGROUPS * TILES),
        k_arrived=plgpu.Barrier(num_barriers=PAGES),
        v_arrived=plgpu.Barrier(num_barriers=PAGES),
        k_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=PAGES),
        v_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=PAGES),
        q_free=plgpu.Barrier(num_barriers=WARPGROUPS * TILES),
        ones=plgpu.SMEM(tiles.ONES, dtype, transforms=TILING),
        ones_written=plgpu.Barrier(),
        weights=weights,
        attempts=attempts(dtype, WARPGROUPS),
    )
