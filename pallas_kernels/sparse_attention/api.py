"""Public functions of block-sparse attention: contracts, checks, dispatch.

A query row attends, per KV head, to the tokens of the blocks that were chosen for it (see
`pallas_kernels.index_topk`) up to its own position: softmax(scale * q.k) over those keys, in float32.
Query heads n*G to n*G + G - 1 share KV head n.

Letters: B sequences, T query rows, N query heads, K KV heads, G = N / K, H head dim, P pages, S page size,
M pages of a sequence's table, C chosen blocks.
"""

from typing import Any

from jaxtyping import Array, Float, Int32

from pallas_kernels import checks
from pallas_kernels.dispatch import Operation

# In order of preference.
_MODULES = {
    "mosaic_gpu": "pallas_kernels.sparse_attention.mosaic_gpu",
    "triton": "pallas_kernels.sparse_attention.triton_gpu",
    "reference": "pallas_kernels.sparse_attention.reference",
}
OPERATIONS = {name: Operation(name, _MODULES) for name in ("sparse_attention_prefill", "sparse_attention_decode")}


def sparse_attention_prefill(
    q: Float[Array, "T N H"],
    k: Float[Array, "P K S H"],
    v: Float[Array, "P K S H"],
    block_ids: Int32[Array, "T K C"],
    block_table: Int32[Array, "B M"],
    cu_seqlens: Int32[Array, " B+1"],
    seq_lens: Int32[Array, " B"],
    context_lens: Int32[Array, " B"],
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> Float[Array, "T N H"]:
    """Attend to the chosen blocks for every row of a ragged batch.

    q, k, v: bfloat16, float16 or float32, all of one dtype. Slots of k and v that hold no token may hold
      anything.
    block_ids: distinct logical block numbers for each row and KV head; a negative one is unused.
    block_table: the page of block j of sequence b is block_table[b, j]. Entries beyond a sequence's blocks
      may be anything, negative and out of range included.
    cu_seqlens: row r belongs to sequence b when cu_seqlens[b] <= r < cu_seqlens[b+1].
    seq_lens: keys in the cache, those of this call's tokens included.
    context_lens: keys that were there before. Row i of sequence b is live when
      i < seq_lens[b] - context_lens[b], its position is context_lens[b] + i, and it sees the keys at
      positions 0 to its own. Packed and right-padded layouts are both legal, and so are empty sequences.
    scale: positive factor of the logits; None means H ** -0.5.
    impl: name of an implementation; None takes the first that is supported.

    Returns the attention in q's dtype; 0 in dead rows and in rows that see no key of a chosen block.
    Differentiable in q, k and v.
    Raises ValueError or TypeError for shapes, dtypes and a scale that do not fit, NotImplementedError when
    the implementation cannot serve them.
    """
    _check(q, k, v, block_ids, block_table, seq_lens, cu_seqlens=cu_seqlens, context_lens=context_lens)
    return OPERATIONS["sparse_attention_prefill"](
        q,
        k,
        v,
        block_ids,
        block_table,
        cu_seqlens,
        seq_lens,
        context_lens,
        scale=checks.scale_of(scale, q.shape[-1]),
        impl=impl,
    )


def sparse_attention_decode(
    q: Float[Array, "T N H"],
    k: Float[Array, "P K S H"],
    v: Float[Array, "P K S H"],
    block_ids: Int32[Array, "T K C"],
    block_table: Int32[Array, "B M"],
    seq_lens: Int32[Array, " B"],
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> Float[Array, "T N H"]:
    """Attend to the chosen blocks for the last Q = T / B tokens of each sequence.

    Row b*Q + i stands at position seq_lens[b] - Q + i; where that is negative the row is dead. Everything
    else is as in `sparse_attention_prefill`.
    """
    _check(q, k, v, block_ids, block_table, seq_lens)
    return OPERATIONS["sparse_attention_decode"](
        q, k, v, block_ids, block_table, seq_lens, scale=checks.scale_of(scale, q.shape[-1]), impl=impl
    )


def _check(q: Any, k: Any, v: Any, block_ids: Any, block_table: Any, seq_lens: Any, **ragged: Any) -> None:
    shapes = checks.check_attention(q, k, v, block_table, seq_lens)
    shapes.bind("block_ids", block_ids, "T K C")
    if ragged:
        shapes.bind("cu_seqlens", ragged["cu_seqlens"], "B+1")
        shapes.bind("context_lens", ragged["context_lens"], "B")
    else:
        checks.check_uniform_queries(shapes, "q")
    checks.check_int32(block_ids=block_ids, **ragged)
