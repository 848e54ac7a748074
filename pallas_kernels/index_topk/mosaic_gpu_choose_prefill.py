"""Scores and choice of a prefill call on Hopper in one go: the scores never reach memory.

The blocks that all windows see are dealt to the CTAs in equal, contiguous parts, so that a CTA works on the end of one
window, then on whole ones, then on the beginning of another; what it does for one window is a piece. Two warpgroups
of 128 (token, head) rows each multiply with the pages that a third one brings into a ring of shared memory. Each
thread keeps the best blocks of one row in registers, in order: a list, into which a page's largest product is sorted.
Blocks that a row has anyway stand in its list from the start, and those that all rows of a window have are not read.
A second kernel merges the pieces of each window.
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

from pallas_kernels.hopper import DIM, NUM_SMS, PAGE_SIZE
from pallas_kernels.index_topk import keys
from pallas_kernels.index_topk.mosaic_gpu_lists import insert, nothing, only
from pallas_kernels.index_topk.mosaic_gpu_score_prefill import ALIGNMENT, WIDTH
from pallas_kernels.index_topk.shares import Shares
from pallas_kernels.mosaic import TILING, compiler_params, cond, full, load, when

_WARPGROUPS = 2
_ROWS = WIDTH // _WARPGROUPS
# A thread has one row, in each of several stretches of rows, over any leading axes.
_LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((_ROWS,), (_ROWS // 4,), (1,))), (-3,), (-2,), -1)


@dataclass(frozen=True)
class Choice:
    """What is chosen of a share's blocks for each (token, head) row.

    with_keys: return candidates (keys and numbers) instead of the numbers alone.
    """

    shares: Shares
    top_k: int
    init_blocks: int
    local_blocks: int
    with_keys: bool = False

    def piece_units(self, config: "TuningConfig") -> int:
        """Units of work that a window has before its blocks: as long as `config.piece_cost` blocks of the share."""
        return config.piece_cost * self.shares.number


@dataclass(frozen=True)
class TuningConfig:
    """ctas: of the whole kernel, one for each SM. stages: of the ring of pages, 32 KiB each.

    piece_cost: steps that beginning and ending a piece is worth when work is dealt to the CTAs.
    """

    CANDIDATES: ClassVar = {"stages": (2, 3), "piece_cost": (1, 2)}

    ctas: int = NUM_SMS
    stages: int = 3
    piece_cost: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.stages <= 3:
            raise ValueError(f"stages={self.stages} must be 1 to 3")
        if self.ctas < 1:
            raise ValueError(f"ctas={self.ctas} must be at least 1")
        if self.piece_cost < 1:
            raise ValueError(f"piece_cost={self.piece_cost} must be at least 1")


def choose_prefill(
    index_q,
    index_k,
    block_table,
    sequence,
    first_row,
    first_position,
    ends,
    share,
    *,
    choice: Choice,
    config: TuningConfig,
    interpret: Any,
):
    """Choose for columns (token, head) of windows: i32[windows, 1 or 2, top_k, WIDTH], keys first if wanted.

    sequence, first_row, first_position, ends: i32[windows]; first_row * K is a multiple of ALIGNMENT, and `ends` counts
    the units of work of all windows up to each: `choice.piece_units(config)` that are no block, and then one for each
    block that the window sees, of any share, but for its last `choice.local_blocks`. share: i32[1]. Windows without
    units, and rows that are not a window's own, hold anything.
    """
    pieces = _choose_pieces(
        index_q,
        index_k,
        block_table,
        sequence,
        first_row,
        first_position,
        ends,
        share,
        choice=choice,
        config=config,
        interpret=interpret,
    )
    return _merge_pieces(pieces, ends, choice=choice, config=config, interpret=interpret)


def _first_unit(cta, total, ctas: int):
    """First of the `total` units that a CTA has: as many as the others, or one more."""
    each, more = lax.div(total, jnp.int32(ctas)), lax.rem(total, jnp.int32(ctas))
    return cta * each + jnp.minimum(cta, more)


def _cta_of(unit, total, ctas: int):
    """The CTA that has a unit."""
    each, more = lax.div(total, jnp.int32(ctas)), lax.rem(total, jnp.int32(ctas))
    one_more = more * (each + 1)
    late = more + lax.div(unit - one_more, jnp.maximum(each, 1))
    return jnp.where(unit < one_more, lax.div(unit, each + 1), late)


@functools.partial(jax.jit, static_argnames=("choice", "config", "interpret"))
def _choose_pieces(
    index_q,
    index_k,
    block_table,
    sequence,
    first_row,
    first_position,
    ends,
    share,
    *,
    choice: Choice,
    config: TuningConfig,
    interpret: Any,
):
    """Lists of the pieces, i32[windows + ctas, 2, _WARPGROUPS, top_k * _ROWS]: keys and numbers of a share's blocks.

    The piece of window w by CTA c is number w + c, which no other is, since from one piece to the next either grows. A
    window's first piece has the blocks that are chosen whatever their score. The best entries of all rows are first, a
    warpgroup's rows together, then the second best.
    """
    num_rows, num_heads, _ = index_q.shape
    num_pages = index_k.shape[0]
    num_windows = sequence.shape[0]
    ctas, stages = config.ctas, config.stages
    shares, top_k, piece_units = choice.shares, choice.top_k, choice.piece_units(config)
    # Read once a piece instead of once a step, which takes less power, and so less time; where there are registers left
    # beside the products, the lists and a mask. The interpreter multiplies from shared memory only.
    in_registers = top_k <= 16 and choice.local_blocks > 0 and interpret is None

    def choose_pieces(
        q_gmem,
        k_gmem,
        table_gmem,
        sequence_gmem,
        row_gmem,
        position_gmem,
        ends_gmem,
        share_gmem,
        out_gmem,
        q_smem,
        k_smem,
        largest_smem,
        q_barrier,
        k_barrier,
        q_free,
        k_free,
    ):
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        share = shares.of(share_gmem)
        total = ends_gmem[num_windows - 1]
        first, last = _first_unit(cta, total, ctas), _first_unit(cta + 1, total, ctas)

        def search(i, found):
            """The number of windows that end before the CTA's first unit, bit by bit, and the units of these."""
            more = found[0] + lax.shift_right_logical(jnp.int32(1 << num_windows.bit_length() - 1), i)
            end = ends_gmem[jnp.minimum(more, num_windows) - 1]
            before = jnp.logical_and(more <= num_windows, end <= first)
            return jnp.where(before, more, found[0]), jnp.where(before, end, found[1])

        first_window, start = lax.fori_loop(0, num_windows.bit_length(), search, (jnp.int32(0), jnp.int32(0)))

        def over_pieces(work, *about):
            """work(number of the piece, window, is it its first, first block, steps before, steps, *about[window]).

            For each piece; blocks are numbers in the share. Returns the number of pieces, and that of their steps. What
            is to be known of a window is read one piece ahead.
            """

            def read(window):
                window = jnp.minimum(window, num_windows - 1)
                return tuple(ref[window] for ref in (ends_gmem, *about))

            def go_on(state):
                return state[0] < last

            def piece(state):
                unit, before, window, number, done, known = state
                following = read(window + 1)
                end = jnp.minimum(known[0], last)
                first_block, end_block = (
                    shares.count(jnp.maximum(units - piece_units, 0), share) for units in (before, before + end - unit)
                )
                count = end_block - first_block
                work(number, window, before == 0, first_block, done, count, *known[1:])
                return end, jnp.int32(0), window + 1, number + 1, done + count, following

            zero = jnp.int32(0)
            state = (first, first - start, first_window, zero, zero, read(first_window))
            return lax.while_loop(go_on, piece, state)[3:5]

        @when(wg == _WARPGROUPS)
        def _produce():
            plgpu.set_max_registers(24, action="decrease")

            def bring(number, _, __, first_block, done, count, sequence, row):
                slot = lax.rem(number, jnp.int32(2))

                @when(number >= 2)
                def _():
                    plgpu.barrier_wait(q_free.at[slot])

                first_column = pl.multiple_of(row * num_heads, ALIGNMENT)
                for half in range(_WARPGROUPS):
                    where = pl.ds(first_column + half * _ROWS, _ROWS)
                    plgpu.copy_gmem_to_smem(q_gmem.at[where], q_smem.at[slot, half], q_barrier.at[slot])

                def step(i, _):
                    slot = lax.rem(done + i, jnp.int32(stages))

                    @when(done + i >= stages)
                    def _():
                        plgpu.barrier_wait(k_free.at[slot])

                    block = jnp.minimum(shares.block(first_block + i, share), shares.table_width - 1)
                    page = table_gmem[sequence, block]
                    page = jnp.clip(page, 0, num_pages - 1)
                    plgpu.copy_gmem_to_smem(k_gmem.at[page], k_smem.at[slot], k_barrier.at[slot])

                lax.fori_loop(0, count, step, None)

            pieces, steps = over_pieces(bring, sequence_gmem, row_gmem)

            # Every completion of a barrier has to be awaited.
            def drain_pages(i, _):
                plgpu.barrier_wait(k_free.at[lax.rem(i, jnp.int32(stages))])

            def drain_queries(i, _):
                plgpu.barrier_wait(q_free.at[lax.rem(i, jnp.int32(2))])

            lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain_pages, None)
            lax.fori_loop(jnp.maximum(pieces - 2, 0), pieces, drain_queries, None)

        @when(wg < _WARPGROUPS)
        def _consume():
            plgpu.set_max_registers(240, action="increase")
            row = plgpu.broadcasted_iota(jnp.int32, (_ROWS,), 0, layout=_LAYOUT)
            token = lax.div(row + wg * _ROWS, jnp.int32(num_heads))

            def score(number, window, is_first, first_block, done, count, first_token):
                q_slot = lax.rem(number, jnp.int32(2))
                position = token + first_token
                # Rounded down: negative, so that nothing is visible, where the position is.
                own = lax.shift_right_arithmetic(position, jnp.int32(PAGE_SIZE.bit_length() - 1))
                own = jnp.minimum(own, shares.table_width - 1)
                start = _forced(own, is_first, share, choice)
                plgpu.barrier_wait(q_barrier.at[q_slot])
                queries = q_smem.at[q_slot, wg]
                if in_registers:
                    queries = plgpu.load(queries, layout=plgpu.Layout.WGMMA)

                def step(i, best):
                    slot = lax.rem(done + i, jnp.int32(stages))
                    block = shares.block(first_block + i, share)
                    plgpu.barrier_wait(k_barrier.at[slot])

                    def multiply(acc):
                        plgpu.wgmma(acc, queries, k_smem.at[slot].T)
                        return acc[...]

                    dots = pl.run_scoped(multiply, plgpu.ACC((_ROWS, PAGE_SIZE), jnp.float32))
                    plgpu.barrier_arrive(k_free.at[slot])
                    if choice.local_blocks == 0:
                        # A row sees its own block in part, and its score counts.
                        first_seen = first_token + lax.div(wg * _ROWS, jnp.int32(num_heads)) - block * PAGE_SIZE

                        def mask(dots):
                            row = plgpu.broadcasted_iota(jnp.int32, dots.shape, 0, layout=plgpu.Layout.WGMMA)
                            key = plgpu.broadcasted_iota(jnp.int32, dots.shape, 1, layout=plgpu.Layout.WGMMA)
                            seen = key <= first_seen + lax.div(row, jnp.int32(num_heads))
                            return jnp.where(seen, dots, -jnp.inf)

                        dots = cond(first_seen < PAGE_SIZE - 1, mask, lambda dots: dots, dots)
                    largest_smem.at[wg][...] = dots.max(axis=1)
                    key = keys.keys_of(load(largest_smem.at[wg], _LAYOUT))
                    least = choice.local_blocks
                    if choice.init_blocks:
                        least = jnp.where(block < choice.init_blocks, shares.table_width, least)
                    # Neither invisible nor in the list from the start.
                    key = jnp.where(own - block >= least, key, jnp.int32(keys.INVISIBLE))
                    return insert(best, key, block, _LAYOUT)

                found = lax.fori_loop(0, count, step, start)
                plgpu.barrier_arrive(q_free.at[q_slot])
                for part, values in enumerate(found):
                    out_gmem[window + cta, part, wg] = values

            over_pieces(score, position_gmem)

    dtype = index_k.dtype
    return plgpu.kernel(
        choose_pieces,
        out_type=jax.ShapeDtypeStruct((num_windows + ctas, 2, _WARPGROUPS, top_k * _ROWS), jnp.int32),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=_WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((2, _WARPGROUPS, _ROWS, DIM), dtype, transforms=TILING),
            plgpu.SMEM((stages, PAGE_SIZE, DIM), dtype, transforms=TILING),
            plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=2),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=2),
            plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=stages),
        ],
        compiler_params=compiler_params(reduction_scratch_bytes=0),
        **({} if interpret is None else {"interpret": interpret}),
    )(
        index_q.reshape(num_rows * num_heads, DIM),
        index_k,
        block_table,
        sequence,
        first_row,
        first_position,
        ends,
        share,
    )


def _forced(own, is_first, share, choice: Choice):
    """Lists of a piece before its first step: in a window's first piece, the share's blocks that are chosen anyway.

    own: i32[_ROWS], the rows' own blocks, negative where nothing is visible.
    """
    shares, init_blocks = choice.shares, choice.init_blocks
    best = None
    # Beyond every block, where none is forced.
    least = jnp.where(is_first, 0, shares.table_width)
    for number in range(init_blocks + choice.local_blocks):
        if number < init_blocks:
            block, chosen = full((_ROWS,), number, jnp.int32, _LAYOUT), own >= least + number
        else:
            block = own - (init_blocks + choice.local_blocks - 1 - number)
            chosen = block >= jnp.maximum(least, init_blocks)
        if shares.number > 1:
            chosen = jnp.logical_and(chosen, lax.rem(block - share, jnp.int32(shares.number)) == 0)
        key = jnp.where(chosen, full((_ROWS,), keys.FORCED, jnp.int32, _LAYOUT), jnp.int32(keys.INVISIBLE))
        if best:
            best = insert(best, key, block, _LAYOUT)
        else:
            best = only(key, jnp.where(chosen, block, -1), choice.top_k, _LAYOUT)
    return best or nothing(choice.top_k * _ROWS, layout=_LAYOUT)


@functools.partial(jax.jit, static_argnames=("choice", "config", "interpret"))
def _merge_pieces(pieces, ends, *, choice: Choice, config: TuningConfig, interpret: Any):
    """The best of each window's pieces: i32[windows, 1 or 2, top_k, WIDTH].

    A bitonic network: of the i-th best of one list and the i-th worst of the other the better one is among the best of
    both; these rise and fall, and comparing at ever smaller distances sorts them. Here the distance is always half the
    list, and the numbers of the entries change instead, by writing entries i and i + half to 2 i and 2 i + 1: so
    all steps are one loop over two halves, which takes far less time to compile than a network of single entries.
    What has been merged is worst first as long as more pieces come, which are best first.
    """
    num_windows, top_k, ctas = ends.shape[0], choice.top_k, config.ctas
    steps = top_k.bit_length() - 1
    # An index of one bit an axis.
    entries = (2,) * steps

    def better(one, other):
        return (one[0] > other[0]) | ((one[0] == other[0]) & (one[1] < other[1]))

    def either(which, one, other):
        return tuple(jnp.where(which, a, b) for a, b in zip(one, other, strict=True))

    def merge_pieces(pieces_gmem, ends_gmem, out_gmem, best_smem):
        window = lax.axis_index("window")
        wg = lax.axis_index("wg")
        total = ends_gmem[num_windows - 1]
        start = jnp.where(window > 0, ends_gmem[jnp.maximum(window - 1, 0)], 0)
        end = ends_gmem[window]
        every = (slice(None),) * (steps - 1)

        def best_half(half):
            return tuple(load(best_smem.at[part, half], _LAYOUT) for part in range(2))

        def step(rising, halves):
            first, second = halves
            ordered = better(first, second) != rising
            for bit, values in enumerate((either(ordered, first, second), either(ordered, second, first))):
                for part, value in enumerate(values):
                    best_smem.at[(part, *every, bit)][...] = value
            return best_half(0), best_half(1)

        def found(cta):
            return tuple(
                tuple(load(pieces_gmem.at[(window + cta, part, wg, half, *every)], _LAYOUT) for part in range(2))
                for half in range(2)
            )

        first = jnp.minimum(_cta_of(start, total, ctas), ctas - 1)
        last = jnp.where(end > start, _cta_of(end - 1, total, ctas), first - 1)

        def merge(cta, state):
            halves, here = state
            following = found(jnp.minimum(cta + 1, jnp.maximum(last, first)))
            halves = tuple(either(better(old, new), old, new) for old, new in zip(halves, here, strict=True))
            # A window's only piece is in order.
            rising = jnp.full(halves[0][0].shape, cta < last)
            halves = lax.fori_loop(0, jnp.where(first < last, steps, 0), lambda _, halves: step(rising, halves), halves)
            return halves, following

        none = nothing(*entries[1:], _ROWS, layout=_LAYOUT)
        halves, _ = lax.fori_loop(first, last + 1, merge, ((none, none), found(first)))
        for half, values in enumerate(halves):
            for part, value in enumerate(values if choice.with_keys else values[1:]):
                out_gmem.at[(window, part, half, *every, pl.ds(wg * _ROWS, _ROWS))][...] = value

    merged = plgpu.kernel(
        merge_pieces,
        out_type=jax.ShapeDtypeStruct((num_windows, 1 + choice.with_keys, *entries, WIDTH), jnp.int32),
        grid=(num_windows, _WARPGROUPS),
        grid_names=("window", "wg"),
        scratch_types=[plgpu.SMEM((2, *entries, _ROWS), jnp.int32)],
        compiler_params=compiler_params(),
        **({} if interpret is None else {"interpret": interpret}),
    )(pieces.reshape(*pieces.shape[:3], *entries, _ROWS), ends)
    return merged.reshape(*merged.shape[:2], top_k, WIDTH)
