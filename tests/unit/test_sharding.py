"""Meshes, rules, and the annotation of every weight."""

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from m3_jax import M3Config, M3ForCausalLM, make_mesh
from m3_jax.sharding import RULES, named_sharding, partition_spec


def test_every_weight_is_annotated(tiny: M3ForCausalLM) -> None:
    for path, variable in nnx.to_flat_state(nnx.state(tiny)):
        axes = variable.get_metadata()["logical_axes"]
        assert len(axes) == variable.get_value().ndim, path
        assert set(axes) <= set(RULES), path
        partition_spec(axes)


def test_released_sizes_divide_over_four_and_eight() -> None:
    model = nnx.eval_shape(lambda: M3ForCausalLM(M3Config.m3(), rngs=nnx.Rngs(0)))
    sizes = {
        (name, size)
        for _, variable in nnx.to_flat_state(nnx.state(model))
        for name, size in zip(variable.get_metadata()["logical_axes"], variable.get_value().shape, strict=True)
    }
    assert all(size % 4 == 0 for name, size in sizes if RULES[name] == "tensor")
    assert all(size % 8 == 0 for name, size in sizes if RULES[name] == "expert")


def test_specs() -> None:
    assert partition_spec(("experts", "gate_up", "mlp", "embed")) == PartitionSpec("expert", None, "tensor", None)
    with pytest.raises(ValueError, match="'width' is not one of"):
        partition_spec(("width",))
    with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
        partition_spec(("heads", "mlp"))


def test_meshes() -> None:
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": 1, "expert": 1, "tensor": 1}
    assert named_sharding(mesh, ("vocab", "embed"), (10, 3)).spec == PartitionSpec("tensor", None)
    with pytest.raises(ValueError, match=r"needs 1024 devices, there are"):
        make_mesh(tensor=1024)
    with pytest.raises(ValueError, match="data=0"):
        make_mesh(data=0)


def test_what_does_not_divide_is_refused() -> None:
    mesh = jax.sharding.AbstractMesh((1, 1, 4), ("data", "expert", "tensor"))
    with pytest.raises(ValueError, match="heads=6 does not divide over the 4 devices of mesh axis 'tensor'"):
        named_sharding(mesh, ("heads", "head_dim"), (6, 16))  # pyright: ignore[reportArgumentType]
