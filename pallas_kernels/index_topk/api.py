"""Public functions of the block indexer: contracts, checks, dispatch.

The score of a block for a query row and an index head is the largest dot product of the row's index query
with the index keys of the block that the row sees: float32, no scale, no reduction over heads (MiniMax
Sparse Attention, score type "max"). A block is a page of S tokens; block j of a sequence holds positions
j*S to j*S + S - 1, and it is visible to a row when its first position is not beyond the row's.

Letters: B sequences, T query rows, K index heads (= KV heads), I index dim, P pages, S page size, M pages
of a sequence's table, C = top_k chosen blocks, N shares of the blocks.

Where several devices hold the same index keys, each may score a share of the blocks for all heads
(`index_candidates_decode`, `index_candidates_prefill`); `merge_candidates` of what they found is the choice that
`index_topk_decode` and `index_topk_prefill` make, bit for bit.
"""

from typing import Any

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import checks
from pallas_kernels.dispatch import Operation
from pallas_kernels.index_topk import keys

# In order of preference.
_MODULES = {
    "mosaic_gpu": "pallas_kernels.index_topk.mosaic_gpu",
    "triton": "pallas_kernels.index_topk.triton_gpu",
    "reference": "pallas_kernels.index_topk.reference",
}
OPERATIONS = {
    name: Operation(name, _MODULES)
    for name in (
        "index_score_prefill",
        "index_topk_prefill",
        "index_candidates_prefill",
        "index_score_decode",
        "index_topk_decode",
        "index_candidates_decode",
    )
}


def index_score_prefill(
    index_q: Float[Array, "T K I"],
    index_k: Float[Array, "P S I"],
    block_table: Int32[Array, "B M"],
    cu_seqlens: Int32[Array, " B+1"],
    seq_lens: Int32[Array, " B"],
    context_lens: Int32[Array, " B"],
    *,
    impl: str | None = None,
) -> Float32[Array, "T K M"]:
    """Score every block for every row of a ragged batch.

    index_q: bfloat16, float16 or float32, of index_k's dtype.
    index_k: one index key a token, shared by the heads. Slots that hold no token may hold anything.
    block_table: the page of block j of sequence b is block_table[b, j]. Entries beyond a sequence's blocks
      may be anything, negative and out of range included.
    cu_seqlens: row r belongs to sequence b when cu_seqlens[b] <= r < cu_seqlens[b+1].
    seq_lens: keys in the cache, those of this call's tokens included.
    context_lens: keys that were there before. Row i of sequence b is live when
      i < seq_lens[b] - context_lens[b], its position is context_lens[b] + i, and it sees the keys at
      positions 0 to its own. Packed and right-padded layouts are both legal, and so are empty sequences.
    impl: name of an implementation; None takes the first that is supported.

    Returns the scores, -inf where a block is invisible to the row and in dead rows. Differentiable in
    index_q and index_k.
    Raises ValueError or TypeError for shapes and dtypes that do not fit, NotImplementedError when the
    implementation cannot serve them.
    """
    _check(index_q, index_k, block_table, seq_lens, cu_seqlens=cu_seqlens, context_lens=context_lens)
    operation = OPERATIONS["index_score_prefill"]
    return operation(index_q, index_k, block_table, cu_seqlens, seq_lens, context_lens, impl=impl)


def index_topk_prefill(
    index_q: Float[Array, "T K I"],
    index_k: Float[Array, "P S I"],
    block_table: Int32[Array, "B M"],
    cu_seqlens: Int32[Array, " B+1"],
    seq_lens: Int32[Array, " B"],
    context_lens: Int32[Array, " B"],
    *,
    top_k: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
    impl: str | None = None,
) -> Int32[Array, "T K C"]:
    """Choose the `top_k` best blocks for every row of a ragged batch; arrays as in `index_score_prefill`.

    init_blocks, local_blocks: the first `init_blocks` blocks, and the row's own block with the
      `local_blocks` - 1 before it, are chosen whatever their score; they count within top_k.

    Returns logical block numbers: the forced blocks first in ascending order, then the others by (score
    descending, lower number first), -1 on the right where fewer are visible, and throughout in dead rows.
    Forced blocks come before all others and visible ones before invisible ones, whatever their scores:
    NaN counts as the lowest score, infinities as the largest finite numbers. There is no derivative: the
    choice is an integer.
    Raises as `index_score_prefill`; ValueError also for init_blocks + local_blocks > top_k.
    """
    _check(index_q, index_k, block_table, seq_lens, cu_seqlens=cu_seqlens, context_lens=context_lens)
    checks.check_choice(top_k, init_blocks, local_blocks)
    return OPERATIONS["index_topk_prefill"](
        index_q,
        index_k,
        block_table,
        cu_seqlens,
        seq_lens,
        context_lens,
        top_k=top_k,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        impl=impl,
    )


def index_candidates_prefill(
    index_q: Float[Array, "T K I"],
    index_k: Float[Array, "P S I"],
    block_table: Int32[Array, "B M"],
    cu_seqlens: Int32[Array, " B+1"],
    seq_lens: Int32[Array, " B"],
    context_lens: Int32[Array, " B"],
    share: Int32[Array, ""],
    *,
    num_shares: int,
    top_k: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
    impl: str | None = None,
) -> Int32[Array, "T K 2 C"]:
    """Choose the `top_k` best blocks of one share for every row; arrays and choice as in `index_topk_prefill`.

    share: 0 to num_shares - 1, of which share d has the blocks d, d + num_shares, d + 2 num_shares, and so on:
      of whatever length a sequence is, every share has its part. Other columns of the table, and the pages
      that they name, are not read. It may be traced, such as `lax.axis_index`.

    Returns the keys [T, K, 0, C] and the numbers [T, K, 1, C] of the blocks, as `keys` defines them, best first; where
    the share has fewer visible blocks, and in dead rows, the key is `keys.INVISIBLE` and the number -1.
    Raises as `index_topk_prefill`; ValueError also for num_shares below 1.
    """
    _check(index_q, index_k, block_table, seq_lens, cu_seqlens=cu_seqlens, context_lens=context_lens)
    checks.check_choice(top_k, init_blocks, local_blocks)
    _check_share(share, num_shares)
    return OPERATIONS["index_candidates_prefill"](
        index_q,
        index_k,
        block_table,
        cu_seqlens,
        seq_lens,
        context_lens,
        share,
        num_shares=num_shares,
        top_k=top_k,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        impl=impl,
    )


def index_score_decode(
    index_q: Float[Array, "T K I"],
    index_k: Float[Array, "P S I"],
    block_table: Int32[Array, "B M"],
    seq_lens: Int32[Array, " B"],
    *,
    impl: str | None = None,
) -> Float32[Array, "T K M"]:
    """Score every block for the last Q = T / B tokens of each sequence.

    Row b*Q + i stands at position seq_lens[b] - Q + i; where that is negative the row is dead. Everything
    else is as in `index_score_prefill`.
    """
    _check(index_q, index_k, block_table, seq_lens)
    return OPERATIONS["index_score_decode"](index_q, index_k, block_table, seq_lens, impl=impl)


def index_topk_decode(
    index_q: Float[Array, "T K I"],
    index_k: Float[Array, "P S I"],
    block_table: Int32[Array, "B M"],
    seq_lens: Int32[Array, " B"],
    *,
    top_k: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
    impl: str | None = None,
) -> Int32[Array, "T K C"]:
    """Choose the `top_k` best blocks for the last Q = T / B tokens of each sequence.

    Rows as in `index_score_decode`, choice as in `index_topk_prefill`.
    """
    _check(index_q, index_k, block_table, seq_lens)
    checks.check_choice(top_k, init_blocks, local_blocks)
    return OPERATIONS["index_topk_decode"](
        index_q,
        index_k,
        block_table,
        seq_lens,
        top_k=top_k,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        impl=impl,
    )


def index_candidates_decode(
    index_q: Float[Array, "T K I"],
    index_k: Float[Array, "P S I"],
    block_table: Int32[Array, "B M"],
    seq_lens: Int32[Array, " B"],
    share: Int32[Array, ""],
    *,
    num_shares: int,
    top_k: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
    impl: str | None = None,
) -> Int32[Array, "T K 2 C"]:
    """Choose the `top_k` best blocks of one share for the last Q = T / B tokens of each sequence.

    Rows as in `index_score_decode`, shares and candidates as in `index_candidates_prefill`.
    """
    _check(index_q, index_k, block_table, seq_lens)
    checks.check_choice(top_k, init_blocks, local_blocks)
    _check_share(share, num_shares)
    return OPERATIONS["index_candidates_decode"](
        index_q,
        index_k,
        block_table,
        seq_lens,
        share,
        num_shares=num_shares,
        top_k=top_k,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        impl=impl,
    )


def merge_candidates(candidates: Int32[Array, "N T K 2 C"]) -> Int32[Array, "T K C"]:
    """Choose the C best of all shares' candidates: what `index_topk_decode` or `index_topk_prefill` returns.

    candidates: of shares 0 to N - 1 in any order, each with the same top_k, init_blocks, local_blocks and rows.
    Plain JAX, for any backend. Raises ValueError or TypeError for another shape or dtype.
    """
    shapes = checks.Shapes()
    shapes.bind("candidates", candidates, "N T K two C")
    if shapes["two"] != 2:
        raise ValueError(f"candidates has shape {candidates.shape}, of which axis 3 must be 2: keys and block numbers")
    checks.check_int32(candidates=candidates)
    return keys.merge(candidates)


def _check(index_q: Any, index_k: Any, block_table: Any, seq_lens: Any, **ragged: Any) -> None:
    shapes = checks.Shapes()
    shapes.bind("index_q", index_q, "T K I")
    shapes.bind("index_k", index_k, "P S I")
    shapes.bind("block_table", block_table, "B M")
    shapes.bind("seq_lens", seq_lens, "B")
    checks.check_cache_dtypes("index_q", index_q, index_k=index_k)
    if ragged:
        shapes.bind("cu_seqlens", ragged["cu_seqlens"], "B+1")
        shapes.bind("context_lens", ragged["context_lens"], "B")
    else:
        checks.check_uniform_queries(shapes, "index_q")
    checks.check_int32(block_table=block_table, seq_lens=seq_lens, **ragged)


def _check_share(share: Any, num_shares: Any) -> None:
    checks.check_count("num_shares", num_shares, 1)
    if getattr(share, "shape", None) != ():
        raise TypeError(f"share={share!r} must be a scalar array")
    checks.check_int32(share=share)
