"""The public function of choosing blocks and attending to them in one: contract, checks, dispatch.

A decode step needs the choice for nothing but the attention. Where one operation makes both, a kernel does without a
launch, and begins with blocks that are chosen in any case while it chooses the others.

Letters: B sequences, T query rows, N query heads, K KV heads (= index heads), H head dim, I index dim, P pages, S page
size, M pages of a sequence's table, C = top_k chosen blocks.
"""

from jaxtyping import Array, Float, Int32

from pallas_kernels import checks
from pallas_kernels.dispatch import Operation

# In order of preference.
_MODULES = {
    "mosaic_gpu": "pallas_kernels.index_sparse_attention.mosaic_gpu",
    "triton": "pallas_kernels.index_sparse_attention.triton_gpu",
    "reference": "pallas_kernels.index_sparse_attention.reference",
}
OPERATIONS = {"index_sparse_attention_decode": Operation("index_sparse_attention_decode", _MODULES)}


def index_sparse_attention_decode(
    index_q: Float[Array, "T K I"],
    index_k: Float[Array, "P S I"],
    q: Float[Array, "T N H"],
    k: Float[Array, "P K S H"],
    v: Float[Array, "P K S H"],
    block_table: Int32[Array, "B M"],
    seq_lens: Int32[Array, " B"],
    *,
    top_k: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "T N H"], Int32[Array, "T K C"]]:
    """Choose blocks for the last Q = T / B tokens of each sequence, and attend to them.

    Returns what `sparse_attention_decode` does with the blocks that `index_topk_decode` chooses, and these: arguments,
    results and errors are theirs. Differentiable in q, k and v.
    """
    shapes = checks.check_attention(q, k, v, block_table, seq_lens)
    shapes.bind("index_q", index_q, "T K I")
    shapes.bind("index_k", index_k, "P S I")
    checks.check_cache_dtypes("index_q", index_q, index_k=index_k)
    checks.check_uniform_queries(shapes, "q")
    checks.check_choice(top_k, init_blocks, local_blocks)
    return OPERATIONS["index_sparse_attention_decode"](
        index_q,
        index_k,
        q,
        k,
        v,
        block_table,
        seq_lens,
        top_k=top_k,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        scale=checks.scale_of(scale, q.shape[-1]),
        impl=impl,
    )
