"""Attention of every query to the blocks of a paged cache that were chosen for it."""

from pallas_kernels.sparse_attention.api import sparse_attention_decode, sparse_attention_prefill

__all__ = ["sparse_attention_decode", "sparse_attention_prefill"]
