"""The paged cache: K, V and index-K of every layer in pages of `block_size` tokens.

A token takes 2*K*H elements on a dense layer and 2*K*H + I on a sparse one. Writes are pure functions, so that a
jitted step which donates the cache updates it in place; nothing is ever read from a slot that was not written, whose
contents may be anything.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int

from m3_jax.config import M3Config
from m3_jax.sharding import local_size, partition_spec


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "index_k"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's pages.

    Attributes:
      k, v: keys and values after norm and rotation. The KV head comes before the slot, so that what a kernel copies,
        a page of one head, is contiguous.
      index_k: the indexer's keys, one for all its heads; None on a dense layer.
    """

    k: Float[Array, "P K S H"]
    v: Float[Array, "P K S H"]
    index_k: Float[Array, "P S I"] | None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "block_table", "seq_lens"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """The state of a batch of sequences.

    Attributes:
      layers: one `LayerCache` a layer.
      block_table: page of each sequence's logical block.
      seq_lens: tokens written so far.
    """

    layers: tuple[LayerCache, ...]
    block_table: Int[Array, "B M"]
    seq_lens: Int[Array, " B"]

    @classmethod
    def allocate(cls, config: M3Config, batch: int, max_length: int, *, dtype: jnp.dtype = jnp.bfloat16) -> "Cache":  # pyright: ignore[reportArgumentType]
        """An empty cache for `batch` sequences of up to `max_length` tokens, rounded up to whole pages.

        Inside `sharding.over_mesh` it is one device's part: pages of the device's own `batch` sequences, which no other
        device numbers, with the KV heads that it has. `cache_specs` says how the parts make a whole.

        Raises `ValueError` where a size is not positive or `max_length` exceeds the model's positions.
        """
        for name, value in (("batch", batch), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if max_length > config.max_position_embeddings:
            raise ValueError(
                f"max_length={max_length}: the model has max_position_embeddings={config.max_position_embeddings}"
            )
        sparse = config.sparse_attention
        blocks = -(-max_length // sparse.block_size)
        pages = batch * blocks
        kv_heads = local_size("kv_heads", config.num_key_value_heads)
        kv_shape = (pages, kv_heads, sparse.block_size, config.head_dim)
        return cls(
            layers=tuple(
                LayerCache(
                    k=jnp.zeros(kv_shape, dtype),
                    v=jnp.zeros(kv_shape, dtype),
                    index_k=jnp.zeros((pages, sparse.block_size, sparse.index_dim), dtype) if is_sparse else None,
                )
                for is_sparse in config.sparse_attention_layers
            ),
            block_table=jnp.arange(pages, dtype=jnp.int32).reshape(batch, blocks),
            seq_lens=jnp.zeros(batch, jnp.int32),
        )

    @property
    def block_size(self) -> int:
        """Tokens a page."""
        return self.layers[0].k.shape[2]


def cache_specs(config: M3Config, mesh: Mesh | AbstractMesh) -> Cache:
    """A `Cache` with, for every array, how it is cut over a mesh of `sharding.pass_mesh`.

    Pages are cut like the batch and numbered from 0 on every part of it; KV heads along `kv`, so that a device holds
    those of its queries and no others. Index keys, which all heads share, are the same on all of `tensor`.
    """
    kv = partition_spec(("pages", "kv_heads", "whole", "head_dim"), mesh)
    index_k = partition_spec(("pages", "whole", "head_dim"), mesh)
    return Cache(
        layers=tuple(LayerCache(kv, kv, index_k if sparse else None) for sparse in config.sparse_attention_layers),  # pyright: ignore[reportArgumentType]
        block_table=partition_spec(("batch", "whole"), mesh),  # pyright: ignore[reportArgumentType]
        seq_lens=partition_spec(("batch",), mesh),  # pyright: ignore[reportArgumentType]
    )


def elements_per_token(config: M3Config) -> int:
    """Elements that a cached token takes over all layers: 2*K*H on each, I more on the sparse ones."""
    kv = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return kv + config.sparse_attention.index_dim * sum(config.sparse_attention_layers)


@dataclasses.dataclass(frozen=True)
class Step:
    """Where the tokens [B, T] of one pass stand in their sequences; made once a pass, read by every layer.

    Row i of sequence b is live when i < query_lens[b]; rows behind it are right padding. Decode gives every sequence
    T tokens or none.

    Attributes:
      decode: a few tokens a sequence; chooses between the decode and the prefill operations.
      context_lens: tokens that were in the cache before.
      query_lens: tokens that this pass adds.
      block_table: as in `Cache`.
    """

    decode: bool
    context_lens: Int[Array, " B"]
    query_lens: Int[Array, " B"]
    block_table: Int[Array, "B M"]
    num_tokens: int

    @property
    def seq_lens(self) -> Int[Array, " B"]:
        """Tokens in the cache once this pass has written its own."""
        return self.context_lens + self.query_lens

    @property
    def positions(self) -> Int[Array, "B T"]:
        """Position of every row in its sequence."""
        return self.context_lens[:, None] + jnp.arange(self.num_tokens, dtype=jnp.int32)

    @property
    def live(self) -> Bool[Array, "B T"]:
        """Which rows are tokens and not padding."""
        return jnp.arange(self.num_tokens) < self.query_lens[:, None]

    @property
    def cu_seqlens(self) -> Int[Array, " B1"]:
        """First row of every sequence when [B, T] is read as flat rows, and their number."""
        return jnp.arange(self.query_lens.shape[0] + 1, dtype=jnp.int32) * self.num_tokens

    def split(self, parts: int) -> "list[Step]":
        """Steps over equal parts of the tokens, to be taken one after another."""
        size = self.num_tokens // parts
        return [
            dataclasses.replace(
                self,
                context_lens=self.context_lens + jnp.minimum(self.query_lens, start),
                query_lens=jnp.clip(self.query_lens - start, 0, size),
                num_tokens=size,
            )
            for start in range(0, self.num_tokens, size)
        ]

    def slots(self, num_pages: int, page_size: int) -> tuple[Int[Array, " BT"], Int[Array, " BT"]]:
        """Page and slot of every row, flat. A padded row gets page `num_pages`, which a write drops (-1 would wrap)."""
        block = self.positions // page_size
        max_blocks = self.block_table.shape[1]
        page = jnp.take_along_axis(self.block_table, jnp.minimum(block, max_blocks - 1), axis=1)
        page = jnp.where(self.live & (block < max_blocks), page, num_pages)
        return page.reshape(-1), (self.positions % page_size).reshape(-1)


def write_kv(layer: LayerCache, step: Step, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> LayerCache:
    """The layer's cache with the pass's keys and values in it."""
    num_pages, _, page_size, _ = layer.k.shape
    page, slot = step.slots(num_pages, page_size)

    def write(pages: Array, rows: Array) -> Array:
        flat = rows.reshape(-1, *rows.shape[2:]).astype(pages.dtype)
        return pages.at[page, :, slot].set(flat, mode="drop")

    return dataclasses.replace(layer, k=write(layer.k, k), v=write(layer.v, v))


def write_index_k(layer: LayerCache, step: Step, index_k: Float[Array, "B T I"]) -> LayerCache:
    """The layer's cache with the pass's index keys in it."""
    assert layer.index_k is not None, "a dense layer has no index keys"
    num_pages, page_size, _ = layer.index_k.shape
    page, slot = step.slots(num_pages, page_size)
    flat = index_k.reshape(-1, index_k.shape[-1]).astype(layer.index_k.dtype)
    return dataclasses.replace(layer, index_k=layer.index_k.at[page, slot].set(flat, mode="drop"))
