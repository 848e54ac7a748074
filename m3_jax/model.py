"""The whole pass on one page: embedding, decoder layers, norm, head."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from m3_jax.attention import Attention
from m3_jax.cache import Cache, LayerCache, Step
from m3_jax.config import M3Config
from m3_jax.layers import MLP, Embedding, Head, RMSNorm, rotary_tables, vocabulary_logits
from m3_jax.moe import Routing, SparseMoeBlock
from m3_jax.sharding import (
    BATCH,
    all_gather,
    all_reduce,
    axis_size,
    mesh_of,
    over_mesh,
    partition_spec,
    pass_mesh,
    place,
)

DTYPES = ("float32", "bfloat16")
# Tokens a sequence from which a prefill over `tensor` takes its chunk in halves, so that the reductions of one go on
# while the other is computed: of 8,192 rows a reduction takes 0.6 ms, about as long as the layer's matmuls on 8 GPUs.
OVERLAPPED_TOKENS = 2048


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


@dataclasses.dataclass(frozen=True)
class Part:
    """Tokens that a layer takes at once, all of a pass or half of them: where they stand, and their rotation."""

    step: Step
    rotary: tuple[Array, Array]
    routing: Routing

    @classmethod
    def of(cls, step: Step, config: M3Config) -> "Part":
        """The tokens of a step."""
        rotary = rotary_tables(step.positions, config.rotary_dim, config.rope_theta)
        return cls(step, rotary, Routing.of(step.live))


class Turns:
    """Makes the halves of a pass compute one after another, each while the other's sums are reduced over devices.

    Left to itself the compiler joins what the halves have in common, matmuls by their weights and reductions into one,
    and then nothing is left to do meanwhile.
    """

    def __init__(self, parts: int):
        self._taken = parts > 1
        self._computed: Array | None = None
        self._reduced: Array | None = None

    def wait(self, x: Array) -> Array:
        """x, once the part before has been computed; its reduction may still be under way."""
        return _after(x, self._computed)

    def reduce(self, x: Array) -> Array:
        """Ends a turn with its sum over `tensor`, which follows the one before."""
        reduced = all_reduce(_after(x, self._reduced), "tensor")
        if self._taken:
            self._computed, self._reduced = x, reduced
        return reduced


def _after(x: Array, other: Array | None) -> Array:
    return x if other is None else jax.lax.optimization_barrier((x, other))[0]


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
        self, xs: Sequence[Float[Array, "B T D"]], parts: Sequence[Part], layer: LayerCache, turns: Turns
    ) -> tuple[list[Float[Array, "B T D"]], LayerCache, list[Int[Array, "B T K C"]]]:
        """The residual stream of each part of a pass behind this layer, the layer's cache, and the blocks chosen.

        No blocks where attention is dense.
        """
        attended, fed_forward, block_ids = [], [], []
        for x, part in zip(xs, parts, strict=True):
            normed = turns.wait(self.input_layernorm(x))
            out, layer, ids = self.self_attn(normed, part.rotary, layer, part.step)
            attended.append(x + turns.reduce(out))
            if ids is not None:
                block_ids.append(ids)
        for x, part in zip(attended, parts, strict=True):
            normed = turns.wait(self.post_attention_layernorm(x))
            out = self.mlp(normed, part.routing) if isinstance(self.mlp, SparseMoeBlock) else self.mlp(normed)
            fed_forward.append(x + turns.reduce(out))
        return fed_forward, layer, block_ids


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
            for sparse, moe in config.layer_kinds
        )
        self.norm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.lm_head = None if config.tie_word_embeddings else Head(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: Int[Array | np.ndarray, "B T"], lengths: Int[Array | np.ndarray, " B"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits in float32 at every position. Over a mesh they stay cut along batch and vocabulary.

        Args:
          tokens: token ids, right-padded.
          lengths: tokens of each row that count, all by default; logits behind them mean nothing.
        """
        return _over_rows(self, _logits, tokens, lengths)

    def chosen_blocks(self, tokens: Int[Array | np.ndarray, "B T"]) -> dict[int, Int[Array, "B T K C"]]:
        """For every sparse layer, the blocks of `block_size` keys that each query attends to, -1 unused."""
        return _over_rows(self, _block_ids, tokens, None)

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
        halves = not decode and axis_size("tensor") > 1 and num_tokens >= OVERLAPPED_TOKENS and num_tokens % 2 == 0
        parts = [Part.of(step, self.config) for step in (step.split(2) if halves else [step])]
        turns = Turns(len(parts))
        xs = jnp.split(self.embed_tokens(tokens), len(parts), axis=1)
        layer_caches, hidden_states, block_ids = [], {}, {}
        for number, (layer, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
            xs, layer_cache, chosen = layer(xs, parts, layer_cache, turns)
            layer_caches.append(layer_cache)
            if number in hidden_layers:
                hidden_states[number] = jnp.concatenate(xs, axis=1)
            if chosen:
                block_ids[number] = jnp.concatenate(chosen, axis=1)
        return ForwardOutput(
            last_hidden=self.norm(jnp.concatenate(xs, axis=1)),
            cache=Cache(tuple(layer_caches), cache.block_table, step.seq_lens),
            hidden_states=hidden_states,
            block_ids=block_ids,
        )

    def logits(self, last_hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Logits in float32 of rows of `ForwardOutput.last_hidden`; over a mesh, of the whole vocabulary."""
        return all_gather(self.local_logits(last_hidden), "tensor", -1)

    def local_logits(self, last_hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Logits of this device's part of the vocabulary."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return vocabulary_logits(last_hidden, head.weight[...])


class Structure:
    """A model without its weights, and where they lie; hashed by identity, for a graph definition takes milliseconds.

    Attributes:
      config: the model's sizes.
      mesh: the mesh of its passes (`sharding.pass_mesh`); None on one device.
    """

    def __init__(self, graphdef: nnx.GraphDef[M3ForCausalLM], config: M3Config, mesh: Mesh | AbstractMesh | None):
        self._graphdef = graphdef
        self.config = config
        self.mesh = None if mesh is None else pass_mesh(mesh, config.num_key_value_heads)

    @property
    def batch_parts(self) -> int:
        """Parts into which the mesh cuts a batch, which must be a multiple of them."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH)

    def model(self, weights: nnx.State) -> M3ForCausalLM:
        """The model with these weights, inside a jitted function."""
        return nnx.merge(self._graphdef, weights)

    def spec(self, *logical_axes: str) -> PartitionSpec:
        """How an array with these dimensions is cut."""
        return PartitionSpec() if self.mesh is None else partition_spec(logical_axes, self.mesh)

    def run(
        self, function: Callable[..., Any], weights: nnx.State, arguments: Sequence[Any], specs: Sequence[Any], out: Any
    ) -> Any:
        """function(model, *arguments), on every device of the mesh with its part of weights and arguments.

        Inside `jax.jit`. `specs` and `out` say how arguments and results are cut, as in `jax.shard_map`.
        """

        def whole(weights: nnx.State, *arguments: Any) -> Any:
            return function(self.model(weights), *arguments)

        if self.mesh is None:
            return whole(weights, *arguments)
        weight_specs = jax.tree.map(
            lambda weight: self.spec(*weight.get_metadata("logical_axes")),
            weights,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        return over_mesh(self.mesh, whole, (weight_specs, *specs), out)(weights, *arguments)


# Models of one structure share one object, and so what was compiled for it.
_structure = functools.cache(Structure)


def split(model: M3ForCausalLM) -> tuple[Structure, nnx.State]:
    """What `jax.jit` takes as a static argument and as a pytree."""
    graphdef, weights = nnx.split(model)
    return _structure(graphdef, model.config, mesh_of(weights)), weights


def weights_by_path(model: M3ForCausalLM) -> dict[str, Any]:
    """Each weight, or what stands for it in an abstract model, by its path, such as "layers.0.mlp.down_proj.weight"."""
    return {".".join(map(str, path)): weight.get_value() for path, weight in nnx.to_flat_state(nnx.state(model))}


def _over_rows(
    model: M3ForCausalLM,
    function: Callable[..., Any],
    tokens: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, " B"] | None,
) -> Any:
    """A pass over whole sequences, with empty ones behind them until they divide over the mesh."""
    structure, weights = split(model)
    if structure.mesh is None:
        return function(structure, weights, jnp.asarray(tokens), None if lengths is None else jnp.asarray(lengths))
    batch, num_tokens = tokens.shape
    padding = -batch % structure.batch_parts
    lengths = np.full(batch, num_tokens, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    out = function(
        structure,
        weights,
        place(structure.mesh, ("batch", "whole"), np.pad(np.asarray(tokens), ((0, padding), (0, 0)))),
        place(structure.mesh, ("batch",), np.pad(lengths, (0, padding))),
    )
    return jax.tree.map(lambda rows: rows[:batch], out) if padding else out


def _uncached(model: M3ForCausalLM, tokens: Array, lengths: Array | None) -> ForwardOutput:
    """A pass over whole sequences, through a cache that lives no longer than the pass."""
    cache = Cache.allocate(model.config, tokens.shape[0], tokens.shape[1], dtype=model.dtype)
    return model.forward(tokens, cache, lengths)


@functools.partial(jax.jit, static_argnums=0)
def _logits(structure: Structure, weights: nnx.State, tokens: Array, lengths: Array | None) -> Array:
    def logits(model: M3ForCausalLM, tokens: Array, lengths: Array | None) -> Array:
        return model.local_logits(_uncached(model, tokens, lengths).last_hidden)

    specs = (structure.spec("batch", "whole"), structure.spec("batch"))
    return structure.run(logits, weights, (tokens, lengths), specs, structure.spec("batch", "whole", "vocab"))


@functools.partial(jax.jit, static_argnums=0)
def _block_ids(structure: Structure, weights: nnx.State, tokens: Array, lengths: Array | None) -> dict[int, Array]:
    def block_ids(model: M3ForCausalLM, tokens: Array, lengths: Array | None) -> dict[int, Array]:
        return _uncached(model, tokens, lengths).block_ids

    specs = (structure.spec("batch", "whole"), structure.spec("batch"))
    out = structure.spec("batch", "whole", "kv_heads", "whole")
    return structure.run(block_ids, weights, (tokens, lengths), specs, out)
