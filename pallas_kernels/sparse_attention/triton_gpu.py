"""Block-sparse attention as Triton kernels for GPUs since Ampere: what they serve, and how they are put together."""

import jax

from pallas_kernels import triton_support
from pallas_kernels.derivatives import with_derivative_of
from pallas_kernels.dispatch import Implementation
from pallas_kernels.rows import prefill_rows
from pallas_kernels.sparse_attention import reference


def _why_not(q, k, _v, _block_ids, *_tables, scale) -> str | None:
    reason = triton_support.why_not_sizes(dtype=k.dtype, page_size=k.shape[2], head_dim=k.shape[3])
    group = q.shape[1] // k.shape[1]
    if reason is None and group > triton_support.MAX_GROUP:
        reason = f"{group} query heads share a KV head, more than {triton_support.MAX_GROUP}"
    return reason or triton_support.why_not_here()


def _decode(q, k, v, block_ids, block_table, seq_lens, *, scale):
    from pallas_kernels.sparse_attention import triton_attend as attending

    num_queries = q.shape[0] // block_table.shape[0]
    config = attending.TuningConfig.for_decode(q.shape[0] * k.shape[1], block_ids.shape[2], k.shape[2])
    return attending.attend(
        q, k, v, block_ids, block_table, seq_lens, seq_lens, num_queries=num_queries, scale=scale, config=config
    )


def _prefill(q, k, v, block_ids, block_table, cu_seqlens, seq_lens, context_lens, *, scale):
    from pallas_kernels.sparse_attention import triton_attend as attending

    rows = prefill_rows(q.shape[0], cu_seqlens, seq_lens, context_lens)
    config = attending.TuningConfig.for_prefill(k.shape[2])
    return attending.attend(
        q, k, v, block_ids, block_table, rows.sequence, rows.position, num_queries=0, scale=scale, config=config
    )


sparse_attention_prefill = Implementation(
    _why_not,
    with_derivative_of(reference.sparse_attention_prefill.run, jax.jit(_prefill, static_argnames=("scale",))),
)
sparse_attention_decode = Implementation(
    _why_not,
    with_derivative_of(reference.sparse_attention_decode.run, jax.jit(_decode, static_argnames=("scale",))),
)
