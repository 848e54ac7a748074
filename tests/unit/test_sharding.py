"""Meshes, rules, the annotation of every weight, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from m3_jax import M3Config, M3ForCausalLM, make_mesh
from m3_jax.cache import cache_specs
from m3_jax.sharding import (
    RULES,
    all_gather,
    all_reduce,
    all_to_all,
    axis_index,
    axis_size,
    local_size,
    mesh_of,
    named_sharding,
    over_mesh,
    partition_spec,
    pass_mesh,
    place,
    reduce_scatter,
)

CPUS = jax.devices("cpu")


def abstract(**sizes: int) -> AbstractMesh:
    return AbstractMesh(
        tuple(sizes.get(axis, 1) for axis in ("data", "expert", "tensor")), ("data", "expert", "tensor")
    )


def weights_of(config: M3Config) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Path, dimensions and shape of every weight."""
    model = nnx.eval_shape(lambda: M3ForCausalLM(config, rngs=nnx.Rngs(0)))
    return [
        (".".join(map(str, path)), variable.get_metadata("logical_axes"), variable.get_value().shape)
        for path, variable in nnx.to_flat_state(nnx.state(model))
    ]


def test_every_weight_is_annotated() -> None:
    for path, axes, shape in weights_of(M3Config.tiny()):
        assert len(axes) == len(shape), path
        assert set(axes) <= set(RULES), path
        partition_spec(axes, abstract(tensor=2))


def test_the_released_model_on_eight_devices() -> None:
    """Bytes of weights a device, which the docstring of `sharding` gives and a device of 141 GB holds or does not."""
    weights = weights_of(M3Config.m3())

    def gigabytes(**sizes: int) -> float:
        mesh, total = abstract(**sizes), 0
        for path, axes, shape in weights:
            item = 4 if ".mlp.gate." in path else 2
            total += item * int(np.prod(named_sharding(mesh, axes, shape).shard_shape(shape)))
        return round(total / 1e9, 1)

    assert gigabytes(tensor=8) == 106.9
    assert gigabytes(tensor=4, expert=2) == 110.0
    assert gigabytes(tensor=2, expert=4) == 116.5
    assert gigabytes(expert=8) == 129.5
    assert gigabytes(tensor=4, data=2) == 213.3


def test_specs() -> None:
    mesh = abstract(data=2, expert=2, tensor=2)
    assert partition_spec(("experts", "gate_up", "mlp", "embed"), mesh) == PartitionSpec("expert", None, "tensor", None)
    assert partition_spec(("batch", "whole"), mesh) == PartitionSpec(("data", "expert"), None)
    assert partition_spec(("pages", "kv_heads"), mesh) == PartitionSpec(("data", "expert"), "tensor")
    # Axes of one device are left out.
    assert partition_spec(("batch", "vocab"), abstract(expert=2)) == PartitionSpec("expert", None)
    with pytest.raises(ValueError, match="'width' is not one of"):
        partition_spec(("width",), mesh)
    for pair in (("heads", "mlp"), ("heads", "kv_heads"), ("batch", "experts")):
        with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
            partition_spec(pair, mesh)


def test_kv_heads_are_repeated_beyond_their_number() -> None:
    """Four of them on eight devices: device d has head d // 2, and the query heads that belong to it."""
    mesh = make_mesh(tensor=8, devices=CPUS)
    kv = jax.device_put(np.arange(4.0)[:, None], named_sharding(mesh, ("kv_heads", "head_dim"), (4, 1)))
    heads = jax.device_put(np.arange(16.0)[:, None], named_sharding(mesh, ("heads", "head_dim"), (16, 1)))
    for device, (one, queries) in enumerate(zip(kv.addressable_shards, heads.addressable_shards, strict=True)):
        assert one.data.tolist() == [[device // 2]]
        assert {int(q) // 4 for q in np.ravel(queries.data)} == {device // 2}
    assert pass_mesh(mesh, 8) is mesh
    split = pass_mesh(mesh, 4)
    assert dict(split.shape) == {"data": 1, "expert": 1, "kv": 4, "copies": 2}
    assert mesh_of([kv]) == mesh_of([heads]) == mesh
    assert partition_spec(("heads", "head_dim"), split) == PartitionSpec(("kv", "copies"), None)
    specs = cache_specs(M3Config.m3(), split)
    assert specs.layers[5].k == PartitionSpec(None, "kv", None, None)
    assert specs.layers[5].index_k == PartitionSpec(None, None, None)
    assert specs.layers[0].index_k is None


def test_meshes() -> None:
    mesh = make_mesh(devices=CPUS)
    assert dict(mesh.shape) == {"data": 1, "expert": 1, "tensor": 1}
    assert named_sharding(mesh, ("vocab", "embed"), (10, 3)).spec == PartitionSpec(None, None)
    with pytest.raises(ValueError, match=r"needs 1024 devices, there are"):
        make_mesh(tensor=1024)
    with pytest.raises(ValueError, match="data=0"):
        make_mesh(data=0)


def test_what_does_not_divide_is_refused() -> None:
    mesh = abstract(tensor=4, expert=3)
    for axes, shape, message in (
        (("heads", "head_dim"), (6, 16), "heads=6 does not divide over the 4 devices of mesh axis 'tensor'"),
        (("vocab", "embed"), (98, 16), "vocab=98 does not divide over the 4 devices"),
        (("mlp",), (30,), "mlp=30 does not divide over the 4 devices"),
        (("experts",), (16,), "experts=16 does not divide over the 3 devices of mesh axis 'expert'"),
        (("kv_heads",), (3,), "kv_heads=3 neither divides over the 4 devices of mesh axis 'tensor' nor divides them"),
    ):
        with pytest.raises(ValueError, match=message):
            named_sharding(mesh, axes, shape)
    with pytest.raises(ValueError, match=r"the mesh has axes \('x',\)"):
        pass_mesh(AbstractMesh((2,), ("x",)), 4)


def test_collectives() -> None:
    """Over every axis and over both parts of a split one; nothing at all outside a mesh."""
    mesh = pass_mesh(make_mesh(data=2, tensor=4, devices=CPUS), 2)

    def parts(x: jax.Array) -> dict[str, jax.Array]:
        assert (axis_size("data"), axis_size("tensor"), axis_size("expert"), axis_size("kv")) == (2, 4, 1, 2)
        assert local_size("kv_heads", 2) == 1
        assert local_size("vocab", 12) == 3
        return {
            "index": axis_index("tensor")[None, None],
            "data index": axis_index(("data", "expert"))[None, None],
            "sum": all_reduce(x, "tensor"),
            "sum over data": all_reduce(x, ("data", "expert")),
            "gathered": all_gather(x, "tensor", -1),
            "scattered": reduce_scatter(jnp.tile(x, (1, 4)), "tensor", 1),
            "swapped": all_to_all(jnp.arange(4) + 10 * axis_index("tensor"), "tensor")[None],
            "expert": all_to_all(x, "expert"),
        }

    cut = PartitionSpec("data", ("kv", "copies"))
    x = np.arange(16.0).reshape(2, 8)
    out = jax.jit(over_mesh(mesh, parts, cut, cut))(place(mesh, ("batch", "heads"), x))
    np.testing.assert_array_equal(out["index"], [[0, 1, 2, 3]] * 2)
    np.testing.assert_array_equal(out["data index"], [[0] * 4, [1] * 4])
    sums = x.reshape(2, 4, 2).sum(1)
    np.testing.assert_array_equal(out["sum"], np.tile(sums, (1, 4)))
    np.testing.assert_array_equal(out["sum over data"], np.tile(x.sum(0), (2, 1)))
    np.testing.assert_array_equal(out["gathered"], np.tile(x, (1, 4)))
    np.testing.assert_array_equal(out["scattered"], np.tile(sums, (1, 4)))
    np.testing.assert_array_equal(out["swapped"].reshape(2, 4, 4)[0], 10 * np.arange(4) + np.arange(4)[:, None])
    np.testing.assert_array_equal(out["expert"], x)
    assert axis_size("tensor") == 1
    outside = jnp.asarray(x)
    assert all_reduce(outside, "tensor") is outside
