"""Windows of a ragged prefill call, as the kernels want them: equally high boxes of consecutive rows.

`rows.prefill_tiles` lists the rows of a tile one by one; a kernel copies a window as one box instead, so here
a window is a first row. It is a multiple of `alignment`, so a sequence's first window may begin with rows of the
sequence before, and a window that would reach beyond the last row is moved up. Nobody looks up the results of
rows that are not the window's own.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels import rows

# Far below any position that a window moved up may reach.
_DEAD = -(2**30)


class Cut(NamedTuple):
    """Rows of a window, what first rows are multiples of, slots of a page: powers of two. Blocks of the table."""

    height: int
    alignment: int
    page_size: int
    table_width: int


class Windows(NamedTuple):
    """Windows of `height` rows, each of one sequence.

    sequence, first_row: i32[windows]. first_position: of the first row, also where that is not the window's
    own; far negative when it has no own rows. num_blocks: blocks that its last own row sees, 0 without one.
    places: i32[T], the place of each row in [windows * height], or windows * height for a dead row.
    position: i32[T], -1 for a dead row.
    """

    sequence: Int32[Array, " windows"]
    first_row: Int32[Array, " windows"]
    first_position: Int32[Array, " windows"]
    num_blocks: Int32[Array, " windows"]
    places: Int32[Array, " T"]
    position: Int32[Array, " T"]


def windows(
    num_rows: int,
    cut: Cut,
    cu_seqlens: Int32[Array, " B+1"],
    seq_lens: Int32[Array, " B"],
    context_lens: Int32[Array, " B"],
) -> Windows:
    """Cut the live rows of a call into windows. T is a multiple of the alignment, and at least a window's height."""
    height, alignment, page_size, table_width = cut
    num_sequences = seq_lens.shape[0]
    # A sequence wastes less than `alignment` rows before its own and less than a window after them.
    num_windows = min((num_rows + num_sequences * (alignment + height - 2)) // height, num_rows)
    counts, before, needed, ends = _needed(cut, cu_seqlens, seq_lens, context_lens)
    starts = ends - needed

    window = jnp.arange(num_windows, dtype=jnp.int32)
    sequence = jnp.minimum(rows.count_up_to(ends, window), num_sequences - 1)

    def of(values):
        return rows.at(values, sequence)

    offset = (window - of(starts)) * height - of(before)
    count, context = of(counts), of(context_lens)
    live = window < ends[-1]
    own_row = of(cu_seqlens) + offset
    first_row = jnp.clip(own_row, 0, num_rows - height)
    first_position = jnp.where(live, context + offset - (own_row - first_row), _DEAD)
    last_position = context + jnp.minimum(offset + height, count) - 1
    num_blocks = jnp.where(live, jnp.minimum(_divided(last_position + 1, page_size), table_width), 0)

    row = jnp.arange(num_rows, dtype=jnp.int32)
    of_row, position = rows.prefill_rows(num_rows, cu_seqlens, seq_lens, context_lens)

    def of_own(values):
        return rows.at(values, of_row)

    of_index = of_own(starts) + rows.divided(row - of_own(cu_seqlens) + of_own(before), height)
    places = of_index * height + row - first_row.at[of_index].get(mode="clip", wrap_negative_indices=False)
    return Windows(
        sequence=sequence,
        first_row=first_row,
        first_position=first_position,
        num_blocks=num_blocks,
        places=jnp.where(position >= 0, places, num_windows * height),
        position=position,
    )


def blocks_up_to(
    num_windows: int,
    skipped: int,
    extra: int,
    cut: Cut,
    cu_seqlens: Int32[Array, " B+1"],
    seq_lens: Int32[Array, " B"],
    context_lens: Int32[Array, " B"],
) -> Int32[Array, " windows"]:
    """Blocks that the windows up to each one see, `skipped` fewer for each, and `extra` more if it has own rows.

    In closed form, so that one kernel computes all. Positions beyond the table may count.
    """
    height, _, page_size, table_width = cut
    counts, before, needed, ends = _needed(cut, cu_seqlens, seq_lens, context_lens)
    context_lens = jnp.minimum(context_lens, table_width * page_size)
    # From one window to the next they are `step` blocks more, or they are one more after `step` windows; in units of
    # `unit` rows, a window counts `last` of them in the first case, and `last` / step rounded up in the second one.
    unit, step = min(height, page_size), max(height, page_size) // min(height, page_size)
    first = _divided(context_lens - before, unit) - skipped * (page_size // unit)

    def seen(windows):
        last = jnp.maximum(first + windows * (height // unit), 0)
        terms = _divided(last, step)
        return terms * last - step * (terms * (terms - 1) >> 1)

    # All but a sequence's last window see what rows of their own to their very end would see.
    number = jnp.arange(1, num_windows + 1, dtype=jnp.int32)[:, None] - (ends - needed)
    number = jnp.minimum(jnp.maximum(number, 0), needed)
    whole = jnp.minimum(number, jnp.maximum(needed - 1, 0))
    last = jnp.maximum(_divided(context_lens + counts, page_size) - skipped, 0)
    blocks = seen(whole) - seen(0) + number * extra + jnp.where(number > whole, last, 0)
    return jnp.sum(blocks, axis=1, dtype=jnp.int32)


def _needed(cut: Cut, cu_seqlens, seq_lens, context_lens):
    """Live rows of each sequence, rows before them in its first window, its windows, and those up to it: i32[B]."""
    counts = rows.live_counts(cu_seqlens, seq_lens, context_lens)
    before = cu_seqlens[:-1] & (cut.alignment - 1)
    needed = jnp.where(counts > 0, _divided(before + counts, cut.height), 0)
    return counts, before, needed, jnp.cumsum(needed, dtype=jnp.int32)


def _divided(values, divisor: int):
    """Quotients rounded up; the divisor is a power of two."""
    return rows.divided(values + (divisor - 1), divisor)
