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
    height: int,
    alignment: int,
    page_size: int,
    table_width: int,
    cu_seqlens: Int32[Array, " B+1"],
    seq_lens: Int32[Array, " B"],
    context_lens: Int32[Array, " B"],
) -> Windows:
    """Cut the live rows of a call into windows. T and `height`, at most T, are multiples of `alignment`."""
    num_sequences = seq_lens.shape[0]
    # A sequence wastes less than `alignment` rows before its own and less than a window after them.
    num_windows = min((num_rows + num_sequences * (alignment + height - 2)) // height, num_rows)
    counts = rows.live_counts(cu_seqlens, seq_lens, context_lens)
    before = cu_seqlens[:-1] % alignment
    needed = jnp.where(counts > 0, (before + counts + height - 1) // height, 0)
    ends = jnp.cumsum(needed, dtype=jnp.int32)
    starts = ends - needed

    window = jnp.arange(num_windows, dtype=jnp.int32)
    sequence = jnp.minimum(rows.count_up_to(ends, window), num_sequences - 1)
    offset = (window - starts[sequence]) * height - before[sequence]
    count = counts[sequence]
    live = offset < count
    own_row = cu_seqlens[sequence] + offset
    first_row = jnp.clip(own_row, 0, num_rows - height)
    first_position = jnp.where(live, context_lens[sequence] + offset - (own_row - first_row), _DEAD)
    last_position = context_lens[sequence] + jnp.minimum(offset + height, count) - 1
    num_blocks = jnp.where(live, jnp.minimum(last_position // page_size + 1, table_width), 0)

    row = jnp.arange(num_rows, dtype=jnp.int32)
    of_row, position = rows.prefill_rows(num_rows, cu_seqlens, seq_lens, context_lens)
    of_index = starts[of_row] + (row - cu_seqlens[of_row] + before[of_row]) // height
    places = of_index * height + row - first_row.at[of_index].get(mode="clip")
    return Windows(
        sequence=sequence,
        first_row=first_row,
        first_position=first_position,
        num_blocks=num_blocks,
        places=jnp.where(position >= 0, places, num_windows * height),
        position=position,
    )
