"""The grouped matmul: the reference against the oracle, what is refused, and the kernels in the interpreter."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_matmul_cases import CASES, CONSTANTS, Case, check, expected_matmul, expected_swiglu, make

from pallas_kernels import grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul import mosaic_gpu_plan as planning
from pallas_kernels.grouped_matmul.api import OPERATIONS
from pallas_kernels.grouped_matmul.mosaic_gpu_multiply import TuningConfig

HERE = Path(__file__).parent
make_plan = jax.jit(planning.plan, static_argnames=("num_rows", "widest", "tiles"))


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, "float32") for case in CASES), (CASES[3], "bfloat16"), (CASES[7], "float16")], ids=str
)
def test_reference(case: Case, dtype: str):
    case = dataclasses.replace(case, dtype=dtype, channels=40, out_channels=12)
    rows, weights, group_sizes = make(case, fused=False)
    got = grouped_matmul(rows, weights, group_sizes, impl="reference")
    check(got, expected_matmul(rows, weights, group_sizes), dtype)
    rows, gate_up, group_sizes = make(case, fused=True)
    got = grouped_swiglu(rows, gate_up, group_sizes, **CONSTANTS, impl="reference")
    check(got, expected_swiglu(rows, gate_up, group_sizes, **CONSTANTS), dtype)


def test_derivative():
    """Of the rows and matrices of groups with rows; NaN behind the last group reaches no other."""
    case = dataclasses.replace(CASES[7], dtype="float32", channels=6, out_channels=8)
    rows, gate_up, group_sizes = make(case, fused=True)
    num_rows = sum(case.group_sizes)
    group = np.repeat(np.arange(len(case.group_sizes)), case.group_sizes)

    def loss(rows, gate_up):
        return jnp.sum(jnp.sin(grouped_swiglu(rows, gate_up, group_sizes, **CONSTANTS)[:num_rows]))

    def plain(rows, gate_up):
        gate, up = jnp.einsum("ri,rgfi->grf", rows[:num_rows], gate_up[group], precision="highest")
        gate, up = jnp.minimum(gate, CONSTANTS["limit"]), jnp.clip(up, -CONSTANTS["limit"], CONSTANTS["limit"])
        return jnp.sum(jnp.sin((up + CONSTANTS["beta"]) * gate * jax.nn.sigmoid(CONSTANTS["alpha"] * gate)))

    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(rows, gate_up)
    for gradient, expected in zip(got, jax.grad(plain, argnums=(0, 1))(rows, gate_up), strict=True):
        np.testing.assert_allclose(gradient, expected, atol=1e-4)


def arrays(*, rows=8, channels=128, out=256, groups=3, dtype=jnp.bfloat16, sizes_dtype=jnp.int32):
    return (
        jax.ShapeDtypeStruct((rows, channels), dtype),
        jax.ShapeDtypeStruct((groups, out, channels), dtype),
        jax.ShapeDtypeStruct((groups,), sizes_dtype),
    )


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "group_sizes has shape (4,), but E in [E] must be 3, as in weights", {2: ((4,), jnp.int32)}),
        (
            ValueError,
            "weights has shape (3, 256, 64), but I in [E O I] must be 128, as in rows",
            {1: ((3, 256, 64), "f2")},
        ),
        (ValueError, "rows has shape (8,), which must have 2 axes: [R I]", {0: ((8,), "bfloat16")}),
        (TypeError, "group_sizes has dtype float32, which must be int32", {2: ((3,), "float32")}),
        (TypeError, "rows has dtype float16, which must be bfloat16, that of weights", {0: ((8, 128), "float16")}),
    ],
)
def test_arguments_that_do_not_fit(error: type[Exception], message: str, change: dict):
    given = list(arrays())
    for place, (shape, dtype) in change.items():
        given[place] = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(error) as caught:
        grouped_matmul(*given)  # pyright: ignore[reportArgumentType]
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "alpha='a' must be a Python float, not str", {"alpha": "a"}),
        (ValueError, "limit=0 must be positive and finite", {"limit": 0}),
        (ValueError, "beta=inf must be finite", {"beta": float("inf")}),
    ],
)
def test_constants_that_do_not_fit(error: type[Exception], message: str, change: dict):
    rows, gate_up, group_sizes = make(CASES[0], fused=True)
    with pytest.raises(error) as caught:
        grouped_swiglu(rows, gate_up, group_sizes, **CONSTANTS | change)
    assert str(caught.value) == message


def test_gate_and_up_are_two():
    rows, weights, group_sizes = make(CASES[0], fused=False)
    with pytest.raises(ValueError, match=r"gate_up has shape \(3, 1, 256, 128\), whose second axis must be 2"):
        grouped_swiglu(rows, weights[:, None], group_sizes, **CONSTANTS)


@pytest.mark.parametrize(
    ("reason", "sizes"),
    [
        ("the dtype is float32, not one of bfloat16, float16", {"dtype": jnp.float32}),
        ("there are 100 channels in, not a multiple of 64", {"channels": 100}),
        ("there are 128 channels out, not a multiple of 256", {"out": 128}),
    ],
)
def test_not_served(reason: str, sizes: dict):
    assert OPERATIONS["grouped_matmul"].why_not("mosaic_gpu", *arrays(**sizes)) == reason


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("widest", [8, 24, 160])
@pytest.mark.parametrize("seed", range(1, 4))
def test_plan(seed: int, widest: int, tiles: int):
    """Every row of a group is in one tile of its group; tiles are aligned and no higher than asked for."""
    rng = np.random.default_rng(seed)
    num_groups = int(rng.integers(1, 30))
    sizes = rng.integers(0, (0, 9, 40, 600)[seed], num_groups) * (rng.random(num_groups) < 0.7)
    num_rows = -(-(int(sizes.sum()) + int(rng.integers(1, 20))) // 8) * 8
    plan = make_plan(jnp.asarray(sizes, jnp.int32), num_rows=num_rows, widest=widest, tiles=tiles)
    first_rows, num_units, heights = planning.cut(plan.begins, plan.sizes, widest=widest, tiles=tiles)
    assert num_units.sum() <= len(plan.group_of_unit)
    np.testing.assert_array_equal(plan.group_of_unit[: num_units.sum()], np.repeat(np.arange(num_groups), num_units))
    owner = np.full(num_rows, -1)
    for unit, group in enumerate(np.asarray(plan.group_of_unit)[: num_units.sum()]):
        height, begin = int(heights[group]), int(plan.begins[group])
        assert first_rows[group] % 8 == height % 8 == 0
        assert 0 < height <= widest
        for tile in range(tiles):
            row = int(first_rows[group] + ((unit - plan.first_units[group]) * tiles + tile) * height)
            own = np.arange(max(row, begin), min(row + height, begin + int(sizes[group])))
            assert (owner[own] == -1).all()
            owner[own] = group
    expected = np.repeat(np.arange(num_groups), sizes)
    np.testing.assert_array_equal(owner, np.concatenate([expected, np.full(num_rows - len(expected), -1)]))


def test_a_unit_for_every_worst_case():
    """Groups that end just behind a multiple of 8 need the most units."""
    for sizes in ([1] * 16, [2] * 12, [7] * 8, [10] * 8, [9, 0, 8, 1, 16]):
        num_rows = -(-sum(sizes) // 8) * 8
        plan = make_plan(jnp.asarray(sizes, jnp.int32), num_rows=num_rows, widest=8, tiles=1)
        num_units = planning.cut(plan.begins, plan.sizes, widest=8, tiles=1).num_units
        assert int(num_units.sum()) <= len(plan.group_of_unit)


@pytest.mark.parametrize(
    "change", [{"widths": (16, 8)}, {"widths": (12,)}, {"warpgroups": 3}, {"stages": 1}, {"stages": 14}, {"ctas": 0}]
)
def test_configs_that_do_not_fit(change: dict):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(TuningConfig(widths=(8,), warpgroups=1, stages=2, ctas=2), **change)


def test_interpreted():
    """In a process of its own: the number of threads has to be set before jax is imported."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"NPROC": "16", "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, str(HERE / "grouped_matmul_interpreter.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
