"""Rows and matrices for `skinny_matmul` and what NumPy makes of them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Case:
    """So many rows of so many channels, and the channels out of each matrix."""

    num_rows: int
    channels_in: int
    channels_out: tuple[int, ...]
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.num_rows}x{self.channels_in}-{'+'.join(map(str, self.channels_out))}-{self.dtype}"


# One row, a whole tile of rows and what is between; a matrix alone, and several.
CASES = (
    Case(1, 512, (128, 64)),
    Case(3, 1024, (64, 128, 64), "float16"),
    Case(8, 256, (64,)),
    Case(9, 384, (64, 64)),
    Case(64, 512, (192,), "float16"),
)


def make(case: Case, seed: int = 0) -> tuple[jax.Array, list[jax.Array]]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape).astype(jnp.dtype(case.dtype)))

    return normal(case.num_rows, case.channels_in), [normal(out, case.channels_in) for out in case.channels_out]


def check(rows: jax.Array, matrices: list[jax.Array], products: list[jax.Array]) -> None:
    """Within the rounding of a result, and the order of a sum in float32."""
    wide = np.asarray(rows, np.float64)
    for matrix, product in zip(matrices, products, strict=True):
        expected = wide @ np.asarray(matrix, np.float64).T
        assert product.dtype == rows.dtype
        rounding = float(jnp.finfo(product.dtype).eps) / 2
        np.testing.assert_allclose(
            np.asarray(product, np.float64), expected, rtol=1.01 * rounding, atol=1e-5 * np.abs(expected).max()
        )
