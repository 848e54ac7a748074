"""Block-sparse attention as Pallas:Mosaic GPU kernels for Hopper: what they serve, and how they are put together.

Decode: every row walks over its own pages. Prefill: every page meets the rows that chose it, but for those of their
blocks that neighbouring rows have in common, over which these walk together; and what they leave is merged, for some
rows of the call at a time.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper, tuned
from pallas_kernels.derivatives import with_derivative_of
from pallas_kernels.dispatch import Implementation
from pallas_kernels.rows import prefill_rows
from pallas_kernels.sparse_attention import reference

# (token, KV head, slot) of which partial results are held at a time, 2.625 KiB each, or 4 of float16.
_PAIRS = 2**19
# Where neighbouring rows are likely to have enough blocks in common, and where there is enough to do, to look for them:
# blocks of a sequence at most, (token, KV head) at least, and as many of these for each block. Elsewhere an H200 takes
# longer with it.
_MOST_BLOCKS, _LEAST_UNITS, _UNITS_OF_BLOCK = 64, 2**13, 2**8
# Such parts that are planned at a time: together they take far fewer kernels.
_PLANNED = 4


def _why_not(q, k, block_ids, block_table) -> str | None:
    num_heads, kv_heads, top_k = q.shape[1], k.shape[1], block_ids.shape[2]
    reason = hopper.why_not_sizes(
        dtype=k.dtype,
        page_size=k.shape[2],
        num_sequences=block_table.shape[0],
        kv_heads=kv_heads,
        head_dim=k.shape[3],
    )
    reason = reason or hopper.why_not_group(num_heads, kv_heads)
    if reason is None and top_k not in hopper.TOP_KS:
        reason = f"there are {top_k} chosen blocks, not one of {', '.join(map(str, hopper.TOP_KS))}"
    return reason or hopper.why_not_here()


def _looks_for_common(num_units: int, table_width: int) -> bool:
    """Whether a prefill call of so many (token, KV head) looks for blocks that neighbouring rows have in common."""
    return table_width <= _MOST_BLOCKS and num_units >= max(_LEAST_UNITS, _UNITS_OF_BLOCK * table_width)


def _decode_supported(q, k, _v, block_ids, block_table, _seq_lens, *, scale) -> str | None:
    reason = hopper.why_not_queries(q.shape[0], block_table.shape[0])
    return reason or _why_not(q, k, block_ids, block_table)


def _prefill_supported(q, k, _v, block_ids, block_table, *_lengths, scale) -> str | None:
    return _why_not(q, k, block_ids, block_table)


def attend_decode(q, k, v, ids_or_scores, block_table, seq_lens, *, scale, chooser=None, interpret=None):
    """Attention to block ids, or to what a chooser makes of scores, and that: as in `mosaic_gpu_decode`."""
    from pallas_kernels.sparse_attention import mosaic_gpu_decode as decoding

    units, top_k = q.shape[0] * k.shape[1], ids_or_scores.shape[2] if chooser is None else chooser.choice.top_k
    heuristic = decoding.TuningConfig.heuristic(units, top_k, q.shape[1] // k.shape[1])
    config = tuned.config("attend_decode", heuristic, units=units, top_k=top_k)
    return decoding.attend_decode(
        q, k, v, ids_or_scores, block_table, seq_lens, scale=scale, config=config, chooser=chooser, interpret=interpret
    )


def _prefill(
    q,
    k,
    v,
    block_ids,
    block_table,
    cu_seqlens,
    seq_lens,
    context_lens,
    *,
    scale,
    config=None,
    pairs=_PAIRS,
    in_common=None,
    interpret=None,
):
    from pallas_kernels.sparse_attention import mosaic_gpu_common as sharing
    from pallas_kernels.sparse_attention import mosaic_gpu_merge as merging
    from pallas_kernels.sparse_attention import mosaic_gpu_neighbours as neighbours
    from pallas_kernels.sparse_attention import mosaic_gpu_plan as planning
    from pallas_kernels.sparse_attention import mosaic_gpu_prefill as attending

    num_rows, num_heads, _ = q.shape
    kv_heads, top_k = k.shape[1], block_ids.shape[2]
    group = num_heads // kv_heads
    if group < hopper.GROUP:
        # What the kernels multiply has room for whole groups.
        q = q.reshape(num_rows, kv_heads, group, hopper.DIM)
        q = jnp.pad(q, ((0, 0), (0, 0), (0, hopper.GROUP - group), (0, 0)))
        q = q.reshape(num_rows, kv_heads * hopper.GROUP, hopper.DIM)
    # Or XLA finds whose they are once more for every pair.
    rows = lax.optimization_barrier(prefill_rows(num_rows, cu_seqlens, seq_lens, context_lens))
    items, tails = planning.items_of(v, block_table, seq_lens)
    rows_at_a_time = pairs // (kv_heads * top_k)
    if config is None:
        num_items = items.page.shape[0]
        heuristic = attending.TuningConfig.heuristic(top_k, num_items)
        config = tuned.config("attend_prefill", heuristic, rows=min(num_rows, rows_at_a_time), items=num_items)
    window = min(config.window, rows_at_a_time)
    rows_at_a_time = min(rows_at_a_time - rows_at_a_time % window, num_rows)
    pairs = rows_at_a_time * kv_heads * top_k
    out = jax.new_ref(lax.empty((num_rows * kv_heads, hopper.GROUP, hopper.DIM), q.dtype))
    if in_common is None:
        in_common = _looks_for_common(num_rows * kv_heads, block_table.shape[1])
    groups = neighbours.groups_of(rows_at_a_time) if in_common else 0
    spare_tiles = groups * kv_heads * neighbours.TILES
    for first in range(0, num_rows, _PLANNED * rows_at_a_time):
        planned = slice(first, min(first + _PLANNED * rows_at_a_time, num_rows))
        ids, of_rows = block_ids[planned], (rows.sequence[planned], rows.position[planned])
        common = None
        if in_common:
            common = neighbours.find(ids, *of_rows, table_width=block_table.shape[1], rows_at_a_time=rows_at_a_time)
            ids = neighbours.without(ids, common.bits)
        plan = planning.plan(ids, *of_rows, block_table, items, window=window, rows_at_a_time=rows_at_a_time)
        plan = plan._replace(units=tuple(units + first * kv_heads for units in plan.units))
        parts = -(-(planned.stop - first) // rows_at_a_time)
        for part in range(parts):
            partials = attending.attend_prefill(
                q,
                k,
                v,
                tails,
                plan,
                jnp.asarray([part], jnp.int32),
                parts=parts,
                pairs=pairs,
                spare_tiles=spare_tiles,
                scale=scale,
                config=config,
                interpret=interpret,
            )
            places = planning.places_of(plan, part, parts=parts, pairs=pairs)
            first_row = first + part * rows_at_a_time
            if common is not None:
                first_tile = partials.shape[0] - 1 - spare_tiles
                bits = common.bits[part * rows_at_a_time : (part + 1) * rows_at_a_time]
                places = neighbours.places_with(places, bits, first_tile)
                partials = sharing.attend_common(
                    q,
                    k,
                    v,
                    tails,
                    common.of_groups,
                    rows,
                    block_table,
                    seq_lens,
                    jnp.asarray([first_row], jnp.int32),
                    jnp.asarray([part * groups], jnp.int32),
                    partials,
                    groups=groups,
                    first_tile=first_tile,
                    scale=scale,
                    ctas=config.ctas,
                    interpret=interpret,
                )
            units = places.size // top_k
            merging.merge_prefill(
                partials,
                places,
                jnp.asarray([first_row * kv_heads], jnp.int32),
                out,
                units=units,
                top_k=top_k,
                config=tuned.config("merge_prefill", merging.TuningConfig(), units=units, top_k=top_k),
                interpret=interpret,
            )
    results = out[...].reshape(num_rows, kv_heads, hopper.GROUP, hopper.DIM)[:, :, :group]
    return results.reshape(num_rows, num_heads, hopper.DIM)


sparse_attention_prefill = Implementation(
    _prefill_supported, with_derivative_of(reference.sparse_attention_prefill.run, _prefill)
)
sparse_attention_decode = Implementation(
    _decode_supported, with_derivative_of(reference.sparse_attention_decode.run, attend_decode)
)
