"""The lightning indexer: which blocks of keys each query attends to, on sparse layers."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m3_jax import index_sharding
from m3_jax.cache import LayerCache, Step, write_index_k
from m3_jax.config import M3Config
from m3_jax.layers import Projection, RMSNorm, rotate
from m3_jax.sharding import all_gather, all_to_all, axis_index, axis_size
from pallas_kernels import index_sparse_attention_decode, sparse_attention_decode
from pallas_kernels.index_topk import (
    index_candidates_decode,
    index_candidates_prefill,
    index_topk_prefill,
    merge_candidates,
)


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
        """Writes a prefill pass's index keys and chooses each row's blocks, as `pallas_kernels` defines `block_ids`."""
        q = rotate(self.q_norm(self.q_proj(x)), rotary)
        k = rotate(self.k_norm(self.k_proj(x)[:, :, None, :]), rotary)[:, :, 0, :]
        layer = write_index_k(layer, step, k)
        return self.choose(q.reshape(-1, *q.shape[2:]), layer, step), layer

    @property
    def _choice(self) -> dict[str, Any]:
        """Options of the operations that choose."""
        return {"top_k": self.topk_blocks, "init_blocks": self.init_blocks, "local_blocks": self.local_blocks}

    def choose(self, q: Float[Array, "BT K I"], layer: LayerCache, step: Step) -> Int[Array, "BT K C"]:
        """Blocks for every row of a prefill pass, once the pass's index keys are in the cache."""
        rows, index_k = _meeting(q, layer)
        tables = step.block_table, step.cu_seqlens, step.seq_lens, step.context_lens
        if self._scores_over_pages(rows, index_k, step):
            return self._choose_over_pages(index_candidates_prefill, rows, index_k, *tables)
        return index_topk_prefill(rows, index_k, *tables, **self._choice)

    def choose_and_attend(
        self, index_q: Float[Array, "BT K I"], q: Float[Array, "BT N H"], layer: LayerCache, step: Step
    ) -> tuple[Float[Array, "BT N H"], Int[Array, "BT K C"]]:
        """Attention of every row of a decode pass to its blocks, and these, once the pass's keys are in the cache."""
        rows, index_k = _meeting(index_q, layer)
        caches, tables = (layer.k, layer.v), (step.block_table, step.seq_lens)
        if self._scores_over_pages(rows, index_k, step):
            block_ids = self._choose_over_pages(index_candidates_decode, rows, index_k, *tables)
            return sparse_attention_decode(q, *caches, block_ids, *tables), block_ids
        return index_sparse_attention_decode(rows, index_k, q, *caches, *tables, **self._choice)

    def _choose_over_pages(self, find: Any, q: Float[Array, "BT K I"], *arrays: Any) -> Int[Array, "BT K C"]:
        """The same choice, each device along `tensor` scoring its share of the blocks for the heads of all of them.

        find: the operation that finds candidates in a pass of this kind, whose other arguments are the arrays.
        """
        own_heads, devices = q.shape[1], axis_size("tensor")
        # A head that several devices hold is theirs to score once: "kv" passes over its copies.
        found = find(all_gather(q, "kv", 1), *arrays, axis_index("tensor"), num_shares=devices, **self._choice)
        # To each device the candidates of its heads, and to those with the same heads the same.
        groups = axis_size("kv")
        for_device = jnp.moveaxis(found.reshape(-1, groups, own_heads, 2, self.topk_blocks), 1, 0)
        return merge_candidates(all_to_all(jnp.repeat(for_device, devices // groups, axis=0), "tensor"))

    def _scores_over_pages(self, rows: Float[Array, "BT K I"], index_k: Array, step: Step) -> bool:
        """Whether each device along `tensor` scores a share of the blocks, instead of all for its own heads."""
        sequences, blocks = step.block_table.shape
        scoring = index_sharding.Scoring(
            rows=rows.shape[0],
            sequences=sequences,
            context=blocks * index_k.shape[1],
            heads=rows.shape[1] * axis_size("kv"),
            own_heads=rows.shape[1],
            devices=axis_size("tensor"),
            index_dim=index_k.shape[2],
            itemsize=index_k.dtype.itemsize,
            top_k=self.topk_blocks,
            decode=step.decode,
        )
        return index_sharding.over_pages(scoring)


def _meeting(q: Float[Array, "BT K I"], layer: LayerCache) -> tuple[Float[Array, "BT K I"], Float[Array, "P S I"]]:
    """Index queries, and the keys that they meet as the cache holds them: in the cache's dtype, both."""
    assert layer.index_k is not None, "a sparse layer has index keys"
    return q.astype(layer.index_k.dtype), layer.index_k
