"""The block indexer's choice and the attention to it in one operation."""

from pallas_kernels.index_sparse_attention.api import index_sparse_attention_decode

__all__ = ["index_sparse_attention_decode"]
