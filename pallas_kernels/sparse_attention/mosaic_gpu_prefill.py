"""Block-sparse attention of a prefill call on Hopper, pages outermost.

The CTAs take the chunks of a plan's tiles in turn, so that all of them are at about the same place of the plan at any
time: within one window, whose queries come again and again, out of the L2 cache. The page of a run is brought once for
a chunk, into a ring of two, by one warp; the queries of each tile by another. Three warpgroups take the tiles in turn:
4 pairs of 16 query heads are the 64 rows of a wgmma. Every pair leaves its partial result and the statistics of its
softmax, packed, to be merged afterwards.

What limits it on an H200 seems to be power rather than any one unit: the SMs' clock is well below its highest
meanwhile, and rises with what is left out. What leaves as much to do made nothing quicker, however it was arranged:
turns at the products, four warpgroups, two that have a product of one tile and the exponentials of another under way
at once, results that leave later, merging them meanwhile on SMs of its own or between the tiles. What leaves less to do
did: fewer instructions to pack and to mask, smaller results, and such as leave the L2 cache before the queries, which
come again. `mosaic_gpu_attempts` has what took less yet.
"""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import DIM, GROUP, NUM_SMS, PAGE_SIZE
from pallas_kernels.mosaic import cond, warp_when, when
from pallas_kernels.sparse_attention import mosaic_gpu_attempts as attempts
from pallas_kernels.sparse_attention import mosaic_gpu_partials as packing
from pallas_kernels.sparse_attention import mosaic_gpu_tile as tiles
from pallas_kernels.sparse_attention.mosaic_gpu_memory import PAGES, WARPGROUPS, Memory, assign, launch, slot_of
from pallas_kernels.sparse_attention.mosaic_gpu_plan import Plan, most_tiles
from pallas_kernels.sparse_attention.mosaic_gpu_tile import each


@dataclass(frozen=True)
class TuningConfig:
    """window: of the plan. chunk: tiles that a CTA takes at a time. ctas: one for each SM."""

    CANDIDATES: ClassVar = {"window": (2048, 4096, 8192), "chunk": (48, 96, 192)}

    window: int = 2048
    chunk: int = 48
    ctas: int = NUM_SMS

    def __post_init__(self) -> None:
        if self.ctas < 1:
            raise ValueError(f"ctas={self.ctas} must be at least 1")
        # A warpgroup looks two of its tiles ahead, into the next chunk at most.
        if self.chunk < 2 * WARPGROUPS or self.chunk % WARPGROUPS:
            raise ValueError(f"chunk={self.chunk} must be a multiple of {WARPGROUPS} from {2 * WARPGROUPS} on")
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")

    @classmethod
    def heuristic(cls, top_k: int, num_items: int) -> "TuningConfig":
        """For so many items that pairs may meet at: where they are many, a window leaves each but few tiles."""
        return cls() if 128 * num_items <= 2048 * top_k else cls(window=8192, chunk=192)


@functools.partial(jax.jit, static_argnames=("parts", "pairs", "spare_tiles", "scale", "config", "interpret"))
def attend_prefill(
    q,
    k,
    v,
    tails,
    plan: Plan,
    part,
    *,
    parts: int,
    pairs: int,
    spare_tiles: int,
    scale: float,
    config: TuningConfig,
    interpret: Any,
):
    """Partial results of one part of a plan, which has so many parts, of so many pairs at most.

    q [T, K * G, H]; k, v [P, K, S, H]; tails [B, K, S, H], the last page of each sequence without its unused slots.
    part: i32[1], so that one kernel serves them all.
    Returns i32[tiles, 4 * G, row words] as `mosaic_gpu_partials` says, from the part's first tile on. What belongs to
    no pair holds anything, but for the last tile, which says that there is nothing. Ahead of that one there is room for
    so many spare tiles.
    """
    max_tiles = plan.tile_run.shape[0]
    keys = plan.ends.shape[0] // parts
    out_tiles = most_tiles(pairs, keys) + spare_tiles + 1
    factor = scale * math.log2(math.e)
    dtype = q.dtype
    row_words = packing.row_words_of(dtype)
    inline = interpret is None

    def attend(
        q_gmem,
        k_gmem,
        v_gmem,
        tails_gmem,
        units_gmem,
        limits_gmem,
        tile_run_gmem,
        head_gmem,
        page_gmem,
        tail_gmem,
        ends_gmem,
        part_gmem,
        out_gmem,
        memory: Memory,
    ):
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        part = part_gmem[0] if parts > 1 else jnp.int32(0)  # reads that wait for one another are felt
        first_of_part = jnp.where(part > 0, ends_gmem[jnp.maximum(part * keys - 1, 0)], 0)
        num_tiles = ends_gmem[(part + 1) * keys - 1] - first_of_part
        # Rounds in which every CTA takes a chunk, and equal shares of what is left.
        round_size = jnp.int32(config.ctas * config.chunk)
        rounds, rest = lax.div(num_tiles, round_size), lax.rem(num_tiles, round_size)
        share = lax.div(rest + (config.ctas - 1), jnp.int32(config.ctas))

        def try_all(run):
            count = rounds * config.chunk + jnp.clip(rest - cta * share, 0, share)
            memory.attempts.until_within(run, count)

        def chunks_of(count):
            return lax.div(count + (config.chunk - 1), jnp.int32(config.chunk))

        def first_tile_of(chunk):
            """The number of the first tile of the CTA's chunk."""
            return first_of_part + chunk * round_size + cta * jnp.where(chunk < rounds, config.chunk, share)

        def tile_of(i):
            """The number of the CTA's tile i; of one behind the last, too, there is one."""
            chunk, within = lax.div(i, jnp.int32(config.chunk)), lax.rem(i, jnp.int32(config.chunk))
            return jnp.clip(first_tile_of(chunk) + within, 0, max_tiles - 1)

        def run_of(tile_run):
            return lax.shift_right_logical(tile_run, jnp.int32(1))

        def runs_of(chunk, count):
            """The first and the last run of the CTA's chunk, and 0 and -1 of one behind the last."""
            first = jnp.minimum(chunk * config.chunk, count)
            end = jnp.minimum(first + config.chunk, count)
            first_run, last_run = run_of(tile_run_gmem[tile_of(first)]), run_of(tile_run_gmem[tile_of(end - 1)])
            return jnp.where(end > first, first_run, 0), jnp.where(end > first, last_run, -1)

        def produce_queries(_, count):
            def units_of(i):
                tile = tile_of(i)
                return tuple(units[tile] for units in units_gmem)

            def step(i, units):
                # It comes from memory.
                following = units_of(i + 1)
                consumer, turn = lax.rem(i, jnp.int32(WARPGROUPS)), lax.div(i, jnp.int32(WARPGROUPS))
                memory.bring_queries(consumer, turn, q_gmem, units)
                return following

            lax.fori_loop(0, count, step, units_of(jnp.int32(0)))

        def produce_pages(_, count):
            def run_at(i):
                return run_of(tile_run_gmem[tile_of(i)])

            def step(i, carry):
                visits, last_run, run = carry
                # It comes from memory.
                following = run_at(i + 1)
                is_visit = jnp.logical_or(run != last_run, lax.rem(i, jnp.int32(config.chunk)) == 0)

                @warp_when(is_visit)
                def _():
                    head, page, tail = (of_tile[tile_of(i)] for of_tile in (head_gmem, page_gmem, tail_gmem))
                    memory.bring_page(visits, k_gmem, v_gmem, tails_gmem, page, head, tail)

                return visits + jnp.where(is_visit, jnp.int32(1), 0), run, following

            first = (jnp.int32(0), jnp.int32(-1), run_at(jnp.int32(0)))
            visits, *_ = lax.fori_loop(0, count, step, first)

            # The last page is never given back.
            memory.await_free_pages(jnp.maximum(visits - PAGES, 0), visits - 1)

        def multiply_all():
            per_chunk = config.chunk // WARPGROUPS

            def numbers_of(chunk):
                """The numbers of the warpgroup's first tiles in the chunk and in the next one."""
                return first_tile_of(chunk) + wg, first_tile_of(chunk + 1) + wg

            def tile_run_of(i, numbers):
                """Of the warpgroup's tile i from the first of a chunk on, or of the next; behind the last something."""
                number, next_number = numbers
                first = jnp.where(i < per_chunk, number, next_number - config.chunk)
                return tile_run_gmem[jnp.minimum(first + i * WARPGROUPS, max_tiles - 1)]

            rows_of = memory.rows_by_turn(wg)

            def go_on(visit, to):
                """Give pages back and wait for the next one, from one visit to another."""

                def step(visit, _):
                    for free, arrived in ((memory.k_free, memory.k_arrived), (memory.v_free, memory.v_arrived)):
                        plgpu.barrier_arrive(free.at[lax.rem(visit, jnp.int32(PAGES))])
                        plgpu.barrier_wait(arrived.at[lax.rem(visit + 1, jnp.int32(PAGES))])

                lax.fori_loop(visit, to, step, None)

            def from_largest(logits):
                return tiles.slope_and_reference(logits, factor)

            def from_nothing(_):
                return each(factor), each(0.0)

            def step(i, carry, first, numbers, ahead, own_count, by_largest):
                """Tile i, of a chunk from tile `first` on in which visits are so far ahead of runs."""
                visit, tile_run, next_tile_run, bounds = carry
                number = numbers[0] + (i - first) * WARPGROUPS
                this_visit = run_of(tile_run) + ahead
                go_on(visit, this_visit)
                page = lax.rem(this_visit, jnp.int32(PAGES))
                plgpu.barrier_wait(memory.q_arrived.at[slot_of(wg, i)])

                is_cut = (tile_run & jnp.int32(1)) > 0

                def multiply_k(acc):
                    plgpu.wgmma(acc, memory.queries.at[slot_of(wg, i)], memory.k.at[page].T)
                    # Comes from memory meanwhile: of the tile after the next, and what is seldom needed.
                    following = tile_run_of(i + 2 - first, numbers)
                    limits = cond(is_cut, lambda: limits_gmem[number], lambda: jnp.int32(0))
                    return acc[...], following, limits

                acc = plgpu.ACC((tiles.ROWS, PAGE_SIZE), jnp.float32)
                logits, following, limits = pl.run_scoped(multiply_k, acc)
                # Results leave from where queries came in: once its stores have been read, the other slot is free.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                @when(jnp.logical_and(i >= 1, i + 1 < own_count))
                def _():
                    plgpu.barrier_arrive(memory.q_free.at[slot_of(wg, i + 1)])

                logits = cond(is_cut, tiles.masked, lambda logits, _: logits, logits, limits)
                slope, reference = cond(by_largest, from_largest, from_nothing, logits)
                weights = jnp.exp2(logits * tiles.along(slope) - tiles.along(reference)).astype(dtype)

                def multiply_v(values, totals):
                    where = None if inline else memory.weights.at[wg]
                    tiles.multiply(weights, memory.v.at[page], memory.ones, where, values, totals)
                    return values[...], totals[...]

                accs = [plgpu.ACC(shape, jnp.float32) for shape in (tiles.VALUES, tiles.TOTALS)]
                values, totals = pl.run_scoped(multiply_v, *accs)
                total = tiles.any_column(totals, inline)
                rows = rows_of(i)
                out = out_gmem.at[number - first_of_part]
                unit = tiles.store(rows, out, values, reference, total, dtype, inline)
                return this_visit, next_tile_run, following, attempts.wider(bounds, total, unit)

            def consume(attempt, count):
                own_count = lax.div(count - wg + (WARPGROUPS - 1), jnp.int32(WARPGROUPS))
                of_attempt = functools.partial(step, own_count=own_count, by_largest=memory.attempts.is_last(attempt))

                def over_chunk(chunk, carry):
                    visits, (first_run, last_run), *state = carry
                    following = runs_of(chunk + 1, count)
                    first = chunk * per_chunk
                    end = jnp.minimum(first + per_chunk, own_count)
                    ahead = visits - first_run
                    of_chunk = functools.partial(of_attempt, first=first, numbers=numbers_of(chunk), ahead=ahead)
                    state = lax.fori_loop(first, end, of_chunk, tuple(state))
                    return ahead + last_run + 1, following, *state

                plgpu.barrier_wait(memory.k_arrived.at[0])
                plgpu.barrier_wait(memory.v_arrived.at[0])
                tile_runs = [tile_run_of(jnp.int32(i), numbers_of(jnp.int32(0))) for i in range(2)]
                start = (jnp.int32(0), runs_of(jnp.int32(0), count), jnp.int32(0), *tile_runs, attempts.bounds())
                visits, _, visit, _, _, bounds = lax.fori_loop(0, chunks_of(count), over_chunk, start)
                go_on(visit, visits - 1)
                # Nothing is brought, and nothing stored, where something is still on its way from.
                plgpu.wait_smem_to_gmem(0)
                memory.attempts.vote(attempt, wg, bounds, rows_of(0))

            memory.write_ones(wg)
            try_all(consume)

            # The last one has the fewest tiles.
            @when(jnp.logical_and(cta == config.ctas - 1, wg == 0))
            def _():
                tiles.store_nothing(memory.rows(0), out_gmem.at[out_tiles - 1], dtype, inline)
                plgpu.wait_smem_to_gmem(0)

        assign(wg, [functools.partial(try_all, task) for task in (produce_pages, produce_queries)], multiply_all)

    return launch(
        attend,
        out_type=jax.ShapeDtypeStruct((out_tiles, tiles.ROWS, row_words), jnp.int32),
        dtype=dtype,
        ctas=config.ctas,
        interpret=interpret,
    )(
        q.reshape(-1, GROUP, DIM),
        k,
        v,
        tails,
        plan.units,
        plan.limits,
        plan.tile_run,
        plan.head,
        plan.page,
        plan.tail,
        plan.ends,
        part,
    )
