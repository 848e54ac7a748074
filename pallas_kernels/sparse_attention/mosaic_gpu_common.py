"""Block-sparse attention to the blocks that neighbouring rows of a prefill call have in common, rows outermost.

A CTA takes one unit, a group of rows and a KV head, after the other: each of three warpgroups has four of its rows with
their 16 query heads, which are the 64 rows of a wgmma, and all three walk over the unit's common blocks, of which two
pages are on their way at any time. They leave one partial result for all of a row's common blocks, in the form of those
of `mosaic_gpu_prefill`, which writes one for each block.

A row that did not choose one of the blocks multiplies it by zeros. So an infinity or a NaN among a block's values, in a
slot that its sequence uses, becomes a NaN in the whole group, where a row by itself would not have met it.
"""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import DIM, GROUP, PAGE_SIZE
from pallas_kernels.mosaic import cond, full, spread, warp_when, when
from pallas_kernels.rows import Rows
from pallas_kernels.sparse_attention import mosaic_gpu_attempts as attempts
from pallas_kernels.sparse_attention import mosaic_gpu_neighbours as neighbours
from pallas_kernels.sparse_attention import mosaic_gpu_partials as packing
from pallas_kernels.sparse_attention import mosaic_gpu_tile as tiles
from pallas_kernels.sparse_attention.mosaic_gpu_memory import PAGES, TILES, WARPGROUPS, Memory, assign, launch, slot_of
from pallas_kernels.sparse_attention.mosaic_gpu_plan import TILE_PAIRS

# Of the number of a bit, which it has: a single warp's code has no instruction for it.
_DIGITS = [sum(1 << bit for bit in range(32) if bit >> i & 1) - 2**32 for i in range(5)]
_WGMMA = plgpu.Layout.WGMMA


def any_of(words: Sequence[Any]) -> Any:
    """Whether any bit of a kernel's scalars is set."""
    return functools.reduce(jnp.bitwise_or, words) != 0


def pop(words: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """The number of the first bit that is set, and the words without it. Any number if there is none."""
    first, word = jnp.int32(len(words) - 1), words[-1]
    for i in reversed(range(len(words) - 1)):
        first, word = (jnp.where(words[i] != 0, x, y) for x, y in ((jnp.int32(i), first), (words[i], word)))
    bit = word & -word
    number = sum(jnp.where(bit & digit != 0, jnp.int32(1 << i), 0) for i, digit in enumerate(_DIGITS))
    others = (jnp.where(first == i, word ^ bit, word) for i, word in enumerate(words))
    return first * neighbours.BITS + number, tuple(others)


@functools.partial(jax.jit, static_argnames=("groups", "first_tile", "scale", "ctas", "interpret"))
def attend_common(
    q,
    k,
    v,
    tails,
    of_groups,
    rows: Rows,
    block_table,
    seq_lens,
    first_row,
    first_group,
    partials,
    *,
    groups: int,
    first_tile: int,
    scale: float,
    ctas: int,
    interpret: Any,
):
    """The partial results of a part with those of so many groups among them: a tile for each warpgroup and unit.

    A unit is a (group, KV head). q [T, K * G, H]; k, v [P, K, S, H]; tails [B, K, S, H], the last page of each sequence
    without its unused slots; of_groups: of `neighbours.Common`; block_table i32[B, M]; seq_lens i32[B]. first_row,
    first_group: i32[1], of T and of groups. Results begin at `first_tile`, where `attend_prefill` left room for them.
    """
    num_rows, kv_heads = q.shape[0], k.shape[1]
    table_width, num_pages, units = block_table.shape[1], k.shape[0], groups * kv_heads
    words = of_groups.shape[3]
    factor = scale * math.log2(math.e)
    dtype = q.dtype
    inline = interpret is None

    def attend_jointly(
        q_gmem,
        k_gmem,
        v_gmem,
        tails_gmem,
        of_groups_gmem,
        all_rows_gmem,
        table_gmem,
        seq_lens_gmem,
        first_row_gmem,
        first_group_gmem,
        out_gmem,
        memory: Memory,
    ):
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        first_row, first_group = first_row_gmem[0], first_group_gmem[0]
        own_units = lax.div(units - cta + (ctas - 1), jnp.int32(ctas))

        def group_and_head(i):
            """Of the CTA's unit i; of one behind the last, too, there are some."""
            unit = jnp.minimum(cta + i * ctas, units - 1)
            return lax.div(unit, jnp.int32(kv_heads)), lax.rem(unit, jnp.int32(kv_heads))

        def row_of(group, i):
            """The number of a group's row; of one behind the last, too, there is one."""
            return jnp.minimum(first_row + group * neighbours.ROWS + i, num_rows - 1)

        def words_of(group, row, head):
            """The words of a group's row; behind the last row those of all of the group's common blocks."""
            first = (((first_group + group) * (neighbours.ROWS + 1) + row) * kv_heads + head) * words
            return tuple(of_groups_gmem[first + word] for word in range(words))

        def blocks_of(i):
            """The words of the common blocks of the CTA's unit i."""
            group, head = group_and_head(i)
            return words_of(group, neighbours.ROWS, head)

        try_all = functools.partial(memory.attempts.until_within, count=own_units)

        def produce_queries(_, count):
            def bring_unit(i, turn):
                group, head = group_and_head(i)

                def of_warpgroup(consumer, _):
                    rows = [consumer * TILE_PAIRS + number for number in range(TILE_PAIRS)]
                    of_tile = [row_of(group, row) * kv_heads + head for row in rows]
                    memory.bring_queries(consumer, turn, q_gmem, of_tile)

                lax.fori_loop(0, WARPGROUPS, of_warpgroup, None)

            def step(i, carry):
                turn, bits = carry
                # They come from memory.
                following = blocks_of(i + 1)
                warp_when(any_of(bits))(functools.partial(bring_unit, i, turn))
                return turn + jnp.where(any_of(bits), jnp.int32(1), jnp.int32(0)), following

            turns, _ = lax.fori_loop(0, count, step, (jnp.int32(0), blocks_of(jnp.int32(0))))

            # Every completion of a barrier has to be awaited; the last queries are never given back.
            def drain(consumer, _):
                plgpu.barrier_wait(memory.q_free.at[slot_of(consumer, turns)])

            lax.fori_loop(0, jnp.where(turns >= TILES, WARPGROUPS, 0), drain, None)

        def produce_pages(_, count):
            def start_of(i):
                """Of the CTA's unit i its common blocks, and the sequence, of which all are."""
                group, _ = group_and_head(i)
                return blocks_of(i), all_rows_gmem.sequence[row_of(group, 0)]

            def over_unit(i, carry):
                visits, (bits, sequence) = carry
                _, head = group_and_head(i)
                # They come from memory.
                following = start_of(i + 1)
                length = seq_lens_gmem[sequence]
                last = jnp.where(lax.rem(length, jnp.int32(PAGE_SIZE)) > 0, lax.div(length, jnp.int32(PAGE_SIZE)), -1)

                def first_of(bits):
                    """Whether there is a block, the first one, its page, and the words without it."""
                    block, others = pop(bits)
                    page = table_gmem[sequence * table_width + jnp.clip(block, 0, table_width - 1)]
                    return any_of(bits), block, jnp.clip(page, 0, num_pages - 1), others

                def step(state):
                    visit, _, block, page, others = state
                    following = first_of(others)
                    tail = jnp.where(block == last, sequence, -1)
                    memory.bring_page(visit, k_gmem, v_gmem, tails_gmem, page, head, tail)
                    return visit + 1, *following

                visits, *_ = lax.while_loop(lambda state: state[1], step, (visits, *first_of(bits)))
                return visits, following

            visits, _ = lax.fori_loop(0, count, over_unit, (jnp.int32(0), start_of(jnp.int32(0))))

            memory.await_free_pages(jnp.maximum(visits - PAGES, 0), visits)

        def multiply_all():

            rows_of = memory.rows_by_turn(wg)

            def start_of(i):
                """Of the CTA's unit i its common blocks, those of each of the warpgroup's rows, and their positions."""
                group, head = group_and_head(i)
                rows = [wg * TILE_PAIRS + i for i in range(TILE_PAIRS)]
                of_rows = [words_of(group, row, head) for row in rows]
                return blocks_of(i), of_rows, [all_rows_gmem.position[row_of(group, row)] for row in rows]

            def seen_in(block, of_rows, positions):
                """How many of its keys each row sees, as `tiles` has them in a word: 0 if it did not choose it."""
                bit, word = block & (neighbours.BITS - 1), lax.div(block, jnp.int32(neighbours.BITS))
                seen = jnp.int32(0)
                for i, (bits, position) in enumerate(zip(of_rows, positions, strict=True)):
                    own = bits[0]
                    for number in range(1, words):
                        own = jnp.where(word == number, bits[number], own)
                    is_chosen = lax.shift_right_logical(own, bit) & 1
                    of_row = is_chosen * jnp.clip(position - block * PAGE_SIZE + 1, 0, PAGE_SIZE)
                    seen = seen | lax.shift_left(of_row, jnp.int32(i * tiles.SEEN_BITS))
                return seen

            def add_to(sums, multiply):
                """What multiply(accumulators) adds to arrays."""
                if interpret is None:
                    return pl.run_state(lambda refs: multiply(*refs))(tuple(map(plgpu.ACC.init, sums)))

                # The interpreter has no accumulators that hold something.
                def products(*refs):
                    multiply(*refs)
                    return [ref[...] for ref in refs]

                found = pl.run_scoped(products, *(plgpu.ACC(x.shape, x.dtype) for x in sums))
                return [x + y for x, y in zip(sums, found, strict=True)]

            def raised(logits, reference, values, totals):
                """As an online softmax does: what there is, off a reference raised to the largest logit."""
                slope, found = tiles.slope_and_reference(logits, factor)
                new = jnp.maximum(reference, found)
                rescale = jnp.exp2(reference - new)
                return slope, new, values * tiles.along(rescale), totals * spread(rescale, tiles.TOTALS, 0, _WGMMA)

            def as_they_are(_, reference, values, totals):
                return tiles.each(factor), reference, values, totals

            def step(state, turn, by_largest, of_rows, positions):
                visit, bits, values, totals, reference = state
                page = lax.rem(visit, jnp.int32(PAGES))
                plgpu.barrier_wait(memory.k_arrived.at[page])

                def multiply_k(acc):
                    plgpu.wgmma(acc, memory.queries.at[slot_of(wg, turn)], memory.k.at[page].T)
                    block, others = pop(bits)
                    return acc[...], seen_in(block, of_rows, positions), others

                logits, seen, others = pl.run_scoped(multiply_k, plgpu.ACC((tiles.ROWS, PAGE_SIZE), jnp.float32))
                plgpu.barrier_arrive(memory.k_free.at[page])
                # A row that did not choose the block needs no mask but when the largest logit is looked for: an
                # infinite one makes a NaN of it, and so a second attempt.
                is_cut = jnp.where(by_largest, seen != tiles.ALL_SEEN, seen & tiles.PARTLY_SEEN != 0)
                logits = cond(is_cut, tiles.masked_from, lambda logits, _: logits, logits, seen)
                slope, reference, *sums = cond(by_largest, raised, as_they_are, logits, reference, values, totals)
                off = jnp.where(tiles.sees(seen), reference, tiles.each(jnp.inf))
                weights = jnp.exp2(logits * tiles.along(slope) - tiles.along(off)).astype(dtype)
                plgpu.barrier_wait(memory.v_arrived.at[page])
                where = None if inline else memory.weights.at[wg]
                multiply_v = functools.partial(tiles.multiply, weights, memory.v.at[page], memory.ones, where)
                values, totals = add_to(sums, multiply_v)
                plgpu.barrier_arrive(memory.v_free.at[page])
                return visit + 1, others, values, totals, reference

            def attend_to(i, start, visits, turn, bounds, by_largest):
                blocks, of_rows, positions = start
                plgpu.barrier_wait(memory.q_arrived.at[slot_of(wg, turn)])
                # Results leave from where queries came in: once they have been read, the other slot is free.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                @when(turn >= 1)
                def _():
                    plgpu.barrier_arrive(memory.q_free.at[slot_of(wg, turn + 1)])

                nothing = [full(shape, 0.0, jnp.float32, _WGMMA) for shape in (tiles.VALUES, tiles.TOTALS)]
                reference = tiles.each(jnp.where(by_largest, jnp.float32(packing.LOWEST), jnp.float32(0.0)))
                over_blocks = functools.partial(
                    step, turn=turn, by_largest=by_largest, of_rows=of_rows, positions=positions
                )
                state = (visits, blocks, *nothing, reference)
                visits, _, values, totals, reference = lax.while_loop(
                    lambda state: any_of(state[1]), over_blocks, state
                )
                # Comes from memory while results are packed.
                following = start_of(i + 1)
                total = tiles.any_column(totals, inline)
                group, head = group_and_head(i)
                out = out_gmem.at[first_tile + (group * kv_heads + head) * WARPGROUPS + wg]
                unit = tiles.store(rows_of(turn), out, values, reference, total, dtype, inline)
                # A row that chose none of the blocks has no total, and nobody looks for it.
                of_any = [
                    jnp.where(any_of(bits), jnp.int32(1 << i * tiles.SEEN_BITS), 0) for i, bits in enumerate(of_rows)
                ]
                total = jnp.where(tiles.sees(functools.reduce(jnp.bitwise_or, of_any)), total, tiles.each(1.0))
                return following, visits, turn + 1, attempts.wider(bounds, total, unit)

            def consume(attempt, count):
                by_largest = memory.attempts.is_last(attempt)

                def over_unit(i, carry):
                    def pass_by(start, *state):
                        return start_of(i + 1), *state

                    attend = functools.partial(attend_to, i, by_largest=by_largest)
                    return cond(any_of(carry[0][0]), attend, pass_by, *carry)

                start = (start_of(jnp.int32(0)), jnp.int32(0), jnp.int32(0), attempts.bounds())
                *_, bounds = lax.fori_loop(0, count, over_unit, start)
                # Nothing is brought, and nothing stored, where something is still on its way from.
                plgpu.wait_smem_to_gmem(0)
                memory.attempts.vote(attempt, wg, bounds, rows_of(0))

            memory.write_ones(wg)
            try_all(consume)

        assign(wg, [functools.partial(try_all, task) for task in (produce_pages, produce_queries)], multiply_all)

    results = jax.new_ref(partials)
    launch(
        attend_jointly,
        out_type=[],
        dtype=dtype,
        ctas=ctas,
        interpret=interpret,
    )(
        q.reshape(-1, GROUP, DIM),
        k,
        v,
        tails,
        lax.bitcast_convert_type(of_groups, jnp.int32).reshape(-1),
        rows,
        block_table.reshape(-1),
        seq_lens,
        first_row,
        first_group,
        results,
    )
    return results[...]
