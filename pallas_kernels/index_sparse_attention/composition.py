"""Choice and attention one after the other: the operation as two others make it."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation


def composed(choose: Implementation, attend: Implementation) -> Implementation:
    """What implementations of `index_topk_decode` and of `sparse_attention_decode` make of the operation together."""

    def supported(index_q, index_k, q, k, v, block_table, seq_lens, *, top_k, scale, **forced) -> str | None:
        block_ids = jax.ShapeDtypeStruct((*index_q.shape[:2], top_k), jnp.int32)
        reason = choose.supported(index_q, index_k, block_table, seq_lens, top_k=top_k, **forced)
        return reason or attend.supported(q, k, v, block_ids, block_table, seq_lens, scale=scale)

    def run(index_q, index_k, q, k, v, block_table, seq_lens, *, scale, **choice) -> tuple[Any, Any]:
        block_ids = choose.run(index_q, index_k, block_table, seq_lens, **choice)
        return attend.run(q, k, v, block_ids, block_table, seq_lens, scale=scale), block_ids

    return Implementation(supported, run)
