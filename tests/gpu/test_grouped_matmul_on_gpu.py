"""The grouped matmul's Mosaic GPU kernels on a GPU: random sizes of groups with each config, and the released sizes."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_matmul_cases import CASES, CONSTANTS, Case, check, expected_matmul, expected_swiglu, make

from pallas_kernels import grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.mosaic_gpu_multiply import TuningConfig

pytestmark = pytest.mark.gpu
DRAWS = 16


@dataclass(frozen=True)
class Bucket:
    """Static shapes of a call, and the average number of rows of a group that the config is chosen for."""

    groups: int
    rows: int
    channels: int
    out_channels: int
    average: float
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"E{self.groups}-R{self.rows}-I{self.channels}-O{self.out_channels}-{self.average}"

    @property
    def config(self) -> TuningConfig:
        groups = 1000
        return TuningConfig.heuristic(round(groups * self.average), groups, channels=10_000, depth=self.channels)


# One for each config of the heuristic, the first with parts of the contracted channels.
BUCKETS = (
    Bucket(128, 4, 512, 256, 0.001, "float16"),
    Bucket(128, 12, 256, 512, 0.03),
    Bucket(16, 37, 64, 256, 2, "float16"),
    Bucket(128, 1024, 320, 512, 8),
    Bucket(5, 1000, 512, 256, 40),
    Bucket(8, 3000, 384, 512, 300, "float16"),
)


def draw_sizes(bucket: Bucket, rng: np.random.Generator) -> np.ndarray:
    """Sizes that sum to at most the number of rows: even, uneven, most groups empty, or all rows in one."""
    shares = rng.random(bucket.groups) ** rng.choice([0.1, 1, 8]) * (rng.random(bucket.groups) < rng.choice([0.1, 1]))
    if not shares.any():
        shares[rng.integers(bucket.groups)] = 1
    return np.floor(bucket.rows * rng.choice([0.6, 1]) * shares / shares.sum()).astype(np.int32)


def wide(operation: str, rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The reference in float32: products of 16-bit numbers are exact in it, TensorFloat-32 included."""
    arrays = (rows.astype(jnp.float32), weights.astype(jnp.float32), group_sizes)
    if operation == "grouped_matmul":
        return grouped_matmul(*arrays, impl="reference")
    return grouped_swiglu(*arrays, **CONSTANTS, impl="reference")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_random_sizes(bucket: Bucket, fused: bool):
    """Against the reference; NaN behind the last group reaches no row of a group; two runs are bit-equal."""
    run = functools.partial(mosaic_gpu._swiglu, **CONSTANTS) if fused else mosaic_gpu._matmul
    run = jax.jit(functools.partial(run, config=bucket.config))
    reference = jax.jit(functools.partial(wide, "grouped_swiglu" if fused else "grouped_matmul"))
    rng = np.random.default_rng(bucket.rows)
    even = [bucket.rows // bucket.groups] * (bucket.groups - 1)
    case = Case("random", (*even, bucket.rows - sum(even)), 0, bucket.channels, bucket.out_channels, bucket.dtype)
    rows, weights, _ = make(case, fused=fused)
    for _ in range(DRAWS):
        sizes = draw_sizes(bucket, rng)
        num_rows = int(sizes.sum())
        args = (rows.at[num_rows:].set(jnp.nan), weights, jnp.asarray(sizes))
        got, again, expected = (np.asarray(call(*args)[:num_rows], np.float32) for call in (run, run, reference))
        check(got, expected, bucket.dtype)
        np.testing.assert_array_equal(got, again)


@pytest.mark.parametrize("case", [case for case in CASES if sum(case.group_sizes) <= 40 and len(case.group_sizes) < 5])
def test_few_rows(case: Case):
    args = make(case, fused=False)
    check(grouped_matmul(*args, impl="mosaic_gpu"), expected_matmul(*args), case.dtype)
    args = make(case, fused=True)
    got = grouped_swiglu(*args, **CONSTANTS, impl="mosaic_gpu")
    check(got, expected_swiglu(*args, **CONSTANTS), case.dtype)


@pytest.mark.parametrize(("tokens", "width"), [(1, 3072), (64, 1536), (8192, 384)])
def test_released_sizes(tokens: int, width: int):
    """16 of the released model's experts, whole or as tensor parallelism cuts them."""
    groups, size = 16, 6144
    rng = np.random.default_rng(tokens)
    sizes = np.bincount(rng.integers(0, groups, tokens * 4), minlength=groups)
    sizes[rng.integers(groups)] //= 2
    keys = jax.random.split(jax.random.key(tokens), 3)
    rows = jax.random.normal(keys[0], (tokens * 4, size), jnp.bfloat16)
    gate_up = jax.random.normal(keys[1], (groups, 2, width, size), jnp.bfloat16) / 32
    down = jax.random.normal(keys[2], (groups, size, width), jnp.bfloat16) / 32
    group_sizes = jnp.asarray(sizes, jnp.int32)
    num_rows = int(sizes.sum())

    def checked(operation: str, got: jax.Array, *args: jax.Array) -> None:
        expected = jax.jit(functools.partial(wide, operation))(*args)[:num_rows]
        error = jnp.max(jnp.abs(got[:num_rows].astype(jnp.float32) - expected)) / jnp.max(jnp.abs(expected))
        assert float(error) <= 4e-3, (operation, error)

    hidden = grouped_swiglu(rows, gate_up, group_sizes, **CONSTANTS, impl="mosaic_gpu")
    checked("grouped_swiglu", hidden, rows, gate_up, group_sizes)
    checked("grouped_matmul", grouped_matmul(hidden, down, group_sizes, impl="mosaic_gpu"), hidden, down, group_sizes)


def test_derivative_is_the_references():
    args = make(CASES[7], fused=True)
    num_rows = sum(CASES[7].group_sizes)

    def loss(impl: str, rows: jax.Array, gate_up: jax.Array) -> jax.Array:
        out = grouped_swiglu(rows, gate_up, args[2], **CONSTANTS, impl=impl)
        return jnp.sum(out[:num_rows].astype(jnp.float32))

    gradients = [
        jax.grad(functools.partial(loss, impl), argnums=(0, 1))(*args[:2]) for impl in ("mosaic_gpu", "reference")
    ]
    for got, expected in zip(*gradients, strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(expected, np.float32))
