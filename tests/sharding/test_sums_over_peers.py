"""A decode step's sums over `tensor` go to the kernel where there is a workspace, and nothing else does."""

from collections.abc import Iterator
from typing import Any

import jax
import meshes
import models
import numpy as np
import pytest

from m3_jax import GenerateOutput, M3ForCausalLM, generate, make_mesh, sharding
from m3_jax.sharding import all_reduce, over_mesh, partition_spec, pass_mesh, peer_table, sums_over_peers

PROMPTS = [models.random_tokens(meshes.CONFIG, length, seed=length).tolist() for length in (37, 5)]
SUMS = 1 + 2 * meshes.CONFIG.num_hidden_layers


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """The sums that are traced as the kernel's, on devices that count as GPUs; the reference computes them."""
    calls: list[tuple[Any, ...]] = []
    reduce_over_peers = sharding.reduce_over_peers

    def counted(x: Any, axes: Any, table: Any) -> Any:
        calls.append((x.shape, axes, table.shape))
        return reduce_over_peers(x, axes, table)

    monkeypatch.setattr(sharding, "reduce_over_peers", counted)
    monkeypatch.setattr(sharding, "why_no_workspace", lambda *_: None)
    sharding._workspace.cache_clear()
    yield calls
    sharding._workspace.cache_clear()


def generated(model: M3ForCausalLM, **options: Any) -> GenerateOutput:
    return generate(model, PROMPTS, max_new_tokens=4, prefill_chunk=32, **options)


def test_the_sums_of_decode(reductions: list[Any]) -> None:
    model = models.placed(meshes.REFERENCE, meshes.mesh({"data": 2, "tensor": 4}))
    found = generated(model)
    expected_calls = [((1, 1, meshes.CONFIG.hidden_size), ("tensor",), (1, 10))] * SUMS
    assert reductions == expected_calls
    streamed: list[tuple[int, int]] = []
    assert generated(model, stream=lambda index, token, _: streamed.append((index, token))) == found
    assert reductions == 2 * expected_calls


def test_axes(reductions: list[Any]) -> None:
    """Both parts of a split `tensor`, and no other axis; nothing outside `sums_over_peers`."""
    mesh = pass_mesh(meshes.mesh({"data": 2, "tensor": 4}), 2)

    def sums(x: jax.Array, peers: jax.Array) -> list[jax.Array]:
        with sums_over_peers(peers):
            found = [all_reduce(x, axes) for axes in ("tensor", "data", "kv")]
        return [*found, all_reduce(x, "tensor")]

    cut = partition_spec(("devices",), mesh)
    x = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    found = jax.jit(over_mesh(mesh, sums, (cut, cut), cut))(x, peer_table(mesh))
    assert reductions == [((1, 2), ("kv", "copies"), (1, 10))]
    parts = x.reshape(2, 2, 2, 2)
    for axes, summed in zip(((1, 2), 0, 1, (1, 2)), found, strict=True):
        np.testing.assert_array_equal(
            summed, np.broadcast_to(parts.sum(axes, keepdims=True), parts.shape).reshape(8, 2)
        )


def test_tables(reductions: list[Any]) -> None:
    mesh = meshes.mesh({"data": 2, "tensor": 4})
    table = peer_table(mesh)
    assert table is peer_table(make_mesh(data=2, tensor=4, devices=jax.devices("cpu")))
    assert table is not None
    assert table.shape == (8, 10)
    assert peer_table(meshes.mesh({"expert": 4})) is None
    assert peer_table(None) is None
    assert peer_table(mesh.abstract_mesh) is None
    assert not reductions


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_no_tables_without_gpus() -> None:
    assert peer_table(meshes.mesh({"data": 2, "tensor": 4})) is None
