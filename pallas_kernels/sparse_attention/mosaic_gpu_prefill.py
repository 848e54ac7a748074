"""Block-sparse attention of a prefill call on Hopper, pages outermost.

The CTAs take the chunks of a plan's tiles in turn, so that all of them are at about the same place of the plan at any
time: within one window, whose queries come again and again, out of the L2 cache. The page of a run is brought once for
a chunk, into a ring of two, by the first of four warpgroups. They take the tiles in turn: 4 pairs of 16 query heads are
the 64 rows of a wgmma. Each brings queries into the place that its tile before has left, for the tile after the next
one. A fifth warpgroup to do nothing but that would leave 112 registers to the four, with which ptxas makes wgmmas wait
for each other; so each has 128. Every pair leaves its partial result and the statistics of its softmax, packed, to be
merged afterwards.

A softmax takes the largest logit off all of them lest a weight overflows, or all of them vanish. Where nothing is near
to that, nothing has to be taken off and no largest one looked for, which is a twentieth of the time. So a CTA does
without at first; if anything that it found was not within bounds, it computes all of its tiles anew.
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
from pallas_kernels.mosaic import TILING, compiler_params, cond, halved, when
from pallas_kernels.sparse_attention import mosaic_gpu_partials as packing
from pallas_kernels.sparse_attention import mosaic_gpu_tile as tiles
from pallas_kernels.sparse_attention.mosaic_gpu_plan import LIMIT_BITS, TILE_PAIRS, Plan, most_tiles
from pallas_kernels.sparse_attention.mosaic_gpu_tile import each

_WARPGROUPS = 4
# Pages and tiles of queries that there is room for; tiles whose queries are awaited each at a barrier of its own.
_PAGES, _SLOTS, _TURNS = 2, 6, 2 * _WARPGROUPS
# Sums of a row's weights for which no reference is needed, and units of its numbers: far from the ends of float32 and
# bfloat16, so that no weight is lost but what is less than 2 ** -80 of its row's largest.
_LEAST_TOTAL, _MOST_TOTAL, _MOST_UNIT = 2.0**-40, 2.0**60, 2.0**100


@dataclass(frozen=True)
class TuningConfig:
    """window: of the plan. chunk: tiles that a CTA takes at a time. ctas: one for each SM."""

    CANDIDATES: ClassVar = {"window": (2048, 4096, 8192), "chunk": (24, 48, 96)}

    window: int = 2048
    chunk: int = 48
    ctas: int = NUM_SMS

    def __post_init__(self) -> None:
        if self.ctas < 1:
            raise ValueError(f"ctas={self.ctas} must be at least 1")
        # A warpgroup looks two of its tiles ahead, into the next chunk at most.
        if self.chunk < 2 * _WARPGROUPS or self.chunk % _WARPGROUPS:
            raise ValueError(f"chunk={self.chunk} must be a multiple of {_WARPGROUPS} from {2 * _WARPGROUPS} on")
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")

    @classmethod
    def heuristic(cls, top_k: int, num_items: int) -> "TuningConfig":
        """For so many items that pairs may meet at: where they are many, a window leaves each but few tiles."""
        return cls() if 128 * num_items <= 2048 * top_k else cls(window=8192, chunk=96)


@functools.partial(jax.jit, static_argnames=("parts", "pairs", "scale", "config", "interpret"))
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
    scale: float,
    config: TuningConfig,
    interpret: Any,
):
    """Partial results of one part of a plan, which has so many parts, of so many pairs at most.

    q [T, K, G, H]; k, v [P, K, S, H]; tails [B, K, S, H], the last page of each sequence without its unused slots.
    part: i32[1], so that one kernel serves them all.
    Returns i32[tiles, 4 * G, row words] as `mosaic_gpu_partials` says, from the part's first tile on. What belongs to
    no pair holds anything.
    """
    max_tiles = plan.tile_run.shape[0]
    keys = plan.ends.shape[0] // parts
    factor = scale * math.log2(math.e)
    dtype = q.dtype
    row_words = packing.row_words_of(dtype)
    # Of float16 weights overflow soon.
    attempts = 1 if dtype == jnp.float16 else 2

    def attend(
        q_gmem,
        k_gmem,
        v_gmem,
        tails_gmem,
        units_gmem,
        limits_gmem,
        tile_run_gmem,
        runs_gmem,
        ends_gmem,
        part_gmem,
        out_gmem,
        queries_and_rows_smem,
        k_smem,
        v_smem,
        q_barrier,
        k_barrier,
        v_barrier,
        k_free,
        v_free,
        is_beyond_smem,
        tried,
        *weights_smem,
    ):
        q_smem, rows_smem = queries_and_rows_smem
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        part = part_gmem[0]
        first_of_part = jnp.where(part > 0, ends_gmem[jnp.maximum(part * keys - 1, 0)], 0)
        num_tiles = ends_gmem[(part + 1) * keys - 1] - first_of_part
        # Rounds in which every CTA takes a chunk, and equal shares of what is left.
        round_size = jnp.int32(config.ctas * config.chunk)
        rounds, rest = lax.div(num_tiles, round_size), lax.rem(num_tiles, round_size)
        share = lax.div(rest + (config.ctas - 1), jnp.int32(config.ctas))
        per_chunk = config.chunk // _WARPGROUPS

        def try_all(run):
            """run(attempt, number of tiles), and again while anything was not within bounds."""

            def step(state):
                attempt, count = state
                run(attempt, count)
                plgpu.barrier_wait(tried)
                found = [is_beyond_smem[attempt, i] for i in range(_WARPGROUPS)]
                return attempt + 1, jnp.where(functools.reduce(jnp.maximum, found) > 0, count, jnp.int32(0))

            # Nothing to do is nothing to wait for: a warp that is late would miss the barrier's second turn.
            count = rounds * config.chunk + jnp.clip(rest - cta * share, 0, share)
            lax.while_loop(lambda state: (state[1] > 0) & (state[0] < attempts), step, (jnp.int32(0), count))

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

        def units_of(number):
            """Of the tile of this number; of one behind the last something that nobody uses."""
            number = jnp.minimum(number, max_tiles - 1)
            return [units[number] for units in units_gmem]

        def bring_queries(tile, units):
            """Of the CTA's tile, into the slot that the tile _SLOTS before it has left."""
            slot, turn = lax.rem(tile, jnp.int32(_SLOTS)), lax.rem(tile, jnp.int32(_TURNS))
            for r, unit in enumerate(units):
                where = q_smem.at[slot, pl.ds(r * GROUP, GROUP)]
                plgpu.copy_gmem_to_smem(q_gmem.at[unit], where, q_barrier.at[turn])

        def bring_page(visit, run):
            head, page, tail = (runs_gmem[run, i] for i in range(3))
            slot = lax.rem(visit, jnp.int32(_PAGES))

            def bring(source, to, arrived, free):
                when(visit >= _PAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
                plgpu.copy_gmem_to_smem(source, to.at[slot], arrived.at[slot])

            bring(k_gmem.at[page, head], k_smem, k_barrier, k_free)
            when(tail < 0)(lambda: bring(v_gmem.at[page, head], v_smem, v_barrier, v_free))
            when(tail >= 0)(lambda: bring(tails_gmem.at[tail, head], v_smem, v_barrier, v_free))

        def number_of(i, numbers):
            """Of the warpgroup's tile i of a chunk; numbers: those of its first one there, and in the next chunk."""
            number, next_number = numbers
            return jnp.where(i < per_chunk, number, next_number - config.chunk) + i * _WARPGROUPS

        def tile_run_of(i, numbers):
            return tile_run_gmem[jnp.minimum(number_of(i, numbers), max_tiles - 1)]

        def go_on(visit, to, brought, bring):
            """Give pages back and wait for the next one, from one visit to another; how many have been brought then."""

            def step(visit, _):
                when((wg == 0) & (visit + 1 >= brought))(lambda: bring(visit + 1))
                for free, arrived in ((k_free, k_barrier), (v_free, v_barrier)):
                    plgpu.barrier_arrive(free.at[lax.rem(visit, jnp.int32(_PAGES))])
                    plgpu.barrier_wait(arrived.at[lax.rem(visit + 1, jnp.int32(_PAGES))])

            lax.fori_loop(visit, to, step, None)
            return jnp.maximum(brought, to + 1)

        def mask(logits, number):
            # Read when it is needed, which is seldom: each read that every warp waits for is felt.
            packed = limits_gmem[number]
            limits = [lax.shift_right_logical(packed, jnp.int32(r * LIMIT_BITS)) for r in range(TILE_PAIRS)]
            return tiles.masked(logits, [limit & jnp.int32(PAGE_SIZE - 1) for limit in limits])

        def from_largest(logits):
            return tiles.slope_and_reference(logits, factor)

        def from_nothing(_):
            return each(factor), each(0.0)

        def step(i, carry, first, numbers, ahead, bring, most_visits, count, by_largest):
            """The warpgroup's tile i, of a chunk from tile `first` on in which visits are so far ahead of runs.

            bring: a page, by its visit, of which the first most_visits are known.
            """
            visit, brought, tile_run, next_tile_run, least, most = carry
            # Two tiles ahead, since it comes from memory.
            following = next_tile_run, tile_run_of(i + 2 - first, numbers)
            number, tile = number_of(i - first, numbers), i * _WARPGROUPS + wg
            within = tile + 2 - first * _WARPGROUPS
            units = units_of(jnp.where(within < config.chunk, numbers[0], numbers[1] - config.chunk) - wg + within)
            this_visit = run_of(tile_run) + ahead
            brought = go_on(visit, this_visit, brought, bring)
            page, slot = lax.rem(this_visit, jnp.int32(_PAGES)), lax.rem(tile, jnp.int32(_SLOTS))
            plgpu.barrier_wait(q_barrier.at[lax.rem(tile, jnp.int32(_TURNS))])

            def multiply_k(acc):
                plgpu.wgmma(acc, q_smem.at[slot], k_smem.at[page].T)
                return acc[...]

            logits = pl.run_scoped(multiply_k, plgpu.ACC((tiles.ROWS, PAGE_SIZE), jnp.float32))
            # Results leave from where queries came in: once its stores have been read, their slot is free.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            when((i >= 1) & (tile + 2 < count))(lambda: bring_queries(tile + 2, units))

            is_cut = (tile_run & jnp.int32(1)) > 0
            logits = cond(is_cut, mask, lambda logits, _: logits, logits, number)
            slope, reference = cond(by_largest, from_largest, from_nothing, logits)
            weights = jnp.exp2(logits * tiles.along(slope) - tiles.along(reference))
            weights = tiles.truncated(weights, dtype)
            total = halved(jnp.add, weights).sum(axis=1)

            def multiply_v(values):
                where = weights_smem[0].at[wg] if weights_smem else None
                tiles.multiply(weights.astype(dtype), v_smem.at[page], values, where)
                return values[...]

            values = pl.run_scoped(multiply_v, plgpu.ACC((tiles.ROWS, DIM), jnp.float32))
            rows = rows_smem.at[pl.ds(tiles.first_row(slot, dtype), tiles.ROWS)]
            unit = tiles.store(rows, out_gmem.at[number - first_of_part], values, reference, total, dtype)
            least = jnp.minimum(least, total)
            most = jnp.maximum(most, jnp.maximum(total, unit * (_MOST_TOTAL / _MOST_UNIT)))
            # The others' tiles were begun before this one: they have left the page before, or soon will.
            is_next = (brought == this_visit + 1) & (brought < most_visits)
            when((wg == 0) & is_next)(lambda: bring(brought))
            brought = jnp.where(is_next, brought + 1, brought)
            return this_visit, brought, *following, least, most

        def attempt(number, count):
            own_count = lax.div(count - wg + (_WARPGROUPS - 1), jnp.int32(_WARPGROUPS))
            of_attempt = functools.partial(step, count=count, by_largest=number == attempts - 1)
            for tile in (wg, wg + _WARPGROUPS):
                is_first = (tile < _SLOTS) & (tile < count)
                when(is_first)(lambda tile=tile: bring_queries(tile, units_of(tile_of(tile))))

            def over_chunk(chunk, carry):
                visits, (first_run, last_run), visit, brought, *state = carry
                next_runs = runs_of(chunk + 1, count)
                first = chunk * per_chunk
                end = jnp.minimum(first + per_chunk, own_count)
                ahead = visits - first_run
                next_visits = ahead + last_run + 1

                def bring(visit):
                    bring_page(visit, jnp.where(visit < next_visits, visit - ahead, next_runs[0]))

                of_chunk = functools.partial(
                    of_attempt,
                    first=first,
                    numbers=(first_tile_of(chunk) + wg, first_tile_of(chunk + 1) + wg),
                    ahead=ahead,
                    bring=bring,
                    most_visits=next_visits + jnp.where(next_runs[1] >= next_runs[0], 1, 0),
                )
                visit, brought, *state = lax.fori_loop(first, end, of_chunk, (visit, brought, *state))
                last = next_visits - 1
                return next_visits, next_runs, last, go_on(visit, last, brought, bring), *state

            runs = runs_of(jnp.int32(0), count)
            when(wg == 0)(lambda: bring_page(jnp.int32(0), runs[0]))
            plgpu.barrier_wait(k_barrier.at[0])
            plgpu.barrier_wait(v_barrier.at[0])
            numbers = first_tile_of(jnp.int32(0)) + wg, first_tile_of(jnp.int32(1)) + wg
            tile_runs = [tile_run_of(jnp.int32(i), numbers) for i in range(2)]
            start = (jnp.int32(0), runs, jnp.int32(0), jnp.int32(1), *tile_runs, each(1.0), each(1.0))
            visits, *_, least, most = lax.fori_loop(0, chunks_of(count), over_chunk, start)

            # Every completion of a barrier has to be awaited; the last page is never given back.
            @when((wg == 0) & (visits >= _PAGES))
            def _():
                for free in (k_free, v_free):
                    plgpu.barrier_wait(free.at[lax.rem(visits, jnp.int32(_PAGES))])

            # Nothing is brought, and nothing stored, where something is still on its way from.
            plgpu.wait_smem_to_gmem(0)
            is_within = jnp.logical_and(least >= _LEAST_TOTAL, most <= _MOST_TOTAL)
            # Of the warpgroup's last tile, or a slot that none has.
            last = (own_count - 1) * _WARPGROUPS + wg + _SLOTS
            first = tiles.first_row(lax.rem(last, jnp.int32(_SLOTS)), dtype)
            is_beyond = jnp.where(is_within, each(0, jnp.int32), each(1, jnp.int32))
            rows_smem.at[pl.ds(first, tiles.ROWS), 0][...] = is_beyond
            plgpu.commit_smem()
            is_beyond_smem[number, wg] = lax.fori_loop(
                0, tiles.ROWS, lambda row, found: jnp.maximum(found, rows_smem[first + row, 0]), 0, unroll=8
            )
            plgpu.commit_smem()
            plgpu.barrier_arrive(tried)

        try_all(attempt)

    page = plgpu.SMEM((_PAGES, PAGE_SIZE, DIM), dtype, transforms=TILING)
    queries_and_rows = tiles.queries_and_results(_SLOTS, dtype)
    scratch = [
        # The interpreter takes a union as a whole for one or the other, not each slot for itself.
        plgpu.RefUnion(*queries_and_rows) if interpret is None else queries_and_rows,
        page,
        page,
        plgpu.Barrier(num_arrivals=TILE_PAIRS, num_barriers=_TURNS),
        plgpu.Barrier(num_barriers=_PAGES),
        plgpu.Barrier(num_barriers=_PAGES),
        plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_PAGES),
        plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_PAGES),
        plgpu.SMEM((attempts, _WARPGROUPS), jnp.int32),
        plgpu.Barrier(num_arrivals=_WARPGROUPS),
    ]
    if interpret is not None:  # it multiplies from shared memory only
        scratch.append(plgpu.SMEM((_WARPGROUPS, tiles.ROWS, PAGE_SIZE), dtype, transforms=TILING))
    return plgpu.kernel(
        attend,
        out_type=jax.ShapeDtypeStruct((most_tiles(pairs, keys), tiles.ROWS, row_words), jnp.int32),
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=_WARPGROUPS,
        thread_name="wg",
        scratch_types=scratch,
        # Without a barrier before and behind whatever is written: a warp writes where it alone has read.
        compiler_params=compiler_params(approx_math=True, reduction_scratch_bytes=0, unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(
        q.reshape(-1, GROUP, DIM),
        k,
        v,
        tails,
        plan.units,
        plan.limits,
        plan.tile_run,
        plan.runs,
        plan.ends,
        part,
    )
