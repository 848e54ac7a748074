"""Choice and attention as Triton kernels for GPUs since Ampere."""

from pallas_kernels.index_sparse_attention.composition import composed
from pallas_kernels.index_topk.triton_gpu import index_topk_decode
from pallas_kernels.sparse_attention.triton_gpu import sparse_attention_decode

index_sparse_attention_decode = composed(index_topk_decode, sparse_attention_decode)
