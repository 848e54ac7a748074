"""The lightning indexer: which blocks of keys each query attends to, on sparse layers."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m3_jax.cache import LayerCache, Step, write_index_k
from m3_jax.config import M3Config
from m3_jax.layers import Projection, RMSNorm, rotate
from pallas_kernels import index_topk_decode, index_topk_prefill


class Indexer(nnx.Module):
    """A head of index queries for each KV head, one index key a token for all of them; no values, no output.

    The score of a block is the largest product of the query with the block's visible keys, unscaled and in float32.
    """

    def __init__(self, config: M3Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        sparse, size = config.sparse_attention, config.hidden_size
        self.topk_blocks = sparse.topk_blocks
        self.init_blocks = sparse.init_blocks
        self.local_blocks = sparse.local_blocks
        self.q_proj = Projection(
            "btd,kid->btki",
            (sparse.num_index_heads, sparse.index_dim, size),
            ("index_heads", "head_dim", "embed"),
            dtype=dtype,
            rngs=rngs,
        )
        self.k_proj = Projection("btd,id->bti", (sparse.index_dim, size), ("head_dim", "embed"), dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(sparse.index_dim, "head_dim", config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.k_norm = RMSNorm(sparse.index_dim, "head_dim", config.rms_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], rotary: tuple[Array, Array], layer: LayerCache, step: Step
    ) -> tuple[Int[Array, "BT K C"], LayerCache]:
        """Writes the pass's index keys and chooses blocks for every row, as `pallas_kernels` defines `block_ids`."""
        q = rotate(self.q_norm(self.q_proj(x)), rotary)
        k = rotate(self.k_norm(self.k_proj(x))[:, :, None, :], rotary)[:, :, 0, :]
        layer = write_index_k(layer, step, k)
        index_k = layer.index_k
        assert index_k is not None
        # Queries meet keys as the cache holds them, in the cache's dtype.
        rows = q.reshape(-1, *q.shape[2:]).astype(index_k.dtype)
        if step.decode:
            ids = index_topk_decode(
                rows,
                index_k,
                step.block_table,
                step.seq_lens,
                top_k=self.topk_blocks,
                init_blocks=self.init_blocks,
                local_blocks=self.local_blocks,
            )
        else:
            ids = index_topk_prefill(
                rows,
                index_k,
                step.block_table,
                step.cu_seqlens,
                step.seq_lens,
                step.context_lens,
                top_k=self.topk_blocks,
                init_blocks=self.init_blocks,
                local_blocks=self.local_blocks,
            )
        return ids, layer
