"""The block indexer as Pallas:Mosaic GPU kernels for Hopper: what they serve, and how they are put together.

A decode call makes a table of scores, blocks x columns, a column being a (token, head), and then chooses from its
columns. A prefill call chooses while it scores, window by window of rows.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper, rows, tuned
from pallas_kernels.derivatives import with_derivative_of
from pallas_kernels.dispatch import Implementation
from pallas_kernels.index_topk import reference
from pallas_kernels.index_topk.masks import live_candidates, live_choice, only_visible
from pallas_kernels.index_topk.mosaic_gpu_tiles import Cut, blocks_up_to, windows
from pallas_kernels.index_topk.shares import Shares, whole


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


def _decode_supported(index_q, index_k, block_table, *_lengths_and_share, top_k=None, **_options) -> str | None:
    reason = hopper.why_not_queries(index_q.shape[0], block_table.shape[0])
    return reason or _why_not(index_q, index_k, block_table, top_k)


def _prefill_supported(index_q, index_k, block_table, *_lengths_and_share, top_k=None, **_options) -> str | None:
    return _why_not(index_q, index_k, block_table, top_k)


def _score_decode(index_q, index_k, block_table, seq_lens, *, interpret=None):
    num_rows, num_heads, _ = index_q.shape
    columns = num_rows // block_table.shape[0] * num_heads
    scores = _decode_table(index_q, index_k, block_table, seq_lens, *whole(block_table), 1, interpret)
    scores = scores[:, :columns].reshape(num_rows, num_heads, -1)
    position = rows.decode_rows(num_rows, seq_lens).position
    return only_visible(scores, position[:, None, None], hopper.PAGE_SIZE)


def _topk_decode(index_q, index_k, block_table, seq_lens, *, interpret=None, **choice):
    return _choose_decode(index_q, index_k, block_table, seq_lens, *whole(block_table), interpret=interpret, **choice)


def _candidates_decode(index_q, index_k, block_table, seq_lens, share, *, num_shares, interpret=None, **choice):
    shares = Shares(block_table.shape[1], num_shares)
    share = share.reshape(1)
    return _choose_decode(
        index_q, index_k, block_table, seq_lens, share, shares, interpret=interpret, with_keys=True, **choice
    )


def _choose_decode(index_q, index_k, block_table, seq_lens, share, shares, *, interpret, **options):
    from pallas_kernels.index_topk import mosaic_gpu_choose as choosing

    index_q, index_k = lax.stop_gradient((index_q, index_k))
    choice = _decode_choice(index_q, block_table, shares, **options)
    config = _decode_choosing(index_q, shares)
    scores = _decode_table(index_q, index_k, block_table, seq_lens, share, shares, config.blocks, interpret)
    chosen = choosing.choose(scores, seq_lens, share, choice=choice, config=config, interpret=interpret)
    return chosen[:, : choice.num_columns].reshape(*index_q.shape[:2], *chosen.shape[2:])


def scores_to_choose_from(index_q, index_k, block_table, seq_lens, *, interpret=None, **options):
    """Scores of a decode call, and by what a kernel chooses from them; None if they are more than one CTA can see."""
    from pallas_kernels.index_topk import mosaic_gpu_choose as choosing

    index_q, index_k = lax.stop_gradient((index_q, index_k))
    share, shares = whole(block_table)
    config = choosing.TuningConfig().fitted(shares.width)
    if config.blocks < shares.width:
        return None
    chooser = choosing.Chooser(_decode_choice(index_q, block_table, shares, **options), config)
    return _decode_table(index_q, index_k, block_table, seq_lens, share, shares, config.blocks, interpret), chooser


def _decode_choice(index_q, block_table, shares, **options):
    from pallas_kernels.index_topk import mosaic_gpu_choose as choosing

    num_rows, num_heads, _ = index_q.shape
    num_queries = num_rows // block_table.shape[0]
    return choosing.Choice(num_heads, num_queries * num_heads, shares, shift=-num_queries, **options)


def _decode_table(index_q, index_k, block_table, seq_lens, share, shares, multiple, interpret):
    """Scores for a multiple of so many blocks."""
    from pallas_kernels.index_topk import mosaic_gpu_score_decode as scoring

    num_blocks = hopper.round_up(shares.width, multiple)
    return scoring.score_decode(
        index_q, index_k, block_table, seq_lens, share, shares=shares, num_blocks=num_blocks, interpret=interpret
    )


def _decode_choosing(index_q, shares):
    from pallas_kernels.index_topk import mosaic_gpu_choose as choosing

    columns = index_q.shape[0] * index_q.shape[1]
    config = tuned.config("choose_decode", choosing.TuningConfig(), columns=columns, table_width=shares.width)
    return config.fitted(shares.width)


def _topk_prefill(index_q, index_k, block_table, *lengths, **options):
    chosen, position = _choose_prefill(index_q, index_k, block_table, lengths, *whole(block_table), **options)
    return live_choice(chosen[:, :, 0], position)


def _candidates_prefill(index_q, index_k, block_table, *lengths_and_share, num_shares, **options):
    *lengths, share = lengths_and_share
    shares = Shares(block_table.shape[1], num_shares)
    candidates, position = _choose_prefill(
        index_q, index_k, block_table, lengths, share.reshape(1), shares, with_keys=True, **options
    )
    return live_candidates(candidates, position)


def _choose_prefill(index_q, index_k, block_table, lengths, share, shares, *, config=None, interpret=None, **options):
    """What each row chooses of a share, i32[T, K, 1 or 2, C], and the rows' positions; dead rows may hold anything."""
    from pallas_kernels.index_topk import mosaic_gpu_choose_prefill as choosing

    index_q, index_k = lax.stop_gradient((index_q, index_k))
    num_rows, num_heads, _ = index_q.shape
    index_q, cut = _padded(index_q, block_table)
    window = windows(index_q.shape[0], cut, *lengths)
    num_windows = window.sequence.shape[0]
    if config is None:
        heuristic = choosing.TuningConfig()
        config = tuned.config("choose_pieces", heuristic, windows=num_windows, table_width=shares.width)
    choice = choosing.Choice(shares, **options)
    ends = blocks_up_to(num_windows, choice.local_blocks, choice.piece_units(config), cut, *lengths)
    chosen = choosing.choose_prefill(
        index_q,
        index_k,
        block_table,
        *window[:3],
        ends,
        share,
        choice=choice,
        config=config,
        interpret=interpret,
    )
    height = choosing.WIDTH // num_heads
    # A column of a window is a (token, head).
    by_token = chosen.reshape(*chosen.shape[:3], height, num_heads)
    # Shifts and masks, and no case for negative numbers: every element of the result computes its place anew.
    place = jnp.minimum(window.places[:num_rows], num_windows * height - 1)
    of_rows = by_token.at[rows.divided(place, height), :, :, place & (height - 1)].get(
        mode="promise_in_bounds", wrap_negative_indices=False
    )
    return jnp.moveaxis(of_rows, 3, 1), window.position[:num_rows]


def _score_prefill(index_q, index_k, block_table, cu_seqlens, seq_lens, context_lens, *, interpret=None):
    from pallas_kernels.index_topk import mosaic_gpu_score_prefill as scoring

    table_width = block_table.shape[1]
    num_rows, num_heads, _ = index_q.shape
    index_q, cut = _padded(index_q, block_table)
    window = windows(index_q.shape[0], cut, cu_seqlens, seq_lens, context_lens)
    num_windows = window.sequence.shape[0]
    heuristic = scoring.TuningConfig.heuristic(num_windows)
    config = tuned.config("score_prefill", heuristic, windows=num_windows, table_width=table_width)
    scores = scoring.score_prefill(index_q, index_k, block_table, *window[:4], config=config, interpret=interpret)
    scores = scores.swapaxes(1, 2).reshape(-1, num_heads, table_width)
    scores = scores.at[window.places[:num_rows]].get(mode="clip")
    return only_visible(scores, window.position[:num_rows, None, None], hopper.PAGE_SIZE)


def _padded(index_q, block_table):
    """Queries padded to whole windows, and how these are cut."""
    from pallas_kernels.index_topk import mosaic_gpu_score_prefill as scoring

    num_rows, num_heads, _ = index_q.shape
    height, alignment = scoring.WIDTH // num_heads, scoring.ALIGNMENT // num_heads
    padded_rows = max(height, hopper.round_up(num_rows, alignment))
    if padded_rows > num_rows:
        index_q = jnp.pad(index_q, ((0, padded_rows - num_rows), (0, 0), (0, 0)))
    return index_q, Cut(height, alignment, hopper.PAGE_SIZE, block_table.shape[1])


index_score_prefill = Implementation(
    _prefill_supported, with_derivative_of(reference.index_score_prefill.run, _score_prefill)
)
index_topk_prefill = Implementation(_prefill_supported, _topk_prefill)
index_score_decode = Implementation(
    _decode_supported, with_derivative_of(reference.index_score_decode.run, _score_decode)
)
index_topk_decode = Implementation(_decode_supported, _topk_decode)
index_candidates_prefill = Implementation(_prefill_supported, _candidates_prefill)
index_candidates_decode = Implementation(_decode_supported, _candidates_decode)
