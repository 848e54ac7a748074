"""The block indexer as Triton kernels for GPUs since Ampere: what they serve, and how they are put together.

A kernel makes a table of scores, a row for each (token, head), and another one chooses from its rows.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import rows, triton_support
from pallas_kernels.derivatives import with_derivative_of
from pallas_kernels.dispatch import Implementation
from pallas_kernels.index_topk import reference
from pallas_kernels.index_topk.masks import live_candidates, live_choice, only_visible
from pallas_kernels.index_topk.shares import Shares, whole

# Scores of a prefill call that are held at a time: more tiles are worked off one group after the other.
_TABLE_BYTES = 2**30
# Rows (token, head) of a decode call's sequence, all of which are one tile.
_MAX_ROWS = 128


def _why_not(index_q, index_k, top_k: int | None) -> str | None:
    reason = triton_support.why_not_sizes(dtype=index_k.dtype, page_size=index_k.shape[1], index_dim=index_k.shape[2])
    if reason is None and index_q.shape[1] > _MAX_ROWS:
        reason = f"there are {index_q.shape[1]} index heads, more than {_MAX_ROWS}"
    if reason is None and top_k is not None and top_k > triton_support.MAX_TOP_K:
        reason = f"top_k is {top_k}, more than {triton_support.MAX_TOP_K}"
    return reason or triton_support.why_not_here()


def _decode_supported(index_q, index_k, block_table, _seq_lens, *_share, top_k=None, **_options) -> str | None:
    num_queries, num_heads = index_q.shape[0] // block_table.shape[0], index_q.shape[1]
    if num_queries * num_heads > _MAX_ROWS:
        return f"there are {num_queries} query tokens of {num_heads} heads a sequence, more than {_MAX_ROWS} together"
    return _why_not(index_q, index_k, top_k)


def _prefill_supported(index_q, index_k, _block_table, *_lengths, top_k=None, **_options) -> str | None:
    return _why_not(index_q, index_k, top_k)


def _score_decode(index_q, index_k, block_table, seq_lens):
    scores = _decode_table(index_q, index_k, block_table, seq_lens, *whole(block_table))
    position = rows.decode_rows(index_q.shape[0], seq_lens).position
    return only_visible(scores, position[:, None, None], index_k.shape[1])


def _topk_decode(index_q, index_k, block_table, seq_lens, **choice):
    return _choose_decode(index_q, index_k, block_table, seq_lens, *whole(block_table), **choice)


def _candidates_decode(index_q, index_k, block_table, seq_lens, share, *, num_shares, **choice):
    shares = Shares(block_table.shape[1], num_shares)
    return _choose_decode(index_q, index_k, block_table, seq_lens, share.reshape(1), shares, **choice, with_keys=True)


def _choose_decode(index_q, index_k, block_table, seq_lens, share, shares, **options):
    from pallas_kernels.index_topk import triton_choose as choosing

    index_q, index_k = lax.stop_gradient((index_q, index_k))
    num_rows, num_heads, _ = index_q.shape
    num_queries = num_rows // block_table.shape[0]
    table = _decode_table(index_q, index_k, block_table, seq_lens, share, shares)
    table = table.reshape(num_rows * num_heads, -1)
    choice = choosing.Choice(num_heads, num_queries, -num_queries, index_k.shape[1], shares, **options)
    config = choosing.TuningConfig.heuristic(table.shape[0], table.shape[1], choice.top_k)
    chosen = choosing.choose(table, seq_lens, share, choice=choice, config=config)
    return chosen.reshape(num_rows, num_heads, *chosen.shape[1:])


def _decode_table(index_q, index_k, block_table, seq_lens, share, shares):
    from pallas_kernels.index_topk import triton_score as scoring

    config = scoring.TuningConfig.for_decode(block_table.shape[0], shares.width)
    return scoring.score_decode(index_q, index_k, block_table, seq_lens, share, shares=shares, config=config)


def _score_prefill(index_q, index_k, block_table, *lengths):
    def finish(table, positions):
        return only_visible(table, positions[:, :, None, None], index_k.shape[1])

    scores, position = _prefill(finish, index_q, index_k, block_table, lengths, *whole(block_table))
    return jnp.where(position[:, None, None] >= 0, scores, -jnp.inf)


def _topk_prefill(index_q, index_k, block_table, *lengths, **choice):
    ids, position = _choose_prefill(index_q, index_k, block_table, lengths, *whole(block_table), **choice)
    return live_choice(ids, position)


def _candidates_prefill(
    index_q, index_k, block_table, cu_seqlens, seq_lens, context_lens, share, *, num_shares, **choice
):
    shares = Shares(block_table.shape[1], num_shares)
    candidates, position = _choose_prefill(
        index_q,
        index_k,
        block_table,
        (cu_seqlens, seq_lens, context_lens),
        share.reshape(1),
        shares,
        **choice,
        with_keys=True,
    )
    return live_candidates(candidates, position)


def _choose_prefill(index_q, index_k, block_table, lengths, share, shares, **options):
    """What each row chooses of a share, of which dead rows may hold anything, and the rows' positions."""
    from pallas_kernels.index_topk import triton_choose as choosing

    index_q, index_k = lax.stop_gradient((index_q, index_k))
    choice = choosing.Choice(index_q.shape[1], 1, 0, index_k.shape[1], shares, **options)

    def choose(table, positions):
        flat = table.reshape(-1, table.shape[-1])
        config = choosing.TuningConfig.heuristic(flat.shape[0], flat.shape[1], choice.top_k)
        chosen = choosing.choose(flat, positions.reshape(-1), share, choice=choice, config=config)
        return chosen.reshape(*table.shape[:3], *chosen.shape[1:])

    return _prefill(choose, index_q, index_k, block_table, lengths, share, shares)


def _prefill(finish, index_q, index_k, block_table, lengths, share, shares):
    """finish(scores f32[tiles, height, K, M], positions) -> [tiles, height, K, ...], back in the rows' order.

    Returns [T, K, ...], of which dead rows may hold anything, and the rows' positions.
    """
    from pallas_kernels.index_topk import triton_score as scoring

    num_rows, num_heads, _ = index_q.shape
    height = scoring.tile_height(num_heads)
    tiles = rows.prefill_tiles(num_rows, height, *lengths)
    num_tiles = tiles.rows.shape[0]
    at_a_time = min(num_tiles, max(1, _TABLE_BYTES // (height * num_heads * shares.width * 4)))
    config = scoring.TuningConfig.for_prefill(at_a_time, shares.width)

    def score_and_finish(inputs):
        sequence, row, positions = inputs
        table = scoring.score_prefill(
            index_q, index_k, block_table, sequence, row, positions, share, shares=shares, config=config
        )
        return finish(table, positions)

    inputs = (tiles.sequence, tiles.rows, tiles.positions)
    if at_a_time == num_tiles:
        result = score_and_finish(inputs)
    else:
        num_groups = -(-num_tiles // at_a_time)
        padding = num_groups * at_a_time - num_tiles
        # Tiles without rows.
        padded = (
            jnp.pad(tiles.sequence, (0, padding)),
            jnp.pad(tiles.rows, ((0, padding), (0, 0)), constant_values=num_rows),
            jnp.pad(tiles.positions, ((0, padding), (0, 0)), constant_values=-1),
        )
        grouped = tuple(array.reshape(num_groups, at_a_time, *array.shape[1:]) for array in padded)
        result = lax.map(score_and_finish, grouped)
        result = result.reshape(-1, *result.shape[2:])
    by_place = result.reshape(-1, *result.shape[2:])
    position = rows.prefill_rows(num_rows, *lengths).position
    return by_place.at[tiles.places].get(mode="clip"), position


_CHOICE = ("top_k", "init_blocks", "local_blocks")
_CANDIDATES = ("num_shares", *_CHOICE)
index_score_prefill = Implementation(
    _prefill_supported, with_derivative_of(reference.index_score_prefill.run, jax.jit(_score_prefill))
)
index_topk_prefill = Implementation(_prefill_supported, jax.jit(_topk_prefill, static_argnames=_CHOICE))
index_candidates_prefill = Implementation(_prefill_supported, jax.jit(_candidates_prefill, static_argnames=_CANDIDATES))
index_score_decode = Implementation(
    _decode_supported, with_derivative_of(reference.index_score_decode.run, jax.jit(_score_decode))
)
index_topk_decode = Implementation(_decode_supported, jax.jit(_topk_decode, static_argnames=_CHOICE))
index_candidates_decode = Implementation(_decode_supported, jax.jit(_candidates_decode, static_argnames=_CANDIDATES))
