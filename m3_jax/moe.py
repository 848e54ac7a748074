"""Mixture of experts: a sigmoid router, the chosen experts' MLPs, and a shared expert for every token.

Over a mesh whose `expert` axis has several devices, each with its own rows and its own experts, rows meet experts in
one of two ways, chosen by the number of rows:

- Up to `GATHER_ROWS` rows on all devices (decode): every device gets all rows, routes them, computes what its experts
  make of them, and a reduce-scatter gives each row's sum back to its device: one all-gather and one reduction. Of one
  token, the devices together read the weights of the chosen experts and no others.
- More (prefill): each (row, expert) pair goes to its expert's device and its product comes back, so that a row travels
  X times and not to every device. The streams between pairs of devices have any length, while shapes are static:
  they are sent in rounds of `_round_size` pairs to each device, 5/4 of an even share, as many rounds as the longest
  stream takes. One round is the rule, and all tokens on one expert take about as many as there are devices. Nothing is
  dropped for any routing, a round holds 5/4 * R * X pairs (R own rows), and products are summed where the row is, in
  the order of a single device.

Under `tensor` every device has a slice of each expert's width; the parts are summed after the block, with the shared
expert's, in the layer's one reduction.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m3_jax.config import M3Config
from m3_jax.layers import MLP, SwiGLUOAI, Weight
from m3_jax.sharding import all_gather, all_to_all, axis_index, axis_size, reduce_scatter
from pallas_kernels import grouped_matmul, grouped_swiglu

# Rows of all devices of the `expert` axis up to which all of them go everywhere. 8 H200 take 41 us to gather 64 rows
# and scatter their sums (131 us for 1,024 a device), and about 35 us for each of an exchange's three steps, which also
# waits for the host between rounds.
GATHER_ROWS = 1024

# Pairs up to which they are sorted by comparing each with each: on a GPU two fused operations instead of two sorts and
# a histogram, at decode more time than the arithmetic.
COMPARED_PAIRS = 1024


@dataclasses.dataclass(frozen=True)
class Routing:
    """How the rows of a pass reach their experts; made once a pass.

    Attributes:
      gathered: each device gets the rows of all; else pairs are exchanged. On one device, as if gathered.
      live: which of the rows that this device routes are tokens. Padding goes to no expert.
    """

    gathered: bool
    live: Bool[Array, " R"]

    @classmethod
    def of(cls, live: Bool[Array, "B T"]) -> "Routing":
        """The way for a pass whose own rows are these."""
        devices = axis_size("expert")
        gathered = devices == 1 or live.size * devices <= GATHER_ROWS
        rows = live.reshape(-1)
        return cls(gathered, all_gather(rows, "expert", 0) if gathered else rows)


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
        # Added one by one: a sum along an axis is an operation of its own.
        total = functools.reduce(jnp.add, jnp.split(weights, weights.shape[-1], axis=-1))
        return weights / total, expert_ids


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
        self, x: Float[Array, "R D"], weights: Float[Array, "R X"], expert_ids: Int[Array, "R X"]
    ) -> Float[Array, "R D"]:
        """sum over a row's experts of weight * MLP(x), in float32; of those experts that this device has.

        An id that is no expert's, as padding has it, adds nothing.
        """
        num_local = self.gate_up_proj.weight[...].shape[0]
        local = expert_ids - axis_index("expert") * num_local
        local = jnp.where((local >= 0) & (local < num_local), local, num_local)
        rows = jnp.arange(expert_ids.size) // expert_ids.shape[1]
        return _weighted_sum(self._products(x, rows, local.reshape(-1)), weights)

    def exchanged(
        self, x: Float[Array, "R D"], weights: Float[Array, "R X"], expert_ids: Int[Array, "R X"]
    ) -> Float[Array, "R D"]:
        """The same sum over all experts of this device's own rows, wherever the experts are."""
        devices, num_local = axis_size("expert"), self.gate_up_proj.weight[...].shape[0]
        num_rows, per_row = expert_ids.shape
        num_pairs = num_rows * per_row
        # Sorted by expert, the pairs for a device lie together: its stream. Pairs of no expert come last.
        order, _, counts = _by_expert(expert_ids.reshape(-1), devices * num_local)
        counts = all_gather(counts[None], "expert", 0).reshape(devices, devices, num_local)
        me = axis_index("expert")
        length = jnp.sum(counts, axis=-1)
        start = jnp.cumsum(length[me]) - length[me]
        # Where the experts of this device end in the streams that come here.
        ends = jnp.cumsum(counts[:, me], axis=-1)
        size = _round_size(num_rows, per_row, devices, num_local)

        def exchange(number: Int[Array, ""], products: Float[Array, "RX D"]) -> Float[Array, "RX D"]:
            place = number * size + jnp.arange(size)
            mine = jnp.where(place < length[me][:, None], start[:, None] + place, num_pairs)
            pairs = order.at[mine].get(mode="fill", fill_value=num_pairs)
            arrived = all_to_all(x.at[pairs // per_row].get(mode="clip"), "expert")
            expert = jnp.sum(ends[:, None] <= place[:, None], axis=-1)
            made = self._products(arrived.reshape(-1, x.shape[-1]), jnp.arange(devices * size), expert.reshape(-1))
            returned = all_to_all(made.reshape(arrived.shape), "expert")
            return products.at[pairs.reshape(-1)].set(returned.reshape(-1, x.shape[-1]), mode="drop")

        rounds = jnp.max(-(-length // size))
        products = jax.lax.fori_loop(0, rounds, exchange, jnp.zeros((num_pairs, x.shape[-1]), x.dtype))
        return _weighted_sum(products, weights)

    def _products(
        self, x: Float[Array, "R D"], rows: Int[Array, " Q"], experts: Int[Array, " Q"]
    ) -> Float[Array, "Q D"]:
        """MLP of each pair's expert on its row of x; 0 where the expert is none of this device's."""
        gate_up, down = self.gate_up_proj.weight[...], self.down_proj.weight[...]
        order, place, group_sizes = _by_expert(experts, gate_up.shape[0])
        constants = dataclasses.asdict(self.activation)
        hidden = grouped_swiglu(x[rows[order]], gate_up, group_sizes, **constants)
        out = grouped_matmul(hidden, down, group_sizes)
        # Back in the pairs' order by a gather: a scatter-add would sum in an order that the hardware chooses. What lies
        # behind the last group may be anything.
        return jnp.where((experts < gate_up.shape[0])[:, None], out[place], 0)


def _by_expert(
    experts: Int[Array, " Q"], num_experts: int
) -> tuple[Int[Array, " Q"], Int[Array, " Q"], Int[Array, " E"]]:
    """Pairs sorted by expert, the place of each pair among them, and how many each expert has.

    Pairs with a number that is no expert's come last.
    """
    num_pairs = experts.size
    index = jnp.arange(num_pairs, dtype=jnp.int32)
    if num_pairs <= COMPARED_PAIRS:
        keys = experts.astype(jnp.int32) * num_pairs + index
        # For few pairs one operation counts both, and so there are as many rows for pairs as for experts.
        own = jnp.pad(keys, (0, max(0, num_experts - num_pairs)))[:, None]
        place = jnp.sum(keys < own, axis=1, dtype=jnp.int32)[:num_pairs]
        first = jnp.arange(num_experts, dtype=jnp.int32)[:, None] * num_pairs
        sizes = jnp.sum((keys >= first) & (keys < first + num_pairs), axis=1, dtype=jnp.int32)
        order = jnp.sum(jnp.where(place == index[:, None], index, 0), axis=1, dtype=jnp.int32)
        return order, place, sizes
    order = jnp.argsort(experts, stable=True)
    place = jnp.zeros_like(order).at[order].set(index, unique_indices=True)
    sizes = jnp.sum(experts == jnp.arange(num_experts)[:, None], axis=1, dtype=jnp.int32)
    return order, place, sizes


def _round_size(num_rows: int, per_row: int, devices: int, num_local: int) -> int:
    """Pairs that go from one device to another in a round: 5/4 of an even share, and no more than there can be."""
    share = -(-5 * num_rows * per_row // (4 * devices))
    return min(-(-share // 8) * 8, num_rows * min(per_row, num_local))


def _weighted_sum(products: Float[Array, "RX D"], weights: Float[Array, "R X"]) -> Float[Array, "R D"]:
    # Not an einsum and no sum along an axis: as products and additions it becomes part of the operations round it.
    parts = products.reshape(*weights.shape, -1).astype(jnp.float32) * weights[..., None]
    return functools.reduce(jnp.add, [parts[:, each] for each in range(weights.shape[1])])


class SparseMoeBlock(nnx.Module):
    """routed_scaling_factor * routed experts + shared expert."""

    def __init__(self, config: M3Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.num_experts = config.num_experts
        self.routed_scaling_factor = config.routed_scaling_factor
        self.gate = Router(config, rngs=rngs)
        self.experts = Experts(config, dtype=dtype, rngs=rngs)
        self.shared_experts = MLP(config, config.shared_intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], routing: Routing | None = None) -> Float[Array, "B T D"]:
        """The block's output; over a mesh, the part that this device's channels give, to be summed over `tensor`.

        Without `routing` every row is a token.
        """
        routing = routing or Routing.of(jnp.ones(x.shape[:2], bool))
        rows = x.reshape(-1, x.shape[-1])
        if routing.gathered:
            rows = all_gather(rows, "expert", 0)
        weights, expert_ids = self.gate(rows)
        expert_ids = jnp.where(routing.live[:, None], expert_ids, self.num_experts)
        if routing.gathered:
            routed = reduce_scatter(self.experts(rows, weights, expert_ids), "expert", 0)
        else:
            routed = self.experts.exchanged(rows, weights, expert_ids)
        return (self.routed_scaling_factor * routed.reshape(x.shape)).astype(x.dtype) + self.shared_experts(x)
