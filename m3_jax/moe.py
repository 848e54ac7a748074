"""Mixture of experts: a sigmoid router, the chosen experts' MLPs, and a shared expert for every token."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m3_jax.config import M3Config
from m3_jax.grouped_matmul import grouped_matmul
from m3_jax.layers import MLP, SwiGLUOAI, Weight


class Router(nnx.Module):
    """Chooses X experts a token, in float32 from the input on, whatever the model's dtype.

    Scores are sigmoid(x W^T). The correction bias takes part in the choice and not in the weights, which are the
    chosen scores divided by their sum (DeepSeek-V3's auxiliary-loss-free routing).
    """

    def __init__(self, config: M3Config, *, rngs: nnx.Rngs):
        self.num_experts_per_tok = config.num_experts_per_tok
        shape, axes = (config.num_experts, config.hidden_size), ("router", "embed")
        dtype = jnp.dtype(jnp.float32)
        self.weight = Weight(shape, axes, dtype=dtype, rngs=rngs)
        self.e_score_correction_bias = Weight(shape[:1], axes[:1], dtype=dtype, rngs=rngs, stddev=0.0)

    def __call__(self, x: Float[Array, "T D"]) -> tuple[Float[Array, "T X"], Int[Array, "T X"]]:
        logits = jnp.einsum("td,ed->te", x.astype(jnp.float32), self.weight[...], precision=jax.lax.Precision.HIGHEST)
        scores = jax.nn.sigmoid(logits)
        _, expert_ids = jax.lax.top_k(scores + self.e_score_correction_bias[...], self.num_experts_per_tok)
        weights = jnp.take_along_axis(scores, expert_ids, axis=-1)
        return weights / jnp.sum(weights, axis=-1, keepdims=True), expert_ids


class ExpertWeights(nnx.Module):
    """One matrix for each expert."""

    def __init__(self, shape: tuple[int, ...], logical_axes: tuple[str, ...], *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = Weight(shape, logical_axes, dtype=dtype, rngs=rngs)


class Experts(nnx.Module):
    """The routed experts' SwiGLU-OAI MLPs."""

    def __init__(self, config: M3Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        experts, width, size = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.activation = SwiGLUOAI.of(config)
        self.gate_up_proj = ExpertWeights(
            (experts, 2, width, size), ("experts", "gate_up", "mlp", "embed"), dtype=dtype, rngs=rngs
        )
        self.down_proj = ExpertWeights((experts, size, width), ("experts", "embed", "mlp"), dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "T D"], weights: Float[Array, "T X"], expert_ids: Int[Array, "T X"]
    ) -> Float[Array, "T D"]:
        """sum over a token's experts of weight * MLP(x), summed in float32."""
        num_tokens, per_token = expert_ids.shape
        gate_up, down = self.gate_up_proj.weight[...], self.down_proj.weight[...]
        order = jnp.argsort(expert_ids.reshape(-1), stable=True)
        group_sizes = jnp.bincount(expert_ids.reshape(-1), length=gate_up.shape[0])
        hidden = grouped_matmul(x[order // per_token], gate_up.reshape(gate_up.shape[0], -1, x.shape[-1]), group_sizes)
        gate, up = jnp.split(hidden, 2, axis=-1)
        out = grouped_matmul(self.activation(gate, up), down, group_sizes)
        # Back in the tokens' order by a gather: a scatter-add would sum in an order that the hardware chooses.
        out = out[jnp.argsort(order)].reshape(num_tokens, per_token, -1)
        return jnp.einsum("txd,tx->td", out.astype(jnp.float32), weights, precision=jax.lax.Precision.HIGHEST)


class SparseMoeBlock(nnx.Module):
    """routed_scaling_factor * routed experts + shared expert."""

    def __init__(self, config: M3Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.routed_scaling_factor = config.routed_scaling_factor
        self.gate = Router(config, rngs=rngs)
        self.experts = Experts(config, dtype=dtype, rngs=rngs)
        self.shared_experts = MLP(config, config.shared_intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        rows = x.reshape(-1, x.shape[-1])
        weights, expert_ids = self.gate(rows)
        routed = self.experts(rows, weights, expert_ids).reshape(x.shape)
        return (self.routed_scaling_factor * routed).astype(x.dtype) + self.shared_experts(x)
