"""The whole pass on one page: embedding, decoder layers, norm, head."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from m3_jax.attention import Attention
from m3_jax.cache import Cache, LayerCache, Step
from m3_jax.config import M3Config
from m3_jax.layers import MLP, Embedding, Head, RMSNorm, rotary_tables, vocabulary_logits
from m3_jax.moe import SparseMoeBlock

DTYPES = ("float32", "bfloat16")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["last_hidden", "cache", "hidden_states", "block_ids"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class ForwardOutput:
    """What one pass over tokens [B, T] gives.

    Attributes:
      last_hidden: the normed output of the last layer; `M3ForCausalLM.logits` turns rows of it into logits.
      cache: the cache with the pass's tokens in it.
      hidden_states: the residual stream after each of the layers that were asked for, by layer.
      block_ids: the blocks that every row chose, by sparse layer: logical block numbers, -1 unused.
    """

    last_hidden: Float[Array, "B T D"]
    cache: Cache
    hidden_states: dict[int, Float[Array, "B T D"]]
    block_ids: dict[int, Int[Array, "B T K C"]]


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each of the two is dense or sparse on its own."""

    def __init__(self, config: M3Config, *, sparse_attention: bool, moe: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, "embed", eps, dtype=dtype, rngs=rngs)
        self.self_attn = Attention(config, sparse=sparse_attention, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(size, "embed", eps, dtype=dtype, rngs=rngs)
        if moe:
            self.mlp = SparseMoeBlock(config, dtype=dtype, rngs=rngs)
        else:
            self.mlp = MLP(config, config.dense_intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], rotary: tuple[Array, Array], layer: LayerCache, step: Step
    ) -> tuple[Float[Array, "B T D"], LayerCache, Int[Array, "B T K C"] | None]:
        attended, layer, block_ids = self.self_attn(self.input_layernorm(x), rotary, layer, step)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), layer, block_ids


class M3ForCausalLM(nnx.Module):
    """MiniMax-M3's text model.

    `model(tokens)` gives logits without a cache; `forward` is the cached pass that generation uses.

    Attributes:
      config: the model's sizes.
      dtype: of weights and activations, float32 or bfloat16; the router is float32 in both.
    """

    def __init__(self, config: M3Config, *, dtype: jax.typing.DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        dtype = jnp.dtype(dtype)
        if dtype.name not in DTYPES:
            raise ValueError(f"dtype={dtype.name}: must be one of {', '.join(DTYPES)}")
        self.config = config
        self.dtype = dtype
        self.embed_tokens = Embedding(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            DecoderLayer(config, sparse_attention=sparse, moe=moe, dtype=dtype, rngs=rngs)
            for sparse, moe in zip(config.sparse_attention_layers, config.moe_layers, strict=True)
        )
        self.norm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.lm_head = None if config.tie_word_embeddings else Head(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: Int[Array | np.ndarray, "B T"], lengths: Int[Array | np.ndarray, " B"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits in float32 at every position.

        Args:
          tokens: token ids, right-padded.
          lengths: tokens of each row that count, all by default; logits behind them mean nothing.
        """
        return _logits(*split(self), jnp.asarray(tokens), None if lengths is None else jnp.asarray(lengths))

    def chosen_blocks(self, tokens: Int[Array | np.ndarray, "B T"]) -> dict[int, Int[Array, "B T K C"]]:
        """For every sparse layer, the blocks of `block_size` keys that each query attends to, -1 unused."""
        return _block_ids(*split(self), jnp.asarray(tokens))

    def forward(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        query_lens: Int[Array, " B"] | None = None,
        *,
        decode: bool = False,
        hidden_layers: Sequence[int] = (),
    ) -> ForwardOutput:
        """One pass over the next tokens of every sequence, which stand behind those in `cache`.

        To be called inside `jax.jit`, with the cache donated.

        Args:
          tokens: token ids, right-padded.
          cache: what came before.
          query_lens: tokens of each row that count, all by default, 0 allowed. In decode each must be 0 or T.
          decode: few tokens a sequence, the same number for each: takes the decode operations.
          hidden_layers: layers whose output is returned too (draft models read them).
        """
        batch, num_tokens = tokens.shape
        if query_lens is None:
            query_lens = jnp.full(batch, num_tokens, jnp.int32)
        step = Step(
            decode=decode,
            context_lens=cache.seq_lens,
            query_lens=query_lens,
            block_table=cache.block_table,
            num_tokens=num_tokens,
        )
        rotary = rotary_tables(step.positions, self.config.rotary_dim, self.config.rope_theta)
        x = self.embed_tokens(tokens)
        layer_caches, hidden_states, block_ids = [], {}, {}
        for number, (layer, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
            x, layer_cache, chosen = layer(x, rotary, layer_cache, step)
            layer_caches.append(layer_cache)
            if number in hidden_layers:
                hidden_states[number] = x
            if chosen is not None:
                block_ids[number] = chosen
        return ForwardOutput(
            last_hidden=self.norm(x),
            cache=Cache(tuple(layer_caches), cache.block_table, step.seq_lens),
            hidden_states=hidden_states,
            block_ids=block_ids,
        )

    def logits(self, last_hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Logits in float32 of rows of `ForwardOutput.last_hidden`."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return vocabulary_logits(last_hidden, head.weight[...])


class Structure:
    """A model without its weights, hashed by identity: a graph definition takes milliseconds to hash, each call."""

    def __init__(self, graphdef: nnx.GraphDef[M3ForCausalLM]):
        self._graphdef = graphdef

    def model(self, weights: nnx.State) -> M3ForCausalLM:
        """The model with these weights, inside a jitted function."""
        return nnx.merge(self._graphdef, weights)


# Models of one structure share one object, and so what was compiled for it.
_structure = functools.cache(Structure)


def split(model: M3ForCausalLM) -> tuple[Structure, nnx.State]:
    """What `jax.jit` takes as a static argument and as a pytree."""
    graphdef, weights = nnx.split(model)
    return _structure(graphdef), weights


def _uncached(
    structure: Structure, weights: nnx.State, tokens: Array, lengths: Array | None
) -> tuple[M3ForCausalLM, ForwardOutput]:
    """A pass over whole sequences, through a cache that lives no longer than the pass."""
    model = structure.model(weights)
    cache = Cache.allocate(model.config, tokens.shape[0], tokens.shape[1], dtype=model.dtype)
    return model, model.forward(tokens, cache, lengths)


@functools.partial(jax.jit, static_argnums=0)
def _logits(structure: Structure, weights: nnx.State, tokens: Array, lengths: Array | None) -> Array:
    model, output = _uncached(structure, weights, tokens, lengths)
    return model.logits(output.last_hidden)


@functools.partial(jax.jit, static_argnums=0)
def _block_ids(structure: Structure, weights: nnx.State, tokens: Array) -> dict[int, Array]:
    return _uncached(structure, weights, tokens, None)[1].block_ids
