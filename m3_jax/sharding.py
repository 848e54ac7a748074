"""Meshes, and where each dimension of a weight goes on one.

A weight names its dimensions by what they are ("vocab", "heads"); `RULES` says once which mesh axis each of them is
cut along. Nothing else in the project knows mesh axes by name.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "expert", "tensor")

# None: every device holds the whole dimension. "embed" stays whole, so that a layer needs one reduction for attention
# and one for its MLP, after the products that contract a dimension that is cut.
RULES: Mapping[str, str | None] = MappingProxyType(
    {
        "vocab": "tensor",
        "embed": None,
        "heads": "tensor",
        "kv_heads": "tensor",
        "index_heads": "tensor",
        "head_dim": None,
        "mlp": "tensor",
        "experts": "expert",
        "gate_up": None,
        "router": None,
    }
)


def make_mesh(*, data: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes data, expert and tensor, left to the compiler to propagate (`AxisType.Auto`).

    Raises `ValueError` where a size is not positive or the mesh needs more devices than there are.
    """
    shape = {"data": data, "expert": expert, "tensor": tensor}
    for name, size in shape.items():
        if size < 1:
            raise ValueError(f"{name}={size}: a mesh axis must have at least 1 device")
    available = jax.devices() if devices is None else list(devices)
    needed = math.prod(shape.values())
    if needed > len(available):
        raise ValueError(f"mesh {shape} needs {needed} devices, there are {len(available)}")
    return jax.make_mesh(
        tuple(shape.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=available[:needed],
    )


def partition_spec(logical_axes: Sequence[str], rules: Mapping[str, str | None] = RULES) -> PartitionSpec:
    """The mesh axis of each dimension. Raises `ValueError` for an unknown name or an axis that is used twice."""
    unknown = [name for name in logical_axes if name not in rules]
    if unknown:
        raise ValueError(f"logical_axes={tuple(logical_axes)}: {unknown[0]!r} is not one of {sorted(rules)}")
    axes = [rules[name] for name in logical_axes]
    used = [axis for axis in axes if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"logical_axes={tuple(logical_axes)}: two dimensions on one mesh axis, {axes}")
    return PartitionSpec(*axes)


def named_sharding(mesh: Mesh, logical_axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """Where an array of `shape` with these dimensions goes. Raises `ValueError` where a dimension does not divide."""
    spec = partition_spec(logical_axes)
    for name, axis, size in zip(logical_axes, spec, shape, strict=True):
        parts = 1 if axis is None else mesh.shape.get(axis, 1)
        if size % parts:
            raise ValueError(f"{name}={size} does not divide over the {parts} devices of mesh axis {axis!r}")
    return NamedSharding(mesh, PartitionSpec(*(a if a in mesh.shape else None for a in spec)))
