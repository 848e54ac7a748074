"""Every implementation of the skinny matmul against NumPy, and what it refuses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skinny_matmul_cases as cases

from pallas_kernels import skinny_matmul
from pallas_kernels.skinny_matmul.api import OPERATIONS
from pallas_kernels.skinny_matmul.mosaic_gpu import TuningConfig, multiply

OPERATION = OPERATIONS["skinny_matmul"]
ARRAY: Any = jax.ShapeDtypeStruct
WIDE = cases.Case(2, 40, (3, 5, 1), "float32")


@pytest.mark.parametrize("impl", ["reference", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", [*cases.CASES, WIDE], ids=str)
def test_against_numpy(case: cases.Case, impl: str):
    rows, matrices = cases.make(case)
    if (reason := OPERATION.why_not(impl, rows, *matrices)) is not None:
        pytest.skip(reason)
    cases.check(rows, matrices, jax.jit(functools.partial(skinny_matmul, impl=impl))(rows, matrices))


def test_derivative():
    rows, matrices = cases.make(WIDE)

    def loss(rows, matrices):
        return sum(jnp.sum(jnp.sin(product)) for product in skinny_matmul(rows, matrices))

    def plain(rows, matrices):
        return jnp.sum(jnp.sin(rows @ jnp.concatenate(matrices).T))

    got, expected = (jax.grad(function, argnums=(0, 1))(rows, matrices) for function in (loss, plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), got, expected)


@pytest.mark.parametrize(
    ("rows", "matrices", "error", "message"),
    [
        (ARRAY((2, 8), "f4"), [], ValueError, "matrices must not be empty"),
        (ARRAY((2,), "f4"), [ARRAY((4, 8), "f4")], ValueError, r"rows has shape \(2,\), which must have 2 axes"),
        (
            ARRAY((2, 8), "f4"),
            [ARRAY((4, 8), "f4"), ARRAY((4, 9), "f4")],
            ValueError,
            r"matrices\[1\] has shape \(4, 9\), but I in \[O1 I\] must be 8, as in rows",
        ),
        (ARRAY((2, 8), "f4"), [ARRAY((4, 8), "f2")], TypeError, r"rows has dtype float32, which must be float16"),
        (ARRAY((2, 8), "i4"), [ARRAY((4, 8), "i4")], TypeError, r"matrices\[0\] has dtype int32"),
    ],
)
def test_bad_arguments_are_refused(rows, matrices, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        jax.eval_shape(skinny_matmul, rows, matrices)


@pytest.mark.parametrize(
    ("reason", "rows", "out", "dtype"),
    [
        ("the dtype is float32, not one of bfloat16, float16", (1, 256), 64, "float32"),
        ("there are 65 rows, more than 64", (65, 256), 64, "bfloat16"),
        ("192 channels go in, not a multiple of 128", (1, 192), 64, "bfloat16"),
        ("96 channels come out, not a multiple of 64", (1, 256), 96, "bfloat16"),
    ],
)
def test_what_the_kernel_does_not_serve(reason: str, rows: tuple[int, int], out: int, dtype: str):
    assert OPERATION.why_not("mosaic_gpu", ARRAY(rows, dtype), ARRAY((out, rows[1]), dtype)) == reason


@pytest.mark.parametrize("change", [{"parts": 0}, {"parts": 9}, {"stages": 0}, {"depth": 192}])
def test_configurations_that_are_refused(change: dict[str, int]):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name}={change[name]} must be"):
        TuningConfig(**({"parts": 1, "stages": 2, "depth": 256} | change))


def test_the_heuristic_leaves_each_cta_an_sm():
    def parts(channels: int) -> int:
        return TuningConfig.heuristic(1, channels).parts

    assert [parts(channels) for channels in (64, 1536, 2112, 4224, 4288, 9856)] == [8, 4, 4, 2, 1, 1]


def test_a_configuration_is_fitted_to_the_sizes():
    assert TuningConfig(1, 2, 256).fitted(1, 6144) == TuningConfig(1, 2, 256)
    assert TuningConfig(1, 2, 256).fitted(1, 384) == TuningConfig(1, 2, 128)
    # 64 KiB a step, and 24 more for rows that have to be rearranged.
    assert TuningConfig(1, 4, 256).fitted(64, 512) == TuningConfig(1, 3, 256)
    assert TuningConfig(1, 4, 256).fitted(41, 512) == TuningConfig(1, 2, 256)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize(("num_rows", "stages", "depth"), [(1, 3, 256), (5, 1, 128), (24, 2, 256), (57, 2, 128)])
def test_every_configuration(parts: int, num_rows: int, stages: int, depth: int):
    """Parts that do not divide the steps, more stages than steps; two runs are bit-equal."""
    case = cases.Case(num_rows, 1280, (256, 64, 320))
    rows, matrices = cases.make(case, seed=num_rows)
    if (reason := OPERATION.why_not("mosaic_gpu", rows, *matrices)) is not None:
        pytest.skip(reason)
    run = functools.partial(multiply, config=TuningConfig(parts, stages, depth))
    product, again = run(rows, *matrices), run(rows, *matrices)
    cases.check(rows, [jnp.concatenate(matrices)], [product])
    np.testing.assert_array_equal(np.asarray(product, np.float32), np.asarray(again, np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 4, 16, 64])
@pytest.mark.parametrize(
    ("channels_in", "channels_out"),
    [(6144, (8192, 512, 512, 512, 128)), (8192, (6144,)), (6144, (1024, 128, 128, 128, 128)), (1024, (6144,))],
)
def test_released_sizes(num_rows: int, channels_in: int, channels_out: tuple[int, ...]):
    """The projections of a sparse layer, on one device and on each of eight."""
    rows, matrices = cases.make(cases.Case(num_rows, channels_in, channels_out))
    if (reason := OPERATION.why_not("mosaic_gpu", rows, *matrices)) is not None:
        pytest.skip(reason)
    cases.check(rows, matrices, skinny_matmul(rows, matrices, impl="mosaic_gpu"))
