"""Memory of every device that the others write to, and the addresses that let them.

The layout of a device's memory, in bytes, of a grid of at most `MAX_CTAS` CTAs of `THREADS` threads:

    counters  [MAX_CTAS, THREADS] x 4                        calls of each thread so far
    places    [2, MAX_CTAS, devices, BLOCKS, THREADS] x 16   what devices send, all bits set where nothing has come
"""

import ctypes
import itertools
import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from pallas_kernels import hopper

MAX_CTAS = 132
THREADS = 128
# What a thread sends with one instruction, and a CTA with one of each thread.
VECTOR_BYTES = 16
BLOCK_BYTES = THREADS * VECTOR_BYTES
# Blocks that a CTA receives from one device in one call.
BLOCKS = 4
MAX_DEVICES = 8
COUNTER_BYTES = MAX_CTAS * THREADS * 4
EMPTY = 0xFFFFFFFF


class Workspace(NamedTuple):
    """What `all_reduce` needs of a mesh; both are cut along all of its axes, a row for each device.

    table: this device's place along the axes of the sum, its address, and the others' addresses from the device behind
        it on, as 64-bit numbers in two words each. It is all that a program takes.
    memory: what they are the addresses of. It must live as long as the table, and is never donated or written to.
    """

    table: UInt32[Array, "N W"]
    memory: UInt32[Array, "N M"]


def table_words(num_devices: int) -> int:
    """Words of a device's row of the table."""
    return 2 * (num_devices + 1)


def place_bytes(num_devices: int) -> int:
    """Bytes of one of the two halves of the places of one CTA."""
    return num_devices * BLOCKS * BLOCK_BYTES


def why_no_workspace(mesh: Mesh, axes: str | tuple[str, ...]) -> str | None:
    """Return None when the kernel can sum along these axes, given a workspace, else the reason."""
    num_devices = _num_devices(mesh, axes)
    if not 2 <= num_devices <= MAX_DEVICES:
        return f"axes={axes} have {num_devices} devices, not 2 to {MAX_DEVICES}"
    devices = mesh.devices.flatten().tolist()
    if not set(devices) <= set(jax.local_devices()):
        return "the mesh has devices that are not this process's"
    for device in devices:
        capability = getattr(device, "compute_capability", None)
        if capability != hopper.COMPUTE_CAPABILITY:
            return f"{device} has compute capability {capability}, not {hopper.COMPUTE_CAPABILITY}"
    # XLA's client lets a device reach the others' memory wherever it can. A write to where it cannot ends the process.
    driver, can = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
    for one, other in itertools.permutations(devices, 2):
        ordinals = one.local_hardware_id, other.local_hardware_id
        if driver.cuDeviceCanAccessPeer(ctypes.byref(can), *ordinals) or not can.value:
            return f"{one} cannot access the memory of {other}"
    return None


def make_workspace(mesh: Mesh, axes: str | tuple[str, ...]) -> Workspace:
    """Allocate memory on every device of a mesh, 2.2 MB for each device that takes part in a sum along `axes`.

    Raises ValueError for devices of several processes, and unless 2 to `MAX_DEVICES` take part.
    """
    num_devices = _num_devices(mesh, axes)
    if not 2 <= num_devices <= MAX_DEVICES:
        raise ValueError(f"axes={axes} have {num_devices} devices, which must be 2 to {MAX_DEVICES}")
    if any(device.process_index != jax.process_index() for device in mesh.devices.flat):
        raise ValueError("the mesh has devices of several processes, whose addresses are not each other's")
    row = np.full((1, (COUNTER_BYTES + 2 * MAX_CTAS * place_bytes(num_devices)) // 4), EMPTY, np.uint32)
    row[:, : COUNTER_BYTES // 4] = 0
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    memory = jax.make_array_from_callback((mesh.size, row.shape[1]), sharding, lambda _: row.copy())
    memory.block_until_ready()
    addresses = np.empty(mesh.size, np.uint64)
    for shard in memory.addressable_shards:
        assert shard.data is not None
        addresses[shard.index[0]] = shard.data.unsafe_buffer_pointer()
    # The devices' numbers, [groups that sum, devices of a group].
    summed = [mesh.axis_names.index(axis) for axis in ((axes,) if isinstance(axes, str) else axes)]
    numbers = np.moveaxis(np.arange(mesh.size).reshape(mesh.axis_sizes), summed, range(-len(summed), 0))
    table = np.empty((mesh.size, table_words(num_devices) // 2), np.uint64)
    for group in numbers.reshape(-1, num_devices):
        for place, device in enumerate(group):
            table[device] = place, *addresses[np.roll(group, -place)]
    words = table.view(np.uint32)
    return Workspace(jax.make_array_from_callback(words.shape, sharding, lambda index: words[index]), memory)


def _num_devices(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
