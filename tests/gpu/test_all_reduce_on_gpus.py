"""The sum over peers on GPUs: the ordered float32 sum to the bit, on every device, whatever the order of the calls."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import all_reduce
from pallas_kernels.all_reduce import Workspace, make_workspace, why_no_workspace

pytestmark = pytest.mark.gpu
SIZE = 6144
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
# One to four blocks a CTA.
ROWS = {"bfloat16": (1, 3, 64), "float16": (3, 64), "float32": (1, 44)}
CALLS, STEPS = 200, 50


@functools.cache
def space(shape: tuple[int, ...], axes: tuple[str, ...]) -> tuple[Mesh, Workspace]:
    """A mesh with axes a, b ... and the workspace for sums along some of them."""
    devices = jax.devices()
    needed = int(np.prod(shape))
    if len(devices) < needed:
        pytest.skip(f"needs {needed} GPUs, there are {len(devices)}")
    mesh = Mesh(np.array(devices[:needed]).reshape(shape), tuple("abc"[: len(shape)]))
    reason = why_no_workspace(mesh, axes)
    if reason is not None and "compute capability" in reason:
        pytest.skip(reason)
    assert reason is None
    return mesh, make_workspace(mesh, axes)


def most() -> int:
    """The largest power of two of devices, at least two."""
    return max(2, min(8, 1 << (len(jax.devices()).bit_length() - 1)))


def over(mesh: Mesh, function: Callable[..., Any], *specs: PartitionSpec) -> Any:
    cut = PartitionSpec(mesh.axis_names)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(cut, cut, *specs), out_specs=cut, check_vma=False))


def placed(mesh: Mesh, x: np.ndarray) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def draw(seed: int, devices: int, rows: int, dtype: str) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((devices, rows, SIZE), np.float32).astype(DTYPES[dtype])


def ordered_sum(x: np.ndarray) -> np.ndarray:
    """Over the first dimension in its order, in float32."""
    return functools.reduce(np.add, x.astype(np.float32)).astype(x.dtype)


def bits(x: Any) -> np.ndarray:
    x = np.asarray(jax.device_get(x))
    return x.view(np.dtype(f"uint{8 * x.dtype.itemsize}"))


def kernel(x: jax.Array, table: jax.Array) -> jax.Array:
    return all_reduce(x, "a", table, impl="mosaic_gpu")


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums(devices: int, dtype: str) -> None:
    mesh, workspace = space((devices,), ("a",))
    call = over(mesh, kernel)
    for rows in ROWS[dtype]:
        x = draw(rows, devices, rows, dtype)
        found = bits(call(placed(mesh, x), workspace.table))
        np.testing.assert_array_equal(found, np.broadcast_to(bits(ordered_sum(x)), x.shape))


@pytest.mark.parametrize("axes", [("a",), ("b",), ("b", "a")], ids="".join)
def test_groups(axes: tuple[str, ...]) -> None:
    """Along some axes of a mesh, each group for itself; along several in the order that is asked for."""
    # Along b alone there must be two devices, which two GPUs do not leave.
    mesh, workspace = space((2, max(2, most() // 2) if axes == ("b",) else most() // 2), axes)
    x = draw(7, mesh.size, 4, "bfloat16")
    found = bits(
        over(mesh, lambda x, table: all_reduce(x, axes, table, impl="mosaic_gpu"))(placed(mesh, x), workspace.table)
    )
    summed = [mesh.axis_names.index(axis) for axis in axes]
    numbers = np.moveaxis(np.arange(mesh.size).reshape(mesh.axis_sizes), summed, range(-len(summed), 0))
    for group in numbers.reshape(-1, int(np.prod([mesh.shape[axis] for axis in axes]))):
        np.testing.assert_array_equal(found[group], np.broadcast_to(bits(ordered_sum(x[group])), x[group].shape))


def test_many_calls() -> None:
    """Of mixed sizes behind one another, without waiting for any."""
    mesh, workspace = space((most(),), ("a",))
    call = over(mesh, lambda x, table, by: kernel(jnp.roll(x, by, axis=-1), table), PartitionSpec())
    arrays = [draw(rows, mesh.size, rows, "bfloat16") for rows in (1, 4, 16, 64)]
    on_devices = [placed(mesh, x) for x in arrays]
    which = [(i * i + i // 3) % len(arrays) for i in range(CALLS)]
    found = [call(on_devices[number], workspace.table, np.int32(i)) for i, number in enumerate(which)]
    jax.block_until_ready(found)
    sums = [bits(ordered_sum(x)) for x in arrays]
    for i, (number, result) in enumerate(zip(which, found, strict=True)):
        expected = np.broadcast_to(np.roll(sums[number], i, axis=-1), arrays[number].shape)
        np.testing.assert_array_equal(bits(result), expected, err_msg=f"call {i}")


def test_any_bits() -> None:
    """Those that mark an empty place among them: NaN stays NaN, everything else is exact."""
    mesh, workspace = space((most(),), ("a",))
    patterns = np.random.default_rng(0).integers(0, 1 << 16, (mesh.size, 4, SIZE), np.uint16)
    patterns[:, 0] = 0xFFFF
    patterns[0, 1] = 0x8000
    x = patterns.view(ml_dtypes.bfloat16)
    found = np.asarray(jax.device_get(over(mesh, kernel)(placed(mesh, x), workspace.table)))
    with np.errstate(all="ignore"):
        expected = np.broadcast_to(ordered_sum(x), x.shape)
    nan = np.isnan(expected.astype(np.float32))
    assert nan[:, 0].all()
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), nan)
    np.testing.assert_array_equal(bits(found)[~nan], bits(expected)[~nan])
    np.testing.assert_array_equal(bits(found), np.broadcast_to(bits(found)[:1], x.shape))


def test_in_a_loop() -> None:
    """As in a compiled decode loop: sums of two sizes, each of the results of the one before."""
    mesh, workspace = space((most(),), ("a",))
    devices, rows = mesh.size, 4

    def loop(x: jax.Array, table: jax.Array) -> jax.Array:
        def step(number: jax.Array, x: jax.Array) -> jax.Array:
            x = kernel((x + (number + lax.axis_index("a"))) / devices, table)
            first = kernel((x[:, :1] - lax.axis_index("a")) / devices, table)
            return jnp.concatenate([first, x[:, 1:]], axis=1)

        return lax.fori_loop(0, STEPS, step, x)

    start = np.broadcast_to(draw(3, 1, rows, "float32"), (devices, rows, SIZE))
    found = bits(over(mesh, loop)(placed(mesh, start), workspace.table))
    x, places = start, np.arange(devices, dtype=np.float32)[:, None, None]
    for number in range(STEPS):
        x = np.broadcast_to(ordered_sum((x + (number + places)) / np.float32(devices)), x.shape).copy()
        x[:, :1] = ordered_sum((x[:, :1] - places) / np.float32(devices))
    np.testing.assert_array_equal(found, bits(x))


def test_derivative() -> None:
    """That of `lax.psum`."""
    mesh, workspace = space((most(),), ("a",))
    x = draw(1, mesh.size, 1, "float32")

    def gradient(impl: str, x: jax.Array, table: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(all_reduce(x, "a", table, impl=impl) ** 2))(x)

    ours, theirs = (
        jax.device_get(over(mesh, functools.partial(gradient, impl))(placed(mesh, x), workspace.table))
        for impl in ("mosaic_gpu", "reference")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
