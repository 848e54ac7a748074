"""Grouped-query attention with per-head norms and partial rotation: dense, or block-sparse where an indexer chooses."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m3_jax.cache import LayerCache, Step, write_kv
from m3_jax.config import M3Config
from m3_jax.dense_attention import dense_attention
from m3_jax.indexer import Indexer
from m3_jax.layers import Projection, RMSNorm, project, rotate
from pallas_kernels import (
    Heads,
    norm_rope_cache,
    paged_attention_decode,
    sparse_attention_prefill,
)


class Attention(nnx.Module):
    """One layer's attention; `indexer` is None on a dense layer."""

    def __init__(self, config: M3Config, *, sparse: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        size, head_dim = config.hidden_size, config.head_dim

        def heads(count: int, axis: str) -> Projection:
            return Projection(
                "btd,nhd->btnh", (count, head_dim, size), (axis, "head_dim", "embed"), dtype=dtype, rngs=rngs
            )

        self.q_proj = heads(config.num_attention_heads, "heads")
        self.k_proj = heads(config.num_key_value_heads, "kv_heads")
        self.v_proj = heads(config.num_key_value_heads, "kv_heads")
        self.o_proj = Projection(
            "btnh,dnh->btd",
            (size, config.num_attention_heads, head_dim),
            ("embed", "heads", "head_dim"),
            dtype=dtype,
            rngs=rngs,
        )
        self.q_norm = RMSNorm(head_dim, "head_dim", config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.k_norm = RMSNorm(head_dim, "head_dim", config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.indexer = Indexer(config, dtype=dtype, rngs=rngs) if sparse else None

    def __call__(
        self, x: Float[Array, "B T D"], rotary: tuple[Array, Array], layer: LayerCache, step: Step
    ) -> tuple[Float[Array, "B T D"], LayerCache, Int[Array, "B T K C"] | None]:
        """The layer's output, its cache with the pass's tokens in it, and the blocks that each row chose.

        Over a mesh, of this device's heads: outputs are to be summed over `tensor`.
        """
        if step.decode:
            return self._decode(x, rotary, layer, step)
        q = rotate(self.q_norm(self.q_proj(x)), rotary)
        k = rotate(self.k_norm(self.k_proj(x)), rotary)
        v = self.v_proj(x)
        layer = write_kv(layer, step, k, v)
        if self.indexer is None:
            return self.o_proj(dense_attention(q, k, v, layer, step)), layer, None
        block_ids, layer = self.indexer(x, rotary, layer, step)
        # Queries meet keys as the cache holds them, in the cache's dtype.
        out = sparse_attention_prefill(
            q.reshape(-1, *q.shape[2:]).astype(layer.k.dtype),
            layer.k,
            layer.v,
            block_ids,
            step.block_table,
            step.cu_seqlens,
            step.seq_lens,
            step.context_lens,
        )
        return (
            self.o_proj(out.reshape(q.shape).astype(x.dtype)),
            layer,
            block_ids.reshape(*q.shape[:2], *block_ids.shape[1:]),
        )

    def _decode(
        self, x: Float[Array, "B T D"], rotary: tuple[Array, Array], layer: LayerCache, step: Step
    ) -> tuple[Float[Array, "B T D"], LayerCache, Int[Array, "B T K C"] | None]:
        """The same with one operation between projections and attention: at decode launches take the time."""
        q, index_q, layer = self._project_and_write(x, rotary, layer, step)
        rows = q.astype(layer.k.dtype)
        if index_q is None:
            block_ids = None
            out = paged_attention_decode(rows, layer.k, layer.v, step.block_table, step.seq_lens)
        else:
            assert self.indexer is not None
            out, block_ids = self.indexer.choose_and_attend(index_q, rows, layer, step)
            block_ids = block_ids.reshape(*x.shape[:2], *block_ids.shape[1:])
        return self.o_proj(out.reshape(*x.shape[:2], *q.shape[1:]).astype(x.dtype)), layer, block_ids

    def _project_and_write(
        self, x: Float[Array, "B T D"], rotary: tuple[Array, Array], layer: LayerCache, step: Step
    ) -> tuple[Float[Array, "BT N H"], Float[Array, "BT K I"] | None, LayerCache]:
        """Queries and index queries, normed and rotated, and the cache with the pass's keys and values in it."""
        projections = [self.q_proj, self.k_proj, self.v_proj]
        if self.indexer is not None:
            projections += [self.indexer.q_proj, self.indexer.k_proj]
        q, k, v, *index = (heads.reshape(-1, *heads.shape[2:]) for heads in project(x, *projections))
        heads = [
            Heads(q, self.q_norm.weight[...], None),
            Heads(k, self.k_norm.weight[...], layer.k),
            Heads(v, None, layer.v),
        ]
        if self.indexer is not None:
            assert layer.index_k is not None, "a sparse layer has index keys"
            index_q, index_k = index
            heads += [
                Heads(index_q, self.indexer.q_norm.weight[...], None),
                Heads(index_k[:, None], self.indexer.k_norm.weight[...], layer.index_k[:, None]),
            ]
        cos, sin = (table.reshape(-1, table.shape[-1]) for table in rotary)
        pages, slots = step.slots(layer.k.shape[0], layer.k.shape[2])
        q, k, v, *index = norm_rope_cache(heads, cos, sin, pages, slots, eps=self.q_norm.eps)
        index_q, index_k = (index[0], index[1][:, 0]) if index else (None, None)
        return q, index_q, LayerCache(k, v, index_k)
