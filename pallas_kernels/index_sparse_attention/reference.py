"""Choice and attention in plain JAX: the specification of the other implementations."""

from pallas_kernels.index_sparse_attention.composition import composed
from pallas_kernels.index_topk.reference import index_topk_decode
from pallas_kernels.sparse_attention.reference import sparse_attention_decode

index_sparse_attention_decode = composed(index_topk_decode, sparse_attention_decode)
