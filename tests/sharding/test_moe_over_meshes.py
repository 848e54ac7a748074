"""The experts over a mesh: exact for any routing, both ways, and in as many rounds as the routing takes."""

import functools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from m3_jax import moe as moe_module
from m3_jax.moe import Routing, SparseMoeBlock
from m3_jax.sharding import BATCH, all_reduce, over_mesh, partition_spec

CONFIG = meshes.CONFIG
EXPERTS, SHAPE = CONFIG.num_experts, (8, 13, CONFIG.hidden_size)
SIZES = [{"expert": 2}, {"expert": 8}, {"expert": 4, "tensor": 2}, {"data": 2, "expert": 4}]
# The correction bias forces a choice of 3 experts; "one device": all of one device's, whatever the mesh.
BIASES = {
    "random": np.random.RandomState(5).standard_normal(EXPERTS),
    "the same three for all": np.where(np.isin(np.arange(EXPERTS), [2, 7, 13]), 100.0, 0.0),
    "one device for all": np.where(np.arange(EXPERTS) == 1, 100.0, 0.0) + np.where(np.arange(EXPERTS) < 4, 50.0, 0.0),
}
X = np.random.RandomState(1).standard_normal(SHAPE).astype(np.float32)
LIVE = np.arange(SHAPE[1]) < np.array([13, 0, 5, 1, 13, 13, 0, 9])[:, None]


@functools.cache
def reference() -> SparseMoeBlock:
    block = meshes.REFERENCE.layers[1].mlp
    assert isinstance(block, SparseMoeBlock)
    return block


def with_bias(bias: str) -> tuple[nnx.GraphDef, nnx.State]:
    graphdef, state = nnx.split(reference())
    flat = [
        (
            path,
            value.replace(jnp.asarray(BIASES[bias], jnp.float32)) if path[-1] == "e_score_correction_bias" else value,
        )
        for path, value in nnx.to_flat_state(state)
    ]
    return graphdef, nnx.from_flat_state(flat)


@functools.cache
def expected(bias: str) -> np.ndarray:
    graphdef, state = with_bias(bias)
    out = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, X)
    return np.asarray(out)


@pytest.mark.parametrize("gather_rows", [0, 1024], ids=["exchanged", "gathered"])
@pytest.mark.parametrize("sizes", SIZES, ids=meshes.name)
def test_any_routing(sizes: dict[str, int], gather_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_module, "GATHER_ROWS", gather_rows)
    mesh = meshes.mesh(sizes)
    graphdef, state = with_bias("random")
    state_specs = jax.tree.map(
        lambda weight: partition_spec(weight.get_metadata("logical_axes"), mesh),
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )

    def block(state: nnx.State, x: jax.Array, live: jax.Array) -> jax.Array:
        return all_reduce(nnx.merge(graphdef, state)(x, Routing.of(live)), "tensor")

    rows = PartitionSpec(BATCH)
    jitted = jax.jit(over_mesh(mesh, block, (state_specs, rows, rows), rows))
    for bias in BIASES:
        # What stands in padded rows reaches nobody.
        out = np.asarray(jitted(with_bias(bias)[1], np.where(LIVE[..., None], X, np.nan), LIVE))[LIVE]
        values = expected(bias)[LIVE]
        np.testing.assert_allclose(out, values, rtol=0, atol=1e-5 * np.abs(values).max(), err_msg=bias)


def test_rounds_are_as_many_as_the_routing_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even routing takes one exchange, all rows on one device about as many as there are devices."""
    monkeypatch.setattr(moe_module, "GATHER_ROWS", 0)
    rounds: list[np.ndarray] = []
    products = moe_module.Experts._products

    def counted(self: moe_module.Experts, *arguments: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: rounds.append(np.ones(())))
        return products(self, *arguments)

    monkeypatch.setattr(moe_module.Experts, "_products", counted)
    mesh, devices, rows, per_row = meshes.mesh({"expert": 4}), 4, 32, 3
    experts = reference().experts
    even = np.arange(devices * rows * per_row).reshape(-1, per_row) % EXPERTS
    piled = np.broadcast_to(np.array([0, 2, 3]), even.shape)
    x = np.random.RandomState(2).standard_normal((devices * rows, CONFIG.hidden_size)).astype(np.float32)
    weights = np.ones(even.shape, np.float32)
    graphdef, state = nnx.split(experts)
    specs = jax.tree.map(
        lambda weight: partition_spec(weight.get_metadata("logical_axes"), mesh),
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    row = PartitionSpec(BATCH)

    def exchange(state: nnx.State, *arguments: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state).exchanged(*arguments)

    jitted = jax.jit(over_mesh(mesh, exchange, (specs, row, row, row), row))
    taken = []
    for expert_ids in (even, piled):
        rounds.clear()
        jax.block_until_ready(jitted(state, x, weights, expert_ids.astype(np.int32)))
        jax.effects_barrier()
        taken.append(len(rounds) // devices)
    # 96 pairs in rounds of 32, which are 5/4 of an even share of 24, rounded up to a multiple of 8.
    assert taken == [1, 3]
