"""Dense attention of a decode call as a Pallas:Mosaic GPU kernel for Hopper: what it serves.

The kernel is that of block-sparse attention, which walks over all blocks where none are chosen.
"""

from pallas_kernels import hopper
from pallas_kernels.derivatives import with_derivative_of
from pallas_kernels.dispatch import Implementation
from pallas_kernels.paged_attention import reference


def _supported(q, k, _v, block_table, _seq_lens, *, scale) -> str | None:
    reason = hopper.why_not_queries(q.shape[0], block_table.shape[0])
    reason = reason or hopper.why_not_sizes(
        dtype=k.dtype,
        page_size=k.shape[2],
        num_sequences=block_table.shape[0],
        kv_heads=k.shape[1],
        head_dim=k.shape[3],
    )
    return reason or hopper.why_not_group(q.shape[1], k.shape[1]) or hopper.why_not_here()


def _decode(q, k, v, block_table, seq_lens, *, scale, interpret=None):
    from pallas_kernels.sparse_attention import mosaic_gpu_decode as decoding

    config = decoding.TuningConfig.for_all_blocks(q.shape[0] * k.shape[1], block_table.shape[1])
    return decoding.attend_decode(q, k, v, None, block_table, seq_lens, scale=scale, config=config, interpret=interpret)


paged_attention_decode = Implementation(_supported, with_derivative_of(reference.paged_attention_decode.run, _decode))
