"""Paged block-sparse attention of MiniMax-M3 for JAX: choose blocks of keys, attend to them.

Six operations over flat token rows and paged caches, each with one public function and any number of
implementations behind it (see `pallas_kernels.dispatch`).
"""

from pallas_kernels.index_topk import (
    index_score_decode,
    index_score_prefill,
    index_topk_decode,
    index_topk_prefill,
)
from pallas_kernels.sparse_attention import sparse_attention_decode, sparse_attention_prefill

__all__ = [
    "index_score_decode",
    "index_score_prefill",
    "index_topk_decode",
    "index_topk_prefill",
    "sparse_attention_decode",
    "sparse_attention_prefill",
]
