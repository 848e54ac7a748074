"""The sum over devices as far as a CPU can check it: workspaces, the reference, the kernel's protocol, errors."""

import ctypes
import itertools
import random
import types

import all_reduce_emulation as emulation
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import all_reduce, hopper
from pallas_kernels.all_reduce import Workspace, make_workspace, mosaic_gpu, why_no_workspace, workspace
from pallas_kernels.all_reduce.api import OPERATIONS

CPUS = np.array(jax.devices("cpu")[:8])
MESH = Mesh(CPUS.reshape(2, 2, 2), ("a", "b", "c"))
AXES = [axes for count in (1, 2, 3) for axes in itertools.permutations(MESH.axis_names, count)]


def addresses(space: Workspace) -> dict[int, int]:
    """Of each device's memory, by the device's number in the mesh."""
    found = {}
    for shard in space.memory.addressable_shards:
        assert shard.data is not None
        found[shard.index[0].start or 0] = shard.data.unsafe_buffer_pointer()
    return found


@pytest.mark.parametrize("axes", AXES, ids="".join)
def test_table(axes: tuple[str, ...]) -> None:
    """Each device's row says where it stands in its group, and which memories are the group's."""
    space = make_workspace(MESH, axes)
    sizes = [MESH.shape[axis] for axis in axes]
    numbers = {address: number for number, address in addresses(space).items()}
    for number, row in enumerate(np.asarray(space.table).view(np.uint64)):
        place, *others = row.tolist()
        at = dict(zip(MESH.axis_names, np.unravel_index(number, MESH.axis_sizes), strict=True))
        assert place == np.ravel_multi_index([at[axis] for axis in axes], sizes)
        group = []
        for there in np.ndindex(*sizes):
            moved = at | dict(zip(axes, there, strict=True))
            group.append(int(np.ravel_multi_index([moved[axis] for axis in MESH.axis_names], MESH.axis_sizes)))
        assert [numbers[address] for address in others] == group[place:] + group[:place]
        assert others[0] == addresses(space)[number]


def test_memory() -> None:
    """Counters of zero, places that are empty."""
    for words in np.asarray(make_workspace(MESH, ("a", "c")).memory):
        counters = workspace.MAX_CTAS * workspace.THREADS
        assert not words[:counters].any()
        assert (words[counters:] == workspace.EMPTY).all()
        assert words.size == counters + 2 * workspace.MAX_CTAS * 4 * workspace.BLOCKS * workspace.THREADS * 4


@pytest.mark.parametrize("axes", ["b", ("c", "a")])
def test_reference(axes: str | tuple[str, ...]) -> None:
    table = make_workspace(MESH, axes).table
    x = np.random.default_rng(0).standard_normal((2, 2, 2, 3, 512), np.float32)

    def sums(x, table):
        return all_reduce(x, axes, table), all_reduce(x, axes), all_reduce(x, axes, table, impl="reference")

    cut = PartitionSpec(*MESH.axis_names)
    mapped = jax.shard_map(sums, mesh=MESH, in_specs=(cut, PartitionSpec(MESH.axis_names)), out_specs=cut)
    expected = np.broadcast_to(x.sum(tuple(MESH.axis_names.index(axis) for axis in axes), keepdims=True), x.shape)
    for found in jax.jit(mapped)(x, table):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_protocol(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of all sizes and dtypes one after another: the ordered sum on every device, and all places empty again."""
    emulation.emulate(monkeypatch)
    random.seed(devices)
    rng = np.random.default_rng(devices)
    space = make_workspace(Mesh(CPUS[:devices], ("x",)), "x")
    memory = {}
    for shard in space.memory.addressable_shards:
        memory[shard.index[0].start or 0] = np.asarray(shard.data)
    for number, address in addresses(space).items():
        assert emulation.own(memory[number]) == address
    table = np.asarray(space.table).copy()
    rows = [emulation.own(row) for row in table]
    calls, ctas, where, results = [], [], [[] for _ in range(devices)], []
    sizes = [(4, 1, "bfloat16"), (2, 3, "float16"), (1, 4, "float32"), (1, 1, "bfloat16"), (1, 1, "float16")]
    for count, blocks, name in sizes * 3:
        dtype = np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(name, name))
        size = count * blocks * emulation.BLOCK_BYTES // dtype.itemsize
        x = rng.standard_normal((devices, size), np.float32).astype(dtype)
        x.view(np.uint8)[:, :4] = 0xFF
        out = np.zeros_like(x)
        calls.append({"devices": devices, "dtype": name, "blocks": blocks})
        ctas.append(count)
        for device in range(devices):
            where[device].append((emulation.own(x[device]), rows[device], emulation.own(out[device])))
        results.append((x, out))
    emulation.run(where, calls, ctas)
    for x, out in results:
        total = x[0].astype(np.float32)
        for addend in x[1:]:
            total = total + addend.astype(np.float32)
        expected = total.astype(x.dtype)
        nan = np.isnan(total)
        assert nan.any()
        for found in out:
            assert (found[~nan].tobytes(), np.isnan(found[nan]).all()) == (expected[~nan].tobytes(), True)
            assert found.tobytes() == out[0].tobytes()
    for words in memory.values():
        assert (words[0, workspace.COUNTER_BYTES // 4 :] == workspace.EMPTY).all()


def test_blocks() -> None:
    assert [mosaic_gpu._blocks(rows * 6144 * 2) for rows in (1, 16, 22, 23, 64, 88, 89)] == [1, 1, 1, 2, 3, 4, None]
    assert mosaic_gpu._blocks(2048 + 16) is None
    assert mosaic_gpu._blocks(0) is None


def test_what_the_kernel_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(shape: tuple[int, ...], dtype=jnp.bfloat16, table: bool = True) -> str | None:
        row = jax.ShapeDtypeStruct((1, 10), jnp.uint32) if table else None
        return OPERATIONS["all_reduce"].why_not("mosaic_gpu", jax.ShapeDtypeStruct(shape, dtype), row, axes=("x",))

    assert reason((1, 6144), table=False) == "there is no workspace"
    assert reason((1, 6144), jnp.float64) == "the dtype is float64, not one of bfloat16, float16, float32"
    assert reason((1, 6000)) == "x has 12000 bytes, not up to 132 times 1 to 4 blocks of 2048"
    monkeypatch.setattr(hopper, "why_not_here", lambda: "elsewhere")
    assert reason((4, 1, 6144)) == "elsewhere"


def test_where_there_is_no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Mesh(CPUS[:1], ("x",))
    assert why_no_workspace(one, "x") == "axes=x have 1 devices, not 2 to 8"
    with pytest.raises(ValueError, match="axes=x have 1 devices, which must be 2 to 8"):
        make_workspace(one, "x")
    monkeypatch.setattr(jax, "local_devices", lambda: CPUS[:4].tolist())
    assert why_no_workspace(MESH, "a") == "the mesh has devices that are not this process's"
    monkeypatch.setattr(jax, "local_devices", CPUS.tolist)
    assert why_no_workspace(MESH, "a") == f"{CPUS[0]} has compute capability None, not 9.0"

    def access(reached: set[int], error: int = 0) -> None:
        def query(can, _one: int, other: int) -> int:
            can._obj.value = other in reached
            return error

        monkeypatch.setattr(ctypes, "CDLL", lambda _: types.SimpleNamespace(cuDeviceCanAccessPeer=query))

    monkeypatch.setattr(hopper, "COMPUTE_CAPABILITY", None)
    ordinals = {device.local_hardware_id for device in CPUS}
    access(ordinals)
    assert why_no_workspace(MESH, "a") is None
    access(ordinals - {CPUS[2].local_hardware_id})
    assert why_no_workspace(MESH, "a") == f"{CPUS[0]} cannot access the memory of {CPUS[2]}"
    access(ordinals, error=101)
    assert why_no_workspace(MESH, "a") == f"{CPUS[0]} cannot access the memory of {CPUS[1]}"


@pytest.mark.parametrize(
    ("x", "table", "error", "message"),
    [
        (jnp.int32, (jnp.uint32, (1, 10)), TypeError, "x has dtype int32, which must be a floating one"),
        (jnp.float32, (jnp.int32, (1, 10)), TypeError, "table has dtype int32, which must be uint32"),
        (jnp.float32, (jnp.uint32, (1, 6)), ValueError, r"table has shape \(1, 6\), which must be \(1, 10\)"),
        (jnp.float32, (jnp.uint32, (10,)), ValueError, r"table has shape \(10,\), which must be \(1, 10\)"),
    ],
)
def test_bad_arguments(x, table, error, message: str) -> None:
    def summed(x):
        return all_reduce(x, "x", jnp.zeros(table[1], table[0]))

    mapped = jax.shard_map(
        summed, mesh=Mesh(CPUS[:4], ("x",)), in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    with pytest.raises(error, match=message):
        jax.eval_shape(mapped, jax.ShapeDtypeStruct((2, 512), x))
