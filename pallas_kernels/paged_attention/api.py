"""The public function of dense attention to a paged cache: contract, checks, dispatch.

A query row attends to the keys at positions 0 to its own: softmax(scale * q.k) over them, in float32. Query heads
n*G to n*G + G - 1 share KV head n.

Letters: B sequences, T query rows, N query heads, K KV heads, G = N / K, H head dim, P pages, S page size, M pages of
a sequence's table.
"""

from jaxtyping import Array, Float, Int32

from pallas_kernels import checks
from pallas_kernels.dispatch import Operation

# In order of preference.
_MODULES = {
    "mosaic_gpu": "pallas_kernels.paged_attention.mosaic_gpu",
    "reference": "pallas_kernels.paged_attention.reference",
}
OPERATIONS = {"paged_attention_decode": Operation("paged_attention_decode", _MODULES)}


def paged_attention_decode(
    q: Float[Array, "T N H"],
    k: Float[Array, "P K S H"],
    v: Float[Array, "P K S H"],
    block_table: Int32[Array, "B M"],
    seq_lens: Int32[Array, " B"],
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> Float[Array, "T N H"]:
    """Attend to all visible keys for the last Q = T / B tokens of each sequence.

    Row b*Q + i stands at position seq_lens[b] - Q + i; where that is negative the row is dead.

    q, k, v: bfloat16, float16 or float32, all of one dtype. Slots of k and v that hold no token may hold
      anything.
    block_table: the page of block j of sequence b is block_table[b, j]. Entries beyond a sequence's blocks
      may be anything, negative and out of range included.
    seq_lens: keys in the cache, those of this call's tokens included.
    scale: positive factor of the logits; None means H ** -0.5.
    impl: name of an implementation; None takes the first that is supported.

    Returns the attention in q's dtype; 0 in dead rows. Differentiable in q, k and v.
    Raises ValueError or TypeError for shapes, dtypes and a scale that do not fit, NotImplementedError when
    the implementation cannot serve them.
    """
    shapes = checks.check_attention(q, k, v, block_table, seq_lens)
    checks.check_uniform_queries(shapes, "q")
    scale = checks.scale_of(scale, q.shape[-1])
    return OPERATIONS["paged_attention_decode"](q, k, v, block_table, seq_lens, scale=scale, impl=impl)
