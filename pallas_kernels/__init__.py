"""The operations of MiniMax-M3 that have kernels of their own in JAX.

Paged block-sparse attention (choose blocks of keys, attend to them) over flat token rows and paged caches, dense
attention at decode, the projections of a decode step, norm, rotation and cache write in one, the grouped matmuls of a
mixture of experts, and the small sums over devices of a decode step. Each has one public function and any number of
implementations behind it (see `pallas_kernels.dispatch`).
"""

from pallas_kernels.all_reduce import all_reduce
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from pallas_kernels.index_sparse_attention import index_sparse_attention_decode
from pallas_kernels.index_topk import (
    index_score_decode,
    index_score_prefill,
    index_topk_decode,
    index_topk_prefill,
)
from pallas_kernels.norm_rope_cache import Heads, norm_rope_cache
from pallas_kernels.paged_attention import paged_attention_decode
from pallas_kernels.skinny_matmul import skinny_matmul
from pallas_kernels.sparse_attention import sparse_attention_decode, sparse_attention_prefill

__all__ = [
    "Heads",
    "all_reduce",
    "grouped_matmul",
    "grouped_swiglu",
    "index_score_decode",
    "index_score_prefill",
    "index_sparse_attention_decode",
    "index_topk_decode",
    "index_topk_prefill",
    "norm_rope_cache",
    "paged_attention_decode",
    "skinny_matmul",
    "sparse_attention_decode",
    "sparse_attention_prefill",
]
