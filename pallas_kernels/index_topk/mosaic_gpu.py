"""The block indexer as Pallas:Mosaic GPU kernels for Hopper: what they serve, and how they are put together.

Both calls make a table of scores, blocks x columns, a column being a (token, head), and then choose from its
columns: a slab of the table is a sequence in a decode call, and a window of rows in a prefill call.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.derivatives import with_derivative_of
from pallas_kernels.dispatch import Implementation
from pallas_kernels.index_topk import reference

# Scores of a prefill call that are held at a time: more windows are worked off one group after the other.
_TABLE_BYTES = 2**30


def _why_not(index_q, index_k, block_table, top_k: int | None) -> str | None:
    reason = hopper.why_not_sizes(
        dtype=index_k.dtype,
        page_size=index_k.shape[1],
        num_sequences=block_table.shape[0],
        kv_heads=index_q.shape[1],
        index_dim=index_k.shape[2],
    )
    if reason is None and top_k is not None and top_k not in hopper.TOP_KS:
        reason = f"top_k is {top_k}, not one of {', '.join(map(str, hopper.TOP_KS))}"
    return reason or hopper.why_not_here()


def _decode_supported(index_q, index_k, block_table, _seq_lens, *, top_k=None, **_forced) -> str | None:
    reason = hopper.why_not_queries(index_q.shape[0], block_table.shape[0])
    return reason or _why_not(index_q, index_k, block_table, top_k)


def _prefill_supported(index_q, index_k, block_table, *_lengths, top_k=None, **_forced) -> str | None:
    return _why_not(index_q, index_k, block_table, top_k)


def _score_decode(index_q, index_k, block_table, seq_lens, *, interpret=None):
    num_rows, num_heads, _ = index_q.shape
    num_sequences, table_width = block_table.shape
    num_queries = num_rows // num_sequences
    scores = _decode_table(index_q, index_k, block_table, seq_lens, interpret)
    scores = scores[:, :table_width, : num_queries * num_heads]
    scores = scores.reshape(num_sequences, table_width, num_queries, num_heads).transpose(0, 2, 3, 1)
    position = seq_lens[:, None] - num_queries + jnp.arange(num_queries, dtype=jnp.int32)
    scores = _only_visible(scores, position[:, :, None, None])
    return scores.reshape(num_rows, num_heads, table_width)


def _topk_decode(index_q, index_k, block_table, seq_lens, *, top_k, init_blocks, local_blocks, interpret=None):
    from pallas_kernels.index_topk import mosaic_gpu_choose as choosing

    index_q, index_k = lax.stop_gradient((index_q, index_k))
    num_rows, num_heads, _ = index_q.shape
    num_sequences, table_width = block_table.shape
    num_queries = num_rows // num_sequences
    columns = num_queries * num_heads
    choice = choosing.Choice(
        num_heads=num_heads,
        num_columns=columns,
        table_width=table_width,
        top_k=top_k,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        shift=-num_queries,
    )
    scores = _decode_table(index_q, index_k, block_table, seq_lens, interpret)
    config = choosing.TuningConfig.for_decode(table_width)
    ids = choosing.choose(scores, seq_lens, choice=choice, spread=True, config=config, interpret=interpret)
    return ids[:, :columns].reshape(num_rows, num_heads, top_k)


def _decode_table(index_q, index_k, block_table, seq_lens, interpret):
    from pallas_kernels.index_topk import mosaic_gpu_choose as choosing
    from pallas_kernels.index_topk import mosaic_gpu_score_decode as scoring

    num_sequences, table_width = block_table.shape
    return scoring.score_decode(
        index_q,
        index_k,
        block_table,
        seq_lens,
        num_blocks=choosing.TuningConfig.for_decode(table_width).padded(table_width),
        config=scoring.TuningConfig.heuristic(num_sequences * table_width),
        interpret=interpret,
    )


def _score_prefill(index_q, index_k, block_table, cu_seqlens, seq_lens, context_lens, *, interpret=None):
    table_width = block_table.shape[1]
    num_rows, num_heads, _ = index_q.shape
    lengths = (cu_seqlens, seq_lens, context_lens)

    def by_column(scores, _positions):
        return scores[:, :table_width].swapaxes(1, 2)

    scores, position = _prefill(by_column, index_q, index_k, block_table, lengths, interpret)
    scores = scores.reshape(num_rows, num_heads, table_width)
    return _only_visible(scores, position[:, None, None])


def _topk_prefill(
    index_q,
    index_k,
    block_table,
    cu_seqlens,
    seq_lens,
    context_lens,
    *,
    top_k,
    init_blocks,
    local_blocks,
    interpret=None,
):
    from pallas_kernels.index_topk import mosaic_gpu_choose as choosing
    from pallas_kernels.index_topk import mosaic_gpu_score_prefill as scoring

    index_q, index_k = lax.stop_gradient((index_q, index_k))
    choice = choosing.Choice(
        num_heads=index_q.shape[1],
        num_columns=scoring.WIDTH,
        table_width=block_table.shape[1],
        top_k=top_k,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
    )

    def choose(scores, positions):
        config = choosing.TuningConfig.for_prefill()
        return choosing.choose(scores, positions, choice=choice, spread=False, config=config, interpret=interpret)

    lengths = (cu_seqlens, seq_lens, context_lens)
    ids, position = _prefill(choose, index_q, index_k, block_table, lengths, interpret)
    return jnp.where(position[:, None, None] >= 0, ids, -1)


def _prefill(finish, index_q, index_k, block_table, lengths, interpret):
    """finish(scores f32[windows, blocks, WIDTH], first positions) -> [windows, WIDTH, n], back in the rows' order.

    Returns [T, K, n], of which dead rows may hold anything, and the rows' positions.
    """
    from pallas_kernels.index_topk import mosaic_gpu_choose as choosing
    from pallas_kernels.index_topk import mosaic_gpu_score_prefill as scoring
    from pallas_kernels.index_topk.mosaic_gpu_tiles import windows

    num_rows, num_heads, _ = index_q.shape
    height = scoring.WIDTH // num_heads
    alignment = scoring.ALIGNMENT // num_heads
    padded_rows = max(height, hopper.round_up(num_rows, alignment))
    if padded_rows > num_rows:
        index_q = jnp.pad(index_q, ((0, padded_rows - num_rows), (0, 0), (0, 0)))
    window = windows(padded_rows, height, alignment, hopper.PAGE_SIZE, block_table.shape[1], *lengths)
    num_blocks = choosing.TuningConfig.for_prefill().padded(block_table.shape[1])
    num_windows = window.sequence.shape[0]
    config = scoring.TuningConfig.heuristic(num_windows)

    def score_and_finish(inputs):
        scores = scoring.score_prefill(
            index_q, index_k, block_table, *inputs, num_blocks=num_blocks, config=config, interpret=interpret
        )
        return finish(scores, inputs[2])

    inputs = (window.sequence, window.first_row, window.first_position, window.num_blocks)
    at_a_time = max(1, _TABLE_BYTES // (num_blocks * scoring.WIDTH * 4))
    if num_windows <= at_a_time:
        result = score_and_finish(inputs)
    else:
        num_groups = -(-num_windows // at_a_time)
        padding = num_groups * at_a_time - num_windows
        # Windows without blocks: the kernels pass over them.
        padded = [jnp.pad(array, (0, padding), mode="edge") for array in inputs[:3]]
        padded.append(jnp.pad(inputs[3], (0, padding)))
        grouped = tuple(array.reshape(num_groups, at_a_time) for array in padded)
        result = lax.map(score_and_finish, grouped)
    by_place = result.reshape(-1, num_heads, result.shape[-1])
    return by_place.at[window.places[:num_rows]].get(mode="clip"), window.position[:num_rows]


def _only_visible(scores, position):
    """scores [..., M], -inf where the block begins beyond the position."""
    first_key = jnp.arange(scores.shape[-1], dtype=jnp.int32) * hopper.PAGE_SIZE
    return jnp.where(first_key <= position, scores, -jnp.inf)


index_score_prefill = Implementation(
    _prefill_supported, with_derivative_of(reference.index_score_prefill.run, _score_prefill)
)
index_topk_prefill = Implementation(_prefill_supported, _topk_prefill)
index_score_decode = Implementation(
    _decode_supported, with_derivative_of(reference.index_score_decode.run, _score_decode)
)
index_topk_decode = Implementation(_decode_supported, _topk_decode)
