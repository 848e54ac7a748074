"""Meshes: where each dimension of a weight, a cache and a batch goes, and the collectives between devices.

A dimension is named by what it is ("vocab", "heads"); `RULES` says once which mesh axes each of them is cut along.

- `tensor` cuts every layer's inside: query, KV and index heads, the widths of MLPs and of every routed expert, the
  vocabulary. A layer then needs one reduction after attention and one after its MLP. It is the axis that shortens a
  single sequence's step, since each device reads its share of every weight.
- `expert` cuts the routed experts, 97 % of the released weights; to everything else it is more of `data`. Rows travel
  to their experts and back (`moe.py`).
- `data` cuts the batch, with the cache pages of its sequences, and repeats the weights.

Above the number of KV heads, `tensor` goes on cutting query heads and repeats KV and index heads: of 8 devices with 4
KV heads each holds one, and two hold the same. The axis is then seen as two, `kv` (4) and `copies` (2), so that weights
and caches of KV heads are placed by a partition spec like everything else, and no device holds another's head.

A whole pass runs inside one `jax.shard_map` (`over_mesh`): the compiler cannot cut kernels, page numbers are local to a
device, and the collectives are those that stand in the code. The functions that wrap them do nothing where their axis
has one device or there is no mesh.

The released model on 8 GPUs of 141 GB, bf16: 826.2 GB of routed experts (57 layers of 128, 113.2 MB each) and 26.2 GB
of everything else, 2.46 GB of it the embedding and as much the head. Bytes that the busiest device reads in a decode
step, by random routing, leaving out the cache; milliseconds at 4.3 TB/s; NCCL reduces 1 to 64 rows in about 30 us, and
gathers them and scatters their sums in about 44.

| mesh | weights a device | batch 1 | batch 4 | batch 16 | collectives of a step, batch 1 to 16 |
|---|---|---|---|---|---|
| tensor=8 | 106.9 GB | 6.6 GB, 1.5 ms | 15.7 GB, 3.6 ms | 44.5 GB, 10.4 ms | 120 reductions: 3.6 ms |
| tensor=4, expert=2 | 110.0 GB | 10.6 GB, 2.5 ms | 20.8 GB, 4.8 ms | 50.9 GB, 11.8 ms | 57 gathers too: 6.1 ms |
| tensor=2, expert=4 | 116.5 GB | 18.8 GB, 4.4 ms | 30.7 GB, 7.1 ms | 62.4 GB, 14.5 ms | the same: 6.1 ms |
| expert=8 | 129.5 GB | 34.2 GB, 7.9 ms | 48.9 GB, 11.4 ms | 82.9 GB, 19.3 ms | 57 gathers alone: 2.5 ms |
| tensor=4, data=2 | 213.3 GB, too much | | | | |

So tensor=8 for latency. `expert` pays where many sequences are in flight, since a row travels to at most its X experts
and not to every device: 65,536 rows of prefill cost tensor=8 two reductions of all rows a layer (about 5 ms each) and
expert=8 two exchanges of 4 x 8,192 rows a device (about 1.6 ms each). Prefill over `tensor` takes a chunk in halves, of
which one computes while the other's sums are reduced (`model.Turns`).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from pallas_kernels.all_reduce import Workspace, make_workspace, why_no_workspace
from pallas_kernels.all_reduce import all_reduce as reduce_over_peers

MESH_AXES = ("data", "expert", "tensor")
# How `tensor` is seen where it has more devices than there are KV heads.
KV, COPIES = "kv", "copies"
BATCH = ("data", "expert")

Axes = str | tuple[str, ...]

# None: every device holds the whole dimension. "embed" stays whole, so that a layer needs one reduction for attention
# and one for its MLP, after the products that contract a dimension that is cut.
RULES: Mapping[str, Axes | None] = MappingProxyType(
    {
        "vocab": "tensor",
        "embed": None,
        "heads": "tensor",
        "kv_heads": KV,
        "index_heads": KV,
        "head_dim": None,
        "mlp": "tensor",
        "experts": "expert",
        "gate_up": None,
        "router": None,
        "batch": BATCH,
        "pages": BATCH,
        "devices": MESH_AXES,
        "whole": None,
    }
)


def make_mesh(*, data: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes data, expert and tensor, for `load(..., mesh=)`.

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


@functools.cache
def pass_mesh[M: Mesh | AbstractMesh](mesh: M, num_kv_heads: int) -> M:
    """The mesh that passes run over: `tensor` cut into `kv` and `copies` where it exceeds the number of KV heads.

    Raises `ValueError` where KV heads neither divide over `tensor` nor divide it, or the mesh has other axes.
    """
    if mesh.axis_names != MESH_AXES:
        raise ValueError(f"the mesh has axes {mesh.axis_names}: must be {MESH_AXES}, as make_mesh makes them")
    data, expert, tensor = mesh.axis_sizes
    if num_kv_heads % tensor == 0:
        return mesh
    if tensor % num_kv_heads:
        raise ValueError(
            f"kv_heads={num_kv_heads} neither divides over the {tensor} devices of mesh axis 'tensor' nor divides them"
        )
    return _with_devices(mesh, (data, expert, num_kv_heads, tensor // num_kv_heads), (*BATCH, KV, COPIES))


def _with_devices(mesh: Any, shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
    """The devices of `mesh` in the same order with other axes."""
    types = (AxisType.Auto,) * len(names)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(shape, names, axis_types=types)
    return Mesh(mesh.devices.reshape(shape), names, axis_types=types)


def mesh_of(arrays: Any) -> Mesh | AbstractMesh | None:
    """The mesh of `make_mesh` over which a pytree's arrays lie; None on one device, and while `jax.jit` traces."""
    leaf = jax.tree.leaves(arrays)[0]
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    mesh = sharding.mesh
    if COPIES not in mesh.axis_names:
        return mesh
    data, expert, kv, copies = mesh.axis_sizes
    return _with_devices(mesh, (data, expert, kv * copies), MESH_AXES)


def _mesh_axes(axes: Axes | None, names: Sequence[str]) -> tuple[str, ...]:
    """A rule's axes as a mesh with these axis names has them."""
    split = {"tensor": (KV, COPIES), KV: (KV,)} if COPIES in names else {KV: ("tensor",)}
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return tuple(found for axis in axes for found in split.get(axis, (axis,)))


def partition_spec(logical_axes: Sequence[str], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The mesh axes of each dimension, on a mesh of `make_mesh` or `pass_mesh`.

    Axes of one device are left out: jax takes a spec with them and one without for two placements.
    Raises `ValueError` for an unknown name or an axis that is used twice.
    """
    unknown = [name for name in logical_axes if name not in RULES]
    if unknown:
        raise ValueError(f"logical_axes={tuple(logical_axes)}: {unknown[0]!r} is not one of {sorted(RULES)}")
    dimensions = [_mesh_axes(RULES[name], mesh.axis_names) for name in logical_axes]
    used = [axis for axes in dimensions for axis in axes]
    if len(used) != len(set(used)):
        raise ValueError(f"logical_axes={tuple(logical_axes)}: two dimensions on one mesh axis, {dimensions}")
    kept = [tuple(axis for axis in axes if mesh.shape[axis] > 1) for axes in dimensions]
    return PartitionSpec(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in kept))


def named_sharding(mesh: Mesh | AbstractMesh, logical_axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """Where a weight of `shape` with these dimensions goes, on a mesh of `make_mesh`.

    KV and index heads beyond which `tensor` reaches are repeated, see above. Raises `ValueError` where a dimension does
    not divide.
    """
    for name, size in zip(logical_axes, shape, strict=True):
        if RULES.get(name) == KV:
            mesh = pass_mesh(mesh, size)
    spec = partition_spec(logical_axes, mesh)
    for name, axes, size in zip(logical_axes, spec, shape, strict=True):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        parts = math.prod(mesh.shape[axis] for axis in names)
        if size % parts:
            raise ValueError(f"{name}={size} does not divide over the {parts} devices of mesh axis {RULES[name]!r}")
    return NamedSharding(mesh, spec)


def place(mesh: Mesh | AbstractMesh | None, logical_axes: Sequence[str], value: np.ndarray) -> Array:
    """A host array on the devices; every process of a mesh that spans several holds the same one."""
    if mesh is None:
        return jnp.asarray(value)
    sharding = NamedSharding(mesh, partition_spec(logical_axes, mesh))
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def fetch(arrays: Any) -> Any:
    """Device arrays as NumPy arrays, on every process of a mesh that spans several."""

    def whole(array: Array) -> Array:
        if array.is_fully_addressable or array.is_fully_replicated:
            return array
        assert isinstance(array.sharding, NamedSharding)
        return _replicate(NamedSharding(array.sharding.mesh, PartitionSpec()))(array)

    return jax.device_get(jax.tree.map(whole, arrays))


@functools.cache
def _replicate(sharding: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda array: array, out_shardings=sharding)


def over_mesh(
    mesh: Mesh | AbstractMesh | None, function: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function` on every device's part of its arguments; without a mesh, `function`."""
    if mesh is None:
        return function
    # The replication check knows nothing of custom calls, and the outputs' specs say what is replicated.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _cut_along(axes: Axes) -> tuple[str, ...]:
    """The mesh axes with several devices, inside `over_mesh`; none outside."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(
        axis for axis in _mesh_axes(axes, mesh.axis_names) if axis in mesh.manual_axes and mesh.shape[axis] > 1
    )


def axis_size(axes: Axes) -> int:
    """Devices along mesh axes ("data", "expert", "tensor" or several of them), inside `over_mesh`; 1 outside."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in _cut_along(axes))


def axis_index(axes: Axes) -> Int[Array, ""]:
    """This device's place along mesh axes; 0 outside a mesh."""
    cut = _cut_along(axes)
    return jax.lax.axis_index(cut) if cut else jnp.zeros((), jnp.int32)


def local_size(name: str, size: int) -> int:
    """What one device holds of a dimension of `size`, by `RULES`."""
    rule = RULES[name]
    return size if rule is None else size // axis_size(rule)


# This device's row of a `peer_table`, while a pass that uses it is traced.
_PEERS: ContextVar[UInt32[Array, "1 W"] | None] = ContextVar("_PEERS", default=None)


def all_reduce(x: Array, axes: Axes) -> Array:
    """The sum over the devices along `axes`, on each of them.

    Inside `sums_over_peers`, a small sum over `tensor` is a kernel that writes to the other GPUs' memory. Everything
    else is left to XLA: for few rows kernels of its own that read the other GPUs' memory, for 1,024 NCCL. On 4 H200 a
    sum of 1, 16 or 64 rows of 6,144 in bfloat16 takes 9, 13 or 18 us by the kernel, 16 to 25 by XLA's and 20 to 26 by
    NCCL, and a decode step of six layers 1,251 us instead of 1,508 and 1,605 (`benchmarks/over_meshes.py`). NCCL inside
    command buffers (`--xla_gpu_enable_command_buffer=+COLLECTIVES`) takes twice as long. Pallas' own remote references
    need no table, but let the devices exchange addresses at each execution.
    """
    cut = _cut_along(axes)
    if not cut:
        return x
    table = _PEERS.get()
    if table is not None and cut == _cut_along("tensor"):
        return reduce_over_peers(x, cut, table)
    return jax.lax.psum(x, cut)


@contextlib.contextmanager
def sums_over_peers(table: UInt32[Array, "1 W"] | None) -> Iterator[None]:
    """Lets the sums over `tensor` inside go through the memory that `peer_table`'s row tells of; None changes nothing.

    Each of them must depend on the result of the one before, as those of a decode step do: see
    `pallas_kernels.all_reduce`.
    """
    token = _PEERS.set(table)
    try:
        yield
    finally:
        _PEERS.reset(token)


def peer_table(mesh: Mesh | AbstractMesh | None) -> UInt32[Array, "N W"] | None:
    """What programs over this mesh take for `sums_over_peers`, cut along "devices"; the same array at every call.

    None where `tensor` has one device, or its devices are not Hopper GPUs of this process with access to each other's
    memory. As an argument of programs it keeps addresses out of them: what is compiled can be cached over processes.
    """
    workspace = _workspace(mesh) if isinstance(mesh, Mesh) else None
    return None if workspace is None else workspace.table


@functools.cache
def _workspace(mesh: Mesh) -> Workspace | None:
    """Lives as long as the process, for any call may still use its addresses: 9 MB a GPU on 4 GPUs, 17 on 8."""
    axes = tuple(axis for axis in _mesh_axes("tensor", mesh.axis_names) if mesh.shape[axis] > 1)
    return make_workspace(mesh, axes) if axes and why_no_workspace(mesh, axes) is None else None


def all_gather(x: Array, axes: Axes, dim: int) -> Array:
    """The devices' arrays one behind another along `dim`, on each of them."""
    cut = _cut_along(axes)
    return jax.lax.all_gather(x, cut, axis=dim % x.ndim, tiled=True) if cut else x


def reduce_scatter(x: Array, axes: Axes, dim: int) -> Array:
    """Each device's part along `dim` of the sum over the devices: `all_reduce`, then a slice."""
    cut = _cut_along(axes)
    return jax.lax.psum_scatter(x, cut, scatter_dimension=dim % x.ndim, tiled=True) if cut else x


def all_to_all(x: Array, axes: Axes) -> Array:
    """x[i] goes to device i along `axes`; out[j] came from device j. The first dimension is the number of devices."""
    cut = _cut_along(axes)
    return jax.lax.all_to_all(x, cut, split_axis=0, concat_axis=0, tiled=True) if cut else x
